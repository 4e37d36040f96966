"""Attention damped across terrain on a GPU: FlexAttention, and the gradient that it is not asked for.

FlexAttention compiles a kernel in which the damping is part of the score (arXiv 2412.05496). It could give the gradient
of the captured strength, too, but by an atomic addition from each score to one address, slow and in no fixed order
(torch 2.13). So the strength is captured as a constant, and its gradient comes from `tiled_attention`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from topoflow.model.damping import damping
from topoflow.model.tiled_attention import gradient_of_alpha

Kernel = Callable[[Tensor, Tensor, Tensor, Callable[..., Tensor]], tuple[Tensor, Tensor]]
"""(q, k, v, score modification) -> (output, log-sum-exp of the scores)."""


def uncompiled_kernel(q: Tensor, k: Tensor, v: Tensor, score_mod: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """torch's flex_attention as it is: to be compiled, or to be interpreted in a test."""
    # not above: it brings the compiler along, an import of seconds
    from torch.nn.attention import flex_attention as flex

    if hasattr(flex, "AuxRequest"):  # torch 2.9
        out, beside = flex.flex_attention(q, k, v, score_mod=score_mod, return_aux=flex.AuxRequest(lse=True))
        return out, beside.lse
    return flex.flex_attention(q, k, v, score_mod=score_mod, return_lse=True)


@functools.cache
def compiled_kernel() -> Kernel:
    """The kernel, compiled at its first call."""
    return torch.compile(uncompiled_kernel)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, heights: Tensor, alpha: Tensor, kernel: Kernel) -> Tensor:
    """The function of `tiled_attention`, without dropout; kernel is `compiled_kernel()` but in tests."""
    strength = alpha.detach()

    def damped(score: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + damping(torch.relu(heights[key] - heights[query]), strength[0])

    out, lse = kernel(q, k, v, damped)
    if not (torch.is_grad_enabled() and alpha.requires_grad):
        return out
    return _WithGradientOfAlpha.apply(out, q.detach(), k.detach(), v.detach(), lse.detach(), heights, alpha)


class _WithGradientOfAlpha(torch.autograd.Function):
    """`out` as it is; backward adds the gradient of alpha to those that `out` gives."""

    @staticmethod
    def forward(
        ctx, out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, heights: Tensor, alpha: Tensor
    ) -> Tensor:
        ctx.save_for_backward(out, q, k, v, lse, heights, alpha)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, q, k, v, lse, heights, alpha = ctx.saved_tensors
        return grad, None, None, None, None, None, gradient_of_alpha(grad, q, k, v, out, lse, heights, alpha)
