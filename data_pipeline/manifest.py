"""The manifest of a folder of prepared data, and the checks before the data is used. Imports no torch."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import whole_file
from configs.paths import MANIFEST_NAME, TOKENIZER_NAME
from configs.schema import Data
from data_pipeline.indexed import bin_path, find_prefix, idx_path
from data_pipeline.sources import PYTHON_DOCS, source_files
from data_pipeline.split import held_out_count

DATA_FORMAT = 1
UNIGRAM_NAME = "unigram.npy"
_PREPARE_AGAIN = "set data.dir to another folder, or delete that one and run `trainshort prepare`"


@dataclass(frozen=True)
class Part:
    """Tokens sampled together: all sources without a weight, one source with a weight, or one prepared elsewhere."""

    name: str
    prefix: str
    """Path of the .bin and .idx without their endings; relative to the folder unless the source is used in place."""
    in_place: bool
    documents: int
    sequences: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    words: int | None
    """White space separated words; None where only the tokens are known."""
    weight: float | None = None

    def files(self, folder: Path) -> dict[Path, int]:
        """Return the part's files, each with its size in bytes when it was written."""
        prefix = folder / self.prefix  # the prefix of a source used in place is absolute: `/` drops the folder
        return {bin_path(prefix): self.bin_bytes, idx_path(prefix): self.idx_bytes}


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

    The sources need not exist any more: only their names are compared.

    Args:
        data: The run's `data` section; must match the prepared data.
        folder: RUN_DIR/data or data.dir.
    Raises:
        InputError: not prepared, incomplete, or prepared from other inputs.
    """
    manifest = read_data_manifest(folder)
    if manifest is None:
        raise InputError(f"data is not prepared in {folder}: run `trainshort prepare`")
    check_inputs(manifest, _settings(data), folder=folder)
    # data.split and the weights may change without preparing again: take them from the run file
    weights = {source.path: source.weight for source in data.sources}
    parts = [Part(**part) for part in manifest["parts"]]
    prepared = Prepared(
        folder=folder,
        tokenizer=folder / TOKENIZER_NAME,
        tokenizer_sha256=manifest["tokenizer_sha256"],
        vocab_size=manifest["vocab_size"],
        end_of_document=manifest["end_of_document"],
        parts=tuple(replace(part, weight=weights.get(part.name)) for part in parts),
        split=data.split,
        fingerprint=manifest["inputs_sha256"],
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
                f"data.split is {split} but {part.name} is a single chunk of {part.tokens} tokens, too little to hold "
                "out from: add text, set data.document_separator, or set data.split to 0"
            )


def describe_inputs(data: Data) -> dict[str, Any]:
    """Return everything that prepared data depends on: settings of the run file, and size and time of its files.

    Raises:
        InputError: a source or the tokenizer does not exist, or a source is named twice.
    """
    inputs = _settings(data)
    paths = inputs["data.sources"]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise InputError(f"data.sources names {twice[0]} {paths.count(twice[0])} times: name it once")
    inputs["files"] = {path: _file_states(path) for path in paths}
    if data.tokenizer is not None:
        inputs["tokenizer_sha256"] = _sha256(Path(data.tokenizer).expanduser())
    return inputs


def check_inputs(manifest: dict[str, Any], inputs: dict[str, Any], *, folder: Path) -> None:
    """Check that a folder's data was prepared from these inputs.

    Args:
        manifest: The folder's manifest.
        inputs: Result of `describe_inputs`, or part of it; other inputs are not compared.
        folder: Named in the message.
    Raises:
        InputError: names the first input that changed.
    """
    for difference in _differences(manifest["inputs"], inputs):
        raise InputError(f"{folder} holds data prepared from other inputs: {difference}; {_PREPARE_AGAIN}")


def read_data_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder; None where there is none.

    Raises:
        InputError: it is broken or of another version.
    """
    file = folder / MANIFEST_NAME
    try:
        manifest: Any = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # the folder itself may be missing or a file
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}): {_PREPARE_AGAIN}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != DATA_FORMAT:
        raise InputError(f"{file} has format_version {version}, this version reads {DATA_FORMAT}: {_PREPARE_AGAIN}")
    return dict(manifest)


def write_data_manifest(
    folder: Path,
    *,
    inputs: dict[str, Any],
    tokenizer_sha256: str,
    vocab_size: int,
    end_of_document: int,
    parts: tuple[Part, ...],
) -> None:
    """Write the manifest last: a folder that has one is complete."""
    manifest = {
        "format_version": DATA_FORMAT,
        "inputs": inputs,
        # sorted, so that the fingerprint does not depend on the order of keys
        "inputs_sha256": hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "end_of_document": end_of_document,
        "parts": [asdict(part) for part in parts],
    }
    write_json(folder / MANIFEST_NAME, manifest)


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _file_states(path: str) -> list[list[Any]]:
    """Return name, size and modification time of each file of a source."""
    if path == PYTHON_DOCS:
        # installed packages change with every update; text prepared from older ones is still good
        return []
    prefix = find_prefix(path)
    files = source_files(path) if prefix is None else (bin_path(prefix), idx_path(prefix))
    states = [(file.resolve(), file.stat()) for file in files]
    return [[str(file), state.st_size, state.st_mtime_ns] for file, state in states]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yield how each of the new inputs differs from the old ones."""
    for key in new:
        before, now = old.get(key), new[key]
        if before == now:
            continue
        if key == "weights":
            yield f"the sources had {'weights' if before else 'no weights'} then"
        elif key == "tokenizer_sha256":
            yield f"data.tokenizer {new['data.tokenizer']} is a different model now"
        elif key == "files":
            then = before or {}
            changed = [path for path in now if then.get(path) != now[path]]
            yield from (_file_difference(path, then.get(path, []), now[path]) for path in changed)
        else:
            yield f"{key} was {before!r} then and is {now!r} now"


def _file_difference(path: str, before: list[list[Any]], now: list[list[Any]]) -> str:
    if len(before) != len(now):
        return f"data source {path} was {len(before)} file(s) then and is {len(now)} now"
    old, new = next((old, new) for old, new in zip(before, now, strict=True) if old != new)
    if old[0] != new[0]:
        return f"data source {path} was {old[0]} then and is {new[0]} now"
    how = f"{old[1]} bytes then, {new[1]} now" if old[1] != new[1] else "modified since"
    return f"data source {new[0]} changed ({how})"


def _check_files(prepared: Prepared) -> None:
    # sizes, not hashes: every start checks them, and a corpus may take terabytes
    for part in prepared.parts:
        for file, expected in part.files(prepared.folder).items():
            size = _size(file)
            if size is None:
                raise InputError(f"prepared data {file} is missing: {_PREPARE_AGAIN}")
            if size != expected:
                raise InputError(f"prepared data {file} has {size} bytes, {expected} were written: {_PREPARE_AGAIN}")


def _check_tokenizer(data: Data, prepared: Prepared) -> None:
    if _sha256(prepared.tokenizer) != prepared.tokenizer_sha256:
        raise InputError(
            f"tokenizer {prepared.tokenizer} is not the one that the data was prepared with: {_PREPARE_AGAIN}"
        )
    # the folder has its own copy: the original may be deleted, but not replaced by another
    given = Path(data.tokenizer).expanduser() if data.tokenizer is not None else None
    if given is not None and given.is_file() and _sha256(given) != prepared.tokenizer_sha256:
        raise InputError(
            f"data.tokenizer {given} is not the one that {prepared.folder} was prepared with: {_PREPARE_AGAIN}"
        )


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"tokenizer {file} cannot be read ({error.strerror}): check the path") from None
