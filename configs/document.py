"""Write what the docs take from code, all of docs/configuration.md and a table: `python -m configs.document`."""

import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from configs.backends import BACKENDS
from configs.schema import RunConfig

TARGET = Path(__file__).parent.parent / "docs" / "configuration.md"
ATTENTION = TARGET.parent / "attention.md"
BEGIN, END = "<!-- made by `python -m configs.document` -->\n", "<!-- end -->\n"

HEAD = """\
# The run file

Made from the schema by `python -m configs.document`; do not edit by hand.

A run file is YAML: sections of keys, read strictly. Unknown and repeated keys, wrong types, `nan` and `inf` are
errors, and all problems are reported at once. `1e-3` is a number; `on` and `12:30:00` are words, but quote times all
the same. On the command line `--set section.key=value` overrides one key; the value is read as YAML, the last one
wins. `trainshort check` says which values this version cannot do yet.
"""


def configuration_page() -> str:
    """Return the page: one table a section, in the order of the schema."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        section: Any = field.annotation
        parts.append(f"## `{name}`\n\n{section.__doc__.strip()}\n\n{table(section)}")
    return "\n".join(parts)


def backend_table() -> str:
    """Return the Markdown table of the attention backends."""
    rows = [
        "| backend | what it is | positions | precisions | devices | memory grows with | has run |",
        "|---|---|---|---|---|---|---|",
    ]
    for backend in BACKENDS.values():
        lists = [", ".join(words) for words in (backend.positions, backend.precisions, backend.devices)]
        cells = (f"`{backend.name}`", backend.what, *lists, backend.memory, backend.has_run)
        rows.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(rows) + "\n"


def with_backends(page: str) -> str:
    """Return a page with the table of backends between its two marks made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}{backend_table()}{END}{rest.split(END)[1]}"


def table(section: type[BaseModel]) -> str:
    """Return the Markdown table of a section's keys."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        kind = type_words(field.annotation) + limits(field)
        rows.append(f"| `{name}` | {kind} | {default_words(field)} | {_cell(field.description or '')} |")
    return "\n".join(rows) + "\n"


def type_words(annotation: Any) -> str:
    """Return a type as a user would say it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return type_words(next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        return f"list of {type_words(arguments[0])}"
    if origin is dict:
        return "map of names to text"
    if hasattr(annotation, "__metadata__"):
        return type_words(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "path or `{path, weight}`"
    return {int: "whole number", float: "number", bool: "`true` \\| `false`", str: "text"}[annotation]


def limits(field: FieldInfo) -> str:
    """Return a number's range, as in `, at least 1`."""
    words = {"ge": "at least", "gt": "over", "le": "at most", "lt": "under"}
    found = [f"{words[kind]} {value:g}" for kind, value in _bounds(field)]
    return f", {' and '.join(found)}" if found else ""


def default_words(field: FieldInfo) -> str:
    """Return a key's default as YAML has it; `required` where there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{value}`"


def _bounds(field: FieldInfo) -> list[tuple[str, float]]:
    found: list[Any] = list(field.metadata)
    for argument in get_args(field.annotation):  # Annotated[...] | None keeps its range inside
        for part in getattr(argument, "__metadata__", ()):
            found.extend(getattr(part, "metadata", None) or [part])
    pairs = [(kind, getattr(part, kind, None)) for part in found for kind in ("ge", "gt", "le", "lt")]
    return [(kind, value) for kind, value in pairs if value is not None]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(configuration_page(), encoding="utf-8")
    ATTENTION.write_text(with_backends(ATTENTION.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stderr.write(f"wrote {TARGET} and the table in {ATTENTION}\n")
