"""Say what a schema refuses in a run file or a study: a line per key, with the value seen and what to write instead."""

import math
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from reprlib import Repr
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from configs.path_text import BAD_PATH
from configs.schema import RunConfig, Source
from configs.secrets import hide_secrets, is_secret_name

_WORDS = {**dict.fromkeys(("true", "on", "yes", "1"), "true"), **dict.fromkeys(("false", "off", "no", "0"), "false")}
# What true and false may mean for a key with named values: the first that it accepts.
_WORDS_FOR = {"true": ("on", "auto"), "false": ("off", "none")}
# difflib's ratio from which a key may be a misspelling of another in its section, or in another section.
_NEAR, _NEAR_ELSEWHERE = 0.7, 0.8


class _Shortened(Repr):
    """Show values in messages: truncated, since a few YAML aliases can expand into a huge list, and without secrets.

    What has no text is shown as YAML writes it.
    """

    def repr_NoneType(self, _: None, __: int) -> str:  # the name that Repr looks for
        return "null"

    def repr_bool(self, x: bool, _: int) -> str:
        return str(x).lower()

    def repr_str(self, x: str, level: int) -> str:
        # before it is truncated: what remains of a URI may not look like one
        return super().repr_str(hide_secrets(x), level)


_SHORT = _Shortened()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 4, 4, 80, 80


# What is said of some of pydantic's types of errors.
_TEXTS = {
    "missing": "{key} is missing: add it",
    "finite_number": "{key} must be a finite number, got {seen}",
    "tuple_type": "{key} must be a list, got {seen}: write [{item}]",
    "too_short": "{key} must have at least one item, got none: add one",
    "too_long": "{key} must have {most} entries, got {seen}: remove the others",
    "string_too_short": "{key} must not be empty: write a text",
}


def schema_problems(error: ValidationError, *, is_whole: bool, schema: type[BaseModel] = RunConfig) -> list[str]:
    """Return one line per error: the key, what is wrong, the value seen, what to do.

    Args:
        error: What pydantic raised.
        is_whole: Whether to report keys that are missing.
        schema: What it was raised for.
    """
    items = [item for item in error.errors() if is_whole or item["type"] != "missing"]
    # if all items of a list are wrong, pydantic also reports the list as too short: drop that
    return [_problem(item, schema) for item in items if item["type"] != "too_short" or not item["input"]]


def first_problem(error: ValidationError, *, whole: str = "the file") -> str:
    """Return where the first problem is and what it is; one is enough for a file that nobody edits by hand.

    Args:
        error: The error.
        whole: The place of a problem of no single field.
    """
    problem = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, problem["loc"]))[:100]
    if problem["type"] == "missing":
        return f"no {where}"
    return f"{where or whole}: {problem['msg']}"


def refused_keys(error: ValidationError) -> set[tuple[Any, ...]]:
    """Return the sections and keys that are wrong or missing, as in ("slurm",) and ("model", "heads")."""
    return {item["loc"][:2] for item in error.errors()}


def _problem(error: Any, schema: type[BaseModel]) -> str:
    location = error["loc"]
    key = ".".join(str(part) for part in location)
    is_secret = location and is_secret_name(str(location[-1]))
    seen = f"a {type(error['input']).__name__}" if is_secret else _SHORT.repr(error["input"])[:80]
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return f"unknown key {key}" + _advice_on_unknown(location, schema)
    if error["type"] in _TEXTS:
        most, item = error.get("ctx", {}).get("max_length"), "" if error["input"] is None else seen
        return _TEXTS[error["type"]].format(key=key, seen=seen, most=most, item=item)
    if error["type"] == BAD_PATH:
        return f"{key} is {seen}, but {error['msg']}"
    if error["type"] == "model_type" and len(location) == 1:
        return f"{key}: must be a section of keys, got {seen}: write its keys below it, indented"
    if error["type"] == "model_type":
        return f"{key} must be a path or {{path: ..., weight: ...}}, got {seen}"
    # pydantic's messages begin with "Input should"
    message = error["msg"][0].lower() + error["msg"][1:]
    message = message.replace("valid dictionary", "map of names to values").replace("False, True", "false, true")
    message = message.replace("be a valid boolean", "be true or false")
    advice = "" if is_secret else _advice_on_type(error["type"], error["msg"], error["input"])
    return f"{key}: {message.replace('input should', 'must')}, got {seen}{advice}"


