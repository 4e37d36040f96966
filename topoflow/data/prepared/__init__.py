"""Data sets laid out for fast reading of samples."""
