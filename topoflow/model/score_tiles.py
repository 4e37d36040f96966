"""The score matrix of attention, tile by tile: its bias, the masks of dropout, and the way back through it.

The way back makes the weights of a tile again from the log-sum-exps of the way forward (FlashAttention-2, arXiv
2307.08691, algorithm 2), all heads and samples at once, and takes the sum for the strength of the damping on the way.
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

ROWS_IN_CACHE = 32
"""Rows of a bias that are made at once."""

LOG2_E = math.log2(math.e)


class Bias:
    """The damping of tiles of the score matrix: heights [N], alpha [1]; results are of `dtype`."""

    def __init__(self, heights: Tensor, alpha: Tensor, dtype: torch.dtype):
        self._heights, self._alpha, self._dtype = heights, alpha, dtype
        # where torch.clamp has a gradient: up to its bound, and nowhere if alpha is below 0
        bound = torch.where(alpha > 0, LARGEST_DAMPING / alpha, math.inf)
        self._highest_climb = torch.where(alpha < 0, -1.0, bound)

    def tile(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """(bias times log2 e, derivative of the bias by -alpha), both [queries, keys]."""
        climbs = climb(self._heights[queries], self._heights[keys])
        bias = damping(climbs, self._alpha).mul_(LOG2_E)
        slope = climbs.mul_(torch.le(climbs, self._highest_climb, out=torch.empty_like(climbs)))
        return bias.to(self._dtype), slope.to(self._dtype)

    def rows(self, queries: slice) -> Tensor:
        """The bias of queries towards all keys, [queries, N]."""
        heights = self._heights[queries]
        rows = self._heights.new_empty(len(heights), len(self._heights))
        for some, part in zip(heights.split(ROWS_IN_CACHE), rows.split(ROWS_IN_CACHE), strict=True):
            damping(climb(some, self._heights, out=part), self._alpha, out=part)
        return rows.to(self._dtype)


class Dropout:
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


def chunks(length: int) -> list[slice]:
    """Parts of `length` queries or keys, TILE each but the last."""
    return [slice(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def groups(number: int) -> list[slice]:
    """Heads and samples that are worked on at once."""
    size = max(1, TILE_ELEMENTS // TILE**2)
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores of inputs of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def biased_scores(q: Tensor, k_transposed: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """q [G, n, d], k_transposed [G, d, m], bias [n, m] for all G -> [G, n, m]."""
    if bias is None:
        return torch.bmm(q, k_transposed, out=out)
    return torch.baddbmm(bias.expand(len(q), *bias.shape), q, k_transposed, out=out)


class ScoreTiles:
    """The score matrix of all heads and samples G, tile by tile, from q, k, v, grad and out [B, heads, N, d].

    lse [B, heads, N]: log-sum-exp of the scores of each query.
    """

    def __init__(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor):
        work, d = work_dtype(q.dtype), q.shape[-1]
        grad, q, k, v, out, lse = (t.to(work).flatten(0, 1) for t in (grad, q, k, v, out, lse))
        self._chunks, self._groups = chunks(q.shape[1]), groups(len(q))
        self._q, self._k, self._grad = self._split(q * (LOG2_E * d**-0.5)), self._split(k), self._split(grad)
        self._k_transposed, self._v_transposed = (self._split(t.transpose(1, 2), dim=2) for t in (k, v))
        self._lse = self._split(lse.unsqueeze(-1) * LOG2_E)  # [G, n, 1]
        self._mean = self._split((grad * out).sum(dim=-1, keepdim=True))  # of the gradient of a query's weights

    def _split(self, t: Tensor, dim: int = 1) -> list[Tensor]:
        """Parts for each chunk of queries or keys, contiguous: else torch.baddbmm takes one product after another."""
        return [part.contiguous() for part in t.split(TILE, dim)]

    def _visit(self, bias: Bias | None) -> Iterator[tuple[int, int, slice, Tensor, Tensor, Tensor | None]]:
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
                    biased_scores(q, k_transposed, added, out=weights).sub_(self._lse[i][group]).exp2_()
                    torch.bmm(self._grad[i][group], self._v_transposed[j][group], out=of_weights)
                    yield i, j, group, weights, of_weights, slope

    def gradients(self, bias: Bias | None, dropout: Dropout | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        of_k = torch.cat(of_k, dim=2).transpose(1, 2) / LOG2_E
        return of_q, of_k, torch.cat(of_v, dim=2).transpose(1, 2), of_alpha.result()

    def gradient_of_alpha(self, bias: Bias) -> Tensor:
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
