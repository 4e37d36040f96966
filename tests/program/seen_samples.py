"""Record which samples the ranks of a run train on."""

import collections
import json

from topoflow.trainer import Trainer


def note_samples(folder):
    """Make this process append [step, indices of its samples in order] to a file of its own in `folder`."""
    train_step = Trainer.train_step

    def note_and_step(self, batches, **options):
        indices = [index for batch in batches for index in batch["index"].tolist()]
        with (folder / f"{self.context.rank}.jsonl").open("a") as file:
            file.write(json.dumps([self.state.progress.step + 1, indices]) + "\n")
        return train_step(self, batches, **options)

    Trainer.train_step = note_and_step


def noted_samples(folder):
    """Return {step: samples of its global batch, in the order of ranks}."""
    seen = collections.defaultdict(list)
    for path in sorted(folder.iterdir()):
        for step, indices in map(json.loads, path.read_text().splitlines()):
            seen[step] += indices
    return dict(seen)
