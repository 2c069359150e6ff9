"""Read the run file that a run folder holds, in a millisecond: unchecked, because it was checked when written."""

from pathlib import Path
from typing import Any

import yaml

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
