"""What the hours of a run's splits hold, day by day, so that other data are noticed, and named."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topoflow.data.moments import day_pieces
from topoflow.data.prepared.reader import PreparedData

DIGITS = 16
"""Hexadecimal digits that are kept of the hash of a day and variable: 64 bits."""


@dataclass(frozen=True)
class Contents:
    """Hashes of all that a run reads.

    fixed: {name: hash} of the fields that do not change, the place of the cells among them, and of how the numbers of
    each variable are to be understood. days: in order, each with the number of its hours. hashes: {variable: digits},
    DIGITS for each day.
    """

    fixed: dict[str, str]
    days: tuple[str, ...]
    hashes: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all of it."""
        return _hash(json.dumps(self.to_dict(), sort_keys=True).encode())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"fixed": self.fixed, "days": list(self.days), "hashes": self.hashes}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Contents":
        """What `to_dict` gave."""
        return cls(dict(content["fixed"]), tuple(content["days"]), dict(content["hashes"]))

    def describe(self) -> str:
        """Its days and variables, for a report."""
        days = [day.partition(" ")[0] for day in self.days]
        return f"{len(days)} days from {days[0]} to {days[-1]} of {', '.join(self.hashes)}"

    def difference(self, other: "Contents", all_days: bool = True) -> str | None:
        """Return, in words, where `other` first differs; None if nothing differs.

        Only variables that both have are compared. all_days: days that only one has count as different.
        """
        for name in self.fixed:
            if name in other.fixed and self.fixed[name] != other.fixed[name]:
                return name
        if all_days and self.days != other.days:
            either = sorted(set(self.days) ^ set(other.days))
            return f"hours of {either[0].partition(' ')[0]}"
        mine, theirs = ({day: k for k, day in enumerate(contents.days)} for contents in (self, other))
        names = [name for name in self.hashes if name in other.hashes]
        for day in self.days:
            if day in theirs:
                for name in names:
                    if self._hash(name, mine[day]) != other._hash(name, theirs[day]):
                        return f"{name} on {day.partition(' ')[0]}"
        return None

    def _hash(self, name: str, day: int) -> str:
        return self.hashes[name][day * DIGITS : (day + 1) * DIGITS]


def contents_of(data: PreparedData, names: Sequence[str], indices: np.ndarray) -> Contents:
    """Return the contents of the variables `names` (computed ones may be among them) at `indices` of data.times.

    Hashes of whole days are known; the hours of days that are only partly in `indices` are read.
    """
    pieces = day_pieces(data.times, indices)
    # rounded to the float32 grid of about 1e-5 degrees in which many files store their coordinates
    fixed = {"place of the cells": _hash(data.static("lat2d").tobytes() + data.static("lon2d").tobytes())}
    fixed["mask"] = _hash(np.packbits(data.mask).tobytes())
    for name in sorted(set(names) - {"lat2d", "lon2d"}):
        if name in data.dynamic:
            fixed[f"encoding of {name}"] = _hash(data.encoding(name).encode())
        elif name in data.static_fields:
            fixed[name] = _hash(f"{data.units[name]} ".encode() + data.static(name).tobytes())
    days = tuple(f"{data.times[piece[0]].astype('datetime64[D]')} {len(piece)}" for piece in pieces)
    hashes = {
        name: "".join(data.hash_of_day(name, piece)[:DIGITS] for piece in pieces)
        for name in sorted(set(names) & set(data.dynamic))
    }
    return Contents(fixed, days, hashes)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
