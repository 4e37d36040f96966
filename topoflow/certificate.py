"""The certificate of a checkpoint: what a resumed run must reproduce before its first optimizer step."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import default_collate

from topoflow.checkpoint.fingerprint import fingerprints, moment_updates, state_tensors
from topoflow.checkpoint.state import RestoreReport
from topoflow.config import ARITHMETIC, CHANNELS, NAMES, NETWORK, ORDER, TrainConfig
from topoflow.config_io import Change, combined_effect
from topoflow.errors import ResumeRefused
from topoflow.loss import loss_sums
from topoflow.reproducibility import describe_software, hash_sources
from topoflow.train_state import TrainData, TrainState

PROBE_SAMPLES = 2
"""Samples of the probe batch: the first of the training split with a target that counts."""

NEXT_BATCHES = 2
"""Global batches ahead whose samples are certified."""

LISTED_SAMPLES = 64
"""Next samples that are listed by name; the others are covered by a hash."""

READ_SAMPLES = 8
"""Next samples whose contents are read and hashed; training needs them soon anyway."""

TOLERANCE_WITH_NEW_NAMES = 0.05
"""Largest relative change of the probe loss if checkpoint.allow_new let parameters start fresh."""

ALTERS_CONTENTS = ORDER | CHANNELS
ALTERS_PROBE = ALTERS_CONTENTS | NETWORK | ARITHMETIC
"""Effects of a permitted change that alter the probe loss, so that it cannot be compared."""


@dataclass(frozen=True)
class Proof:
    """The measurements of a proved resume, for the log and resume.json."""

    tensors: int
    samples: int | None
    probe_loss: float
    probe_loss_saved: float
    probe_same_bits: bool
    judged_by: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; a loss that is not a number is None."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}

    def lines(self, world_size: int) -> list[str]:
        """Return lines for the log."""
        tensors = f"{self.tensors} tensors"
        matched = tensors if self.samples is None else f"{tensors} and next {self.samples} samples"
        skipped = "; next samples not compared" if self.samples is None else ""
        saved = "identical to the checkpoint's"
        if not self.probe_same_bits:
            saved = f"{self.probe_loss_saved:.6f} in the checkpoint"
        return [
            f"proof on {world_size} rank(s): {matched} match the certificate{skipped}",
            f"probe loss {self.probe_loss:.6f}, {saved} ({self.judged_by})",
        ]


class Certifier:
    """Certifies the current state of a run, and compares a restored state with a certificate."""

    def __init__(self, state: TrainState, data: TrainData, config: TrainConfig):
        self.state, self.data, self.config = state, data, config
        self._probe_indices: list[int] | None = None

    def certify(self) -> dict[str, Any]:
        """Return rates, position, samples of the next batches and probe loss, as plain values.

        `topoflow.checkpoint.fingerprint.seal` adds the fingerprints of the tensors, once they have been copied.
        """
        loss, probed = self.probe()
        identities = self.next_samples()
        return {
            "learning_rates": self._rates(),
            "scheduler_steps": self.state.scheduler.last_epoch,
            "progress": asdict(self.state.progress),
            "normalization": self.data.train.normalization.fingerprint,
            "next_samples": {
                "count": len(identities),
                "first": identities[:LISTED_SAMPLES],
                "sha256": _digest(identities),
                "contents": self._contents_ahead(),
            },
            "probe": {"loss": loss, "loss_hex": loss.hex(), "samples": probed, "conditions": self._conditions()},
        }

    def check(self, saved: dict[str, Any], report: RestoreReport, changed: Sequence[Change], tolerance: float) -> Proof:
        """Compare the restored state with the certificate `saved` of its checkpoint.

        Args:
            report: what was restored, and what may start fresh.
            changed: config keys that differ from the checkpoint's because checkpoint.allow_changed lists them.
            tolerance: largest relative change of the probe loss if software, sources of the network, device model or
                thread count differ.

        Raises:
            ResumeRefused: naming the first tensor, moment, rate, position or sample that differs, or the probe loss,
                with both values.
        """
        alters = combined_effect(changed)
        self._check_tensors(saved["tensors"], report.new)
        self._check_updates(saved.get("moment_updates"), report.new)
        planned = {name: float(rate).hex() for name, rate in report.learning_rates.items()}
        rates = planned if report.rates_from_config else saved["learning_rates"]
        _require_equal("learning rate of group ", self._rates(), rates)
        position = {"position": self.state.scheduler.last_epoch}
        _require_equal("scheduler ", position, {"position": saved["scheduler_steps"]})
        if "progress" in saved:  # since format 1.2
            _require_equal("progress.", asdict(self.state.progress), saved["progress"])
        if not alters & CHANNELS:
            now = {"fingerprint": self.data.train.normalization.fingerprint}
            _require_equal("normalization ", now, {"fingerprint": saved["normalization"]})
        samples = None if alters & ORDER else self._check_samples(saved["next_samples"])
        now, before = self._conditions(), saved["probe"]["conditions"]
        same_arithmetic = all(now[key] == before.get(key) for key in ("numpy", "device"))
        if same_arithmetic and not alters & ALTERS_CONTENTS:
            _require_equal("contents of next sample ", self._contents_ahead(), saved["next_samples"]["contents"])
        return self._check_probe(saved, samples, report.new, changed, tolerance)

    def probe(self) -> tuple[float, list[str]]:
        """Return the mean loss over the probe batch in eval mode and its samples; nan and [] if no sample counts.

        The batch is read through the data set as in training, anew in each call.
        """
        dataset = self.data.train
        if self._probe_indices is None:
            valid = (index for index in range(len(dataset)) if dataset[index]["valid"].any())
            self._probe_indices = list(itertools.islice(valid, PROBE_SAMPLES))
        samples = [dataset[index] for index in self._probe_indices]
        if not samples:
            return math.nan, []
        device = self.data.elevation_m.device
        batch = {name: tensor.to(device) for name, tensor in default_collate(samples).items()}
        self.state.model.eval()
        with torch.inference_mode():
            sums, counts = loss_sums(self.state.model, batch, self.data.elevation_m, self.config.precision)
        loss = (sums.double().sum() / counts.sum()).item()
        return loss, [dataset.sample_identity(int(sample["index"])) for sample in samples]

    def next_samples(self) -> list[str]:
        """Return the identities of the samples of the next NEXT_BATCHES global batches, in the order of training."""
        ahead = itertools.islice(self._samples_ahead(), NEXT_BATCHES * self.data.plan.global_batch_size)
        return [self.data.train.sample_identity(index) for index in ahead]

    def _contents_ahead(self) -> dict[str, str]:
        """Return hashes of the contents of the first READ_SAMPLES next samples, by identity."""
        indices = itertools.islice(self._samples_ahead(), READ_SAMPLES)
        return {
            self.data.train.sample_identity(index): _digest(
                [text for name, text in sorted(fingerprints(self.data.train[index]).items()) if name != "index"]
            )[:16]
            for index in indices
        }

    def _samples_ahead(self) -> Iterator[int]:
        progress, plan = self.state.progress, self.data.plan
        first = progress.samples_in_epoch
        for epoch in itertools.count(progress.epoch):
            used = plan.order(epoch)[first : plan.steps_per_epoch * plan.global_batch_size]
            yield from map(int, used)
            first = 0

    def _rates(self) -> dict[str, str]:
        return {group["name"]: float(group["lr"]).hex() for group in self.state.optimizer.param_groups}

    def _conditions(self) -> dict[str, Any]:
        """Return what the bits of the probe loss depend on, apart from the state and the data."""
        device = self.data.elevation_m.device
        return {
            **describe_software(device),
            "compile": self.config.compile,
            "precision": self.config.precision,
            "sources of the network": hash_sources("model", "loss.py")[:16],
        }

    def _check_tensors(self, saved: dict[str, str], new: Sequence[str]) -> None:
        now = fingerprints(state_tensors(self.state.model, self.state.optimizer, persistent=True))
        fresh = {name for name in now if name.rpartition(" of ")[2] in new}
        _require_equal("", {name: value for name, value in now.items() if name not in fresh}, saved)

    def _check_updates(self, saved: dict[str, int] | None, new: Sequence[str]) -> None:
        """Compare how many updates each moment has had; saved: None in formats before 1.2."""
        now = moment_updates(self.state.optimizer)
        if saved is not None:
            restored = {name: updates for name, updates in now.items() if name not in new}
            _require_equal("updates of the moments of ", restored, saved)
        updates = self.state.progress.updates
        if updates > 0 and not any(now.values()):
            raise ResumeRefused(
                f"{_NOT_PROVED}: the weights have had {updates} updates but the optimizer's moments have had none: "
                "expected a checkpoint with its moments, or checkpoint.init_from to take its weights only"
            )

    def _check_samples(self, saved: dict[str, Any]) -> int:
        identities = self.next_samples()
        for number, (now, was) in enumerate(zip(identities, saved["first"], strict=False), start=1):
            if now != was:
                raise ResumeRefused(f"{_NOT_PROVED}: next sample {number} is {now}, expected {was}")
        if len(identities) != saved["count"] or _digest(identities) != saved["sha256"]:
            raise ResumeRefused(
                f"{_NOT_PROVED}: the next {len(identities)} samples have the hash {_digest(identities)[:16]}, "
                f"expected {saved['sha256'][:16]} for {saved['count']}"
            )
        return len(identities)

    def _check_probe(
        self,
        certificate: dict[str, Any],
        samples: int | None,
        new: Sequence[str],
        changed: Sequence[Change],
        tolerance: float,
    ) -> Proof:
        saved, (loss, _) = certificate["probe"], self.probe()
        before, same_bits = saved["conditions"], loss.hex() == saved["loss_hex"]
        others = [
            f"{name} {before.get(name)} -> {now}" for name, now in self._conditions().items() if now != before.get(name)
        ]
        difference = abs(loss - saved["loss"]) / max(abs(saved["loss"]), 1e-30)
        # changes that add names are held to the tolerance for new names
        alters = combined_effect(change for change in changed if not (new and change.alters & NAMES))
        if alters & ALTERS_PROBE:
            passed, judged = True, "not compared: the config or the data were changed on purpose"
        elif new:
            passed = difference <= TOLERANCE_WITH_NEW_NAMES
            judged = f"relative difference {difference:.2g}, allowed {TOLERANCE_WITH_NEW_NAMES:g} because of new names"
        elif others:
            passed = same_bits or difference <= tolerance
            judged = f"relative difference {difference:.2g}, allowed {tolerance:g} because of {', '.join(others)}"
        else:
            passed, judged = same_bits, "compared bit for bit"
        if not passed:
            raise ResumeRefused(f"{_NOT_PROVED}: probe loss {_both(loss, saved['loss'])} ({judged})")
        return Proof(len(certificate["tensors"]), samples, loss, saved["loss"], same_bits, judged)


_NOT_PROVED = "the resume is not proved"


def _require_equal(what: str, now: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in [*saved, *(name for name in now if name not in saved)]:
        is_now, was = now.get(name, "absent"), saved.get(name, "absent")
        if is_now != was:
            raise ResumeRefused(f"{_NOT_PROVED}: {what}{name} is {_shown(is_now)}, expected {_shown(was)}")


def _shown(value: Any) -> str:
    """Return a value as text; rates are compared as float.hex and shown as decimals too."""
    text = str(value)
    return f"{float.fromhex(text)!r} ({text})" if text.startswith("0x") else text


def _both(loss: float, saved: float) -> str:
    """Return both losses with four digits, or in full where those are equal."""
    short = [f"{value:.4f}" for value in (loss, saved)]
    now, was = short if short[0] != short[1] else (f"{loss!r}", f"{saved!r}")
    return f"{now}, expected {was}"


def _digest(identities: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(identities).encode()).hexdigest()
