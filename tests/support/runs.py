"""Whole runs of `training.run.train_rank` on one set of ranks, one after the other."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from configs.load import load_run
from configs.paths import checkpoints_folder
from parallel.start import ProcessRank, start, stop
from tests.support.one_rank import asked_once
from training.checkpoint.manifest import list_checkpoints
from training.run import train_rank


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
