"""Check names, uses of private names, and the length of files and functions."""

import ast
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

from tests.support.house.source import FLOORS, Source

FILE_LINES, FUNCTION_LINES, TEST_NAME_LENGTH = 400, 50, 60
# Private names of the standard library and third parties; never add one of ours.
PRIVATE_NAMES_OF_OTHERS = (
    "_allocate_or_extend_buffers",  # DeepSpeed: memory for what a stage receives
    "_asdict",
    "_cdata",  # torch: which memory it is
    "_dynamo",  # torch: how often it compiled
    "_exit",
    "_fields",
    "_getframe",
    "_get_backend",  # torch: whether a group can be split
    "_inductor",  # torch: which compiler it finds
    "_internal",  # torch's fake process group
    "_local_scalar_dense",  # torch: an operation, as two others are
    "_python_dispatch",  # torch's hooks on every operation
    "_pytree",
    "_relative_position_bucket",
    "_replace",
    "_store_based_barrier",  # torch: ranks wait for each other
    "_subclasses",  # torch's tensors without memory
    "_to_copy",
    "_triton",  # torch: whether it finds Triton
    "_world",
)
# Calls that take the name of an attribute as a string.
_NAMED_ATTRIBUTE = ("attrgetter", "delattr", "getattr", "hasattr", "object", "patch", "setattr")
_PRIVATE = re.compile(r"_(?!_)\w+")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def length_problems(source: Source) -> Iterator[str]:
    """Yield files and functions that are too long."""
    if (lines := len(source.text.splitlines())) >= FILE_LINES:
        yield f"{source.name} has {lines} lines"
    for node in source.nodes:
        if isinstance(node, Function) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines >= FUNCTION_LINES:
                yield f"{source.name}:{node.lineno} {node.name} has {lines} lines"


def long_test_names(source: Source) -> Iterator[str]:
    """Yield tests whose names are too long to read in a list."""
    for node in source.nodes:
        if isinstance(node, Function) and node.name.startswith("test_") and len(node.name) > TEST_NAME_LENGTH:
            yield f"{source.name}:{node.lineno} {node.name} has {len(node.name)} characters"


def shared_names(sources: Iterable[Source], *, allowed: Collection[str] = ()) -> Iterator[str]:
    """Yield public top-level names that more than one file defines."""
    places: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        for name in dict.fromkeys(_top_level_names(source.tree)):
            if not name.startswith("_") and name not in allowed:
                places[name].append(source.name)
    yield from (f"{name} is in {' and '.join(files)}" for name, files in sorted(places.items()) if len(files) > 1)


def _top_level_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            stored = (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
            yield from (name.id for name in stored if isinstance(name.ctx, ast.Store))


def renamed_imports(source: Source) -> Iterator[str]:
    """Yield imports of our own modules and names under another name."""
    for node in source.nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                ours = (module or alias.name).split(".")[0] in FLOORS
                if ours and alias.asname is not None:
                    yield f"{source.name}:{node.lineno} imports {alias.name} as {alias.asname}"


def private_uses(source: Source) -> Iterator[str]:
    """Yield uses of a private name that the file does not define itself: imports, attributes, patched names."""
    own = set(_own_private_names(source))
    for node in source.nodes:
        for name in _private_names_used(node):
            if name not in own and name not in PRIVATE_NAMES_OF_OTHERS:
                yield f"{source.name}:{getattr(node, 'lineno', 0)} uses the private name {name}"


def _own_private_names(source: Source) -> Iterator[str]:
    """Yield the private methods and attributes of the file's own classes."""
    for node in source.nodes:
        if isinstance(node, ast.ClassDef):
            yield from (each.name for each in node.body if isinstance(each, Function))
            yield from (each.target.id for each in node.body if _declares(each))  # type: ignore[attr-defined]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _declares(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _private_names_used(node: ast.AST) -> Iterator[str]:
    names: list[str] = []
    if isinstance(node, ast.Attribute):
        names = [node.attr]
    elif isinstance(node, ast.Import):
        names = [part for alias in node.names for part in alias.name.split(".")]
    elif isinstance(node, ast.ImportFrom):
        names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    elif isinstance(node, ast.Call):
        names = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in _NAMED_ATTRIBUTE:
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            names += [part for text in texts for part in text.split(".")]
    yield from (name for name in names if _PRIVATE.fullmatch(name))
