"""English text on every machine: Python's help topics and the docstrings of the installed packages."""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

PYTHON_DOCS_CHARACTERS = 8_000_000
"""Most characters taken: enough to train a small model on, prepared in seconds."""

_MIN_DOCUMENT = 400  # characters
_MIN_DOCSTRING = 60  # characters
_MAX_FILE = 1_000_000  # bytes
_MIN_PROSE_SHARE = 0.3
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "__pycache__", "site-packages", "_vendor", "vendor"}
_TRIPLE_QUOTED = re.compile(rb'"""(.{60,}?)"""', re.DOTALL)
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_docs(*, limit: int = PYTHON_DOCS_CHARACTERS) -> Iterator[str]:
    """Yield documents: one per help topic, one per module (its docstrings with blank lines between).

    Modules are parsed, not imported. Files come in sorted order, so the same installation gives the same text. A
    docstring that appears twice is yielded once.

    Args:
        limit: Characters after which no further document starts.
    """
    characters = 0
    seen: set[bytes] = set()
    for document in _all_documents(seen):
        # sentencepiece writes a space as U+2581, so this is the one character that it cannot decode back
        document = document.replace("\u2581", "_")
        yield document
        characters += len(document)
        if characters >= limit:
            return


def _all_documents(seen: set[bytes]) -> Iterator[str]:
    for text in dict.fromkeys(topics[name].strip() for name in sorted(topics)):
        yield text + "\n"
    paths = sysconfig.get_paths()
    # the same folder may be listed twice (purelib is platlib on most machines)
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
    """Return the docstrings of a module that are not in `seen`; empty if they are too short."""
    try:
        code = file.read_bytes()
    except OSError:
        return ""
    # parsing is the slow part, so parse only files that are largely prose
    prose = sum(len(text) for text in _TRIPLE_QUOTED.findall(code)) if len(code) <= _MAX_FILE else 0
    if prose < max(_MIN_DOCUMENT, _MIN_PROSE_SHARE * len(code)):
        return ""
    kept = []
    for text in _docstrings(code):
        digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if len(text) >= _MIN_DOCSTRING and digest not in seen and not _NOT_TEXT.search(text):
            seen.add(digest)
            kept.append(text)
    document = "\n\n".join(kept)
    return document + "\n" if len(document) >= _MIN_DOCUMENT else ""


def _docstrings(code: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        # ignore warnings about invalid escapes in other people's code
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
    for node in _documented(tree):
        if text := ast.get_docstring(node):
            yield text


def _documented(node: _Documented) -> Iterator[_Documented]:
    # not ast.walk: it visits every expression, which takes longer than parsing; nested functions rarely hold prose
    yield node
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _documented(child)
