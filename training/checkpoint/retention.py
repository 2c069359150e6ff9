"""Decide which checkpoints of a run to keep, and remove the others. No torch."""

import logging
import math
from collections.abc import Collection
from pathlib import Path

from configs.errors import InputError
from configs.schema import CheckpointRules
from training.checkpoint import disk
from training.checkpoint.manifest import Manifest, list_checkpoints, read_manifest
from training.incarnation import Fence

logger = logging.getLogger(__name__)


def apply_retention(
    rules: CheckpointRules, *, fence: Fence, broken: Collection[Path], in_use: Collection[Path] = ()
) -> None:
    """Remove the checkpoints that no rule keeps. If the disk fails, warn and continue.

    Args:
        rules: The run's section.
        fence: Shows whether this start of the run is still the newest; an older start removes nothing.
        broken: Checkpoints whose content is known to be altered. Like incomplete ones, they are neither counted nor
            removed.
        in_use: Checkpoints that someone reads: they count, and are not removed.
    """
    try:
        for folder in checkpoints_to_remove(_whole_checkpoints(fence.run_dir, broken=broken), rules=rules):
            if folder in in_use:
                continue
            if not fence.is_ours():
                return
            _remove(folder, fence=fence)
    except OSError as error:
        logger.warning("an old checkpoint in %s cannot be removed (%s)", fence.run_dir, error.strerror)


def checkpoints_to_remove(whole: dict[Path, Manifest], *, rules: CheckpointRules) -> list[Path]:
    """Return the checkpoints that no rule keeps.

    Args:
        whole: Whole checkpoints, oldest first.
        rules: The run's section.
    """
    losses = {path: manifest.validation_loss for path, manifest in whole.items()}
    # a loss that is nan does not count: it has no place in an order
    measured = [path for path, loss in losses.items() if loss is not None and math.isfinite(loss)]
    # lowest loss first; of equal losses, the newest
    best = sorted(measured, key=lambda path: (losses[path], -whole[path].step))
    kept = {*list(whole)[-rules.keep :], *best[: rules.keep_best]}
    if rules.keep_every:
        kept |= {path for path, manifest in whole.items() if manifest.step % rules.keep_every == 0}
    return [path for path in whole if path not in kept]


def remove_after(step: int, *, fence: Fence) -> list[str]:
    """Remove the checkpoints of later steps; return their names.

    Raises:
        Superseded: a newer start of the run has taken over.
        OSError: the disk fails.
    """
    later = [checkpoint for checkpoint in list_checkpoints(fence.run_dir) if checkpoint.step > step]
    for checkpoint in later:
        fence.check()
        _remove(checkpoint.path, fence=fence)
    return [checkpoint.path.name for checkpoint in later]


def remove_unfinished(checkpoints: Path, *, fence: Fence) -> None:
    """Remove the unfinished checkpoints of starts that were cut short; warn about each.

    Also remove those of an older start that is still alive: its save fails, and it ends when it next checks the
    fence. Keep those of a newer start: this start may have been superseded since it last checked.
    """
    for folder in sorted(checkpoints.glob(".step_*")):
        if not fence.may_remove(folder.name.removeprefix(".").partition(".")[2]):
            continue
        try:
            disk.remove(folder)
        except OSError as error:
            logger.warning("the unfinished checkpoint %s cannot be removed (%s)", folder, error.strerror)
        else:
            logger.warning("removed the unfinished checkpoint %s", folder)


def _remove(folder: Path, *, fence: Fence) -> None:
    # Rename before removing: a removal that is cut short must not leave a manifest whose files are gone.
    removed = folder.with_name(f".{folder.name}.{fence.token}.old")
    disk.rename(folder, removed)
    disk.remove(removed)


def _whole_checkpoints(run_dir: Path, *, broken: Collection[Path]) -> dict[Path, Manifest]:
    whole = {}
    for checkpoint in list_checkpoints(run_dir):
        # A link leads to a checkpoint elsewhere: this run must not remove it.
        if checkpoint.path.absolute() not in broken and not checkpoint.path.is_symlink():
            try:
                whole[checkpoint.path] = read_manifest(checkpoint.path)
            except InputError as error:
                logger.warning("%s; it is left in place and does not count among those kept", error)
    return whole
