"""Commands that see a terminal, so that what they show on one by default is part of what they cost. Not on Windows."""

import os
import pty
import subprocess
import termios
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS, COLUMNS = 40, 120
TIMEOUT_SECONDS = 1800


def run_in_terminal(command: list[str], threads: int) -> None:
    """Run a command in the project's folder, which its imports are found in, on so many threads; nothing is shown.

    Raises: RuntimeError if it ends with a status other than 0, or not within TIMEOUT_SECONDS (then it is ended), with
    the end of what it said.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (ROWS, COLUMNS))  # a bar without columns is not drawn
    said: list[bytes] = []

    def listen() -> None:
        while True:
            try:
                said.append(os.read(ours, 65536))
            except OSError:  # all of the other side is closed
                return

    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        listener = threading.Thread(target=listen)
        listener.start()
        try:
            status: int | str = process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers
            status = f"none within {TIMEOUT_SECONDS} s"
    listener.join()
    os.close(ours)
    if status:
        end = b"".join(said)[-4000:].decode(errors="replace")
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{end}")
