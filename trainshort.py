"""The console script: make sure that Python imports this installation's packages, then start the command line."""

import importlib.util
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent
PACKAGES = ("configs", "parallel", "data_pipeline", "training", "launch")


def main() -> None:
    """Run the command line; exit 3 where another project's package hides one of ours."""
    for package in PACKAGES:
        if foreign := foreign_folder(package):
            sys.stderr.write(
                f"error: Python would import the package {package} from {foreign}, not from {HOME / package}: "
                f"take {foreign.parent} out of PYTHONPATH, or rename {foreign.name} there\n"
            )
            raise SystemExit(3)
    from launch.cli import main as command_line

    command_line()


def foreign_folder(package: str) -> Path | None:
    """Return where Python would import a package from, None where that is this installation."""
    found = importlib.util.find_spec(package)
    if found is None:
        return None
    locations = [*(found.submodule_search_locations or []), found.origin]
    folder = Path(next(path for path in locations if path)).resolve()
    return None if folder == HOME / package else folder


if __name__ == "__main__":
    main()
