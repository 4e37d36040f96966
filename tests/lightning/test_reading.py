"""Reading a file that anyone may have made."""

import argparse
import itertools
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lightning.lightning_runs import IMG_SIZE, LightningRun
from tests.lightning.restated import Network
from topoflow.errors import MissingPath, ResumeRefused
from topoflow.tools.lightning.reading import read_lightning


@pytest.fixture(scope="module")
def content():
    return LightningRun(Network(True, IMG_SIZE)).checkpoint()


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_runs_none(tmp_path, content):
    made = tmp_path / "made by the pickle"
    torch.save({**content, "callbacks": {"EarlyStopping": Malicious(made)}}, tmp_path / "in.ckpt")
    with pytest.raises(ResumeRefused, match=r"in.ckpt: holds \w+.mkdir: not loaded, none of its code ran") as refused:
        read_lightning(tmp_path / "in.ckpt")
    assert (made.exists(), "\n" in str(refused.value)) == (False, False)
    torch.load(tmp_path / "in.ckpt", weights_only=False)
    assert made.exists()


def test_a_class_of_another_package_is_named(tmp_path, content, monkeypatch):
    module = types.ModuleType("elsewhere")
    module.Thing = type("Thing", (), {"__module__": "elsewhere"})
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    torch.save({**content, "callbacks": module.Thing()}, tmp_path / "in.ckpt")
    with pytest.raises(ResumeRefused, match=r"holds elsewhere\.Thing"):
        read_lightning(tmp_path / "in.ckpt")


def test_what_hyperparameters_usually_hold_is_read(tmp_path, content, monkeypatch):
    package = "lightning.fabric.utilities.data"
    for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities", package):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[package].AttributeDict = type("AttributeDict", (dict,), {"__module__": package})
    saved = sys.modules[package].AttributeDict(
        config=argparse.Namespace(lr=np.float64(0.5), steps=np.int64(7), path=Path("/data")), scores=np.float32(0.25)
    )
    torch.save({**content, "hyper_parameters": saved}, tmp_path / "in.ckpt")
    read = read_lightning(tmp_path / "in.ckpt")["hyper_parameters"]
    assert (read["config"].lr, read["config"].steps, str(read["config"].path)) == (0.5, 7, "/data")
    assert read["scores"] == 0.25


def test_a_file_that_is_no_whole_checkpoint_is_refused_with_what_was_found(tmp_path, content):
    path = tmp_path / "in.ckpt"
    with pytest.raises(MissingPath, match="not found"):
        read_lightning(path)
    path.write_text("epoch: 3")
    with pytest.raises(ResumeRefused, match=r"not a file that torch\.save wrote"):
        read_lightning(path)
    torch.save({name: content[name] for name in ("state_dict", "epoch")}, path)
    with pytest.raises(ResumeRefused, match=r"no optimizer_states, .*only state_dict, epoch: .*weights only"):
        read_lightning(path)
    torch.save([1, 2], path)
    with pytest.raises(ResumeRefused, match="only list"):
        read_lightning(path)


def test_any_flipped_bit_of_the_archive_is_refused_or_changes_nothing(tmp_path):
    content = {
        "state_dict": {"a": torch.arange(4.0)}, "optimizer_states": [], "lr_schedulers": [], "loops": {}, "epoch": 1,
        "global_step": 3,
    }  # fmt: skip
    path, spoiled = tmp_path / "in.ckpt", tmp_path / "spoiled.ckpt"
    torch.save(content, path)
    whole = path.read_bytes()
    name = b"in/data/0"
    places = [
        *range(whole.index(name) - 30, whole.index(name) + len(name) + 4),  # the header before the weight
        *range(whole.rindex(name) - 46, whole.rindex(name) + len(name)),  # its entry in the directory
        *range(len(whole) - 98, len(whole)),  # where the directory is
    ]
    refusals = []
    for place, bit in itertools.product(places, range(8)):
        spoiled.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            assert str(read_lightning(spoiled)) == str(content), (place, bit)
        except ResumeRefused as refusal:
            refusals.append(str(refusal))
    assert len(refusals) > 500
    assert [refusal for refusal in refusals if len(refusal.splitlines()) != 1] == []


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(MissingPath, match="not found"):
        read_lightning(tmp_path / ("x" * 300))


def test_a_flipped_bit_in_a_weight_is_found(tmp_path, content):
    path = tmp_path / "in.ckpt"
    torch.save(content, path)
    whole = path.read_bytes()
    weight = content["state_dict"]["model.pos_embed"].numpy().tobytes()
    place = whole.index(weight[:64]) + 32
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ResumeRefused, match=r"in.ckpt: \S+ in it does not match its checksum"):
        read_lightning(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ResumeRefused, match=r"in.ckpt: "):
        read_lightning(path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            (".metadata", "__0_0.distcp"),
            "by FSDP: run `python -m lightning.pytorch.utilities.consolidate_check",
        ),
        (
            ("latest", "checkpoint/mp_rank_00_model_states.pt"),
            "by DeepSpeed: .*convert_zero_checkpoint_to_fp32",
        ),
        (("checkpoint/zero_pp_rank_0_mp_rank_00_model_states.pt",), "sharded by DeepSpeed: .*optimizer's moments"),
        (("epoch=1-step=7.ckpt",), r"not a file that torch\.save wrote"),
    ],
)
def test_a_folder_of_shards_is_refused_with_the_way_to_make_one_file(tmp_path, files, words):
    folder = tmp_path / "in.ckpt"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    with pytest.raises(ResumeRefused, match=words) as refused:
        read_lightning(folder)
    assert str(folder) in str(refused.value)
    assert str(refused.value).isprintable()
