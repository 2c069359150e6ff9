"""Follow the log of a run while it is written: what its newest start warns of, and its last line. Imports no torch."""

import re
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from configs.paths import logs_folder, rank_log
from training.appended_lines import AppendedLines

LOG_BYTES = 1 << 20  # of the log's end; a start's warnings before that are not shown
KEPT_WARNINGS = 20

# The log holds the messages alone, whatever their level; what a warning of ours says is listed in a test.
_WARNS = re.compile(
    r"\bwarning\b|error: |not saved|\bcannot\b|could not|not exported(?! again)|is not used|functions: |lacks its|"
    r"\bdiffered\b|is skipped|is replaced|left in place|\bunfinished\b|^accepted: |^asked by|^stopped |"
    r"^saving, |^stopping, |without saving|may be missing|dropped|nothing is logged|training continues|in memory$|"
    r"^rolled back |taken again|^track\.hook ",
    re.IGNORECASE,
)
_STARTS = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d)  ")  # first line of `start_lines`
_ERRORS = ("error: ", "Traceback (most recent call last):")
_ENDS = (*_ERRORS, "to continue: ", "next: ")
_OF_HOOK = ("track.hook ", "waiting for track.hook")  # the launcher runs it last
_DETAIL_LINES = 400  # of a traceback


class FollowedLog:
    """What rank 0's log says of the newest start.

    Attributes:
        started_at: When it began; None if its first line is not in the log's end.
        warnings: Its warnings, each with how often it was logged, the newest last.
        newest: The last line.
    """

    def __init__(self, run_dir: Path) -> None:
        self._lines = AppendedLines(rank_log(logs_folder(run_dir), rank=0), last_bytes=LOG_BYTES)
        self._begin(None)

    def _begin(self, started_at: datetime | None) -> None:
        self.started_at, self.newest = started_at, ""
        self._last: deque[str] = deque(maxlen=_DETAIL_LINES)
        self.warnings: dict[str, int] = {}

    @property
    def has_ended(self) -> bool:
        """Whether the start's last word is an error, or what to type next."""
        return _last_word(self._last).startswith(_ENDS)

    def update(self) -> None:
        """Read what was appended.

        Raises:
            OSError: the file cannot be read.
        """
        if self._lines.starts_over():
            self._begin(None)
        for each in self._lines.read():
            line = each.decode("utf-8", "replace").rstrip().rpartition("\r")[2]  # the last state of a progress bar
            if (start := _STARTS.match(line)) is not None:
                with suppress(ValueError):  # no date after all
                    self._begin(datetime.fromisoformat(start[1]))
            elif line:
                self.newest = line
                self._last.append(line)
                if _WARNS.search(line):
                    self._warn(line)

    def _warn(self, line: str) -> None:
        self.warnings[line] = self.warnings.pop(line, 0) + 1
        for oldest in [*self.warnings][:-KEPT_WARNINGS]:
            del self.warnings[oldest]


def last_error(run_dir: Path) -> str:
    """Return the newest start's last error in rank 0's log, to which the launcher writes the others'; else nothing."""
    log = AppendedLines(rank_log(logs_folder(run_dir), rank=0), last_bytes=LOG_BYTES)
    with suppress(OSError):
        log.starts_over()
        lines = [line.decode("utf-8", "replace").rstrip() for line in log.read()]
        of_start = takewhile(lambda line: not _STARTS.match(line), reversed(lines))
        return next((line.removeprefix(_ERRORS[0]) for line in of_start if line.startswith(_ERRORS[0])), "")
    return ""


def ends_in_error(lines: Sequence[str]) -> bool:
    """Return whether the last word of a log is an error, with its details, or a traceback."""
    return _last_word(lines).startswith(_ERRORS)


def _last_word(lines: Sequence[str]) -> str:
    """Return the last line that is no detail of another, nor of the user's command; of a traceback, the first."""
    words = [line for line in lines if not line.startswith(("  ", *_OF_HOOK))][-2:]
    return words[0] if words[:1] == [_ERRORS[1]] else "".join(words[-1:])
