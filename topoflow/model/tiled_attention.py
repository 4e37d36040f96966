"""Attention damped across terrain, or with dropout on its weights, in memory that grows with N and not with N x N.

torch's fused attention adds a constant bias to its scores on any device, but gives no gradient to what the bias is
made of, and on CPU has no dropout: a bias that wants a gradient, and dropout, send it to the plain formula, which keeps
several [B, heads, N, N] tensors. Here the forward pass is the fused one wherever that can do it. The backward pass
goes over tiles of the score matrix, all heads and samples at once: it makes the weights of a tile again from
log-sum-exps, as the fused one does (FlashAttention-2, arXiv 2307.08691, algorithm 2), and takes the sum for the
strength of the damping on the way.

The operators are registered with torch.library, so that torch.compile calls them as they are.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from topoflow.model.damping import LARGEST_DAMPING, climb, damping

TILE = 256
"""Queries and keys along a side of a tile."""

TILE_ELEMENTS = 2**19
"""Scores of a tile over the heads and samples that are worked on at once: 2 MiB in float32, twice."""

SLAB = 1024
"""Queries for which the bias of a fused forward pass is made at once; below 768, torch's kernel takes small blocks."""

ROWS_IN_CACHE = 32
"""Rows of a bias that are made at once."""

_LOG2_E = math.log2(math.e)
_LIBRARY = torch.library.Library("topoflow", "DEF")
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
    return _Tiles(grad, q, k, v, out, lse).gradient_of_alpha(_Bias(heights, alpha, _work_dtype(q.dtype)))


