"""The hash of a file of prepared data, which may have gigabytes. Imports no torch."""

import hashlib
from pathlib import Path

from configs.errors import InputError


def file_sha256(file: Path) -> str:
    """Return the hash of a file's content.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"prepared data {file} cannot be read ({error.strerror}): check the path") from None
