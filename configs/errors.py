"""Exceptions whose cause a user can fix. The command line prints each as one message, with its exit code."""

import re
from pathlib import Path

# What torch, NCCL, cuBLAS, the C++ library and the loader of shared libraries say when memory runs out.
NO_MEMORY = re.compile(
    r"out of memory|(?:can't|cannot|failed to) allocate(?! memory in static TLS)|not enough memory|bad_alloc|"
    r"_ALLOC_FAILED|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)

_CUT = " ..."


class TrainshortError(Exception):
    """Base class. The message says what is wrong, the value seen and what to do."""

    exit_code = 1


class InputError(TrainshortError):
    """The user's input is wrong: a run file, an option, a data file, a folder."""

    exit_code = 2


class MachineError(TrainshortError):
    """The machine lacks something: a library, a device, memory, disk."""

    exit_code = 3


class LostPeers(TrainshortError):
    """A rank failed only because another rank ended first: the launcher looks for the cause in that one."""

    exit_code = 4


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, shortened; the name of its type if it has none."""
    # the text of a KeyError is the key in quotes
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return in_brief(next(iter(text.splitlines()), type(error).__name__))


def in_brief(text: str, *, most: int = 200) -> str:
    """Return a foreign text as one line that may stand in a message: if it is too long, whole sentences or words of it.

    Args:
        text: The text.
        most: Characters that it may have.
    """
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    kept = line[: most - len(_CUT)]
    sentences, words = kept.rpartition(". ")[0].rstrip(), kept.rpartition(" ")[0]
    return (sentences if len(sentences) > most // 2 else words or kept) + _CUT


def not_prepared(folder: Path) -> InputError:
    """Return the error of a folder that holds no prepared data; see `configs.commands` for the run file."""
    place = folder if folder.is_absolute() else f"{folder} (relative to {Path.cwd()})"
    return InputError(f"data is not prepared in {place}: run `trainshort prepare`")
