"""The training loss: squared error in normalized units, as sums and counts that add up over micro-batches and ranks."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import nn


def loss_sums(
    network: nn.Module, batch: Mapping[str, torch.Tensor], elevation_m: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the network on a batch and return the `masked_squared_error` of its forecast.

    Args:
        batch: samples of the data set stacked along a new first dimension, on the network's device.
        elevation_m: [H, W], terrain height in metres, on the same device.
        precision: fp32, or bf16 to run the forward pass under autocast to bfloat16.
    """
    with torch.autocast(elevation_m.device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        output = network(batch["x"], batch["lead_time_hours"], elevation_m, batch.get("wind_ms"))
    return masked_squared_error(output, batch["y"], batch["valid"])


def masked_squared_error(
    prediction: torch.Tensor, y: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the squared error over valid samples and cells, for each target.

    Values where `valid` is False, including NaN and infinity, do not enter the sums and get a gradient of exactly zero.
    A value that is not finite where `valid` is True makes the sum not finite.

    Args:
        prediction, y: [B, T, H, W] or [B, L, T, H, W] with L leads, normalized; prediction of any float type.
        valid: bool, of the same shape.

    Returns:
        sums [T] float32, differentiable with respect to prediction, and counts [T] int64 of the valid values. The mean
        over all targets, micro-batches and ranks is (all sums) / (all counts).
    """
    assert prediction.shape == y.shape == valid.shape, (prediction.shape, y.shape, valid.shape)
    # torch.where before the arithmetic, as NaN x 0 is NaN, also in the gradient
    error = torch.where(valid, prediction.float(), 0.0) - torch.where(valid, y.float(), 0.0)
    others = (0, 2, 3) if y.dim() == 4 else (0, 1, 3, 4)
    return error.square().sum(dim=others), valid.sum(dim=others)
