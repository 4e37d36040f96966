"""Compare variants of the network that only imported weights need with naive loops from their definition."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from tests.lightning.restated import Network, bucket, table_rows
from topoflow.config import ModelConfig
from topoflow.errors import ConfigError
from topoflow.model.legacy import RelativePositionBias, axis_buckets, regional_wind_order
from topoflow.model.topoflow import build_model
from topoflow.optim import group_parameters

SMALL = {"patch_size": 2, "embed_dim": 8, "depth": 3, "decoder_depth": 2, "num_heads": 2, "wind": "none"}


def build(img_size=(8, 12), inputs=("u", "v", "pm25"), targets=("pm25",), **model):
    config = ModelConfig(**{**SMALL, **model})
    nowhere = torch.zeros(img_size[0] * img_size[1] // 4)
    return build_model(config, inputs, targets, img_size, nowhere, nowhere, seed=0)


def order_by_loops(u, v):
    """Return the predecessor's order of tokens for one sample, region by region."""
    order = []
    for region in range(1024):
        row, column = region // 32, region % 32
        cells = [(row * 4 + i, column * 8 + j) for i in range(4) for j in range(8)]
        speeds = [math.hypot(u[cell], v[cell]) for cell in cells]
        total = math.fsum(speeds)
        mean_u, mean_v = (
            math.fsum(field[cell] * speed for cell, speed in zip(cells, speeds, strict=True)) / total if total else 0.0
            for field in (u, v)
        )
        theta = math.atan2(mean_v, mean_u) if total else 0.0
        along = [
            (2 * (j % 4) / 127 - 1) * math.cos(theta) - (2 * (j // 4) / 63 - 1) * math.sin(theta) for j in range(8)
        ]
        order += [8 * region + j for j in sorted(range(8), key=along.__getitem__)]
    return order


def test_the_regional_order_is_the_golden_one(shared_dir):
    golden = np.load(shared_dir / "golden" / "wind_order_regional.npz")
    wind = torch.from_numpy(np.stack([golden["u"], golden["v"]], axis=1))
    assert torch.equal(regional_wind_order(wind), torch.from_numpy(golden["order"].astype(np.int64)))


def test_the_regional_order_is_that_of_loops_in_calm_and_along_the_axes_too():
    wind = torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(0))
    wind[:, :4] = 0.0
    wind[:, 0, :8] = -0.0
    for row, (u, v) in enumerate([(0, 3), (0, -3), (-3, 0), (3, 0)], start=1):
        wind[:, 4 * row : 4 * row + 4] = torch.tensor([u, v], dtype=torch.float32)[:, None, None]
    expected = order_by_loops(*wind.double().numpy())
    both = torch.stack([wind, torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(1))])
    assert regional_wind_order(both)[0].tolist() == expected


