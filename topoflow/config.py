"""The configuration: one frozen dataclass per section, one docstring per key, and what a change of each key alters.

`topoflow.config_io` checks types. Each section checks its own ranges in `__post_init__`; `Config` compares sections.
"""

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from topoflow.errors import ConfigError


class Alters(enum.Flag):
    """What a change of a key alters in a run that resumes with it.

    A key that alters anything may differ from the checkpoint's only where checkpoint.allow_changed lists it; the proof
    of the resume then leaves out what must differ.
    """

    MATHEMATICS = enum.auto()
    """What later steps compute, but nothing that the proof compares."""
    RATES = enum.auto()
    """Learning rates or other settings of the optimizer: those of the config are used."""
    ORDER = enum.auto()
    """Which samples come next, and in which order."""
    CHANNELS = enum.auto()
    """Which inputs and targets the weights are for, and their normalization."""
    NETWORK = enum.auto()
    """The function that the weights compute."""
    NAMES = enum.auto()
    """Which weights there are: allowed with checkpoint.allow_new too."""
    ARITHMETIC = enum.auto()
    """The precision of the forward pass."""


NOTHING = Alters(0)
MATHEMATICS, RATES, ORDER = Alters.MATHEMATICS, Alters.RATES, Alters.ORDER
CHANNELS, NETWORK, NAMES, ARITHMETIC = Alters.CHANNELS, Alters.NETWORK, Alters.NAMES, Alters.ARITHMETIC

DATA_ALTERS = ORDER | RATES
"""What a change of the data alters (`data.fingerprint`). Contents are compared; paths do not matter."""

PARAMETER_GROUPS = ("vit_blocks", "wind_embedding", "head", "others")


def key(
    default: Any = dataclasses.MISSING,
    *,
    alters: Alters,
    default_factory: Callable[[], Any] | Any = dataclasses.MISSING,
) -> Any:
    """Declare a key: a dataclass field that knows what a change of it alters; without a default it is required."""
    return field(default=default, default_factory=default_factory, metadata={"alters": alters})


def _require(section: object, key: str, condition: bool, expected: str) -> None:
    """Refuse the value of `key` in a section unless `condition` holds."""
    if not condition:
        name, value = type(section).__name__.removesuffix("Config").lower(), getattr(section, key)
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{name}.{key}: {shown!r} is not usable: expected {expected}")


@dataclass(frozen=True)
class RunConfig:
    """The run directory, and what makes a run repeatable."""

    dir: str = key("runs/topoflow", alters=NOTHING)
    """Run directory: checkpoints, metrics, TensorBoard events and scores go here."""
    seed: int = key(0, alters=ORDER)
    """Seed of the initial weights, of the order of samples and of every random draw in training."""
    deterministic: bool = key(True, alters=MATHEMATICS)
    """Use only algorithms that give the same bits each time; an operation that has none is an error. They are slower on
    GPUs, and compiled kernels are then not tuned by timing."""
    threads: int | None = key(None, alters=NOTHING)
    """Intra-op threads of each process; it affects the last bits on CPU. Absent: the launcher's (torchrun: 1)."""
    device: Literal["auto", "cpu", "cuda"] = key("auto", alters=NOTHING)
    """Device to compute on; auto takes this process's GPU if there is one (ROCm devices are called cuda too)."""

    def __post_init__(self):
        _require(self, "dir", self.dir != "", "a folder")
        _require(self, "seed", 0 <= self.seed < 2**63, "an integer from 0 to 2**63 - 1")
        _require(self, "threads", self.threads is None or self.threads >= 1, "an integer >= 1, or null")


