"""Which processors each process may run on."""

import os

from topoflow.tools.doctor.report import WARNING, Check, Finding
from topoflow.tools.doctor.survey import Survey, values


def check_processors(survey: Survey, workers: int) -> Check:
    """The processes of a node do not share processors, and have enough for their loader processes."""
    answers = survey.ask_ranks(usable_processors)
    said = values(answers)
    check = Check("CPUs", findings=list(survey.failures(answers)))
    for node, ranks in survey.ranks_of.items():
        bound = {rank: frozenset(said[rank]) for rank in ranks if rank in said}
        if not bound:
            continue
        union = frozenset().union(*bound.values())
        unbound = len(bound) > 1 and len(set(bound.values())) == 1
        each = len(union) / len(bound) if unbound else min(map(len, bound.values()))
        check.note(node, processors=len(union), processors_per_process=each, bound=not unbound)
        if unbound:
            if survey.context.launch.launcher == "srun":
                text = (
                    f"all {len(bound)} processes may run on the same {len(union)} CPU(s): bind them, "
                    "with srun --cpus-per-task=N --cpu-bind=cores"
                )
                check.findings.append(Finding(WARNING, node, tuple(bound), text))
        else:
            check.findings += _overlaps(node, bound)
        if each < 1 + workers:
            text = (
                f"{round(each, 1):g} CPU(s) a process for the training and data.workers={workers}: "
                f"give {1 + workers} (--cpus-per-task), or lower data.workers"
            )
            check.findings.append(Finding(WARNING, node, tuple(bound), text))
    counts = sorted({round(figures["processors_per_process"], 1) for figures in check.figures.values()})
    free = any(not figures["bound"] for figures in check.figures.values())
    each = f"{counts[0]:g}" if len(counts) == 1 else f"{counts[0]:g} to {counts[-1]:g}" if counts else "?"
    how = "shared by all processes of a node (none is bound)" if free else "none shared" if len(said) > 1 else "usable"
    check.summary = f"{each} a process, {how}"
    return check


def usable_processors() -> list[int]:
    """Numbers of the processors that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):  # macOS binds nothing
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0))


def _overlaps(node: str, bound: dict[int, frozenset[int]]) -> list[Finding]:
    findings = []
    users: dict[int, list[int]] = {}
    for rank, processors in bound.items():
        for processor in processors:
            users.setdefault(processor, []).append(rank)
    groups: dict[tuple[int, ...], list[int]] = {}
    for processor, ranks in users.items():
        if len(ranks) > 1:
            groups.setdefault(tuple(ranks), []).append(processor)
    for ranks, processors in groups.items():
        listed = ", ".join(map(str, sorted(processors)[:8])) + (", ..." if len(processors) > 8 else "")
        text = f"ranks {', '.join(map(str, ranks))} share CPU(s) {listed}: bind each to CPUs of its own"
        findings.append(Finding(WARNING, node, ranks, text))
    return findings
