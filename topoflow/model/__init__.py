"""The network: a ClimaX-style vision transformer with wind and terrain priors."""

from topoflow.model.topoflow import TopoFlow, build_model

__all__ = ["TopoFlow", "build_model"]
