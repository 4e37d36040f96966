"""Attention damped across terrain (arXiv 2602.16821): a token attends less to tokens that stand higher than itself."""

import torch
from torch import Tensor, nn

from topoflow.model.attention import Attention, attend_with_bias
from topoflow.model.damping import climb, damping
from topoflow.model.flex_attention import compiled_kernel, flex_attention
from topoflow.model.tiled_attention import tiled_attention

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


class TerrainAttention(Attention):
    """Self-attention damped by `topoflow.model.damping`, with the learned strength elevation_alpha.

    Through FlexAttention on GPUs, where nothing drops out and unless `flex` is False; else through `tiled_attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        drop_rate: float,
        alpha_init: float,
        rel_pos_bias: nn.Module | None = None,
        flex: bool = True,
    ):
        super().__init__(embed_dim, num_heads, drop_rate, rel_pos_bias)
        self.flex = flex
        self.elevation_alpha = nn.Parameter(torch.full((1,), alpha_init))
        self.register_buffer("H_scale", torch.tensor(H_SCALE_M))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, drop_rate: float, heights_m: Tensor) -> Tensor:
        """heights_m [N]; else as `Attention._attend`."""
        heights, alpha = heights_m / self.H_scale, self.elevation_alpha
        if self.rel_pos_bias is not None:
            bias = self.rel_pos_bias() + damping(climb(heights, heights), alpha)
            return attend_with_bias(q, k, v, drop_rate, bias)
        if q.device.type == "cpu" or drop_rate or not self.flex:
            return tiled_attention(q, k, v, heights, alpha, drop_rate)
        return flex_attention(q, k, v, heights, alpha, compiled_kernel())
