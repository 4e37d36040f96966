import pytest
import torch
from torch import nn
from torch.nn import functional as F

from topoflow.config import ModelConfig
from topoflow.errors import ConfigError
from topoflow.model.topoflow import TopoFlow, build_model

INPUTS = ("u", "v", "pm25", "o3", "elevation")
TARGETS = ("pm25", "o3")
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 4, "drop_rate": 0.0, "drop_path": 0.0}


def build(img_size=(8, 12), activation_checkpointing=False, num_leads=1, **options):
    config = ModelConfig(**{**SMALL, **options})
    rows, columns = img_size[0] // config.patch_size, img_size[1] // config.patch_size
    x_km = torch.arange(columns).repeat(rows) * 50.0
    y_km = torch.arange(rows).repeat_interleave(columns) * -50.0
    return build_model(config, INPUTS, TARGETS, img_size, x_km, y_km, 0, activation_checkpointing, num_leads=num_leads)


def randomize(model):
    """Set weights with which every part affects the output."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        scale = 0.01 if name == "lead_time_embed.weight" else 0.3
        nn.init.normal_(parameter, std=scale, generator=generator)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 5, 8, 12, generator=generator)
    elevation_m = torch.rand(8, 12, generator=generator) * 4000
    wind_ms = torch.randn(3, 2, 8, 12, generator=generator) * 5
    return x, torch.tensor([12.0, 48.0, 96.0]), elevation_m, wind_ms


def paper_scale(**options):
    inputs, targets = [f"input{i}" for i in range(15)], [f"target{i}" for i in range(6)]
    config = ModelConfig(embed_dim=768, depth=6, num_heads=8, wind="none", **options)
    with torch.device("meta"):
        return TopoFlow(config, inputs, targets, (128, 256), [], [])


def test_parameters_at_paper_scale():
    parameters = dict(paper_scale(terrain="none").named_parameters())
    blocks = [name for name in parameters if name.startswith("blocks.")]
    tokens = [name for name in parameters if name.startswith("token_embeds.")]
    head = [name for name in parameters if name.startswith("head.")]
    assert [len(parameters), len(blocks), len(tokens), len(head)] == [91, 72, 2, 6]
    assert set(parameters) - {*blocks, *tokens, *head} == {
        "var_embed", "var_query", "pos_embed", "lead_time_embed.weight", "lead_time_embed.bias", "norm.weight",
        "norm.bias", "var_agg.in_proj_weight", "var_agg.in_proj_bias", "var_agg.out_proj.weight",
        "var_agg.out_proj.bias",
    }  # fmt: skip
    assert {name for name in blocks if name.startswith("blocks.5.")} == {
        f"blocks.5.{layer}.{kind}"
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    assert set(head) == {f"head.{index}.{kind}" for index in (0, 2, 4) for kind in ("weight", "bias")}
    assert parameters["head.4.weight"].shape == (6 * 2 * 2, 768)
    assert round(sum(p.numel() for p in parameters.values()) / 1e6) == 52


def test_terrain_adds_one_parameter_and_one_buffer():
    without, with_terrain = paper_scale(terrain="none").state_dict(), paper_scale().state_dict()
    assert with_terrain.keys() - without.keys() == {"blocks.0.attn.elevation_alpha", "blocks.0.attn.H_scale"}
    assert without.keys() <= with_terrain.keys()


def climax_forward(model, x, lead_time_hours):
    """ClimaX's forward pass (microsoft/ClimaX, arch.py) with torch's own layers and the weights of a TopoFlow."""
    state, config = model.state_dict(), model.config
    (B, V, H, W), D, p, T = x.shape, config.embed_dim, config.patch_size, len(model.target_names)
    h, w = H // p, W // p
    tokens = F.conv2d(
        x, state["token_embeds.proj_weights"].flatten(0, 1), state["token_embeds.proj_biases"].flatten(), p, groups=V
    )
    tokens = tokens.reshape(B, V, D, h * w).permute(0, 3, 1, 2) + state["var_embed"]  # [B, N, V, D]
    aggregation = nn.MultiheadAttention(D, config.num_heads, batch_first=True)
    aggregation.load_state_dict(model.var_agg.state_dict())
    flat = tokens.flatten(0, 1)
    tokens = aggregation(state["var_query"].expand(B * h * w, 1, D), flat, flat)[0].reshape(B, h * w, D)
    tokens = tokens + state["pos_embed"] + model.lead_time_embed(lead_time_hours[:, None])[:, None]
    for index in range(config.depth):
        layer = nn.TransformerEncoderLayer(
            D, config.num_heads, int(D * config.mlp_ratio), 0.0, "gelu", batch_first=True, norm_first=True
        )
        names = {
            "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.",
            "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2.",
        }  # fmt: skip
        block = {a + k: state[f"blocks.{index}.{b}{k}"] for a, b in names.items() for k in ("weight", "bias")}
        layer.load_state_dict(block)
        tokens = layer(tokens)
    y = model.head(F.layer_norm(tokens, (D,), state["norm.weight"], state["norm.bias"]))
    y = torch.einsum("nhwpqc->nchpwq", y.reshape(B, h, w, p, p, T))
    return y.reshape(B, T, H, W)


@pytest.mark.parametrize("patch_size", [2, 4])
@torch.no_grad()
def test_without_priors_it_is_climax(batch, patch_size):
    x, lead, elevation_m, _ = batch
    model = randomize(build(wind="none", terrain="none", patch_size=patch_size)).eval()
    expected = climax_forward(model, x, lead)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(x, lead, elevation_m), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_terrain_acts_in_metres_on_block_zero(batch):
    x, lead, elevation_m, wind = batch
    model = randomize(build(terrain="endpoint")).eval()
    model.blocks[0].attn.elevation_alpha.fill_(1.0)
    flat = model(x, lead, torch.full((8, 12), 2500.0), wind)
    assert torch.equal(flat, model(x, lead, torch.zeros(8, 12), wind))  # only differences count
    assert torch.equal(flat, model(x, lead, torch.full((8, 12), -900.0), wind))  # the sea is at 0
    assert not torch.allclose(flat, model(x, lead, elevation_m, wind))
    without = randomize(build(terrain="none")).eval()
    without.load_state_dict({k: v for k, v in model.state_dict().items() if k in without.state_dict()})
    torch.testing.assert_close(without(x, lead, elevation_m, wind), flat)


@pytest.mark.parametrize("kind", ["mean", "rank"])
def test_with_wind_it_starts_as_plain_climax_to_the_bit(batch, kind):
    x, lead, elevation_m, wind = batch
    windy, plain = build(wind=kind, drop_rate=0.2, drop_path=0.2), build(wind="none", drop_rate=0.2, drop_path=0.2)
    added = windy.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"wind_{kind}.{layer}.{value}" for layer in ("fc1", "fc2") for value in ("weight", "bias")}
    torch.manual_seed(0)
    expected = plain(x, lead, elevation_m)
    torch.manual_seed(0)
    actual = windy(x, lead, elevation_m, wind)
    assert torch.equal(actual, expected)
    actual.square().sum().backward()
    assert windy.get_parameter(f"wind_{kind}.fc2.weight").grad.abs().max() > 0  # and can leave it


def test_every_token_gets_the_mean_wind(batch):
    model = randomize(build(wind="mean", depth=1))
    tokens = []
    model.blocks[0].register_forward_pre_hook(lambda module, arguments: tokens.append(arguments[0]))
    model(*batch)
    model(*batch[:3], torch.zeros_like(batch[3]))
    added = tokens[0] - tokens[1]
    assert added.std(dim=0).min() > 0  # each sample has a wind of its own
    torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=0, atol=1e-5)


def gradients(model, batch, call=None):
    """Return output and gradients of the model, or of a wrapper of it."""
    torch.manual_seed(0)
    y = (model if call is None else call)(*batch)
    model.zero_grad()
    y.square().mean().backward()
    return {"output": y, **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("wind", ["mean", "rank"])
def test_every_parameter_gets_a_gradient(batch, wind):
    for name, gradient in gradients(randomize(build(wind=wind, drop_rate=0.1, drop_path=0.1)), batch).items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, name


def test_activation_checkpointing_gives_the_same_bits(batch):
    options = {"drop_rate": 0.2, "drop_path": 0.4}
    plain = gradients(randomize(build(**options)), batch)
    checkpointed = gradients(randomize(build(activation_checkpointing=True, **options)), batch)
    for name, value in plain.items():
        assert torch.equal(checkpointed[name], value), name


# inductor takes half a minute to build its kernels, so it is tested once
@pytest.mark.parametrize(
    ("backend", "activation_checkpointing", "wind"), [("inductor", False, "mean"), ("aot_eager", True, "rank")]
)
def test_compiled_it_is_the_same_function(batch, backend, activation_checkpointing, wind):
    model = randomize(build(activation_checkpointing=activation_checkpointing, wind=wind, depth=1, decoder_depth=0))
    expected = gradients(model, batch)
    actual = gradients(model, batch, call=torch.compile(model, fullgraph=True, backend=backend))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4)


def test_bf16_autocast(batch):
    model = randomize(build())
    expected = gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(*batch)
    model.zero_grad()
    y.float().square().mean().backward()
    assert (y.float() - expected["output"]).std() < 0.05 * expected["output"].std()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name


def test_drop_path_rises_linearly():
    assert [block.drop_path_rate for block in build(drop_path=0.3).blocks] == pytest.approx([0.0, 0.15, 0.3])
    assert [block.drop_path_rate for block in build(drop_path=0.3, depth=1).blocks] == [0.0]


def test_dropout_on_embeddings(batch):
    model = build(drop_rate=0.5, depth=1)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model.train()(*batch)
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6
    assert all(block.attn.attn_drop_rate == 0.0 for block in model.blocks)
    assert all(block.attn.proj_drop.p == block.mlp.drop.p == 0.5 for block in model.blocks)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (
            0,
            torch.zeros(3, 4, 8, 12),
            r"x: shape \(3, 4, 8, 12\), expected \(3, 5, 8, 12\).* u, v, pm25, o3, elevation",
        ),
        (0, torch.zeros(3, 5, 12, 8), r"x: shape \(3, 5, 12, 8\), expected \(3, 5, 8, 12\)"),
        (1, torch.zeros(2), r"lead_time_hours: shape \(2,\), expected \(3,\)"),
        (2, torch.zeros(1, 8, 12), r"elevation_m: shape \(1, 8, 12\), expected \(8, 12\)"),
        (3, torch.zeros(3, 8, 12), r"wind_ms: shape \(3, 8, 12\), expected \(3, 2, 8, 12\)"),
        (3, None, r"wind_ms: None, expected .* for model.wind=mean"),
    ],
)
def test_wrong_inputs_are_refused(batch, position, wrong, message):
    arguments = list(batch)
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        build()(*arguments)


def test_wrong_geometry_is_refused():
    with pytest.raises(ConfigError, match=r"model.patch_size: 3 does not divide the grid of 8 x 12 cells"):
        build(patch_size=3)
    config = ModelConfig(**SMALL, wind="rank")
    for centres in ([0.0] * 23, [0.0] * 23 + [float("nan")]):
        with pytest.raises(ValueError, match=r"patch_y_km: shape .*, expected 24 finite numbers"):
            build_model(config, INPUTS, TARGETS, (8, 12), [0.0] * 24, centres, 0)


@pytest.mark.parametrize("options", [{}, {"wind": "mean"}, {"wind": "rank", "terrain": "endpoint"}])
def test_patches_without_data_are_not_computed_and_not_attended_to(batch, monkeypatch, options):
    model = randomize(build(**{"wind": "none", "terrain": "none", **options})).eval()
    x, leads, elevation_m, wind_ms = batch
    everywhere = model(*batch)
    cells = torch.zeros(8, 12, dtype=torch.bool)
    cells[0, 0] = cells[3, 4:6] = cells[7, 11] = True
    model.keep_patches(cells.numpy())
    kept = torch.zeros(8, 12, dtype=torch.bool)
    kept[0:2, 0:2] = kept[2:4, 4:6] = kept[6:8, 10:12] = True
    output = model(*batch)
    assert output[:, :, ~kept].eq(0).all()
    assert output[:, :, kept].ne(0).all()
    other = torch.where(kept, x, 100 * torch.randn_like(x))
    assert torch.equal(model(other, leads, elevation_m, wind_ms), output)
    assert not torch.allclose(everywhere[:, :, kept], output[:, :, kept])
    if model.config.terrain == "none":  # the whole network, with keys of other patches hidden by an independent mask
        plain, tokens = F.scaled_dot_product_attention, kept[::2, ::2].flatten()
        monkeypatch.setattr(
            F,
            "scaled_dot_product_attention",
            lambda q, k, v, **more: plain(q, k, v, attn_mask=tokens[None, None, None]),
        )
        whole = randomize(build(**{"wind": "none", "terrain": "none", **options})).eval()
        assert torch.allclose(whole(*batch)[:, :, kept], output[:, :, kept], atol=1e-5)


def test_keeping_all_patches_changes_nothing(batch):
    model = randomize(build()).eval()
    before = model(*batch)
    model.keep_patches(torch.ones(8, 12, dtype=torch.bool).numpy())
    assert torch.equal(model(*batch), before)
    assert "kept" not in model.state_dict()


def test_keeping_no_patch_is_refused():
    with pytest.raises(ConfigError, match="no cell of the mask has a target"):
        build().keep_patches(torch.zeros(8, 12, dtype=torch.bool).numpy())


@pytest.mark.parametrize("leads", ["conditioned", "joint"])
def test_a_network_with_a_base_starts_at_zero(batch, leads):
    assert build(base="damped", leads=leads, num_leads=3)(*batch).eq(0).all()
    assert build(leads=leads, num_leads=3)(*batch).ne(0).all()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"relative_position": True, "patch_norm": True}])
def test_for_one_lead_a_conditioned_network_is_a_joint_one_with_the_lead_time_in_its_positions(batch, options):
    x, _, elevation_m, wind = batch
    conditioned = randomize(build(**options)).eval()
    joint = build(leads="joint", num_leads=1, **options).eval()
    weights = conditioned.state_dict()
    weight, bias = (weights.pop(f"lead_time_embed.{name}") for name in ("weight", "bias"))
    weights["pos_embed"] = weights["pos_embed"] + 24 * weight[:, 0] + bias
    joint.load_state_dict(weights)
    expected = conditioned(x, torch.full((3,), 24.0), elevation_m, wind)
    assert expected.std() > 0.1
    torch.testing.assert_close(joint(x, None, elevation_m, wind), expected[:, None], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_of_a_joint_head_are_the_network_of_one_lead(batch):
    joint = randomize(build(leads="joint", num_leads=3)).eval()
    joint.keep_patches(torch.arange(96).reshape(8, 12).numpy() < 50)
    forecasts = joint(*batch)
    assert forecasts.shape == (3, 3, 2, 8, 12)
    for lead in range(3):
        single = build(leads="joint", num_leads=1).eval()
        single.keep_patches(torch.arange(96).reshape(8, 12).numpy() < 50)
        weights = joint.state_dict()
        for name in ("head.4.weight", "head.4.bias"):  # ordered (cell of the patch, lead, target)
            weights[name] = weights[name].unflatten(0, (4, 3, 2))[:, lead].flatten(0, 1)
        single.load_state_dict(weights)
        torch.testing.assert_close(single(*batch)[:, 0], forecasts[:, lead], rtol=1e-4, atol=1e-5)


def test_a_joint_network_has_other_parameters_in_its_head_alone():
    shapes = [
        {name: value.shape for name, value in build(leads=leads, num_leads=3).state_dict().items()}
        for leads in ("conditioned", "joint")
    ]
    assert shapes[0].keys() - shapes[1].keys() == {"lead_time_embed.weight", "lead_time_embed.bias"}
    different = {name for name in shapes[1] if shapes[0][name] != shapes[1][name]}
    assert different == {"head.4.weight", "head.4.bias"}
    assert shapes[1]["head.4.weight"] == (4 * 3 * 2, 32)
