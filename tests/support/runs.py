"""Whole runs of `training.run.train` on one set of ranks, one after the other."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from configs.load import load_run
from configs.paths import checkpoints_folder
from parallel.start import ProcessRank, start, stop
from training.checkpoint.manifest import list_checkpoints
from training.run import train_rank


@dataclass(frozen=True)
class Start:
    """One start of `trainshort train`.

    Attributes:
        overrides: Of the demo run.
        broken_copy_of: A finished run folder whose state after `after_step` the run folder is given first.
        after_step: The step after which that run is taken to have died, writing a line of metrics.
    """

    overrides: list[str]
    broken_copy_of: Path | None = None
    after_step: int = 0


def train_runs(place: ProcessRank, *, starts: list[Start]) -> None:
    """Train each run in turn, as so many starts of the command would."""
    for index, asked in enumerate(starts):
        config = load_run("demo", overrides=asked.overrides)
        if asked.broken_copy_of is not None and place.rank == 0:
            _cut_back(asked.broken_copy_of, Path(config.run.dir), after_step=asked.after_step)
        dist.barrier()
        stop()
        meet = dataclasses.replace(place, rendezvous=f"{place.rendezvous}_{index}")
        train_rank(config, meet)
        start(dataclasses.replace(meet, rendezvous=f"{meet.rendezvous}_after"))


def _cut_back(finished: Path, broken: Path, *, after_step: int) -> None:
    shutil.copytree(finished, broken)
    for checkpoint in list_checkpoints(broken):
        if checkpoint.step > after_step:
            shutil.rmtree(checkpoint.path)
    (checkpoints_folder(broken) / ".step_0000009").mkdir()  # one that was never finished
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
