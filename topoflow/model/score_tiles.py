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
        # then there is nothing to clamp; asked on CPU alone, since a GPU's answer would be waited for
        self._is_within = heights.device.type == "cpu" and bool(heights.max() - heights.min() <= self._highest_climb)

    def tile(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """(bias times log2 e, derivative of the bias by -alpha), both [queries, keys]."""
        climbs = climb(self._heights[queries], self._heights[keys])
        if self._is_within:
            bias, slope = climbs * (-LOG2_E * self._alpha), climbs
        else:
            bias = damping(climbs, self._alpha).mul_(LOG2_E)
            slope = climbs.mul_(torch.le(climbs, self._highest_climb, out=torch.empty_like(climbs)))
        return bias.to(self._dtype), slope.to(self._dtype)

    def rows(self, queries: slice) -> Tensor:
        """The bias of queries towards all keys, [queries, N]."""
        heights = self._heights[queries]
        rows = self._heights.new_empty(len(heights), len(self._heights))
        for some, part in zip(heights.split(ROWS_IN_CACHE), rows.split(ROWS_IN_CACHE), strict=True):
            climbs = climb(some, self._heights, out=part)
            if self._is_within:
                climbs.mul_(-self._alpha)
            else:
                damping(climbs, self._alpha, out=part)
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

    lse [B, heads, N]: log-sum-exp of the scores of each query. Scores and the gradient of their weights are made alike,
    by q and k, by grad and v: the two stand one upon the other, [2 g, ...] for a group of g.
    """

    def __init__(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor):
        work, self._scale = work_dtype(q.dtype), q.shape[-1] ** -0.5
        grad, q, k, v, out, lse = (t.to(work).flatten(0, 1) for t in (grad, q, k, v, out, lse))
        self._chunks, self._groups = chunks(q.shape[1]), groups(len(q))
        mean = (grad * out).sum(dim=-1, keepdim=True)  # of the gradient of a query's weights
        # by chunk and group, contiguous: else torch.baddbmm takes one product after another
        self._queries = self._stack(q * (LOG2_E * self._scale), grad)  # [2 g, n, d]
        self._offsets = self._stack(lse.unsqueeze(-1) * LOG2_E, mean)  # [2 g, n, 1]
        self._keys = self._stack(k, v, transposed=True)  # [2 g, d, m]
        self._k = self._stack(k)  # [g, m, d]

    def _stack(self, *tensors: Tensor, transposed: bool = False) -> list[list[Tensor]]:
        """For each chunk of rows and group, the parts of tensors [G, N, ...] one upon the other."""

        def part(t: Tensor, rows: slice, group: slice) -> Tensor:
            return t[group, rows].transpose(1, 2) if transposed else t[group, rows]

        return [[torch.cat([part(t, rows, group) for t in tensors]) for group in self._groups] for rows in self._chunks]

    def _visit(self, bias: Bias | None) -> Iterator[tuple[int, int, int, Tensor, Tensor | None]]:
        """(chunk of queries, chunk of keys, group, tile [2 g, n, m], slope of the bias [n, m]) of each tile.

        A tile has scores times log2 e upon the gradient of the weights before dropout: what `_offsets` have is still to
        be taken from both. Its memory is that of the next.
        """
        first = self._queries[0][0]
        memory = first.new_empty(len(first) * first.shape[1] ** 2)
        for i, queries in enumerate(self._chunks):
            biases: dict[int, tuple[Tensor, Tensor]] = {}  # made for the first group
            for g, left in enumerate(self._queries[i]):
                half = len(left) // 2
                for j, keys in enumerate(self._chunks):
                    right = self._keys[j][g]
                    shape = (len(left), left.shape[1], right.shape[2])
                    tile, slope = memory[: math.prod(shape)].view(shape), None
                    if bias is None:
                        torch.bmm(left, right, out=tile)
                    else:
                        if j not in biases:
                            biases[j] = bias.tile(queries, keys)
                        added, slope = biases[j]
                        biased_scores(left[:half], right[:half], added, out=tile[:half])
                        torch.bmm(left[half:], right[half:], out=tile[half:])
                    yield i, j, g, tile, slope

    def gradients(self, bias: Bias | None, dropout: Dropout | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of q, k, v [G, N, d] and alpha [1] (0 without a bias)."""
        of_q = [[torch.zeros_like(part) for part in parts] for parts in self._k]
        of_kv = [[torch.zeros_like(part) for part in parts] for parts in self._keys]
        of_alpha = _ScalarSum(self._k[0][0])
        for i, j, g, tile, slope in self._visit(bias):
            half = len(tile) // 2
            scores, of_weights = tile[:half], tile[half:]
            if dropout is None:
                tile.sub_(self._offsets[i][g])
                of_scores = of_weights.mul_(scores.exp2_())
            else:
                weights, mask = scores.sub_(self._offsets[i][g][:half]).exp2_(), dropout.mask(torch.empty_like(scores))
                of_scores = of_weights.mul_(mask).sub_(self._offsets[i][g][half:]).mul_(weights)
                weights.mul_(mask)
            of_alpha.subtract(of_scores, slope)
            q, grad = self._queries[i][g][:half], self._queries[i][g][half:]
            of_q[i][g].baddbmm_(of_scores, self._k[j][g])
            of_kv[j][g][:half].baddbmm_(q.transpose(1, 2), of_scores)
            of_kv[j][g][half:].baddbmm_(grad.transpose(1, 2), scores)
        of_q = torch.cat([torch.cat(parts) for parts in of_q], dim=1)
        of_k, of_v = (
            torch.cat([torch.cat([part.chunk(2)[n] for part in parts]) for parts in of_kv], dim=2).transpose(1, 2)
            for n in (0, 1)
        )
        return of_q * self._scale, of_k / LOG2_E, of_v, of_alpha.result()

    def gradient_of_alpha(self, bias: Bias) -> Tensor:
        """[1], for a backward pass that gives the other gradients elsewhere."""
        of_alpha = _ScalarSum(self._k[0][0])
        for i, _, g, tile, slope in self._visit(bias):
            scores, of_weights = tile.sub_(self._offsets[i][g]).chunk(2)
            of_alpha.subtract(of_weights.mul_(scores.exp2_()), slope)
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
