"""Prepared data, and the checks before it is used. Imports no torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import InputError, not_prepared
from configs.schema import Data
from configs.strict_yaml import as_yaml
from data_pipeline.hashes import file_sha256
from data_pipeline.manifest_file import PREPARE_AGAIN, DataManifest, Part, read_data_manifest
from data_pipeline.prefixes import bin_path, find_prefix, idx_path
from data_pipeline.sources import PYTHON_DOCS, source_files
from data_pipeline.split import held_out_count
from data_pipeline.tokenizer_files import find_tokenizer, tokenizer_sha256

UNIGRAM_NAME = "unigram.npy"


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared data, checked to be complete."""

    folder: Path
    tokenizer: Path
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: int
    parts: tuple[Part, ...]
    split: float
    """Share of the sequences held out, from the current run file."""
    fingerprint: str
    """Hash of all inputs that the data was prepared from."""

    @property
    def tokens(self) -> int:
        """Number of tokens in all parts, held-out text included."""
        return sum(part.tokens for part in self.parts)

    @property
    def documents(self) -> int:
        """Number of documents in all parts."""
        return sum(part.documents for part in self.parts)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Weight of each part; None to sample in proportion to the text."""
        weights = tuple(part.weight for part in self.parts if part.weight is not None)
        return weights if len(weights) == len(self.parts) else None

    def prefix(self, part: Part) -> Path:
        """Return the path of a part's .bin and .idx without their endings."""
        return self.folder / part.prefix


def load_prepared(data: Data, *, folder: Path) -> Prepared:
    """Load the data that `trainshort prepare` wrote to a folder, and check it.

    The sources need not exist any more: only their names are compared, and their files if the names differ.

    Args:
        data: The run's `data` section; must match the prepared data.
        folder: RUN_DIR/data or data.dir.
    Raises:
        InputError: not prepared, incomplete, or prepared from other inputs.
    """
    manifest = read_data_manifest(folder)
    if manifest is None:
        raise not_prepared(folder)
    check_inputs(manifest, _settings(data), folder=folder)
    # data.split and the weights may change without preparing again: take them from the run file
    weights = [source.weight for source in data.sources]
    if weights[0] is None:  # then none has one, and sources may share a part
        weights = [None] * len(manifest.parts)
    prepared = Prepared(
        folder=folder,
        tokenizer=find_tokenizer(folder),
        tokenizer_sha256=manifest.tokenizer_sha256,
        vocab_size=manifest.vocab_size,
        end_of_document=manifest.end_of_document,
        parts=tuple(replace(part, weight=weight) for part, weight in zip(manifest.parts, weights, strict=True)),
        split=data.split,
        fingerprint=manifest.inputs_sha256,
    )
    _check_files(prepared)
    _check_tokenizer(data, prepared)
    check_split(prepared.parts, split=data.split)
    return prepared


def check_split(parts: tuple[Part, ...], *, split: float) -> None:
    """Check that something can be held out of every part.

    Raises:
        InputError: a part has too few sequences.
    """
    for part in parts:
        if split and not held_out_count(part.sequences, share=split):
            raise InputError(
                f"data.split is {split} but {part.name} is a single chunk of {part.tokens} tokens, which cannot be "
                "split: add text, set data.document_separator, or set data.split to 0"
            )


def describe_inputs(data: Data) -> dict[str, Any]:
    """Return everything that prepared data depends on: settings of the run file, and size and time of its files.

    Raises:
        InputError: a source or the tokenizer does not exist, or a file is named twice.
    """
    inputs = _settings(data)
    paths = inputs["data.sources"]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise InputError(f"data.sources names {twice[0]} {paths.count(twice[0])} times: name it once")
    _check_named_once(paths)
    inputs["files"] = {path: _file_states(path) for path in paths}
    if data.tokenizer is not None:
        inputs["tokenizer_sha256"] = tokenizer_sha256(Path(data.tokenizer))
    return inputs


