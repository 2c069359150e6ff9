"""RUN_DIR/rollbacks.json: how often a run that diverged went back, and which samples it left out. Imports no torch.

A run goes back to a checkpoint that was saved before it diverged, and goes on with the samples after those of the
divergence. Whenever training comes by that step at that sample, it leaves them out: also after a resume from an earlier
checkpoint, or in another run folder that has a copy of this file. Later checkpoints have their number in the manifest.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from configs.errors import InputError
from configs.figures import counted
from configs.files import move_aside, write_json
from configs.load import load_run
from configs.paths import config_file, evaluation_folder, rollbacks_file
from configs.schema import Train
from configs.schema_problems import first_problem
from training.checkpoint.manifest import Manifest, list_checkpoints, read_manifest
from training.checkpoint.retention import remove_after
from training.divergence import LOSSES_WATCHED, Diverged
from training.incarnation import Fence
from training.metrics_reader import newest_values, read_steps, steps_before_first
from training.state import JsonInt, TrainState
from training.step_columns import StepColumns

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollback:
    """One return to a checkpoint.

    Attributes:
        step: The checkpoint's.
        next_sample: Place of the sample that followed it, in the stream.
        left_out: Samples of the stream that follow there and are left out.
        from_step: The step after which the run went back.
        why: What was seen, in words.
        at: When, in ISO 8601.
    """

    step: JsonInt
    next_sample: JsonInt
    left_out: JsonInt
    from_step: JsonInt
    why: str
    at: str


@dataclass(frozen=True)
class _Rollbacks:
    """The file: the run's own rollbacks, and of a branch those that its trunk had at its beginning."""

    rollbacks: list[Rollback]
    inherited: list[Rollback] = field(default_factory=list)


_ADAPTER: TypeAdapter[_Rollbacks] = TypeAdapter(_Rollbacks)


