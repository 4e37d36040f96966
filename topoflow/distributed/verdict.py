"""Why a run ends on all ranks when one of them cannot go on."""

from dataclasses import asdict, dataclass
from typing import Any

from topoflow import errors
from topoflow.errors import RanksDisagree, Refusal


@dataclass(frozen=True)
class Verdict:
    """What all ranks end with, in the words that the user reads: which rank, on which host, in which phase, and why."""

    message: str
    kind: str = RanksDisagree.__name__
    """Name of the refusal: that of a rank which refused something that the others did not see, else RanksDisagree."""
    grace_seconds: float = 3.0
    """How long a rank may take to end by itself."""
    shared: bool = True
    """Rank 0 says it for all. False: rank 0 cannot."""

    def refusal(self) -> Refusal:
        """As an error that every rank raises alike."""
        refusal = getattr(errors, self.kind)(self.message)
        refusal.shared = self.shared
        return refusal

    def exit_status(self, has_failed: bool) -> int:
        """That of a process which the watch ends. has_failed: it is the one that the verdict is on."""
        is_crash = has_failed and self.kind == RanksDisagree.__name__
        return 1 if is_crash else self.refusal().exit_status

    def to_dict(self) -> dict[str, Any]:
        """For the wire."""
        return asdict(self)


def verdict_on_error(error: BaseException, who: str) -> Verdict:
    """What a rank says of an error of its own. who: rank, host and phase."""
    if isinstance(error, Refusal):
        return Verdict(f"{who}: {error}", type(error).__name__)
    first_line = (str(error).splitlines() or [""])[0]
    return Verdict(f"{who}: {type(error).__name__}: {first_line}".removesuffix(": "))


def verdict_on_loss(who: str, observer: str) -> Verdict:
    """A rank whose connection was closed before it said that it was done. observer: a rank and its phase."""
    return Verdict(f"{who}: lost while {observer}: its process ended without a word (killed, or out of memory)")
