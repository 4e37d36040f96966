"""Import a Lightning checkpoint and resume from it, as a user does."""

import json
import os

import numpy as np
import pytest
import torch
import yaml

from tests.lightning.lightning_runs import LightningRun
from tests.lightning.restated import VARIABLES, Network
from tests.support.prepared import prepare_world
from topoflow import cli
from topoflow.tools.lightning.conversion import convert

CONFIG = {
    "run": {"threads": 1, "seed": 3},
    "data": {
        "train": [["2018-10-01", "2018-10-06"]],
        "variables": list(VARIABLES),
        "lead_times_hours": [6, 12],
        "threads": 0,
    },
    "model": {
        "patch_size": 2, "embed_dim": 16, "depth": 2, "decoder_depth": 1, "num_heads": 2, "drop_rate": 0.0,
        "drop_path": 0.0, "wind": "none", "relative_position": True, "patch_norm": True,
    },
    "optim": {"learning_rate": 1e-3},  # schedule_length comes from the file
    "train": {"max_steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "log_every_steps": 1},
}  # fmt: skip


@pytest.fixture
def config(program, world):
    program.config.write_text(yaml.safe_dump({**CONFIG, "data": {**CONFIG["data"], "path": str(world)}}))
    return program.config


@pytest.fixture
def lightning(tmp_path):
    """A run of the published program after four batches, and its file."""
    run = LightningRun(Network(True, (8, 12)))
    run.train(4)
    torch.save(run.checkpoint(), tmp_path / "in.ckpt")
    return run


def import_lightning(program, *overrides, name="in.ckpt", run="run"):
    command = ["import-lightning", program.folder / name, "--config", program.config, "-o", program.folder / run]
    return cli.main([str(word) for word in (*command, *overrides)])


def test_a_run_resumes_from_an_imported_checkpoint(program, config, lightning, capsys):
    assert import_lightning(program) == 0
    output = capsys.readouterr().out
    assert "published program, Lightning 2.6.6" in output
    assert "weights 45/45, buffers 1/1, moments 45/45" in output
    assert "the rest of the epoch follows ours" in output
    assert f"china_mask with {int(lightning.mask.sum())} of [8, 12] cells in the file, 96 of [8, 12] cells in" in output
    assert output.endswith(f"resume with: python train.py {config} run.dir={program.folder / 'run'}\n")
    report = json.loads((program.folder / "run" / "import.json").read_text())
    assert report["names"]["model.blocks.0.attn.alpha"] == "blocks.0.attn.elevation_alpha"

    # in a new run with the file's own mask, which the import kept
    mask = np.load(program.folder / "run" / "china_mask.npy")
    assert np.array_equal(mask, lightning.mask.numpy())
    masked = f"data.path={prepare_world(program.folder / 'masked-data', days=10, mask=mask)}"
    assert import_lightning(program, masked, run="masked") == 0
    output = capsys.readouterr().out
    assert "warning" not in output
    assert output.endswith(f"python train.py {config} {masked} run.dir={program.folder / 'masked'}\n")
    done = program.train(masked, run="masked")
    assert done.returncode == 0, done.stderr
    assert "resume from" in done.stderr
    assert "identical to the checkpoint's" in done.stderr
    assert sorted(program.losses("masked")) == [3, 4, 5, 6]
    resumed = json.loads((program.folder / "masked" / "resume.json").read_text())
    assert (resumed["step"], resumed["samples_in_epoch"], resumed["weights"], resumed["moments"]) == (2, 8, 45, 45)
    state = program.state("masked", step=2)
    assert state["config"]["optim"]["schedule_length"] == 4
    theirs = lightning.network.state_dict()
    assert torch.equal(state["model"]["token_embeds.proj_weights"], theirs["patch_embed.proj_weights"])
    assert state["model"]["blocks.0.attn.H_scale"].item() == pytest.approx(1931400)
    assert state["optimizer"]["state"]["pos_embed"]["step"] == 2
    assert program.state("masked", step=6)["optimizer"]["state"]["pos_embed"]["step"] == 6


def test_new_names_in_the_import_and_in_the_resume(program, config, tmp_path, capsys):
    run = LightningRun(Network(True, (8, 12), terrain=False))
    run.train(4)
    torch.save(run.checkpoint(), tmp_path / "in.ckpt")
    plain = ("model.terrain=none", "model.relative_position=false")
    new = "checkpoint.allow_new=[blocks.0.attn.elevation_alpha, blocks.0.attn.H_scale, '*.bias_table']"
    assert import_lightning(program) == 3
    line = one_line(capsys)
    for words in ("elevation_alpha", "H_scale", "bias_table", "checkpoint.allow_new to list those that may start"):
        assert words in line
    assert import_lightning(program, new, run="new at the import") == 0
    done = program.train(run="new at the import")  # it has every name now, so nothing needs to be allowed
    assert done.returncode == 0, done.stderr
    moments = program.state("new at the import", step=6)["optimizer"]["state"]
    assert moments["blocks.0.attn.elevation_alpha"]["step"] == 4
    assert moments["blocks.0.attn.qkv.weight"]["step"] == 6

    assert import_lightning(program, *plain, run="new at the resume") == 0
    assert program.train(run="new at the resume").returncode == 3
    changed = "checkpoint.allow_changed=[model.*, data.fingerprint]"
    done = program.train(new, changed, run="new at the resume")
    assert done.returncode == 0, done.stderr
    report = json.loads((program.folder / "new at the resume" / "resume.json").read_text())
    assert (report["weights"], report["moments"], len(report["new"])) == (43, 43, 3)


def test_a_run_that_holds_checkpoints_is_refused(program, config, lightning, capsys):
    assert import_lightning(program) == 0
    before = sorted(path.name for path in (program.folder / "run" / "checkpoints").iterdir())
    capsys.readouterr()
    assert import_lightning(program, name="never looked for.ckpt") == 2
    assert "holds checkpoints (last, step-00000002)" in one_line(capsys)
    assert sorted(path.name for path in (program.folder / "run" / "checkpoints").iterdir()) == before


def test_a_checkpoint_that_another_job_writes_meanwhile_stays(program, config, lightning, capsys, monkeypatch):
    other = program.folder / "run" / "checkpoints" / "step-00000001"

    def convert_slowly(*arguments):
        other.mkdir(parents=True)
        return convert(*arguments)

    monkeypatch.setattr("topoflow.tools.lightning.conversion.convert", convert_slowly)
    assert import_lightning(program) == 2
    assert "holds checkpoints (step-00000001)" in one_line(capsys)
    assert [path.name for path in other.parent.iterdir()] == ["step-00000001"]


def one_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert not [line for line in lines if "Traceback" in line]
    return lines[-1]


def test_refusals_leave_no_run(program, config, lightning, tmp_path, capsys):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({**lightning.checkpoint(), "callbacks": Malicious()}, tmp_path / "malicious.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    content = lightning.checkpoint()
    torch.save({**content, "current_model_state": content["state_dict"]}, tmp_path / "averaged.ckpt")
    content["optimizer_states"][0]["state"] = {}
    torch.save(content, tmp_path / "empty.ckpt")
    for name, overrides, status, words in (
        ("malicious.ckpt", (), 3, "none of its code ran"),
        ("weights.ckpt", (), 3, "weights only"),
        ("nowhere.ckpt", (), 2, "not found"),
        (
            "in.ckpt",
            ("optim.eta_min=0",),
            3,
            "in.ckpt: contradicts the config: optim.eta_min: 1e-06 in the file",
        ),
        ("averaged.ckpt", (), 3, "expected --weights trained, as its training resumes, or --weights averaged"),
        ("in.ckpt", ("--weights", "averaged"), 3, "holds no averaged weights"),
        ("empty.ckpt", (), 3, "no moments (exp_avg, exp_avg_sq) other than zero, but global_step is 2"),
        ("in.ckpt", ("model.embed_dim=8",), 3, "expected (1, 15, 8)"),
        ("in.ckpt", ("optim.eta=0",), 2, "optim.eta"),
    ):
        assert import_lightning(program, *overrides, name=name) == status, name
        assert words in one_line(capsys)
        assert not (tmp_path / "run").exists()
    assert not (tmp_path / "made").exists()


def test_a_folder_that_cannot_be_written_is_found_before_the_work(program, config, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert import_lightning(program, name="never looked for.ckpt", run="file/run") == 2
    assert f"{tmp_path / 'file'}: cannot be written" in one_line(capsys)


@pytest.mark.parametrize("key", ["checkpoint.resume", "checkpoint.init_from"])
def test_a_lightning_file_as_checkpoint_is_refused_with_the_command_to_run(program, config, lightning, key):
    done = program.train(f"{key}={program.folder / 'in.ckpt'}")
    assert done.returncode == 3
    command = f"import-lightning {program.folder / 'in.ckpt'} --config CONFIG -o {program.folder / 'run'}"
    assert f"python -m topoflow {command}" in done.stderr.splitlines()[-1]
    assert not (program.folder / "run" / "checkpoints").exists()


def test_the_trained_weights_are_imported_if_the_user_chooses_them(program, config, lightning, tmp_path, capsys):
    content = lightning.checkpoint()
    halved = {name: tensor / 2 if name != "china_mask" else tensor for name, tensor in content["state_dict"].items()}
    both = {"state_dict": halved, "current_model_state": content["state_dict"], "averaging_state": {}}
    torch.save({**content, **both}, tmp_path / "in.ckpt")
    for choice, factor in (("trained", 1), ("averaged", 0.5)):
        assert import_lightning(program, "--weights", choice, run=choice) == 0
        output = capsys.readouterr().out
        assert ("the moments are those of the trained weights" in output) == (choice == "averaged")
        pos_embed = program.state(choice, step=2)["model"]["pos_embed"]
        assert torch.equal(pos_embed, content["state_dict"]["model.pos_embed"] * factor)
    assert program.train(run="trained").returncode == 0


def test_evaluate_refuses_it_too(program, config, lightning, capsys):
    assert cli.main(["evaluate", str(program.folder / "in.ckpt")]) == 3
    assert f"import-lightning {program.folder / 'in.ckpt'} --config" in one_line(capsys)
