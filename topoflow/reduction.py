"""Sum the gradients of a step's micro-batches over all ranks: with DDP, or along one fixed tree.

Both reductions have `forward` (the module that training calls), `warm_up(compute_loss)` (call it once, before the first
step), `micro_batch(index)` (a context manager around forward and backward of this rank's micro-batch number `index`)
and `finish()` (after the last one: completes the sum over ranks, and returns the factor by which .grad must be
multiplied to be that sum).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from topoflow.config import DistributedConfig
from topoflow.errors import ConfigError
from topoflow.ranks import Context
from topoflow.text import shorten

_ALIGNMENT = 16
"""Elements to which parameters are aligned in a flat gradient (64 bytes in float32), so that kernels use wide loads."""


class DdpReduction:
    """DDP around the model, or the bare model for one process. The last bits depend on the number of ranks.

    The order in which gradients are added depends on DDP's buckets, and DDP fills those anew, in the order in which
    gradients become ready, after its first backward pass. `warm_up` is that pass: all steps then use the same buckets,
    whether a run is new or resumed.
    """

    def __init__(self, model: nn.Module, context: Context, accumulation: int):
        self.context, self.accumulation = context, accumulation
        self.forward = model
        if context.world_size > 1:
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.6 has no other name for it
            self.forward = DistributedDataParallel(
                model,
                device_ids=[context.device.index] if context.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
            for parameter in model.parameters():  # a backward pass may be long: report its progress to other ranks
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda _: context.watch.tick())

    def warm_up(self, compute_loss: Callable[[nn.Module], torch.Tensor]) -> None:
        """Make DDP fill its buckets in their final order; gradients, weights and random state are as before.

        It takes the time of one micro-batch and a forward pass, and none where there is one process.

        Args:
            compute_loss: runs the module on a micro-batch, in training mode and with the shapes of training, and
                returns its loss. Its values do not matter.

        Raises:
            ValueError: on every rank, if a parameter that requires a gradient gets none: DDP would wait for it.
        """
        if not isinstance(self.forward, DistributedDataParallel):
            return
        self.context.watch.enter("warm-up")
        device = self.context.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with self.micro_batch(self.accumulation - 1):
                compute_loss(self.forward).backward()
            named = self.forward.module.named_parameters()
            unused = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
            if unused:
                raise ValueError(f"parameters without a gradient: {shorten(unused)}: expected the loss to use all")
            with self.forward.no_sync(), self.context.watch.waiting():
                compute_loss(self.forward)  # DDP fills its buckets anew before a forward pass
        self.forward.zero_grad()

    @contextmanager
    def micro_batch(self, index: int) -> Iterator[None]:
        """Accumulate gradients in .grad; sum over ranks only in the last micro-batch."""
        if not isinstance(self.forward, DistributedDataParallel):
            yield
        elif index < self.accumulation - 1:
            with self.forward.no_sync():
                yield
        else:
            with self.context.watch.waiting():  # DDP sums over ranks while the backward pass runs
                yield

    def finish(self) -> float:
        """Return the factor that turns .grad, which DDP has averaged over ranks, into the sum."""
        return float(self.context.world_size)


class _FlatGradient:
    """The gradients of all parameters in one tensor. flat [length]; views: one per parameter, in its shape."""

    def __init__(self, parameters: list[nn.Parameter], world_size: int):
        (dtype,) = {parameter.dtype for parameter in parameters}
        starts, length = [], 0
        for parameter in parameters:
            starts.append(length)
            length += _round_up(parameter.numel(), _ALIGNMENT)
        # each halving between ranks leaves two aligned pieces of one length; what is padded stays zero
        length = _round_up(length, _ALIGNMENT * world_size)
        self.flat = torch.zeros(length, dtype=dtype, device=parameters[0].device)
        self.views = [
            self.flat[start : start + parameter.numel()].view(parameter.shape)
            for start, parameter in zip(starts, parameters, strict=True)
        ]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class CanonicalReduction:
    """Sums along one fixed binary tree over the micro-batches of the global batch: bit-identical on any number of
    ranks.

    The tree: let a step have M = 2**k * m micro-batches, m odd, numbered 0 to M - 1 in the order of the global batch.
    The sum of a range of 2**i * m of them, i > 0, is the sum of its first half plus the sum of its second half; a range
    of m is summed from left to right. One rounded addition, which is commutative, stands at each node, so a gradient
    depends on the numbering alone. Each rank holds a contiguous 1 / world_size of them, which must be a whole subtree:
    see `require_whole_subtrees`.

    A rank sums its subtree like a binary counter, a flat partial sum per bit; autograd itself adds the
    gradients of m micro-batches (of two where m = 1) in place. Above, ranks halve and double recursively: at level l
    ranks that differ in bit l of their number exchange halves of the segment that both have summed so far, and each
    adds the half that it keeps; after log2(world_size) levels each has 1 / world_size of the whole sum, which the same
    exchanges in reverse pass to all. A rank sends 2 (1 - 1 / world_size) gradients in 2 log2(world_size) messages (R.
    Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19(1),
    2005, section 4.5; R. Rabenseifner, "Optimization of collective reduction operations", ICCS 2004).

    Memory: log2(accumulation) flat gradients where m = 1, log2(accumulation / m) + 1 where not, never less than one;
    and half of one to receive into, where there is more than one rank.

    A parameter that a micro-batch does not use has a zero gradient there, on any number of ranks; one that does not
    require a gradient is left alone.

    Args:
        model: its parameters that require gradients must be of one dtype and on one device.
        accumulation: micro-batches of this rank in one step.
    """

    def __init__(self, model: nn.Module, context: Context, accumulation: int):
        micro_batches = accumulation * context.world_size
        require_whole_subtrees(micro_batches, context.world_size)
        self.context, self.forward = context, model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        odd = micro_batches // _power_of_two_in(micro_batches)
        self._run_length = odd if odd > 1 else min(2, accumulation)
        runs = accumulation // self._run_length
        self._partial_sums = [_FlatGradient(self.parameters, context.world_size) for _ in range(runs.bit_length())]
        if context.world_size > 1:
            self._received = torch.empty_like(self._partial_sums[0].flat.chunk(2)[0])

    def warm_up(self, compute_loss: Callable[[nn.Module], torch.Tensor]) -> None:
        """Do nothing: the order of additions is fixed from the start."""

    @contextmanager
    def micro_batch(self, index: int) -> Iterator[None]:
        """Add the gradient of a forward and backward pass to this rank's partial sums, and merge complete subtrees."""
        run, place = divmod(index, self._run_length)
        top = run.bit_count()
        if place == 0:
            self._partial_sums[top].flat.zero_()
        self._show(self._partial_sums[top])
        yield
        while place == self._run_length - 1 and run % 2:
            self._partial_sums[top - 1].flat.add_(self._partial_sums[top].flat)
            top, run = top - 1, run // 2

    def finish(self) -> float:
        """Sum over ranks, so that .grad is the sum over all micro-batches of the step; return the factor, 1."""
        segment, exchanges = self._partial_sums[0].flat, []
        bit = 1
        while bit < self.context.world_size:
            partner, low, high = self.context.rank ^ bit, *segment.chunk(2)
            kept, given = (high, low) if self.context.rank & bit else (low, high)
            received = self._received[: kept.numel()]
            self.context.exchange(partner, given, received)
            kept.add_(received)
            exchanges.append((partner, kept, given))
            segment, bit = kept, bit * 2
        for partner, summed, missing in reversed(exchanges):
            self.context.exchange(partner, summed, missing)
        self._show(self._partial_sums[0])
        return 1.0

    def _show(self, gradient: _FlatGradient) -> None:
        for parameter, view in zip(self.parameters, gradient.views, strict=True):
            parameter.grad = view


def require_whole_subtrees(micro_batches: int, world_size: int) -> None:
    """Refuse a world size with which ranks would not hold whole subtrees of the canonical tree over `micro_batches`.

    Raises:
        ConfigError: naming the world sizes that fit: the powers of two that divide the number of micro-batches.
    """
    most = _power_of_two_in(micro_batches)
    if most % world_size:
        usable = ", ".join(str(2**i) for i in range(most.bit_length()))
        raise ConfigError(
            f"world size {world_size} does not fit distributed.reduction=canonical with {micro_batches} micro-batches "
            f"a step (train.global_batch_size / train.micro_batch_size): expected a world size of {usable}"
        )


def _power_of_two_in(number: int) -> int:
    return number & -number


def build_reduction(
    config: DistributedConfig, model: nn.Module, context: Context, accumulation: int
) -> DdpReduction | CanonicalReduction:
    """Return the reduction of the gradients of `accumulation` micro-batches per rank.

    Raises:
        ConfigError: canonical with a world size that does not fit.
    """
    kind = {"ddp": DdpReduction, "canonical": CanonicalReduction}[config.reduction]
    return kind(model, context, accumulation)
