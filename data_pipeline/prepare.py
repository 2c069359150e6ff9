"""Prepare data: turn sources into a tokenizer and Megatron's .bin/.idx. Finished work is not repeated."""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from configs.errors import InputError, MachineError
from configs.files import one_writer, whole_file, write_json
from configs.paths import MANIFEST_NAME, TOKENIZER_CONFIG, TOKENIZER_JSON, TOKENIZER_NAME
from configs.schema import Data, Source
from configs.strict_yaml import as_yaml
from configs.terminal import printable, status_console
from data_pipeline.indexed import histogram, read_index
from data_pipeline.kinds import Kind, file_kind
from data_pipeline.manifest import (
    UNIGRAM_NAME,
    Prepared,
    check_inputs,
    check_split,
    describe_inputs,
    files_are_whole,
    load_prepared,
)
from data_pipeline.manifest_file import Part, read_data_manifest, write_data_manifest
from data_pipeline.prefixes import bin_path, find_prefix, idx_path, words_path
from data_pipeline.reading import OnRead, iter_bytes
from data_pipeline.sentencepiece_tokenizer import SAMPLE_CHARACTERS, train_tokenizer
from data_pipeline.sources import (
    PYTHON_DOCS,
    Chunk,
    check_source,
    file_chunks,
    require_tokenizer,
    source_chunks,
    source_files,
    source_size,
)
from data_pipeline.storage import write_part
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.tokenizer_files import find_tokenizer, tokenizer_files

logger = logging.getLogger(__name__)

_UNFINISHED_NAME = "preparing.json"
_BAR_CELLS = 20
_OTHER_CELLS = _BAR_CELLS + 15 + 2 * 7 + 4  # of a progress bar's line, its description apart: sizes, two times, spaces
_EXPANSION = {".gz": 3, ".xz": 4, ".zst": 3, ".parquet": 2, ".pq": 2}
"""About how many bytes of text a byte of these files holds, to estimate each file's share of the tokenizer's sample."""


def prepare_data(data: Data, *, folder: Path, progress: bool) -> Prepared:
    """Prepare the data of a run, skip what is done already, and load it.

    One process at a time writes to a folder; others wait. Files get their names once they are complete, the manifest
    last. After an interruption, the next call keeps the tokenizer and the parts that are complete.

    Args:
        data: The run's `data` section.
        folder: RUN_DIR/data or data.dir; created if missing.
        progress: Whether to show progress bars on standard error.
    Raises:
        InputError: a source, the tokenizer or the folder is wrong.
        MachineError: the folder cannot be written.
    """
    # before the folder is created: wrong input leaves nothing behind
    inputs = describe_inputs(data)
    check_tokenizer(data)
    console = status_console(quiet=not progress)
    waiting = f"waiting: another process is preparing {folder}"
    try:
        if not _is_prepared(folder, inputs):  # else nothing is written: the folder may be another user's
            for source in data.sources:  # every file: the last of many must not fail after hours
                check_source(source.path)
            folder.mkdir(parents=True, exist_ok=True)
            with one_writer(folder, on_wait=lambda: console.print(printable(waiting), soft_wrap=True)):
                if not _is_prepared(folder, inputs):  # by the process that was waited for
                    _prepare(data, folder, inputs, console)
        return load_prepared(data, folder=folder)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"data folder {folder} is a file: set data.dir to a folder") from None
    except OSError as error:
        raise MachineError(
            f"{error.filename or folder} cannot be written or read ({error.strerror or error}): "
            "free space or set data.dir to another folder"
        ) from error


def _is_prepared(folder: Path, inputs: dict[str, Any]) -> bool:
    """Return whether a folder holds the data of these inputs; refuse data of others."""
    manifest = read_data_manifest(folder)
    if manifest is not None:
        check_inputs(manifest, inputs, folder=folder)
    return manifest is not None


def check_tokenizer(data: Data) -> None:
    """Check that `data.tokenizer` fits the run and can be exported, and that it is set where it is needed.

    Warn if it does not give every text back.

    Raises:
        InputError: names what does not fit.
    """
    require_tokenizer(data)
    if data.tokenizer is not None:
        load_tokenizer(Path(data.tokenizer)).check(vocab_size=data.vocab_size)


