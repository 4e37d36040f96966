"""Compare steps with a plain torch loop, and test the options of a run."""

import json
import re

import pytest
import torch

from topoflow.config_io import load_config
from topoflow.data.assembly import open_forecast_data
from topoflow.data.sampling import BatchPlan
from topoflow.model.topoflow import build_model

PLAIN = (
    "model.drop_rate=0",
    "model.drop_path=0",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
    "data.validation=[]",
)


def plain_loop(program, steps):
    """Return weights and losses after some steps on whole global batches, with torch's mean, clipping and AdamW."""
    config = load_config(program.config, PLAIN)
    data = open_forecast_data(config.data, with_wind=True, with_terrain=True)
    train = data.dataset("train", data.build_normalization())
    centres_km = data.grid.patch_centres_km(2)
    model = build_model(config.model, data.input_names, data.target_names, data.grid.shape, *centres_km, seed=3)
    prefixes = {"blocks.": 0.1, "token_embeds.": 2.0, "head.": 0.5}
    groups = [
        {"params": [parameter], "lr": 1e-3 * next((m for p, m in prefixes.items() if name.startswith(p)), 1.0)}
        for name, parameter in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.01)
    plan = BatchPlan(len(train), 3, 16, 16, 0, 1)
    losses = []
    for indices in list(plan.micro_batches(0))[:steps]:
        batch = torch.utils.data.default_collate([train[i] for i in indices])
        elevation_m = torch.from_numpy(data.source.heights_m())
        output = model(batch["x"], batch["lead_time_hours"], elevation_m, batch["wind_ms"])
        loss = (output - batch["y"])[batch["valid"]].square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {name: p.detach() for name, p in model.named_parameters()}, losses


@pytest.mark.parametrize("processes", [1, 2])
def test_the_step_is_that_of_a_plain_loop(program, processes):
    weights, losses = plain_loop(program, 3)
    done = program.train(*PLAIN, "train.max_steps=3", processes=processes)
    assert done.returncode == 0, done.stderr
    assert [event["loss"] for event in program.events()] == pytest.approx(losses, rel=1e-5)
    log = (program.folder / "run" / "train.log").read_text()
    assert re.search(rf" all +{len(weights)} +{sum(weight.numel() for weight in weights.values()):,}\n", log)
    assert f"16 = 4 x {processes} processes x {4 // processes} accumulated" in log
    assert "3 steps, 16 an epoch, 0 done" in log
    saved = program.state(step=3)["model"]
    for name, weight in weights.items():
        # the gradient of the keys' bias is only rounding noise, which Adam turns into a step
        if not name.endswith(("qkv.bias", "in_proj_bias")):
            torch.testing.assert_close(saved[name], weight, rtol=1e-4, atol=1e-5)


def test_the_loss_does_not_depend_on_how_the_batch_was_cut(program):
    for size in (2, 16):
        assert (
            program.train(*PLAIN, "train.max_steps=2", f"train.micro_batch_size={size}", run=f"{size}").returncode == 0
        )
    ours, theirs = ([event["loss"] for event in program.events(f"{size}")] for size in (2, 16))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_activation_checkpointing_has_the_same_bits(program, undisturbed):
    done = program.train("train.activation_checkpointing=true", "train.max_steps=3")
    assert done.returncode == 0, done.stderr
    losses, _ = undisturbed(1)
    assert program.losses() == {step: losses[step] for step in (1, 2, 3)}


