"""What the network between processes carries: the sum of a gradient over all, and each node by itself."""

import statistics
import time

import torch

from topoflow.tools.doctor.amounts import show_bytes, show_rate, show_seconds
from topoflow.tools.doctor.report import FAIL, WARNING, Check
from topoflow.tools.doctor.survey import Survey

TRIAL_BYTES = 2**20
LEAST_PAIR_BYTES, MOST_PAIR_BYTES = 8 * 2**20, 64 * 2**20
"""Between two nodes a small gradient would measure how long the first byte takes; a large one tells no more."""
ALL_REDUCE_SECONDS, PAIR_SECONDS = 2.0, 1.0
"""What one measurement may take; where the network is too slow for the whole gradient, a part of it is sent."""
REPEATS, MOST_PARTNERS = 3, 3
WARNING_SHARE, FAIL_SHARE = 0.5, 0.2
"""A node with less than this share of the median node's bandwidth stands out."""


def check_network(survey: Survey, gradient_bytes: int, backend: str) -> Check:
    """Time of an all-reduce of the gradient, and the bandwidth of each node with a few others.

    An all-reduce takes all as long as its slowest, so it names nobody. Nodes therefore send to each other in pairs, all
    pairs at once, in up to three rounds with other partners; the best of its rounds is a node's bandwidth, so that
    one slow node does not make its partners look slow.
    """
    check = Check("network")
    if survey.context.world_size == 1:
        check.summary = "one process: nothing is sent"
        return check
    kind = survey.context.gather_objects(survey.context.device.type)
    # gloo moves nothing between GPUs one by one, and a process without a GPU can send nothing from one
    on_device = set(kind) == {"cuda"} and backend != "gloo"
    device = survey.context.device if on_device else torch.device("cpu")
    seconds, size = time_all_reduce(survey, gradient_bytes, device)
    world = survey.context.world_size
    part = "" if size == gradient_bytes else f" ({show_bytes(size)} of them)"
    bandwidth = 2 * (world - 1) / world * size / seconds
    check.summary = (
        f"all-reduce of the gradient, {show_bytes(gradient_bytes)}{part}: {show_seconds(seconds)}, "
        f"{show_rate(bandwidth)} a process"
    )
    for node in survey.ranks_of:
        check.note(node, all_reduce_seconds=seconds, all_reduce_bytes=size)
    if len(survey.leaders) > 1:
        _judge_nodes(survey, check, measure_nodes(survey, gradient_bytes, device))
    return check


def time_all_reduce(survey: Survey, wanted_bytes: int, device: torch.device) -> tuple[float, int]:
    """(seconds, bytes) of the fastest of a few all-reduces of `wanted_bytes`, or of what the network can in time."""

    def once(size: int) -> float:
        tensor = torch.zeros(max(1, size // 4), device=device)
        survey.barrier()
        start = time.monotonic()
        survey.context.all_reduce_sum(tensor)
        _settle(device)
        return max(survey.context.gather_objects(time.monotonic() - start))

    once(TRIAL_BYTES)  # the first one connects
    trial = min(TRIAL_BYTES, wanted_bytes)
    size = _affordable(wanted_bytes, trial, once(trial), ALL_REDUCE_SECONDS)
    return min(once(size) for _ in range(REPEATS)), size


def measure_nodes(survey: Survey, wanted_bytes: int, device: torch.device) -> dict[int, float]:
    """{first rank of a node: bytes in a second that it sends and receives at once with the best of its partners}."""
    rounds = pair_up(survey.leaders)[:MOST_PARTNERS]
    slowest = 0.0
    for pairs in rounds:
        _time_pairs(survey, pairs, TRIAL_BYTES, device)  # the first one connects
        slowest = max(slowest, *_time_pairs(survey, pairs, TRIAL_BYTES, device).values())
    wanted_bytes = min(max(wanted_bytes, LEAST_PAIR_BYTES), MOST_PAIR_BYTES)
    size = _affordable(wanted_bytes, TRIAL_BYTES, slowest, PAIR_SECONDS)
    best: dict[int, float] = {}
    for pairs in rounds:
        for _ in range(REPEATS):
            for rank, seconds in _time_pairs(survey, pairs, size, device).items():
                best[rank] = max(best.get(rank, 0.0), size / seconds)
    return best


def pair_up(ranks: list[int]) -> list[list[tuple[int, int]]]:
    """Rounds in which each rank meets another one, or one of an odd number rests: the circle method for tournaments."""
    circle: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    rounds, half = [], len(circle) // 2
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(one, other) for one, other in pairs if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def _time_pairs(survey: Survey, pairs: list[tuple[int, int]], size: int, device: torch.device) -> dict[int, float]:
    """{rank: seconds} of an exchange in all pairs at once, on every process."""
    rank = survey.context.rank
    partner = next((other for pair in pairs if rank in pair for other in pair if other != rank), None)
    sent = torch.zeros(max(1, size // 4), device=device)
    received = torch.empty_like(sent)
    _settle(device)
    survey.barrier()
    seconds = None
    if partner is not None:
        start = time.monotonic()
        survey.context.exchange(partner, sent, received)
        _settle(device)
        seconds = time.monotonic() - start
    return {rank: took for rank, took in enumerate(survey.context.gather_objects(seconds)) if took is not None}


def _affordable(wanted_bytes: int, trial_bytes: int, trial_seconds: float, seconds: float) -> int:
    """How much can be sent in `seconds`, judging by a trial; the same on all processes."""
    return max(trial_bytes, min(wanted_bytes, int(trial_bytes * seconds / trial_seconds)))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _judge_nodes(survey: Survey, check: Check, rates: dict[int, float]) -> None:
    usual = statistics.median(rates.values())
    for rank, rate in rates.items():
        check.note(survey.node_of[rank], network_bytes_per_second=rate)
        if rate < WARNING_SHARE * usual:
            text = (
                f"sends and receives {show_rate(rate)}, the median node {show_rate(usual)}: look at its link, or "
                "leave it out (--exclude)"
            )
            verdict = FAIL if rate < FAIL_SHARE * usual else WARNING
            check.findings.append(survey.finding(verdict, rank, text, whole_node=True))
    slowest = min(rates, key=lambda rank: rates[rank])
    check.summary += f"; in pairs of nodes: median {show_rate(usual)}, slowest {survey.node_of[slowest]} with "
    check.summary += show_rate(rates[slowest])
