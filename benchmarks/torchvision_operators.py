"""Import packages that need torchvision with a build of torch for which its operators do not load."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

_REGISTRATIONS = "torchvision._meta_registrations"


@contextmanager
def without_torchvision_operators() -> Iterator[None]:
    """Import torchvision without registering its operators inside this context.

    PyPI's wheel is linked to CUDA, so with a CPU build of torch the registration fails, and with it the import of timm
    and lightning (through torchmetrics), which use none of these operators here.
    """
    if _REGISTRATIONS in sys.modules:
        yield
        return
    sys.modules[_REGISTRATIONS] = types.ModuleType(_REGISTRATIONS)
    try:
        yield
    finally:
        del sys.modules[_REGISTRATIONS]
