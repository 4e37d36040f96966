"""The attention of block 0 against the plain formula, torch's own gradients and finite differences."""

import math

import pytest
import torch
from torch import library

from topoflow.model import score_tiles
from topoflow.model import tiled_attention as operators
from topoflow.model.flex_attention import compiled_kernel, flex_attention, uncompiled_kernel
from topoflow.model.tiled_attention import tiled_attention

LOW, MIDDLE, HIGH = 0.3, 4.0, 9.0
"""Strengths at which no pair, a few pairs, and most pairs of heights from 0 to 5 are damped by the largest damping."""


@pytest.fixture(params=["one tile", "ragged tiles"])
def tiles(request, monkeypatch):
    """Also tiles that do not divide N, in groups that do not divide the heads."""
    if request.param == "ragged tiles":
        monkeypatch.setattr(score_tiles, "TILE", 5)
        monkeypatch.setattr(score_tiles, "TILE_ELEMENTS", 4 * 25)
        monkeypatch.setattr(operators, "SLAB", 8)
        monkeypatch.setattr(score_tiles, "ROWS_IN_CACHE", 3)


def inputs(N=23, dtype=torch.float64, B=2, heads=3, d=6):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(B, heads, N, d, generator=generator, dtype=torch.float64) for _ in range(4))
    heights = 5 * torch.rand(N, generator=generator, dtype=torch.float64)
    heights[1] = heights[0]
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
    return q, k, v, grad.to(dtype), heights.to(dtype)


def plain(q, k, v, heights=None, alpha=None, mask=None):
    """The formula, from torch's own elementary functions."""
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if heights is not None:
        scores = scores + torch.clamp(-alpha * torch.relu(heights[None, :] - heights[:, None]), -10.0, 0.0)
    weights = scores.softmax(-1)
    return (weights if mask is None else weights * mask) @ v


def value_and_gradients(function, variables, grad):
    y = function()
    return [y, *torch.autograd.grad(y, variables, grad)]


