"""A request to stop, by signal: the handler sets a flag and nothing else; the trainer looks at it after each step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from topoflow.errors import StopRequested

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Name of the first stop signal that arrived, or None. A second one changes nothing and breaks nothing."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._phase: str | None = None

    @contextmanager
    def listening(self) -> Iterator["StopFlag"]:
        """Catch the stop signals (Ctrl-C, preemption and scancel, SLURM's warning) while the block runs."""
        previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def interrupt_from_now_on(self, phase: str) -> None:
        """From here a stop signal ends the program at once: `phase` has nothing that a kill would lose.

        Raises:
            StopRequested: now, if a signal has arrived already, or where one does.
        """
        self._phase = phase
        if self.signal_name is not None:
            self._refuse()

    def _note(self, number: int, frame: object) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
        if self._phase is not None:
            self._refuse()

    def _refuse(self) -> None:
        refusal = StopRequested(f"stopped by {self.signal_name} during {self._phase}")
        refusal.shared = True
        raise refusal
