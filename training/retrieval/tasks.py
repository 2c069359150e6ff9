"""The tasks of `retrieval`: what a prompt holds and what it asks for. Imports no torch.

Sources: passkey, Mohtashami and Jaggi, "Landmark Attention", 2023; the other four, Hsieh et al., "RULER: What's the
Real Context Size of Your Long-Context Language Models?", 2024, tasks niah_single, niah_multikey_1, niah_multivalue and
niah_multiquery (https://github.com/NVIDIA/RULER). Numbers of needles are RULER's, the words are our own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import InputError

DEFAULT_LENGTHS = ("1x", "2x", "4x")
DEFAULT_DEPTHS = 5
DEFAULT_SAMPLES = 20
DEFAULT_SEED = 1
NEEDLE_END = ".\n"
SEPARATOR = ","
# Lines of the tasks, with the line breaks that a needle brings along.
_OWN_LINES = re.compile(r"\n?^(?:The pass key is|The codes? of) .*\n?", re.MULTILINE)


@dataclass(frozen=True)
class RetrievalTask:
    """One task.

    Attributes:
        name: Its name on the command line and in reports.
        keys: Keys in the prompt; 0 if the one needle has none.
        values: Needles of each key.
        asked: Keys that the question names.
        repeats: Whether the haystack is one short stretch of text, repeated.
    """

    name: str
    keys: int = 1
    values: int = 1
    asked: int = 1
    repeats: bool = False

    @property
    def needles(self) -> int:
        """Needles in the prompt."""
        return max(self.keys, 1) * self.values

    @property
    def answers(self) -> int:
        """Values that the question asks for."""
        return self.asked * self.values

    @property
    def is_spread(self) -> bool:
        """Whether the asked needles lie at random places, instead of one needle at a chosen depth."""
        return self.answers > 1


TASKS = {
    task.name: task
    for task in (
        RetrievalTask("passkey", keys=0, repeats=True),
        RetrievalTask("single"),
        RetrievalTask("multi-key", keys=4),
        RetrievalTask("multi-value", values=4),
        RetrievalTask("multi-query", keys=4, asked=4),
    )
}


def needle_start(key: str | None) -> str:
    """Return a needle up to its value; the question for one value is the same, so that copying answers it."""
    return "\nThe pass key is" if key is None else f"\nThe code of {key} is"


def question(keys: Sequence[str], *, values: int) -> str:
    """Return the question up to its answer.

    Args:
        keys: The asked keys, in the order of the answer; none for the pass key.
        values: Values of each key.
    """
    if len(keys) * values <= 1:
        return needle_start(keys[0] if keys else None)
    *first, last = keys
    names = f"{', '.join(first)} and {last}" if first else last
    return f"\nThe codes of {names} are"


def without_own_lines(text: str) -> str:
    """Return text without lines that look like a needle or a question: a haystack must not answer by itself."""
    return _OWN_LINES.sub("", text)


def require_tasks(names: Sequence[str]) -> tuple[RetrievalTask, ...]:
    """Return tasks by name, each once.

    Raises:
        InputError: a name is not known.
    """
    for name in names:
        if name not in TASKS:
            raise InputError(f"task {name!r} is not known: use {', '.join(TASKS)}")
    return tuple(TASKS[name] for name in dict.fromkeys(names))
