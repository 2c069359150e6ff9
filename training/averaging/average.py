"""`trainshort checkpoint average`: the mean of several checkpoints' weights, as the checkpoint of a new run folder."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import InputError
from configs.files import in_use
from configs.load import dump_run
from configs.paths import MANIFEST_NAME, checkpoints_folder, config_file, name_of_folder
from configs.schema import RunConfig
from parallel.parameter import Shard
from training.averaging.chosen import ChosenCheckpoint, choose_checkpoints
from training.averaging.record import mean_of_steps, write_origins
from training.checkpoint.disk import describe_file
from training.checkpoint.manifest import step_folder
from training.checkpoint.read import Checkpoint, open_checkpoint
from training.checkpoint.weights_only import write_weights_only
from training.evaluation.precheck import locate_data
from training.export.folder import new_folder, report_failed_writes, require_space, try_new_folder
from training.families.table import shards_of
from training.state import TrainState

_FP32 = 4


@dataclass(frozen=True)
class AverageResult:
    """An averaged model.

    Attributes:
        checkpoint: Its checkpoint.
        parameters: Number of its parameters.
        averaged: What it is the mean of, in order of their steps; also in averaged.json.
    """

    checkpoint: Path
    parameters: int
    averaged: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        mean = mean_of_steps([each["step"] for each in self.averaged])
        return f"{self.checkpoint}: {self.parameters:,} parameters; {mean}"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"checkpoint": str(self.checkpoint), "parameters": self.parameters, "averaged": list(self.averaged)}


def average_checkpoints(paths: Sequence[Path], *, out: Path, last: int | None = None) -> AverageResult:
    """Write the mean of the weights of several checkpoints as the checkpoint of a new run folder.

    It is named by the newest of their steps. Tensors are read, added in fp64 and written one at a time.

    Args:
        paths: Checkpoints of any layouts, or one run folder for its newest.
        out: A folder that does not exist or is empty.
        last: See `choose_checkpoints`.
    Raises:
        InputError: see `choose_checkpoints`; or a file is altered, or `out` has files.
        MachineError: the disk is too small or failing.
    """
    try_new_folder(out)
    chosen = choose_checkpoints(paths, last=last)
    newest = chosen[-1].manifest
    shards = [*shards_of(chosen[-1].config.model, vocab_size=newest.vocab_size).values()]
    parameters = sum(prod(shard.shape) for shard in shards)
    require_space(out, needed_bytes=_FP32 * parameters)
    opened = [open_checkpoint(each.path) for each in chosen]
    for checkpoint in opened:
        checkpoint.require(dict.fromkeys(shards, ("weight",)))
    config, averaged = _run_config(chosen[-1], out=out), tuple(map(_origin, chosen))
    with ExitStack() as until, new_folder(out) as folder, report_failed_writes(out, undone="averaged"):
        for parent in {checkpoint.path.parent for checkpoint in opened}:
            until.enter_context(in_use(parent))
        step = step_folder(checkpoints_folder(folder), step=newest.step)
        step.mkdir(parents=True)
        write_weights_only(
            step,
            (_mean(shard, opened) for shard in shards),
            shards=shards,
            state=TrainState(newest.step, newest.consumed_samples, left_out_samples=newest.left_out_samples),
            config=config,
            tokenizer=opened[-1].tokenizer,
            vocab_size=newest.vocab_size,
        )
        config_file(folder).write_text(dump_run(config), encoding="utf-8")
        write_origins(folder, averaged)
    return AverageResult(step_folder(checkpoints_folder(out), step=newest.step), parameters, averaged)


def _mean(shard: Shard, checkpoints: Sequence[Checkpoint]) -> Tensor:
    """Return the mean of one whole weight, fp32: the sum is fp64, so that its order changes no digit of fp32."""
    first, *others = checkpoints
    total = first.slice(shard, kind="weight", part=None).double()
    for checkpoint in others:
        total += checkpoint.slice(shard, kind="weight", part=None)
    return total.div_(len(checkpoints)).float()


def _run_config(newest: ChosenCheckpoint, *, out: Path) -> RunConfig:
    """Return the newest checkpoint's run, in another folder, with data that stays where it is."""
    _, data, folder = locate_data(newest.path, config=newest.config)
    # absolute: `evaluate` finds a run's own data from any folder, and that of its average too
    place = folder.absolute() if folder.is_dir() else folder
    run = newest.config.run.model_copy(update={"name": name_of_folder(out), "dir": str(out)})
    return newest.config.model_copy(update={"run": run, "data": data.model_copy(update={"dir": str(place)})})


def _origin(chosen: ChosenCheckpoint) -> dict[str, Any]:
    """Return what says which checkpoint it was: its manifest has the hashes of all its files."""
    try:
        manifest = describe_file(chosen.path / MANIFEST_NAME)
    except OSError as error:  # its run goes on, and has removed it
        raise InputError(f"checkpoint {chosen.path} cannot be read ({error.strerror}): average again") from None
    return {
        "path": str(chosen.path.absolute()),
        "run": chosen.config.run.name,
        "step": chosen.manifest.step,
        "manifest_sha256": manifest.sha256,
    }
