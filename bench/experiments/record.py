"""What an experiment has done so far, kept so that it can be resumed, and what came out."""

import csv
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import PROGRAM, report
from ..demo import Progress

# Options that say nothing of an experiment, and those that change no run of it: more seeds are more runs.
_NOT_KEPT = {"command", "experiment", "out", "resume", "threads"}
_FREE = {"seeds", "speed_only"}


@dataclass(frozen=True)
class Claim:
    """A published statement beside what was found here; ``holds`` None where this run cannot tell."""

    about: str
    published: str
    ours: str
    holds: bool | None

    @property
    def verdict(self):
        """In one word or two."""
        return {True: "confirmed", False: "**differs**", None: "not tested"}[self.holds]


class Record:
    """The runs of an experiment: ``name.json`` is written after each epoch, beside a checkpoint of each run.

    ``runs``: {name: {"key": {...}, "history": [an entry per epoch], "result": {...} or None while it goes on}}.

    Raises:
        ValueError: ``resume``, and what is in ``folder`` was made with other options.
    """

    def __init__(self, name, folder, options, where, resume=False):
        self.name, self.folder, self.where = name, Path(folder), where
        self.settings = {key: value for key, value in vars(options).items() if key not in _NOT_KEPT}
        # What a page says beside its tables: which counts were asserted.
        self.asserted = ""
        self.runs = {}
        self._checkpoints = self.folder / "checkpoints"
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        if resume and self.path(".json").exists():
            self._load()
        else:
            for stale in self._checkpoints.glob("*.pt"):
                stale.unlink()

    def path(self, suffix):
        """Where ``name`` + ``suffix`` lies."""
        return self.folder / (self.name + suffix)

    def _load(self):
        file = self.path(".json")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found, self.runs = content["settings"], content["runs"]
        except (ValueError, KeyError, TypeError) as damaged:
            raise ValueError(f"{file} is not what `{PROGRAM} experiment` wrote: {damaged}") from damaged
        settings = json.loads(json.dumps(self.settings))
        for key in {**found, **settings}:
            if key in _FREE or found.get(key) == settings.get(key):
                continue
            raise ValueError(f"{file} was made with --{key} {found.get(key)}, not {settings.get(key)}")
        for run, entry in self.runs.items():
            if (self._checkpoints / f"{run}.pt").exists():
                entry["history"] = self._restore(run)["history"]

    def _restore(self, run):
        return torch.load(self._checkpoints / f"{run}.pt", weights_only=True)

    def run(self, **key):
        """(name, entry) of the run that ``key`` names, new or continued."""
        name = "-".join(str(value).replace("/", "_").replace(" ", "_") for value in key.values())
        return name, self.runs.setdefault(name, {"key": key, "history": [], "result": None})

    def select(self, **key):
        """The finished entries whose keys agree with ``key``, in order."""
        return [
            entry
            for entry in self.runs.values()
            if entry["result"] is not None and all(entry["key"].get(name) == value for name, value in key.items())
        ]

    def save(self, **more):
        """Write the JSON file, whole or not at all."""
        content = {"environment": self.where, "settings": self.settings, "runs": self.runs, **more}
        _replace(self.path(".json"), lambda file: file.write_text(json.dumps(content, indent=1) + "\n", "utf-8"))

    def done(self):
        """Epochs that all runs have made."""
        return sum(len(entry["history"]) for entry in self.runs.values())

    def train(self, key, make, batches, steps, epochs, evaluate, finish=None, penalty=None, after=None, save_every=1):
        """Train a model, from its checkpoint where there is one; returns it.

        Args:
            key: what tells the run from others.
            make: returns (model, optimizer) before the first step, always the same ones.
            batches: called with the number of the first step, returns an iterator of (images, labels).
            steps: of an epoch.
            evaluate: called with the model after an epoch, returns what its history entry holds beside the mean loss
                and the share of training images that were right (in training mode, before each step).
            finish: called with model and history at the end, returns the result.
            penalty: called with the model, returns what is added to the loss.
            after: called with nothing after each epoch.
            save_every: epochs between checkpoints.
        """
        name, entry = self.run(**key)
        model, optimizer = make()
        checkpoint = self._checkpoints / f"{name}.pt"
        if entry["history"]:
            saved = self._restore(name)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        history = entry["history"]
        model.train()
        stream = batches(len(history) * steps)
        while len(history) < epochs:
            start = time.perf_counter()
            total, right, count = 0.0, 0, 0
            for _ in range(steps):
                x, y = next(stream)
                optimizer.zero_grad(set_to_none=True)
                logits = model(x)
                loss = F.cross_entropy(logits, y)
                (loss if penalty is None else loss + penalty(model)).backward()
                optimizer.step()
                total += loss.item()
                right += int((logits.argmax(1) == y).sum())
                count += len(y)
            history.append(
                {
                    "epoch": len(history) + 1,
                    "loss": total / steps if math.isfinite(total) else None,
                    "train_accuracy": right / count,
                    "seconds": time.perf_counter() - start,
                    **evaluate(model),
                }
            )
            if len(history) % save_every == 0 or len(history) == epochs:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
                _replace(checkpoint, lambda file, state=state: torch.save(state, file))
                self.save()
            if after is not None:
                after()
        if entry["result"] is None:
            entry["result"] = {} if finish is None else finish(model, history)
            self.save()
        return model

    def progress(self, epochs, describe):
        """Returns a function that counts one of ``epochs`` as done and shows a bar with the time left."""
        done = self.done()
        bar = Progress(epochs, describe, done)

        def after():
            nonlocal done
            done += 1
            bar(done)

        return after

    def write_csv(self):
        """One line for each entry of each history; returns the path."""
        rows = [{**entry["key"], **line} for entry in self.runs.values() for line in entry["history"]]
        rows = [{k: v for k, v in row.items() if not isinstance(v, list | dict)} for row in rows]
        with open(self.path(".csv"), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
        return self.path(".csv")


def _replace(path, write):
    """Write a file beside ``path`` and rename it, so that a cut never leaves half of one."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def page_of(title, record, sentences, claims, tables):
    """The Markdown page of an experiment.

    Args:
        sentences: paragraphs below the conditions.
        claims: a list of Claim.
        tables: (heading, header, lines) of each further table.
    """
    lines = [f"# {title}", "", *report.conditions(record.where), ""]
    for sentence in sentences:
        lines += [sentence, ""]
    rows = [(claim.about, claim.published, claim.ours, claim.verdict) for claim in claims]
    lines += [*report.table(("", "published", "here", "verdict"), rows), ""]
    for heading, header, body in tables:
        lines += [f"## {heading}", "", *report.table(header, body), ""]
    return "\n".join(lines)


def spread(values, digits=3):
    """Mean and range of some numbers in a few characters."""
    values = list(values)
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"