class _Bias:
    """The damping of tiles of the score matrix: heights [N], alpha [1]; results are of `dtype`."""

    def __init__(self, heights: Tensor, alpha: Tensor, dtype: torch.dtype):
        self._heights, self._alpha, self._dtype = heights, alpha, dtype
        # where torch.clamp has a gradient: up to its bound, and nowhere if alpha is below 0
        bound = torch.where(alpha > 0, LARGEST_DAMPING / alpha, math.inf)
        self._highest_climb = torch.where(alpha < 0, -1.0, bound)

    def tile(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """(bias times log2 e, derivative of the bias by -alpha), both [queries, keys]."""
        climbs = climb(self._heights[queries], self._heights[keys])
        bias = damping(climbs, self._alpha).mul_(_LOG2_E)
        slope = climbs.mul_(torch.le(climbs, self._highest_climb, out=torch.empty_like(climbs)))
        return bias.to(self._dtype), slope.to(self._dtype)

    def rows(self, queries: slice) -> Tensor:
        """The bias of queries towards all keys, [queries, N]."""
        heights = self._heights[queries]
        rows = self._heights.new_empty(len(heights), len(self._heights))
        for some, part in zip(heights.split(ROWS_IN_CACHE), rows.split(ROWS_IN_CACHE), strict=True):
            damping(climb(some, self._heights, out=part), self._alpha, out=part)
        return rows.to(self._dtype)


class _Dropout:
    """Masks for tiles in the order in which they are asked for, which starts anew with each object."""

    def __init__(self, rate: float, seed: Tensor, device: torch.device):
        self._dropped = round(rate * 65536)
        self.scale = 65536 / (65536 - self._dropped)
        self._generator = torch.Generator(device).manual_seed(int(seed))

    def mask(self, scratch: Tensor) -> Tensor:
        """Overwrite scratch [...] by `scale` where a weight stays and 0 where it drops."""
        # 16 bits decide on each weight: a tenth of the time of Tensor.bernoulli_ on CPU
        words = torch.empty(-(-scratch.numel() // 4), dtype=torch.int64, device=scratch.device)
        bits = words.random_(-(2**63), None, generator=self._generator).view(torch.int16)[: scratch.numel()]
        return torch.ge(bits.view(scratch.shape), self._dropped - 32768, out=scratch).mul_(self.scale)


def _chunks(length: int) -> list[slice]:
    return [slice(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def _groups(number: int) -> list[slice]:
    """Heads and samples that are worked on at once."""
    size = max(1, TILE_ELEMENTS // TILE**2)
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.impl(_LIBRARY, "tiled_attention", "CompositeExplicitAutograd")
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
    bias = None if heights is None else _Bias(heights, alpha, q.dtype if fused else _work_dtype(q.dtype))
    if fused:
        return _forward_fused(q, k, v, bias)
    return _forward_rows(q, k, v, bias, _Dropout(drop_rate, seed, q.device) if drop_rate else None)


def _forward_fused(q: Tensor, k: Tensor, v: Tensor, bias: _Bias | None) -> tuple[Tensor, Tensor]:
    # the operator under F.scaled_dot_product_attention, which keeps the log-sum-exp to itself
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    N = q.shape[2]
    out, lse = _empty_results(q)
    for start in range(0, N, SLAB):
        rows = slice(start, min(start + SLAB, N))
        out[:, :, rows], lse[:, :, rows] = fused(
            q[:, :, rows], k, v, attn_mask=None if bias is None else bias.rows(rows)
        )
    return out, lse


def _forward_rows(
    q: Tensor, k: Tensor, v: Tensor, bias: _Bias | None, dropout: _Dropout | None
) -> tuple[Tensor, Tensor]:
    B, heads, N, d = q.shape
    work, results = _work_dtype(q.dtype), _empty_results(q)
    q, k, v = ((t.to(work) * factor).flatten(0, 1) for t, factor in ((q, _LOG2_E * d**-0.5), (k, 1), (v, 1)))
    out, lse = torch.empty_like(q), q.new_empty(B * heads, N)
    for rows in _chunks(N):
        added = None if bias is None else bias.rows(rows).mul_(_LOG2_E)
        for group in _groups(B * heads):
            scores = _scores(q[group, rows], k[group].transpose(1, 2), added)
            largest = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(largest).exp2_()
            total = weights.sum(dim=-1, keepdim=True)
            lse[group, rows] = (largest + total.log2()).squeeze(-1) / _LOG2_E
            if dropout is not None:
                for columns in _chunks(N):
                    tile = weights[:, :, columns]
                    tile.mul_(dropout.mask(torch.empty(tile.shape, dtype=work, device=q.device)))
            out[group, rows] = torch.bmm(weights, v[group]) / total
    for result, values in zip(results, (out, lse), strict=True):
        result.copy_(values.unflatten(0, (B, heads)))
    return results


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """For the output [B, heads, N, d], laid out as [B, N, heads, d] in memory, and the log-sum-exp [B, heads, N]."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=_work_dtype(q.dtype))


def _scores(q: Tensor, k_transposed: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """q [G, n, d], k_transposed [G, d, m], bias [n, m] for all G -> [G, n, m]."""
    if bias is None:
        return torch.bmm(q, k_transposed, out=out)
    return torch.baddbmm(bias.expand(len(q), *bias.shape), q, k_transposed, out=out)


@torch.library.impl(_LIBRARY, "tiled_attention_backward", "CompositeExplicitAutograd")
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
    bias = None if heights is None else _Bias(heights, alpha, _work_dtype(q.dtype))
    dropout = _Dropout(drop_rate, seed, q.device) if drop_rate else None
    *of_inputs, of_alpha = _Tiles(grad, q, k, v, out, lse).gradients(bias, dropout)
    return *(t.unflatten(0, q.shape[:2]).to(q.dtype).contiguous() for t in of_inputs), of_alpha


class _Tiles:
    """The score matrix of all heads and samples G, tile by tile, from q, k, v, grad and out [B, heads, N, d].

    lse [B, heads, N]: log-sum-exp of the scores of each query.
    """

    def __init__(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor):
        work, d = _work_dtype(q.dtype), q.shape[-1]
        grad, q, k, v, out, lse = (t.to(work).flatten(0, 1) for t in (grad, q, k, v, out, lse))
        self._chunks, self._groups = _chunks(q.shape[1]), _groups(len(q))
        self._q, self._k, self._grad = self._split(q * (_LOG2_E * d**-0.5)), self._split(k), self._split(grad)
        self._k_transposed, self._v_transposed = (self._split(t.transpose(1, 2), dim=2) for t in (k, v))
        self._lse = self._split(lse.unsqueeze(-1) * _LOG2_E)  # [G, n, 1]
        self._mean = self._split((grad * out).sum(dim=-1, keepdim=True))  # of the gradient of a query's weights

    def _split(self, t: Tensor, dim: int = 1) -> list[Tensor]:
        """Parts for each chunk of queries or keys, contiguous: else torch.baddbmm takes one product after another."""
        return [part.contiguous() for part in t.split(TILE, dim)]

    def _visit(self, bias: _Bias | None) -> Iterator[tuple[int, int, slice, Tensor, Tensor, Tensor | None]]:
        """(chunk of queries, chunk of keys, group, weights, gradient of the weights, slope of the bias) of each tile.

        weights and their gradient [group, n, m] before dropout, in memory that the next tile overwrites; slope [n, m].
        """
        like, largest = self._q[0], len(self._q[0][self._groups[0]]) * TILE**2
        scratch = [like.new_empty(largest) for _ in range(2)]
        for i, queries in enumerate(self._chunks):
            for group in self._groups:
                for j, keys in enumerate(self._chunks):
                    q, k_transposed = self._q[i][group], self._k_transposed[j][group]
                    shape = (len(q), q.shape[1], k_transposed.shape[2])
                    weights, of_weights = (t[: math.prod(shape)].view(shape) for t in scratch)
                    added, slope = (None, None) if bias is None else bias.tile(queries, keys)
                    _scores(q, k_transposed, added, out=weights).sub_(self._lse[i][group]).exp2_()
                    torch.bmm(self._grad[i][group], self._v_transposed[j][group], out=of_weights)
                    yield i, j, group, weights, of_weights, slope

    def gradients(self, bias: _Bias | None, dropout: _Dropout | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of q, k, v [G, N, d] and alpha [1] (0 without a bias)."""
        of_q = [torch.zeros_like(part) for part in self._q]
        of_k, of_v = ([torch.zeros_like(part) for part in self._k_transposed] for _ in range(2))
        of_alpha = _ScalarSum(self._q[0])
        for i, j, group, weights, of_weights, slope in self._visit(bias):
            kept = weights
            if dropout is not None:
                kept = dropout.mask(torch.empty_like(weights))
                of_weights.mul_(kept)
                kept.mul_(weights)
            of_v[j][group].baddbmm_(self._grad[i][group].transpose(1, 2), kept)
            of_scores = of_weights.sub_(self._mean[i][group]).mul_(weights)
            of_alpha.subtract(of_scores, slope)
            of_q[i][group].baddbmm_(of_scores, self._k[j][group])
            of_k[j][group].baddbmm_(self._q[i][group].transpose(1, 2), of_scores)
        d = self._q[0].shape[-1]
        of_q = torch.cat(of_q, dim=1) * d**-0.5
        of_k = torch.cat(of_k, dim=2).transpose(1, 2) / _LOG2_E
        return of_q, of_k, torch.cat(of_v, dim=2).transpose(1, 2), of_alpha.result()

    def gradient_of_alpha(self, bias: _Bias) -> Tensor:
        """[1], for a backward pass that gives the other gradients elsewhere."""
        of_alpha = _ScalarSum(self._q[0])
        for i, _, group, weights, of_weights, slope in self._visit(bias):
            of_alpha.subtract(of_weights.sub_(self._mean[i][group]).mul_(weights), slope)
        return of_alpha.result()


class _ScalarSum:
    """Minus the sum over tiles of scores' gradients times slopes, in float64 over tiles."""

    def __init__(self, like: Tensor):
        self._dtype, self._sum = like.dtype, like.new_zeros(1, dtype=torch.float64)

    def subtract(self, of_scores: Tensor, slope: Tensor | None) -> None:
        """of_scores [G, n, m], slope [n, m] or None."""
        if slope is not None:
            self._sum -= torch.mv(of_scores.flatten(1), slope.flatten()).sum(dtype=torch.float64)

    def result(self) -> Tensor:
        return self._sum.to(self._dtype)


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


@torch.library.register_fake("topoflow::tiled_attention", lib=_LIBRARY)
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor]:
    return _empty_results(q)


@torch.library.register_fake("topoflow::tiled_attention_backward", lib=_LIBRARY)
def _backward_shapes(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *(q.new_empty(t.shape) for t in (q, k, v)), q.new_empty(1, dtype=_work_dtype(q.dtype))


torch.library.register_autograd("topoflow::tiled_attention", _differentiate, setup_context=_remember, lib=_LIBRARY)
