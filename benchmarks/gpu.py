"""Everything that needs a GPU in one command: tests, a step at paper scale, NCCL, a resume.

    python -m benchmarks.gpu [--output FILE.json] [--batch-size N] [--only tests|steps|ranks|resume ...]
    python -m benchmarks.gpu --quick --device cpu    # tests this benchmark at a tiny size; the figures mean nothing

Run four parts on the visible devices:

- the tests marked `gpu`;
- a training step (forward, loss, backward, AdamW; terrain and wind on, dropout as in configs/caqra.yaml) in each
  precision, compiled or not, with and without FlexAttention, each in a fresh process. The peak is the fastest large
  square matrix product in the same precision; model FLOPs are those of `benchmarks.flops`. All variants but one run
  with `run.deterministic`, as train.py does by default;
- an all-reduce of one flat gradient of the model and a step under DDP, on one device and on all. Bus bandwidth is
  2 (n - 1) / n times the size over the time, for n devices, as in NVIDIA's nccl-tests;
- a resume: six steps of train.py, and steps four to six again from the checkpoint of step 3, compared bit for bit.

What cannot run here is listed as `not run`, with the reason. The exit status is 1 if a part failed, else 0: a variant
that runs out of memory counts as a result.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.flops import step_flops
from benchmarks.gpu_workers import DROP_RATE, WORKERS
from benchmarks.sizes import SIZES, Size
from benchmarks.tables import print_table, significant, spread
from tests.support.prepared import prepare_world
from topoflow.checkpoint.file import named_tensors, read_checkpoint
from topoflow.reproducibility import describe_software

ROOT = Path(__file__).parents[1]
NOT_DETERMINISTIC = "not deterministic"
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "TF32": {"tf32": True}, "bf16": {"precision": "bf16"}}
VARIANTS = {
    **PRECISIONS,
    "bf16, compiled": {"precision": "bf16", "compile": True},
    **{f"{name}, no FlexAttention": {**keys, "flex_attention": False} for name, keys in PRECISIONS.items()},
    "bf16, compiled, no FlexAttention": {"precision": "bf16", "compile": True, "flex_attention": False},
    f"bf16, compiled, {NOT_DETERMINISTIC}": {"precision": "bf16", "compile": True},
}
"""Keys of TrainConfig for each variant, whose name begins with its precision."""


@dataclass
class Benchmark:
    """The options of a run and its results.

    device: cuda or cpu. output: the file for the results. figures: {part: JSON}. not_run, failed: {item: reason}.
    """

    device: str
    quick: bool
    size: Size
    output: Path | None
    figures: dict[str, Any] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def skip(self, what: str, why: str) -> None:
        """Print and record that something was not run."""
        self.not_run[what] = why
        print(f"not run: {what}: {why}", flush=True)

    def fail(self, what: str, why: str, log: str = "") -> None:
        """Print and record a failure, with the end of its log."""
        self.failed[what] = f"{why}\n{log[-4000:]}" if log else why
        print(f"failed: {what}: {why}", flush=True)

    def run(self, what: str, command: Sequence[str]) -> bool:
        """Run a command of Python in the project's root; False, with its error recorded, if it failed."""
        print(f"running: {what}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(done.stderr)
            self.fail(what, f"exit status {done.returncode}", done.stderr)
        return done.returncode == 0

    def measure(self, worker: str, what: str, processes: int | None = None, **arguments: Any) -> dict[str, Any] | None:
        """Return the result of a worker in a fresh process, or under torchrun; None, recorded, if it failed.

        A quick benchmark starts no process for one worker.
        """
        arguments["device"] = self.device
        if processes is None and self.quick:
            return WORKERS[worker](**arguments)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            call = ["-m", "benchmarks.gpu_workers", json.dumps([worker, arguments]), str(result)]
            succeeded = self.run(what, [*launcher, *call])
            return json.loads(result.read_text()) if succeeded else None

    def write(self) -> None:
        """Write the report, if it was requested."""
        if self.output:
            report = {**self.figures, "not_run": self.not_run, "failed": self.failed}
            self.output.write_text(json.dumps(report, indent=2) + "\n")


def read_line(*command: str) -> str:
    """Return the first line that a command prints; empty if there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return (done.stdout.splitlines() or [""])[0] if done.returncode == 0 else ""


def report_environment(benchmark: Benchmark) -> None:
    """Print and record versions, devices, driver and commit."""
    on_gpu = benchmark.device == "cuda" and torch.cuda.is_available()
    software = describe_software(torch.device("cuda" if on_gpu else "cpu"))
    facts: dict[str, Any] = {"size": str(benchmark.size), **software}
    facts |= {"cuda": torch.version.cuda, "rocm": torch.version.hip, "devices": torch.cuda.device_count()}
    facts["driver"] = read_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    if on_gpu:
        facts["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
    commit = read_line("git", "rev-parse", "HEAD") or "unknown"
    facts["commit"] = f"{commit}, with changes" if read_line("git", "status", "--porcelain") else commit
    benchmark.figures["environment"] = facts
    print("".join(f"{name:<13} {value}\n" for name, value in facts.items()), flush=True)


def run_tests(benchmark: Benchmark) -> None:
    """Run the tests marked gpu."""
    if importlib.util.find_spec("pytest") is None:
        return benchmark.skip("tests marked gpu", "pytest is not installed (extra `test`)")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
        status = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcomes = Counter()
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        results = [child for child in case if child.tag in ("skipped", "failure", "error")]
        outcomes[results[0].tag if results else "passed"] += 1
        for result in results:
            record = benchmark.skip if result.tag == "skipped" else benchmark.fail
            record(name, result.get("message", "").partition("\n")[0])
    if status not in (0, 1):  # 1: a test failed, which is recorded above
        benchmark.fail("tests marked gpu", f"exit status {status} of pytest")
    failures = outcomes["failure"] + outcomes["error"]
    counts = {"passed": outcomes["passed"], "failed": failures, "skipped": outcomes["skipped"]}
    benchmark.figures["tests"] = counts
    print_table(["tests", *counts], [["marked gpu", *map(str, counts.values())]])
    return None


def measure_steps(benchmark: Benchmark) -> None:
    """Measure the peaks, and the step in all variants."""
    sizes = [128] if benchmark.quick else [4096, 8192, 16384]
    found = {p: benchmark.measure("peak", f"peak, {p}", precision=p, matrix_sizes=sizes) for p in PRECISIONS}
    peaks = {name: result["flops_per_second"] for name, result in found.items() if result}
    print_table(["matrix product", "TFLOP/s"], [[name, significant(peak * 1e-12)] for name, peak in peaks.items()])
    rows, steps = [], {}
    for name, keys in VARIANTS.items():
        if benchmark.quick and keys.get("compile"):
            benchmark.skip(f"step, {name}", "--quick does not compile")
            continue
        deterministic = NOT_DETERMINISTIC not in name
        settings = {"size": vars(benchmark.size), "train": keys, "deterministic": deterministic}
        cost = benchmark.measure("step", f"step, {name}", **settings)
        if cost and "seconds" in cost:
            cost["flops_per_second"] = step_flops(benchmark.size) / statistics.median(cost["seconds"])
            cost["peak_flops_per_second"] = peaks.get(name.partition(",")[0])
        steps[name] = cost
        rows.append([name, *_step_cells(cost)])
    benchmark.figures |= {"peaks": peaks, "step_flops": step_flops(benchmark.size), "steps": steps}
    print_table(["one training step", "ms (range)", "GB", "model TFLOP/s", "% of peak"], rows)


def _step_cells(cost: dict[str, Any] | None) -> list[str]:
    if cost is None or "out_of_memory" in cost:
        return ["out of memory" if cost else "failed", "", "", ""]
    reached, peak, held = cost["flops_per_second"], cost["peak_flops_per_second"], cost["peak_bytes"]
    memory = "not measured" if held is None else significant(held * 1e-9)
    share = significant(100 * reached / peak, 2) if peak else "no peak"
    return [spread(cost["seconds"], 1e3), memory, significant(reached * 1e-12), share]


def measure_communication(benchmark: Benchmark) -> None:
    """Measure an all-reduce and a step on one device and on all."""
    if benchmark.device == "cuda" and not dist.is_nccl_available():
        return benchmark.skip("all-reduce and DDP", "this build of torch has no NCCL")
    count = torch.cuda.device_count() if benchmark.device == "cuda" else 2
    rows, found, one = [], {}, None
    for devices in sorted({1, count}):
        what = f"all-reduce and step on {devices} device(s)"
        cost = benchmark.measure("ranks", what, processes=devices, size=vars(benchmark.size))
        found[devices] = cost
        if cost is None:
            continue
        reduced, step = (statistics.median(cost[key]) for key in ("all_reduce_seconds", "step_seconds"))
        cost["bus_bytes_per_second"] = cost["bytes"] / reduced * 2 * (devices - 1) / devices
        one = step if devices == 1 else one
        bus = significant(cost["bus_bytes_per_second"] * 1e-9) if devices > 1 else ""
        times = [spread(cost[key], 1e3) for key in ("all_reduce_seconds", "step_seconds")]
        over_one = f"{step / one:.2f}" if one else ""
        name, size = f"{devices} x {benchmark.device}", significant(cost["bytes"] * 1e-6)
        rows.append([name, size, times[0], bus, times[1], over_one])
    benchmark.figures["communication"] = found
    head = ["devices", "gradient, MB", "all-reduce, ms (range)", "bus GB/s", "bf16 step, ms (range)", "over one"]
    print_table(head, rows)
    if count == 1:
        benchmark.skip("all-reduce and DDP on several devices", "one CUDA device is visible")
    return None


def check_resume(benchmark: Benchmark) -> None:
    """Train six steps, resume from step 3, and compare losses and final tensors bit for bit."""
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        prepare_world(Path(folder) / "world", days=4, grid=(16, 32))
        for precision in ["bf16"] if benchmark.quick else ["fp32", "bf16"]:
            straight, resumed = (Path(folder) / f"{precision}-{name}" for name in ("straight", "resumed"))
            middle = f"checkpoint.resume={straight}/checkpoints/step-00000003"
            command = [*_train_command(benchmark.device, Path(folder)), f"train.precision={precision}"]
            if not (
                benchmark.run(f"training, {precision}", [*command, f"run.dir={straight}"])
                and benchmark.run(f"resume, {precision}", [*command, f"run.dir={resumed}", middle])
            ):
                continue
            before, after = _read_losses(straight), _read_losses(resumed)
            losses = _count_equal({step: before[step] for step in (4, 5, 6)}, after)
            tensors = _count_equal(_read_tensors(straight), _read_tensors(resumed))
            found[precision] = {"losses": losses, "tensors": tensors}
            rows.append([precision, *(f"{equal} of {total}" for equal, total in (losses, tensors))])
            if losses != [3, 3] or tensors[0] < tensors[1]:
                benchmark.fail(f"resume, {precision}", "the resumed run differs from the one that was not interrupted")
    benchmark.figures["resume"] = found
    print_table(["steps 4 to 6, resumed from 3", "equal losses", "equal tensors"], rows)


def _train_command(device: str, folder: Path) -> list[str]:
    config = {
        "run": {"device": device, "threads": 1},
        "data": {"path": str(folder / "world"), "train": [["2018-10-01", "2018-10-03"]], "threads": 0,
                 "lead_times_hours": [6, 12]},
        "model": {"embed_dim": 64, "depth": 2, "num_heads": 2, "drop_rate": DROP_RATE, "drop_path": DROP_RATE},
        "optim": {"schedule_interval": "step"},
        "train": {"max_steps": 6, "global_batch_size": 8, "micro_batch_size": 4, "log_every_steps": 1},
        "checkpoint": {"every_steps": 3, "keep_last": 10},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return ["train.py", str(path)]


def _read_losses(run: Path) -> dict[int, str]:
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {event["step"]: event["loss_hex"] for event in events if event["event"] == "train"}


def _read_tensors(run: Path) -> dict[str, bytes]:
    state = read_checkpoint(run / "checkpoints" / "step-00000006")
    return {name: tensor.numpy().tobytes() for name, tensor in named_tensors(state)}


def _count_equal(one: dict[Any, Any], other: dict[Any, Any]) -> list[int]:
    names = one.keys() | other.keys()
    return [sum(name in one and name in other and one[name] == other[name] for name in names), len(names)]


PARTS = {"tests": run_tests, "steps": measure_steps, "ranks": measure_communication, "resume": check_resume}


def list_work(part: str) -> list[str]:
    """Return what a part consists of, in order."""
    steps = [*(f"peak, {precision}" for precision in PRECISIONS), *(f"step, {variant}" for variant in VARIANTS)]
    ranks = [f"all-reduce and step on {devices}" for devices in ("1 device", "all devices, NCCL")]
    resume = [f"resume, {precision}" for precision in ("fp32", "bf16")]
    return {"tests": ["tests marked gpu"], "steps": steps, "ranks": ranks, "resume": resume}[part]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; refuse an output that cannot be written before the work starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run at a tiny size; the figures mean nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --quick")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument(
        "--batch-size", type=int, default=2, help="samples per step (default: %(default)s, as in caqra)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all figures to this file")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu: expected --quick as well, because a step at paper scale takes minutes on a CPU")
    if options.output:
        try:
            options.output.touch()
        except OSError as error:
            parser.error(f"--output {options.output}: {error.strerror}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run all parts that the machine allows, and list those that it does not."""
    options = parse_arguments(arguments)
    paper = replace(SIZES["c"], batch_size=options.batch_size, warm_up_steps=3, steps=10)
    size = SIZES["tiny"] if options.quick else paper
    benchmark = Benchmark(options.device, options.quick, size, options.output)
    report_environment(benchmark)
    can_run = options.device == "cpu" or torch.cuda.is_available()
    for part in options.only:
        if can_run:
            PARTS[part](benchmark)
            benchmark.write()
        else:
            for what in list_work(part):
                benchmark.skip(what, "no CUDA device is visible")
    if not can_run:
        print("\nNothing was run. Run this on a machine with a GPU; --quick --device cpu tests the benchmark itself.")
    print(f"{len(benchmark.not_run)} not run, {len(benchmark.failed)} failed")
    benchmark.write()
    return 1 if benchmark.failed else 0


if __name__ == "__main__":
    sys.exit(main())
