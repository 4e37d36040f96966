"""A cache of normalization constants, so that no data set is read for them twice."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from topoflow.data.fields import FieldSource
from topoflow.data.normalization import Normalization
from topoflow.files import write_atomically

log = logging.getLogger(__name__)


class NormalizationCache:
    """The entry of one data set, its training hours and variables.

    A small file whose name is the hash of what the constants are made of: fingerprint of the data, the hours, the
    names, and sizes and times of change of the files. An entry that is unreadable or damaged counts as missing; one
    that cannot be written is a warning.

    Args:
        folder: of the cache; None: ~/.cache/topoflow.
        source: data that come with the moments of each day are not cached.
        names: of the variables.
        indices: positions of the training hours in source.times.
    """

    def __init__(self, folder: str | None, source: FieldSource, names: Sequence[str], indices: np.ndarray):
        self._path: Path | None = None
        try:
            root, guard = Path(folder) if folder else Path.home() / ".cache" / "topoflow", source.guard()
        except (OSError, RuntimeError):  # a user without a home
            return
        if guard:
            hours = hashlib.sha256(source.times[indices].astype("<i8").tobytes()).hexdigest()
            key = {"data": source.fingerprint, "hours": hours, "names": list(names), "files": guard}
            digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
            self._path = root / f"normalization-{digest}.json"

    def read(self) -> Normalization | None:
        """Return the constants of an earlier run, bit for bit; None without a valid entry."""
        if self._path is None:
            return None
        try:
            content = json.loads(self._path.read_text(encoding="ascii"))
            pairs = {name: (float.fromhex(mean), float.fromhex(std)) for name, (mean, std) in content["pairs"].items()}
            found = Normalization.from_dict(pairs)
            is_whole = content["fingerprint"] == found.fingerprint
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return found if is_whole else None

    def write(self, normalization: Normalization) -> None:
        """Store the constants for later runs."""
        if self._path is None:
            return
        pairs = {name: [mean.hex(), std.hex()] for name, (mean, std) in normalization.to_dict().items()}
        content: dict[str, Any] = {"pairs": pairs, "fingerprint": normalization.fingerprint}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(content))
        except OSError as error:
            log.warning("data.cache: %s cannot be written: %s", self._path.parent, error.strerror or error)
