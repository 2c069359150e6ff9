"""The manifest.json of a folder of prepared data: what was prepared, and from what. Imports no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from configs.errors import InputError
from configs.files import write_json
from configs.paths import MANIFEST_NAME
from configs.schema_problems import first_problem
from data_pipeline.hashes import file_sha256, json_sha256
from data_pipeline.prefixes import bin_path, idx_path

DATA_FORMAT = 1
PREPARE_AGAIN = "set data.dir to another folder, or delete that one and run `trainshort prepare`"
"""What to do about data that cannot be used."""


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
class DataManifest:
    """What the file holds, its format_version apart.

    Attributes:
        inputs: What the data was prepared from; see `describe_inputs`.
        inputs_sha256: Its hash.
        tokenizer_sha256: Hash that identifies the tokenizer.
        vocab_size: Rows of the embedding.
        end_of_document: The token that ends a document.
        parts: At least one.
        files_sha256: Hash of each file of the parts, in their order; none if an older version prepared the data.
    """

    inputs: dict[str, Any]
    inputs_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: int
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    files_sha256: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Inputs:
    """The inputs that are looked into, and not just compared."""

    sources: Annotated[list[str], Field(alias="data.sources")]
    files: dict[str, list[tuple[str, int, int]]]


_MANIFEST, _INPUTS = TypeAdapter(DataManifest), TypeAdapter(_Inputs)


def inputs_sha256(inputs: dict[str, Any]) -> str:
    """Return the fingerprint of the result of `describe_inputs`."""
    return json_sha256(inputs)


def read_data_manifest(folder: Path) -> DataManifest | None:
    """Read the manifest of a folder; None where there is none.

    Raises:
        InputError: it is broken or of another version.
    """
    file = folder / MANIFEST_NAME
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != DATA_FORMAT:
            raise InputError(f"{file} has format_version {version}, this version reads {DATA_FORMAT}: {PREPARE_AGAIN}")
        manifest = _MANIFEST.validate_python(content)
        _INPUTS.validate_python(manifest.inputs)
    except (FileNotFoundError, NotADirectoryError):  # the folder itself may be missing or a file
        return None
    except ValidationError as error:
        raise InputError(f"{file} is damaged ({first_problem(error)}): {PREPARE_AGAIN}") from None
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror}): fix its permissions, or set data.dir to another folder"
        ) from None
    except ValueError as error:
        raise InputError(f"{file} cannot be read ({error}): {PREPARE_AGAIN}") from None
    return manifest


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
    manifest = DataManifest(
        inputs=inputs,
        inputs_sha256=inputs_sha256(inputs),
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=vocab_size,
        end_of_document=end_of_document,
        parts=parts,
        files_sha256=tuple(file_sha256(file) for part in parts for file in part.files(folder)),
    )
    write_json(folder / MANIFEST_NAME, {"format_version": DATA_FORMAT, **asdict(manifest)})
