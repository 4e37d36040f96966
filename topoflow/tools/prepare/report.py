"""What packing did, in words."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from topoflow.data.packed.manifest import Manifest


@dataclass(frozen=True)
class PackReport:
    """What `pack` found and did."""

    output: Path
    manifest: Manifest
    written: tuple[int, ...]
    """Years."""

    def lines(self) -> list[str]:
        """For a person; with the cost in precision of each variable where there is one."""
        manifest, (rows, columns) = self.manifest, self.manifest.shape
        years, size = manifest.years, sum(file.size for file in manifest.files())
        written = ", ".join(map(str, self.written)) or "none, all years exist"
        text = (
            f"{self.output}: {years[0].times[0]} to {years[-1].times[-1]}, {len(manifest.variables)} variables as "
            f"{np.dtype(manifest.dtype)} on {rows} x {columns} cells, {size / 1e9:.2f} GB; years written: {written}"
        )
        if manifest.dtype == "<f4":
            return [text]
        return [text, f"{'':8} {'largest error':>24} {'RMS error':>24} {'over the deviation':>20}"] + [
            f"{v.name:8} {f'{v.error_max:.3g} {v.unit}':>24} {f'{v.error_rms:.3g} {v.unit}':>24} "
            + (f"{v.error_max / v.std:.1e}, {v.error_rms / v.std:.1e}".rjust(20) if v.std else "")
            for v in manifest.variables
        ]
