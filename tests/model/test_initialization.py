import numpy as np
import pytest
import torch

from topoflow.config import ModelConfig
from topoflow.model import initialization
from topoflow.model.topoflow import build_model

NAMES = ("u", "v", "pm25", "o3")


def build(seed=3, inputs=NAMES, **options):
    config = ModelConfig(**{"embed_dim": 64, "depth": 2, "num_heads": 4, **options})
    return build_model(config, inputs, ("pm25", "o3"), (8, 12), range(24), range(24), seed)


def assert_same(state, other, names=None):
    for name in names or state.keys() | other.keys():
        assert torch.equal(state[name], other[name]), name


def test_same_seed_same_bits_whatever_the_global_random_state():
    torch.manual_seed(0)
    first = build().state_dict()
    torch.manual_seed(1)
    assert_same(first, build().state_dict())


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_other_weights():
    first, second = build(seed=3).state_dict(), build(seed=4).state_dict()
    for name in ("var_query", "token_embeds.proj_weights", "blocks.1.mlp.fc1.weight", "head.0.weight"):
        assert not torch.equal(first[name], second[name])


def test_parameters_of_the_same_shape_differ():
    state = build().state_dict()
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize(
    "options",
    [{"wind": "none"}, {"wind": "rank"}, {"terrain": "none"}, {"drop_rate": 0.0, "drop_path": 0.0}, {"depth": 3}],
)
def test_an_option_does_not_change_the_other_parameters(options):
    full, other = build().state_dict(), build(**options).state_dict()
    assert_same(full, other, names=full.keys() & other.keys())


def test_threads_do_not_change_the_bits():
    threads = torch.get_num_threads()
    try:
        states = []
        for count in (1, 2):
            torch.set_num_threads(count)
            states.append(build(embed_dim=256).state_dict())
    finally:
        torch.set_num_threads(threads)
    assert_same(*states)


def test_skipping_a_truncation_that_cuts_nothing_keeps_the_bits(monkeypatch):
    drawn = build(embed_dim=256).state_dict()
    monkeypatch.setattr(initialization, "LARGEST_DEVIATION", float("inf"))
    assert_same(drawn, build(embed_dim=256).state_dict())


def test_draws_beyond_the_truncation_are_cut():
    far = initialization._truncated_normal(torch.empty(100_000), 0.7, torch.Generator().manual_seed(0))
    assert 1.9 < far.abs().max() <= 2


def sincos_of_mae(embed_dim, positions):
    """Compute the embedding as in MAE and ClimaX (facebookresearch/mae, util/pos_embed.py)."""
    omega = 1.0 / 10000 ** (np.arange(embed_dim // 2, dtype=float) / (embed_dim / 2.0))
    angles = np.einsum("m,d->md", positions.reshape(-1), omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def test_embeddings_start_as_climax_does():
    state = build().state_dict()
    columns, rows = np.meshgrid(np.arange(6), np.arange(4))
    expected = np.concatenate([sincos_of_mae(32, columns), sincos_of_mae(32, rows)], axis=1)
    np.testing.assert_allclose(state["pos_embed"][0], expected, atol=1e-6)
    np.testing.assert_allclose(state["var_embed"][0], sincos_of_mae(64, np.arange(4)), atol=1e-6)


@pytest.mark.parametrize(("embed_dim", "std"), [(768, 0.02), (192, 0.04)])
def test_linear_weights_have_the_variance_of_climax_at_768_over_the_width(embed_dim, std):
    state = build(embed_dim=embed_dim, depth=1).state_dict()
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "head.0.weight", "var_agg.out_proj.weight"):
        assert state[name].std().item() == pytest.approx(std, rel=0.02)
        assert abs(state[name].mean().item()) < 0.05 * std


@pytest.mark.parametrize(("wind", "features"), [("mean", 5), ("rank", 8)])
def test_the_winds_embedding_starts_at_zero(wind, features):
    state = build(embed_dim=256, wind=wind).state_dict()
    assert state[f"wind_{wind}.fc1.weight"].shape == (64, features)
    assert state[f"wind_{wind}.fc1.weight"].std().item() == pytest.approx(features**-0.5, rel=0.2)
    assert (state[f"wind_{wind}.fc2.weight"] == 0).all()
    assert (state[f"wind_{wind}.fc2.bias"] == 0).all()


def test_other_scales():
    state = build(embed_dim=256).state_dict()
    assert state["var_query"].std().item() == pytest.approx(0.02, rel=0.2)
    assert state["var_agg.in_proj_weight"].abs().max().item() == pytest.approx((6 / 1024) ** 0.5, rel=0.01)
    assert state["lead_time_embed.weight"].std().item() == pytest.approx(0.0002, rel=0.2)
    weights = state["token_embeds.proj_weights"]  # uniform to 1/sqrt(4)
    assert weights.abs().max().item() == pytest.approx(0.5, rel=0.01)
    assert weights.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.05)
    for name, value in state.items():
        if name.endswith(("bias", "biases")):
            assert (value == 0).all(), name
        if "norm" in name and name.endswith("weight"):
            assert (value == 1).all(), name


def test_alpha_starts_as_configured():
    assert build(elevation_alpha_init=0.25).state_dict()["blocks.0.attn.elevation_alpha"].tolist() == [0.25]
