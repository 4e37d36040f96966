"""Variants of the network kept only for weights that were trained with them, each behind an option of its own.

`model.relative_position` and `model.patch_norm` belong to the published program, `model.wind=legacy_regional` to its
predecessor (`topoflow import-lightning` reads the checkpoints of both). A new run needs none of them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from topoflow.errors import ConfigError
from topoflow.model.embedding import PatchEmbedding

NUM_BUCKETS = 32
"""Buckets per axis: half for each sign."""

MAX_DISTANCE = 128
"""Positions along an axis, whatever the grid."""

REGIONAL_IMG_SIZE = (128, 256)
REGIONAL_GRID_SIZE = (64, 128)
"""Cells and patches (rows, columns) of the only grid that the regional wind scan is defined on."""


class NormedPatchEmbedding(PatchEmbedding):
    """`PatchEmbedding` with a LayerNorm over each variable's token, before the variable embedding is added.

    A token is then no longer linear in its cells, so the tokens of all variables are formed.
    """

    def __init__(self, num_variables: int, patch_size: int, embed_dim: int):
        super().__init__(num_variables, patch_size, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def tokens(self, patches: Tensor, var_embed: Tensor) -> Tensor:
        """Map patches with a 1 appended [B, N, V, p*p + 1] and var_embed [1, V, D] to tokens [B, N, V, D]."""
        matrices = self(torch.zeros_like(var_embed))  # [V, p*p + 1, D]
        return self.norm(torch.einsum("bnvk,vkd->bnvd", patches, matrices)) + var_embed


def axis_buckets(size: int) -> Tensor:
    """Return the bucket of the offset between any two of `size` positions on an axis: int64 [size, size], query first.

    Positions are spread over MAX_DISTANCE and truncated to integers; d = query - key. The bucket is 16 if d > 0, plus,
    with n = |d|: n below 8, else min(15, 8 + floor(log(n / 8) / log(16) * 8)) (T5's rule, arXiv 1910.10683).
    """
    position = torch.arange(size) * MAX_DISTANCE // size
    offset = position.unsqueeze(1) - position.unsqueeze(0)
    distance = offset.abs()
    # floor(log(n / 8) / log(16) * 8) = floor(log2(n * n / 64)), in integers
    far = 8 + torch.bucketize(distance.square(), 64 << torch.arange(1, 8), right=True)
    return NUM_BUCKETS // 2 * (offset > 0) + torch.where(distance < 8, distance, far)


class RelativePositionBias(nn.Module):
    """A learned addition to the scores of each head by the offset of query and key, grid_size (rows, columns)."""

    row_buckets: Tensor
    column_buckets: Tensor

    def __init__(self, num_heads: int, grid_size: tuple[int, int]):
        super().__init__()
        self.bias_table = nn.Parameter(torch.empty(NUM_BUCKETS**2, num_heads))
        self.register_buffer("row_buckets", axis_buckets(grid_size[0]), persistent=False)
        self.register_buffer("column_buckets", axis_buckets(grid_size[1]), persistent=False)

    def forward(self) -> Tensor:
        """Return the bias [heads, N, N]: rows are queries, N in raster order."""
        across = NUM_BUCKETS * self.column_buckets[None, :, None, :]  # [1, columns, 1, columns]
        entries = across + self.row_buckets[:, None, :, None]  # [rows, columns, rows, columns]
        N = entries.shape[0] * entries.shape[1]
        return F.embedding(entries.reshape(N, N), self.bias_table).permute(2, 0, 1)


def require_regional_grid(img_size: tuple[int, int], patch_size: int) -> None:
    """Raise ConfigError unless the regional wind scan is defined for fields and patches of these sizes."""
    patches = tuple(cells // patch_size for cells in img_size)
    if img_size != REGIONAL_IMG_SIZE or patches != REGIONAL_GRID_SIZE:
        raise ConfigError(
            f"model.wind: legacy_regional on {img_size[0]} x {img_size[1]} cells with model.patch_size {patch_size}: "
            "expected 128 x 256 cells and patch_size 2, the only grid that it is defined on"
        )


def regional_wind_order(wind_ms: Tensor) -> Tensor:
    """Return the token index at each place of the predecessor's wind scan: wind_ms [B, 2, 128, 256] -> [B, 8192].

    Region k holds the tokens 8k to 8k + 7 of the raster, which are 8 tokens of one row; its wind is that of block k in
    another division of the field, 32 x 32 blocks of 4 x 8 cells, and its tokens are sorted as if they were 2 rows of 4
    in the corner of the grid. Positions, terrain and output stay in raster order. Those weights were trained
    with all of this.
    """
    B, device = wind_ms.shape[0], wind_ms.device
    wind = wind_ms.double()
    speed = wind.square().sum(dim=1, keepdim=True).sqrt()  # [B, 1, 128, 256]
    blocks = (wind * speed).reshape(B, 2, 32, 4, 32, 8).sum(dim=(3, 5)).flatten(2)  # [B, 2, 1024]
    # dividing by the sum of speeds would not turn the vector; the angle of (0, 0), a calm block, is 0
    u, v = blocks.unsqueeze(-1).unbind(1)
    angle = torch.atan2(v, u)  # [B, 1024, 1]
    token = torch.arange(8, device=device)
    across = 2 * (token % 4).double() / (REGIONAL_GRID_SIZE[1] - 1) - 1
    down = 2 * (token // 4).double() / (REGIONAL_GRID_SIZE[0] - 1) - 1
    along = across * angle.cos() - down * angle.sin()  # [B, 1024, 8]
    order = along.argsort(dim=-1, stable=True)
    return (order + 8 * torch.arange(1024, device=device).unsqueeze(-1)).flatten(1)


def scan_regionally(tokens: Tensor, wind_ms: Tensor) -> Tensor:
    """Reorder tokens [B, 8192, D] from raster order to that of `regional_wind_order`."""
    order = regional_wind_order(wind_ms)
    return tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))
