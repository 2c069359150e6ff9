"""What the shell is offered for an argument: run files, run folders, checkpoints. A user waits for it at each TAB.

Where nothing is offered, the shell completes paths itself, into folders too.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

# typer's: set by the shell when it asks for completions, to the shell's name
COMPLETE_VARIABLE = "_TRAINSHORT_COMPLETE"
# what a shell would expand, it should complete and quote itself
_PLAIN = re.compile(r"[\w./~+@%,: -]+")
PROTOCOL_WORDS = ("nonoverlapping", "sliding:", "last:")


def complete_run_files(incomplete: str) -> list[str]:
    """Return the names of the shipped runs, and the YAML files in the folder that is being typed."""
    from configs.load import RUNS

    return _yaml_files(incomplete, shipped=RUNS)


def complete_studies(incomplete: str) -> list[str]:
    """Return the names of the shipped studies, and the YAML files in the folder that is being typed."""
    from configs.study import STUDIES

    return _yaml_files(incomplete, shipped=STUDIES)


def complete_shipped_runs(incomplete: str) -> list[str]:
    """Return the names of the shipped runs."""
    from configs.load import shipped_runs

    return _matching(incomplete, shipped_runs())


def complete_run_folders(incomplete: str) -> list[str]:
    """Return the run folders in the folder that is being typed, and those in runs/."""
    from launch.runs import is_run_folder

    below = [] if "/" in incomplete else _entries("runs/", is_run_folder)
    return _matching(incomplete, [*_entries(incomplete, is_run_folder), *below])


def complete_checkpoints(incomplete: str) -> list[str]:
    """Return run folders and, once one is typed, its checkpoints."""
    from training.checkpoint.manifest import list_checkpoints

    folder, _, _ = incomplete.rpartition("/")
    run_dir = folder.removesuffix("/checkpoints") or "."
    checkpoints = [f"{run_dir}/checkpoints/{each.path.name}" for each in list_checkpoints(_expanded(run_dir))]
    return complete_run_folders(incomplete) + _matching(incomplete, checkpoints)


def complete_formats(incomplete: str) -> list[str]:
    """Return the formats of `export`."""
    from training.export.formats.table import FORMATS

    return _matching(incomplete, FORMATS)


def complete_trackers(incomplete: str) -> list[str]:
    """Return the trackers of `track copy`."""
    from training.curves.trackers import TRACKERS

    return _matching(incomplete, TRACKERS)


def complete_dtypes(incomplete: str) -> list[str]:
    """Return the types of weights of `export`."""
    from training.export.formats.table import DTYPES

    return _matching(incomplete, DTYPES)


def complete_protocols(incomplete: str) -> list[str]:
    """Return how a protocol of `evaluate` begins."""
    return _matching(incomplete, PROTOCOL_WORDS)


def complete_scales(incomplete: str) -> list[str]:
    """Return the methods of `--scale`."""
    from configs.scales import SCALES

    return _matching(incomplete, SCALES)


def complete_precisions(incomplete: str) -> list[str]:
    """Return the precisions of `evaluate` and `generate`."""
    from configs.precisions import PRECISIONS

    return _matching(incomplete, PRECISIONS)


def complete_tasks(incomplete: str) -> list[str]:
    """Return the tasks of `retrieval`, the last one of a list that is being typed."""
    from training.retrieval.tasks import TASKS

    typed, comma, last = incomplete.rpartition(",")
    return _matching(incomplete, [f"{typed}{comma}{task}" for task in TASKS if task.startswith(last)])


def _yaml_files(incomplete: str, *, shipped: Path) -> list[str]:
    names = [] if "/" in incomplete else [path.stem for path in shipped.glob("*.yaml")]
    return _matching(incomplete, [*names, *_entries(incomplete, lambda path: path.suffix in (".yaml", ".yml"))])


def _entries(typed: str, is_wanted: Callable[[Path], bool]) -> list[str]:
    """Return the wanted entries of the folder that typed text ends in, as they would be typed."""
    folder = typed[: typed.rfind("/") + 1]
    try:
        paths = [path for path in _expanded(folder or ".").iterdir() if not path.name.startswith(".")]
        return [folder + path.name for path in paths if is_wanted(path)]
    except OSError:
        return []


def _expanded(typed: str) -> Path:
    return Path(os.path.expandvars(typed)).expanduser()


def _matching(incomplete: str, words: Iterable[str]) -> list[str]:
    matching = sorted({word for word in words if word.startswith(incomplete) and _PLAIN.fullmatch(word)})
    return [word.replace(" ", "\\ ") for word in matching] if _inserts_verbatim() else matching


def _inserts_verbatim() -> bool:
    """Return whether the shell inserts an offered word unquoted: bash does, outside quotes."""
    if os.environ.get(COMPLETE_VARIABLE) != "complete_bash":
        return False
    try:
        shlex.split(os.environ.get("COMP_WORDS", ""))
    except ValueError:  # a quote is open
        return False
    return True
