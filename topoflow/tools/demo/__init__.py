"""The demo world: a small simulated region with terrain, towns, weather and tracers."""
