"""Attention damped across terrain (arXiv 2602.16821): a token attends less to tokens that stand higher than itself."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from topoflow.model.attention import Attention

H_SCALE_M = 1000.0
"""Height difference, in metres, at which the damping is elevation_alpha."""


def patch_heights(elevation_m: Tensor, patch_size: int) -> Tensor:
    """Mean height in metres of each patch: elevation_m [H, W] -> [N] in raster order.

    A cell below sea level counts as 0 before the mean is taken: air stands on the sea's surface, however deep the sea
    beside a coast.
    """
    H, W = elevation_m.shape
    cells = elevation_m.clamp(min=0.0).reshape(H // patch_size, patch_size, W // patch_size, patch_size)
    return cells.mean(dim=(1, 3)).flatten()


def terrain_bias(heights_m: Tensor, alpha: Tensor, h_scale_m: Tensor) -> Tensor:
    """What terrain adds to the score of query i and key j: -alpha * relu((z_j - z_i) / h_scale), clamped to [-10, 0].

    heights_m [N], alpha [1], h_scale_m scalar -> [N, N], rows are queries.
    """
    climb = F.relu((heights_m.unsqueeze(0) - heights_m.unsqueeze(1)) / h_scale_m)
    return (-alpha * climb).clamp(-10.0, 0.0)


class TerrainAttention(Attention):
    """Self-attention with the terrain bias, of learned strength elevation_alpha."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        drop_rate: float,
        alpha_init: float,
        rel_pos_bias: nn.Module | None = None,
    ):
        super().__init__(embed_dim, num_heads, drop_rate, rel_pos_bias)
        self.elevation_alpha = nn.Parameter(torch.full((1,), alpha_init))
        self.register_buffer("H_scale", torch.tensor(H_SCALE_M))

    def forward(self, x: Tensor, heights_m: Tensor) -> Tensor:
        """x [B, N, D], heights_m [N] -> [B, N, D]."""
        return super().forward(x, terrain_bias(heights_m, self.elevation_alpha, self.H_scale))
