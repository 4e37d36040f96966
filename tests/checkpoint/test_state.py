"""Restore by name: the next step of torch's own optimizer must be the same."""

import copy

import pytest
import torch
from torch import nn

from topoflow.checkpoint.fingerprint import fingerprints, state_fingerprints, state_tensors
from topoflow.checkpoint.state import capture_state, copy_pairs, plan_weights, restore_state
from topoflow.config import OptimConfig
from topoflow.errors import ResumeRefused
from topoflow.optim import build_optimizer, build_scheduler

CONFIG = OptimConfig(learning_rate=1e-2, schedule_interval="step", schedule_length=20)


class Tiny(nn.Module):
    """Names of every group; `reverse` gives the same names in another order."""

    def __init__(self, reverse=False, extra=False):
        super().__init__()
        parts = {name: nn.Linear(3, 3) for name in ("blocks", "token_embeds", "head")} | {"norm": nn.LayerNorm(3)}
        if extra:
            parts["wind_rank"] = nn.Linear(3, 3)
        for name in reversed(parts) if reverse else parts:
            self.add_module(name, parts[name])
        self.register_buffer("scale", torch.tensor(7.0))

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.token_embeds(x)))) * self.scale


def build(seed=0, config=CONFIG, **options):
    torch.manual_seed(seed)
    model = Tiny(**options)
    optimizer = build_optimizer(model, config)
    return model, optimizer, build_scheduler(optimizer, config, steps_per_epoch=5, total_steps=20)


def train(parts, first, last):
    model, optimizer, scheduler = parts
    for step in range(first, last):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def saved_after(steps=4, **options):
    parts = build(**options)
    train(parts, 0, steps)
    return parts, {**copy.deepcopy(capture_state(*parts)), "progress": {"step": steps, "updates": steps}}


def named(parts):
    return {name: parameter.detach().clone() for name, parameter in parts[0].named_parameters()}


@pytest.mark.parametrize("reverse", [False, True])
def test_a_restored_run_continues_bit_identically_in_any_order_of_parameters(reverse):
    original, state = saved_after()
    resumed = build(seed=1, reverse=reverse)
    report = restore_state(state, *resumed)
    assert (report.weights, report.moments, report.buffers, report.new) == (8, 8, 1, [])
    assert {k: v for k, v in state_fingerprints(*resumed).items() if "group" not in k} == {
        k: v for k, v in state_fingerprints(*original).items() if "group" not in k
    }
    train(original, 4, 9)
    train(resumed, 4, 9)
    expected = named(original)
    assert all(torch.equal(value, expected[name]) for name, value in named(resumed).items())
    assert [group["lr"] for group in original[1].param_groups] == [group["lr"] for group in resumed[1].param_groups]


def test_a_parameter_that_moved_to_another_group_keeps_its_moments(monkeypatch):
    _, state = saved_after()
    monkeypatch.setattr("topoflow.optim.group_of", lambda name: "head" if name == "norm.bias" else original_group(name))
    resumed = build(seed=1)
    report = restore_state(state, *resumed)
    assert report.moved == ["norm.bias: others -> head"]
    moments = resumed[1].state[dict(resumed[0].named_parameters())["norm.bias"]]
    assert torch.equal(moments["exp_avg"], state["optimizer"]["state"]["norm.bias"]["exp_avg"])


def original_group(name):
    return {"blocks": "vit_blocks", "token_embeds": "wind_embedding", "head": "head"}.get(name.split(".")[0], "others")


def test_new_names_start_fresh_only_if_they_are_listed():
    _, state = saved_after()
    resumed = build(seed=1, extra=True)
    before = named(resumed)
    with pytest.raises(ResumeRefused, match=r"wind_rank\.weight, wind_rank\.bias"):
        restore_state(state, *resumed)
    assert all(torch.equal(value, before[name]) for name, value in named(resumed).items())
    report = restore_state(state, *resumed, allow_new=["wind_rank.*"])
    assert report.new == ["wind_rank.weight", "wind_rank.bias"]
    assert (report.weights, report.weights_expected, report.moments, report.moments_expected) == (8, 8, 8, 8)
    assert torch.equal(dict(resumed[0].named_parameters())["wind_rank.weight"], before["wind_rank.weight"])
    fresh = resumed[1].state[dict(resumed[0].named_parameters())["wind_rank.weight"]]
    assert [fresh[key].abs().sum().item() for key in ("step", "exp_avg", "exp_avg_sq")] == [0.0, 0.0, 0.0]


