"""The console script: check that Python imports this installation's packages, then run the command line."""

import importlib.util
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent
PACKAGES = ("configs", "parallel", "data_pipeline", "training", "launch")


def main() -> None:
    """Run the command line; exit with 3 if another project's package shadows one of ours."""
    for package in PACKAGES:
        if foreign := foreign_folder(package):
            sys.stderr.write(
                f"error: Python would import the package {package} from {foreign}, not from {HOME / package}: "
                f"take {foreign.parent} out of PYTHONPATH, or rename {foreign.name} there\n"
            )
            raise SystemExit(3)
    try:
        # Only now: this import would already pick up the foreign packages.
        from launch.cli import run_command_line

        run_command_line()
    except KeyboardInterrupt:  # outside a command: while it is imported
        raise SystemExit(130) from None


def foreign_folder(package: str) -> Path | None:
    """Return the folder that Python would import a package from, or None if it is this installation's."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    # A namespace package has no origin, a regular one has both.
    locations = [*(spec.submodule_search_locations or []), spec.origin]
    folder = Path(next(path for path in locations if path)).resolve()
    return None if folder == HOME / package else folder


if __name__ == "__main__":
    main()
