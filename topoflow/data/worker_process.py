"""The worker processes of a loader: how they are forked, which signals they obey, and how they communicate."""

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
    """A queue between processes whose `put` writes at once, with the methods that torch's loader needs.

    multiprocessing.Queue writes in a thread, which takes the interpreter's lock from the loop just when the next step
    begins and so costs a millisecond. Only for few and short messages: `put` waits if the pipe is full (64 KiB on
    Linux).
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
        """Return a queue between the loader and its workers."""
        assert maxsize == 0
        return DirectQueue(ctx=self)


@contextmanager
def deferred_sigterm() -> Iterator[None]:
    """Defer SIGTERM until after the block; a process forked inside it keeps SIGTERM blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(parent: int, _: int) -> None:
    """Leave signals to the parent: a stop request to the whole job must not end the workers before the last step."""
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # a worker that wakes up does not preempt the training loop; its share of the processor stays the same
    with suppress(AttributeError, OSError):  # only on Linux, and a container may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Obey SIGTERM only from the parent process, as torch's own handler does, and end when the parent is gone.

    torch checks for that too, but a worker whose parent was killed during start-up would wait for work forever.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
