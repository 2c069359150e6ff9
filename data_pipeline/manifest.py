"""What a folder of prepared data holds, and the checks before anyone uses it. Imports no torch."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import whole_file
from configs.schema import Data
from data_pipeline.indexed import bin_path, find_prefix, idx_path
from data_pipeline.sources import PYTHON_DOCS, source_files
from data_pipeline.split import held_out_count

DATA_FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
UNIGRAM = "unigram.npy"


@dataclass(frozen=True)
class Part:
    """Tokens that are sampled as one: all sources without a weight, or one source with a weight or prepared before."""

    name: str
    prefix: str
    """The .bin and .idx without their endings; relative to the folder unless the source was used in place."""
    in_place: bool
    documents: int
    sequences: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    words: int | None
    """White space separated words; None where only the tokens are known."""
    weight: float | None = None


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared data that was found whole."""

    folder: Path
    tokenizer: Path
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: int
    parts: tuple[Part, ...]
    split: float
    """Share of the sequences held out, as the run file says now."""
    fingerprint: str
    """Hash of everything that the data was made from."""

    @property
    def tokens(self) -> int:
        """Tokens of all parts, held out or not."""
        return sum(part.tokens for part in self.parts)

    @property
    def documents(self) -> int:
        """Documents of all parts."""
        return sum(part.documents for part in self.parts)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Weight of each part; None where samples come in proportion to the text there is."""
        weights = tuple(part.weight for part in self.parts if part.weight is not None)
        return weights if len(weights) == len(self.parts) else None

    def prefix(self, part: Part) -> Path:
        """Return the path of a part's .bin and .idx without their endings."""
        return self.folder / part.prefix


def load_prepared(data: Data, *, folder: Path) -> Prepared:
    """Return the data that `trainshort prepare` left in a folder.

    Args:
        data: The run's section; must ask for what was prepared.
        folder: RUN_DIR/data or data.dir.
    Raises:
        InputError: not prepared, not whole, or prepared from something else.
    """
    manifest = read_data_manifest(folder)
    if manifest is None:
        raise InputError(f"data is not prepared in {folder}: run `trainshort prepare`")
    for difference in _differences(manifest["inputs"], _asked(data)):
        raise InputError(f"{folder} holds data for another run file: {difference}; {_TODO}")
    names = [source.path for source in data.sources]
    weights = [source.weight for source in data.sources]
    parts = tuple(Part(**part) for part in manifest["parts"])
    prepared = Prepared(
        folder=folder,
        tokenizer=folder / TOKENIZER,
        tokenizer_sha256=manifest["tokenizer_sha256"],
        vocab_size=manifest["vocab_size"],
        end_of_document=manifest["end_of_document"],
        parts=tuple(replace(p, weight=weights[names.index(p.name)] if p.name in names else None) for p in parts),
        split=data.split,
        fingerprint=manifest["inputs_sha256"],
    )
    _check_files(prepared)
    _check_tokenizer(data, prepared)
    check_split(prepared.parts, split=data.split)
    return prepared


_TODO = "set data.dir to another folder, or delete that one and run `trainshort prepare`"


def check_split(parts: tuple[Part, ...], *, split: float) -> None:
    """Refuse to hold out from what cannot be divided.

    Raises:
        InputError: a part has too few sequences.
    """
    for part in parts:
        if split and not held_out_count(part.sequences, share=split):
            raise InputError(
                f"data.split is {split} but {part.name} is one piece of {part.tokens} tokens, too little to hold out "
                "from: add text, set data.document_separator, or set data.split to 0"
            )


def describe_inputs(data: Data) -> dict[str, Any]:
    """Return everything that the prepared data depends on: what the run file says, and the state of the files.

    Raises:
        InputError: a source or the tokenizer is not there, or a source is named twice.
    """
    asked = _asked(data)
    paths = asked["data.sources"]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise InputError(f"data.sources names {twice[0]} {paths.count(twice[0])} times: name it once")
    asked["files"] = {source.path: _state(source.path) for source in data.sources}
    if data.tokenizer is not None:
        asked["tokenizer_sha256"] = _sha256(Path(data.tokenizer).expanduser())
    return asked


def check_inputs(manifest: dict[str, Any], inputs: dict[str, Any], *, folder: Path) -> None:
    """Refuse to prepare into a folder that holds data made from something else.

    Raises:
        InputError: names the first input that changed.
    """
    for difference in _differences(manifest["inputs"], inputs):
        raise InputError(f"{folder} holds data prepared from other inputs: {difference}; {_TODO}")


