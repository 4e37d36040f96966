"""Import of checkpoints that PyTorch Lightning wrote for the two programs before this one."""
