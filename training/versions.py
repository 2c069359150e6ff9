"""The code and the package versions that run: a commit and its uncommitted changes, or a wheel. Imports no torch."""

import json
import subprocess
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from configs.errors import MachineError
from configs.secrets import hide_secrets, without_password

HOUSE = Path(__file__).resolve().parents[1]
CODE = ("configs", "parallel", "data_pipeline", "training", "launch", "trainshort.py")
PACKAGES = (
    "trainshort",
    "torch",
    "deepspeed",
    "megatron-core",
    "sentencepiece",
    "tokenizers",
    "mlflow",
    "transformers",
    "numpy",
)
SOURCE, VERSIONS = "source.json", "versions.json"  # files of a frozen copy, next to its packages


def installed_versions() -> dict[str, str | None]:
    """Return the versions of the packages that decide a result; None for one that is not installed."""
    return {package: installed_version(package) for package in PACKAGES}


def python_version() -> str:
    """Return the version of Python, without its build."""
    return sys.version.split()[0]


def check_frozen(house: Path = HOUSE) -> None:
    """Refuse to run a frozen copy of the code, RUN_DIR/slurm/code, if package versions changed since its submission.

    Raises:
        MachineError: names each version that has changed.
    """
    if not (house / VERSIONS).is_file():
        return  # not a frozen copy
    then: Mapping[str, str | None] = json.loads((house / VERSIONS).read_text(encoding="utf-8"))
    now = {**installed_versions(), "trainshort": then.get("trainshort")}  # the copy itself runs
    changes = [f"{name} is {now.get(name)}, was {seen}" for name, seen in then.items() if now.get(name) != seen]
    if changes:
        raise MachineError(
            f"{house.parents[1]} was submitted with other versions ({'; '.join(changes)}): install those, or submit it "
            "again with trainshort slurm to continue with these"
        )


def source_code(house: Path = HOUSE) -> dict[str, Any] | None:
    """Return the commit of the code, its branch and repository, and the diff from it; None for an installed wheel.

    Branch and repository are None if the commit is on no branch, or was cloned from nowhere.

    For a frozen copy, return those of the checkout that it was copied from.
    """
    copied = house / SOURCE
    if copied.is_file():
        source: dict[str, Any] = json.loads(copied.read_text(encoding="utf-8"))
        return source
    # A wheel may be installed inside another project's repository; only our own tracks this file.
    if _git(house, "ls-files", "--error-unmatch", "trainshort.py") is None:
        return None
    commit = _git(house, "rev-parse", "HEAD")
    if commit is None:
        return None
    url = _line(_git(house, "remote", "get-url", "origin"))
    return {
        "commit": commit.strip(),
        "branch": _line(_git(house, "symbolic-ref", "--short", "--quiet", "HEAD")),
        "repository": hide_secrets(without_password(url)) if url else None,
        "diff": _changes(house),
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _changes(house: Path) -> str:
    """Return the diff from the commit, without secrets: changed files, and modules that git does not track."""
    listed = _git(house, "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE) or ""
    added = [name for name in listed.split("\0") if name.endswith(".py")]
    # exit code 1: the two files differ
    parts = [_git(house, "diff", "--no-index", "--", "/dev/null", name, accepted=(0, 1)) for name in added]
    return hide_secrets("".join(part or "" for part in (_git(house, "diff", "HEAD"), *parts)))


def _line(output: str | None) -> str | None:
    return (output or "").strip() or None


def _git(folder: Path, *arguments: str, accepted: Collection[int] = (0,)) -> str | None:
    """Return the output of a git command; None if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, errors="replace"
        )
    except OSError:
        return None  # no git on this machine
    return done.stdout if done.returncode in accepted else None
