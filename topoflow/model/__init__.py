"""The network: a ClimaX-style vision transformer with wind and terrain priors."""
