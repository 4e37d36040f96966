"""Checkpoints that PyTorch Lightning wrote for the programs before this one, as states in the form of our own."""
