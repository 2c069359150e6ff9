"""Edit a manifest as somebody who knows its format would: its hash matches again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.paths import MANIFEST_NAME
from training.checkpoint.manifest import manifest_bytes


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the values of a checkpoint's manifest."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    del manifest["sha256"]
    change(manifest)
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
