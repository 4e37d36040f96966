"""A request to stop, by signal: the handler sets a flag and nothing else; who works looks at it between two pieces."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from topoflow.errors import StopRequested

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Name of the first stop signal that arrived, or None. A second one changes nothing and breaks nothing."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @contextmanager
    def listening(self) -> Iterator["StopFlag"]:
        """Catch the stop signals (Ctrl-C, preemption and scancel, SLURM's warning) while the block runs."""
        previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        # launch/srun.sh starts the program with these blocked: one that came while it was being started arrives now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def require_unasked(self, gather: Callable[[str | None], list[str | None]], phase: str) -> None:
        """End here if a signal arrived on any rank: `phase` has nothing that this would lose. Call on all ranks.

        Args: gather, gives every rank what each says, in the order of ranks.

        Raises:
            StopRequested: on every rank alike.
        """
        asked = [name for name in gather(self.signal_name) if name]
        if asked:
            refusal = StopRequested(f"stopped by {asked[0]} during {phase}")
            refusal.shared = True
            raise refusal

    def _note(self, number: int, frame: object) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
