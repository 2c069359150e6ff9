"""YAML without its surprises: 1e-3 is a number, `on`, 12:30:00 and dates are text, repeated keys are problems."""

import json
import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from configs.errors import InputError

# Patterns of PyYAML's messages, and what to say instead: what is wrong, or what to do.
_WORDS = {
    r"(found character '\\t' that cannot start any token)": r"\1: indent with spaces, not tabs",
    r"found character '(.)' that cannot start any token": r"a value cannot begin with \1: quote it",
    "(mapping values are not allowed here)": r"\1: indent the line like its neighbours, or quote a value with a colon "
    "in it",
    "expected the node content, but found '<stream end>'": "it ends where a value is expected: close every bracket",
    "expected the node content, but found '(.+)'": r"\1 stands where a value is expected: write the value, or quote it",
    "expected ',' or '(.)', but got '<stream end>'": r"it ends before a closing \1: add it",
    "expected ',' or '(.)', but got '(.+)'": r"a comma or a closing \1 is missing before '\2': add it",
    "found unexpected end of stream": "it ends inside quotes: close them",
    "expected alphabetic or numeric character, but found .*": "a value cannot begin with *, & or %: quote it",
    "found undefined alias '(.*)'": r"the alias *\1 is not defined: quote a value that begins with *",
    "expected <block end>, but found .*|could not find expected ':'": "a line does not fit what is above it: check its "
    "indentation, quotes and brackets",
}


class WrittenInt(int):
    """A whole number that is written in another way than Python's, such as 12_000; `text` is how."""

    text: str


class WrittenFloat(float):
    """A number that is written in another way than Python's, such as 1e-3 or 1.10; `text` is how."""

    text: str


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


def parse_yaml(text: str, *, has_lines: bool = True) -> ParsedYaml:
    """Parse strict YAML, and collect what is wrong with it. A tag such as !!python/object is refused.

    Args:
        text: The text.
        has_lines: Whether to name the line of a problem.
    """
    try:
        loader = _StrictLoader(text, has_lines=has_lines)
        try:
            return ParsedYaml(loader.get_single_data(), tuple(loader.repeated))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        problem = " ".join(str(error.problem or error.context).split())
        if problem.startswith("but "):  # the rest of a sentence, as in "expected one document, but found another"
            problem = f"{error.context}, {problem}"
        for pattern, words in _WORDS.items():
            if match := re.fullmatch(pattern, problem):
                problem = match.expand(words)
                break
        mark = error.problem_mark if has_lines else None
        return ParsedYaml(None, (f"line {mark.line + 1}: {problem}" if mark else f"is not YAML: {problem}",))
    except yaml.reader.ReaderError as error:
        place = f"line {text.count(chr(10), 0, error.position) + 1}" if has_lines else "it"
        character = text[error.position]
        return ParsedYaml(None, (f"is not YAML: {place} holds the control character {character!r}: remove it",))
    except RecursionError:
        return ParsedYaml(None, ("is not YAML: its brackets are nested too deeply",))
    except (ValueError, AttributeError, LookupError):  # also of a tag, as in !!bool x
        return ParsedYaml(None, ("is not YAML: a number is too long, or a value is not of its tag's type: quote it",))
    except yaml.YAMLError as error:
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


def as_yaml(value: Any) -> str:
    """Return a plain value as a run file holds it: null, true, 'text', [1, 2]; a text with a line break as "a\\nb"."""
    if isinstance(value, str) and value.isprintable() and "'" not in value:
        return f"'{value}'"
    return json.dumps(value, ensure_ascii=False)


def plain_yaml(text: str) -> str:
    """Return a text as a value of YAML in one line, quoted only where it would be read as something else: 1e3, a #1."""
    if parse_yaml(text).value == text:
        return text
    quoted: str = yaml.dump(text, Dumper=_StrictDumper, default_style='"', width=math.inf, allow_unicode=True)
    return quoted.removesuffix("\n")


def dump_yaml(values: Any) -> str:
    """Return plain values as YAML that `parse_yaml` reads back as equal ones."""
    return yaml.dump(values, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True)


def with_subject(name: str, problem: str) -> str:
    """Return a problem of `parse_yaml` as a sentence about the text of this name."""
    return f"{name} {problem}" if problem.startswith("is ") else f"{name}, {problem}"


class _StrictLoader(yaml.SafeLoader):
    # PyYAML's own resolvers follow YAML 1.1, where `on` is true, 12:30:00 is 45000 and 1e-3 a string
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str, *, has_lines: bool) -> None:
        super().__init__(text)
        self.repeated: list[str] = []
        self._has_lines = has_lines

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be a string, got {key!r}", key_node.start_mark
                )
            if key in seen:
                line = f"line {key_node.start_mark.line + 1}: " if self._has_lines else ""
                self.repeated.append(f"{line}key {key!r} appears twice: remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """Quotes what either resolver would read as something else than text: `on` as well as 1e3."""


def _written(number: float, kind: type[WrittenInt] | type[WrittenFloat], text: str) -> float:
    """Return a number; of another kind, with its text, where Python would not write it so."""
    if str(number) == text:
        return number
    written = kind(number)
    written.text = text
    return written


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return _written(loader.construct_yaml_int(node), WrittenInt, node.value)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return _written(loader.construct_yaml_float(node), WrittenFloat, node.value)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _resolve(tag: str, pattern: str, first: Sequence[str]) -> None:
    """Read unquoted words that match the pattern as a type. PyYAML tries only words that begin with one of `first`."""
    for kind in (_StrictLoader, _StrictDumper):
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_resolve("bool", r"^(?:true|false|True|False)$", "tfTF")
_resolve("null", r"^(?:~|null|)$", ["~", "n", ""])
_resolve("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789")
_resolve(
    "float",
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
    "-+.0123456789",
)