def _prepare(data: Data, folder: Path, inputs: dict[str, Any], console: Console) -> None:
    _start_or_continue(folder, inputs)
    with _progress_bars(console) as bars:
        try:
            tokenizer = _own_tokenizer(data, folder, bars)
        finally:
            if not _written(folder):  # refused or stopped with nothing to continue from
                (folder / _UNFINISHED_NAME).unlink()
        parts = tuple(
            _part(sources, folder / f"part-{number:03d}", data.document_separator, tokenizer, bars)
            for number, sources in enumerate(_sources_by_part(data))
        )
        check_split(parts, split=data.split)
        _warn_of_unused_separator(data, documents=sum(part.documents for part in parts if not part.in_place))
        # count in the .bin files: parts that were kept or are used in place are not tokenized in this call
        counts = np.zeros(data.vocab_size, np.int64)  # of the rows that stand for no token too
        for part in parts:
            counts[: tokenizer.vocab_size] += histogram(folder / part.prefix, vocab_size=tokenizer.vocab_size)
    with whole_file(folder / UNIGRAM_NAME) as temporary, temporary.open("wb") as file:
        np.save(file, counts)
    write_data_manifest(
        folder,
        inputs=inputs,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=data.vocab_size,
        end_of_document=tokenizer.end_of_document,
        parts=parts,
    )
    # delete the records of unfinished work: the manifest now holds all of it
    for record in (folder / _UNFINISHED_NAME, *folder.glob("part-*.json")):
        record.unlink()


def _warn_of_unused_separator(data: Data, *, documents: int) -> None:
    """Warn of a `data.document_separator` that has no effect: there is no text file, or it is in none.

    Args:
        data: The run's `data` section.
        documents: Number of documents of all sources but those used in place.
    """
    if data.document_separator is None:
        return
    read = [source.path for source in data.sources if source.path != PYTHON_DOCS and not find_prefix(source.path)]
    files = [file for path in read for file in source_files(path) if _is_filled(file)]
    kinds = {file_kind(file) for file in files}
    shown = as_yaml(data.document_separator)
    if Kind.TEXT not in kinds:
        logger.warning("data.document_separator %s has no effect: it cuts text files, and no source is one", shown)
    elif len(read) == len(data.sources) and kinds == {Kind.TEXT} and documents <= len(files):
        advice = 'a line break is "\\n" in double quotes' if "\\" in data.document_separator else "check it"
        logger.warning(
            "data.document_separator %s cuts none of the text files, so each is one document: %s",
            shown,
            advice,
        )


def _is_filled(file: Path) -> bool:
    # a file of white space alone is a document too; not to count it only leaves the warning out
    return any(block.strip() for block in islice(iter_bytes(file, on_read=lambda _: None), 1))


def _start_or_continue(folder: Path, inputs: dict[str, Any]) -> None:
    """Keep the files of an interrupted prepare of the same inputs, delete those of other inputs, refuse any others."""
    record = folder / _UNFINISHED_NAME
    written = _written(folder)
    if not record.is_file():
        if written:
            raise InputError(f"{written[0]} exists without a {MANIFEST_NAME}: set data.dir to an empty folder")
    elif json.loads(record.read_text(encoding="utf-8")) != inputs:
        if own := [file for file in written if str(file.resolve()) in _named_files(inputs)]:
            raise InputError(
                f"the data would be prepared from {own[0]}, but {folder} holds an unfinished prepare, which would be "
                "deleted: move that file, or set data.dir to another folder"
            )
        # of the same inputs, half-written files are written again under the same names
        for file in (*written, *folder.glob(".part-*.tmp")):
            file.unlink()
    write_json(record, inputs)


def _named_files(inputs: dict[str, Any]) -> set[str]:
    """Return the paths of all sources and of the tokenizer that inputs name."""
    tokenizer = inputs["data.tokenizer"]
    files = {name for states in inputs["files"].values() for name, *_ in states}
    return files if tokenizer is None else files | {str(find_tokenizer(Path(tokenizer)).resolve())}


def _written(folder: Path) -> list[Path]:
    """Return the files of prepared data, those of an unfinished prepare too, except the records of the whole."""
    # part-* includes the records of finished parts
    patterns = ("part-*", TOKENIZER_NAME, TOKENIZER_JSON, TOKENIZER_CONFIG, UNIGRAM_NAME)
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def _own_tokenizer(data: Data, folder: Path, bars: Progress) -> Tokenizer:
    """Return the folder's tokenizer: kept, copied from `data.tokenizer`, or trained now."""
    kept = find_tokenizer(folder)
    if kept.is_file():
        return load_tokenizer(kept)
    if data.tokenizer is not None:
        # the file that `find_tokenizer` looks for is the first of them, and is written last
        for name, content in reversed(tokenizer_files(Path(data.tokenizer)).items()):
            with whole_file(folder / name) as temporary:
                temporary.write_bytes(content)
        return load_tokenizer(folder)
    bars.console.print("training the tokenizer")
    task = bars.add_task("sample for the tokenizer", total=None)

    def sample() -> Iterator[str]:
        for text in _tokenizer_sample(data):
            bars.advance(task, len(text))
            yield text

    tokenizer = train_tokenizer(sample(), vocab_size=data.vocab_size, out=folder / TOKENIZER_NAME)
    bars.update(task, total=bars.tasks[task].completed)
    return tokenizer


