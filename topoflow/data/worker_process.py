"""The worker processes of a loader: how they are forked, what they heed, and how they and the loader speak."""

import multiprocessing.queues
import os
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkContext
from typing import Any

import torch


class DirectQueue(multiprocessing.queues.SimpleQueue):
    """A queue between processes whose `put` writes at once, with what torch's loader asks of a queue.

    multiprocessing.Queue leaves the writing to a thread. That takes the interpreter's lock from the loop just when the
    next step begins, and with it a millisecond. Only for short messages, of which few are under way: `put` waits where
    the pipe is full (64 KiB on Linux).
    """

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next message.

        Raises:
            queue.Empty: none came within `timeout` seconds.
        """
        if timeout is not None and not self._poll(timeout):  # pyright: ignore[reportAttributeAccessIssue]  (undocumented)
            raise queue.Empty
        return super().get()

    def cancel_join_thread(self) -> None:
        """There is no thread."""


class WorkerContext(ForkContext):
    """Forks, so that the fields in memory are shared with the workers, copy-on-write."""

    def Queue(self, maxsize: int = 0) -> DirectQueue:  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]  (multiprocessing's name)
        """What the loader and its workers speak through."""
        assert maxsize == 0
        return DirectQueue(ctx=self)


@contextmanager
def deferred_sigterm() -> Iterator[None]:
    """A SIGTERM that comes while the block runs arrives after it; a process forked inside never gets one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(parent: int, _: int) -> None:
    """Leave signals to the parent: a stop asked of the whole job must not end the workers before its last step."""
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # a worker that wakes does not interrupt who computes; its share of the processor is what it was
    with suppress(AttributeError, OSError):  # Linux alone has it, and a container may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Obey SIGTERM from the parent process alone, as torch's own handler does, and end when the parent is gone.

    torch looks for that too, but a worker whose parent was killed while it started would wait for work for ever.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
