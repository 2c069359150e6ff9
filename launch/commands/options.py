"""Arguments and options that several commands share."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.errors import InputError
from launch.complete import complete_checkpoints, complete_run_files, complete_run_folders

_LARGEST = 999_999_999  # what counts and lengths of the command line go up to
_DAY_SECONDS = 86_400.0


def path_of(text: str) -> Path:
    """Parse a path argument: the shell leaves `--data=~/text` and quoted variables as they are."""
    from configs.path_text import expand_path  # here: it loads pydantic, which `--help` does without

    if not text:  # an unset variable of the shell; Path("") is the current folder
        raise typer.BadParameter("the path is empty: name a file or a folder")
    return expand_path(text)


RunFile = Annotated[
    str,
    typer.Argument(
        metavar="RUN.yaml", autocompletion=complete_run_files, help="A run file, or the name of a shipped run."
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="section.key=value",
        default_factory=list,
        show_default=False,
        help="Override one key; may be repeated, the last one wins.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        parser=path_of,
        autocompletion=complete_checkpoints,
        help="A checkpoint, or a run folder for its newest one.",
    ),
]
RunDir = Annotated[
    Path,
    typer.Argument(metavar="RUN_DIR", parser=path_of, autocompletion=complete_run_folders, help="A run folder."),
]


class Lengths(tuple[int, ...]):
    """Lengths in tokens. A separate class, because typer reads tuple[int, ...] as an option with several values."""


def count_option(name: str, description: str) -> Any:
    """Return an option whose value is a positive integer, for `Annotated[int, ...]`."""

    def parse(value: str | int) -> int:  # typer parses the default too
        if not _is_whole_number(str(value), minimum=1):
            raise InputError(f"{name} must be a whole number from 1 to {_LARGEST}, got {value!r}: write {name} 4")
        return int(value)

    return typer.Option(name, metavar="N", help=description, parser=parse)


def number_option(name: str, metavar: str, description: str, *, is_whole: bool = False) -> Any:
    """Return an option whose value is a number, for `Annotated[float, ...]`; who uses it checks its range."""

    def parse(value: str) -> float:
        try:
            return int(value) if is_whole else float(value)
        except ValueError:
            kind = "whole number" if is_whole else "number"
            raise InputError(f"{name} must be a {kind}, got {value!r}: write {name} 1") from None

    return typer.Option(name, metavar=metavar, help=description, parser=parse)


def seconds_option(name: str, description: str, *, least: float, example: int) -> Any:
    """Return an option whose value is a time from `least` to a day, for `Annotated[float, ...]`.

    Args:
        name: Name of the option.
        description: Its help.
        least: The shortest time, in seconds.
        example: What an error tells the user to write.
    """

    def parse(value: str | float) -> float:  # typer parses the default too
        try:
            seconds = float(value)
        except ValueError:
            raise InputError(f"{name} must be a number, got {value!r}: write {name} {example}") from None
        if not least <= seconds <= _DAY_SECONDS:  # nor is nan
            raise InputError(
                f"{name} must be {least:g} to {_DAY_SECONDS:,.0f} seconds, got {seconds:g}: write {example}"
            )
        return seconds

    return typer.Option(name, metavar="SECONDS", help=description, parser=parse)


def gigabytes_option(name: str, description: str) -> Any:
    """Return an option whose value is a positive number of GB, for `Annotated[float, ...]`."""

    def parse(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", value) or not float(value):
            raise InputError(f"{name} must be a number of GB above 0, got {value!r}: write {name} 80")
        return float(value)

    return typer.Option(name, metavar="G", help=description, parser=parse)


def lengths_option(name: str, description: str) -> Any:
    """Return an option whose value is a comma-separated list of lengths, for `Annotated[Lengths, ...]`."""

    def parse(value: str) -> Lengths:
        lengths = [length.strip() for length in value.split(",")]
        if not all(_is_whole_number(length, minimum=2) for length in lengths):
            raise InputError(
                f"{name} must be whole numbers from 2 to {_LARGEST} separated by commas, got {value!r}: write 1024,2048"
            )
        return Lengths(map(int, lengths))

    return typer.Option(name, metavar="L,L,...", help=description, parser=parse)


def _is_whole_number(text: str, *, minimum: int) -> bool:
    # Not int() alone: it also takes "1_0", " 1 " and digits of other scripts.
    return re.fullmatch(r"[0-9]{1,9}", text) is not None and int(text) >= minimum
