"""Parse the files that the house rules check."""

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

HOUSE = Path(__file__).parents[3]
FLOORS = {"configs": 0, "parallel": 1, "data_pipeline": 1, "training": 2, "launch": 3}


@dataclass(frozen=True)
class Source:
    """One Python file.

    Attributes:
        name: Its path inside the repository, with forward slashes.
        text: Its content.
    """

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """Return the parsed content."""
        return ast.parse(self.text, self.name)

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Return every node of the tree."""
        return tuple(ast.walk(self.tree))


def sources_of(*folders: str) -> tuple[Source, ...]:
    """Return the Python files of folders of the repository, in the order of their names."""
    files = sorted(file for folder in folders for file in (HOUSE / folder).rglob("*.py"))
    return tuple(Source(file.relative_to(HOUSE).as_posix(), file.read_text(encoding="utf-8")) for file in files)


def is_under(name: str, places: tuple[str, ...]) -> bool:
    """Return whether a file is one of these files, or lies in one of these folders, which end with a slash."""
    return any(name == place or (place.endswith("/") and name.startswith(place)) for place in places)
