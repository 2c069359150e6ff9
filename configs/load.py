"""Read a run file: strict YAML, overrides, schema, rules. All problems are reported in one message."""

import re
from collections.abc import Hashable, Sequence
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml
from pydantic import ValidationError

from configs.errors import InputError
from configs.path_text import BAD_PATH, expand_path
from configs.rules import problems
from configs.schema import RunConfig
from configs.secrets import HIDDEN, hide_secrets, is_secret_name

RUNS = Path(__file__).parent / "runs"


class _Shortened(Repr):
    """Show values in messages: truncated, since a few YAML aliases can expand into a huge list, and without secrets."""

    def repr_str(self, x: str, level: int) -> str:
        # before it is truncated: what remains of a URI may not look like one
        return super().repr_str(hide_secrets(x), level)


_SHORT = _Shortened()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 4, 4, 80, 80


def load_run(name_or_path: str, *, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file.

    Args:
        name_or_path: A YAML file, or the name of a file in configs/runs.
        overrides: Each is `section.key=value`, with the value read as YAML; the last one for a key wins.
    Raises:
        InputError: the file, an override or the run is wrong; the message lists every problem.
    """
    path = find_run(name_or_path)
    data = read_yaml(_read_text(path), name=str(path))
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold sections of keys, got {type(data).__name__}: see configs/runs/demo.yaml")
    for override in overrides:
        _set_override(data, override)
    return check_run(data, name=name_or_path)


def check_run(data: dict[str, Any], *, name: str) -> RunConfig:
    """Check plain values against the schema, then the rules, and return the run.

    Args:
        data: Sections of keys.
        name: Names the run in messages.
    Raises:
        InputError: lists every schema error or, if there is none, every broken rule.
    """
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        # if all items of a list are wrong, pydantic also reports the list as too short: drop that
        errors = [item for item in error.errors() if item["type"] != "too_short" or not item["input"]]
        raise InputError(_message(name, [_schema_problem(item) for item in errors])) from None
    if broken_rules := problems(config):
        raise InputError(_message(name, broken_rules))
    return config


def find_run(name_or_path: str) -> Path:
    """Return the run file at a path, or the shipped run file of that name.

    Raises:
        InputError: there is neither, or the path cannot be read.
    """
    path = expand_path(name_or_path)
    try:
        if path.is_file():
            return path
    except OSError as error:  # for example a name that is too long for the file system
        raise InputError(f"run file {name_or_path[:80]} cannot be read ({error.strerror}): check the path") from None
    shipped = RUNS / f"{name_or_path}.yaml"
    if "/" not in name_or_path and shipped.is_file():
        return shipped
    names = ", ".join(sorted(run.stem for run in RUNS.glob("*.yaml")))
    problem = "is a folder" if path.is_dir() else "does not exist"
    raise InputError(f"run file {name_or_path} {problem}: give a YAML file or one of {names}")


def dump_run(config: RunConfig) -> str:
    """Return a run as YAML with every default filled in; `load_run` reads it back as an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _StrictLoader(yaml.SafeLoader):
    """YAML without its surprises: 1e-3 is a number, `on`, 12:30:00 and dates are strings, repeated keys an error."""

    # PyYAML's own resolvers follow YAML 1.1, where `on` is true, 12:30:00 is 45000 and 1e-3 a string
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be a string, got {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice: remove one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _resolve(tag: str, pattern: str, first: Sequence[str]) -> None:
    """Read unquoted words that match the pattern as a type. PyYAML tries only words that begin with one of `first`."""
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_resolve("bool", r"^(?:true|false|True|False)$", "tfTF")
_resolve("null", r"^(?:~|null|)$", ["~", "n", ""])
_resolve("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789")
_resolve(
    "float",
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
    "-+.0123456789",
)


def read_yaml(text: str, *, name: str) -> Any:
    """Parse strict YAML into plain values.

    Raises:
        InputError: not YAML, a repeated key, or a tag such as !!python/object.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{name}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{name} is not YAML: {' '.join(str(error).split())}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"run file {path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"run file {path} cannot be read ({error.strerror}): check the path") from None


def _set_override(data: dict[str, Any], override: str) -> None:
    """Apply `section.key=value` in place. Add missing sections: the schema checks their names."""
    match = re.fullmatch(r"([a-z0-9_]+)\.([A-Za-z0-9_.]+)=(.*)", override, re.DOTALL)
    if match is None:
        raise InputError(f"--set {_shown(override)} is not an override: write section.key=value")
    section, keys, text = map(str, match.groups())
    *parents, last = [section, *keys.split(".")]
    target = data
    for key in parents:
        if target.get(key) is None:  # missing, or empty in the file
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise InputError(f"--set {_shown(override)}: {key} has no keys of its own: write section.key=value")
    target[last] = read_yaml(text, name=f"--set {section}.{keys}")


def _shown(override: str) -> str:
    key, equals, value = override.partition("=")
    return repr(f"{key}{equals}{HIDDEN}" if value and is_secret_name(key) else hide_secrets(override))


def _schema_problem(error: Any) -> str:
    """Format a pydantic error as one line: the key, what is wrong, the value seen."""
    key = ".".join(str(part) for part in error["loc"])
    is_secret = error["loc"] and is_secret_name(str(error["loc"][-1]))
    seen = f"a {type(error['input']).__name__}" if is_secret else _SHORT.repr(error["input"])
    if error["type"] == "extra_forbidden":
        similar = get_close_matches(str(error["loc"][-1]), _keys_at(error["loc"][:-1]), n=1)
        return f"unknown key {key}" + (f": did you mean {similar[0]}?" if similar else ": remove it")
    if error["type"] == "missing":
        return f"{key} is missing: add it"
    if error["type"] == "finite_number":
        return f"{key} must be a finite number, got {seen}"
    if error["type"] == BAD_PATH:
        return f"{key} is {seen}, but {error['msg']}"
    if error["type"] == "tuple_type":
        return f"{key} must be a list, got {seen}: write [{seen}]"
    # pydantic's messages begin with "Input should"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {message.replace('input should', 'must')}, got {seen[:80]}"


def _keys_at(location: tuple[str | int, ...]) -> list[str]:
    """Return the known keys of the section at a location of the schema; none if it is not a section."""
    section: Any = RunConfig
    for part in location:
        field = getattr(section, "model_fields", {}).get(str(part))
        section = field.annotation if field else None
    return list(getattr(section, "model_fields", {}))


def _message(name: str, lines: list[str]) -> str:
    lines = [hide_secrets(line) for line in lines]
    return f"{name}: {lines[0]}" if len(lines) == 1 else f"{name} has {len(lines)} problems:\n  " + "\n  ".join(lines)
