"""Refuse files for a command's output that it has not written. Imports no torch."""

from collections.abc import Callable
from pathlib import Path

from configs.errors import InputError
from configs.paths import refuse_among_checkpoints

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
    refuse_among_checkpoints(path, name="--out")
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
