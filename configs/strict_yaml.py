"""YAML without its surprises: 1e-3 is a number, `on`, 12:30:00 and dates are text, repeated keys are problems."""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from configs.errors import InputError

_ADVICE = {
    "found character '\\t' that cannot start any token": "indent with spaces, not tabs",
    "mapping values are not allowed here": "indent the line like its neighbours, or quote a value with a colon in it",
}


@dataclass(frozen=True)
class ParsedYaml:
    """What a YAML text holds.

    Attributes:
        value: Plain values; None if the text is not YAML.
        problems: One line each, as in `line 3: key 'a' appears twice: remove one`. Of a repeated key, `value` holds the
            last one.
    """

    value: Any
    problems: tuple[str, ...]


def parse_yaml(text: str) -> ParsedYaml:
    """Parse strict YAML, and collect what is wrong with it. A tag such as !!python/object is refused."""
    try:
        loader = _StrictLoader(text)
        try:
            return ParsedYaml(loader.get_single_data(), tuple(loader.repeated))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        problem = " ".join(str(error.problem or error.context).split())
        if problem.startswith("but "):  # the rest of a sentence, as in "expected one document, but found another"
            problem = f"{error.context}, {problem}"
        if advice := _ADVICE.get(problem):
            problem = f"{problem}: {advice}"
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else "is not YAML: "
        return ParsedYaml(None, (f"{line}{problem}",))
    except yaml.reader.ReaderError as error:
        number, character = text.count("\n", 0, error.position) + 1, text[error.position]
        return ParsedYaml(None, (f"is not YAML: line {number} holds the control character {character!r}: remove it",))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return ParsedYaml(None, (f"is not YAML: {' '.join(str(error).split())}",))


def read_yaml(text: str, *, name: str) -> Any:
    """Parse strict YAML into plain values.

    Raises:
        InputError: not YAML, a repeated key, or a tag such as !!python/object; the message begins with `name`.
    """
    parsed = parse_yaml(text)
    for problem in parsed.problems:
        raise InputError(with_subject(name, problem))
    return parsed.value


def with_subject(name: str, problem: str) -> str:
    """Return a problem of `parse_yaml` as a sentence about the text of this name."""
    return f"{name} {problem}" if problem.startswith("is ") else f"{name}, {problem}"


class _StrictLoader(yaml.SafeLoader):
    # PyYAML's own resolvers follow YAML 1.1, where `on` is true, 12:30:00 is 45000 and 1e-3 a string
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be a string, got {key!r}", key_node.start_mark
                )
            if key in seen:
                self.repeated.append(f"line {key_node.start_mark.line + 1}: key {key!r} appears twice: remove one")
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
