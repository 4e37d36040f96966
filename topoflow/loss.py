"""The training loss: squared error in normalized units, as sums and counts, so that any cut of a batch adds up."""

import torch


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
