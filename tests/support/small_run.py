"""One small run of four ranks, and the differences from it that groups of tests need."""

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

Values = dict[str, dict[str, Any]]

# Sections of a whole run file. Its text is the book of `tests.support.data`, in the folder of the test.
SMALL: Values = {
    "run": {"name": "small", "dir": "run"},
    "model": {"layers": 4, "hidden": 64, "heads": 4},
    "data": {"sources": ["book.txt"], "vocab_size": 600, "sequence_length": 32, "split": 0.1},
    "parallel": {"tensor": 2, "pipeline": 2},
    "train": {"micro_batch": 2, "global_batch": 8, "steps": 10, "warmup_steps": 2, "learning_rate": 8e-3},
}

# Data beside the run folders, so that several runs share them.
SHARED_DATA: Values = {"data": {"dir": "data"}}
ONE_RANK: Values = {"parallel": {"tensor": 1, "pipeline": 1}}
# A step takes milliseconds, also where four processes share two cores.
QUICK: Values = {
    "model": {"layers": 2, "hidden": 32},
    "data": {"sequence_length": 16},
}
# One rank that saves after each step, for tests that start it a hundred times.
TINY: Values = {
    **ONE_RANK,
    "model": {"layers": 1, "hidden": 16, "heads": 2},
    "data": {"vocab_size": 400, "sequence_length": 8, "split": 0},
    "train": {"global_batch": 4, "warmup_steps": 1},
    "checkpoint": {"every": 1, "keep": 2},
    "evaluate": {"every": 0},
}
# A job that learns something: held-out text, several checkpoints and validations, all of them kept.
WHOLE_JOB: Values = {
    "data": {"sources": ["book.txt"], "dir": "data", "vocab_size": 2048, "sequence_length": 128, "split": 0.1},
    "train": {"global_batch": 16, "steps": 12, "warmup_steps": 2},
    "checkpoint": {"every": 4, "keep": 100},
    "evaluate": {"every": 5},
}


def small_run(*differences: Mapping[str, Mapping[str, Any]]) -> Values:
    """Return the sections of the small run with some keys changed; the last difference wins."""
    values = copy.deepcopy(SMALL)
    for difference in differences:
        for section, keys in difference.items():
            values.setdefault(section, {}).update(copy.deepcopy(dict(keys)))
    return values


def overrides_of(*parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return sections as overrides of a shipped run: `section.key=value` each."""
    return [
        f"{section}.{key}={json.dumps(value)}"
        for part in parts
        for section, keys in part.items()
        for key, value in keys.items()
    ]


def set_options(overrides: Iterable[str]) -> list[str]:
    """Return overrides as command-line arguments."""
    return [word for override in overrides for word in ("--set", override)]
