"""Whole runs of `training.run.train_rank` on one set of ranks, one after the other."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from configs.load import load_run
from configs.paths import checkpoints_folder, data_folder
from data_pipeline.prepare import prepare_data
from parallel.start import ProcessRank, start, stop
from tests.support.one_rank import asked_once
from tests.support.small_run import QUICK, Values, overrides_of, small_run
from training.checkpoint.manifest import list_checkpoints
from training.run import train_rank


def prepare_quick_run(folder: Path, values: Values) -> list[str]:
    """Write a text of counted lines to a folder, prepare it, and return the overrides of a quick run on it."""
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} counts {i * i} of {i % 7} words, {i % 11} of them odd.\n" for i in range(6000)))
    own_data: Values = {"data": {"sources": [str(text)], "dir": str(folder / "prepared")}}
    overrides = overrides_of(small_run(QUICK, values, own_data))
    config = load_run("demo", overrides=overrides)
    prepare_data(config.data, folder=data_folder(config), progress=False)
    return overrides


@dataclass(frozen=True)
class Start:
    """One start of `trainshort train`.

    Attributes:
        overrides: Overrides of the demo run.
        broken_copy_of: A finished run folder; the start begins from a copy of it, cut back to `after_step`.
        after_step: The last step of the copy, which ends in a torn line of metrics.
    """

    overrides: list[str]
    broken_copy_of: Path | None = None
    after_step: int = 0


@asked_once()
def train_runs(process: ProcessRank, *, starts: list[Start]) -> list[bool]:
    """Train each run in turn, each as a start of the command would; return whether torch computed deterministically."""
    deterministic = []
    for index, each in enumerate(starts):
        config = load_run("demo", overrides=each.overrides)
        if each.broken_copy_of is not None and process.rank == 0:
            _cut_back(each.broken_copy_of, Path(config.run.dir), after_step=each.after_step)
        dist.barrier()
        stop()
        # train_rank starts and stops the groups itself, so it and the next barrier each need a new rendezvous.
        train_rank(config, replace(process, rendezvous=f"{process.rendezvous}_{index}"))
        start(replace(process, rendezvous=f"{process.rendezvous}_{index}_after"))
        deterministic.append(torch.are_deterministic_algorithms_enabled())
    return deterministic


def _cut_back(finished: Path, broken: Path, *, after_step: int) -> None:
    shutil.copytree(finished, broken)
    for checkpoint in list_checkpoints(broken):
        if checkpoint.step > after_step:
            shutil.rmtree(checkpoint.path)
    (checkpoints_folder(broken) / ".step_0000009").mkdir()  # a save that was never finished
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
