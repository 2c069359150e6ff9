"""Write a commented run file from a shipped one: its keys and comments, and every other key with its default."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from configs.document import field_type
from configs.errors import InputError, MachineError
from configs.load import RUNS, check_run, shipped_runs
from configs.schema import RunConfig
from configs.strict_yaml import plain_yaml, read_yaml

_WIDTH = 100
_SECTION = re.compile(r"(\w+):")
_KEY = re.compile(r"  (\w+): (.*?)(?: +# (.*))?")
_COMMENT = re.compile(r" *# ?(.*)")


@dataclass(frozen=True)
class ShippedKey:
    """A key of a shipped run file.

    Attributes:
        value: As it is written there.
        above: Lines of comment above it.
        beside: Comment beside it; empty if there is none.
    """

    value: str
    above: tuple[str, ...]
    beside: str


def write_run_file(file: Path, *, name: str, source: str) -> None:
    """Write a commented run file. It passes `check`.

    Args:
        file: Where; nothing may be there.
        name: Name of the run, and of its folder in runs/.
        source: Name of the shipped run that it takes its keys and comments from.
    Raises:
        InputError: the name or the source is wrong, or the file exists.
        MachineError: the file cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.endswith((".yaml", ".yml")):
        raise InputError(
            f"NAME is the name of a run, not a path, got {name!r}: use letters, digits, dots, _ and -, as in my-run; "
            "--out FILE says where to write the file"
        )
    if source not in shipped_runs():
        raise InputError(f"--from {source} is not a shipped run: use one of {', '.join(shipped_runs())}")
    text = commented_run((RUNS / f"{source}.yaml").read_text(encoding="utf-8"), name=name, source=source)
    check_run(read_yaml(text, name=str(file)), name=str(file))
    try:
        with file.open("x", encoding="utf-8") as output:
            output.write(text)
    except FileExistsError:
        raise InputError(f"{file} exists already: choose another NAME or --out FILE, or remove it") from None
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"folder {file.parent} does not exist: make it, or choose another --out FILE") from None
    except OSError as error:
        raise MachineError(f"{file} cannot be written ({error.strerror}): choose another --out FILE") from None


def commented_run(shipped: str, *, name: str, source: str) -> str:
    """Return a run file with a shipped run's keys and comments, and all other keys commented out with their defaults.

    Args:
        shipped: Text of the shipped run file, which has a line for each key.
        name: Value of `run.name`; `run.dir` becomes runs/NAME.
        source: Name of the shipped run.
    """
    head, sections = _read_shipped(shipped)
    written = plain_yaml(name)  # 123 and true would not be text
    sections["run"] |= {"name": ShippedKey(written, (), ""), "dir": ShippedKey(f"runs/{name}", (), "")}
    lines = [
        f"# From the shipped run {source}:",
        *(f"# {line}" for line in head),
        "#",
        "# A key behind a # has its default: remove the # and change it.",
    ]
    for section, field in RunConfig.model_fields.items():
        schema: Any = field.annotation
        given = sections.get(section, {})
        lines += ["", f"# {schema.__doc__.strip()}", f"{section}:"]
        for key, info in schema.model_fields.items():
            if key in given:
                lines += (f"  # {line}" for line in given[key].above)
                lines += _key_lines(f"{key}: {given[key].value}", _comment(info, given[key].beside), mark="")
        for key, info in schema.model_fields.items():
            if key not in given:
                lines += _key_lines(f"{key}: {_default(info)}".rstrip(), _comment(info, ""), mark="#")
    return "\n".join(lines) + "\n"


def _read_shipped(text: str) -> tuple[list[str], dict[str, dict[str, ShippedKey]]]:
    """Return the comment at the top of a shipped run file, and the keys of its sections."""
    head: list[str] = []
    sections: dict[str, dict[str, ShippedKey]] = {}
    waiting, keys = head, {}
    for line in text.splitlines():
        if match := _COMMENT.fullmatch(line):
            waiting.append(match[1])
        elif match := _SECTION.fullmatch(line):
            waiting, keys = [], sections.setdefault(match[1], {})
        else:
            match = _KEY.fullmatch(line)
            assert match is not None, f"a shipped run file has a line for each key, got {line!r}"
            keys[match[1]] = ShippedKey(match[2], tuple(waiting), match[3] or "")
            waiting = []
    return head, sections


def _key_lines(key: str, comment: str, *, mark: str) -> Iterator[str]:
    """Yield a key with its comment beside it or, where that is too long, above it; without its mark it is indented."""
    line = f"  {mark}{key}  # {comment}"
    if len(line) <= _WIDTH:
        yield line
    else:
        yield from (f"  # {part}" for part in textwrap.wrap(comment, _WIDTH - 4))
        yield f"  {mark}{key}"


def _comment(field: FieldInfo, beside: str) -> str:
    """Return what is said of a key: its description, its legal words if it has some, the shipped run's comment."""
    kind = field_type(field).replace("`", "").replace("\\|", "|")
    words = f" [{kind}]" if "|" in kind and not kind.startswith("true") else ""
    return f"{field.description}{words}" + (f" Here: {beside}" if beside else "")


def _default(field: FieldInfo) -> str:
    """Return a default as YAML; nothing for a key that is not set."""
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
