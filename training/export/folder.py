"""Write a folder that appears whole or not at all.

A new folder is written under another name beside it and renamed. A folder that exists, perhaps behind a link or as a
mount point, cannot be replaced by a rename: its files are written to a folder inside it and then moved up.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from configs.errors import InputError, MachineError
from configs.figures import byte_size
from configs.files import missing_folders, remove_folders
from configs.paths import refuse_among_checkpoints

_PARTIAL = ".partial-"
# moved last: an engine that finds it loads the folder
_LAST = "config.json"
# what a new file system holds
_NO_FILES = ("lost+found",)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill. At the end its files are put in place of `out`; an exception deletes it.

    The files get the access rights of new files here, whoever wrote them: safetensors lets only the owner read.

    Raises:
        InputError: `out` is a file or holds files, or no folder can be made there.
        MachineError: the files cannot be put in place; they are kept, and the message says where.
    """
    place = require_new(out)
    made = missing_folders(place)
    partial = _make_partial(place, out=out)
    problem: OSError | None = None
    try:
        yield partial
        _let_others_read(partial)
        try:
            _put_in_place(partial, place)
        except OSError as error:
            problem = error
    except BaseException:  # also Ctrl-C
        shutil.rmtree(partial, ignore_errors=True)
        remove_folders(made)
        raise
    if problem is not None:
        raise MachineError(
            f"folder {out} cannot be filled ({problem.strerror}): its files are whole in {partial}: move them"
        )


@contextmanager
def report_failed_writes(out: Path, *, undone: str) -> Iterator[None]:
    """Turn a failed write into a MachineError that says what to do.

    Args:
        out: The folder, as the user calls it.
        undone: What was not done, such as "exported".
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"folder {out} cannot be written ({' '.join(str(error).split())}): nothing was {undone}; free space or "
            "choose another --out"
        ) from None


def try_new_folder(out: Path) -> None:
    """Do what `new_folder` does, with an empty file, and undo it: long work must not fail at its end.

    Raises:
        InputError: `out` is a file or holds files, or cannot be written.
    """
    place = require_new(out)
    made = missing_folders(place)
    partial = _make_partial(place, out=out)
    trial = f"{partial.name}.trial"
    try:
        (partial / trial).touch()
        _put_in_place(partial, place)
        (place / trial).unlink()
    except OSError as error:
        raise _not_writable(out, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        remove_folders(made)


def require_new(out: Path) -> Path:
    """Refuse a path that exists, unless it is an empty folder, and one in RUN_DIR/checkpoints; return it without links.

    Raises:
        InputError: `out` is a file, a link to nothing, holds files, or is among checkpoints.
    """
    try:
        os.path.realpath(out).encode("utf-8")
        refuse_among_checkpoints(out, name="--out")
        if out.is_dir():
            files = _files(out)
            problem = "has files in it: remove them or" if files else None
            if files and _PARTIAL in files[0]:
                problem = f"holds {files[0]} of a command that runs or was killed: wait for it, remove it, or"
        elif out.is_symlink() and not out.exists():
            problem = f"is a link to {os.readlink(out)}, which does not exist: make that folder or"
        else:
            problem = "is a file:" if os.path.lexists(out) else None
    except UnicodeEncodeError:  # the libraries that write the files cannot take such a path
        problem = "has a name that is not UTF-8:"
    except OSError as error:
        problem = f"cannot be read ({error.strerror}):"
    if problem:
        raise InputError(f"folder {out} {problem} choose another --out")
    return Path(os.path.realpath(out))


def require_space(out: Path, *, needed_bytes: int) -> None:
    """Refuse a place whose disk cannot hold what will be written.

    Args:
        out: The folder, which may not exist yet.
        needed_bytes: The least that will be written.
    Raises:
        MachineError: names what is free and what is needed.
    """
    place = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise MachineError(
            f"the disk of folder {out} has {byte_size(free)} free, {byte_size(needed_bytes)} are needed: free space or "
            "choose another --out"
        )


def remove_partial_folders(out: Path) -> None:
    """Remove the temporary folders beside `out`, whose name may be a pattern, that killed exports left."""
    for folder in out.parent.glob(f".{out.name}{_PARTIAL}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _make_partial(place: Path, *, out: Path) -> Path:
    """Make the temporary folder of a place, which the user calls `out`, and return it."""
    # On the file system of its place, where a rename is atomic. The random name keeps two exports apart.
    name = f".{place.name[:50]}{_PARTIAL}{secrets.token_hex(4)}"
    partial = (place if place.is_dir() else place.parent) / name
    made = missing_folders(partial)
    try:
        with suppress(FileNotFoundError):  # the trial of another export may remove the parent, then it is made again
            partial.mkdir(parents=True)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_folders(made)
        raise _not_writable(out, error) from None
    return partial


def _let_others_read(folder: Path) -> None:
    """Give files and folders the rights that the umask leaves, which the folder itself was made with."""
    rights = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        with suppress(OSError):  # not every file system has rights
            path.chmod(rights if path.is_dir() else rights & 0o666)


def _not_writable(out: Path, error: OSError) -> InputError:
    where = "in" if out.is_dir() else "beside"
    return InputError(f"cannot write {where} {out} ({error.strerror}): choose another --out")


def _files(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name not in _NO_FILES)


def _put_in_place(partial: Path, place: Path) -> None:
    """Rename the folder to its place, or move its files into a folder that exists."""
    if partial.parent != place:
        partial.rename(place)
        return
    others = [name for name in _files(place) if _PARTIAL not in name]
    if others:  # written meanwhile: overwrite nothing
        raise FileExistsError(None, f"{others[0]} is in it")
    moved: list[Path] = []
    try:
        for file in sorted(partial.iterdir(), key=lambda file: file.name == _LAST):
            file.rename(place / file.name)
            moved.append(file)
        partial.rmdir()
    except (OSError, KeyboardInterrupt):
        for file in moved:
            with suppress(OSError):
                (place / file.name).rename(file)
        raise
