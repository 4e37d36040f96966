"""Checkpoints of either program in many forms: what they hold under our names, and training from them."""

import copy

import numpy as np
import pytest
import torch

from tests.lightning.importing_run import ImportingRun, build_config
from tests.lightning.lightning_runs import GROUPS, IMG_SIZE, LightningRun
from tests.lightning.restated import TARGETS, VARIABLES, Network
from topoflow.errors import ResumeRefused

SHAPE = {"embed_dim": 16, "depth": 2, "decoder_depth": 1, "num_heads": 2}
PREDECESSOR = {"patch_norm": False, "relative_position": False}
ONE_GROUP = {"group_multipliers": dict.fromkeys(GROUPS, 1.0)}


def lightning_run(published=True, network=None, **options):
    return LightningRun(Network(published, IMG_SIZE, **(network or {})), **options)


def importing_run(run, model=None, optim=None, steps_per_epoch=3, **checkpoint):
    batch = (run.batch_size * run.accumulation, run.batch_size)
    published = {} if run.network.published else PREDECESSOR
    terrain = {} if run.network.terrain else {"terrain": "none", "relative_position": False}
    config = build_config({**SHAPE, **published, **terrain, **(model or {})}, optim, batch, **checkpoint)
    return ImportingRun(config, run.elevation_m, run.mask, steps_per_epoch)


