"""A copy of a state in host memory, taken between two steps, so that it can be written while training goes on."""

import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 64
_MADV_WIPEONFORK = 18
"""<linux/mman.h>, since Linux 4.14; not in Python's mmap."""


class HostBuffer:
    """Host memory that every copy uses again: the tensors of one copy are gone when the next is taken.

    Args:
        pinned: page-locked, which lets a GPU copy on its own.
    """

    def __init__(self, pinned: bool):
        self._pinned, self._memory = pinned, memoryview(b"")

    def reserve(self, nbytes: int) -> None:
        """Have this much memory at hand, every page of it touched: the first copy is then as fast as later ones.

        Raises:
            OSError: there is not so much.
        """
        if len(self._memory) < nbytes:
            self._memory = memoryview(b"")  # before the larger one is taken
            self._memory = _allocate_pinned(nbytes) if self._pinned else _allocate_pageable(nbytes)

    def copy(self, tree: Any) -> Any:
        """The tree (nested dicts and lists of tensors and plain values) with each tensor copied to the host.

        Each has a storage of its own, so that torch.save writes no more than it.

        Raises:
            OSError: there is not enough memory.
        """
        self.reserve(sum(_room(tensor) for tensor in _tensors(tree)))
        position, devices = 0, set()

        def take(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal position
            if tensor.numel() == 0:
                return torch.empty(tensor.shape, dtype=tensor.dtype)
            copy = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=position)
            position += _room(tensor)
            devices.add(tensor.device)
            return copy.view(tensor.shape).copy_(tensor.detach(), non_blocking=True)

        with torch.no_grad():
            copied = _map_tensors(tree, take)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return copied


def _allocate_pageable(nbytes: int) -> memoryview:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        # A loader worker that is forked would share these pages, and the next copy would first duplicate each of them.
        # It gets empty ones. With MADV_DONTFORK it would get none, and what it then maps to that place would be gone
        # when this object is freed there.
        for advice in (_MADV_WIPEONFORK, mmap.MADV_HUGEPAGE):
            with suppress(OSError):  # a kernel without it
                memory.madvise(advice)
    np.frombuffer(memory, np.uint8)[:] = 0  # not by torch, see `topoflow.checkpoint.fingerprint`
    return memoryview(memory)


def _allocate_pinned(nbytes: int) -> memoryview:
    return memoryview(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy())


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(item)


def _map_tensors(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The tree with `function` of each tensor, in containers of its own."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map_tensors(item, function) for item in tree)
    return tree
