"""Commands that the trainer never imports."""
