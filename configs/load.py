"""Read a run file: strict YAML, overrides, schema, rules. All problems are reported in one message."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.errors import InputError
from configs.path_text import expand_path
from configs.rules import problems
from configs.schema import RunConfig
from configs.schema_problems import refused_keys, schema_problems
from configs.secrets import HIDDEN, hide_secrets, is_secret_name
from configs.strict_yaml import dump_yaml, parse_yaml, read_yaml, with_subject

RUNS = Path(__file__).parent / "runs"
EXAMPLE = RUNS / "demo.yaml"


def load_run(name_or_path: str, *, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file.

    Args:
        name_or_path: A YAML file, or the name of a file in configs/runs.
        overrides: Each is `section.key=value`, with the value read as YAML; the last one for a key wins.
    Raises:
        InputError: the file, an override or the run is wrong; the message lists every problem.
    """
    path = find_run(name_or_path)
    text = read_text_file(path, what="run file")
    parsed = parse_yaml(text)
    data = parsed.value
    is_run = isinstance(data, dict)
    wrong = [with_subject(str(path), problem) for problem in parsed.problems]
    if not is_run and not wrong:
        wrong = [_without_sections(path, text, data)]
    data = data if is_run else {}
    for override in overrides:
        wrong.extend(_set_override(data, override))
    if is_run:
        return _check(data, name=name_or_path, wrong=wrong, is_whole=not parsed.problems)
    raise InputError(problem_message(name_or_path, wrong, ()))


def check_run(data: dict[str, Any], *, name: str) -> RunConfig:
    """Check plain values against the schema and the rules, and return the run.

    Args:
        data: Sections of keys.
        name: Names the run in messages.
    Raises:
        InputError: lists every schema error, and every rule that the valid keys break.
    """
    return _check(data, name=name, wrong=[], is_whole=True)


def find_run(name_or_path: str) -> Path:
    """Return the run file at a path, or the shipped run file of that name.

    Raises:
        InputError: there is neither, or the path cannot be read.
    """
    return find_yaml(name_or_path, shipped=RUNS, what="run file")


def find_yaml(name_or_path: str, *, shipped: Path, what: str) -> Path:
    """Return the file at a path, or the shipped file of that name.

    Args:
        name_or_path: What the user gave.
        shipped: Folder of the shipped files.
        what: What the file is, in messages: run file, study.
    Raises:
        InputError: there is neither, or the path cannot be read.
    """
    path, names = expand_path(name_or_path), ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
    if not name_or_path.strip():
        raise InputError(f"{what} {name_or_path!r} is not a name: give a YAML file or one of {names}")
    try:
        if path.is_file():
            return path
    except OSError as error:  # for example a name that is too long for the file system
        raise InputError(f"{what} {name_or_path[:80]} cannot be read ({error.strerror}): check the path") from None
    file = shipped / f"{name_or_path}.yaml"
    if "/" not in name_or_path and file.is_file():
        return file
    problem = "is a folder" if path.is_dir() else "is a device or a pipe" if path.exists() else "does not exist"
    raise InputError(f"{what} {name_or_path} {problem}: give a YAML file or one of {names}")


def shipped_runs() -> list[str]:
    """Return the names of the run files in configs/runs, sorted."""
    return sorted(run.stem for run in RUNS.glob("*.yaml"))


def dump_run(config: RunConfig) -> str:
    """Return a run as YAML with every default filled in; `load_run` reads it back as an equal value."""
    return dump_yaml(config.model_dump(mode="json"))


def _check(data: dict[str, Any], *, name: str, wrong: list[str], is_whole: bool) -> RunConfig:
    """Return the run of plain values.

    Args:
        data: Sections of keys; an empty section has the default of every key.
        name: Names the run in messages.
        wrong: Problems that are known already, each a whole sentence.
        is_whole: Whether keys that are not in `data` are missing: a repeated section hides the keys of the first.
    Raises:
        InputError: lists every problem.
    """
    data = {key: {} if value is None and key in RunConfig.model_fields else value for key, value in data.items()}
    try:
        config = RunConfig.model_validate(data)
        broken = problems(config)
    except ValidationError as error:
        broken = schema_problems(error, is_whole=is_whole) + problems(_valid_part(data, error), partial=True)
    if wrong or broken:
        raise InputError(problem_message(name, wrong, broken))
    return config


def _valid_part(data: dict[str, Any], error: ValidationError) -> RunConfig:
    """Return the run with only its valid keys; reading any other raises AttributeError.

    What is wrong or missing is first taken from an example, so that the rest can be validated, and then removed.
    """
    example = read_yaml(read_text_file(EXAMPLE, what="run file"), name=str(EXAMPLE))
    # a copy of each section: with YAML's aliases two of them may be one object
    values = {key: {**value} if isinstance(value, dict) else value for key, value in data.items()}
    refused = refused_keys(error)
    for section, *keys in refused:
        target, source = (values[section], example.get(section, {})) if keys else (values, example)
        key = keys[0] if keys else section
        target.pop(key, None)
        if key in source:
            target[key] = source[key]
    config = RunConfig.model_validate(values)
    for section, *keys in refused:
        owner = getattr(config, section) if keys else config
        vars(owner).pop(keys[0] if keys else section, None)
    return config


def read_text_file(path: Path, *, what: str) -> str:
    """Return the text of a YAML file.

    Args:
        path: The file.
        what: What it is, in messages.
    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror}): check the path") from None


def _without_sections(path: Path, text: str, value: Any) -> str:
    if value is None:
        what = "holds no keys" if text.strip() else "is empty"
        return f"run file {path} {what}: type `trainshort init NAME` for one to edit"
    kind = "a list" if isinstance(value, list) else "text" if isinstance(value, str) else "a value"
    return f"run file {path} must hold sections of keys, got {kind}: type `trainshort init NAME` for one to edit"


def _set_override(data: dict[str, Any], override: str) -> Sequence[str]:
    """Apply `section.key=value` in place or return what is wrong. Add missing sections: the schema checks names."""
    match = re.fullmatch(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_.-]+)=(.*)", override, re.DOTALL)
    if match is None:
        return [f"--set {_shown(override)} is not an override: write section.key=value"]
    section, keys, text = map(str, match.groups())
    parsed = parse_yaml(text, has_lines=False)
    if parsed.problems:
        return [with_subject(f"--set {section}.{keys}", problem) for problem in parsed.problems]
    *parents, last = [section, *keys.split(".")]
    target = data
    for key in parents:
        if target.get(key) is None:  # missing, or empty in the file
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            return [f"--set {_shown(override)}: {key} has no keys of its own: write section.key=value"]
    target[last] = parsed.value
    return ()


def _shown(override: str) -> str:
    key, equals, value = override.partition("=")
    return repr(f"{key}{equals}{HIDDEN}" if value and is_secret_name(key) else hide_secrets(override))


def problem_message(name: str, sentences: Sequence[str], broken: Sequence[str]) -> str:
    """Return one message. A problem alone is one line, in which those of `broken` need the name; several are a list."""
    if len(sentences) + len(broken) == 1:
        return hide_secrets(sentences[0] if sentences else f"{name}: {broken[0]}")
    lines = [hide_secrets(line) for line in (*sentences, *broken)]
    return f"{name} has {len(lines)} problems:\n  " + "\n  ".join(lines)
