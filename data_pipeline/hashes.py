"""Hashes of files, of several files together, and of JSON values. Imports no torch."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError


def sha256_of(content: bytes) -> str:
    """Return the hash of a file's content."""
    return hashlib.sha256(content).hexdigest()


def joined_sha256(hashes: Iterable[str]) -> str:
    """Return one hash of files that have these hashes; that of one file is its own."""
    first, *others = hashes
    return sha256_of("".join([first, *others]).encode()) if others else first


def json_sha256(values: Mapping[str, Any]) -> str:
    """Return the hash of a JSON object; it does not depend on the order of the keys."""
    return sha256_of(json.dumps(values, sort_keys=True).encode())


def file_sha256(file: Path) -> str:
    """Return the hash of the content of a file of prepared data, which may have gigabytes.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"prepared data {file} cannot be read ({error.strerror}): check the path") from None