def test_left_over_names_are_refused():
    _, state = saved_after(extra=True)
    with pytest.raises(ResumeRefused, match=r"wind_rank\.bias, .*wind_rank\.weight"):
        restore_state(state, *build())


def drop(state, *path):
    for key in path[:-1]:
        state = state[key]
    del state[path[-1]]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: drop(s, "model", "head.bias"), ["head.bias", "not in the checkpoint"]),
        (lambda s: drop(s, "model", "scale"), ["scale", "not in the checkpoint"]),
        (lambda s: drop(s, "optimizer", "state", "head.bias"), ["moments of head.bias", "not in the checkpoint"]),
        (lambda s: s["model"].update({"head.bias": torch.zeros(4)}), ["head.bias", "shape (4,)", "(3,)"]),
        (lambda s: s["model"].update({"head.bias": torch.zeros(3).double()}), ["head.bias", "dtype torch.float64"]),
        (
            lambda s: s["optimizer"]["state"]["head.bias"].update(exp_avg_sq=torch.zeros(1)),
            ["exp_avg_sq of head.bias", "shape (1,)"],
        ),
        (lambda s: s["optimizer"]["groups"].pop(1), ["wind_embedding", "not in the checkpoint"]),
        (lambda s: s["optimizer"]["groups"][0].update(lr=1e-2), ["vit_blocks", "learning rate 1.0"]),
        (lambda s: s["optimizer"]["groups"][0].update(weight_decay=0.5), ["vit_blocks", "weight_decay 0.5"]),
        (lambda s: s["scheduler"].update(steps=0), ["learning rate", "at step 0"]),
    ],
)
def test_what_could_not_be_restored_is_an_error_that_names_it(damage, words):
    _, state = saved_after()
    damage(state)
    with pytest.raises(ResumeRefused) as refusal:
        restore_state(state, *build(seed=1))
    for word in words:
        assert word in str(refusal.value)


def test_allowed_optimizer_settings_take_the_config_at_the_restored_step():
    _, state = saved_after()
    other = OptimConfig(learning_rate=5e-2, schedule_interval="step", schedule_length=20)
    resumed = build(seed=1, config=other)
    with pytest.raises(ResumeRefused, match="initial_lr"):
        restore_state(state, *resumed)
    restore_state(state, *resumed, rates_from_config=True)
    fresh = build(seed=1, config=other)
    train(fresh, 0, 4)
    assert [group["lr"] for group in resumed[1].param_groups] == [group["lr"] for group in fresh[1].param_groups]


def test_weights_alone_leave_the_optimizer_as_it_was():
    original, state = saved_after()
    tuned = build(seed=1)
    copy_pairs(plan_weights(tuned[0], state["model"]).pairs)
    assert all(torch.equal(value, named(original)[name]) for name, value in named(tuned).items())
    assert len(tuned[1].state) == 0


def test_one_changed_ulp_changes_its_digest_alone():
    parts, _ = saved_after()
    before = state_fingerprints(*parts)
    with torch.no_grad():
        weight = parts[0].head.weight
        weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(float("inf")))
    after = state_fingerprints(*parts)
    assert [name for name in before if before[name] != after[name]] == ["head.weight"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_state_of_the_host_is_restored_onto_a_gpu():
    original, state = saved_after()
    model = build(seed=1)[0].cuda()
    optimizer = build_optimizer(model, CONFIG)
    restore_state(state, model, optimizer, build_scheduler(optimizer, CONFIG, steps_per_epoch=5, total_steps=20))
    tensors = state_tensors(model, optimizer, persistent=True)
    assert {tensor.device.type for name, tensor in tensors.items() if not name.startswith("step of ")} == {"cuda"}
    assert fingerprints(tensors) == fingerprints(state_tensors(*original[:2], persistent=True))
