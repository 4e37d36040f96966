"""Score records (see `topoflow.metrics`) as files and as a table."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from topoflow.data.variables import VARIABLES

Record = dict[str, object]


def write_scores(records: Sequence[Record], folder: Path) -> None:
    """scores.json (null where a score is not defined) and scores.csv (empty there), each replaced in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("scores.json", "scores.csv"):
        temporary = folder / f"{name}.tmp"
        with temporary.open("w", encoding="utf-8", newline="") as file:
            if name == "scores.json":
                json.dump(list(records), file, indent=1, allow_nan=False)
                file.write("\n")
            else:
                writer = csv.DictWriter(file, list(records[0]))
                writer.writeheader()
                writer.writerows(records)
        temporary.replace(folder / name)


COMPARED = (
    # column of the table, the baseline's score, the model's score on the same samples
    ("persistence", "persistence_rmse", "rmse_where_present"),
    ("climatology", "climatology_rmse", "rmse"),
    ("damped persistence", "damped_persistence_rmse", "rmse_where_present"),
)


def format_table(records: Sequence[Record]) -> str:
    """RMSE of the model and of the baselines per target and lead, and in how many of them the model wins."""
    lines = [
        "RMSE of the model and of each baseline; + marks a baseline that the model beats on the same samples",
        f"{'target':<8}{'unit':<8}{'lead':>6}{'model':>9}{'model*':>9}"
        + "".join(f"{label:>{len(label) + 2}} " for label, *_ in COMPARED),
    ]
    for record in records:
        decimals = 3 if record["rmse"] is not None and record["rmse"] < 1 else 2
        cells = [_number(record[key], 9, decimals) for key in ("rmse", "rmse_where_present")]
        for label, baseline, model in COMPARED:
            mark = "+" if beats(record, baseline, model) else " "
            cells.append(_number(record[baseline], len(label) + 2, decimals) + mark)
        first = record["lead_hours"] == records[0]["lead_hours"]
        name, unit = (VARIABLES[record["target"]].long_name, record["unit"]) if first else ("", "")
        lines.append((f"{name:<8}{unit:<8}{record['lead_hours']:>4} h" + "".join(cells)).rstrip())
    wins = [
        f"{label} in {sum(beats(record, baseline, model) for record in records)} of {len(records)}"
        for label, baseline, model in COMPARED
    ]
    lines += ["* model and both persistences where the present value exists", f"The model beats {', '.join(wins)}."]
    return "\n".join(lines)


def beats(record: Record, baseline: str, model: str) -> bool:
    """Whether the model's RMSE is below the baseline's; never if one of them is not defined."""
    return record[model] is not None and record[baseline] is not None and record[model] < record[baseline]


def _number(value: float | None, width: int, decimals: int) -> str:
    """A dash for what is not defined."""
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{decimals}f}"
