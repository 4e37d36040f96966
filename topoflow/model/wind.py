"""What tokens know of the sample's mean wind: the wind itself, or their position along it.

arXiv 2602.16821 sorts the tokens along the wind instead. Here nothing is permuted: position, terrain and output stay in
raster order.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CALM_M_S = 1e-6
"""Speed of the mean wind, in m/s, below which its direction is ignored."""

SPEED_SCALE_M_S = 10.0
"""The network gets winds over this speed, so that they are of order 1."""

NUM_FEATURES = 8
HIDDEN_DIM = 64


def mean_wind(wind_ms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean wind of each sample, its speed and its direction: (u, v) [B, 2] in m/s, [B, 1], [B, 2], float64.

    wind_ms [B, 2, H, W] is (u, v) in m/s. The direction is (u, v) over the speed of the mean, (0, 0) in a calm field.
    """
    # float64 sums of float32 fields are exact in practice, so the order of the cells does not matter
    mean = wind_ms.double().mean(dim=(2, 3))
    speed = torch.hypot(*mean.unbind(1)).unsqueeze(1)
    calm = speed < CALM_M_S
    return mean, speed, (mean / speed.masked_fill(calm, 1.0)).masked_fill(calm, 0.0)


def rank_along_wind(wind_ms: Tensor, x_km: Tensor, y_km: Tensor) -> Tensor:
    """Return the rank of each patch along its sample's mean wind, scaled to [0, 1], 0 the most upwind.

    wind_ms [B, 2, H, W] is (u, v) in m/s; x_km (east) and y_km (north) [N] are the patch centres, float64. The result
    is [B, N] float64. Patches at the same distance along the wind share the mean of their ranks; a calm field, and a
    grid of one patch, give 0.5. Distances that differ by less than 1e-12 of the grid's extent are the same: that much
    is rounding, and would otherwise split ties. Reversing the wind negates distances exactly, so it turns r into 1 - r.
    """
    N = x_km.numel()
    _, _, direction = mean_wind(wind_ms)
    east, north = direction.unsqueeze(-1).unbind(1)  # each [B, 1]
    extent = torch.maximum(x_km.abs().max(), y_km.abs().max()).clamp(min=1.0)
    distance = (x_km * east + y_km * north) / (extent * 1e-12)
    distance = distance.round()
    order = distance.sort(dim=1).values
    before = torch.searchsorted(order, distance)
    not_after = torch.searchsorted(order, distance, right=True)
    rank = (before + not_after - 1).double() / (2 * max(N - 1, 1))
    return rank if N > 1 else torch.full_like(distance, 0.5)


class WindMean(nn.Module):
    """Embedding of the sample's mean wind, the same for all tokens: a small MLP, whose last layer starts at zero.

    Its features are (u, v, speed) of the mean over SPEED_SCALE_M_S, and its direction.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(5, HIDDEN_DIM)
        self.fc2 = nn.Linear(HIDDEN_DIM, embed_dim)

    def forward(self, wind_ms: Tensor) -> Tensor:
        """Return the embedding [B, 1, D] of wind_ms [B, 2, H, W], (u, v) in m/s."""
        mean, speed, direction = mean_wind(wind_ms)
        features = torch.cat([mean / SPEED_SCALE_M_S, direction, speed / SPEED_SCALE_M_S], dim=1).float()  # [B, 5]
        return self.fc2(F.gelu(self.fc1(features))).unsqueeze(1)


class WindRank(nn.Module):
    """Embedding of the rank along the wind: a small MLP of its cosines, whose last layer starts at zero.

    patch_x_km, patch_y_km [N]: patch centres in raster order, east and north.
    """

    x_km: Tensor
    y_km: Tensor
    frequencies: Tensor

    def __init__(self, embed_dim: int, patch_x_km: Tensor, patch_y_km: Tensor):
        super().__init__()
        self.register_buffer("x_km", patch_x_km.double(), persistent=False)
        self.register_buffer("y_km", patch_y_km.double(), persistent=False)
        # cos(pi k r) is a complete basis on [0, 1], and reversing the wind only flips the sign of the odd k
        self.register_buffer("frequencies", math.pi * torch.arange(1.0, NUM_FEATURES + 1), persistent=False)
        self.fc1 = nn.Linear(NUM_FEATURES, HIDDEN_DIM)
        self.fc2 = nn.Linear(HIDDEN_DIM, embed_dim)

    def forward(self, wind_ms: Tensor) -> Tensor:
        """Return the embedding [B, N, D] of the ranks along wind_ms [B, 2, H, W], (u, v) in m/s."""
        with torch.no_grad():
            rank = rank_along_wind(wind_ms, self.x_km, self.y_km)
        features = torch.cos(rank.float().unsqueeze(-1) * self.frequencies)
        return self.fc2(F.gelu(self.fc1(features)))
