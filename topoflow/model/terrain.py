"""Attention damped across terrain (arXiv 2602.16821): a token attends less to tokens that are higher than itself."""

import torch
from torch import Tensor, nn

from topoflow.model.attention import Attention
from topoflow.model.bias import TerrainBias

H_SCALE_M = 1000.0
"""Height gain, in metres, at which the damping is elevation_alpha."""


def patch_heights(elevation_m: Tensor, patch_size: int) -> Tensor:
    """Return the mean height in metres of each patch: elevation_m [H, W] -> [N] in raster order.

    Cells below sea level count as 0 in the mean: air is above the sea's surface, however deep the sea.
    """
    H, W = elevation_m.shape
    cells = elevation_m.clamp(min=0.0).reshape(H // patch_size, patch_size, W // patch_size, patch_size)
    return cells.mean(dim=(1, 3)).flatten()


class TerrainAttention(Attention):
    """Self-attention with a `TerrainBias` of learned strength elevation_alpha; other arguments as for `Attention`."""

    H_scale: Tensor

    def __init__(self, embed_dim: int, num_heads: int, drop_rate: float, alpha_init: float, **options):
        super().__init__(embed_dim, num_heads, drop_rate, **options)
        self.elevation_alpha = nn.Parameter(torch.full((1,), alpha_init))
        self.register_buffer("H_scale", torch.tensor(H_SCALE_M))

    def forward(self, x: Tensor, heights_m: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  (makes the bias)
        """Attend: x [B, N, D], heights_m [N] -> [B, N, D]."""
        return super().forward(x, TerrainBias(heights_m / self.H_scale, self.elevation_alpha))
