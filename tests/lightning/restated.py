"""The networks of the two programs, restated from the issue in plain torch: slow, and without a line of ours."""

import math

import torch
from torch import nn
from torch.nn import functional as F

VARIABLES = (
    "u", "v", "temp", "rh", "psfc", "pm10", "so2", "no2", "co", "o3", "lat2d", "lon2d", "pm25", "elevation",
    "population",
)  # fmt: skip
TARGETS = ("pm25", "pm10", "so2", "no2", "co", "o3")


def bucket(d):
    """Bucket of an offset d = query - key along one axis."""
    n, sign = abs(d), 16 if d > 0 else 0
    if n < 8:
        return sign + n
    # log(64/8)/log(16) is 3/4, which floats may miss
    return sign + min(15, 8 + math.floor(math.log(n / 8) / math.log(16) * 8 + 1e-9))


def table_rows(rows, columns):
    """[N, N]: the row of the table for each query and key, on a grid of patches."""
    place = [(int(c / columns * 128), int(r / rows * 128)) for r in range(rows) for c in range(columns)]
    pairs = [[32 * bucket(qx - kx) + bucket(qy - ky) for kx, ky in place] for qx, qy in place]
    return torch.tensor(pairs)


class RelativePosition(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.bias_table = nn.Parameter(torch.randn(1024, heads))


class PlainAttention(nn.Module):
    """Attention with the published terrain and position terms where there are any."""

    def __init__(self, width, heads, alpha, alpha_name, rows):
        super().__init__()
        self.heads, self.alpha_name = heads, alpha_name
        if alpha is not None:
            self.register_parameter(alpha_name, nn.Parameter(torch.tensor([alpha])))
        if alpha_name == "elevation_alpha" and alpha is not None:
            self.register_buffer("H_scale", torch.tensor(1000.0))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if rows is not None:
            self.rel_pos_bias = RelativePosition(heads)
        self.rows = rows

    def forward(self, x, climb):
        """climb [N, N]: how much higher the key stands than the query, in units of the height scale, at least 0."""
        B, N, D = x.shape
        q, k, v = (part.reshape(B, N, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(2, 3) / math.sqrt(D // self.heads)
        if self.rows is not None:
            scores = scores + self.rel_pos_bias.bias_table[self.rows].permute(2, 0, 1)
        if climb is not None:
            scores = scores + torch.clamp(-getattr(self, self.alpha_name) * climb, -10, 0)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, D))


class PlainMlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class PlainBlock(nn.Module):
    def __init__(self, width, *attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = PlainAttention(width, *attention)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = PlainMlp(width)

    def forward(self, x, climb=None):
        x = x + self.attn(self.norm1(x), climb)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class PatchEmbedding(nn.Module):
    def __init__(self, variables, patch, width, with_norm):
        super().__init__()
        self.proj_weights = nn.Parameter(torch.randn(variables, width, 1, patch, patch))
        self.proj_biases = nn.Parameter(torch.randn(variables, width))
        if with_norm:
            self.norm = nn.LayerNorm(width)


class Network(nn.Module):
    """Either program's network, its parameters registered in the order of the original.

    published: patch_embed with a norm, alpha over normalized heights, relative position. Otherwise the predecessor:
    token_embeds, elevation_alpha over metres.
    """

    def __init__(
        self, published, img_size, patch=2, width=16, depth=2, decoder_depth=1, heads=2, terrain=True,
        variables=VARIABLES, single_head=False,
    ):  # fmt: skip
        super().__init__()
        self.published, self.terrain, self.patch = published, terrain, patch
        self.rows, self.columns = img_size[0] // patch, img_size[1] // patch
        V, self.variables = len(variables), tuple(variables)
        self.var_embed = nn.Parameter(torch.randn(1, V, width))
        self.var_query = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, self.rows * self.columns, width))
        embedding = PatchEmbedding(V, patch, width, with_norm=published)
        setattr(self, "patch_embed" if published else "token_embeds", embedding)
        self.var_agg = nn.MultiheadAttention(width, heads, batch_first=True)
        self.lead_time_embed = nn.Linear(1, width)
        alpha, name = (800.0, "alpha") if published else (0.5, "elevation_alpha")
        rows = table_rows(self.rows, self.columns) if published and terrain else None
        first = (heads, alpha if terrain else None, name, rows)
        self.blocks = nn.ModuleList(
            PlainBlock(width, *(first if index == 0 else (heads, None, name, None))) for index in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        hidden = [layer for _ in range(decoder_depth) for layer in (nn.Linear(width, width), nn.GELU())]
        last = nn.Linear(width, V * patch**2)
        self.head = last if single_head else nn.Sequential(*hidden, last)

    def climb(self, x, elevation_m):
        """[N, N] from the input channel `elevation` (published) or from metres (predecessor)."""
        if not self.terrain:
            return None
        field = x[0, self.variables.index("elevation")] / 1000 if self.published else elevation_m / 1000
        heights = F.avg_pool2d(field[None, None], self.patch).flatten()
        return F.relu(heights[None, :] - heights[:, None])

    def forward(self, x, lead_hours, elevation_m=None, order=None):
        """x [B, V, H, W], lead_hours [B], order [B, N] of the wind scan -> all variables [B, V, H, W]."""
        embedding = self.patch_embed if self.published else self.token_embeds
        tokens = []
        for index in range(len(self.variables)):
            field, weight = x[:, index : index + 1], embedding.proj_weights[index]
            token = F.conv2d(field, weight, embedding.proj_biases[index], stride=self.patch).flatten(2).transpose(1, 2)
            token = embedding.norm(token) if self.published else token
            tokens.append(token + self.var_embed[0, index])
        tokens = torch.stack(tokens, dim=2)  # [B, N, V, D]
        B, N, V, D = tokens.shape
        tokens = tokens.reshape(B * N, V, D)
        x_ = self.var_agg(self.var_query.expand(B * N, 1, D), tokens, tokens)[0].reshape(B, N, D)
        if order is not None:
            x_ = torch.stack([sample[places] for sample, places in zip(x_, order, strict=True)])
        x_ = x_ + self.pos_embed + self.lead_time_embed(lead_hours[:, None])[:, None]
        for index, block in enumerate(self.blocks):
            x_ = block(x_, self.climb(x, elevation_m) if index == 0 else None)
        out = self.head(self.norm(x_)).reshape(B, self.rows, self.columns, self.patch, self.patch, V)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(B, V, self.rows * self.patch, self.columns * self.patch)