def _read(run_dir: Path) -> _Rollbacks:
    file = rollbacks_file(run_dir)
    try:
        return _ADAPTER.validate_json(file.read_bytes())
    except FileNotFoundError:
        return _Rollbacks([])
    except (ValidationError, OSError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else str(error.strerror)
        raise InputError(
            f"{file} is damaged ({why}): repair it, or move it away; then samples on which training diverged may "
            "follow again"
        ) from None


def _write(run_dir: Path, rollbacks: _Rollbacks, *, fence: Fence) -> None:
    write_json(rollbacks_file(run_dir), asdict(rollbacks), mark=f".{fence.token}")


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """Return a run's own rollbacks, oldest first.

    Raises:
        InputError: the file is damaged.
    """
    return _read(run_dir).rollbacks


def rollbacks_of(run_dir: Path) -> list[Rollback]:
    """Return the rollbacks whose samples a run leaves out: of a branch, first those that it inherited.

    Raises:
        InputError: the file is damaged.
    """
    known = _read(run_dir)
    return [*known.inherited, *known.rollbacks]


def inherit_rollbacks(train: Train, *, fence: Fence) -> None:
    """Write down, when a branch begins, which samples its trunk leaves out: later the trunk may change, or be gone.

    Raises:
        InputError: a file is damaged.
        Superseded: a newer start of the run has taken over.
        OSError: the disk fails.
    """
    fence.check()
    inherited, known = rollbacks_of(trunk_folder(train)), _read(fence.run_dir)
    if inherited != known.inherited:
        _write(fence.run_dir, replace(known, inherited=inherited), fence=fence)


def trunk_folder(train: Train) -> Path:
    """Return the run folder of the checkpoint that a branch continues, also if a link leads to it."""
    return Path(str(train.branch_from)).resolve().parent.parent


def last_step_taken_again(run_dir: Path) -> int:
    """Return the last step that a run has taken a second time, or will, after a rollback; 0 if there is none."""
    return max((rollback.from_step for rollback in read_rollbacks(run_dir)), default=0)


def losses_before(start: TrainState, *, run_dir: Path, train: Train) -> list[float]:
    """Return the losses of the steps up to a position, of a branch also its trunk's; none if nobody looks for a spike.

    A trunk with another `train.length_warmup` has losses of other lengths, which do not compare.

    Raises:
        InputError: a file cannot be read.
    """
    if train.spike is None:
        return []
    losses = newest_values(run_dir, "loss")[-LOSSES_WATCHED:]
    if train.branch_from is not None and len(losses) < LOSSES_WATCHED and _has_lengths_of_trunk(train):
        last = steps_before_first(run_dir) if losses else start.step  # what the trunk did later was another future
        trunk = (fields for fields in read_steps(trunk_folder(train)) if fields["step"] <= last)
        losses = [*StepColumns(["loss"], trunk).known("loss"), *losses][-LOSSES_WATCHED:]
    return losses


def _has_lengths_of_trunk(train: Train) -> bool:
    with suppress(InputError):  # it may be gone
        return load_run(str(config_file(trunk_folder(train)))).train.length_warmup == train.length_warmup
    return False


def without_left_out(state: TrainState, rollbacks: Sequence[Rollback]) -> TrainState:
    """Return a position past the samples that a rollback to it left out, if one did."""
    for rollback in reversed(rollbacks):  # training that went back further comes by the step at another sample
        if (rollback.step, rollback.next_sample) == (state.step, state.next_sample):
            return replace(state, left_out_samples=state.left_out_samples + rollback.left_out)
    return state


def checkpoints_before(diverged: Diverged, *, train: Train, run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run that are good to go back to, newest first; of a branch, its trunk's comes last.

    Raises:
        InputError: there is none, or the run has gone back as often as it may; says what to do.
    """
    own = [checkpoint.path for checkpoint in reversed(list_checkpoints(run_dir)) if checkpoint.step < diverged.began]
    folders = [*own, *_trunk_before(diverged.began, train=train)]
    done = len(read_rollbacks(run_dir))
    if folders and done < train.rollbacks:
        return folders
    again = f" again, after {counted(done, 'rollback')}" if done else ""
    so = f"{diverged}, so training has diverged{again}"
    lower = "train in another run.dir, with a lower train.learning_rate or more train.warmup_steps"
    if not folders:
        none = "none of its checkpoints is from before that" if list_checkpoints(run_dir) else "no checkpoint was saved"
        raise InputError(f"{so}: {lower}; {none}")
    back = f"`trainshort train --set train.rollbacks={done + 1}` goes back to {folders[0]}, without the samples since"
    branch = "in another run.dir, with a lower train.learning_rate, train.branch_from goes on from there"
    raise InputError(f"{so}: {back}; or {branch}")


def _trunk_before(step: int, *, train: Train) -> list[Path]:
    """Return the checkpoint that a branch began with, if it is there and from before a step."""
    with suppress(InputError):  # it may be gone
        if train.branch_from is not None and read_manifest(Path(train.branch_from)).step < step:
            return [Path(train.branch_from)]
    return []


def record_rollback(diverged: Diverged, folder: Path, manifest: Manifest, *, train: Train, fence: Fence) -> None:
    """Make a checkpoint the one to resume from, without the samples since then.

    Later checkpoints are removed: they were saved while the loss was rising.

    Args:
        diverged: What was seen.
        folder: The checkpoint, known to be whole.
        manifest: Its manifest.
        train: Section of the run: how often it may go back.
        fence: Shows whether this start of the run is still the newest.
    Raises:
        Superseded: a newer start of the run has taken over.
        OSError: the disk fails.
    """
    fence.check()
    run_dir = fence.run_dir
    known = _read(run_dir)
    removed = remove_after(manifest.step, fence=fence)  # first: a start now would resume from the newest
    rollback = Rollback(
        step=manifest.step,
        next_sample=manifest.next_sample,
        left_out=diverged.state.next_sample - manifest.next_sample,
        from_step=diverged.state.step,
        why=str(diverged),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    fence.check()
    _write(run_dir, replace(known, rollbacks=[*known.rollbacks, rollback]), fence=fence)
    for name in removed:  # evaluations are of the weights that were there
        if (reports := evaluation_folder(run_dir) / name).exists():
            move_aside(reports, date=rollback.at)
    also = f"; removed what was saved in between: {', '.join(removed)}" if removed else ""
    logger.warning(
        "ROLLED BACK (%d of %d): %s; training goes back to %s and leaves out the %s since then%s",
        *(len(known.rollbacks) + 1, train.rollbacks, diverged, folder, counted(rollback.left_out, "sample"), also),
    )