def _check_named_once(paths: list[str]) -> None:
    """Refuse two sources that name the same file, however they spell it."""
    named_by: dict[tuple[int, int], str] = {}
    for path in paths:
        for file in _files_of(path):
            state = file.stat()
            other = named_by.setdefault((state.st_dev, state.st_ino), path)
            if other != path:
                raise InputError(f"data.sources {other} and {path} both name the file {file}: name it in one of them")


def check_inputs(manifest: DataManifest, inputs: dict[str, Any], *, folder: Path) -> None:
    """Check that a folder's data was prepared from these inputs.

    Args:
        manifest: The folder's manifest.
        inputs: Result of `describe_inputs`, or part of it; other inputs are not compared.
        folder: Named in the message.
    Raises:
        InputError: names the first input that changed.
    """
    for difference in _differences(manifest, inputs):
        raise InputError(f"{folder} holds data prepared from other inputs: {difference}; {PREPARE_AGAIN}")


def same_inputs(folder: Path, *sections: Data) -> bool:
    """Return whether a folder holds data prepared from the inputs of each of these sections, however they spell them.

    The sections must also weigh their sources alike: that needs no other data, but gives other samples.

    Raises:
        InputError: its manifest is broken.
    """
    manifest = read_data_manifest(folder)
    weights = {tuple(source.weight for source in data.sources) for data in sections}
    return (
        manifest is not None
        and len(weights) == 1
        and not any(list(_differences(manifest, _settings(data))) for data in sections)
    )


def same_content(old: Path, new: Path) -> bool:
    """Return whether two folders hold the same prepared data, as far as lengths and counts of tokens tell.

    True if the old folder, or what it used in place, is gone: then only the samples that a run reads next can be
    compared with those of before.
    """
    manifests = read_data_manifest(old), read_data_manifest(new)
    if manifests[0] is None or manifests[1] is None or old.resolve() == new.resolve():
        return True
    try:
        before = _content_hash(old, manifests[0])
    except InputError:
        return True
    return before == _content_hash(new, manifests[1])


def _content_hash(folder: Path, manifest: DataManifest) -> str:
    """Return a hash of the tokenizer, the lengths of all sequences, and how often each token occurs."""
    indices = [idx_path(folder / part.prefix) for part in manifest.parts]
    hashes = [file_sha256(file) for file in (*indices, folder / UNIGRAM_NAME)]
    return " ".join([manifest.tokenizer_sha256, *hashes])


def files_are_whole(part: Part, *, folder: Path) -> bool:
    """Return whether a part's files have the sizes with which they were written."""
    return all(_size(file) == expected for file, expected in part.files(folder).items())


def _settings(data: Data) -> dict[str, Any]:
    """Return what the run file says that prepared data depends on."""
    # part of the fingerprint: if you add or rename a key, data prepared earlier looks like another run's
    return {
        "data.sources": [source.path for source in data.sources],
        "weights": data.sources[0].weight is not None,
        "data.document_separator": data.document_separator,
        "data.vocab_size": data.vocab_size,
        "data.tokenizer": data.tokenizer,
    }


def _files_of(path: str) -> tuple[Path, ...]:
    """Return the files of a source."""
    if path == PYTHON_DOCS:
        # installed packages change with every update; text prepared from older ones is still good
        return ()
    prefix = find_prefix(path)
    return source_files(path) if prefix is None else (bin_path(prefix), idx_path(prefix))


def _file_states(path: str) -> list[list[Any]]:
    """Return name, size and modification time of each file of a source."""
    states = [(file.resolve(), file.stat()) for file in _files_of(path)]
    return [[str(file), state.st_size, state.st_mtime_ns] for file, state in states]


