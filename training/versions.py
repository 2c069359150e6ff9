"""What runs: the installed versions, and the commit and changes where the code is a checkout. Imports no torch."""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HOUSE = Path(__file__).resolve().parents[1]
PACKAGES = ("trainshort", "torch", "deepspeed", "megatron-core", "sentencepiece", "mlflow", "transformers", "numpy")
SOURCE = "source.json"


def installed_versions() -> dict[str, str | None]:
    """Return the versions of the packages that decide a result; None for one that is not there."""
    return {package: installed_version(package) for package in PACKAGES}


def source_code(house: Path = HOUSE) -> dict[str, Any] | None:
    """Return where the code comes from: the commit and what differs from it; None for an installed wheel.

    A frozen copy of a checkout says what the checkout was.
    """
    copied = house / SOURCE
    if copied.is_file():
        found: dict[str, Any] = json.loads(copied.read_text(encoding="utf-8"))
        return found
    # A wheel may lie in a folder that some other repository holds: ours knows this file.
    if _git(house, "ls-files", "--error-unmatch", "trainshort.py") is None:
        return None
    commit, changes = _git(house, "rev-parse", "HEAD"), _git(house, "diff", "HEAD")
    return None if commit is None else {"commit": commit.strip(), "diff": changes or ""}


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, errors="replace"
        )
    except OSError:
        return None  # no git on this machine
    return done.stdout if done.returncode == 0 else None
