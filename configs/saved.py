"""Read the run file that a run folder holds, in a millisecond: unchecked, because it was checked when written."""

from pathlib import Path
from typing import Any

import yaml

from configs.commands import typed_overrides, typed_path
from configs.paths import config_file
from configs.strict_yaml import plain_yaml

# libyaml's parser is ten times as fast, where PyYAML was built with it
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class NotYamlError(ValueError):
    """A file that should hold a run is not even YAML."""


def saved_values(path: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a run file as plain values.

    Raises:
        OSError: the file cannot be read.
        NotYamlError: it is not YAML.
        ValueError: it is YAML, but holds no run.
    """
    try:
        values = yaml.load(path.read_bytes(), Loader=_LOADER)
    except (yaml.YAMLError, RecursionError) as error:
        raise NotYamlError("is not YAML") from error
    if not isinstance(values, dict) or not {"run", "model"} <= values.keys():
        raise ValueError("holds no run")
    return {str(name): section for name, section in values.items() if isinstance(section, dict)}


def typed_run(run_dir: Path) -> str:
    """Return a run folder's run file as a command takes it, quoted for a shell, with what makes the command mean it.

    Args:
        run_dir: The run folder, which may have been moved, or lie elsewhere than its `run.dir` says from here.
    """
    file = config_file(run_dir)
    return f"{typed_path(file)}{typed_overrides(overrides_here(file, run_dir))}" if file.is_file() else "RUN.yaml"


def overrides_here(file: Path, run_dir: Path) -> list[str]:
    """Return what a command on a run file must override to mean a run folder that the file does not lead to.

    Args:
        file: The run file that the folder holds, or one of its checkpoints.
        run_dir: The run folder.
    """
    try:
        named = str(saved_values(file)["run"]["dir"])
    except (OSError, ValueError, KeyError):
        return []  # the command says what is wrong with it
    return [] if Path(named).resolve() == run_dir.resolve() else [f"run.dir={plain_yaml(str(run_dir))}"]