CASES = {
    "in flight": (lightning_run, {}, 4, {}),
    "deeper, more heads": (
        lambda **o: lightning_run(network={"depth": 4, "decoder_depth": 3, "heads": 4}, **o),
        {"model": {"depth": 4, "decoder_depth": 3, "num_heads": 4}},
        2,
        {},
    ),
    "third epoch, one group": (lightning_run, {"optim": ONE_GROUP}, 14, {"groups": None}),
    "end of the second epoch": (lightning_run, {}, 12, {}),
    "groups in another order": (lightning_run, {}, 4, {"groups": ("others", "head", "vit_blocks", "wind_embedding")}),
    "groups without names": (
        lightning_run, {}, 4, {"groups": ("head", "vit_blocks", "others", "wind_embedding"), "named": False}
    ),
    "before the first step, without names": (lightning_run, {}, 0, {"named": False}),
    "no accumulation": (lightning_run, {"steps_per_epoch": 6}, 9, {"accumulation": 1}),
    "an epoch that ends inside an accumulation": (lightning_run, {}, 5, {"batches_per_epoch": 5}),
    "a schedule by steps": (
        lightning_run, {"optim": {"schedule_interval": "step", "schedule_length": 9}}, 8,
        {"interval": "step", "t_max": 9},
    ),
    "no schedule": (lightning_run, {"optim": {"schedule": "constant"}}, 8, {"interval": "none"}),
    "without terrain": (lambda **o: lightning_run(network={"terrain": False}, **o), {}, 4, {}),
    "predecessor": (lambda **o: lightning_run(False, **o), {}, 4, {}),
    "predecessor, no terrain, one linear as head": (
        lambda **o: lightning_run(False, {"terrain": False, "single_head": True}, **o),
        {"model": {"decoder_depth": 0}},
        8,
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_training_continues_as_in_the_program(case):
    build, ours, batches, options = CASES[case]
    run = build(**options)
    run.train(batches)
    other = importing_run(run, **ours)
    conversion, report = other.take(run.checkpoint())
    parameters = len(list(run.network.parameters()))
    assert (report.weights, report.moments, report.new) == (parameters, parameters if batches else 0, [])
    epochs, rest = divmod(batches, run.batches_per_epoch)
    progress = other.progress
    assert (progress.step, progress.updates, progress.epoch) == (run.steps, run.steps, epochs)
    assert progress.samples_in_epoch == rest * run.batch_size
    done = len(run.losses)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    batches = run.train(2 * run.accumulation)
    losses, norms, our_rates = other.train(batches)
    np.testing.assert_allclose(losses, run.losses[done:], rtol=1e-5)
    np.testing.assert_allclose(norms, run.grad_norms[-len(norms) :], rtol=1e-4)
    names = run.groups or tuple(GROUPS)
    by_name = dict(zip(names, rates if run.groups else rates * 4, strict=True))
    np.testing.assert_allclose(our_rates[0], [by_name[name] for name in GROUPS], rtol=1e-12)
    assert_same_weights(run, other, conversion.names)


def assert_same_weights(run, other, names):
    """Weights and second moments, to what is left of 23 bits when Adam has divided them."""
    last = f"head.{2 * other.config.model.decoder_depth}."
    kept = [cell * len(VARIABLES) + VARIABLES.index(target) for cell in range(4) for target in TARGETS]
    theirs = run.network.state_dict()
    parameters = dict(run.network.named_parameters())
    ours = other.model.state_dict()
    for source, name in names.items():
        source = source.removeprefix("model.").removeprefix("climax.")
        pick = kept if name.startswith(last) else ...
        torch.testing.assert_close(ours[name], theirs[source][pick], rtol=0, atol=2e-5, msg=name)
        if source in parameters:
            moment = other.optimizer.state[other.model.get_parameter(name)]["exp_avg_sq"]
            expected = run.optimizer.state[parameters[source]]["exp_avg_sq"][pick]
            torch.testing.assert_close(moment, expected, rtol=1e-3, atol=1e-9, msg=name)


def test_the_predecessor_at_paper_depth_has_91_parameters_in_groups_of_72_2_6_and_11():
    run = lightning_run(False, {"depth": 6, "decoder_depth": 2, "terrain": False})
    run.train(2)
    assert [len(group["params"]) for group in run.optimizer.param_groups] == [72, 2, 6, 11]
    other = importing_run(run, {"depth": 6, "decoder_depth": 2})
    conversion, report = other.take(run.checkpoint())
    assert (report.weights, report.moments) == (91, 91)
    assert "vit_blocks 72, wind_embedding 2, head 6, others 11" in conversion.lines[1]
    terrain = importing_run(
        run,
        {"depth": 6, "decoder_depth": 2, "terrain": "endpoint"},
        allow_new=["blocks.0.attn.elevation_alpha", "*.H_scale"],
    )
    _, report = terrain.take(run.checkpoint())
    assert (report.weights, report.moments) == (91, 91)
    assert report.new == ["blocks.0.attn.elevation_alpha", "blocks.0.attn.H_scale"]


def test_an_epoch_is_behind_once_its_last_batch_is_whatever_lightning_calls_complete():
    run = lightning_run()
    run.train(6)
    before_its_end, after_its_end = run.checkpoint(ended=False), run.checkpoint()
    assert before_its_end["epoch"] == 0
    assert after_its_end["epoch"] == 1
    for content in (before_its_end, after_its_end):
        other = importing_run(run)
        other.take(content)
        assert (other.progress.epoch, other.progress.samples_in_epoch, other.scheduler.last_epoch) == (1, 0, 3)


@pytest.mark.parametrize(
    ("batches", "epochs", "is_open"),
    [
        (8, {"started": 1, "processed": 1, "completed": 1}, True),  # inside the second epoch
        (12, {"started": 1, "processed": 1, "completed": 1}, True),  # at its last batch
        (12, {"started": 1, "processed": 2, "completed": 1}, False),  # at its end
        (12, {"started": 1, "processed": 2, "completed": 2}, False),  # at the end of the run
    ],
)
def test_counters_of_a_run_that_lightning_resumed_from_the_last_batch_of_an_epoch(batches, epochs, is_open):
    """As Lightning 2.6.6 wrote them: it does not count the epoch after the resume as started."""
    run = lightning_run()
    run.train(batches)
    content = run.checkpoint(ended=not is_open)
    content["loops"]["fit_loop"]["epoch_progress"]["current"] = epochs
    content["epoch"] = epochs["completed"]
    other = importing_run(run)
    other.take(content)
    assert (other.progress.epoch, other.progress.samples_in_epoch) == ((1, 4) if batches == 8 else (2, 0))


def test_the_schedule_goes_by_our_epochs():
    run = lightning_run()
    run.train(14)  # two epochs of three steps, and one step
    other = importing_run(run, steps_per_epoch=50)
    other.take(run.checkpoint())
    assert (other.progress.step, other.scheduler.last_epoch) == (7, 101)
    for _ in range(48):
        other.scheduler.step()
    before = [group["lr"] for group in other.optimizer.param_groups]
    np.testing.assert_allclose(before, [group["lr"] for group in run.optimizer.param_groups], rtol=1e-12)
    run.train(4)
    other.scheduler.step()
    after = [group["lr"] for group in other.optimizer.param_groups]
    np.testing.assert_allclose(after, [group["lr"] for group in run.optimizer.param_groups], rtol=1e-12)


def edited(content, edit):
    content = copy.deepcopy(content)
    edit(content)
    return content


def groups_of(content):
    return content["optimizer_states"][0]["param_groups"]


def config_of(content):
    return content["hyper_parameters"]["config"]


def swap_names(content):
    groups_of(content)[0]["name"], groups_of(content)[3]["name"] = "others", "vit_blocks"


def swap_parameters(content):
    params = groups_of(content)[3]["params"]
    params[0], params[1] = params[1], params[0]


def states_of(content):
    return content["optimizer_states"][0]["state"]


def state_of(content):
    """That of model.blocks.0.norm1.weight."""
    return states_of(content)[0]


def batches_of(content):
    return content["loops"]["fit_loop"]["epoch_loop.batch_progress"]


def steps_of(content):
    """The optimizer's steps in this epoch."""
    optimizer = content["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    return optimizer["step"]["current"]


def set_place(content, batches, steps):
    for progress in ("current", "total"):
        batches_of(content)[progress]["processed"] = batches
    content["global_step"] = steps_of(content)["completed"] = steps
    set_step_counts(content, steps)


def set_step_counts(content, count):
    for entry in states_of(content).values():
        entry["step"] = torch.tensor(float(count))


def zero(content, *keys, keep=0):
    """Zero these moments of all but the first `keep` parameters."""
    for entry in list(states_of(content).values())[keep:]:
        for key in keys:
            entry[key].zero_()


def without_state(content):
    del content["optimizer_states"][0]["state"][0]


def partial_state(content):
    del content["optimizer_states"][0]["state"][0]["exp_avg_sq"]


BROKEN = {
    "names of groups swapped": (swap_names, r"optimizer group others: 26 parameters: expected one of others \(11\)"),
    "a group of another name": (lambda c: groups_of(c)[1].update(name="embedding"), "embedding: .*expected one of"),
    "a group twice": (lambda c: groups_of(c)[1].update(name="vit_blocks"), "optimizer group vit_blocks: .*each once"),
    "order of parameters": (swap_parameters, r"var_query: shape \(1, 15, 16\) .*: expected \(1, 1, 16\)"),
    "a parameter less": (lambda c: groups_of(c)[0]["params"].pop(), "expected each of the 45 parameters"),
    "a parameter twice": (lambda c: groups_of(c)[0]["params"].append(3), "expected each of the 45 parameters"),
    "moments of a stranger": (lambda c: states_of(c).update({99: {}}), "of parameter 99 is in no group"),
    "no moments of one": (without_state, r"moments of blocks.0.norm1.weight: not in the checkpoint"),
    "half the moments of one": (partial_state, r"moments of blocks.0.norm1.weight: not in the checkpoint"),
    "two optimizers": (lambda c: c["optimizer_states"].append({}), "2 optimizers"),
    "amsgrad": (lambda c: groups_of(c)[0].update(amsgrad=True), "amsgrad: True.*expected torch's AdamW"),
    "Adam's decay": (lambda c: groups_of(c)[0].update(decoupled_weight_decay=False), "expected torch's AdamW"),
    "another scheduler": (lambda c: c["lr_schedulers"][0].pop("T_max"), "expected one CosineAnnealingLR"),
    "rates that are not the schedule's": (lambda c: c["lr_schedulers"][0]["_last_lr"].reverse(), "_last_lr"),
    "a schedule that stands elsewhere": (
        lambda c: c["lr_schedulers"][0].update(last_epoch=1), "last_epoch 1: expected 0, after 2 steps and 0 whole"
    ),
    "rates of the groups reset": (
        lambda c: [g.update(lr=g["initial_lr"] / 2) for g in groups_of(c)] and c["lr_schedulers"][0].update(
            _last_lr=[g["lr"] for g in groups_of(c)]
        ),
        "learning rate 5.000000000e-05 in the checkpoint, but the schedule gives 1.000000000e-04",
    ),
    "no counters": (lambda c: c["loops"]["fit_loop"].pop("epoch_progress"), "fit_loop / epoch_progress / .*not in the"),
    "names of neither program": (
        lambda c: c.update(state_dict={"model.net.weight": torch.zeros(1)}), "weights model.net.weight: not of a known"
    ),
    "a name too many": (
        lambda c: c["state_dict"].update({"model.extra.weight": torch.zeros(1)}), "extra.weight: not in the config's"
    ),
    "names of both programs": (
        lambda c: c["state_dict"].update({"model.climax.pos_embed": torch.zeros(1)}), "not of a known program"
    ),
    "a weight less": (lambda c: c["state_dict"].pop("model.norm.bias"), "expected each of the 44 parameters"),
    "a head of other outputs": (
        lambda c: c["state_dict"].update({"model.head.2.weight": torch.zeros(50, 16)}), "head: 50 outputs for patches"
    ),
    "other heads": (lambda c: config_of(c)["model"].update(num_heads=4), "model.num_heads: 4 in the file, 2 in"),
    "variables in another order": (lambda c: config_of(c)["data"]["variables"].reverse(), r"variables: \[population"),
    "a wind scan": (lambda c: config_of(c)["model"].update(parallel_patch_embed=True), "wind: tokens sorted by"),
    "a place inside a step": (lambda c: set_place(c, 3, 2), "3 batches of 2 samples of epoch 0 .*not between two"),
    "a place past our epoch": (lambda c: set_place(c, 6, 3), "6 batches of 2 samples of epoch 0 .*not between two"),
    # what contradicts itself
    "more batches than were made": (
        lambda c: batches_of(c)["current"].update(processed=5), "5 batches in this epoch and 4 in all"
    ),
    "a negative counter": (lambda c: batches_of(c)["total"].update(processed=-4), "processed: -4: expected a whole"),
    "epochs that were not started": (lambda c: c.update(epoch=7), "epoch 7, but 1 epochs were started"),
    "a negative global_step": (lambda c: c.update(global_step=-2), "global_step: -2: expected a whole number"),
    "a global_step that is no number": (lambda c: c.update(global_step=None), "global_step: None: expected a whole"),
    "a global_step before its steps": (lambda c: c.update(global_step=1), "step count of .*2.*expected 1 to global_s"),
    "a global_step after its step counts": (
        lambda c: c.update(global_step=3), "largest step count of the optimizer is 2, but global_step is 3: expected"
    ),
    "a global_step after its steps": (
        lambda c: steps_of(c).update(completed=1), "global_step 2, but 1 steps in the first"
    ),
    "step counts below global_step": (
        lambda c: set_step_counts(c, 1), "largest step count of the optimizer is 1, but global_step is 2: expected"
    ),
    "a mask without a cell": (lambda c: c["state_dict"]["china_mask"].zero_(), "china_mask: .*, 0 cells used"),
    "a mask below zero": (lambda c: c["state_dict"]["china_mask"].neg_(), "china_mask: .*, 0 cells used"),
    "a rate that is not finite": (
        lambda c: groups_of(c)[2].update(lr=float("nan")), "optimizer group head / lr: nan: expected a finite number"
    ),
    "a step count of zero": (lambda c: state_of(c).update(step=torch.tensor(0.0)), "step count of .*: 0.0: expected"),
    "a step count below zero": (lambda c: state_of(c).update(step=-1), "step count of blocks.*: -1: expected 1 to"),
    "a step count between steps": (lambda c: state_of(c).update(step=1.5), "step count of blocks.*: 1.5: expected"),
    "a step count that is not finite": (
        lambda c: state_of(c).update(step=torch.tensor(float("nan"))), "step count of blocks.0.norm1.weight"
    ),
    "a weight that is not finite": (
        lambda c: c["state_dict"]["model.pos_embed"][0, 0].fill_(float("nan")), "pos_embed: .*expected finite float32"
    ),
    "a mask that is not finite": (lambda c: c["state_dict"]["china_mask"].fill_(float("nan")), "china_mask: .*finite"),
    "a moment that is not finite": (
        lambda c: state_of(c)["exp_avg"].fill_(float("inf")), "blocks.0.norm1.weight / exp_avg: .*expected finite"
    ),
    "a mean of squares below zero": (lambda c: state_of(c)["exp_avg_sq"].neg_(), "exp_avg_sq of .*below 0"),
    "a weight under two names": (
        lambda c: c["state_dict"].update({"model.blocks.0.attn.elevation_alpha": torch.ones(1)}), "under two names"
    ),
    "a weight of half precision": (
        lambda c: c["state_dict"].update({"model.norm.bias": torch.zeros(16).half()}), "norm.bias: .*float32"
    ),
    # optimizers without usable moments
    "moments of none": (lambda c: c["optimizer_states"][0].update(state={}), "no moments .*_step is 2.*allow_new"),
    "no moments in entries": (
        lambda c: [entry.clear() for entry in states_of(c).values()], "no moments .*_step is 2.*of every parameter"
    ),
    "moments of zeros": (
        lambda c: [entry["exp_avg_sq"].zero_() for entry in states_of(c).values()], "no moments .*other than zero"
    ),
    "means of zeros": (lambda c: zero(c, "exp_avg"), "no moments .*other than zero"),
    "moments of zeros in all but one": (
        lambda c: zero(c, "exp_avg", "exp_avg_sq", keep=1),
        "exp_avg of blocks.0.norm1.bias, exp_avg_sq of blocks.0.norm1.bias, .*: all zero at global_step 2: .*allow_new",
    ),
    "a mean of zeros": (
        lambda c: state_of(c)["exp_avg"].zero_(), "optimizer_states: exp_avg of blocks.0.norm1.weight: all zero"
    ),
    "a mean of squares of zeros": (
        lambda c: state_of(c)["exp_avg_sq"].zero_(), "optimizer_states: exp_avg_sq of blocks.0.norm1.weight: all zero"
    ),
    "a moment of the outputs that are kept": (
        lambda c: [entry.update(exp_avg=entry["exp_avg"][:24]) for entry in states_of(c).values()
                   if entry["exp_avg"].shape == (60, 16)],
        r"head.2.weight: shape \(24, 16\): expected 60 outputs",
    ),
    "a bias of the outputs that are kept": (
        lambda c: c["state_dict"].update({"model.head.2.bias": torch.zeros(24)}), "head.2.bias: .* expected 60 outputs"
    ),
    "amsgrad's moments": (
        lambda c: state_of(c).update(max_exp_avg_sq=torch.ones(16)), "parameter 0 has max_exp_avg_sq: expected AdamW"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def in_flight():
    run = lightning_run()
    run.train(4)
    return run, run.checkpoint()


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_whose_parts_do_not_fit_is_refused(in_flight, case):
    run, content = in_flight
    edit, words = BROKEN[case]
    with pytest.raises(ResumeRefused, match=words):
        importing_run(run).take(edited(content, edit))


def test_target_indices_that_are_not_the_targets(in_flight):
    run = lightning_run(False)
    run.train(2)
    content = edited(run.checkpoint(), lambda c: c["state_dict"]["model.target_indices"].add_(-1))
    with pytest.raises(ResumeRefused, match=r"data.targets.*\[11, 4, 5, 6, 7, 8\] in the file, \[12, 5, 6, 7, 8, 9\]"):
        importing_run(run).take(content)


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        ({"learning_rate": 2e-3}, "group_multipliers.vit_blocks: 0.0001 in the file, 0.0002 in the config"),
        ({"group_multipliers": {**GROUPS, "head": 1.0}}, "group_multipliers.head: 0.0005 in the file, 0.001 in"),
        ({"weight_decay": 0.05}, "optim.weight_decay: 0.01 in the file, 0.05 in the config"),
        ({"betas": [0.9, 0.95]}, r"optim.betas: \[0.9, 0.999\] in the file, \[0.9, 0.95\] in the config"),
        ({"eps": 1e-6}, "optim.eps: 1e-08 in the file, 1e-06 in the config"),
        ({"schedule": "constant"}, "optim.schedule: cosine in the file, constant in the config"),
        ({"schedule_length": 9}, "schedule_length.*: 4 in the file, 9 in the config"),
        ({"eta_min": 0.0}, "optim.eta_min: 1e-06 in the file, 0.0 in the config"),
        ({"grad_clip_norm": None}, "optim.grad_clip_norm: 1.0 in the file, None in the config"),
        ({"schedule_interval": "step"}, "last_epoch 0: expected 2, after 2 steps .*schedule_interval=step"),
        ({"warmup_steps": 8}, "the schedule gives"),
    ],
)
def test_a_config_that_contradicts_the_file_is_refused_with_both_values(in_flight, optim, words):
    run, content = in_flight
    with pytest.raises(ResumeRefused, match=words):
        importing_run(run, optim=optim).take(content)


def test_what_may_differ_is_the_configs_and_is_reported(in_flight):
    run, content = in_flight
    other = importing_run(run, optim={"learning_rate": 2e-3, "weight_decay": 0.05}, allow_changed=["optim.*"])
    conversion, _ = other.take(content)
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(2e-4)
    assert any("optim.weight_decay: 0.01 in the file, 0.05" in warning for warning in conversion.warnings)


@pytest.mark.parametrize("key", ["batch_size", "accumulate_grad_batches", "devices", "num_nodes"])
def test_another_size_of_a_step_is_refused_and_one_that_is_not_stated_is_not(key):
    run = lightning_run()
    content = run.checkpoint()  # at the beginning, which is a place in any epoch
    config_of(content)["train"][key] *= 2
    with pytest.raises(ResumeRefused, match=r"train.global_batch_size: 8 in the file, 4 in the config"):
        importing_run(run).take(content)
    conversion, _ = importing_run(run, allow_changed=["train.global_batch_size"]).take(content)
    assert conversion.warnings == ["train.global_batch_size: 8 in the file, 4 in the config"]
    others = {"batch_size", "accumulate_grad_batches"} - {key}
    config_of(content)["train"][others.pop()] = 1  # 8 / 2: as the config, in other portions
    assert importing_run(run).convert(content).warnings == []
    for unstated in ("auto", None):
        config_of(content)["train"][key] = unstated
        assert importing_run(run).convert(content).warnings == []
    del config_of(content)["train"][key]
    assert importing_run(run).convert(content).warnings == []


def test_the_predecessors_wind_is_required_where_it_can_be():
    img_size = (128, 256)
    run = LightningRun(Network(False, img_size, terrain=False), img_size=img_size)
    content = run.checkpoint()
    for wind in ("none", "mean", "rank"):
        refused = rf"model.wind \(.*\): legacy_regional in the file, {wind} in the config"
        with pytest.raises(ResumeRefused, match=refused):
            importing_run(run, {"wind": wind}).convert(content)
        [warning] = importing_run(run, {"wind": wind}, allow_changed=["model.wind"]).convert(content).warnings
        assert f"legacy_regional in the file, {wind} in the config" in warning
    assert importing_run(run, {"wind": "legacy_regional"}).convert(content).warnings == []
    [warning] = importing_run(lightning_run(False)).convert(lightning_run(False).checkpoint()).warnings
    assert "does not exist on this grid" in warning


def test_a_mask_is_compared_and_dropout_and_batch_size_too(in_flight):
    run, content = in_flight
    conversion, _ = importing_run(run).take(content)
    assert conversion.warnings == []
    assert torch.equal(conversion.mask, run.mask)
    content = edited(content, lambda c: c["state_dict"]["china_mask"][0].fill_(1 - c["state_dict"]["china_mask"][0, 0]))
    config_of(content)["model"]["drop_rate"] = 0.1
    config_of(content)["train"]["batch_size"] = 4
    conversion, _ = importing_run(run, steps_per_epoch=9, allow_changed=["train.global_batch_size"]).take(content)
    dropout, mask, batch = conversion.warnings
    assert batch == "train.global_batch_size: 8 in the file, 4 in the config"
    assert dropout == "model.drop_rate: 0.1 in the file, 0.0 in the config"
    assert mask.startswith("mask of the data (china_mask.npy in the run directory is the file's): ")
    del content["state_dict"]["china_mask"], content["hyper_parameters"]
    conversion, _ = importing_run(run, allow_changed=["train.global_batch_size"]).take(content)
    assert conversion.mask is None
    assert len(conversion.warnings) == 1
    assert conversion.state["progress"]["samples_in_epoch"] == 8  # by the optimizer's steps


@pytest.mark.parametrize("key", ["batch_size", "devices", "num_nodes"])
def test_a_place_in_an_epoch_whose_batches_have_an_unknown_size_is_refused(in_flight, key):
    run, content = in_flight
    content = edited(content, lambda c: config_of(c)["train"].pop(key))
    with pytest.raises(ResumeRefused, match=rf"_batch_size \(.*{key}: missing.*\): unknown in the file.*allow_changed"):
        importing_run(run).take(content)
    other = importing_run(run, allow_changed=["train.global_batch_size"])
    conversion, _ = other.take(content)
    assert [f"{key}: missing" in warning for warning in conversion.warnings] == [True]
    assert other.progress.samples_in_epoch == 8  # two steps of the config's size
    run = lightning_run()
    run.train(6)
    content = run.checkpoint()
    del config_of(content)["train"][key]  # at the end of an epoch it is not needed
    assert importing_run(run).convert(content).warnings == []


OTHERS = {
    "Adam": torch.optim.Adam, "Adamax": torch.optim.Adamax, "NAdam": torch.optim.NAdam, "RAdam": torch.optim.RAdam,
    "SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad, "RMSprop": torch.optim.RMSprop,
    "NAdam, decay as AdamW": lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True),
    "RAdam, decay as AdamW": lambda p: torch.optim.RAdam(p, decoupled_weight_decay=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_is_refused(in_flight, name):
    run, content = in_flight
    parameters = [parameter.detach().clone().requires_grad_() for parameter in run.network.parameters()]
    optimizer = OTHERS[name](parameters)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for interval in ("epoch", "none"):
        other = {**content, "optimizer_states": [optimizer.state_dict()]}
        other["lr_schedulers"] = [] if interval == "none" else content["lr_schedulers"]
        with pytest.raises(ResumeRefused, match="expected torch's AdamW"):
            importing_run(run, optim=ONE_GROUP).take(other)


def test_an_optimizer_of_another_package_is_refused(in_flight):
    run, content = in_flight
    lion = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01, "params": list(range(45))}
    state = {number: {"exp_avg": entry["exp_avg"]} for number, entry in states_of(content).items()}
    content = {**content, "optimizer_states": [{"state": state, "param_groups": [lion]}]}
    with pytest.raises(
        ResumeRefused, match=r"lr: 0.001, betas: \[0.9, 0.99\], weight_decay: 0.01: expected torch's AdamW"
    ):
        importing_run(run, optim=ONE_GROUP).take(content)


def test_adamw_of_an_older_torch_and_parameters_by_name_are_read(in_flight):
    run, content = in_flight
    order = numbered_names(run)

    def by_name(c):
        optimizer = c["optimizer_states"][0]
        optimizer["state"] = {order[number]: entry for number, entry in optimizer["state"].items()}
        for group in optimizer["param_groups"]:
            group["params"] = [order[number] for number in group["params"]]
            del group["decoupled_weight_decay"]

    expected, other = importing_run(run), importing_run(run)
    expected.take(content)
    other.take(edited(content, by_name))
    for name, parameter in expected.model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            ours = other.optimizer.state[other.model.get_parameter(name)][key]
            assert torch.equal(ours, expected.optimizer.state[parameter][key])


@pytest.mark.parametrize("beginning", ["", "model."])
def test_names_that_torch_wrote_decide_which_moments_are_whose(in_flight, beginning):
    run, content = in_flight
    order = numbered_names(run)

    def name_in_another_order(c):
        for group in groups_of(c):
            group["param_names"] = [order[number].removeprefix("model.") for number in group["params"]]
            group["param_names"] = [beginning + name for name in group["param_names"]]
        states, names = states_of(c), groups_of(c)[0]["param_names"]
        names[0], names[1] = names[1], names[0]  # both [16]
        states[0], states[1] = states[1], states[0]

    expected, other = importing_run(run), importing_run(run)
    expected.take(content)
    content = edited(content, name_in_another_order)
    other.take(content)
    for name, parameter in expected.model.named_parameters():
        ours = other.optimizer.state[other.model.get_parameter(name)]
        assert torch.equal(ours["exp_avg"], expected.optimizer.state[parameter]["exp_avg"]), name
    for names, words in (
        (["model.stranger", *groups_of(content)[1]["param_names"][1:]], "model.stranger of them unknown"),
        (groups_of(content)[1]["param_names"][1:], "3 names for 4 parameters"),
        (groups_of(content)[0]["param_names"][:4], "wind_embedding: 4 parameters: expected one of .*each once"),
    ):
        with pytest.raises(ResumeRefused, match=words):
            importing_run(run).take(edited(content, lambda c, n=names: groups_of(c)[1].update(param_names=n)))


def test_steps_that_a_grad_scaler_skipped_are_reported(in_flight):
    run, content = in_flight
    content = edited(content, lambda c: set_step_counts(c, 1))
    content["MixedPrecision"] = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 1}
    other = importing_run(run)
    conversion, _ = other.take(content)
    [warning] = conversion.warnings
    assert "step count of the optimizer is 1, but global_step is 2: the GradScaler skipped" in warning
    assert (other.progress.step, other.progress.updates) == (2, 1)


def test_a_parameter_with_fewer_steps_than_the_others_is_reported(in_flight):
    run, content = in_flight
    other = importing_run(run)
    conversion, _ = other.take(edited(content, lambda c: state_of(c).update(step=torch.tensor(1.0))))
    [warning] = conversion.warnings
    assert "step counts below 2: blocks.0.norm1.weight (1): parameters without a gradient" in warning


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: batches_of(c)["total"].update(processed=9999), "7 steps in 9999 batches, with accumulate_grad_bat"),
        (lambda c: steps_of(c).update(completed=0), "0 steps in 2 batches, with accumulate_grad_batches=2"),
    ],
)
def test_counters_that_contradict_the_accumulation_are_refused(edit, words):
    run = lightning_run()
    run.train(14)
    with pytest.raises(ResumeRefused, match=words):
        importing_run(run).convert(edited(run.checkpoint(), edit))