@pytest.mark.parametrize("strength", [LOW, MIDDLE, HIGH, 0.0, -1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_damped_attention_is_the_plain_formula(tiles, strength, dtype, tolerance):
    q, k, v, grad, heights = inputs(dtype=dtype)
    alpha = torch.tensor([strength], dtype=dtype, requires_grad=True)
    variables = (q, k, v, alpha)
    actual = value_and_gradients(lambda: tiled_attention(q, k, v, heights, alpha), variables, grad)
    expected = value_and_gradients(lambda: plain(q, k, v, heights, alpha), variables, grad)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
@pytest.mark.parametrize("strength", [LOW, MIDDLE])
def test_gradients_are_those_of_finite_differences(tiles, strength, drop_rate):
    q, k, v, _, heights = inputs(N=9, heads=2, d=3)
    alpha = torch.tensor([strength], dtype=torch.float64, requires_grad=True)

    def attend(*variables):
        torch.manual_seed(1)  # the same weights drop each time
        return tiled_attention(*variables[:3], heights, variables[3], drop_rate)

    assert torch.autograd.gradcheck(attend, (q, k, v, alpha))


def test_strength_in_tall_terrain_at_paper_scale_of_heights():
    """Sums over many pairs in float32 lose little: alpha's gradient against float64."""
    q, k, v, grad, heights = inputs(N=700, dtype=torch.float32, B=1, heads=2, d=8)
    alpha = torch.tensor([0.01], requires_grad=True)
    (actual,) = torch.autograd.grad(tiled_attention(q, k, v, heights, alpha), alpha, grad)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v, alpha)]
    y = plain(*exact[:3], heights.double(), exact[3])
    (expected,) = torch.autograd.grad(y, exact[3], grad.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def dropped_as(q, k, v, heights, alpha, drop_rate, seed):
    """The mask that was used: the weights are what comes out for unit vectors in place of v."""
    N = q.shape[2]
    unit = torch.eye(N, dtype=q.dtype).expand(*q.shape[:2], N, N)
    wide = [torch.cat([t.detach(), t.new_zeros(*t.shape[:3], N - t.shape[3])], -1) for t in (q, k)]
    scale = math.sqrt(N / q.shape[3])  # the scores are divided by the root of the wider vectors' length
    torch.manual_seed(seed)
    kept = tiled_attention(wide[0] * scale, wide[1], unit, heights, alpha, drop_rate)
    return kept / plain(q.detach(), k.detach(), unit, heights, alpha)


@pytest.mark.parametrize("with_terrain", [True, False])
def test_dropout_falls_on_the_weights_as_often_as_asked(tiles, with_terrain):
    q, k, v, grad, heights = inputs(N=31)
    alpha = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    terrain = (heights, alpha) if with_terrain else (None, None)
    mask = dropped_as(q, k, v, *terrain, 0.3, seed=5).detach()
    kept = (mask - 1 / 0.7).abs() < 1e-4
    assert torch.all(kept | (mask.abs() < 1e-9))
    n = mask.numel()
    assert abs(kept.sum() / n - 0.7) < 4 * math.sqrt(0.3 * 0.7 / n)
    for dim in range(4):  # no head, sample, query or key has another's mask
        assert not torch.equal(kept.select(dim, 0), kept.select(dim, 1))

    variables = (q, k, v, alpha) if with_terrain else (q, k, v)

    def attend():
        torch.manual_seed(5)
        return tiled_attention(q, k, v, *terrain, 0.3)

    actual = value_and_gradients(attend, variables, grad)
    expected = value_and_gradients(lambda: plain(q, k, v, *terrain, mask), variables, grad)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_dropout_draws_anew_at_each_call_and_alike_from_one_seed():
    q, k, v, *_ = inputs()
    torch.manual_seed(0)
    first, second = (tiled_attention(q, k, v, drop_rate=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(tiled_attention(q, k, v, drop_rate=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
def test_nothing_of_n_by_n_is_kept(drop_rate):
    N, saved = 300, []
    q, k, v, _, heights = inputs(N=N, dtype=torch.float32)
    alpha = torch.tensor([0.3], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        tiled_attention(q, k, v, heights, alpha, drop_rate)
    assert max(saved) < N * N


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
def test_the_bits_repeat(drop_rate):
    q, k, v, grad, heights = inputs(N=300, dtype=torch.float32)
    alpha = torch.tensor([0.3], requires_grad=True)
    found = []
    for _ in range(3):
        torch.manual_seed(2)
        attend = tiled_attention(q, k, v, heights, alpha, drop_rate)
        found.append([attend, *torch.autograd.grad(attend, (q, k, v, alpha), grad)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_bfloat16_is_as_near_as_its_numbers_are():
    q, k, v, grad, heights = inputs(N=40, dtype=torch.float32)
    alpha = torch.tensor([0.5], requires_grad=True)
    expected = value_and_gradients(lambda: plain(q, k, v, heights, alpha), (q, k, v, alpha), grad)
    short = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    y = tiled_attention(*short, heights, alpha)
    actual = [y, *torch.autograd.grad(y, (*short, alpha), grad.bfloat16())]
    assert [t.dtype for t in actual] == [torch.bfloat16] * 4 + [torch.float32]
    for a, e in zip(actual, expected, strict=True):
        assert (a.float() - e).norm() < 0.02 * e.norm()


def test_the_operators_keep_torchs_rules():
    q, k, v, _, heights = inputs(N=9)
    alpha = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    for terrain in ((heights, alpha), (None, None)):
        library.opcheck(torch.ops.topoflow.tiled_attention, (q, k, v, *terrain, 0.0, None))
        library.opcheck(torch.ops.topoflow.tiled_attention, (q, k, v, *terrain, 0.25, torch.tensor([3])))


@pytest.mark.parametrize("strength", [LOW, MIDDLE, -1.0])
def test_what_a_gpu_is_asked_for_is_the_same_function(monkeypatch, strength):
    """FlexAttention's score modification, and alpha's gradient beside it; on CPU torch interprets it, for results."""
    monkeypatch.setattr(score_tiles, "TILE", 5)
    q, k, v, grad, heights = inputs()
    alpha = torch.tensor([strength], dtype=torch.float64, requires_grad=True)
    results = []

    def kernel(q, k, v, score_mod):
        out, lse = uncompiled_kernel(q.detach(), k.detach(), v.detach(), score_mod)
        results.append(out)
        return out.requires_grad_(), lse

    y = flex_attention(q, k, v, heights, alpha, kernel)
    expected = value_and_gradients(lambda: plain(q, k, v, heights, alpha), (alpha,), grad)
    of_out, of_alpha = torch.autograd.grad(y, (results[0], alpha), grad)
    torch.testing.assert_close(y, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_alpha, expected[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(of_out, grad)  # all else is FlexAttention's
    with torch.no_grad():
        torch.testing.assert_close(flex_attention(q, k, v, heights, alpha, kernel), y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
def test_on_a_gpu_it_is_the_function_on_cpu(drop_rate):
    q, k, v, grad, heights = inputs(N=256, dtype=torch.float32, d=32)
    alpha = torch.tensor([LOW], requires_grad=True)
    expected = value_and_gradients(lambda: plain(q, k, v, heights, alpha), (q, k, v, alpha), grad)
    there = [t.detach().cuda().requires_grad_() for t in (q, k, v, alpha)]
    heights = heights.cuda()
    calls = [lambda: tiled_attention(*there[:3], heights, there[3])]
    if drop_rate:
        torch.manual_seed(0)
        y = tiled_attention(*there[:3], heights, there[3], drop_rate)
        assert y.shape == q.shape
    else:
        calls.append(lambda: flex_attention(*there[:3], heights, there[3], compiled_kernel()))
    for call in calls:
        actual = value_and_gradients(call, there, grad.cuda())
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.cpu(), e, rtol=2e-3, atol=2e-3)
