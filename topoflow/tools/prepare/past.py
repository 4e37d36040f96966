"""The values of a prepared year, which must not change when hours are added to it."""

from pathlib import Path

import numpy as np

from topoflow.data.prepared.manifest import PreparedVariable, PreparedYear
from topoflow.errors import DataError


class Past:
    """The fields of a year as they were prepared, which must not change."""

    def __init__(
        self,
        folder: Path,
        before: PreparedYear | None,
        times: np.ndarray,
        variables: tuple[PreparedVariable, ...],
        shape: tuple[int, int],
        dtype: str,
    ):
        self._folder, self._array, self._names = folder, None, [variable.name for variable in variables]
        if before is None:
            return
        gone = ~np.isin(before.times, times)
        if gone.any():
            raise DataError(
                f"{folder}: {before.times[gone][0]} was prepared, but the files no longer have it: expected all of the "
                f"{len(before.times)} prepared times of {before.year}"
            )
        self._times = before.times
        path, shape_of_all = folder / before.array.name, (len(before.times), len(variables), *shape)
        self._array = np.memmap(path, dtype, "r", offset=before.header, shape=shape_of_all)

    def require_same(self, times: np.ndarray, stored: np.ndarray) -> None:
        """DataError if a time that was prepared now has other values."""
        if self._array is None:
            return
        for time, new in zip(times, stored, strict=True):
            at = int(np.searchsorted(self._times, time))
            if at == len(self._times) or self._times[at] != time or self._array[at].tobytes() == new.tobytes():
                continue
            pairs = zip(self._names, self._array[at], new, strict=True)
            differ = [name for name, old, now in pairs if old.tobytes() != now.tobytes()]
            raise DataError(
                f"{self._folder}: {time} was prepared with values that differ from the files' ({', '.join(differ)}): "
                "expected the same, or another folder"
            )
