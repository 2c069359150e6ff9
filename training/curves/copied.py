"""How far a run's curves are copied: a file beside the copy, which a killed or second command goes on from."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from configs.files import write_json
from training.metrics_reader import step_fields

_MARKS = 1024  # at most; every second one is dropped where there are more


@dataclass
class Copied:
    """What is copied.

    Attributes:
        marks: Steps up to which all was copied, in order, each with the checksum of its line of metrics.jsonl.
        reports: Checksums of the reports of evaluations, by path in the run folder.
        run_id: The copy's name at its tracker, if that needs one.
        place: Where the file was when the name was drawn.
    """

    marks: list[tuple[int, int]] = field(default_factory=list)
    reports: dict[str, int] = field(default_factory=dict)
    run_id: str | None = None
    place: str | None = None

    @classmethod
    def read(cls, file: Path) -> "Copied":
        """Return what a file says; nothing is copied if there is none, it is damaged, or its run folder is a copy."""
        copied = cls._parse(file)
        if copied.run_id is None or copied.place is None or cls._parse(Path(copied.place)).run_id != copied.run_id:
            return copied
        return copied if Path(copied.place).samefile(file) else cls()  # the original goes on under that name

    @classmethod
    def _parse(cls, file: Path) -> "Copied":
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            marks = [(int(step), int(checksum)) for step, checksum in values["marks"]]
            reports = {str(path): int(each) for path, each in values["reports"].items()}
            place = values.get("place")  # an older version's has none
            return cls(marks, reports, values["run_id"], place and str(place))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def write(self, file: Path) -> None:
        """Write the file, whole."""
        write_json(file, vars(self))

    def mark(self, step: int, line: bytes) -> None:
        """Note that all up to the step of a line is copied. Of older marks, fewer and fewer are kept."""
        self.marks.append((step, crc32(line)))
        if len(self.marks) > _MARKS:
            del self.marks[1:-1:2]

    @property
    def newest_step(self) -> int:
        """The step up to which all was copied; 0 if nothing was."""
        return self.marks[-1][0] if self.marks else 0

    def forget_after(self, lines: Iterable[bytes]) -> int:
        """Drop the marks that a file no longer has, and return how many of its lines were copied.

        A start that goes on from a checkpoint, or a rollback, takes steps again. Lines are counted, since the number of
        a damaged step may be larger than those of the steps after it.

        Args:
            lines: Its lines.
        """
        checksums = {checksum for _, checksum in self.marks}
        there = {
            (fields["step"], checksum): number
            for number, line in enumerate(lines, start=1)
            if (checksum := crc32(line)) in checksums and (fields := step_fields(line)) is not None
        }
        self.marks = [mark for mark in self.marks if mark in there]
        return there[self.marks[-1]] if self.marks else 0
