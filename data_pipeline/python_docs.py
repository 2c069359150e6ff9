"""Real English on every machine: the help topics of Python and the docstrings of what is installed."""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

LIMIT = 8_000_000
"""Characters of text taken at most: enough to learn from, prepared in seconds."""

_DOCUMENT = 400
_DOCSTRING = 60
_LARGEST_FILE = 1_000_000
_LEAST_SHARE = 0.3
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "__pycache__", "site-packages", "_vendor", "vendor"}
_TRIPLE_QUOTED = re.compile(rb'"""(.{60,}?)"""', re.DOTALL)
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_Described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_docs(*, limit: int = LIMIT) -> Iterator[str]:
    r"""Yield documents: one a help topic, one a module (all its docstrings, blank lines between).

    No file is imported: modules are parsed. The order is sorted, so the same installation gives the same
    text. What an earlier docstring said already is left out.

    Args:
        limit: Characters after which no further document is begun.
    """
    characters = 0
    seen: set[bytes] = set()
    for document in _all_documents(seen):
        # sentencepiece writes a space as U+2581: the one character that it cannot give back
        document = document.replace("\u2581", "_")
        yield document
        characters += len(document)
        if characters >= limit:
            return


def _all_documents(seen: set[bytes]) -> Iterator[str]:
    for text in dict.fromkeys(topics[name].strip() for name in sorted(topics)):
        yield text + "\n"
    paths = sysconfig.get_paths()
    # the same folder may be named twice (purelib is platlib on most machines)
    for folder in dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib")):
        for file in _modules(folder):
            if document := _document(file, seen):
                yield document


def _modules(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            if entry.name not in _SKIPPED_FOLDERS and "." not in entry.name:
                yield from _modules(entry)
        elif entry.suffix == ".py" and not entry.name.startswith("test_"):
            yield entry


def _document(file: Path, seen: set[bytes]) -> str:
    try:
        code = file.read_bytes()
    except OSError:
        return ""
    # Parsing is what costs, so only files that are largely prose are parsed.
    prose = sum(len(text) for text in _TRIPLE_QUOTED.findall(code)) if len(code) <= _LARGEST_FILE else 0
    if prose < max(_DOCUMENT, _LEAST_SHARE * len(code)):
        return ""
    kept = []
    for text in _docstrings(code):
        mark = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if len(text) >= _DOCSTRING and mark not in seen and not _NOT_TEXT.search(text):
            seen.add(mark)
            kept.append(text)
    document = "\n\n".join(kept)
    return document + "\n" if len(document) >= _DOCUMENT else ""


def _docstrings(code: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        # other people's invalid escapes are not this run's business
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
    for node in _described(tree):
        if text := ast.get_docstring(node):
            yield text


def _described(node: _Described) -> Iterator[_Described]:
    # ast.walk would visit every expression, which takes longer than parsing; what is inside a function is rarely prose
    yield node
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _described(child)
