"""Checkpoints that Lightning itself wrote for the published program, and what it computed next."""

import numpy as np
import pytest
import torch

from tests.lightning.importing_run import ImportingRun, build_config
from tests.lightning.lightning_runs import ELEVATION_MEAN, ELEVATION_STD
from tests.lightning.restated import TARGETS, VARIABLES
from topoflow.errors import ResumeRefused
from topoflow.tools.lightning.reading import read_lightning

MODEL = {"embed_dim": 96, "depth": 3, "decoder_depth": 2, "num_heads": 4}
WITHOUT = {**MODEL, "terrain": "none", "relative_position": False}
CASES = {"four_groups_step3": MODEL, "four_groups_epoch1": MODEL, "without_terrain_step3": WITHOUT}
NEW = ["blocks.0.attn.elevation_alpha", "blocks.0.attn.H_scale"]
BIAS_TABLE = "blocks.0.attn.rel_pos_bias.bias_table"


class Golden:
    def __init__(self, folder, name):
        self.file = folder / f"{name}.ckpt"
        self.arrays = np.load(folder / f"{name}.npz")

    def __getitem__(self, name):
        return torch.from_numpy(np.array(self.arrays[name]))

    def batches(self):
        return list(zip(self["batch_x"], self["batch_y"], self["batch_lead_hours"], strict=True))

    def run(self, model, allow_new=()):
        elevation_m = self["probe_x"][0, VARIABLES.index("elevation")] * ELEVATION_STD + ELEVATION_MEAN
        config = build_config(model, batch=(8, 4), allow_new=list(allow_new))
        return ImportingRun(config, elevation_m, self["mask"] > 0.5, steps_per_epoch=7)


@pytest.fixture
def golden(shared_dir):
    return lambda name: Golden(shared_dir / "golden", name)


def final_weights(golden, names):
    """{our name: weight after the six batches}, of the head the outputs that forecast the targets."""
    rows = [cell * len(VARIABLES) + VARIABLES.index(target) for cell in range(4) for target in TARGETS]
    weights = {ours: golden[f"final/{theirs}"] for theirs, ours in names.items()}
    return {name: tensor[rows] if name.startswith("head.4.") else tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("name", CASES)
def test_training_continues_as_under_lightning(golden, name):
    golden = golden(name)
    run = golden.run(CASES[name])
    conversion, report = run.take(read_lightning(golden.file))
    assert (report.weights, report.moments) == (report.weights_expected, report.moments_expected)
    assert (run.progress.step, run.progress.updates, report.new) == (3, 3, [])
    place = (1, 0) if name == "four_groups_epoch1" else (0, 24)
    assert (run.progress.epoch, run.progress.samples_in_epoch) == place
    forecast = run.forecast(golden["probe_x"], golden["probe_lead_hours"])
    torch.testing.assert_close(forecast, golden["probe_out"], rtol=0, atol=1e-5)
    losses, norms, rates = run.train(golden.batches())
    np.testing.assert_allclose(losses, golden.arrays["batch_loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norms, golden.arrays["grad_norm"], rtol=1e-4)
    np.testing.assert_allclose(rates, golden.arrays["lr"], rtol=1e-12)
    trained = run.model.state_dict()
    for ours, weight in final_weights(golden, conversion.names).items():
        torch.testing.assert_close(trained[ours], weight, rtol=0, atol=5e-5, msg=ours)


def test_weights_without_terrain_go_into_a_network_that_has_it(golden):
    golden = golden("without_terrain_step3")
    content = read_lightning(golden.file)
    with pytest.raises(ResumeRefused, match=r"elevation_alpha: not in the checkpoint.*checkpoint.allow_new"):
        golden.run({**WITHOUT, "terrain": "endpoint"}, NEW[1:]).take(content)
    run = golden.run(MODEL, [*NEW, "blocks.0.attn.rel_pos_bias.*"])
    _, report = run.take(content)
    assert sorted(report.new) == sorted([*NEW, BIAS_TABLE])
    assert (report.weights, report.weights_expected, report.moments, report.moments_expected) == (57, 57, 57, 57)
    # with the new weights at zero, the network is the one that Lightning trained
    for name in (NEW[0], BIAS_TABLE):
        run.model.get_parameter(name).detach().zero_()
    forecast = run.forecast(golden["probe_x"], golden["probe_lead_hours"])
    torch.testing.assert_close(forecast, golden["probe_out"], rtol=0, atol=1e-5)


def test_what_a_file_has_and_the_network_lacks_is_refused_with_the_key_to_set(golden):
    golden = golden("four_groups_step3")
    for missing, needed in (
        ({"patch_norm": False}, "model.patch_norm=true"),
        ({"relative_position": False}, "model.relative_position=true"),
        ({"terrain": "none"}, "model.terrain=endpoint"),
        ({"depth": 2}, "a larger model.depth"),
        ({"leads": "joint"}, "model.leads=conditioned"),
    ):
        with pytest.raises(ResumeRefused, match=needed):
            golden.run({**MODEL, **missing}).take(read_lightning(golden.file))
