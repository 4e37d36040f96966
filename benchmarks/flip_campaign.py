"""Damage the checkpoints of a run, one byte at a time, and count the damages that loading misses.

    python -m benchmarks.flip_campaign [RUN] [--flips 1000] [--others 100] [--seed 0]

RUN is copied, not changed; without it, a small run of train.py is created. Half of the flips hit a random byte of all
files, the other half first choose a file: state.pt, manifest.json, `last` or `best`. `others` are truncations and
deletions. For each damage, loading by path must be refused, `resume=auto` must take an older checkpoint or (for a
pointer) warn, and both must name the damaged file. The table also has the number of damaged state.pt that plain
torch.load refuses. Exits with 1 if a damage was missed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import yaml

import train
from tests.support.damage import Row, damage_each
from tests.support.prepared import prepare_world
from topoflow.checkpoint.directory import CheckpointDirectory

CONFIG = {
    "run": {"threads": 1},
    "data": {
        "train": [["2018-10-01", "2018-10-03"]],
        "validation": [["2018-10-04", "2018-10-05"]],
        "lead_times_hours": [6],
        "threads": 0,
    },
    "model": {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "train": {"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 8, "validate_every_steps": 1},
    "checkpoint": {"every_steps": 1},
}


def make_run(folder: Path) -> Path:
    """Create a run of two steps and two checkpoints; return the folder of its checkpoints."""
    prepare_world(folder / "data", days=6)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "data": {**CONFIG["data"], "path": str(folder / "data")}}))
    status = train.main([str(config), f"run.dir={folder / 'run'}"])
    assert status == 0, "the run failed"
    return folder / "run" / "checkpoints"


def print_table(rows: list[Row], sizes: dict[str, int]) -> None:
    line = "{:<15}{:>12}{:<14}{:>8}{:>8}{:>8}{:>26}"
    print(line.format("file", "bytes", "  damage", "number", "found", "missed", "refused by torch.load"))
    for row in rows:
        by_torch = row.noticed_by_torch if row.file == "state.pt" else ""
        missed = row.damages - row.found
        print(line.format(row.file, sizes[row.file], f"  {row.kind}", row.damages, row.found, missed, by_torch))


def main() -> int:
    """Run the campaign; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="a run directory with at least two checkpoints"
    )
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--others", type=int, default=100, help="truncations and deletions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source = options.run / "checkpoints" if options.run is not None else make_run(Path(name))
        newest = CheckpointDirectory(source).folder(CheckpointDirectory(source).steps()[-1])
        sizes = {
            path.name: path.stat().st_size
            for path in (*newest.iterdir(), source / "last", source / "best")
            if path.exists()
        }
        rows = damage_each(source, Path(name) / "damaged", options.flips, options.others, options.seed)
    print_table(rows, sizes)
    damages, found = sum(row.damages for row in rows), sum(row.found for row in rows)
    print(f"{damages} damages, {found} found, {damages - found} missed")
    return 0 if found == damages else 1


if __name__ == "__main__":
    sys.exit(main())
