"""Attention biases: what is added to the scores before the softmax, and its derivative by learned strengths.

A bias is an object with element-wise functions of a place in the score matrix: (sample, head, query, key), index
tensors that broadcast against each other. FlexAttention calls them with one place at a time, other kernels with the
places of a chunk of queries. A bias per head or per sample indexes its own tensors with `head` or `sample`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LARGEST_DAMPING = 10.0
"""Bound of the terrain bias (arXiv 2602.16821)."""


class ScoreBias(Protocol):
    """A bias of attention scores that decreases with each of its strengths.

    A bias that increases with a parameter takes minus that parameter as its strength; one that does both takes two
    strengths.
    """

    @property
    def strengths(self) -> tuple[Tensor, ...]:
        """Return the tensors that get a gradient, each of a shape that broadcasts to [B, heads, N queries]."""
        ...

    def detached(self) -> "ScoreBias":
        """Return the same bias with its strengths detached."""
        ...

    def added(self, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return the bias at these places."""
        ...

    def slopes(self, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """Return, for each strength, minus the derivative of `added` by it, at least 0."""
        ...


@dataclass(frozen=True)
class TerrainBias:
    """Damping of attention to tokens that are higher than the query: -strength x height gain, clamped to [-10, 0].

    heights [N] in units of the height scale; strength [1]. The gradient is 0 where the clamp is active: where strength
    x gain exceeds 10, and everywhere for a negative strength.
    """

    heights: Tensor
    strength: Tensor

    @property
    def strengths(self) -> tuple[Tensor, ...]:
        """Return the one strength."""
        return (self.strength,)

    def detached(self) -> "TerrainBias":
        """Return the same bias with its strength detached."""
        return TerrainBias(self.heights, self.strength.detach())

    def added(self, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return the damping, at most 0."""
        return torch.clamp(-self.strength[0] * self._height_gain(query, key), -LARGEST_DAMPING, 0.0)

    def slopes(self, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """Return the height gain, 0 where the damping is clamped."""
        gain = self._height_gain(query, key)
        damping = self.strength[0] * gain
        return (torch.where((damping >= 0) & (damping <= LARGEST_DAMPING), gain, 0.0),)

    def _height_gain(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.relu(self.heights[key] - self.heights[query])
