"""The harness's tasks: found by name, loaded with their data, refused in one line. Imports lm_eval when it is asked."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import InputError, MachineError, first_line

# What the harness itself starts from, so that the same few-shot examples are drawn.
_RANDOM_SEED, _OTHER_SEED = 0, 1234
_SHOWN_NAMES = 3


@dataclass(frozen=True)
class TaskRequest:
    """What to run.

    Attributes:
        names: Names of tasks, groups or tags.
        folder: A folder with more tasks, as YAML files; they come before the harness's own of the same name.
        limit: Questions of each task, the first ones; None for all.
        fewshot: Examples before each question; None for what each task says. A task that says 0 keeps it, as in the
            harness.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    fewshot: int | None = None

    def __post_init__(self) -> None:
        """Refuse a request without tasks, and a negative number of examples."""
        if not self.names:
            raise InputError("--tasks must name tasks, got none: write --tasks lambada_openai,piqa")
        if self.fewshot is not None and self.fewshot < 0:
            raise InputError(f"--fewshot must be 0 or more, got {self.fewshot}: 0 gives no examples")


def require_harness() -> None:
    """Refuse to go on without lm_eval.

    Raises:
        MachineError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise MachineError(
            "EleutherAI's lm-evaluation-harness (lm_eval) is not installed: run pip install 'trainshort[harness]'"
        )


def load_tasks(request: TaskRequest) -> Any:
    """Return tasks with their data, as lm_eval's `TaskManager.load` does.

    Raises:
        InputError: a name is not known, a task cannot be run here, or its data is missing.
        MachineError: a task needs a package that is missing.
    """
    manager, asked = _manager_of(request.names, request.folder), ", ".join(request.names)
    try:
        loaded = manager.load(list(request.names))
    except OSError as error:  # also what the Hub's client raises without a network
        raise InputError(
            f"the data of {asked} is not on this machine ({first_line(error)}): HF_HUB_OFFLINE=0 lets "
            "tasks download theirs"
        ) from None
    except ImportError as error:
        raise MachineError(f"a task of {asked} needs a package ({first_line(error)}): install it") from None
    except (ValueError, KeyError) as error:
        raise InputError(f"{asked} cannot be loaded ({first_line(error)}): correct the task") from None
    for name, task in loaded["tasks"].items():
        _refuse_others(name, task)
        _choose_fewshot(task, request.fewshot)
    random.seed(_RANDOM_SEED)
    np.random.seed(_OTHER_SEED)
    return loaded


def _manager_of(names: Sequence[str], folder: Path | None) -> Any:
    """Return an index of tasks that has all names."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        if not folder.is_dir():
            raise InputError(f"--task-dir {folder} is not a folder: give one with the YAML files of tasks")
        # The harness's own fourteen thousand take seconds to read; only a group may name some of them.
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=_SHOWN_NAMES)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise InputError(f"--tasks names {name!r}, which is not a task: {hint}")
    return manager


def _refuse_others(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"task {name} runs code that the model writes, which trainshort does not: leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"task {name} has images or sound, and the model reads text: leave it out")


def _choose_fewshot(task: Any, fewshot: int | None) -> None:
    """Set the number of examples and the seed that they are drawn with, as the harness's own command does."""
    given = task.get_config("num_fewshot")
    if fewshot is not None and given != 0:
        task.set_config(key="num_fewshot", value=fewshot)
    elif given is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_OTHER_SEED)
