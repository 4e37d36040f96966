"""Gridded air quality data: reading, splitting, normalizing, sampling."""
