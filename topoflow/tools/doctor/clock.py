"""How far the nodes' clocks are apart."""

import statistics
import time

import torch

from topoflow.tools.doctor.report import FAIL, WARNING, Check
from topoflow.tools.doctor.survey import Survey

ROUNDS = 8
WARNING_SECONDS, FAIL_SECONDS = 0.1, 1.0


def now() -> float:
    """This node's clock, in seconds since 1970."""
    return time.time()


def check_clocks(survey: Survey) -> Check:
    """Each node's clock against that of rank 0, by round trips as in NTP (RFC 5905, section 8), then against most."""
    context = survey.context
    survey.barrier()
    found: dict[int, tuple[float, float]] = {0: (0.0, 0.0)}
    for leader in survey.leaders[1:]:
        if context.rank == 0:
            found[leader] = measure_offset(survey, leader)
        elif context.rank == leader:
            answer_offset(survey)
    found = context.broadcast_object(found)
    # with two clocks nobody knows which one is wrong
    by_most = len(found) > 2
    usual = statistics.median(offset for offset, _ in found.values()) if by_most else 0.0
    check = Check("clocks")
    for rank, (offset, uncertainty) in found.items():
        check.note(survey.node_of[rank], clock_offset_seconds=offset - usual, clock_uncertainty_seconds=uncertainty)
        least = abs(offset - usual) - uncertainty
        if least > WARNING_SECONDS:
            verdict = FAIL if least > FAIL_SECONDS else WARNING
            way = "ahead of" if offset > usual else "behind"
            apart = f"{abs(offset - usual):.3f} s {way} {'most others' if by_most else 'that of rank 0'}"
            text = f"the clock is {apart}: synchronize it (chronyc tracking, timedatectl)"
            check.findings.append(survey.finding(verdict, rank, text, whole_node=True))
    offsets = [offset for offset, _ in found.values()]
    spread, uncertainty = max(offsets) - min(offsets), max(uncertainty for _, uncertainty in found.values())
    check.summary = f"at most {spread * 1e3:.1f} ms apart (measured to within {uncertainty * 1e3:.1f} ms)"
    if len(found) == 1:
        check.summary = "one node, one clock"
    return check


def measure_offset(survey: Survey, other: int) -> tuple[float, float]:
    """(offset, uncertainty) in seconds of the clock of rank `other`, which calls `answer_offset` meanwhile.

    Its reading is taken between our two; where is not known, so half the round trip bounds the error. The shortest of
    a few round trips counts.
    """
    ping, pong = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    best = (0.0, float("inf"))
    for _ in range(ROUNDS):
        before = now()
        survey.context.exchange(other, ping, pong)  # its part is sent beforehand and says nothing
        survey.context.exchange(other, ping, pong)
        after = now()
        uncertainty = (after - before) / 2
        if uncertainty < best[1]:
            best = (pong.item() - (before + after) / 2, uncertainty)
    return best


def answer_offset(survey: Survey) -> None:
    """The other side of `measure_offset`, for rank 0."""
    ping, pong = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for _ in range(ROUNDS):
        survey.context.exchange(0, pong, ping)
        pong[0] = now()
        survey.context.exchange(0, pong, ping)