def numbered_names(run):
    """{number in the optimizer: name in the file}."""
    names = {parameter: f"model.{name}" for name, parameter in run.network.named_parameters()}
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    return dict(enumerate(names[parameter] for parameter in parameters))


def averaged(content):
    """The content as Lightning's WeightAveraging makes it: trained weights moved away, averaged ones in their place."""
    trained = content["state_dict"]
    means = {name: tensor * (0.5 if tensor.is_floating_point() and name != "china_mask" else 1)
             for name, tensor in trained.items()}  # fmt: skip
    return {**content, "state_dict": means, "current_model_state": trained,
            "averaging_state": {"n_averaged": torch.tensor(2)}}  # fmt: skip


def test_trained_and_averaged_weights_are_told_apart(in_flight):
    run, content = in_flight
    both = averaged(content)
    with pytest.raises(ResumeRefused, match=r"trained weights \(current_model_state\) and averaged .*--weights"):
        importing_run(run).take(both)
    with pytest.raises(ResumeRefused, match="--weights averaged: the file holds no averaged weights"):
        importing_run(run).take(content, "averaged")
    for source, choice, factor in (
        (content, None, 1),
        (content, "trained", 1),
        (both, "trained", 1),
        (both, "averaged", 0.5),
    ):
        other = importing_run(run)
        conversion, _ = other.take(source, choice)
        assert torch.equal(other.model.pos_embed, content["state_dict"]["model.pos_embed"] * factor)
        moment = other.optimizer.state[other.model.pos_embed]["exp_avg"]
        assert torch.equal(moment, run.optimizer.state[run.network.pos_embed]["exp_avg"])
        assert ["moments are those of the trained" in line for line in conversion.warnings] == [True] * (factor < 1)


