"""MLflow's sqlite file without runs, made once: it takes MLflow a second of migrations.

A copy is the same but for the place of the default experiment's artifacts, which nobody uses.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from unittest.mock import patch

from training.tracking.store import Store, create_file


@contextmanager
def filled_once(empty: Path) -> Iterator[None]:
    """Create each new store as ever, but fill all later ones in this process and its forks with a copy of the first.

    Args:
        empty: Where to keep the copy.
    """

    lock = Lock()

    def create(file: Path, *, fill: Callable[[str], None]) -> None:
        def copy(uri: str) -> None:
            new = Store(uri, "").file
            assert new is not None, uri
            with lock:
                if empty.exists():
                    shutil.copyfile(empty, new)
                else:
                    fill(uri)
                    shutil.copyfile(new, empty)

        create_file(file, fill=copy)

    with patch("training.tracking.client.create_file", create):
        yield
