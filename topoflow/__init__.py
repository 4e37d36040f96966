"""TopoFlow: a vision transformer that forecasts air pollutants, aware of wind and terrain."""

__version__ = "0.1.0"
