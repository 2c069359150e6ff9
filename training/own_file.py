"""Refuse places for a command's output: files that it has not written, checkpoints. Imports no torch."""

import os
from collections.abc import Callable
from pathlib import Path

from configs.errors import InputError
from configs.paths import checkpoints_folder, incarnation_file
from training.checkpoint.manifest import list_checkpoints

_HEAD_BYTES = 4096  # what marks a file as ours stands at its beginning


def check_own_file(path: Path, *, what: str, form: str, ending: str, is_ours: Callable[[bytes], bool]) -> None:
    """Refuse a path for a command's output whose file is another one, or that has another ending.

    Args:
        path: Where the output is to be written.
        what: What it is, in a word.
        form: Its format, in a word.
        ending: The ending of such files.
        is_ours: Whether a file that begins with these bytes was written by the command.
    Raises:
        InputError: it is another file, or has another ending.
    """
    refuse_among_checkpoints(path)
    if path.suffix.lower() != ending:
        name = f"{path.stem or what}{ending}"
        raise InputError(f"--out {path} does not end in {ending}: the {what} is {form}, write --out {name}")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: give the path of a file in it that ends in {ending}")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"--out {path} cannot be read ({error.strerror}): give another path") from None
    if not is_ours(head):
        raise InputError(f"--out {path} is not a {what} of this command: move it away, or give another path")


def refuse_among_checkpoints(out: Path) -> None:
    """Refuse a place in RUN_DIR/checkpoints, from which retention removes whole folders.

    Args:
        out: Where a command is to write.
    Raises:
        InputError: it is RUN_DIR/checkpoints, or in it.
    """
    # as it is written and without links: either may lead through the folder
    for path in (Path(os.path.abspath(out)), Path(os.path.realpath(out))):
        for folder in (path, *path.parents):
            run_dir = folder.parent
            if folder != checkpoints_folder(run_dir):
                continue
            if incarnation_file(run_dir).exists() or list_checkpoints(run_dir):
                raise InputError(
                    f"--out {out} is in {folder}, where checkpoints are removed with all that is in them: choose "
                    "another --out"
                )
