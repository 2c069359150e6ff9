"""Sources to tokenizer and Megatron .bin/.idx. What is done already is not done again."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from configs.errors import InputError, MachineError
from configs.files import one_writer, whole_file
from configs.schema import Data, Source
from data_pipeline.indexed import bin_path, find_prefix, histogram, idx_path, read_index, words_path
from data_pipeline.manifest import (
    MANIFEST,
    TOKENIZER,
    UNIGRAM,
    Part,
    Prepared,
    check_inputs,
    check_split,
    describe_inputs,
    files_are_whole,
    fingerprint,
    load_prepared,
    read_data_manifest,
    write_data_manifest,
    write_json,
)
from data_pipeline.sources import PYTHON_DOCS, Chunk, chunks, file_chunks, source_files, source_size
from data_pipeline.tokenizer import SAMPLE, Tokenizer, train_tokenizer

_UNFINISHED = "preparing.json"
_DENSITY = {".gz": 3, ".xz": 4, ".zst": 3}
"""About how much text a compressed byte holds, to take a fair share of each file for the tokenizer."""


def prepare_data(data: Data, *, folder: Path, progress: bool) -> Prepared:
    """Return the prepared data of a run, preparing what is not done yet.

    A folder is written by one process at a time, another waits. Files get their names when whole, the manifest is
    last; after an interruption the tokenizer and the parts that were done are kept.

    Args:
        data: The run's section.
        folder: RUN_DIR/data or data.dir; made if missing.
        progress: Whether to show bars on the standard error stream.
    Raises:
        InputError: a source, the tokenizer or the folder does not fit.
        MachineError: the folder cannot be written.
    """
    inputs = describe_inputs(data)
    _check_tokenizer(data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"data folder {folder} is a file: set data.dir to a folder") from None
    except OSError as error:
        raise MachineError(f"data folder {folder} cannot be made ({error.strerror}): set data.dir to another") from None
    console = Console(stderr=True, quiet=not progress)
    try:
        with one_writer(folder, on_wait=lambda: console.print(f"waiting: another process prepares {folder}")):
            manifest = read_data_manifest(folder)
            if manifest is None:
                _prepare(data, folder, inputs, console)
            else:
                check_inputs(manifest, inputs, folder=folder)
            return load_prepared(data, folder=folder)
    except OSError as error:
        raise MachineError(
            f"{error.filename or folder} cannot be written or read ({error.strerror or error}): "
            "free space or set data.dir to another folder"
        ) from error


def _prepare(data: Data, folder: Path, inputs: dict[str, Any], console: Console) -> None:
    _continue_or_begin(folder, inputs)
    with _progress(console) as bars:
        tokenizer = _tokenizer(data, folder, bars)
        parts = tuple(_part(group, number, data, tokenizer, folder, bars) for number, group in enumerate(_groups(data)))
        check_split(parts, split=data.split)
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        for part in parts:
            counts += histogram(folder / part.prefix, vocab_size=tokenizer.vocab_size)
    with whole_file(folder / UNIGRAM) as temporary, temporary.open("wb") as file:
        np.save(file, counts)
    prepared = Prepared(
        folder=folder,
        tokenizer=tokenizer.path,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        parts=parts,
        split=data.split,
        fingerprint=fingerprint(inputs),
    )
    write_data_manifest(prepared, inputs=inputs)
    for done in (folder / _UNFINISHED, *folder.glob("part-*.json")):
        done.unlink()


def _check_tokenizer(data: Data) -> None:
    if data.tokenizer is None:
        if prepared := [source.path for source in data.sources if find_prefix(source.path)]:
            raise InputError(
                f"data source {prepared[0]} is tokens already, but data.tokenizer is not set: "
                "give the .model that it was prepared with"
            )
        return
    given = Tokenizer.load(Path(data.tokenizer).expanduser())
    if given.vocab_size != data.vocab_size:
        raise InputError(
            f"data.vocab_size must be that of data.tokenizer {data.tokenizer} ({given.vocab_size}), "
            f"got {data.vocab_size}: use {given.vocab_size}"
        )


def _continue_or_begin(folder: Path, inputs: dict[str, Any]) -> None:
    """Keep what an interrupted prepare of the same inputs left; never write over files that are not ours."""
    record = folder / _UNFINISHED
    ours = sorted({*folder.glob("part-*"), *folder.glob(TOKENIZER), *folder.glob(UNIGRAM)})
    if not record.is_file():
        if ours:
            raise InputError(f"{ours[0]} is there but no {MANIFEST}: set data.dir to an empty folder")
    elif json.loads(record.read_text(encoding="utf-8")) != inputs:
        for file in ours:
            file.unlink()
    write_json(record, inputs)


def _tokenizer(data: Data, folder: Path, bars: Progress) -> Tokenizer:
    own = folder / TOKENIZER
    if own.is_file():
        return Tokenizer.load(own)
    if data.tokenizer is not None:
        with whole_file(own) as temporary:
            temporary.write_bytes(Path(data.tokenizer).expanduser().read_bytes())
        return Tokenizer.load(own)
    task = bars.add_task("sample for the tokenizer", total=None)

    def sample() -> Iterator[str]:
        for text in _sample(data):
            bars.advance(task, len(text))
            yield text

    trained = train_tokenizer(sample(), vocab_size=data.vocab_size, out=own)
    bars.update(task, total=bars.tasks[task].completed)
    return trained


def _sample(data: Data) -> Iterator[str]:
    """Yield the beginning of every file, as much of each as its share of all text."""
    sizes = {source.path: _text_sizes(source.path) for source in data.sources}
    total = sum(chain.from_iterable(files.values() for files in sizes.values()))
    share = min(1.0, SAMPLE / max(1, total))
    for source in data.sources:
        for file, size in sizes[source.path].items():
            wanted = size * share if share < 1 else float("inf")
            for text in _file_texts(source, file, data.document_separator):
                yield text[: int(min(wanted, len(text))) + 1]
                wanted -= len(text)
                if wanted <= 0:
                    break


def _text_sizes(path: str) -> dict[Path | None, int]:
    if path == PYTHON_DOCS:
        return {None: source_size(path)}
    return {file: file.stat().st_size * _DENSITY.get(file.suffix, 1) for file in source_files(path)}


def _file_texts(source: Source, file: Path | None, separator: str | None) -> Iterator[str]:
    found = chunks(source, separator=separator) if file is None else file_chunks(file, separator=separator)
    return (piece.text for piece in found)


def _groups(data: Data) -> list[tuple[Source, ...]]:
    """Return the sources of each part: those without a weight together, but for tokens that are used in place."""
    alone = [(source,) for source in data.sources if source.weight is not None or find_prefix(source.path)]
    together = tuple(source for source in data.sources if source.weight is None and not find_prefix(source.path))
    return [together, *alone] if together else list(alone)


def _part(
    group: tuple[Source, ...], number: int, data: Data, tokenizer: Tokenizer, folder: Path, bars: Progress
) -> Part:
    name = ", ".join(source.path for source in group)
    weight = group[0].weight
    if prefix := find_prefix(group[0].path):
        return _described(name, prefix.resolve(), folder, weight=weight, words=None)
    record = folder / f"part-{number:03d}.json"
    if record.is_file():
        done = Part(**json.loads(record.read_text(encoding="utf-8")))
        if files_are_whole(done, folder=folder):
            return done
    # torch and megatron-core take seconds to import: only who writes pays
    from data_pipeline.storage import write_part

    prefix = folder / f"part-{number:03d}"
    total = sum(source_size(source.path) for source in group)
    task = bars.add_task(name if len(name) < 40 else f"{name[:36]} ...", total=total)

    def read(count: int) -> None:
        bars.advance(task, count)

    write_part(_group_pieces(group, data.document_separator, read), tokenizer=tokenizer, prefix=prefix)
    bars.update(task, completed=total)
    words = int(np.load(words_path(prefix)).sum())
    part = _described(name, prefix, folder, weight=weight, words=words)
    write_json(record, asdict(part))
    return part


def _group_pieces(group: tuple[Source, ...], separator: str | None, advance: Callable[[int], None]) -> Iterator[Chunk]:
    for source in group:
        yield from chunks(source, separator=separator, advance=advance)


def _described(name: str, prefix: Path, folder: Path, *, weight: float | None, words: int | None) -> Part:
    index = read_index(prefix)
    if not index.tokens:
        raise InputError(f"data source {name} holds no tokens: remove it from data.sources")
    return Part(
        name=name,
        prefix=str(prefix) if words is None else str(prefix.relative_to(folder)),
        in_place=words is None,
        documents=index.documents,
        sequences=len(index.lengths),
        tokens=index.tokens,
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        words=words,
        weight=weight,
    )


def _progress(console: Console) -> Progress:
    text = TextColumn("{task.description}")
    return Progress(text, BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console)