def _tokenizer_sample(data: Data) -> Iterator[str]:
    """Yield the beginning of every file, in proportion to its share of all text."""
    sizes = {source.path: _text_sizes(source.path) for source in data.sources}
    total = sum(chain.from_iterable(files.values() for files in sizes.values()))
    share = SAMPLE_CHARACTERS / max(1, total)
    for source in data.sources:
        for file, size in sizes[source.path].items():
            # More than all of a small text, but never without end: sizes are estimates, and no file may take it all.
            wanted = size * share
            for text in _file_texts(source, file, data.document_separator):
                yield text[: int(min(wanted, len(text))) + 1]  # + 1: at least one character of every file
                wanted -= len(text)
                if wanted <= 0:
                    break


def _text_sizes(path: str) -> dict[Path | None, int]:
    """Return roughly how many bytes of text each file of a source holds; `python-docs` is one file without a path."""
    if path == PYTHON_DOCS:
        return {None: source_size(path)}
    return {file: file.stat().st_size * _EXPANSION.get(file.suffix.lower(), 1) for file in source_files(path)}


def _file_texts(source: Source, file: Path | None, separator: str | None) -> Iterator[str]:
    chunks = source_chunks(source, separator=separator) if file is None else file_chunks(file, separator=separator)
    return (chunk.text for chunk in chunks)


def _sources_by_part(data: Data) -> list[tuple[Source, ...]]:
    """Return the sources of each part: all without a weight share one part, except sources used in place."""
    alone = [(source,) for source in data.sources if source.weight is not None or find_prefix(source.path)]
    shared = tuple(source for source in data.sources if source.weight is None and not find_prefix(source.path))
    return [shared, *alone] if shared else list(alone)


def _part(
    sources: tuple[Source, ...], prefix: Path, separator: str | None, tokenizer: Tokenizer, bars: Progress
) -> Part:
    """Return a part: used in place, kept from an interrupted prepare, or written now to `prefix`."""
    # data prepared elsewhere is always a separate part, with an absolute path
    if in_place := find_prefix(sources[0].path):
        return _describe_part(sources, in_place.resolve(), words=None)
    record = prefix.with_suffix(".json")
    if record.is_file():
        part = Part(**json.loads(record.read_text(encoding="utf-8")))
        if files_are_whole(part, folder=prefix.parent):
            return part
    total = sum(source_size(source.path) for source in sources)
    name = _shortened(printable(_part_name(sources)), cells=bars.console.width - _OTHER_CELLS)
    task = bars.add_task(name, total=total)
    chunks = _part_chunks(sources, separator, lambda count: bars.advance(task, count))
    write_part(chunks, tokenizer=tokenizer, prefix=prefix)
    bars.update(task, completed=total)  # for parquet and python-docs, the bytes reported are estimates
    part = _describe_part(sources, prefix, words=int(np.load(words_path(prefix)).sum()))
    write_json(record, asdict(part))  # last: a part with a record is complete
    return part


def _part_name(sources: tuple[Source, ...]) -> str:
    return ", ".join(source.path for source in sources)


def _part_chunks(sources: tuple[Source, ...], separator: str | None, on_read: OnRead) -> Iterator[Chunk]:
    for source in sources:
        yield from source_chunks(source, separator=separator, on_read=on_read)


def _describe_part(sources: tuple[Source, ...], prefix: Path, *, words: int | None) -> Part:
    """Return the description of a part; `words` is None for a part used in place."""
    name, index = _part_name(sources), read_index(prefix)
    if not index.tokens:
        raise InputError(f"data source {name} holds no tokens: remove it from data.sources")
    return Part(
        name=name,
        prefix=str(prefix) if words is None else prefix.name,
        in_place=words is None,
        documents=index.documents,
        sequences=len(index.lengths),
        tokens=index.tokens,
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        words=words,
        weight=sources[0].weight,
    )


def _shortened(text: str, *, cells: int) -> str:
    """Return a text shortened to `cells` cells of a terminal, or to 8; its middle is cut out."""
    short, kept = text, max(cells, 8)
    while cell_len(short) > max(cells, 8):
        kept -= 1
        short = f"{text[: kept // 3]}...{text[-(kept - kept // 3) :]}"
    return short


def _progress_bars(console: Console) -> Progress:
    text = TextColumn("{task.description}", markup=False)  # it holds the names of files
    size, elapsed, left = (
        column(table_column=Column(no_wrap=True)) for column in (DownloadColumn, TimeElapsedColumn, TimeRemainingColumn)
    )
    return Progress(text, BarColumn(_BAR_CELLS), size, elapsed, left, console=console)