@pytest.mark.parametrize("choice", ["trained", "averaged"])
def test_the_set_of_weights_that_is_not_taken_must_be_intact_too(in_flight, choice):
    run, content = in_flight
    both = copy.deepcopy(averaged(content))
    other = "state_dict" if choice == "trained" else "current_model_state"
    both[other]["model.pos_embed"].fill_(float("nan"))
    with pytest.raises(ResumeRefused, match=f"{other} / model.pos_embed: .*expected finite"):
        importing_run(run).take(both, choice)


def test_single_names_with_moments_of_zeros_start_fresh_where_allow_new_lists_them(in_flight):
    run, content = in_flight
    content = edited(content, lambda c: [state_of(c)[key].zero_() for key in ("exp_avg", "exp_avg_sq")])
    other = importing_run(run, allow_new=["blocks.0.norm1.weight"])
    conversion, report = other.take(content)
    assert (report.moments, report.moments_expected) == (44, 44)
    assert other.optimizer.state[other.model.get_parameter("blocks.0.norm1.weight")]["step"] == 0
    assert conversion.warnings == ["moments of blocks.0.norm1.weight: all zero in the file: they start fresh"]


def test_single_names_without_moments_start_fresh_where_allow_new_lists_them(in_flight):
    run, content = in_flight
    content = edited(content, without_state)
    other = importing_run(run, allow_new=["blocks.0.norm1.weight"])
    _, report = other.take(content)
    assert (report.moments, report.moments_expected) == (44, 44)
    assert other.optimizer.state[other.model.get_parameter("blocks.0.norm1.weight")]["step"] == 0
    nothing = edited(content, lambda c: c["optimizer_states"][0].update(state={}))
    with pytest.raises(ResumeRefused, match="no moments"):
        importing_run(run, allow_new=["*"]).take(nothing)
