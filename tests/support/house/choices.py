"""Find code that compares a run file's value outside the files of that choice."""

import ast
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from tests.support.house.source import Source, is_under


@dataclass(frozen=True)
class ChoiceRule:
    """One key whose values each have a file.

    Attributes:
        key: The key of the run file, or the option of the command line.
        words: Its values.
        places: The files, and the folders (ending with a slash), that may compare its value.
    """

    key: str
    words: Collection[str]
    places: tuple[str, ...]

    @property
    def field(self) -> str:
        """Return the last part of the key."""
        return self.key.rpartition(".")[2]

    def classes(self, sources: Iterable[Source]) -> set[str]:
        """Return the classes that the folders of the choice define."""
        folders = tuple(place for place in self.places if place.endswith("/"))
        files = [source for source in sources if is_under(source.name, folders)]
        return {node.name for file in files for node in file.tree.body if isinstance(node, ast.ClassDef)}


# Values of several keys: they count only next to the name of this key.
AMBIGUOUS_WORDS = ("auto", "none")


def choice_problems(source: Source, rules: Iterable[ChoiceRule]) -> Iterator[str]:
    """Yield comparisons with a value of a choice, and tables by its values, outside the choice's files."""
    for rule in rules:
        if is_under(source.name, rule.places):
            continue
        for node in source.nodes:
            words = _words_asked_for(node)
            asked = sorted(word for word in words if word in rule.words and not _means_another(word, node, rule))
            # One key of a dict may be a value by chance, as in JSON; with two, the dict is a table of the choice.
            by_chance = isinstance(node, ast.Dict) and len(set(words) & set(rule.words)) < 2
            if asked and not by_chance:
                line = getattr(node, "lineno", 0)
                yield f"{source.name}:{line} asks whether {rule.key} is {', '.join(asked)}: let its file answer"


def _words_asked_for(node: ast.AST) -> Collection[str]:
    if isinstance(node, ast.Compare):
        return _words_of([node.left, *node.comparators])
    if isinstance(node, ast.MatchValue):
        return _words_of([node.value])
    if isinstance(node, ast.Dict):
        return _words_of([key for key in node.keys if key is not None])
    return ()


def _words_of(nodes: Iterable[ast.expr]) -> set[str]:
    words = set()
    for node in nodes:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        words |= {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return words


def _means_another(word: str, node: ast.AST, rule: ChoiceRule) -> bool:
    if word not in AMBIGUOUS_WORDS:
        return False
    names = {each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "") for each in ast.walk(node)}
    return rule.field not in names


def class_problems(source: Source, sources: Iterable[Source], rules: Iterable[ChoiceRule]) -> Iterator[str]:
    """Yield `isinstance` of a class that the folders of a choice define, outside the choice's files."""
    calls = [node for node in source.nodes if isinstance(node, ast.Call) and len(node.args) == 2]
    asking = [node for node in calls if getattr(node.func, "id", "") in ("isinstance", "issubclass")]
    for rule in rules if asking else ():
        if is_under(source.name, rule.places):
            continue
        for node in asking:
            for name in rule.classes(sources) & {getattr(each, "id", "") for each in ast.walk(node.args[1])}:
                yield f"{source.name}:{node.lineno} asks whether {rule.key} is a {name}: let its file answer"