def _advice_on_type(kind: str, message: str, value: Any) -> str:
    """Return what to write where YAML reads a value as another type than is meant."""
    truth = _WORDS.get(str(value).lower())
    if truth is not None and (kind == "bool_type" or "False, True" in message):
        return f": write {truth}"
    if truth is not None and kind == "literal_error":
        return next((f": write {word}" for word in _WORDS_FOR[truth] if f"'{word}'" in message), "")
    number = _number(value) if kind in ("int_type", "float_type") else None
    if number is not None and (kind == "float_type" or number.is_integer()):
        return f": write {int(number) if number.is_integer() else number}"
    if kind == "string_pattern_mismatch":  # of names
        return ": use letters, digits, dots, _ and -"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f': write "{getattr(value, "text", str(value).lower())}"'  # as it is written: 2026.10, not 2026.1
    return ""


def _number(value: Any) -> float | None:
    """Return the number that a value is or spells, as in "64", 4.0 and 010; None for others, and for true."""
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _advice_on_unknown(location: tuple[Any, ...], schema: type[BaseModel]) -> str:
    names = list(_similar(str(location[-1]).lower(), location[:-1], schema))
    return f": did you mean {' or '.join(names)}?" if names else ": remove it"


def _similar(key: str, parents: tuple[Any, ...], schema: type[BaseModel]) -> Iterable[str]:
    """Return the keys that an unknown one may stand for: those of its own section by name, others as section.key."""
    here = _keys_at(parents, schema)
    elsewhere = {
        f"{section}.{name}": name
        for section, field in schema.model_fields.items()
        for name in _keys_of(field.annotation)
        if parents != (section,)
    }
    if len(parents) > 1:  # an item of a list: it has no neighbours
        elsewhere = {}
    near = get_close_matches(key, here, n=1, cutoff=_NEAR)
    near_elsewhere = get_close_matches(key, elsewhere.values(), n=1, cutoff=_NEAR_ELSEWHERE)
    return (
        [*near, *(dotted for dotted, name in elsewhere.items() if name == key)]
        or [name for name in here if _shares_a_word(key, name) or _abbreviates(key, name)]
        or [dotted for dotted, name in elsewhere.items() if name in near_elsewhere]
        or [dotted for dotted, name in elsewhere.items() if _abbreviates(key, name)]
    )


def _abbreviates(key: str, name: str) -> bool:
    """Return whether each word of a key begins one of another: `seq_len` is sequence_length."""
    parts, words = key.split("_"), name.split("_")
    return len(key) > 2 and len(parts) <= len(words) and all(map(str.startswith, words, parts))


def _shares_a_word(key: str, name: str) -> bool:
    """Return whether two keys share a word, or one is the other's initials: `lr` is learning_rate."""
    words = name.split("_")
    return not {*key.split("_")}.isdisjoint(words) or (len(words) > 1 and key == "".join(word[0] for word in words))


def _keys_at(location: tuple[Any, ...], schema: type[BaseModel]) -> list[str]:
    """Return the known keys of the section at a location of a schema; none if it is not a section."""
    if location and isinstance(location[-1], int):  # in data.sources, the one list of sections
        return list(_keys_of(Source))
    section: Any = schema
    for part in location:
        field = getattr(section, "model_fields", {}).get(str(part))
        values = get_args(section)[1:]  # of a map of names to sections
        section = field.annotation if field else values[0] if get_origin(section) is dict else None
    return list(_keys_of(section))


def _keys_of(section: Any) -> Iterator[str]:
    yield from getattr(section, "model_fields", {})
