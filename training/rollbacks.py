"""RUN_DIR/rollbacks.json: how often a run that diverged went back, and which samples it left out. Imports no torch.

A run goes back to a checkpoint that was saved before it diverged, and goes on with the samples after those of the
divergence. Whenever training comes by that step at that sample, it leaves them out: also after a resume from an earlier
checkpoint, or in another run folder that has a copy of this file. Later checkpoints have their number in the manifest.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from configs.errors import InputError
from configs.figures import counted
from configs.files import write_json
from configs.paths import rollbacks_file
from configs.schema import Train
from configs.schema_problems import first_problem
from training.checkpoint.manifest import Manifest, list_checkpoints, read_manifest
from training.checkpoint.retention import remove_after
from training.divergence import Diverged
from training.incarnation import Fence
from training.state import JsonInt, TrainState

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
    rollbacks: list[Rollback]


_ADAPTER: TypeAdapter[_Rollbacks] = TypeAdapter(_Rollbacks)


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """Return the rollbacks of a run, oldest first.

    Raises:
        InputError: the file is damaged.
    """
    file = rollbacks_file(run_dir)
    try:
        return _ADAPTER.validate_json(file.read_bytes()).rollbacks
    except FileNotFoundError:
        return []
    except ValidationError as error:
        raise InputError(
            f"{file} is damaged ({first_problem(error)}): mend it, or move it away; then samples on which training "
            "diverged may follow again"
        ) from None


def without_left_out(state: TrainState, rollbacks: Sequence[Rollback]) -> TrainState:
    """Return a position past the samples that a rollback to it left out, if one did."""
    for rollback in reversed(rollbacks):  # training that went back further comes by the step at another sample
        if (rollback.step, rollback.next_sample) == (state.step, state.next_sample):
            return replace(state, left_out_samples=state.left_out_samples + rollback.left_out)
    return state


def record_rollback(diverged: Diverged, *, train: Train, fence: Fence) -> None:
    """Make the newest checkpoint before a divergence the one to resume from, without the samples since then.

    Later checkpoints are removed: they were saved while the loss was rising.

    Args:
        diverged: What was seen.
        train: Section of the run: how often it may go back, and what it branched off from.
        fence: Shows whether this start of the run is still the newest.
    Raises:
        InputError: it has had them, or no checkpoint is old enough; says what to do.
        Superseded: a newer start of the run has taken over.
        OSError: the disk fails.
    """
    fence.check()
    run_dir = fence.run_dir
    rollbacks, good = read_rollbacks(run_dir), _newest_before(diverged.began, run_dir=run_dir, train=train)
    if good is None or len(rollbacks) >= train.rollbacks:
        raise _stopped(diverged, good=good, done=len(rollbacks))
    folder, manifest = good
    removed = remove_after(manifest.step, fence=fence)  # first: a start now would resume from the newest
    rollback = Rollback(
        step=manifest.step,
        next_sample=manifest.next_sample,
        left_out=diverged.state.next_sample - manifest.next_sample,
        from_step=diverged.state.step,
        why=str(diverged),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    document = {"rollbacks": [asdict(each) for each in (*rollbacks, rollback)]}
    write_json(rollbacks_file(run_dir), document, mark=f".{fence.token}")
    also = f"; removed what was saved in between: {', '.join(removed)}" if removed else ""
    logger.warning(
        "ROLLED BACK (%d of %d): %s; training goes back to %s and leaves out the %s since then%s",
        *(len(rollbacks) + 1, train.rollbacks, diverged, folder, counted(rollback.left_out, "sample"), also),
    )


def _newest_before(step: int, *, run_dir: Path, train: Train) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint before a step whose files are there, maybe that of the trunk, and its manifest."""
    own = [checkpoint.path for checkpoint in reversed(list_checkpoints(run_dir)) if checkpoint.step < step]
    for path in (*own, *([Path(train.branch_from)] if train.branch_from else [])):
        with suppress(InputError):  # a resume says what is wrong with it
            return path, read_manifest(path)
    return None


def _stopped(diverged: Diverged, *, good: tuple[Path, Manifest] | None, done: int) -> InputError:
    lower = "train in another run.dir, with a lower train.learning_rate or more train.warmup_steps"
    times = f" again, after {counted(done, 'rollback')}" if done else ""
    so = f"{diverged}, so training has diverged{times}"
    if good is None:
        return InputError(f"{so}: {lower}; no checkpoint was saved")
    back = f"`trainshort train --set train.rollbacks={done + 1}` goes back to {good[0]}, without the samples since"
    branch = "in another run.dir, with a lower train.learning_rate, train.branch_from goes on from there"
    return InputError(f"{so}: {back}; or {branch}")
