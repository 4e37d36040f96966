"""The training loss: squared error in normalized units, as sums and counts, so that any cut of a batch adds up."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import nn


def loss_sums(
    network: nn.Module, batch: Mapping[str, torch.Tensor], elevation_m: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`masked_squared_error` of the network's forecast for a batch of the data set, all on one device.

    Args: batch, samples of the data set stacked along a first dimension; elevation_m [H, W], terrain height in metres;
    precision, fp32 or bf16 (then the forward pass runs under autocast to bfloat16).
    """
    with torch.autocast(elevation_m.device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        output = network(batch["x"], batch["lead_time_hours"], elevation_m, batch.get("wind_ms"))
    return masked_squared_error(output, batch["y"], batch["valid"])


def masked_squared_error(
    prediction: torch.Tensor, y: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error summed over samples and cells that count, for each target.

    Args: prediction [B, T, H, W] (any float type) and y [B, T, H, W], normalized; valid [B, T, H, W] bool, whether the
    value counts. What stands where valid is False is never looked at, NaN and infinity included: it adds nothing to
    the sums and gets a gradient of exactly zero. A value that is not finite where valid is True makes its sum so too.

    Returns: sums [T] float32, through which gradients flow to prediction, and counts [T] int64 of what was summed.
    The mean over all targets of many micro-batches and ranks is (all sums) / (all counts).
    """
    assert prediction.shape == y.shape == valid.shape, (prediction.shape, y.shape, valid.shape)
    # where comes before the arithmetic: NaN x 0 is NaN, in the gradient too
    error = torch.where(valid, prediction.float(), 0.0) - torch.where(valid, y.float(), 0.0)
    return error.square().sum(dim=(0, 2, 3)), valid.sum(dim=(0, 2, 3))
