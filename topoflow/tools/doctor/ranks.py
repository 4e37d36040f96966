"""Who the processes are: launcher, ranks, and the steps that they could share."""

import dataclasses

from topoflow.config import Config
from topoflow.data.sampling import BatchPlan
from topoflow.errors import ConfigError
from topoflow.reduction import require_whole_subtrees
from topoflow.tools.doctor.report import FAIL, WARNING, Check, Finding
from topoflow.tools.doctor.survey import Survey, values


def check_ranks(survey: Survey, config: Config, is_configured: bool) -> Check:
    """All believe the same launcher, are numbered without a gap, and could share the configured batch."""
    launch = survey.context.launch
    answers = survey.ask_ranks(lambda: dataclasses.asdict(launch))
    said = values(answers)
    check = Check("ranks", findings=list(survey.failures(answers)))
    for node, ranks in survey.ranks_of.items():
        check.findings += _judge_node(survey, node, [said[rank] for rank in ranks if rank in said])
    check.findings += _unlike_rank_0(survey, said)
    if launch.idle_tasks > 0:
        text = f"one process, where SLURM job {launch.job} has {launch.idle_tasks + 1} tasks: start it with srun"
        check.findings += survey.about_all(WARNING, text)
    if is_configured:
        refusal = _refused_batch(config, launch.world_size)
        check.findings += survey.about_all(FAIL, refusal) if refusal else []
    per_node = [len(ranks) for ranks in survey.ranks_of.values()]
    shared = f"{per_node[0]} on each" if len(set(per_node)) == 1 else f"{min(per_node)} to {max(per_node)} on each"
    count = f"{launch.world_size} process(es) on {len(per_node)} node(s), {shared}"
    check.summary = f"{count}; launcher: {launch.launcher} ({launch.reason})"
    return check


def _judge_node(survey: Survey, node: str, launches: list[dict]) -> list[Finding]:
    ranks = tuple(survey.ranks_of[node])
    findings = []
    local_ranks = [launch["local_rank"] for launch in launches]
    if len(set(local_ranks)) < len(local_ranks):
        text = f"local ranks {_listed(local_ranks)}: expected each once; is LOCAL_RANK exported by hand?"
        findings.append(Finding(FAIL, node, ranks, text))
    claimed = {launch["local_world_size"] for launch in launches}
    if claimed != {len(ranks)}:
        text = f"the launcher says {_listed(claimed)} process(es) on this node, {len(ranks)} are here"
        findings.append(Finding(FAIL, node, ranks, text))
    return findings


def _unlike_rank_0(survey: Survey, said: dict[int, dict]) -> list[Finding]:
    names = ("launcher", "world_size", "job")
    wanted = dataclasses.asdict(survey.context.launch) if 0 not in said else said[0]
    return [
        survey.finding(FAIL, rank, f"{name} is {launch[name]!r}, on rank 0 {wanted[name]!r}: one launcher for all")
        for rank, launch in said.items()
        for name in names
        if launch[name] != wanted[name]
    ]


def _refused_batch(config: Config, world_size: int) -> str | None:
    """Why the global batch cannot be shared by so many processes, if so."""
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    try:
        BatchPlan(size, config.run.seed, size, micro, rank=0, world_size=world_size)
        if config.distributed.reduction == "canonical":
            require_whole_subtrees(size // micro, world_size)
    except ConfigError as error:
        return str(error)
    return None


def _listed(numbers: set[int] | list[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
