"""Run commands in a terminal, so that their default output on one is part of their cost. Not on Windows."""

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
    """Run a command in the project's folder, so that its imports are found, with so many threads; show nothing.

    Raises: RuntimeError, with the end of its output, if its status is not 0 or if it takes longer than TIMEOUT_SECONDS
    (then it is killed).
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (ROWS, COLUMNS))  # a progress bar is not drawn on a terminal without columns
    output: list[bytes] = []

    def listen() -> None:
        while True:
            try:
                output.append(os.read(ours, 65536))
            except OSError:  # the other side is closed
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
        end = b"".join(output)[-4000:].decode(errors="replace")
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{end}")
