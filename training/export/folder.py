"""Write a folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import InputError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out` to fill. At the end it is renamed to `out`; an exception deletes it.

    Raises:
        InputError: `out` is a file or holds files, or its parent cannot hold a folder.
    """
    out = out.absolute()
    require_new(out)
    # Beside `out`: a rename is atomic only within one file system. The process id keeps two exports apart.
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write beside {out} ({error.strerror}): choose another --out") from None
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_new(out: Path) -> None:
    """Refuse a path that exists, unless it is an empty folder.

    Raises:
        InputError: `out` is a file or holds files.
    """
    if out.is_dir():
        if any(out.iterdir()):
            raise InputError(f"export folder {out} has files in it: remove them or choose another --out")
    elif os.path.lexists(out):
        raise InputError(f"export folder {out} is a file: choose another --out")
