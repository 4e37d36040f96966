"""A model of step, start, resume and file-system load at paper scale, from bytes, operations and link speeds.

This is arithmetic, not a measurement of a large machine: each assumption is a constant below with its source.
`python -m benchmarks.scaling --model` prints it; docs/scaling.md interprets it.
"""

import math
from dataclasses import dataclass

from benchmarks.flops import step_flops
from benchmarks.sizes import SIZES as MODEL_SIZES

SIZES = (8, 64, 400, 4096)


@dataclass(frozen=True)
class Machine:
    """Devices and links. Peak numbers are the vendors'; the fraction that is reached is assumed below."""

    name: str
    devices_per_node: int
    device_flops: float
    """Dense bf16, per second."""
    node_bytes_per_second: float
    """Of all network interfaces of a node, one direction."""


MACHINES = (
    # AMD Instinct MI250X data sheet: 383 TFLOP/s bf16 in two dies; LUMI-G: four 200 Gbit/s Slingshot-11 links a node
    Machine("MI250X dies, 8 a node, 4 x 200 Gbit/s", 8, 191.5e12, 100e9),
    # NVIDIA H100 SXM data sheet: 989 TFLOP/s dense bf16; DGX H100: eight 400 Gbit/s InfiniBand links for compute
    Machine("H100, 8 a node, 8 x 400 Gbit/s", 8, 989e12, 400e9),
)

# The workload: the published configuration (DESIGN.md), CAQRA 2013-2018 hourly, one sample a device and step.
PARAMETERS = 52e6
FLOPS_PER_SAMPLE = step_flops(MODEL_SIZES["c"])
CELLS, DYNAMIC_INPUTS, TARGETS = 128 * 256, 11, 6

# Fractions of the peak that are reached. Assumed; only the ratio of computing to sending depends on them.
COMPUTE_EFFICIENCY, LINK_EFFICIENCY = 0.3, 0.6

# Seconds. The first is NCCL's own estimate for a large message over a network (src/graph/tuning.cc, hwLat, Simple);
# a TCP message between hosts and a request to the store are assumed, about twice the time on one idle machine.
DEVICE_HOP_SECONDS, HOST_MESSAGE_SECONDS, STORE_REQUEST_SECONDS = 14e-6, 30e-6, 60e-6
HOST_BYTES_PER_SECOND = 2.5e9
"""One TCP connection; assumed."""
DISK_BYTES_PER_SECOND = 1.5e9
"""Rank 0 reads and verifies one file of a parallel file system; assumed."""
METADATA_PER_SECOND = 1e5
"""Requests that a metadata server answers; assumed. All jobs share it."""

# Counted on this program (docs/scaling.md has the commands).
IMPORTED_NAMES = 7500
"""Distinct names that a process opens or looks up before it trains: the requests of a node that caches them."""
GATHERS_AT_START = 12
TABLE_NUMBERS = 12
"""Doubles that a rank contributes when a loss is logged: sums and counts of six targets."""
INDEX_BYTES = 1.9e6
LOG_EVERY_STEPS = 10
"""The default of train.log_every_steps."""
PROBE_SAMPLES = 10
"""Samples that each rank reads in the proof of a resume."""

GRADIENT_BYTES = 4 * PARAMETERS
CHECKPOINT_BYTES = 3 * GRADIENT_BYTES
READS_PER_SAMPLE = DYNAMIC_INPUTS + TARGETS + 2
"""Fields: inputs, targets, and the wind again."""
BUCKET_BYTES, PIECE_BYTES = 25 * 2**20, 64 * 2**20


@dataclass(frozen=True)
class Prediction:
    """Costs at one number of devices: seconds, unless the name has another unit."""

    compute: float
    gradient: float
    agreement: float
    table: float
    full_mesh: float
    roll_call: float
    index: float
    gathers: float
    gathers_in_a_ring: float
    restore_read: float
    restore_send: float
    import_lookups: float
    probe_bytes: float
    read_bytes_per_second: float
    files_of_rank_0: float

    @property
    def step(self) -> float:
        """Seconds of a step without any overlap of computing and sending: an upper limit."""
        return self.compute + self.gradient + self.agreement + self.table / LOG_EVERY_STEPS


