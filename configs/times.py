"""SLURM's time limits in seconds."""

import re


def time_limit_seconds(text: str) -> int | None:
    """Return the seconds of [days-]hours:minutes:seconds or days-hours[:minutes]; None for anything else.

    SLURM knows `90` (minutes) and `1:30` (minutes and seconds) too; they are refused, since people mean hours.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+)-(\d+)(?::(\d\d))?", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(match[n] or match[m] or 0) for n, m in ((1, 5), (2, 6), (3, 7), (4, 4)))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
