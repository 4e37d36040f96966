"""From fields to tokens: patches, their embedding by variable, aggregation over variables, and positions.

A variable's token is linear in the cells of its patch, and the query that aggregates the variables is the same
everywhere. So neither the tokens of single variables nor their keys and values are ever formed: scores are computed
directly from the patches, and the value projection follows the weighted sum. The function is that of ClimaX's patch
embedding and `nn.MultiheadAttention` (arXiv 2301.10343, section 3.1), without their [batch, variables, tokens, width]
tensors.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def split_patches(x: Tensor, patch_size: int) -> Tensor:
    """Cut fields [B, V, H, W] into patches [B, N, V, p*p]: N in raster order, the cells of a patch in raster order."""
    B, V, H, W = x.shape
    p = patch_size
    x = x.reshape(B, V, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // p) * (W // p), V, p * p)


def unpatchify(x: Tensor, grid_size: tuple[int, int], patch_size: int) -> Tensor:
    """Lay tokens [B, N, p*p*T] out as fields [B, T, H, W].

    `grid_size` is (rows, columns) of patches. Features are ordered (row in the patch, column in the patch, variable),
    as in ClimaX.
    """
    B, h, w, p = x.shape[0], *grid_size, patch_size
    x = x.reshape(B, h, w, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * p, w * p)


class PatchEmbedding(nn.Module):
    """One linear embedding of patches for each variable, named as in ClimaX's `ParallelVarPatchEmbed`."""

    def __init__(self, num_variables: int, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj_weights = nn.Parameter(torch.empty(num_variables, embed_dim, 1, patch_size, patch_size))
        self.proj_biases = nn.Parameter(torch.empty(num_variables, embed_dim))

    def forward(self, var_embed: Tensor) -> Tensor:
        """Return the embedding as one matrix per variable, with var_embed [1, V, D] added.

        They are [V, p*p + 1, D]: a patch of variable v with a 1 appended, times matrix v, is that variable's token.
        """
        weights = self.proj_weights.flatten(2).transpose(1, 2)  # [V, p*p, D]
        offsets = self.proj_biases + var_embed[0]  # [V, D]
        return torch.cat([weights, offsets.unsqueeze(1)], dim=1)


class VariableAggregation(nn.Module):
    """Multi-head cross-attention of one query over the variables of each token.

    Parameters are named and shaped as those of `nn.MultiheadAttention(embed_dim, num_heads)`.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, query: Tensor, inputs: Tensor, matrices: Tensor | None) -> Tensor:
        """Attend from query [1, 1, D] to the tokens inputs[:, :, v] @ matrices[v] of the variables v.

        inputs [B, N, V, K], matrices [V, K, D] -> [B, N, D]. Without matrices (identities, K = D) the inputs are the
        variables' tokens themselves.
        """
        B, N, V, K = inputs.shape
        D, heads = query.shape[-1], self.num_heads
        inputs = inputs.reshape(B * N, V, K)
        w_query, w_key, w_value = self.in_proj_weight.chunk(3)
        # the key's bias is not needed: it shifts all scores equally, which softmax ignores
        b_query, _, b_value = self.in_proj_bias.chunk(3)

        q = F.linear(query.flatten(), w_query, b_query).view(heads, 1, -1) * (D // heads) ** -0.5
        key = torch.bmm(q, w_key.view(heads, -1, D)).squeeze(1)  # [heads, D]
        if matrices is None:
            attention = torch.einsum("mvd,hd->hmv", inputs, key).softmax(dim=-1)
            mixed = torch.einsum("hmv,mvd->hmd", attention, inputs)
            values = w_value.view(heads, -1, D).transpose(1, 2)  # [heads, D, D/heads]
        else:
            attention = torch.einsum("mvk,vkh->hmv", inputs, matrices @ key.T).softmax(dim=-1)
            mixed = (attention.unsqueeze(-1) * inputs).flatten(2)  # [heads, B*N, V*K]
            values = torch.einsum("vkd,hed->hvke", matrices, w_value.view(heads, -1, D))
            values = values.flatten(1, 2)  # [heads, V*K, D/heads]
        x = torch.bmm(mixed, values).transpose(0, 1).reshape(B, N, D) + b_value
        return self.out_proj(x)


def sincos_1d(embed_dim: int, positions: Tensor) -> Tensor:
    """Return sine and cosine features of positions [M]: [M, embed_dim] float64, sines first (as in MAE)."""
    frequencies = 10000.0 ** (-torch.arange(embed_dim // 2, dtype=torch.float64) / (embed_dim / 2))
    angles = torch.outer(positions.double(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(embed_dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Return features of the (rows, columns) of a grid in raster order: [rows*columns, embed_dim] float64.

    The first half encodes the column, the second the row, as in MAE and ClimaX.
    """
    rows, columns = torch.meshgrid(torch.arange(grid_size[0]), torch.arange(grid_size[1]), indexing="ij")
    halves = [sincos_1d(embed_dim // 2, axis.flatten()) for axis in (columns, rows)]
    return torch.cat(halves, dim=1)
