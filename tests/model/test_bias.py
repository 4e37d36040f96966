"""Compare attention with biases with the plain formula in float64, torch's gradients and finite differences."""

import math
from dataclasses import dataclass

import pytest
import torch

from topoflow.model import attention
from topoflow.model.attention import Attention, attend_with_biases, compiled_flex_kernel, cpu_kernel, flex_kernel
from topoflow.model.bias import TerrainBias

LOW, MIDDLE, HIGH = 0.3, 4.0, 9.0
"""Strengths at which no pair, a few pairs, and most pairs of heights from 0 to 5 are clamped."""


def inputs(N=23, dtype=torch.float64, B=2, heads=3, d=6):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(B, heads, N, d, generator=generator, dtype=torch.float64) for _ in range(4))
    heights = 5 * torch.rand(N, generator=generator, dtype=torch.float64)
    heights[1] = heights[0]
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
    return q, k, v, grad.to(dtype), heights.to(dtype)


def plain(q, k, v, bias):
    """Softmax attention from torch's elementary functions; bias broadcasts to [B, heads, N, N]."""
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


def terrain(heights, alpha):
    return torch.clamp(-alpha * torch.relu(heights[None, :] - heights[:, None]), -10.0, 0.0)


def value_and_gradients(y, variables, grad):
    return [y, *torch.autograd.grad(y, variables, grad)]


@pytest.fixture(params=["one chunk", "ragged chunks"])
def chunks(request, monkeypatch):
    if request.param == "ragged chunks":
        monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 5)


@pytest.mark.parametrize("kernel", [cpu_kernel, flex_kernel])
@pytest.mark.parametrize("strength", [LOW, MIDDLE, HIGH, 0.0, -1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_attention_with_terrain_is_the_plain_formula(chunks, kernel, strength, dtype, tolerance):
    q, k, v, grad, heights = inputs(dtype=dtype)
    alpha = torch.tensor([strength], dtype=dtype, requires_grad=True)
    if kernel is flex_kernel:  # on CPU torch interprets FlexAttention, without gradients
        q, k, v = (t.detach() for t in (q, k, v))
    variables = [t for t in (q, k, v, alpha) if t.requires_grad]
    actual = attend_with_biases(q, k, v, [TerrainBias(heights, alpha)], kernel)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v, alpha)]
    expected = plain(*exact[:3], terrain(heights.double(), exact[3]))
    expected = value_and_gradients(expected, exact[-len(variables) :], grad.double())
    for a, e in zip(value_and_gradients(actual, variables, grad), expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=1e-12 + tolerance * 1e-2 * e.abs().max().item())
    assert torch.equal(attend_with_biases(q, k, v, [TerrainBias(heights, alpha.detach())], kernel), actual)


@pytest.mark.parametrize("strength", [LOW, MIDDLE])
def test_gradients_are_those_of_finite_differences(chunks, strength):
    q, k, v, _, heights = inputs(N=9, heads=2, d=3)
    alpha = torch.tensor([strength], dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, alpha):
        return attend_with_biases(q, k, v, [TerrainBias(heights, alpha)], cpu_kernel)

    assert torch.autograd.gradcheck(attend, (q, k, v, alpha))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_terrain_is_plain_attention_and_has_no_gradient(dtype):
    q, k, v, grad, _ = inputs(dtype=dtype)
    alpha = torch.tensor([1.0], dtype=dtype, requires_grad=True)
    flat = torch.full((23,), 3.0, dtype=dtype)
    actual, gradient = value_and_gradients(
        attend_with_biases(q, k, v, [TerrainBias(flat, alpha)], cpu_kernel), [alpha], grad
    )
    torch.testing.assert_close(actual, plain(q, k, v, 0.0))
    assert abs(gradient.item()) < 1e-35