@pytest.mark.slow
def test_a_compiled_run_resumes_with_the_same_bits(program):
    small = ("model.depth=1", "model.decoder_depth=0", "data.validation=[]", "data.threads=0")
    options = ("train.compile=true", *small, "train.micro_batch_size=16")
    assert program.train(*options, "train.max_steps=3", run="whole").returncode == 0
    assert program.train(*options, "train.max_steps=2").returncode == 0
    done = program.train(*options, "train.max_steps=3")
    assert done.returncode == 0, done.stderr
    assert "identical to the checkpoint's (compared bit for bit)" in done.stderr
    assert program.losses() == program.losses("whole")
    ours, theirs = (program.state(run, step=3)["model"] for run in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # the probe loss of the uncompiled network proves that it is the same function
    plain = program.train("train.compile=false", *options[1:], "train.max_steps=4")
    assert plain.returncode == 0, plain.stderr
    assert "allowed 1e-05 because of compile True -> False" in plain.stderr


def test_bf16_stays_near_fp32_and_its_state_is_fp32(program, undisturbed):
    done = program.train("train.precision=bf16", "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    losses, _ = undisturbed(1)
    ours = float.fromhex(program.losses()[1])
    assert ours == pytest.approx(float.fromhex(losses[1]), rel=0.02)
    assert program.losses()[1] != losses[1]
    assert {tensor.dtype for tensor in program.state(step=2)["model"].values()} == {torch.float32}


def test_early_stopping_ends_the_run_and_a_resume_knows_it(program):
    frozen = ("optim.group_multipliers={vit_blocks: 0, wind_embedding: 0, head: 0, others: 0}", "train.max_steps=1000")
    options = (*frozen, "train.early_stopping_patience=2", "train.validate_every_steps=2")
    assert program.train(*options).returncode == 0
    assert program.events(kind="end")[0] == {"event": "end", "step": 6, "reason": "early stopping"}
    assert program.train(*options).returncode == 0
    assert max(program.losses()) == 6


def test_a_batch_without_a_target_changes_nothing(program, without_targets_in_step):
    without_targets_in_step(2)
    options = ("data.threads=0", "data.validation=[]", "checkpoint.every_steps=1")
    done = program.train(*options, "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    event = program.events()[-1]
    assert (event["step"], event["loss"], event["grad_norm"]) == (2, None, 0.0)
    before, after = program.state(step=1), program.state(step=2)
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])


@pytest.mark.slow
def test_validation_counts_every_sample_once_on_any_world_size(program):
    for processes in (1, 2):
        done = program.train(*PLAIN[:-1], "train.max_steps=1", run=f"{processes}", processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (program.events(f"{processes}", "validation")[0] for processes in (1, 2))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert two["by_target"] == pytest.approx(one["by_target"], rel=1e-6)


def test_validation_on_resume_repeats_the_checkpoints_loss(program):
    assert program.train("train.max_steps=8").returncode == 0
    loss = program.events(kind="validation")[0]["loss"]
    done = program.train("train.max_steps=9", "checkpoint.validate_on_resume=true")
    assert f"step 8: loss {loss:.6f}; in the checkpoint: {loss:.6f} after step 8" in done.stderr


def test_the_manifest_and_state_hold_what_the_design_requires(program):
    assert program.train("train.max_steps=2").returncode == 0
    state = program.state(step=2)
    assert set(state) >= {
        "format",
        "model",
        "optimizer",
        "scheduler",
        "progress",
        "random",
        "data",
        "config",
        "software",
    }
    assert state["progress"]["step"] == 2
    assert state["random"]["seed"] == 3
    assert [group["name"] for group in state["optimizer"]["groups"]] == [
        "vit_blocks",
        "wind_embedding",
        "head",
        "others",
    ]
    assert set(state["optimizer"]["state"]["var_query"]) == {"step", "exp_avg", "exp_avg_sq"}
    manifest = json.loads((program.folder / "run" / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    assert set(manifest["tensors"]) >= {f"model/{name}" for name in state["model"]}


def test_inputs_before_and_after_the_start_train_resume_and_are_scored(program):
    hours = ("data.hours={u: [0, 6, 12], pm25: [0, -12], o3: [-3]}", "data.test=[[2018-10-09, 2018-10-10]]")
    assert program.train(*hours, "train.max_steps=6", run="whole").returncode == 0
    assert program.train(*hours, "train.max_steps=3").returncode == 0
    done = program.train(*hours, "train.max_steps=6")
    assert done.returncode == 0, done.stderr
    assert "next 32 samples match the certificate" in done.stderr
    assert program.losses() == program.losses("whole")
    assert "train: 120 start times" in done.stderr  # of 144 hours, those with 12 h before and after them
    assert program.state(step=6)["model"]["token_embeds.proj_weights"].shape[0] == 15 + 1 + 2 + 1
    assert (program.folder / "run" / "evaluation" / "scores.json").is_file()
    changed = program.train("data.hours={}", "data.test=[]", "train.max_steps=7")
    assert changed.returncode == 3
    assert "data.hours" in changed.stderr
