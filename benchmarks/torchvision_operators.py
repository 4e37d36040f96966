"""Imports of packages that want torchvision, beside a build of torch that its operators do not load with."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

_REGISTRATIONS = "torchvision._meta_registrations"


@contextmanager
def without_torchvision_operators() -> Iterator[None]:
    """While it lasts, torchvision is imported without the registration of its operators.

    PyPI's wheel is linked to CUDA, so beside a CPU build of torch that registration fails, and with it the import of
    timm and of lightning (by torchmetrics), which use none of those operators here.
    """
    if _REGISTRATIONS in sys.modules:
        yield
        return
    sys.modules[_REGISTRATIONS] = types.ModuleType(_REGISTRATIONS)
    try:
        yield
    finally:
        del sys.modules[_REGISTRATIONS]