@pytest.mark.parametrize("kernel", [cpu_kernel, flex_kernel])
def test_only_the_lowest_query_sees_higher_keys(kernel):
    q, k, v, grad, _ = inputs(N=4)
    q, k, v = (t.detach() for t in (q, k, v))
    heights = torch.tensor([0.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    alpha = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    actual = torch.autograd.grad(attend_with_biases(q, k, v, [TerrainBias(heights, alpha)], kernel), alpha, grad)
    expected = torch.autograd.grad(plain(q, k, v, terrain(heights, alpha)), alpha, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@dataclass(frozen=True)
class DistanceBias:
    """A bias with a strength per head and a direction per sample, as other biases may have."""

    along: torch.Tensor  # [B, N]
    per_head: torch.Tensor  # [heads, 1]

    @property
    def strengths(self):
        return (self.per_head,)

    def detached(self):
        return DistanceBias(self.along, self.per_head.detach())

    def added(self, sample, head, query, key):
        return -self.per_head[head, 0] * self.slopes(sample, head, query, key)[0]

    def slopes(self, sample, head, query, key):
        return ((self.along[sample, query] - self.along[sample, key]).abs(),)


@pytest.mark.parametrize("kernel", [cpu_kernel, flex_kernel])
def test_biases_per_head_and_per_sample_add_up(chunks, kernel):
    q, k, v, grad, heights = inputs()
    generator = torch.Generator().manual_seed(3)
    along = torch.randn(2, 23, generator=generator, dtype=torch.float64)
    per_head = torch.tensor([[0.1], [-0.7], [2.0]], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([MIDDLE], dtype=torch.float64, requires_grad=True)
    if kernel is flex_kernel:
        q, k, v = (t.detach() for t in (q, k, v))
    variables = [t for t in (q, k, v, alpha, per_head) if t.requires_grad]
    biases = [TerrainBias(heights, alpha), DistanceBias(along, per_head)]
    distance = (along[:, :, None] - along[:, None, :]).abs()  # [B, N, N]
    bias = terrain(heights, alpha) - per_head[None, :, :, None] * distance[:, None]
    expected = value_and_gradients(plain(q, k, v, bias), variables, grad)
    actual = value_and_gradients(attend_with_biases(q, k, v, biases, kernel), variables, grad)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def test_the_plain_path_is_the_same_function():
    torch.manual_seed(0)
    layer, x = Attention(12, 3, 0.0).double(), torch.randn(2, 23, 12, dtype=torch.float64)
    heights = inputs()[4]
    found = []
    for rate in (0.0, 1e-300):  # dropout on attention weights takes the plain path; at this rate nothing is dropped
        alpha = torch.tensor([MIDDLE], dtype=torch.float64, requires_grad=True)
        layer.attn_drop_rate = rate
        y = layer(x, TerrainBias(heights, alpha))
        found.append([y, *torch.autograd.grad(y.square().sum(), [alpha, *layer.parameters()])])
    for fused, unfused in zip(*found, strict=True):
        torch.testing.assert_close(fused, unfused, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_strength_loses_little_in_float32():
    q, k, v, grad, heights = inputs(N=700, dtype=torch.float32, B=1, heads=2, d=8)
    alpha = torch.tensor([0.01], requires_grad=True)
    y = attend_with_biases(q, k, v, [TerrainBias(heights, alpha)], cpu_kernel)
    (actual,) = torch.autograd.grad(y, alpha, grad)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v, alpha)]
    y = plain(*exact[:3], terrain(heights.double(), exact[3]))
    (expected,) = torch.autograd.grad(y, exact[3], grad.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_score_matrix_is_kept_for_the_backward_pass():
    N, saved = 300, []
    q, k, v, _, heights = inputs(N=N, dtype=torch.float32)
    alpha = torch.tensor([0.3], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        attend_with_biases(q, k, v, [TerrainBias(heights, alpha)], cpu_kernel)
    assert saved
    assert max(saved) < N * N


def test_the_bits_repeat():
    q, k, v, grad, heights = inputs(N=300, dtype=torch.float32)
    alpha = torch.tensor([0.3], requires_grad=True)
    bias = TerrainBias(heights, alpha)
    first, *others = (
        value_and_gradients(attend_with_biases(q, k, v, [bias], cpu_kernel), (q, k, v, alpha), grad) for _ in range(3)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_bfloat16_is_as_near_as_its_numbers_are():
    q, k, v, grad, heights = inputs(N=40, dtype=torch.float32)
    alpha = torch.tensor([0.5], requires_grad=True)
    expected = value_and_gradients(plain(q, k, v, terrain(heights, alpha)), (q, k, v, alpha), grad)
    short = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    y = attend_with_biases(*short, [TerrainBias(heights, alpha)], cpu_kernel)
    actual = value_and_gradients(y, (*short, alpha), grad.bfloat16())
    assert [t.dtype for t in actual] == [torch.bfloat16] * 4 + [torch.float32]
    for a, e in zip(actual, expected, strict=True):
        assert (a.float() - e).norm() < 0.02 * e.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("strength", [LOW, MIDDLE])
def test_on_a_gpu_it_is_the_function_on_cpu(strength):
    q, k, v, grad, heights = inputs(N=256, dtype=torch.float32, d=32)
    alpha = torch.tensor([strength], requires_grad=True)
    expected = value_and_gradients(plain(q, k, v, terrain(heights, alpha)), (q, k, v, alpha), grad)
    there = [t.detach().cuda().requires_grad_() for t in (q, k, v, alpha)]
    bias = TerrainBias(heights.cuda(), there[3])
    y = attend_with_biases(*there[:3], [bias], compiled_flex_kernel())
    for a, e in zip(value_and_gradients(y, there, grad.cuda()), expected, strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=2e-3, atol=2e-3)
