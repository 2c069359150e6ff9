"""What an interrupted evaluation leaves on disk, so that it can continue.

A file per measurement in the checkpoint's folder of RUN_DIR/evaluation, with its sums so far. Its name is a hash of all
that they depend on: weights, tokenizer, text, precision, attention, versions, and the windows themselves.
"""

import hashlib
import json
import logging
import re
import secrets
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path

import numpy as np

from configs.files import whole_file
from training.evaluation.provenance import EvaluatedModel, Provenance
from training.evaluation.resampling import Units
from training.evaluation.sums import LossSums
from training.evaluation.windows import Windows
from training.model.windows import LosslessWindows

logger = logging.getLogger(__name__)

# a kill loses no more than this
_SAVE_SECONDS = 60.0
# what an evaluation left that nobody has gone on with since is removed
_KEPT_SECONDS = 30 * 86400.0
_FILE = re.compile(r"\.?partial-[0-9a-f]{32}\.npz(\.[0-9a-f]{8}\.tmp)?")


class PartialResults:
    """The sums of an evaluation's measurements, on disk until it is done."""

    def __init__(self, folder: Path, model: EvaluatedModel, provenance: Provenance) -> None:
        """Identify the evaluation.

        Args:
            folder: The checkpoint's folder in RUN_DIR/evaluation.
            model: The model.
            provenance: What the evaluation is made from.
        """
        self._folder = folder
        versions = sorted(map(str, provenance.versions.items()))
        text = (provenance.text_sha256, provenance.documents_sha256)
        made_of = (provenance.weights_sha256, provenance.tokenizer_sha256, *text, versions)
        self._identity = json.dumps([*map(str, astuple(model)), *made_of])
        self._files: dict[LossSums, Path] = {}
        self._saved_at = time.monotonic()

    def begin(
        self, windows: Windows, units: Units, *, variant: str = "", attention: LosslessWindows | None = None
    ) -> LossSums:
        """Return the sums of a measurement as they were left, or new ones.

        Args:
            windows: Its windows.
            units: Units of the text.
            variant: What it does besides scoring these windows.
            attention: Counts the scores that the model's attention computes; None if nothing counts them.
        """
        sums = LossSums(windows, units, attention=attention)
        digest = hashlib.sha256(f"{self._identity} {units.to_json()} {variant} {windows.length}".encode())
        for numbers in (windows.starts, windows.scored_from, windows.scored_to):
            digest.update(numbers.tobytes())
        file = self._folder / f"partial-{digest.hexdigest()[:32]}.npz"
        self._files[sums] = file
        try:
            with file.open("rb") as opened, np.load(opened) as arrays:
                sums.restore(arrays)
        except FileNotFoundError:
            pass
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read (%s): its measurement starts again", file, error)
        return sums

    def tell(self, begun: Sequence[LossSums]) -> None:
        """Log in one line what an interrupted evaluation has left, if anything."""
        done = sum(sums.done * sums.windows.length for sums in begun)
        if done:
            inputs = sum(sums.windows.inputs for sums in begun)
            logger.info("going on with an interrupted evaluation: %.1f%% of the work is done", 100 * done / inputs)

    @contextmanager
    def keep(self, sums: LossSums, progress: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
        """Keep the sums of a measurement: now and then while it runs, on Ctrl-C, and when it is done.

        Args:
            sums: Its sums.
            progress: Called after each pass with the number of inputs in it.
        Yields:
            What to call instead.
        """

        def advance(inputs: int) -> None:
            progress(inputs)
            if time.monotonic() - self._saved_at > _SAVE_SECONDS:
                self._save(sums)

        try:
            yield advance
        except KeyboardInterrupt:
            self._save(sums)
            raise
        self._save(sums)

    def discard(self) -> None:
        """Delete all that this evaluation has kept, as its reports are written, and what others left long ago."""
        for file in self._files.values():
            file.unlink(missing_ok=True)
        oldest = time.time() - _KEPT_SECONDS
        for file in self._folder.parent.glob("*/*partial-*"):
            with suppress(OSError):
                if _FILE.fullmatch(file.name) and file.stat().st_mtime < oldest:
                    file.unlink()

    def _save(self, sums: LossSums) -> None:
        self._saved_at = time.monotonic()
        try:
            with (
                whole_file(self._files[sums], mark=f".{secrets.token_hex(4)}") as temporary,
                temporary.open("wb") as file,
            ):
                np.savez(file, allow_pickle=False, **sums.to_arrays())
        except OSError as error:  # the disk may have space again at the end
            logger.warning(
                "what is measured cannot be kept, an interruption would lose it: %s (%s)",
                error.filename,
                error.strerror,
            )
