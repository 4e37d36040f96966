"""Which software each process runs."""

import functools
import importlib.metadata
import platform
from collections import Counter

import torch

import topoflow
from topoflow.reproducibility import hash_sources
from topoflow.tools.doctor.report import FAIL, Check
from topoflow.tools.doctor.survey import Survey, values

PACKAGES = ("torch", "numpy", "xarray", "zarr")


def check_software(survey: Survey) -> Check:
    """Python, packages, drivers and the program's own source files are the same everywhere."""
    answers = survey.ask_ranks(functools.partial(describe_versions, survey.context.device))
    said = values(answers)
    check = Check("software", findings=list(survey.failures(answers)))
    for name in dict.fromkeys(name for versions in said.values() for name in versions):
        usual, count = Counter(versions.get(name) for versions in said.values()).most_common(1)[0]
        for rank, versions in said.items():
            if versions.get(name) != usual:
                text = f"{name} is {versions.get(name)}, on {count} other process(es) {usual}: expected the same on all"
                check.findings.append(survey.finding(FAIL, rank, text))
    for node, ranks in survey.ranks_of.items():
        if ranks[0] in said:
            check.note(node, software=said[ranks[0]])
    first = said[min(said)] if said else {}
    check.summary = ", ".join(f"{name} {version}" for name, version in first.items() if version)
    return check


def describe_versions(device: torch.device) -> dict[str, str | None]:
    """{what: version} of this process; topoflow by its version and a hash of its source files."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    found["torch"] = str(torch.__version__)  # with what it was built for, which the package's metadata may leave out
    found["topoflow"] = f"{topoflow.__version__} (sources {hash_sources()[:8]})"
    found["CUDA"], found["ROCm"] = torch.version.cuda, torch.version.hip
    nccl = torch.cuda.nccl.version() if device.type == "cuda" else None
    found["NCCL"] = ".".join(map(str, nccl)) if nccl else None
    return found