def predict(machine: Machine, devices: int) -> Prediction:
    """Return the prediction for one number of devices."""
    nodes = math.ceil(devices / machine.devices_per_node)
    depth, node_depth = math.ceil(math.log2(devices)), math.ceil(math.log2(nodes))
    link = machine.node_bytes_per_second * LINK_EFFICIENCY
    compute = FLOPS_PER_SAMPLE / (machine.device_flops * COMPUTE_EFFICIENCY)
    # each byte enters and leaves a node twice for any ring; plus a tree's latency for each bucket
    gradient = 2 * (devices - 1) / devices * GRADIENT_BYTES / link
    gradient += math.ceil(GRADIENT_BYTES / BUCKET_BYTES) * 2 * node_depth * DEVICE_HOP_SECONDS
    # up a tree, which sends each row once to rank 0, and down by broadcast, which sends all rows at each level
    table_bytes = 8 * TABLE_NUMBERS * devices
    table = 2 * depth * HOST_MESSAGE_SECONDS + (1 + depth) * table_bytes / HOST_BYTES_PER_SECOND
    pieces = math.ceil(CHECKPOINT_BYTES / PIECE_BYTES)
    agreement = 2 * node_depth * DEVICE_HOP_SECONDS  # four numbers, all-reduced on the devices
    step = compute + gradient + agreement + table / LOG_EVERY_STEPS
    return Prediction(
        compute=compute,
        gradient=gradient,
        agreement=agreement,
        table=table,
        full_mesh=devices**2 * STORE_REQUEST_SECONDS,
        roll_call=devices * STORE_REQUEST_SECONDS,
        index=depth * (HOST_MESSAGE_SECONDS + INDEX_BYTES / HOST_BYTES_PER_SECOND),
        gathers=GATHERS_AT_START * 2 * depth * 2 * HOST_MESSAGE_SECONDS,
        gathers_in_a_ring=GATHERS_AT_START * 2 * (devices - 1) * HOST_MESSAGE_SECONDS,
        restore_read=CHECKPOINT_BYTES / DISK_BYTES_PER_SECOND,
        restore_send=CHECKPOINT_BYTES / link + pieces * (nodes - 1) * DEVICE_HOP_SECONDS,
        import_lookups=nodes * IMPORTED_NAMES,
        probe_bytes=devices * PROBE_SAMPLES * READS_PER_SAMPLE * 4 * CELLS,
        read_bytes_per_second=devices * READS_PER_SAMPLE * 4 * CELLS / step,
        files_of_rank_0=2 * devices + 2 * depth + 40,
    )


def print_model() -> None:
    """Print a table for each machine, in Markdown."""
    print(f"{PARAMETERS / 1e6:.0f} M parameters, {FLOPS_PER_SAMPLE / 1e12:.1f} TFLOP a sample, one sample a device\n")
    for machine in MACHINES:
        found = [predict(machine, devices) for devices in SIZES]
        print(f"| {machine.name} | {' | '.join(f'{size:,}' for size in SIZES)} |\n|---|{'--:|' * len(SIZES)}")
        for title, text in _rows(found).items():
            print(f"| {title} | {' | '.join(text)} |")
        print()


def _rows(found: list[Prediction]) -> dict[str, list[str]]:
    def show(what: str, scale: float = 1.0) -> list[str]:
        return [_show(scale * getattr(prediction, what)) for prediction in found]

    lookups = [_show(prediction.import_lookups / METADATA_PER_SECOND) for prediction in found]
    return {
        "computing, ms": show("compute", 1e3),
        "sum of gradients, ms": show("gradient", 1e3),
        "flags of a step, ms": show("agreement", 1e3),
        "table of losses, in logged steps, ms": show("table", 1e3),
        "step without overlap, ms": show("step", 1e3),
        "computing in a step, %": [_show(100 * prediction.compute / prediction.step) for prediction in found],
        "rendezvous of the ranks, s": show("roll_call"),
        "broadcast of the index, s": show("index"),
        "gathers until the first step, s": show("gathers"),
        "(the same in a ring, s)": show("gathers_in_a_ring"),
        "(gloo's full mesh, s)": show("full_mesh"),
        "restore: read and verify, s": show("restore_read"),
        "restore: broadcast, s": show("restore_send"),
        "files that rank 0 has open": show("files_of_rank_0"),
        "names looked up by imports, thousands": show("import_lookups", 1e-3),
        "the same at the metadata server, s": lookups,
        "read for the proof of a resume, GB": show("probe_bytes", 1e-9),
        "fields read, GB/s": show("read_bytes_per_second", 1e-9),
    }


def _show(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
