"""The lease of a run directory: one process at a time writes there, and one that was replaced writes nothing more."""

from topoflow.lease.holder import Holder, parse_holder
from topoflow.lease.lease import FILE_NAME, Lease
from topoflow.lease.lock import BriefLock

__all__ = ["FILE_NAME", "BriefLock", "Holder", "Lease", "parse_holder"]
