#!/usr/bin/env python3
"""What each physical prior adds on the demo world: runs in pairs, and controls that must add nothing.

A pair has the same world, seed, start, order of samples and budget; one run has the prior, the other lacks it. A
control keeps the prior and takes its information away, in training and in scoring: the wind of another sample,
permuted terrain, weather of another time. What a prior gains beyond its controls is physics. A wind turned by 180
degrees, in both too, tells as much as the true one: equal gains show that no direction is built in. Printed is the
change of the test RMSE by lead time, as mean over targets, with a 95 % interval of the mean over pairs (Student's t);
the endpoint, the mean of 12 and 24 h, was fixed beforehand. Exits with 1 if a control changed no score at all,
because then the input that it alters does not reach the network.

Start it again after an interruption: runs that are complete in --out are not repeated.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import train
from benchmarks.tables import print_table
from topoflow import bases, plots
from topoflow.data.advected import AdvectedChannels
from topoflow.data.assembly import ForecastData
from topoflow.data.dataset import ForecastDataset
from topoflow.data.prepared.reader import PreparedData
from topoflow.tools.demo.world import make_demo_data
from topoflow.tools.prepare.command import load_recipe, prepare

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"
LEADS = (12, 24, 48, 96)
ENDPOINT_LEADS = (12, 24)
APART = (31 * 24 + 7, 2 * 24 + 7)
"""Hours to the sample whose wind or weather a control takes, of another month and hour of day; where data are short."""
FORM = (
    # the days for which there are forecasts, so that all runs have the same samples
    "data.train=[[2018-10-02, 2018-11-20], [2018-12-21, 2019-02-15], [2019-03-05, 2019-03-23]]",
    "data.validation=[]",  # nothing is chosen: the last checkpoint is scored
    "data.hours={}",
    "data.forecast=null",
    "data.anomalies=true",
    "model.base=damped",
    "model.leads=joint",
    "model.embed_dim=64",
    "model.depth=2",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "train.validate_every_steps=null",
    "checkpoint.every_steps=1000000",
)
AHEAD = "data.hours={u: [0, 12, 24, 48, 72, 96], v: [0, 12, 24, 48, 72, 96]}"
ADVECT = "data.advect=[pm25, pm10, so2, no2, co, o3, population]"


@dataclass(frozen=True)
class Variant:
    """A way to train. overrides: of the config. control: name of what is taken away, see `taken_away`."""

    overrides: tuple[str, ...]
    control: str = ""


def _variant(*overrides: str, wind: str = "none", terrain: str = "none", control: str = "") -> Variant:
    return Variant((f"model.wind={wind}", f"model.terrain={terrain}", *overrides), control)


VARIANTS = {
    "no prior": _variant(),
    "terrain": _variant(terrain="endpoint"),
    "terrain permuted": _variant(terrain="endpoint", control="terrain permuted"),
    "bias by distance": _variant("model.relative_position=true"),
    "mean wind": _variant(wind="mean"),
    "mean wind, another sample's": _variant(wind="mean", control="wind of another sample"),
    "mean wind, turned": _variant(wind="mean", control="wind turned"),
    "rank": _variant(wind="rank"),
    "rank, another sample's wind": _variant(wind="rank", control="wind of another sample"),
    "rank, wind turned": _variant(wind="rank", control="wind turned"),
    "wind ahead": _variant(AHEAD),
    "wind ahead, another sample's": _variant(AHEAD, control="weather of another sample"),
    "wind ahead, forecast": _variant(AHEAD, "data.forecast=FORECASTS"),
    "advected": _variant(AHEAD, ADVECT),
    "advected, wind turned": _variant(AHEAD, ADVECT, control="path turned"),
}
COMPARED = (
    # run, compared with
    ("terrain", "no prior"),
    ("terrain permuted", "no prior"),
    ("bias by distance", "no prior"),
    ("mean wind", "no prior"),
    ("mean wind, another sample's", "no prior"),
    ("mean wind, turned", "no prior"),
    ("rank", "no prior"),
    ("rank, another sample's wind", "no prior"),
    ("rank, wind turned", "no prior"),
    ("rank", "mean wind"),
    ("wind ahead", "no prior"),
    ("wind ahead, another sample's", "no prior"),
    ("wind ahead, forecast", "no prior"),
    ("advected", "wind ahead"),
    ("advected, wind turned", "wind ahead"),
)
CONTROL_OF = {
    "terrain permuted": "terrain",
    "mean wind, another sample's": "mean wind",
    "mean wind, turned": "mean wind",
    "rank, another sample's wind": "rank",
    "rank, wind turned": "rank",
    "wind ahead, another sample's": "wind ahead",
    "advected, wind turned": "advected",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/physics"), help="folder of the worlds and runs")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the network in each world")
    parser.add_argument("--worlds", type=int, default=3, help="demo worlds")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of a run")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a tiny world; the figures mean nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, with one thread each")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.worlds, options.steps = 1, 1, 2
    context = get_context("spawn")
    runs = [
        (name, world, seed)
        for seed in range(options.seeds)
        for world in range(options.worlds)
        for name in options.only
        if not scores_of(options.out, name, world, seed).exists()
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for made in [pool.submit(make_world, options.out, world, options.quick) for world in range(options.worlds)]:
            made.result()
        begun = [pool.submit(run, options.out, *one, options.steps, options.quick) for one in runs]
        for done in tqdm(as_completed(begun), total=len(begun), desc="runs", disable=not sys.stderr.isatty()):
            done.result()
    return report(options.out, options.only, options.worlds, options.seeds)


def scores_of(out: Path, name: str, world: int, seed: int) -> Path:
    return out / f"world{world}" / "runs" / f"{name.replace(' ', '-').replace(',', '')}-{seed}/evaluation/scores.json"


def make_world(out: Path, number: int, quick: bool) -> None:
    """Simulate and prepare a world, if it is not there."""
    folder = out / f"world{number}"
    if not (folder / "raw").exists():
        days, grid = (14, (8, 12)) if quick else (180, (24, 32))
        make_demo_data(folder / "raw", days, grid, seed=number, progress=False, forecasts=folder / "issued")
    for source, name in (("raw", "data"), ("issued/recipe.yaml", "forecasts")):
        if not (folder / name).exists():
            prepare(load_recipe([str(folder / source)]), folder / name, progress=False)


def run(out: Path, name: str, world: int, seed: int, steps: int, quick: bool) -> None:
    """Train and score one variant. RuntimeError if it did not end well."""
    torch.set_num_threads(1)
    variant, folder = VARIANTS[name], scores_of(out, name, world, seed).parents[1]
    own = [override.replace("FORECASTS", str(out / f"world{world}/forecasts")) for override in variant.overrides]
    arguments = [str(CONFIG), f"data.path={out / f'world{world}/data'}", f"run.dir={folder}", f"run.seed={seed}"]
    arguments += [*FORM, f"train.max_steps={steps}", *own]
    if quick:
        arguments += ["data.train=[[2018-10-02, 2018-10-06]]", "data.test=[[2018-10-07, 2018-10-12]]"]
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        log = stack.enter_context(open(folder / "output.txt", "a", encoding="utf-8"))
        stack.enter_context(redirect_stderr(log))
        # they take longer than the network
        stack.enter_context(mock.patch.object(bases, "RIDGE_SAMPLES", 0))
        for plot in ("plot_skill", "plot_case"):
            stack.enter_context(mock.patch.object(plots, plot))
        stack.enter_context(taken_away(variant.control))
        status = train.main(arguments)
    if status:
        raise RuntimeError(f"{name}, world {world}, seed {seed}: status {status}: {folder / 'output.txt'}")


@contextmanager
def taken_away(control: str) -> Iterator[None]:
    """Take the information of a prior away, while samples are made."""
    if control == "terrain permuted":
        whole_heights = PreparedData.heights_m

        def heights_m(self: PreparedData) -> np.ndarray:
            heights = whole_heights(self)
            return np.random.default_rng(0).permutation(heights.ravel()).reshape(heights.shape)

        patch = mock.patch.object(PreparedData, "heights_m", heights_m)
    elif control in ("wind turned", "wind of another sample"):
        whole_fill = ForecastDataset.fill

        def fill(self: ForecastDataset, indices, batch) -> None:
            whole_fill(self, indices, batch)
            if control == "wind turned":
                batch["wind_ms"].neg_()
                return
            for row, i in enumerate(indices):
                start = self.positions(self.pairs(int(i))[0])[0]
                batch["wind_ms"][row] = torch.from_numpy(np.array(self.data.at(("u", "v"), another(self.data, start))))

        patch = mock.patch.object(ForecastDataset, "fill", fill)
    elif control == "weather of another sample":
        whole_dataset = ForecastData.dataset

        def dataset(self: ForecastData, split, normalization, errors=None, on_progress=lambda: None) -> ForecastDataset:
            return whole_dataset(self, split, normalization, OtherWeather(self.source), on_progress)

        patch = mock.patch.object(ForecastData, "dataset", dataset)
    elif control == "path turned":
        whole_path = AdvectedChannels.fill

        def fill_turned(self: AdvectedChannels, start, wind_ms, anomaly, x) -> None:
            whole_path(self, start, -wind_ms, anomaly, x)

        patch = mock.patch.object(AdvectedChannels, "fill", fill_turned)
    else:
        assert control == "", control
        yield
        return
    with patch:
        yield


class OtherWeather:
    """The weather after the start, of another sample; see `topoflow.data.inputs.WeatherAhead`."""

    def __init__(self, data: PreparedData):
        self._data = data

    def at(self, names: tuple[str, ...], start: int, position: int) -> np.ndarray:
        return self._data.at(names, another(self._data, start) + position - start)


def another(data: PreparedData, start: int) -> int:
    """Return the position that takes the place of a start: APART hours later, round the data's end."""
    usable = len(data.times) - max(LEADS)
    return (start + APART[usable < 2 * APART[0]]) % usable