def _differences(manifest: DataManifest, new: dict[str, Any]) -> Iterator[str]:
    """Yield how each of the new inputs differs from those of the manifest."""
    old = manifest.inputs
    for key, now in new.items():
        before: Any = old.get(key)
        if before == now:
            continue
        if key == "data.sources" and _are_same_files(old, now):
            continue
        if key == "data.tokenizer" and now is not None and _is_same_model(manifest, Path(now)):
            continue
        if key == "weights":
            yield f"the sources had {'weights' if before else 'no weights'} then"
        elif key == "tokenizer_sha256":
            if now != manifest.tokenizer_sha256:
                yield f"data.tokenizer {new['data.tokenizer']} is a different model now"
        elif key == "files":
            # in their order: the same files may be spelled in another way now
            states = zip(now, before.values(), now.values(), strict=True)
            yield from (_file_difference(path, then, state) for path, then, state in states if not _same(then, state))
        else:
            changed = _changed_file(old, now) if key == "data.sources" else None
            yield changed or f"{key} was {as_yaml(before)} then and is {as_yaml(now)} now"


def _are_same_files(old: dict[str, Any], paths: list[str]) -> bool:
    """Return whether sources name the files of the old inputs, in the same order, in another spelling or place."""
    names = old["data.sources"]
    if len(names) != len(paths):
        return False
    try:
        return all(
            name == path or (files != [] and _same(files, _file_states(path)))
            for name, path, files in zip(names, paths, old["files"].values(), strict=True)
        )
    except InputError:  # they are gone
        return False


def _changed_file(old: dict[str, Any], paths: list[str]) -> str | None:
    """Return how a file has changed that sources still name, in another place; None if they name other files."""
    try:
        states = [_file_states(path) for path in paths]
    except InputError:  # they are gone
        return None
    for path, before, now in zip(paths, old["files"].values(), states, strict=False):
        if not _same(before, now) and [Path(name).name for name, *_ in before] == [Path(name).name for name, *_ in now]:
            return _file_difference(path, before, now)
    return None


def _same(before: list[list[Any]], now: list[list[Any]]) -> bool:
    """Return whether file states agree in name, size and time; the folder may be another one."""
    return [[Path(name).name, *state] for name, *state in before] == [[Path(name).name, *state] for name, *state in now]


def _is_same_model(manifest: DataManifest, model: Path) -> bool:
    return find_tokenizer(model).is_file() and tokenizer_sha256(model) == manifest.tokenizer_sha256


def _file_difference(path: str, before: list[list[Any]], now: list[list[Any]]) -> str:
    if len(before) != len(now):
        return f"data source {path} was {len(before)} file(s) then and is {len(now)} now"
    old, new = next((old, new) for old, new in zip(before, now, strict=True) if not _same([old], [new]))
    if Path(old[0]).name != Path(new[0]).name:
        return f"data source {path} was {old[0]} then and is {new[0]} now"
    how = f"{old[1]} bytes then, {new[1]} now" if old[1] != new[1] else "modified since"
    return f"data source {new[0]} changed ({how})"


def _check_files(prepared: Prepared) -> None:
    # sizes, not hashes: every start checks them, and a corpus may take terabytes
    for part in prepared.parts:
        for file, expected in part.files(prepared.folder).items():
            size = _size(file)
            if size is None:
                raise InputError(f"prepared data {file} is missing: {PREPARE_AGAIN}")
            if size != expected:
                raise InputError(f"prepared data {file} has {size} bytes, {expected} were written: {PREPARE_AGAIN}")
            if not os.access(file, os.R_OK):
                raise InputError(f"prepared data {file} cannot be read (Permission denied): fix its permissions")


def _check_tokenizer(data: Data, prepared: Prepared) -> None:
    if tokenizer_sha256(prepared.tokenizer) != prepared.tokenizer_sha256:
        raise InputError(
            f"tokenizer {prepared.tokenizer} is not the one that the data was prepared with: {PREPARE_AGAIN}"
        )
    # the folder has its own copy: the original may be deleted, but not replaced by another
    given = find_tokenizer(Path(data.tokenizer)) if data.tokenizer is not None else None
    if given is not None and given.is_file() and tokenizer_sha256(given) != prepared.tokenizer_sha256:
        raise InputError(
            f"data.tokenizer {data.tokenizer} is not the one that {prepared.folder} was prepared with: {PREPARE_AGAIN}"
        )


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None
