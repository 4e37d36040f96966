import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from topoflow.config import OptimConfig
from topoflow.optim import build_optimizer, build_scheduler, group_of, group_parameters, learning_rate_at

# base rate 1e-4, multipliers 0.1 / 2 / 0.5 / 1, T_max 10, eta_min 1e-6: the published program's settings
PUBLISHED = OptimConfig(learning_rate=1e-4, schedule="cosine", schedule_interval="epoch", schedule_length=10)
RATES_AFTER_3 = {
    "vit_blocks": "8.145034e-06",
    "wind_embedding": "1.589846e-04",
    "head": "3.990074e-05",
    "others": "7.959537e-05",
}


def add(module: nn.Module, name: str, shape=(2,)) -> None:
    """Register a parameter under a dotted name, and create the modules in it."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module.register_parameter(last, nn.Parameter(torch.ones(shape)))


def climax_names(depth: int = 6, decoder_depth: int = 2) -> list[str]:
    """Return the parameter names of ClimaX, without terrain and wind."""
    names = ["var_embed", "var_query", "pos_embed", "token_embeds.proj_weights", "token_embeds.proj_biases"]
    names += [f"var_agg.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
    modules = ["lead_time_embed", "norm"] + [f"head.{2 * i}" for i in range(decoder_depth + 1)]
    in_a_block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    modules += [f"blocks.{block}.{module}" for block in range(depth) for module in in_a_block]
    return names + [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def make_model(names: list[str] | None = None) -> nn.Module:
    model = nn.Module()
    for name in names if names is not None else climax_names():
        add(model, name)
    return model


def run_schedule(config: OptimConfig, steps: int, steps_per_epoch: int, total_steps: int) -> list[dict[str, float]]:
    """Return the rates of each group after 0, 1, ..., `steps` scheduler steps."""
    optimizer = build_optimizer(make_model(), config)
    scheduler = build_scheduler(optimizer, config, steps_per_epoch, total_steps)
    rates = [{group["name"]: group["lr"] for group in optimizer.param_groups}]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
    return rates


def test_91_parameters_fall_into_groups_of_72_2_6_11():
    groups = group_parameters(make_model())
    sizes = [(group["name"], len(group["params"]), len(group["param_names"])) for group in groups]
    assert sizes == [("vit_blocks", 72, 72), ("wind_embedding", 2, 2), ("head", 6, 6), ("others", 11, 11)]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("blocks.0.attn.elevation_alpha", "vit_blocks"),
        ("token_embeds.proj_weights", "wind_embedding"),
        ("head.4.bias", "head"),
        ("wind_mean.fc1.weight", "others"),
        ("wind_rank.fc1.weight", "others"),
        ("head_norm.weight", "others"),
        ("norm.weight", "others"),
    ],
)
def test_group_of(name, group):
    assert group_of(name) == group


def test_each_name_matches_its_parameter():
    model = make_model()
    by_name = dict(model.named_parameters())
    for group in build_optimizer(model, PUBLISHED).param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert by_name.pop(name) is parameter
    assert not by_name


def test_groups_without_parameters_are_left_out():
    groups = build_optimizer(make_model(["head.0.weight", "norm.weight"]), PUBLISHED).param_groups
    assert [group["name"] for group in groups] == ["head", "others"]


def test_a_parameter_with_two_names_is_refused():
    model = make_model(["blocks.0.norm1.weight"])
    model.head = nn.Module()
    model.head.weight = model.blocks.get_submodule("0.norm1").weight
    with pytest.raises(ValueError, match=r"head\.weight is also blocks\.0\.norm1\.weight"):
        group_parameters(model)


def test_a_wrapped_model_is_refused():
    wrapper = nn.Module()
    wrapper.module = make_model()
    with pytest.raises(ValueError, match="expected the bare model"):
        build_optimizer(wrapper, PUBLISHED)


def test_groups_keep_name_rate_and_one_weight_decay():
    optimizer = build_optimizer(make_model(), replace(PUBLISHED, weight_decay=0.03, betas=(0.8, 0.95), eps=1e-7))
    rates = {group["name"]: (group["lr"], group["initial_lr"]) for group in optimizer.param_groups}
    expected = {"vit_blocks": 1e-5, "wind_embedding": 2e-4, "head": 5e-5, "others": 1e-4}
    assert rates == {name: (pytest.approx(rate, rel=1e-15),) * 2 for name, rate in expected.items()}
    for group in optimizer.param_groups:
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0.03, (0.8, 0.95), 1e-7)


def test_two_adamw_steps_equal_the_float64_closed_form():
    config = OptimConfig(learning_rate=0.1, weight_decay=0.2, betas=(0.8, 0.95), eps=1e-3)
    model = make_model(["blocks.0.norm1.bias", "head.0.weight"])
    optimizer = build_optimizer(model, config)
    gradients = {"blocks.0.norm1.bias": [[0.5, -2.0], [1.5, 0.0]], "head.0.weight": [[3.0, 0.0], [-1.0, 1e-3]]}
    for step in range(2):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.tensor(gradients[name][step])
        optimizer.step()
    for name, rate in (("blocks.0.norm1.bias", 0.01), ("head.0.weight", 0.05)):
        weight, m, v = np.ones(2), np.zeros(2), np.zeros(2)
        for k, gradient in enumerate(np.asarray(gradients[name]), start=1):  # arXiv 1711.05101, algorithm 2
            m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
            weight = weight * (1 - rate * 0.2)
            weight = weight - rate * (m / (1 - 0.8**k)) / (np.sqrt(v / (1 - 0.95**k)) + 1e-3)
        assert dict(model.named_parameters())[name].detach().numpy() == pytest.approx(weight, rel=1e-6)


def test_published_rates_after_three_scheduler_steps():
    rates = run_schedule(PUBLISHED, 3, steps_per_epoch=1, total_steps=100)[-1]
    assert {name: f"{rate:.6e}" for name, rate in rates.items()} == RATES_AFTER_3


def test_interval_epoch_advances_at_the_end_of_an_epoch():
    rates = run_schedule(PUBLISHED, 21, steps_per_epoch=7, total_steps=700)
    assert rates[20]["others"] == run_schedule(PUBLISHED, 2, steps_per_epoch=1, total_steps=700)[-1]["others"]
    assert {name: f"{rate:.6e}" for name, rate in rates[21].items()} == RATES_AFTER_3


@pytest.mark.parametrize("eta_min", [0.0, 1e-6, 3e-5])
def test_cosine_equals_torch_up_to_its_length_and_then_stays(eta_min):
    config = replace(PUBLISHED, schedule_interval="step", schedule_length=20, eta_min=eta_min)
    rates = run_schedule(config, 30, steps_per_epoch=7, total_steps=1000)
    multipliers = config.group_multipliers.values()
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": config.learning_rate * m} for m in multipliers]
    reference = torch.optim.AdamW(groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no optimizer step came first
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=20, eta_min=eta_min)
        for step in range(21):
            expected = [group["lr"] for group in reference.param_groups]
            # torch computes recursively, so its error grows
            assert list(rates[step].values()) == pytest.approx(expected, rel=1e-9, abs=1e-18)
            scheduler.step()
    for step in range(20, 31):
        assert list(rates[step].values()) == pytest.approx([eta_min] * 4, rel=1e-12, abs=1e-18)


def test_length_of_the_cosine_defaults_to_the_run():
    by_step = replace(PUBLISHED, schedule_interval="step", schedule_length=None)
    assert run_schedule(by_step, 40, steps_per_epoch=7, total_steps=40)[-1]["head"] == pytest.approx(1e-6, rel=1e-12)
    # 20 steps of 7 an epoch: the third epoch is short but counts as one
    by_epoch = replace(PUBLISHED, schedule_length=None)
    two_thirds = 1e-6 + (1e-4 - 1e-6) * (1 + math.cos(math.pi * 2 / 3)) / 2
    assert run_schedule(by_epoch, 14, steps_per_epoch=7, total_steps=20)[-1]["others"] == pytest.approx(two_thirds)


def test_warm_up_rises_linearly_and_does_not_shift_the_cosine():
    config = replace(PUBLISHED, schedule_interval="step", schedule_length=20, warmup_steps=4)
    warmed = run_schedule(config, 10, steps_per_epoch=7, total_steps=20)
    plain = run_schedule(replace(config, warmup_steps=0), 10, steps_per_epoch=7, total_steps=20)
    shares = [warmed[step]["vit_blocks"] / plain[step]["vit_blocks"] for step in range(11)]
    assert shares == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 8, rel=1e-12)


def test_constant_schedule_changes_nothing_but_the_warm_up():
    config = replace(PUBLISHED, schedule="constant", warmup_steps=2)
    rates = [step["head"] for step in run_schedule(config, 9, steps_per_epoch=3, total_steps=9)]
    assert rates == pytest.approx([2.5e-5] + [5e-5] * 9, rel=1e-12)


def test_a_group_below_eta_min_rises_to_it_and_a_frozen_group_stays_at_zero():
    multipliers = {"vit_blocks": 0.0, "wind_embedding": 2.0, "head": 0.001, "others": 1.0}
    config = replace(PUBLISHED, schedule_interval="step", group_multipliers=multipliers)
    rates = run_schedule(config, 12, steps_per_epoch=1, total_steps=12)
    assert {step["vit_blocks"] for step in rates} == {0.0}
    assert rates[5]["head"] == pytest.approx((1e-7 + 1e-6) / 2, rel=1e-12)
    assert rates[12]["head"] == pytest.approx(1e-6, rel=1e-12)


def test_a_restored_scheduler_continues_bit_identically():
    config = replace(PUBLISHED, schedule_interval="step", schedule_length=20, warmup_steps=3)
    whole = run_schedule(config, 12, steps_per_epoch=5, total_steps=20)
    first = build_optimizer(make_model(), config)
    scheduler = build_scheduler(first, config, 5, 20)
    for _ in range(6):
        first.step()
        scheduler.step()
    second = build_optimizer(make_model(), config)
    restored = build_scheduler(second, config, 5, 20)
    second.load_state_dict(first.state_dict())
    restored.load_state_dict(scheduler.state_dict())
    for step in range(6, 13):
        assert {group["name"]: group["lr"] for group in second.param_groups} == whole[step]
        second.step()
        restored.step()


def test_scheduler_state_is_plain_values_without_config():
    optimizer = build_optimizer(make_model(), PUBLISHED)
    state = build_scheduler(optimizer, PUBLISHED, 5, 20).state_dict()
    assert state["lr_lambdas"] == [None] * 4
    assert state["last_epoch"] == 0


def test_learning_rate_at_names_the_rate_of_the_next_step():
    assert learning_rate_at(0, 1e-4, PUBLISHED, 7, 70) == 1e-4
    assert learning_rate_at(30, 0.0, PUBLISHED, 10, 100) == 0
    assert learning_rate_at(30, 1e-4, PUBLISHED, 10, 100) == pytest.approx(7.959537e-05, rel=1e-6)