def read_data_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder, None where there is none.

    Raises:
        InputError: it is broken or of another version.
    """
    file = folder / MANIFEST
    try:
        manifest: Any = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}): {_TODO}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != DATA_FORMAT:
        raise InputError(f"{file} has format_version {version}, this version reads {DATA_FORMAT}: {_TODO}")
    return dict(manifest)


def write_data_manifest(prepared: Prepared, *, inputs: dict[str, Any]) -> None:
    """Declare a folder whole: the last file that is written."""
    manifest = {
        "format_version": DATA_FORMAT,
        "inputs": inputs,
        "inputs_sha256": fingerprint(inputs),
        "tokenizer_sha256": prepared.tokenizer_sha256,
        "vocab_size": prepared.vocab_size,
        "end_of_document": prepared.end_of_document,
        "parts": [asdict(part) for part in prepared.parts],
    }
    write_json(prepared.folder / MANIFEST, manifest)


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint(inputs: dict[str, Any]) -> str:
    """Return the hash of what the data was made from."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def files_are_whole(part: Part, *, folder: Path) -> bool:
    """Return whether a part's files have the sizes that they were left with."""
    return all(_size(file) == size for file, size in _files(part, folder))


def _asked(data: Data) -> dict[str, Any]:
    return {
        "data.sources": [source.path for source in data.sources],
        "weights": data.sources[0].weight is not None,
        "data.document_separator": data.document_separator,
        "data.vocab_size": data.vocab_size,
        "data.tokenizer": data.tokenizer,
    }


def _state(path: str) -> list[list[Any]]:
    """Return name, size and time of a source's files."""
    if path == PYTHON_DOCS:
        # What is installed changes with every update; text prepared from it stays as good as it was.
        return []
    prefix = find_prefix(path)
    files = source_files(path) if prefix is None else (bin_path(prefix), idx_path(prefix))
    states = [(file.resolve(), file.stat()) for file in files]
    return [[str(file), state.st_size, state.st_mtime_ns] for file, state in states]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in new:
        before, now = old.get(key), new[key]
        if before == now:
            continue
        if key == "weights":
            yield f"the sources had {'weights' if before else 'no weights'} then"
        elif key == "tokenizer_sha256":
            yield f"data.tokenizer {new['data.tokenizer']} is another model than then"
        elif key == "files":
            then = before or {}
            changed = [path for path in now if then.get(path) != now[path]]
            yield from (_file_difference(path, then.get(path, []), now[path]) for path in changed)
        else:
            yield f"{key} was {before!r} then and is {now!r} now"


def _file_difference(path: str, before: list[list[Any]], now: list[list[Any]]) -> str:
    if [state[0] for state in before] != [state[0] for state in now]:
        return f"data source {path} was {len(before)} file(s) then, {len(now)} now, or lay elsewhere"
    old, new = next((old, new) for old, new in zip(before, now, strict=True) if old != new)
    how = f"{old[1]} bytes then, {new[1]} now" if old[1] != new[1] else "modified since"
    return f"data source {new[0]} changed ({how})"


def _check_files(prepared: Prepared) -> None:
    for part in prepared.parts:
        for file, expected in _files(part, prepared.folder):
            found = _size(file)
            if found is None:
                raise InputError(f"prepared data {file} is missing: {_TODO}")
            if found != expected:
                raise InputError(f"prepared data {file} has {found} bytes, {expected} were written: {_TODO}")


def _check_tokenizer(data: Data, prepared: Prepared) -> None:
    if _sha256(prepared.tokenizer) != prepared.tokenizer_sha256:
        raise InputError(f"tokenizer {prepared.tokenizer} is not the one that the data was prepared with: {_TODO}")
    given = Path(data.tokenizer).expanduser() if data.tokenizer is not None else None
    # the folder has its own copy: the original may be gone, but not be another
    if given is not None and given.is_file() and _sha256(given) != prepared.tokenizer_sha256:
        raise InputError(f"data.tokenizer {given} is not the one that {prepared.folder} was prepared with: {_TODO}")


def _files(part: Part, folder: Path) -> tuple[tuple[Path, int], ...]:
    prefix = folder / part.prefix
    return (bin_path(prefix), part.bin_bytes), (idx_path(prefix), part.idx_bytes)


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"tokenizer {file} cannot be read ({error.strerror}): check the path") from None
