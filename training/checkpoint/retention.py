"""Which checkpoints stay, and the removal of the others. No torch."""

import logging
from collections.abc import Collection
from pathlib import Path

from configs.errors import InputError
from configs.schema import CheckpointRules as Rules
from training.checkpoint import disk
from training.checkpoint.manifest import Manifest, list_checkpoints, read_manifest
from training.incarnation import Fence

logger = logging.getLogger(__name__)


def apply_retention(rules: Rules, *, run_dir: Path, fence: Fence, broken: Collection[Path]) -> None:
    """Remove the checkpoints that no rule keeps; what the disk says against it is a warning.

    Args:
        rules: The run's section.
        run_dir: The run folder.
        fence: Tells whether this start of the run is still the newest; an older one removes nothing.
        broken: Checkpoints that were found altered. They, and those that are not whole, are neither counted nor
            removed.
    """
    try:
        for folder in superfluous(_whole(run_dir, broken=broken), rules=rules):
            if not fence.is_ours():
                return
            aside = folder.with_name(f".{folder.name}.{fence.token}.old")
            disk.rename(folder, aside)  # first: a removal cut short must not leave a manifest without its files
            disk.remove(aside)
    except OSError as error:
        logger.warning("an old checkpoint in %s cannot be removed (%s)", run_dir, error.strerror)


def superfluous(whole: dict[Path, Manifest], *, rules: Rules) -> list[Path]:
    """Return the checkpoints that no rule keeps.

    Args:
        whole: Checkpoints, oldest first.
        rules: The run's section.
    """
    measured = [path for path, manifest in whole.items() if manifest.validation_loss is not None]
    best = sorted(measured, key=lambda path: (whole[path].validation_loss, -whole[path].step))
    kept = {*list(whole)[-rules.keep :], *best[: rules.keep_best]}
    if rules.keep_every:
        kept |= {path for path, manifest in whole.items() if manifest.step % rules.keep_every == 0}
    return [path for path in whole if path not in kept]


def clear_unfinished(checkpoints: Path, *, fence: Fence) -> None:
    """Remove what starts that were cut short left unfinished, and say so; what cannot be removed stays.

    That of an older start that still lives is removed too: its save fails, and it ends at its next look. That of a
    newer one stays: this start may have been overtaken since it looked.
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


def _whole(run_dir: Path, *, broken: Collection[Path]) -> dict[Path, Manifest]:
    found = {}
    for checkpoint in list_checkpoints(run_dir):
        # A linked one lies elsewhere, and is somebody else's to remove.
        if checkpoint.path.absolute() not in broken and not checkpoint.path.is_symlink():
            try:
                found[checkpoint.path] = read_manifest(checkpoint.path)
            except InputError as error:
                logger.warning("%s; it is left where it is, and does not count among those kept", error)
    return found
