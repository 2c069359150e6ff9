"""Train and profile small runs by the command line, on a text of random words, for benchmarks."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

VOCABULARY = 8192
WARM_UP = 1  # its step compiles what is compiled, and allocates
_WORDS, _TEXT = 12_000, 160_000


@dataclass(frozen=True)
class Shape:
    """Shape of a model and of its batch."""

    hidden: int
    heads: int
    layers: int
    length: int
    batch: int = 1

    def overrides(self) -> list[str]:
        """Return the keys of a run of this shape: one rank, no validation, no save but the last."""
        return [
            f"model.hidden={self.hidden}",
            f"model.heads={self.heads}",
            f"model.layers={self.layers}",
            f"data.sequence_length={self.length}",
            f"train.micro_batch={self.batch}",
            f"train.global_batch={self.batch}",
            "parallel.tensor=1",
            "parallel.pipeline=1",
            "evaluate.every=0",
            "checkpoint.every=1000",
        ]


@dataclass(frozen=True)
class Steps:
    """Steps of a run after the warm-up, and the run's folder."""

    run_dir: Path
    seconds: list[float]
    tokens_per_second: float
    memory_gb: float

    @property
    def median(self) -> float:
        """The median of the steps' seconds."""
        return median(self.seconds)


class Bench:
    """A folder with prepared data, in which runs are trained.

    Args:
        folder: An empty folder.
        data: Further keys, for another text than random words.
    """

    def __init__(self, folder: Path, *, data: Sequence[str] = ()) -> None:
        self._folder, self._runs = folder, 0
        draw = random.Random(1)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(_WORDS)]
        weights = [1 / (rank + 10) for rank in range(_WORDS)]  # as in text: few words are frequent
        (folder / "words.txt").write_text(" ".join(draw.choices(words, weights, k=_TEXT)), encoding="utf-8")
        self._data = [
            f"data.sources=[{folder / 'words.txt'}]",
            f"data.dir={folder / 'data'}",
            f"data.vocab_size={VOCABULARY}",
            "data.split=0",
            "track.uri=" + f"sqlite:///{folder / 'mlflow.db'}",
            *data,
        ]
        self.call("prepare", "demo", ["evaluate.every=0", f"run.dir={folder / 'prepared'}"])

    def train(
        self, overrides: Sequence[str], *, steps: int, ranks: int = 1, environment: Mapping[str, str] | None = None
    ) -> Steps:
        """Train a run of its own by `trainshort train`, and return its steps from metrics.jsonl."""
        run_dir = self._new_run()
        keys = [*overrides, f"run.dir={run_dir}", f"train.steps={steps + WARM_UP}", "train.warmup_steps=1"]
        self.call("train", "demo", keys, options=["--ranks", str(ranks)], environment=environment)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
        seconds = [line["step_seconds"] for line in lines]
        tokens = lines[0]["tokens_per_second"] * seconds[0]
        return Steps(run_dir, seconds, tokens / median(seconds), max(line["memory_gb"] for line in lines))

    def profile(self, overrides: Sequence[str], *, steps: int) -> dict[str, Any]:
        """Profile a run by `trainshort profile`, and return its report."""
        keys = [*overrides, f"run.dir={self._new_run()}", "train.steps=100", "train.warmup_steps=1"]
        text = self.call("profile", "demo", keys, options=["--json", "--ranks", "1", "--steps", str(steps)])
        document: dict[str, Any] = json.loads(text)
        return document

    def _new_run(self) -> Path:
        self._runs += 1
        return self._folder / f"run{self._runs}"

    def command(self, command: str, run: str, overrides: Sequence[str], *, options: Sequence[str] = ()) -> list[str]:
        """Return the command line of a run on this data."""
        sets = [word for override in [*self._data, *overrides] for word in ("--set", override)]
        return [sys.executable, "-P", "-m", "trainshort", command, run, *options, *sets]

    def call(
        self,
        command: str,
        run: str,
        overrides: Sequence[str],
        *,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command, and return what it writes.

        Raises:
            RuntimeError: it fails; with the end of what it says.
        """
        done = subprocess.run(
            self.command(command, run, overrides, options=options),
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"trainshort {command} failed: {done.stderr[-2000:]}")
        return done.stdout