@dataclass(frozen=True)
class DataConfig:
    """The data, and how they are used."""

    path: str = key(alters=NOTHING)
    """Folder of prepared data, which `topoflow prepare` wrote."""
    train: tuple[int | tuple[str, str], ...] = key(alters=ORDER | RATES)
    """Training split: years, or [start, end] ranges with both ends included (a date alone means its whole day)."""
    validation: tuple[int | tuple[str, str], ...] = key((), alters=MATHEMATICS)
    """Validation split, in the same form."""
    test: tuple[int | tuple[str, str], ...] = key((), alters=NOTHING)
    """Test split, in the same form; scored when training has ended."""
    variables: tuple[str, ...] = key((
        "u", "v", "temp", "rh", "psfc", "pm10", "so2", "no2", "co", "o3", "lat2d", "lon2d", "pm25", "elevation",
        "population",
    ), alters=CHANNELS)  # fmt: skip
    """Input variables, in the order of the network's channels: any that the prepared data have, and computed ones."""
    hours: dict[str, tuple[int, ...]] = key(default_factory=dict, alters=CHANNELS)
    """{variable: hours relative to the start} at which it is an input channel, such as `{u: [0, 12, 24], pm25: [0,
    -24]}`; [0] for a variable that is not listed. Hours after the start are forecast or analysed weather."""
    forecast: str | None = key(None, alters=CHANNELS)
    """Folder of prepared weather forecasts (`steps` of the recipe), of which inputs after the start are read: from the
    latest one that was there at the start, linear between its steps. Absent: they are those of data.path, as if
    forecast without error. Another folder is no change, for contents are compared."""
    forecast_delay_hours: int = key(6, alters=ORDER | RATES)
    """Hours after which a forecast of data.forecast is there, counted from when it was issued."""
    advect: tuple[str, ...] = key((), alters=CHANNELS)
    """Variables of which there is an input for each lead time, carried along the wind of the forecast: the value at the
    start where the air that arrives at the cell then comes from; of a field that does not change, the mean along its
    path. data.hours must give u and v at 0 and up to the longest lead time."""
    targets: tuple[str, ...] = key(("pm25", "pm10", "so2", "no2", "co", "o3"), alters=CHANNELS)
    """Variables to forecast."""
    lead_times_hours: tuple[int, ...] = key((12, 24, 48, 96), alters=ORDER | RATES)
    """Forecast lead times in hours."""
    threads: int = key(1, alters=NOTHING)
    """Threads of each process that load batches in advance; 0 loads each batch when it is needed. No result depends on
    it."""
    normalization: Literal["train"] | dict[str, tuple[float, float]] = key("train", alters=CHANNELS)
    """`train`: mean and standard deviation over the training split; or {variable: [mean, standard deviation]}."""
    anomalies: bool = key(False, alters=CHANNELS)
    """Give the network the targets among its inputs as differences from their climatology; needs a model.base."""
    availability: bool = key(False, alters=CHANNELS)
    """Add the input `available`: the fraction of the dynamic input variables that have a value in the cell."""

    def __post_init__(self):
        _require(self, "train", len(self.train) > 0, "at least one year or [start, end] range")
        for key in ("variables", "targets", "lead_times_hours"):
            values = getattr(self, key)
            _require(self, key, len(values) > 0, "at least one entry")
            _require(self, key, len(set(values)) == len(values), "no entry twice")
        for name, hours in self.hours.items():
            known = name in self.variables and len(hours) > 0 and len(set(hours)) == len(hours)
            _require(self, "hours", known, f"for {name}: hours, none twice, of one of data.variables")
            ahead = name in self.targets and max(hours) > 0
            _require(self, "hours", not ahead, f"for {name}: hours <= 0, because it is forecast (data.targets)")
        leads = list(self.lead_times_hours)
        for name in self.advect:
            once = name in self.variables and self.advect.count(name) == 1
            _require(self, "advect", once, "names of data.variables, none twice")
        _require(self, "lead_times_hours", min(leads) >= 1 and leads == sorted(leads), "increasing hours, each >= 1")
        _require(self, "threads", self.threads >= 0, "an integer >= 0")
        _require(self, "forecast_delay_hours", self.forecast_delay_hours >= 0, "an integer >= 0")
        has_ahead = any(max(hours) > 0 for hours in self.hours.values())
        _require(self, "forecast", self.forecast is None or has_ahead, "hours after the start in data.hours, or null")
        if isinstance(self.normalization, dict):
            deviations = [deviation for _, deviation in self.normalization.values()]
            _require(self, "normalization", all(d > 0 for d in deviations), "[mean, deviation > 0] for each name")


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    img_size: tuple[int, int] | None = key(None, alters=NETWORK)
    """Rows and columns of the grid; absent: taken from the data, present: must agree with them."""
    patch_size: int = key(2, alters=NETWORK)
    """Cells along each side of a patch."""
    embed_dim: int = key(768, alters=NETWORK)
    """Width of a token."""
    depth: int = key(6, alters=NETWORK)
    """Number of transformer blocks."""
    decoder_depth: int = key(2, alters=NETWORK)
    """Hidden layers of the head."""
    num_heads: int = key(8, alters=NETWORK)
    """Attention heads of each block and of the aggregation over variables."""
    mlp_ratio: float = key(4.0, alters=NETWORK)
    """Hidden width of a block's MLP over embed_dim."""
    drop_rate: float = key(0.1, alters=MATHEMATICS)
    """Dropout on embeddings, projections and MLPs."""
    attn_drop_rate: float = key(0.0, alters=MATHEMATICS)
    """Dropout on attention weights, in the blocks of block_dropout, by a slower path; for imported weights: block 0 of
    the published program had it, at its drop_rate."""
    block_dropout: Literal["all", "first", "none"] | None = key(None, alters=MATHEMATICS)
    """Blocks that drop with drop_rate, for imported weights; absent: first with patch_norm or relative_position (as the
    published program did), else all."""
    drop_path: float = key(0.1, alters=MATHEMATICS)
    """Stochastic depth: rate of the last block; it rises linearly from 0 at the first."""
    base: Literal["none", "damped", "seasonal", "ridge"] = key("none", alters=CHANNELS | NETWORK)
    """Forecast in closed form to which the network adds: damped persistence about the climatology of each cell by hour
    of day (damped), or by hour of day and season, where the training split covers the year (seasonal); ridge: a
    regression on past anomalies of the cell and its surroundings, about the climatology of seasonal."""
    leads: Literal["conditioned", "joint"] = key("conditioned", alters=ORDER | CHANNELS | NETWORK | NAMES)
    """conditioned: a sample is a start and a lead time, which the network is told; joint: a sample is a start, and one
    pass forecasts all data.lead_times_hours. train.global_batch_size counts samples, so starts if joint."""
    tokens: Literal["all", "with_data"] = key("all", alters=NETWORK)
    """Patches that are computed. with_data: those with a cell where a target was observed in training (needs a base);
    elsewhere the forecast is the base's, and attention sees no such patch. Gridded stations train several times faster.
    """
    wind: Literal["none", "mean", "rank", "legacy_regional"] = key("mean", alters=NETWORK | NAMES)
    """What tokens get an embedding of. mean: the mean wind over the field; rank: their rank along it; none: no wind.
    legacy_regional: tokens sorted within regions, for imported weights of the published program's predecessor (128 x
    256 cells, patch_size 2)."""
    terrain: Literal["none", "endpoint"] = key("endpoint", alters=NETWORK | NAMES)
    """endpoint: attention of block 0 to higher tokens is damped; none: no damping."""
    elevation_alpha_init: float = key(0.01, alters=NAMES)
    """Initial strength of the terrain term (learned)."""
    relative_position: bool = key(False, alters=NETWORK | NAMES)
    """Bias attention of block 0 by relative position, for imported weights of the published program."""
    patch_norm: bool = key(False, alters=NETWORK | NAMES)
    """Normalize each variable's token before they are aggregated, for imported weights of the published program."""

    def __post_init__(self):
        for key in ("patch_size", "embed_dim", "depth", "num_heads"):
            _require(self, key, getattr(self, key) >= 1, "an integer >= 1")
        _require(self, "img_size", self.img_size is None or min(self.img_size) >= 1, "[rows, columns], each >= 1")
        _require(self, "decoder_depth", self.decoder_depth >= 0, "an integer >= 0")
        heads = self.num_heads
        _require(self, "embed_dim", self.embed_dim % heads == 0, f"a multiple of model.num_heads = {heads}")
        _require(self, "embed_dim", self.embed_dim % 4 == 0, "a multiple of 4 (2-D sin-cos positions)")
        _require(self, "mlp_ratio", self.mlp_ratio > 0, "a number > 0")
        _require(self, "tokens", self.tokens == "all" or self.base != "none", "all with model.base=none")
        plain = not (self.relative_position or self.wind == "legacy_regional")
        _require(self, "tokens", self.tokens == "all" or plain, "all with relative_position or wind=legacy_regional")
        for key in ("drop_rate", "attn_drop_rate", "drop_path"):
            _require(self, key, 0 <= getattr(self, key) < 1, "a number from 0 to below 1")
        _require(self, "elevation_alpha_init", self.elevation_alpha_init >= 0, "a number >= 0")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rates."""

    learning_rate: float = key(1e-4, alters=RATES)
    """Base learning rate; each parameter group multiplies it."""
    weight_decay: float = key(1e-2, alters=RATES)
    """Decoupled weight decay."""
    betas: tuple[float, float] = key((0.9, 0.999), alters=RATES)
    """Decay of AdamW's two moments."""
    eps: float = key(1e-8, alters=RATES)
    """Term that AdamW adds to the denominator."""
    group_multipliers: dict[str, float] = key(
        default_factory=lambda: {"vit_blocks": 0.1, "wind_embedding": 2.0, "head": 0.5, "others": 1.0},
        alters=RATES,
    )
    """Learning rate of each parameter group over the base rate."""
    schedule: Literal["cosine", "constant"] = key("cosine", alters=RATES)
    """cosine: from the group's rate to eta_min over schedule_length, then eta_min; constant: no change."""
    schedule_interval: Literal["epoch", "step"] = key("epoch", alters=RATES)
    """Unit in which the schedule advances."""
    schedule_length: int | None = key(None, alters=RATES)
    """Length of the cosine (T_max) in schedule_interval; absent: the length of the run."""
    eta_min: float = key(1e-6, alters=RATES)
    """Learning rate at the end of the cosine, the same for all groups."""
    warmup_steps: int = key(0, alters=RATES)
    """Optimizer steps over which all rates rise linearly from 0; the schedule itself is not shifted by them."""
    grad_clip_norm: float | None = key(1.0, alters=MATHEMATICS)
    """Largest norm of the gradient over all parameters; null does not clip."""

    def __post_init__(self):
        for key in ("learning_rate", "eps"):
            _require(self, key, getattr(self, key) > 0, "a number > 0")
        for key in ("weight_decay", "eta_min"):
            _require(self, key, getattr(self, key) >= 0, "a number >= 0")
        _require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1")
        groups, multipliers = ", ".join(PARAMETER_GROUPS), self.group_multipliers
        complete = set(multipliers) == set(PARAMETER_GROUPS) and min(multipliers.values()) >= 0
        _require(self, "group_multipliers", complete, f"a number >= 0 for each of {groups}")
        length, clip = self.schedule_length, self.grad_clip_norm
        _require(self, "schedule_length", length is None or length >= 1, "an integer >= 1, or null")
        _require(self, "warmup_steps", self.warmup_steps >= 0, "an integer >= 0")
        _require(self, "grad_clip_norm", clip is None or clip > 0, "a number > 0, or null")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and arithmetic of the training."""

    max_epochs: int | None = key(None, alters=NOTHING)
    """Epochs to train; with max_steps too, whichever ends first."""
    max_steps: int | None = key(None, alters=NOTHING)
    """Optimizer steps to train."""
    global_batch_size: int = key(32, alters=ORDER | RATES)
    """Samples of one optimizer step over all processes: micro_batch_size x world_size x accumulation."""
    micro_batch_size: int = key(4, alters=MATHEMATICS)
    """Samples of one forward pass of one process."""
    precision: Literal["fp32", "bf16"] = key("fp32", alters=ARITHMETIC)
    """bf16: forward under autocast to bfloat16; weights, moments and loss stay in float32."""
    tf32: bool = key(False, alters=ARITHMETIC)
    """On CUDA, round the inputs of float32 matrix products to TF32: several times faster, errors of about 1e-3."""
    compile: bool = key(False, alters=NOTHING)
    """Compile the network with torch.compile."""
    activation_checkpointing: bool = key(False, alters=NOTHING)
    """Recompute each block's activations in the backward pass instead of keeping them."""
    flex_attention: bool = key(True, alters=NOTHING)
    """On GPUs, attend with the terrain bias by FlexAttention, which compiles a kernel; false: torch's plain path,
    which stores several values per head and pair of tokens."""
    early_stopping_patience: int | None = key(None, alters=NOTHING)
    """Stop after this many validations in a row without a new best; null never stops early."""
    validate_every_steps: int | None = key(None, alters=NOTHING)
    """Optimizer steps between validations; absent: at the end of each epoch. Always at the end of the run."""
    log_every_steps: int = key(10, alters=NOTHING)
    """Optimizer steps between lines of metrics.jsonl."""

    def __post_init__(self):
        ends = self.max_epochs is not None or self.max_steps is not None
        _require(self, "max_steps", ends, "max_steps or max_epochs to be set")
        for key in ("max_epochs", "max_steps", "early_stopping_patience", "validate_every_steps"):
            value = getattr(self, key)
            _require(self, key, value is None or value >= 1, "an integer >= 1, or null")
        for key in ("global_batch_size", "micro_batch_size", "log_every_steps"):
            _require(self, key, getattr(self, key) >= 1, "an integer >= 1")
        micro = self.micro_batch_size
        divides = self.global_batch_size % micro == 0
        _require(self, "global_batch_size", divides, f"a multiple of train.micro_batch_size = {micro}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and what a run starts from."""

    every_steps: int | None = key(1000, alters=NOTHING)
    """Optimizer steps between checkpoints; null: only at a new best, at a stop and at the end."""
    keep_last: int = key(3, alters=NOTHING)
    """How many of the newest checkpoints to keep."""
    keep_best: bool = key(True, alters=NOTHING)
    """Keep the checkpoint with the lowest validation loss as well, and save one whenever it falls."""
    resume: str = key("auto", alters=NOTHING)
    """auto: from the newest checkpoint of the run directory, if any; never: a new run; or a checkpoint's path."""
    init_from: str | None = key(None, alters=NOTHING)
    """Fine-tune: take the weights of this checkpoint (or run) and start at step 0. Nothing else is restored."""
    allow_new: tuple[str, ...] = key((), alters=NOTHING)
    """Names (or globs) of weights and buffers that may be absent from the checkpoint; they start fresh."""
    allow_changed: tuple[str, ...] = key((), alters=NOTHING)
    """Config keys (or globs) that alter the mathematics but may still differ from the checkpoint's."""
    probe_tolerance: float = key(1e-5, alters=NOTHING)
    """Largest relative change of the probe loss on a resume with other software, sources of the network, device
    model or thread count."""
    validate_on_resume: bool = key(False, alters=NOTHING)
    """Run the whole validation after a restore, before the first step, and log it next to the checkpoint's."""
    on_error: Literal["stop", "continue"] = key("stop", alters=NOTHING)
    """After a failed save: stop the run, or log the failure and continue to the next save."""

    def __post_init__(self):
        every = self.every_steps
        _require(self, "every_steps", every is None or every >= 1, "an integer >= 1, or null")
        _require(self, "keep_last", self.keep_last >= 1, "an integer >= 1")
        _require(self, "probe_tolerance", self.probe_tolerance >= 0, "a number >= 0")
        _require(self, "resume", self.resume != "", "auto, never or the path of a checkpoint")
        either = self.init_from is None or self.resume in ("auto", "never")
        _require(self, "init_from", either, "no checkpoint.resume=PATH with it: a run either resumes or fine-tunes")


@dataclass(frozen=True)
class DistributedConfig:
    """The processes and their communication."""

    backend: Literal["auto", "nccl", "gloo"] = key("auto", alters=NOTHING)
    """auto: nccl (RCCL on AMD) on GPUs, gloo on CPU."""
    setup_timeout_seconds: float = key(600.0, alters=NOTHING)
    """How long to wait for all processes at start."""
    timeout_seconds: float = key(600.0, alters=NOTHING)
    """How long a collective operation may wait for the slowest process."""
    verify_every_steps: int | None = key(1000, alters=NOTHING)
    """Optimizer steps between proofs that all processes hold the same state; null: only at start and after a resume."""
    reduction: Literal["ddp", "canonical"] = key("ddp", alters=MATHEMATICS)
    """How gradients are summed over processes. canonical: bit-identical on 1, 2, 4 ... (with run.threads set)."""

    def __post_init__(self):
        for key in ("setup_timeout_seconds", "timeout_seconds"):
            _require(self, key, 0 < getattr(self, key) <= 1e7, "seconds > 0, at most 1e7")  # gloo refuses much more
        every = self.verify_every_steps
        _require(self, "verify_every_steps", every is None or every >= 1, "an integer >= 1, or null")


@dataclass(frozen=True)
class Config:
    """All sections; each consumer receives its own."""

    data: DataConfig
    train: TrainConfig
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self):
        has_wind = {"u", "v"} <= set(self.data.variables)
        wind, anomalies = self.model.wind, self.data.anomalies
        _require(self.data, "anomalies", not anomalies or self.model.base != "none", "false with model.base=none")
        _require(self.data, "variables", wind == "none" or has_wind, f"u and v among them for model.wind={wind}")
        validates = not self.checkpoint.validate_on_resume or len(self.data.validation) > 0
        _require(self.checkpoint, "validate_on_resume", validates, "a data.validation split to validate on")
        judged = self.train.early_stopping_patience is None or len(self.data.validation) > 0
        _require(self.train, "early_stopping_patience", judged, "a data.validation split")
