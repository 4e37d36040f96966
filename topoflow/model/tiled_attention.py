"""Attention damped across terrain, or with dropout on its weights, in memory that grows with N and not with N x N.

torch's fused attention adds a constant bias to its scores on any device, but gives no gradient to what the bias is
made of, and on CPU has no dropout: a bias that wants a gradient, and dropout, send it to the plain formula, which keeps
several [B, heads, N, N] tensors. Here the forward pass is the fused one wherever that can do it, and the backward pass
goes over tiles of the score matrix (`topoflow.model.score_tiles`).

The operators are registered with torch, so that torch.compile calls them as they are.
"""

import torch
from torch import Tensor, library

from topoflow.model.score_tiles import LOG2_E, Bias, Dropout, ScoreTiles, biased_scores, chunks, groups, work_dtype

SLAB = 1024
"""Queries for which the bias of a fused forward pass is made at once; below 768, torch's kernel takes small blocks."""

_LIBRARY = library.Library("topoflow", "DEF")
_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? heights, Tensor? alpha, float drop_rate, Tensor? seed"
_LIBRARY.define(f"tiled_attention({_ARGUMENTS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"tiled_attention_backward(Tensor grad, {_ARGUMENTS}, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor)"
)


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heights: Tensor | None = None,
    alpha: Tensor | None = None,
    drop_rate: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, with the bias of `topoflow.model.damping` and dropout on the weights.

    q, k, v [B, heads, N, d] of one dtype; heights [N] in units of the height scale and alpha [1], both float32 or
    float64, or both None for no bias. Returns [B, heads, N, d]. Gradients go to q, k, v and alpha.

    Dropout (rate rounded to 1 / 65536) draws one seed from the default generator of the CPU, whatever the device, and
    from that its masks, in the forward and again in the backward pass.
    """
    seed = torch.randint(2**31, (1,)) if drop_rate else None
    return torch.ops.topoflow.tiled_attention(q, k, v, heights, alpha, drop_rate, seed)[0]


def gradient_of_alpha(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heights: Tensor, alpha: Tensor
) -> Tensor:
    """That of alpha alone, [1], where `out` came from another kernel; arguments as `tiled_attention` and its results.

    grad [B, heads, N, d]: the gradient of out. lse [B, heads, N]: log-sum-exp of the scores.
    """
    return ScoreTiles(grad, q, k, v, out, lse).gradient_of_alpha(Bias(heights, alpha, work_dtype(q.dtype)))


@library.impl(_LIBRARY, "tiled_attention", "CompositeExplicitAutograd")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heights: Tensor | None,
    alpha: Tensor | None,
    drop_rate: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, heads, N, d] and log-sum-exp of the scores [B, heads, N]."""
    fused = q.device.type == "cpu" and not drop_rate
    bias = None if heights is None else Bias(heights, alpha, q.dtype if fused else work_dtype(q.dtype))
    if fused:
        return _forward_fused(q, k, v, bias)
    return _forward_rows(q, k, v, bias, Dropout(drop_rate, seed, q.device) if drop_rate else None)


def _forward_fused(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None) -> tuple[Tensor, Tensor]:
    # the operator under F.scaled_dot_product_attention, which keeps the log-sum-exp to itself
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if bias is None:
        out, lse = fused(q, k, v)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse  # it has the layout of q
    N = q.shape[2]
    out, lse = _empty_results(q)
    for start in range(0, N, SLAB):
        rows = slice(start, min(start + SLAB, N))
        out[:, :, rows], lse[:, :, rows] = fused(q[:, :, rows], k, v, attn_mask=bias.rows(rows))
    return out, lse


def _forward_rows(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
    B, heads, N, d = q.shape
    work, results = work_dtype(q.dtype), _empty_results(q)
    q, k, v = ((t.to(work) * factor).flatten(0, 1) for t, factor in ((q, LOG2_E * d**-0.5), (k, 1), (v, 1)))
    out, lse = torch.empty_like(q), q.new_empty(B * heads, N)
    for rows in chunks(N):
        added = None if bias is None else bias.rows(rows).mul_(LOG2_E)
        for group in groups(B * heads):
            scores = biased_scores(q[group, rows], k[group].transpose(1, 2), added)
            largest = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(largest).exp2_()
            total = weights.sum(dim=-1, keepdim=True)
            lse[group, rows] = (largest + total.log2()).squeeze(-1) / LOG2_E
            if dropout is not None:
                for columns in chunks(N):
                    tile = weights[:, :, columns]
                    tile.mul_(dropout.mask(torch.empty(tile.shape, dtype=work, device=q.device)))
            out[group, rows] = torch.bmm(weights, v[group]) / total
    for result, values in zip(results, (out, lse), strict=True):
        result.copy_(values.unflatten(0, (B, heads)))
    return results


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """For the output [B, heads, N, d] and the log-sum-exp [B, heads, N], in memory with heads after N, as torch's."""
    B, heads, N, d = q.shape
    out, lse = q.new_empty(B, N, heads, d), q.new_empty(B, N, heads, dtype=work_dtype(q.dtype))
    return out.transpose(1, 2), lse.transpose(1, 2)


@library.impl(_LIBRARY, "tiled_attention_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heights: Tensor | None,
    alpha: Tensor | None,
    drop_rate: float,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [B, heads, N, d] and alpha [1]; grad and out [B, heads, N, d], lse [B, heads, N]."""
    bias = None if heights is None else Bias(heights, alpha, work_dtype(q.dtype))
    dropout = Dropout(drop_rate, seed, q.device) if drop_rate else None
    *of_inputs, of_alpha = ScoreTiles(grad, q, k, v, out, lse).gradients(bias, dropout)
    return *(t.unflatten(0, q.shape[:2]).to(q.dtype).contiguous() for t in of_inputs), of_alpha


def _remember(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, heights, alpha, drop_rate, seed = inputs
    ctx.drop_rate = drop_rate
    ctx.save_for_backward(q, k, v, heights, alpha, seed, *output)


def _differentiate(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, heights, alpha, seed, out, lse = ctx.saved_tensors
    of_q, of_k, of_v, of_alpha = torch.ops.topoflow.tiled_attention_backward(
        grad, q, k, v, heights, alpha, ctx.drop_rate, seed, out, lse
    )
    return of_q, of_k, of_v, None, None if alpha is None else of_alpha.to(alpha.dtype), None, None


@library.register_fake("topoflow::tiled_attention", lib=_LIBRARY)
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor]:
    return _empty_results(q)


@library.register_fake("topoflow::tiled_attention_backward", lib=_LIBRARY)
def _backward_shapes(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *(q.new_empty(t.shape) for t in (q, k, v)), q.new_empty(1, dtype=work_dtype(q.dtype))


library.register_autograd("topoflow::tiled_attention", _differentiate, setup_context=_remember, lib=_LIBRARY)
