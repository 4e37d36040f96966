"""Geography of the demo world: terrain with a ridge and a basin, towns, and the flow of air around the terrain."""

from dataclasses import dataclass

import numpy as np

EARTH_RADIUS_M = 6.371e6
CELL_DEGREES = 0.25
SOUTH_WEST = (30.0, 104.0)
"""Latitude and longitude of the south-west corner, degrees."""

PLAIN_M = 60.0
LAYER_M = 1000.0
"""Depth of the polluted layer over the plain."""
OVERFLOW_M = 1500.0
"""Height above the plain at which terrain leaves only SHALLOWEST of the layer's depth."""
SHALLOWEST = 0.12
BASIN = (0.27, 0.55)
"""Centre of the basin, east and north over the domain."""
TOWNS = 9


@dataclass(frozen=True)
class Geography:
    """Fixed fields of the demo world. All arrays are [H, W] with south first unless stated."""

    lat: np.ndarray
    """Cell centres [H], degrees."""
    lon: np.ndarray
    """Cell centres [W], degrees."""
    dx_m: float
    """East-west side of a cell, taken at the middle latitude."""
    dy_m: float
    elevation_m: np.ndarray
    depth: np.ndarray
    """Depth of the layer that air moves in, relative to LAYER_M: 1 over the plain, SHALLOWEST over high ridges."""
    population: np.ndarray
    towns: np.ndarray
    """[TOWNS, H, W]: people and traffic of each town; 1 at the centre of the largest."""
    industry: np.ndarray
    """Emission pattern of industry, which lies outside the town centres; 1 at the largest peak."""
    flow_x: np.ndarray
    """[2, H, W + 1]: eastward air flux (depth times m/s) through cell sides, for 1 m/s from west and from south."""
    flow_y: np.ndarray
    """[2, H + 1, W]: northward air flux, likewise."""

    def wind(self, steering_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return eastward and northward wind at the cell centres, m/s, [n, H, W] each, for large-scale winds [n, 2]."""
        east = (self.flow_x[:, :, 1:] + self.flow_x[:, :, :-1]) / (2 * self.depth)
        north = (self.flow_y[:, 1:] + self.flow_y[:, :-1]) / (2 * self.depth)
        return np.einsum("nk,kij->nij", steering_ms, east), np.einsum("nk,kij->nij", steering_ms, north)


def build_geography(shape: tuple[int, int], generator: np.random.Generator) -> Geography:
    """Draw terrain, towns and flow patterns for `shape` = (rows, columns) from `generator`."""
    rows, columns = shape
    lat = SOUTH_WEST[0] + (np.arange(rows) + 0.5) * CELL_DEGREES
    lon = SOUTH_WEST[1] + (np.arange(columns) + 0.5) * CELL_DEGREES
    dy_m = np.radians(CELL_DEGREES) * EARTH_RADIUS_M
    dx_m = dy_m * float(np.cos(np.radians(lat.mean())))
    relief_m = _relief(shape, generator)
    depth = np.maximum(1 - relief_m / OVERFLOW_M, SHALLOWEST)
    towns, industry = _settlements(relief_m, generator)
    flow_x, flow_y = build_flow(depth, dx_m, dy_m)
    return Geography(
        lat=lat,
        lon=lon,
        dx_m=dx_m,
        dy_m=dy_m,
        elevation_m=PLAIN_M + relief_m,
        depth=depth,
        population=np.round(20e3 + 2.5e6 * towns.sum(axis=0)),
        towns=towns,
        industry=industry,
        flow_x=flow_x,
        flow_y=flow_y,
    )


def _relief(shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Return the height above the plain in metres [H, W]: ridge, basin in a broken ring, hills; 0 at the edges."""
    rows, columns = shape
    # east and north position of the cell centres, 0 to 1 over the domain
    north, east = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    bend, gap = generator.uniform(0, 2 * np.pi), generator.uniform(-0.6, 0.6)
    crest = 0.62 + 0.05 * np.sin(2 * np.pi * north + bend)
    ridge = 2000.0 * np.exp(-(((east - crest) / 0.045) ** 2)) * np.exp(-(((north - 0.5) / 0.26) ** 6))
    from_basin_east, from_basin_north = (east - BASIN[0]) / 0.15, (north - BASIN[1]) / 0.22
    distance = np.hypot(from_basin_east, from_basin_north)
    bearing = np.arctan2(from_basin_north, from_basin_east)
    # the ring opens to the east by north or east by south, where a river leaves the basin
    open_way = np.exp(-(((bearing - gap) / 0.45) ** 2))
    ring = 2400.0 * np.exp(-(((distance - 1.0) / 0.28) ** 2)) * (1 - open_way)
    hills = np.zeros(shape)
    for _ in range(6):
        wave_east, wave_north, phase = generator.uniform(4, 14), generator.uniform(4, 14), generator.uniform(0, 6.3)
        hills += 40.0 * (1 + np.sin(wave_east * east + wave_north * north + phase))
    to_edge = np.minimum.outer(_from_edge(rows), _from_edge(columns))
    return (ridge + ring + hills) * (3 * to_edge**2 - 2 * to_edge**3)


def _from_edge(count: int) -> np.ndarray:
    """Return 0 in the outermost cells, rising to 1 over a tenth of the domain (at least two cells)."""
    cell = np.arange(count)
    return np.minimum(np.minimum(cell, count - 1 - cell) / max(2.0, count / 10), 1.0)


def _settlements(relief_m: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Place towns [TOWNS, H, W] and industry [H, W]: on low ground, apart, off the edges; one in the basin."""
    rows, columns = relief_m.shape
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    low = 1.0 / (1.0 + (relief_m / 300.0) ** 4)
    free = low * (np.minimum.outer(_from_edge(rows), _from_edge(columns)) > 0.6)
    radius = max(1.0, 0.035 * min(rows, columns))
    towns = np.zeros((TOWNS, rows, columns))
    industry = np.zeros(relief_m.shape)
    centre = round(BASIN[1] * rows), round(BASIN[0] * columns)
    for k in range(TOWNS):
        distance = np.hypot(row - centre[0], column - centre[1])
        # slopes are not settled
        towns[k] = low * np.exp(-0.5 * (distance / radius) ** 2) * generator.uniform(0.3, 1.0)
        if k % 2 == 0:
            to_industry = np.hypot(row - centre[0] - 1.5 * radius, column - centre[1] + radius)
            industry = np.maximum(industry, low * np.exp(-0.5 * (to_industry / (0.8 * radius)) ** 2))
        free *= 1 - np.exp(-0.5 * (distance / (4.5 * radius)) ** 2)
        centre = divmod(int(generator.choice(rows * columns, p=(free / free.sum()).ravel())), columns)
    return towns, industry


def build_flow(depth: np.ndarray, dx_m: float, dy_m: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the steady air flux through the sides of the cells for 1 m/s from west and from south.

    In this layer the pressure gradient balances a drag at the ground that is linear in the wind, so that its effect on
    the air goes as 1 / depth: wind / depth = - gradient of a potential. It has no divergence, so depth * wind =
    (d psi / dy, - d psi / dx) and div(grad(psi) / depth**2) = 0, with psi of the undisturbed wind at the edges, where
    `depth` is 1. Air flows around terrain rather than over it. The stream function psi is defined at the corners of the
    cells, so that inflow and outflow of a cell are equal up to rounding.

    Args:
        depth: of the layer, relative, [H, W].
        dx_m, dy_m: sides of a cell.

    Returns:
        depth times wind in m/s through the sides, x [2, H, W + 1] and y [2, H + 1, W].
    """
    rows, columns = depth.shape
    # a side is as deep as the shallower of its two cells
    side_x = np.minimum(depth[:, 1:], depth[:, :-1])
    side_y = np.minimum(depth[1:], depth[:-1])
    along_y = (dx_m / dy_m) / side_x**2  # weight of the difference of psi between the two ends of a side, [H, W - 1]
    along_x = (dy_m / dx_m) / side_y**2  # [H - 1, W]
    corner_y, corner_x = np.meshgrid(np.arange(rows + 1) * dy_m, np.arange(columns + 1) * dx_m, indexing="ij")
    flow_x, flow_y = [], []
    for undisturbed in (corner_y, -corner_x):
        psi = _solve_stream_function(undisturbed, along_x, along_y)
        flow_x.append(np.diff(psi, axis=0) / dy_m)
        flow_y.append(-np.diff(psi, axis=1) / dx_m)
    return np.stack(flow_x), np.stack(flow_y)


def _solve_stream_function(psi: np.ndarray, along_x: np.ndarray, along_y: np.ndarray) -> np.ndarray:
    """Solve for psi [H + 1, W + 1] inside its fixed edges, by conjugate gradients with diagonal scaling."""

    def curl(field: np.ndarray) -> np.ndarray:
        """Return the circulation around each inner corner, [H - 1, W - 1]."""
        side_y = along_y * np.diff(field, axis=0)[:, 1:-1]
        side_x = along_x * np.diff(field, axis=1)[1:-1]
        return -np.diff(side_y, axis=0) - np.diff(side_x, axis=1)

    diagonal = along_y[1:] + along_y[:-1] + along_x[:, 1:] + along_x[:, :-1]
    psi = psi.copy()
    residual = -curl(psi)
    direction = np.zeros_like(psi)
    direction[1:-1, 1:-1] = scaled = residual / diagonal
    energy = float((residual * scaled).sum())
    # well above what rounding leaves, 1e-14 of psi
    enough = 1e-26 * float((diagonal * psi[1:-1, 1:-1] ** 2).sum())
    while energy > enough:
        image = curl(direction)
        step = energy / float((direction[1:-1, 1:-1] * image).sum())
        psi += step * direction
        residual = residual - step * image
        scaled = residual / diagonal
        before, energy = energy, float((residual * scaled).sum())
        direction[1:-1, 1:-1] = scaled + energy / before * direction[1:-1, 1:-1]
    return psi
