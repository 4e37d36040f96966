"""What is in a checkpoint or in a run's folder of them, whole or damaged, and how two of them differ."""