def report(out: Path, names: list[str], worlds: int, seeds: int) -> int:
    """Print the tables; return 1 if a control has the scores of what it is a control of."""
    pairs = [(world, seed) for world in range(worlds) for seed in range(seeds)]
    rmse = {name: np.array([rmse_by_lead(scores_of(out, name, *pair)) for pair in pairs]) for name in names}
    unwired = [
        control
        for control, of in CONTROL_OF.items()
        if control in rmse and of in rmse and np.any(np.all(rmse[control] == rmse[of], axis=(1, 2)))
    ]
    if unwired:
        print(f"not wired: {', '.join(unwired)}: a run has the scores of one with the prior", file=sys.stderr)
        return 1
    print(f"{worlds} worlds x {seeds} seeds; change of the test RMSE in %, mean over targets (95 % interval)\n")
    rows = []
    for name, other in COMPARED:
        if name in rmse and other in rmse:
            change = 100 * np.log(rmse[name] / rmse[other]).mean(axis=2)  # [pairs, leads]
            endpoint = change[:, [LEADS.index(lead) for lead in ENDPOINT_LEADS]].mean(axis=1)
            rows.append([f"{name} / {other}", interval(endpoint), *(interval(change[:, k]) for k in range(len(LEADS)))])
    print_table(["", "12 and 24 h", *(f"{lead} h" for lead in LEADS)], rows)
    rows = []
    for name in names:
        paths = [scores_of(out, name, *pair) for pair in pairs]
        skill = np.array([rmse_by_lead(path) / rmse_by_lead(path, "climatology_rmse") for path in paths]).mean(
            axis=(1, 2)
        )
        rows.append([name, f"{skill.mean():.3f}", f"{skill.min():.3f} - {skill.max():.3f}"])
    print_table(["RMSE over climatology, mean of targets and leads", "mean", "range of runs"], rows)
    return 0


def rmse_by_lead(path: Path, score: str = "rmse") -> np.ndarray:
    """Return the scores of a run, [leads, targets]."""
    records = json.loads(path.read_text(encoding="utf-8"))
    return np.array([[r[score] for r in records if r["lead_hours"] == lead] for lead in LEADS])


def interval(values: np.ndarray) -> str:
    """Return the mean of values [n] with its 95 % interval."""
    mean = values.mean()
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


if __name__ == "__main__":
    sys.exit(main())
