"""Check imports: floors, owners of libraries, and what a module imports indirectly."""

import ast
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from tests.support.house.source import FLOORS, Source

# One owner per library; the longest name that matches decides.
OWNERS = {
    "deepspeed": "parallel/",
    "megatron": "parallel/",
    "megatron.core.datasets": "data_pipeline/",
    "sentencepiece": "data_pipeline/sentencepiece_tokenizer.py",
    "sentencepiece.sentencepiece_model_pb2": "data_pipeline/vocabulary.py",  # the file format
    "mlflow": "training/tracking/",
    "transformers": "training/export/",
    "tokenizers": "data_pipeline/",
    "gguf": "training/export/",
    "lm_eval": "training/harness/",
    "torch.utils.tensorboard": "training/curves/tensorboard.py",
    "wandb": "training/curves/weights_and_biases.py",
    "typer": "launch/",
    "jinja2": "launch/",
    "yaml": "configs/",
}
ENVIRONMENT_READERS = ("parallel/start.py", "launch/")


def imported_names(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of each import among the nodes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from megatron.core import datasets` imports megatron.core.datasets
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def import_problems(source: Source) -> Iterator[str]:
    """Yield imports of a higher floor or a neighbour, and of a library that has another owner."""
    package = source.name.split("/")[0]
    for line, imported in imported_names(source.nodes):
        top = imported.split(".")[0]
        if top in FLOORS and top != package and FLOORS[top] >= FLOORS[package]:
            yield f"{source.name}:{line} imports {imported}, from floor {FLOORS[top]} into floor {FLOORS[package]}"
        owned = [library for library in OWNERS if is_part_of(imported, library)]
        if owned and not source.name.startswith(owner := OWNERS[max(owned, key=len)]):
            yield f"{source.name}:{line} imports {imported}, which is for {owner} alone"


def environment_problems(source: Source) -> Iterator[str]:
    """Yield reads of the environment outside the files that may read it."""
    if source.name.startswith(ENVIRONMENT_READERS):
        return
    # Setting a default for a library's own variable is not a read.
    given = [node.value for node in source.nodes if isinstance(node, ast.Attribute) and node.attr == "setdefault"]
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb") and node not in given:
            yield f"{source.name}:{node.lineno} reads the environment: let parallel/start.py do it"
    for line, imported in imported_names(source.nodes):
        if imported in ("os.environ", "os.getenv"):
            yield f"{source.name}:{line} reads the environment: let parallel/start.py do it"


def is_part_of(imported: str, library: str) -> bool:
    """Return whether a dotted name is a library or something inside it."""
    return f"{imported}.".startswith(f"{library}.")


def import_routes(sources: Iterable[Source], reaches: Callable[[str, str], bool]) -> dict[str, str]:
    """Return the modules that import something, even indirectly, each with the shortest route to it.

    Args:
        sources: The files that may import each other.
        reaches: Whether an import counts: takes the importing file and the imported dotted name.
    Returns:
        `first.py -> second.py -> library` by the name of the first file.
    """
    direct = {source.name: list(dict.fromkeys(_at_import_time(source.tree))) for source in sources}
    importers = _importers(direct)
    routes = {
        name: f"{name} -> {next(found for found in imported if reaches(name, found))}"
        for name, imported in direct.items()
        if any(reaches(name, found) for found in imported)
    }
    waiting = deque(routes)
    while waiting:
        name = waiting.popleft()
        for importer in importers[name]:
            if importer not in routes:
                routes[importer] = f"{importer} -> {routes[name]}"
                waiting.append(importer)
    return routes


def _importers(direct: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the files that import each file, or something in its package."""
    importers: dict[str, list[str]] = {name: [] for name in direct}
    for name, imported in direct.items():
        for dotted in imported:
            parts = dotted.split(".")
            for count in range(1, len(parts) + 1):
                path = "/".join(parts[:count])
                for module in (f"{path}.py", f"{path}/__init__.py"):
                    if module in importers and module != name:
                        importers[module].append(name)
    return importers


def _at_import_time(node: ast.AST) -> Iterator[str]:
    """Yield what the module imports when it is loaded; leave out imports in functions and for type checking."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _at_import_time(other)
            continue
        yield from (name for _, name in imported_names([child]))
        yield from _at_import_time(child)
