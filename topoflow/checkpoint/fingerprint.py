"""Fingerprints of tensors, computed on their device: integer sums, equal on every device and in any order of summation.

A fingerprint is a multilinear hash of the words w of a tensor (its bits, cut into integers) with fixed odd 64-bit
weights a (Carter and Wegman 1979, in arithmetic modulo 2^64): sum_i a[i] w[i]. Any change of one word changes it,
because an odd factor is invertible; a swap of two words changes it because every position has its own weight. It
detects accidental differences; files carry SHA-256 as well.

On the host NumPy computes the sum with one thread. torch would start a team of OpenMP threads for each calling thread;
with two teams there are more threads than processors, and libgomp then makes all of them sleep between operations for
the rest of the process. When the thread that writes checkpoints used torch here, steps took a third longer.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

CHUNK = 2**16
"""Words per chunk: chunks share one table of weights, and each chunk has its own factor."""

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Return int64 [] on the tensor's device: the multilinear hash of its bits. Any shape, dtypes of up to 8 bytes."""
    words = tensor.detach().contiguous().reshape(-1).view(_WORDS[tensor.dtype.itemsize])
    if tensor.device.type == "cpu":
        return torch.tensor(_sum_on_host(words.numpy()), dtype=torch.int64)
    if words.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    weights = _odd_weights(0, CHUNK, tensor.device)
    sums = torch.stack([(chunk * weights[: chunk.numel()]).sum() for chunk in words.split(CHUNK)])
    return (sums * _odd_weights(CHUNK, len(sums), tensor.device)).sum()


def _sum_on_host(words: np.ndarray) -> int:
    weights, products = _odd_weights(0, CHUNK, torch.device("cpu")).numpy(), np.empty(CHUNK, np.int64)
    sums = np.empty(-(-len(words) // CHUNK), np.int64)
    for number in range(len(sums)):
        chunk = words[number * CHUNK : (number + 1) * CHUNK]
        sums[number] = np.multiply(chunk, weights[: len(chunk)], out=products[: len(chunk)]).sum()
    factors = _odd_weights(CHUNK, len(sums), torch.device("cpu")).numpy()
    return int((sums * factors).sum())  # modulo 2^64, as integers of NumPy are


def fingerprints(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return {name: "float32[96, 96] 16 hex digits"}: dtype, shape and hash of the bits of each tensor."""
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(name)
    values: dict[str, int] = {}
    for names in by_device.values():  # one transfer to the host for each device
        values.update(zip(names, torch.stack([tensor_fingerprint(tensors[n]) for n in names]).tolist(), strict=True))
    return {name: f"{_kind(tensor)} {values[name] % 2**64:016x}" for name, tensor in tensors.items()}


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, persistent: bool) -> dict[str, torch.Tensor]:
    """Return every weight, buffer, moment and step count by name, such as `exp_avg of head.0.weight`.

    persistent: only what a checkpoint holds, so without the buffers that the model derives from its grid.
    """
    buffers = set(model.state_dict()) if persistent else {name for name, _ in model.named_buffers()}
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in buffers})
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            moments = optimizer.state.get(parameter, {})
            tensors.update({f"{key} of {name}": moments[key] for key in MOMENTS if key in moments})
    return tensors


def captured_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a captured state under the names of `state_tensors`."""
    moments = state["optimizer"]["state"]
    return state["model"] | {f"{key} of {name}": tensor for name in moments for key, tensor in moments[name].items()}


def seal(state: dict[str, Any]) -> None:
    """Complete the certificate of a captured state: fingerprints of its tensors, and how many updates moments have had.

    It is computed from the copy that is written, not from the live state, so the loop does not wait for it.
    """
    moments = state["optimizer"]["state"]
    state["certificate"]["tensors"] = fingerprints(captured_tensors(state))
    state["certificate"]["moment_updates"] = {name: int(entry["step"]) for name, entry in moments.items()}


def moment_updates(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return how many updates the moments of each parameter have had, by name; one transfer from the device."""
    steps = {
        name: optimizer.state[parameter]["step"]
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if parameter in optimizer.state
    }
    counts = torch.stack([step.reshape(()) for step in steps.values()]).tolist() if steps else []
    return dict(zip(steps, map(int, counts), strict=True))


def state_fingerprints(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, str]:
    """Return what ranks must agree on: fingerprints of tensors, settings of each group, position of the scheduler."""
    prints = fingerprints(state_tensors(model, optimizer, persistent=False))
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "name")}
        prints[f"optimizer group {group['name']}"] = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    return {**prints, "scheduler": f"step {scheduler.last_epoch}"}


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


@functools.cache
def _odd_weights(first: int, count: int, device: torch.device) -> torch.Tensor:
    """Return int64 [count], odd: entries `first` to `first + count` of splitmix64 (Steele 2014)."""
    z = (np.arange(first + 1, first + count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)
