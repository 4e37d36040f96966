"""What terrain takes from the score of a query that looks up at a key (arXiv 2602.16821)."""

import torch
from torch import Tensor

LARGEST_DAMPING = 10.0


def climb(heights: Tensor, other: Tensor, out: Tensor | None = None) -> Tensor:
    """How much higher each of `other` [M] stands than each of `heights` [N], at least 0: [N, M]."""
    return torch.clamp(torch.sub(other.unsqueeze(0), heights.unsqueeze(1), out=out), min=0.0, out=out)


def damping(climbs: Tensor, alpha: Tensor, out: Tensor | None = None) -> Tensor:
    """-alpha x climb, clamped to [-10, 0]: climbs of any shape in units of the height scale, alpha [1]."""
    return torch.clamp(torch.mul(climbs, -alpha, out=out), -LARGEST_DAMPING, 0.0, out=out)
