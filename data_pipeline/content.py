"""What prepared data holds, whatever it was prepared from and wherever it lies. Imports no torch."""

from pathlib import Path

from data_pipeline.hashes import file_sha256, joined_sha256
from data_pipeline.manifest_file import DataManifest


def data_sha256(manifest: DataManifest) -> str | None:
    """Return one hash of the tokenizer and all tokens of prepared data; None if an older version prepared it."""
    hashes = manifest.files_sha256
    return joined_sha256([manifest.tokenizer_sha256, *hashes]) if hashes else None


def damaged_files(folder: Path, manifest: DataManifest, *, reads_all: bool) -> list[str]:
    """Return a line for each file of tokens that is not what was written.

    Args:
        folder: Folder of the prepared data.
        manifest: Its manifest.
        reads_all: Whether to read every byte; otherwise, and if an older version prepared the data, only sizes are
            compared.
    Raises:
        InputError: a file cannot be read.
    """
    files = {file: size for part in manifest.parts for file, size in part.files(folder).items()}
    problems = [f"{file} is missing" for file in files if not file.is_file()]
    problems += [
        f"{file} has another size" for file, size in files.items() if file.is_file() and file.stat().st_size != size
    ]
    if problems or not reads_all or not manifest.files_sha256:
        return problems
    return [
        f"{file} was altered"
        for file, then in zip(files, manifest.files_sha256, strict=True)
        if file_sha256(file) != then
    ]
