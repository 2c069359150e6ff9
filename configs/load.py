"""Read a run file: strict YAML, overrides, schema, rules. All problems come in one message."""

import re
from collections.abc import Hashable, Sequence
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml
from pydantic import ValidationError

from configs.errors import InputError
from configs.rules import problems
from configs.schema import RunConfig

RUNS = Path(__file__).parent / "runs"
# A few lines of YAML can name a list of lists of lists so large that writing it out would end this process.
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 4, 4, 80, 80


def load_run(name_or_path: str, *, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the checked run that a YAML file and overrides describe.

    Args:
        name_or_path: A YAML file, or the name of one of configs/runs.
        overrides: `section.key=value` each, the value read as YAML; the last one wins.
    Raises:
        InputError: the file, an override or the run is wrong; names every problem.
    """
    path = find_run(name_or_path)
    data = read_yaml(_read_text(path), name=str(path))
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold sections of keys, got {type(data).__name__}: see configs/runs/demo.yaml")
    for override in overrides:
        _apply(data, override)
    return check_run(data, name=name_or_path)


def check_run(data: dict[str, Any], *, name: str) -> RunConfig:
    """Return the run that plain values describe.

    Raises:
        InputError: names every problem of the schema, or else every broken rule.
    """
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        # too_short only repeats that the items of a list were wrong
        found = [
            _explain(problem) for problem in error.errors() if problem["type"] != "too_short" or not problem["input"]
        ]
        raise InputError(_message(name, found)) from None
    if found := problems(config):
        raise InputError(_message(name, found))
    return config


def find_run(name_or_path: str) -> Path:
    """Return the file of a run given as a path or as the name of a shipped run."""
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise InputError(f"run file {name_or_path[:80]} cannot be read ({error.strerror}): check the path") from None
    shipped = RUNS / f"{name_or_path}.yaml"
    if "/" not in name_or_path and shipped.is_file():
        return shipped
    names = ", ".join(sorted(run.stem for run in RUNS.glob("*.yaml")))
    what = "is a folder" if path.is_dir() else "does not exist"
    raise InputError(f"run file {name_or_path} {what}: give a YAML file or one of {names}")


def dump_run(config: RunConfig) -> str:
    """Return the whole run as YAML that `load_run` reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _StrictLoader(yaml.SafeLoader):
    """YAML as one reads it: no repeated keys, no sexagesimals, no dates, `on` is a word, 1e-3 a number."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be a word, got {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is there twice: remove one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _resolve(tag: str, pattern: str, first: Sequence[str]) -> None:
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
    """Return the plain values of a strict YAML text.

    Raises:
        InputError: not YAML, a repeated key, or a Python tag.
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


def _apply(data: dict[str, Any], override: str) -> None:
    match = re.fullmatch(r"([a-z0-9_]+)\.([A-Za-z0-9_.]+)=(.*)", override, re.DOTALL)
    if match is None:
        raise InputError(f"--set {override!r} is not an override: write section.key=value")
    section, keys, text = map(str, match.groups())
    *parents, last = [section, *keys.split(".")]
    target = data
    for key in parents:
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise InputError(f"--set {override!r}: {key} has no keys of its own: write section.key=value")
    target[last] = read_yaml(text, name=f"--set {section}.{keys}")


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    seen = _SHORT.repr(problem["input"])
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(str(problem["loc"][-1]), _keys(problem["loc"][:-1]), n=1)
        return f"unknown key {where}" + (f": did you mean {near[0]}?" if near else ": remove it")
    if problem["type"] == "missing":
        return f"{where} is missing: add it"
    if problem["type"] == "finite_number":
        return f"{where} must be a finite number, got {seen}"
    if problem["type"] == "tuple_type":
        return f"{where} must be a list, got {seen}: write [{seen}]"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where}: {message.replace('input should', 'must')}, got {seen[:80]}"


def _keys(location: tuple[str | int, ...]) -> list[str]:
    section: Any = RunConfig
    for part in location:
        field = getattr(section, "model_fields", {}).get(str(part))
        section = field.annotation if field else None
    return list(getattr(section, "model_fields", {}))


def _message(name: str, found: list[str]) -> str:
    return f"{name}: {found[0]}" if len(found) == 1 else f"{name} has {len(found)} problems:\n  " + "\n  ".join(found)
