"""Checkpoints that PyTorch Lightning wrote for the programs before this one, as states in the form of our own."""

from topoflow.lightning_import.conversion import Conversion, Destination, convert
from topoflow.lightning_import.reading import read_lightning
from topoflow.lightning_import.statements import schedule_length

__all__ = ["Conversion", "Destination", "convert", "read_lightning", "schedule_length"]
