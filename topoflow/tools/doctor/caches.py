"""The folders in which torch, Triton and MIOpen keep what they compiled."""

import functools
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from topoflow.launch import CACHES, set_variables
from topoflow.tools.doctor.folder import PREFIX, nearest_folder
from topoflow.tools.doctor.report import FAIL, WARNING, Check
from topoflow.tools.doctor.survey import Survey, values

_MIOPEN_DEFAULTS = {"MIOPEN_USER_DB_PATH": ".config/miopen", "MIOPEN_CUSTOM_CACHE_DIR": ".cache/miopen"}
"""Where MIOpen writes without its variables, below the home folder."""


def check_caches(survey: Survey, compiles: bool) -> Check:
    """Home, temporary and cache folders can be written; MIOpen's are each node's own (a shared one gets corrupted).

    compiles: whether the model is compiled.
    """
    marks: dict[str, str] = {}  # variable: a file of ours in its folder
    try:
        answers = survey.ask_nodes(functools.partial(mark_folders, marks))
        said = values(answers)
        others = {
            name: [found[name]["mark"] for rank, found in said.items() if rank != survey.context.rank and name in found]
            for name in _MIOPEN_DEFAULTS
        }
        seen = values(survey.ask_nodes(functools.partial(visible_marks, others)))
    finally:
        # a question that was left behind hangs in one of these folders: so would this
        for mark in [] if survey.left_behind else list(marks.values()):
            with suppress(OSError):
                Path(mark).unlink()
    check = Check("caches", findings=list(survey.failures(answers, whole_node=True)))
    for rank, found in said.items():
        check.note(survey.node_of[rank], caches={name: item["folder"] for name, item in found.items()})
        for name, item in found.items():
            if item["error"] is not None:
                is_needed = name == "TMPDIR" or (compiles and name.startswith(("TORCHINDUCTOR", "TRITON")))
                text = f"{name}, {item['folder']}: cannot be written ({item['error']}): set {name} to a folder that can"
                check.findings.append(survey.finding(FAIL if is_needed else WARNING, rank, text, whole_node=True))
        for name in set(seen.get(rank, [])) & set(found):
            text = (
                f"{name}, {found[name]['folder']}: other nodes write there too, and a shared cache of MIOpen gets "
                "corrupted: set it to a folder of the node's own, in /tmp"
            )
            check.findings.append(survey.finding(WARNING, rank, text, whole_node=True))
    first = said[min(said)] if said else {}
    check.summary = ", ".join(f"{name} {item['folder']}" for name, item in first.items())
    return check


def cache_folders() -> dict[str, Path]:
    """{variable: folder}, by default or as the environment says; MIOpen's where it is used or configured."""
    said = set_variables(CACHES)
    folders = {"HOME": Path.home(), "TMPDIR": Path(tempfile.gettempdir())}
    folders |= {name: Path(value) for name, value in said.items() if name not in folders}
    if torch.version.hip:
        folders |= {name: Path.home() / default for name, default in _MIOPEN_DEFAULTS.items() if name not in folders}
    return folders


def mark_folders(marks: dict[str, str]) -> dict[str, dict[str, str | None]]:
    """Write a small file into each folder (or the nearest above that is there): {variable: folder, mark, error}.

    marks: receives {variable: file}, for who removes them.
    """
    found: dict[str, dict[str, str | None]] = {}
    for name, folder in cache_folders().items():
        mark, error = nearest_folder(folder) / f"{PREFIX}{secrets.token_hex(8)}", None
        marks[name] = str(mark)
        try:
            mark.write_bytes(b"x")
        except OSError as refused:
            error = refused.strerror
        found[name] = {"folder": str(folder), "mark": str(mark), "error": error}
    return found


def visible_marks(marks: dict[str, list[str]]) -> list[str]:
    """The variables in whose folder a file of another node is seen."""
    return [name for name, files in marks.items() if any(Path(file).exists() for file in files)]
