import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from topoflow.model.attention import Block
from topoflow.model.bias import TerrainBias
from topoflow.model.terrain import TerrainAttention, patch_heights


def bias(heights, alpha):
    place = torch.arange(len(heights))
    terrain = TerrainBias(torch.tensor(heights), torch.tensor([alpha]))
    return terrain.added(None, None, place[:, None], place).tolist()


def test_five_heights_up_at_alpha_one_is_minus_five():
    assert bias([0.0, 5.0], 1.0) == [[0.0, -5.0], [0.0, 0.0]]  # row = query: climbing costs, descending does not


def test_bias_is_clamped_at_minus_ten_and_at_zero():
    assert bias([0.0, 5.0], 3.0) == [[0.0, -10.0], [0.0, 0.0]]
    assert bias([0.0, 5.0], -3.0) == [[0.0, 0.0], [0.0, 0.0]]


def test_patch_heights_are_means_in_metres_with_the_sea_at_zero():
    elevation_m = torch.tensor([[100.0, 300.0, -4000.0, 400.0], [200.0, 400.0, -2000.0, 800.0]])
    assert patch_heights(elevation_m, 2).tolist() == [250.0, 300.0]  # (0 + 400 + 0 + 800) / 4 at the coast


def test_patch_heights_are_in_raster_order():
    elevation_m = torch.arange(24.0).reshape(4, 6)
    expected = [elevation_m[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean().item() for i in range(2) for j in range(3)]
    assert patch_heights(elevation_m, 2).tolist() == expected


def plain_attention(attention, x, heights_m):
    """Compute the plain formula, one head and query at a time."""
    (B, N, D), heads = x.shape, attention.num_heads
    q, k, v = attention.qkv(x).reshape(B, N, 3, heads, D // heads).unbind(2)
    rows = []
    for i in range(N):
        height_gain = ((heights_m - heights_m[i]) / 1000.0).clamp(min=0.0)
        bias = torch.clamp(-attention.elevation_alpha * height_gain, min=-10.0)
        scores = torch.einsum("bhd,bjhd->bhj", q[:, i], k) / (D // heads) ** 0.5 + bias
        rows.append(torch.einsum("bhj,bjhd->bhd", scores.softmax(-1), v).flatten(1))
    return attention.proj(torch.stack(rows, dim=1))


def test_terrain_attention_is_the_plain_formula_and_alpha_gets_its_gradient():
    torch.manual_seed(0)
    attention = TerrainAttention(8, 2, drop_rate=0.0, alpha_init=1.5).double()
    heights_m = torch.tensor([0.0, 1200.0, 300.0, 9000.0, 4100.0], dtype=torch.float64)  # one pair beyond the clamp
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(2, 5, 8, dtype=torch.float64)
    inputs = [x, *attention.parameters()]
    expected = plain_attention(attention, x, heights_m)
    actual = attention(x, heights_m)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    gradients = zip(torch.autograd.grad(actual, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True)
    for actual_grad, expected_grad in gradients:
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-10, atol=1e-12)
    assert attention.elevation_alpha.shape == (1,)


def test_names_and_initial_values():
    state = TerrainAttention(8, 2, drop_rate=0.0, alpha_init=0.01).state_dict()
    assert state["elevation_alpha"].tolist() == pytest.approx([0.01])
    assert state["H_scale"].item() == 1000.0


def block_zero(embed_dim, num_heads, N):
    """A block with terrain, and a function that runs it forward and backward: output and gradients."""
    torch.manual_seed(0)
    block = Block(TerrainAttention(embed_dim, num_heads, drop_rate=0.0, alpha_init=0.3), embed_dim, 4.0, 0.0, 0.0)
    x, grad = torch.randn(2, N, embed_dim, requires_grad=True), torch.randn(2, N, embed_dim)
    heights_m = 4000 * torch.rand(N)

    def step(call):
        y = call(x, heights_m)
        return [y, *torch.autograd.grad(y, [x, *block.parameters()], grad)]

    return block, step


def operator_calls(N):
    block, step = block_zero(16, 2, N)
    step(block)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(block)
    return sum(event.count for event in profiled.key_averages() if event.key.startswith("aten::"))


def test_a_training_step_takes_few_operators_however_many_tokens():
    few, many = operator_calls(64), operator_calls(1024)
    assert many < 1.1 * few < 660
    assert operator_calls(3072) < 3 * many  # on CPU the bias is formed for 1,024 queries at a time


def test_block_zero_compiles_as_one_graph_at_2048_tokens():
    block, step = block_zero(64, 4, 2048)
    expected = step(block)
    # building kernels with inductor would take half a minute more; test_topoflow.py compiles a whole network with it
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(step(compiled), expected, strict=True):
        assert (ours - eager).norm() < 1e-4 * eager.norm()
