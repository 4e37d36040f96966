"""What each process computes on: its GPU, or the CPU."""

import torch

from topoflow.launch import VISIBLE_DEVICES, assigned_devices, device_identity, set_variables
from topoflow.tools.doctor.report import FAIL, WARNING, Check, Finding
from topoflow.tools.doctor.survey import Survey, values


def check_devices(survey: Survey, refusal: str | None) -> Check:
    """Each process has a device of its own, and the one that was meant. refusal: why this process got none, if so."""
    device = survey.context.device
    answers = survey.ask_ranks(lambda: {**describe_device(device), "refusal": refusal})
    said = values(answers)
    check = Check("devices", findings=list(survey.failures(answers)))
    for rank, found in said.items():
        if found["refusal"] is not None:
            check.findings.append(survey.finding(FAIL, rank, found["refusal"]))
        elif found["kind"] == "cpu" and found["assigned"]:
            text = f"{found['assigned']}, but torch ({found['built_for']}) sees no GPU: it computes on the CPU"
            check.findings.append(survey.finding(WARNING, rank, text))
    check.findings += _shared(survey, said)
    for node, ranks in survey.ranks_of.items():
        devices = [said[rank] for rank in ranks if rank in said]
        check.note(node, devices=[found["name"] for found in devices], visible=[found["visible"] for found in devices])
    check.summary = _summarize(said)
    return check


def describe_device(device: torch.device) -> dict:
    """Plain values: kind, name, what tells it from others on the node, and the variables that choose it."""
    built_for = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    found = {
        "kind": device.type,
        "name": "cpu",
        "identity": None,
        "visible": set_variables(VISIBLE_DEVICES),
        "assigned": assigned_devices(),
        "built_for": built_for if torch.version.hip or torch.version.cuda else "built for CPU",
    }
    if device.type == "cuda":
        found["name"] = f"cuda:{device.index} {torch.cuda.get_device_name(device)}"
        # where torch cannot tell, what chose the device must do
        found["identity"] = device_identity(device) or repr((sorted(found["visible"].items()), device.index))
    return found


def _shared(survey: Survey, said: dict[int, dict]) -> list[Finding]:
    findings = []
    for node, ranks in survey.ranks_of.items():
        by_identity: dict[str, list[int]] = {}
        for rank in ranks:
            if rank in said and said[rank]["identity"] is not None:
                by_identity.setdefault(said[rank]["identity"], []).append(rank)
        for users in by_identity.values():
            if len(users) > 1:
                text = (
                    f"ranks {', '.join(map(str, users))} have one device, {said[users[0]]['name']}: expected one "
                    "process a device; look at --gpus-per-task and the visible-devices variables"
                )
                findings.append(Finding(FAIL, node, tuple(users), text))
    return findings


def _summarize(said: dict[int, dict]) -> str:
    counts: dict[str, int] = {}
    for found in said.values():
        name = found["name"].partition(" ")[2] or "cpu"
        counts[name] = counts.get(name, 0) + 1
    chosen_by = sorted({name for found in said.values() for name in found["visible"]})
    devices = ", ".join(f"{count} x {name}" for name, count in counts.items())
    return f"{devices}; set for the processes: {', '.join(chosen_by) or 'no visible-devices variable'}"
