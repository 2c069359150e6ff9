"""Generate docs/configuration.md and the table of backends in docs/attention.md: `python -m configs.document`."""

import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from configs.backends import BACKENDS
from configs.choices import OneOf
from configs.schema import RunConfig

TARGET = Path(__file__).parent.parent / "docs" / "configuration.md"
ATTENTION = TARGET.parent / "attention.md"
BEGIN, END = "<!-- made by `python -m configs.document` -->\n", "<!-- end -->\n"

HEAD = """\
# The run file

Generated from the schema by `python -m configs.document`; do not edit by hand.

A run file is YAML: sections that hold keys. It is read strictly: unknown keys, repeated keys, wrong types, `nan` and
`inf` are errors, and all problems are reported at once. `1e-3` is a number. `on` and `12:30:00` are strings, but quote
times anyway: other YAML readers read `12:30:00` as a number. A section without keys has the default of every key.

In every key that holds a path, `~` and environment variables (`$SCRATCH/data`, `${USER}`) are replaced. A variable that
is not set is an error. In `track.uri` this holds for stores that are files.

On the command line, `--set section.key=value` overrides a key. The value is read as YAML; if a key is set twice, the
last value wins.
"""


def configuration_page() -> str:
    """Return the page on the run file: one table per section, in the order of the schema."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        section: Any = field.annotation
        parts.append(f"## `{name}`\n\n{section.__doc__.strip()}\n\n{_section_table(section)}")
    return "\n".join(parts)


def backend_table() -> str:
    """Return the Markdown table of the attention backends."""
    rows = [
        "| backend | what it is | positions | precisions | devices | documents | memory grows with | has run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for backend in BACKENDS.values():
        lists = [", ".join(words) for words in (backend.positions, backend.precisions, backend.devices)]
        documents = "yes" if backend.documents else "no"
        cells = (f"`{backend.name}`", backend.what, *lists, documents, backend.memory, backend.has_run)
        rows.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(rows) + "\n"


def replace_backend_table(page: str) -> str:
    """Return a page with a current table of backends between its two markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}{backend_table()}{END}{rest.split(END)[1]}"


def _section_table(section: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        rows.append(f"| `{name}` | {field_type(field)} | {_default(field)} | {_cell(field.description or '')} |")
    return "\n".join(rows) + "\n"


def field_type(field: FieldInfo) -> str:
    """Return a key's type and range, as in `whole number, at least 1`."""
    # pydantic moves the arguments of Annotated[...] after the type into the metadata
    for item in field.metadata:
        if isinstance(item, OneOf):
            return _choices(item.words)
    words = {"ge": "at least", "gt": "over", "le": "at most", "lt": "under"}
    bounds = [f"{words[kind]} {value:g}" for kind, value in _bounds(field)]
    return _type(field.annotation) + (f", {' and '.join(bounds)}" if bounds else "")


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _choices(arguments)
    if origin in (Union, types.UnionType):  # T | None, whose default is shown as unset
        return _type(next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "map of names to text"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "path or `{path, weight}`"
    return {int: "whole number", float: "number", bool: "`true` \\| `false`", str: "text"}[annotation]


def _choices(words: tuple[Any, ...]) -> str:
    # YAML writes true and false
    return " \\| ".join(f"`{str(word).lower() if isinstance(word, bool) else word}`" for word in words)


def _bounds(field: FieldInfo) -> list[tuple[str, float]]:
    """Return the ends of a number's range, as in `("ge", 1)`."""
    constraints: list[Any] = list(field.metadata)
    for argument in get_args(field.annotation):  # Annotated[...] | None keeps its range inside
        for item in getattr(argument, "__metadata__", ()):
            constraints.extend(getattr(item, "metadata", None) or [item])
    pairs = [(kind, getattr(item, kind, None)) for item in constraints for kind in ("ge", "gt", "le", "lt")]
    return [(kind, value) for kind, value in pairs if value is not None]


def _default(field: FieldInfo) -> str:
    """Return a key's default as YAML writes it; `required` or `unset` if there is none."""
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


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(configuration_page(), encoding="utf-8")
    ATTENTION.write_text(replace_backend_table(ATTENTION.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stderr.write(f"wrote {TARGET} and the table in {ATTENTION}\n")