def test_tokens_are_sorted_and_all_else_stays_in_raster_order():
    """Compare a network whose one block adds nothing with the predecessor's reimplementation, permuted by loops."""
    torch.manual_seed(0)
    names = ("u", "v", "pm25")
    plain = Network(False, (128, 256), width=8, depth=0, terrain=False, variables=names)
    ours = build((128, 256), names, names, depth=1, decoder_depth=1, wind="legacy_regional", terrain="none").eval()
    ours.load_state_dict(plain.state_dict(), strict=False)
    x, wind, lead = torch.randn(1, 3, 128, 256), 5 * torch.randn(1, 2, 128, 256), torch.tensor([24.0])
    order = torch.tensor([order_by_loops(*wind[0].double().numpy())])
    with torch.no_grad():
        for layer in (ours.blocks[0].attn.proj, ours.blocks[0].mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        forecast = ours(x, lead, torch.zeros(128, 256), wind)
        torch.testing.assert_close(forecast, plain(x, lead, order=order), rtol=1e-4, atol=1e-4)
        assert (forecast - plain(x, lead)).abs().max() > 0.01


@pytest.mark.parametrize(("img_size", "patch_size"), [((64, 128), 2), ((256, 128), 2), ((128, 256), 4)])
def test_the_regional_scan_is_refused_on_other_grids(img_size, patch_size):
    with pytest.raises(
        ConfigError, match=r"model.wind: legacy_regional on .*expected 128 x 256 cells and patch_size 2"
    ):
        build(img_size, wind="legacy_regional", patch_size=patch_size)


@pytest.mark.parametrize("size", [1, 5, 12, 16, 64, 128, 160])
def test_buckets_of_an_axis_are_those_of_the_rule(size):
    places = [int(index / size * 128) for index in range(size)]
    expected = [[bucket(query - key) for key in places] for query in places]
    assert axis_buckets(size).tolist() == expected


def test_the_position_bias_of_each_pair_is_its_row_of_the_table():
    bias = RelativePositionBias(num_heads=3, grid_size=(3, 5))
    with torch.no_grad():
        bias.bias_table.copy_(torch.arange(3 * 1024.0).reshape(1024, 3))
    expected = bias.bias_table[table_rows(3, 5)]  # [N, N, heads]
    assert torch.equal(bias(), expected.permute(2, 0, 1))


@pytest.mark.parametrize("terrain", ["endpoint", "none"])
def test_position_and_norm_are_the_published_networks(terrain):
    """Compare output and gradients of the whole network; the golden checkpoints do so at one size."""
    torch.manual_seed(0)
    variables = ("u", "pm25", "elevation")
    plain = Network(
        True, (8, 12), width=8, depth=2, decoder_depth=0, terrain=terrain == "endpoint", variables=variables
    )
    ours = build(
        (8, 12), variables, variables, depth=2, decoder_depth=0, patch_norm=True, drop_rate=0.0, drop_path=0.0,
        relative_position=terrain == "endpoint", terrain=terrain,
    )  # fmt: skip
    renamed = {"patch_embed.": "token_embeds.", "attn.alpha": "attn.elevation_alpha"}
    weights = plain.state_dict()
    for old, new in renamed.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    if terrain == "endpoint":
        weights["blocks.0.attn.H_scale"] = torch.tensor(1931.40 * 1000)
    ours.load_state_dict(weights)
    x, lead, heights = torch.randn(2, 3, 8, 12), torch.tensor([12.0, 96.0]), 3000 * torch.rand(8, 12)
    x[:, 2] = heights / 1931.40
    outputs = [ours(x, lead, heights), plain(x, lead)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    names = ["blocks.0.attn.rel_pos_bias.bias_table"] if terrain == "endpoint" else []
    for name in ("token_embeds.proj_weights", "token_embeds.norm.weight", "var_embed", *names):
        theirs = name.replace("token_embeds", "patch_embed")
        gradients = [
            torch.autograd.grad(output.square().sum(), network.get_parameter(parameter), retain_graph=True)[0]
            for output, network, parameter in zip(outputs, (ours, plain), (name, theirs), strict=True)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[1].abs().max().item())


@pytest.mark.parametrize(
    ("options", "dropping"),
    [
        ({}, [0, 1, 2]),
        ({"patch_norm": True}, [0]),
        ({"relative_position": True}, [0]),
        ({"patch_norm": True, "block_dropout": "all"}, [0, 1, 2]),
        ({"block_dropout": "none"}, []),
    ],
)
def test_which_blocks_drop(options, dropping):
    model = build(drop_rate=0.5, drop_path=0.0, terrain="none", **options).train()
    torch.manual_seed(0)
    x = torch.randn(1, 24, 8)
    found = []
    for index, block in enumerate(model.blocks):
        attention = torch.equal(block.attn(x), block.attn(x))
        assert attention == torch.equal(block.mlp(x), block.mlp(x))
        found += [] if attention else [index]
    assert found == dropping
    assert model.pos_drop.p == 0.5


def test_new_parameters_have_groups_and_initial_values():
    model = build(patch_norm=True, relative_position=True)
    sizes = {group["name"]: len(group["params"]) for group in group_parameters(model)}
    assert sizes == {"vit_blocks": 38, "wind_embedding": 4, "head": 6, "others": 11}
    table = model.get_parameter("blocks.0.attn.rel_pos_bias.bias_table")
    assert table.std().item() == pytest.approx(0.02, rel=0.1)
    assert Counter(model.get_parameter("token_embeds.norm.weight").tolist()) == {1.0: 8}
    assert Counter(model.get_parameter("token_embeds.norm.bias").tolist()) == {0.0: 8}
    plain = build()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in plain.named_parameters())
