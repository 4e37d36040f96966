"""Files that anyone may have spoiled: each is imported with a report or refused, never an exception of another kind."""

import copy

import pytest
import torch

from tests.lightning.importing_run import ImportingRun, build_config
from tests.lightning.lightning_runs import IMG_SIZE, LightningRun
from tests.lightning.restated import Network
from topoflow.errors import Refusal
from topoflow.tools.lightning.reading import read_lightning

TENSORS = {
    "NaN": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t.double(),
    "no element": lambda t: t.new_empty(0),
    "a scalar": lambda t: t.new_zeros(()),
    "one row more": lambda t: torch.cat([t, t]) if t.dim() else t.reshape(1, 1),
    "half precision": lambda t: t.half(),
    "on no device": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}
VALUES = {
    "None": None, "a string": "x\ny", "empty": {}, "a list": [{}], "negative": -7, "huge": 10**400, "NaN": float("nan"),
    "a tensor": torch.full((3,), float("nan")), "true": True, "bytes": b"x", "complex": 1j,
}  # fmt: skip


def places(content, path=()):
    """Paths to every key at every level; of a dict or list with many, the first two and the last."""
    if isinstance(content, dict | list):
        keys = list(content) if isinstance(content, dict) else range(len(content))
        for key in keys if len(keys) <= 15 and isinstance(content, dict) else {*keys[:2], *keys[-1:]}:
            yield (*path, key)
            yield from places(content[key], (*path, key))


def spoiled(content):
    """(what was done, content) of each variant: each key deleted, renamed, and given another value."""
    for number, path in enumerate(places(content)):
        *above, key = path
        value = content
        for step in path:
            value = value[step]
        others = TENSORS if isinstance(value, torch.Tensor) else VALUES
        names = list(others)
        for change in ("deleted", "renamed", *(names if len(path) == 1 else [names[number % len(names)]])):
            variant = copy.deepcopy(content)
            holder = variant
            for step in above:
                holder = holder[step]
            if change == "deleted":
                del holder[key]
            elif change != "renamed":
                replace = others[change]
                holder[key] = replace(value) if callable(replace) else copy.deepcopy(replace)
            elif isinstance(holder, dict):
                holder[number if number % 2 else "other\nname"] = holder.pop(key)
            yield f"{path}: {change}", variant


@pytest.mark.slow
def test_a_spoiled_file_is_refused_or_imported(tmp_path):
    run = LightningRun(Network(True, IMG_SIZE, depth=1, width=8))
    run.train(4)
    model = {"embed_dim": 8, "depth": 1, "decoder_depth": 1, "num_heads": 2}
    refused, imported, failed = 0, 0, []
    for name, content in spoiled(run.checkpoint()):
        print(name)  # for the report of an exception that is no refusal
        torch.save(content, tmp_path / "in.ckpt")
        other = ImportingRun(build_config(model), run.elevation_m, run.mask)
        try:
            conversion, report = other.take(read_lightning(tmp_path / "in.ckpt"))
            lines = [*conversion.lines, *conversion.warnings, *report.lines()]
            is_right = all(tensor.isfinite().all() for tensor in other.model.state_dict().values())
            imported += 1
        except Refusal as refusal:
            lines, is_right = [str(refusal)], True
            refused += 1
        if not is_right or not all(line.isprintable() for line in lines):
            failed.append(f"{name}: {lines}")
    assert failed == []
    assert refused > 200
    assert imported > 10
