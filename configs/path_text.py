"""Paths as users write them: `~` and environment variables are expanded alike in every key and argument."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from configs.errors import InputError

BAD_PATH = "bad_path"
"""Type of the schema's error for a path with a variable that is not set, or a name that is not UTF-8."""

_NOT_UTF8 = (
    "its name is not UTF-8, which no run file can hold: rename it, or match a source with a pattern such as caf?.txt"
)
_ADDRESS = re.compile(r"[\w+.-]+://")  # of a container image, for example; it may hold a `$` of its own
_VARIABLE = re.compile(r"\$(?:\w+|\{\w+\})", re.ASCII)
# Stores that are files. Variables in other URIs stay: they may hold a password, which must not be written out.
_FILE_STORE = re.compile(r"(sqlite:///|file://|)(?:(?<=://)/(?=[~$]))?(?!\w+:)(.*)", re.DOTALL)


def expand_path(text: str) -> Path:
    """Return a path of the command line with `~` and environment variables replaced; one that exists stays as it is.

    Raises:
        InputError: a variable is not set, or is empty.
    """
    if os.path.lexists(text):
        return Path(text)
    if problem := _problem(text):
        raise InputError(f"path {text}: {problem}")
    return Path(_expanded(text))


def require_folder(path: Path, *, what: str, advice: str) -> None:
    """Refuse a path that is not a folder.

    Args:
        path: The path, as the user gave it.
        what: What the folder is, in the message: run folder, checkpoint.
        advice: What to do, likewise.
    Raises:
        InputError: there is something else, or nothing.
    """
    if not path.is_dir():
        seen = "is a file" if path.is_file() else "is not a folder" if path.exists() else "does not exist"
        raise InputError(f"{what} {path} {seen}: {advice}")


def _problem(text: str) -> str | None:
    # an empty variable would make $SCRATCH/run a folder of the root
    unset = [name for name in _VARIABLE.findall(text) if os.path.expandvars(name) in (name, "")]
    return f"the variable {unset[0]} is not set: set it, or write the path out" if unset else None


def _expanded(text: str) -> str:
    return os.path.expanduser(os.path.expandvars(text))


def expand_store(uri: str) -> str:
    """Return the URI of a tracking store with a file's `~` and environment variables replaced, if all are set."""
    store = _FILE_STORE.fullmatch(uri)
    return uri if store is None or _problem(store[2]) else store[1] + _expanded(store[2])


def _expand_key(text: str) -> str:
    if _ADDRESS.match(text) or os.path.lexists(text):
        return text
    problem = _problem(text)
    if problem is None:
        try:
            expanded = _expanded(text)
            expanded.encode()
            return expanded
        except UnicodeEncodeError:
            problem = _NOT_UTF8
    # a placeholder, since the problem may contain braces
    raise PydanticCustomError(BAD_PATH, "{problem}", {"problem": problem})


def _expand_uri(uri: str) -> str:
    store = _FILE_STORE.fullmatch(uri)
    return store[1] + _expand_key(store[2]) if store else uri


PathText = Annotated[str, Field(min_length=1), AfterValidator(_expand_key)]
"""A key that holds a path or a pattern of paths; an empty one would be the current folder."""

StoreText = Annotated[str, Field(min_length=1), AfterValidator(_expand_uri)]
"""The URI of a tracking store, which may be a file."""
