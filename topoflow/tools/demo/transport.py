"""Transport of tracers in one layer of varying depth: advection and diffusion, conserving mass."""

import numpy as np


def advect(
    tracers: np.ndarray,
    depth: np.ndarray,
    flow_x: np.ndarray,
    flow_y: np.ndarray,
    inflow: np.ndarray,
    cell_m: tuple[float, float],
    seconds: float,
) -> np.ndarray:
    """Carry concentrations with a non-divergent air flux for `seconds`, in as many steps as stability requires.

    A finite-volume scheme, split into directions whose order alternates: van Leer's upwind fluxes with monotonized
    central slopes (van Leer 1977, J. Comput. Phys. 23, 263-275 and 276-299), and the air in each cell is carried
    through the split steps along with the tracers (Easter 1993, Mon. Wea. Rev. 121, 297-304). So mass is conserved,
    values stay within those of their neighbours and of the inflow (none turns negative), and a uniform field stays
    uniform.

    Args:
        tracers: concentrations [S, H, W].
        depth: of the air layer, relative, [H, W].
        flow_x, flow_y: depth times wind in m/s through the sides, [H, W + 1] and [H + 1, W].
        inflow: concentration of air that enters at the edges, [S].
        cell_m: sides (dx, dy) of a cell.

    Returns:
        concentrations [S, H, W].
    """
    dx, dy = cell_m
    # fraction of its air that a cell loses per second; below 1 per step, the split steps leave some air in each cell
    share_x = (np.maximum(flow_x[:, 1:], 0) - np.minimum(flow_x[:, :-1], 0)) / (dx * depth)
    share_y = (np.maximum(flow_y[1:], 0) - np.minimum(flow_y[:-1], 0)) / (dy * depth)
    steps = max(1, int(np.ceil(seconds * (share_x + share_y).max() / 0.8)))
    step_x, step_y = flow_x * (seconds / steps / dx), flow_y.T * (seconds / steps / dy)
    edge = np.broadcast_to(inflow[:, None, None], (len(inflow), 1, 1))
    for step in range(steps):
        air = depth
        for along_x in (True, False) if step % 2 == 0 else (False, True):
            if along_x:
                tracers, air = _advect_rows(tracers, air, step_x, edge)
            else:
                turned, air = _advect_rows(tracers.transpose(0, 2, 1), air.T, step_y, edge)
                tracers, air = turned.transpose(0, 2, 1), air.T
    return tracers


def _advect_rows(
    tracers: np.ndarray, air: np.ndarray, flow: np.ndarray, edge: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Do one step along the last axis: tracers [S, A, B], air [A, B], flow [A, B + 1] in units of air per step."""
    wide = np.broadcast_to(edge, (*tracers.shape[:2], 1))
    padded = np.concatenate([wide, tracers, wide], axis=2)
    difference = np.diff(padded, axis=2)
    left, right = difference[..., :-1], difference[..., 1:]
    # monotonized central slope of each cell, 0 at extrema
    limit = 2 * np.minimum(np.abs(left), np.abs(right))
    slope = np.where(left * right > 0, np.clip((left + right) / 2, -limit, limit), 0.0)
    # concentration of the air that leaves a cell to the right and to the left: the mean over the part that leaves
    to_right = np.maximum(flow[:, 1:], 0) / air
    to_left = np.maximum(-flow[:, :-1], 0) / air
    leaving_right = np.concatenate([wide, tracers + slope * (1 - to_right) / 2], axis=2)
    leaving_left = np.concatenate([tracers - slope * (1 - to_left) / 2, wide], axis=2)
    flux = flow * np.where(flow > 0, leaving_right, leaving_left)
    air_after = air - np.diff(flow, axis=1)
    return (tracers * air - np.diff(flux, axis=2)) / air_after, air_after


def diffuse(
    tracers: np.ndarray, depth: np.ndarray, diffusivity: float, cell_m: tuple[float, float], seconds: float
) -> np.ndarray:
    """Mix concentrations [S, H, W] with `diffusivity` in m2/s through the sides of the cells, none through the edges.

    The flux through a side is as deep as the shallower of its two cells, so ridges separate the air on their two sides.
    """
    dx, dy = cell_m
    steps = max(1, int(np.ceil(seconds * diffusivity * (1 / dx**2 + 1 / dy**2) / 0.25)))
    for _ in range(steps):
        change = np.zeros_like(tracers)
        for axis, spacing in ((2, dx), (1, dy)):
            shallow = np.minimum(depth[:, 1:], depth[:, :-1]) if axis == 2 else np.minimum(depth[1:], depth[:-1])
            gain = diffusivity * seconds / steps / spacing**2 * shallow * np.diff(tracers, axis=axis)
            padding = [(0, 0)] * 3
            padding[axis] = (1, 1)
            change += np.diff(np.pad(gain, padding), axis=axis)
        tracers = tracers + change / depth
    return tracers
