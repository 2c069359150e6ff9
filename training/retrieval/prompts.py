"""Make the prompts of `retrieval` from a text: needles in a haystack, and a question at the end. Imports no torch."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low, mode

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from data_pipeline.tokenizer import Tokenizer
from training.retrieval.tasks import NEEDLE_END, SEPARATOR, RetrievalTask, needle_start, question, without_own_lines

CANDIDATES = 10  # numbers among which the right one is looked for
_HAYSTACK_TOKENS = 1 << 18  # of the text at least: other stretches for each prompt
_LEAST_HAYSTACK = 16  # tokens of a prompt besides the needles, so that a depth means something
_REPEATED_TOKENS = 24  # of the stretch that fills a passkey's prompt
_KEYS, _FEWEST_KEYS = 1000, 8
_WORD = re.compile(r"[^\W\d_]{4,12}")
_NUMBERS = range(10_000, 100_000)
_TRIED_NUMBERS = range(10_000, 100_000, 311)  # to see how many tokens a number usually takes


@dataclass(frozen=True)
class Haystack:
    """The text around needles.

    Attributes:
        tokens: [tokens], int64, without ends of documents.
        keys: Words of it.
    """

    tokens: NDArray[np.int64]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """One prompt; with its answer it has exactly the length that was asked for.

    Attributes:
        tokens: [length - answer], int64.
        values: The numbers that are asked for, in the order of the answer.
        candidates: For each of them the tokens of it and of wrong numbers, the right one first, [CANDIDATES, width],
            int64. What follows a number belongs to it, since a tokenizer may join them.
        starts: Where the needles of the answer begin, in its order.
    """

    tokens: NDArray[np.int64]
    values: tuple[str, ...]
    candidates: tuple[NDArray[np.int64], ...]
    starts: tuple[int, ...]

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer."""
        return sum(each.shape[1] for each in self.candidates)


def make_haystack(tokens: NDArray[np.integer], tokenizer: Tokenizer, *, longest: int) -> Haystack:
    """Return the haystack of a text.

    Args:
        tokens: The text, [tokens].
        tokenizer: The model's tokenizer.
        longest: Tokens of the longest prompt.
    Raises:
        InputError: the text is shorter than that, or has too few words.
    """
    # decoded and encoded again: an end of a document would tell the model to forget what is before it
    text = without_own_lines(tokenizer.decode(tokens[: max(_HAYSTACK_TOKENS, 4 * longest)].tolist()))
    encoded = np.array(tokenizer.encode(text), dtype=np.int64)
    if len(encoded) < longest:
        raise InputError(
            f"the text has {len(encoded)} tokens, too short for length {longest}: use lengths up to {len(encoded)}, or "
            "give a longer text with --data"
        )
    counts = Counter(word for word in _WORD.findall(text) if word == word.lower())
    words = sorted(counts, key=lambda word: (-counts[word], word))[:_KEYS]
    if len(words) < _FEWEST_KEYS:
        raise InputError(
            f"the text has {len(words)} different words of 4 to 12 letters, and keys need {_FEWEST_KEYS}: give another "
            "text with --data"
        )
    widths = [len(ids) for ids in tokenizer.encode_each([f" {word}" for word in words])]
    limit = median_low(widths)  # a rare word of many tokens would leave little space
    return Haystack(encoded, tuple(word for word, width in zip(words, widths, strict=True) if width <= limit))


class PromptMaker:
    """Makes prompts. A prompt depends on text, tokenizer, seed and its own place, not on what else is measured."""

    def __init__(self, haystack: Haystack, tokenizer: Tokenizer, *, seed: int) -> None:
        self._haystack, self._tokenizer, self._seed = haystack, tokenizer, seed
        # All numbers have equally many tokens: none is likelier for being shorter, and answers fill the same space.
        self._widths = {
            end: mode(len(self._encode(f" {number}{end}")) for number in _TRIED_NUMBERS)
            for end in (SEPARATOR, NEEDLE_END)
        }

    def shortest(self, task: RetrievalTask) -> int:
        """Return the shortest length that a prompt of a task may have."""
        keys = sorted(self._haystack.keys, key=lambda key: len(self._encode(f" {key}")))[-max(task.keys, 1) :]
        asked = keys[-task.asked :] if task.keys else []
        needle = len(self._encode(needle_start(keys[-1] if task.keys else None))) + self._widths[NEEDLE_END]
        asks = len(self._encode(question(asked, values=task.values)))
        return task.needles * needle + asks + self._answer_tokens(task) + _LEAST_HAYSTACK

    def make(self, task: RetrievalTask, *, length: int, depth: float | None, number: int) -> Prompt:
        """Return one prompt.

        Args:
            task: Its task.
            length: Tokens of prompt and answer, at least `shortest`.
            depth: Where in the haystack the asked needle lies, from 0 to 1; None for random places.
            number: Its number among those of one task, length and depth.
        """
        # seeded with text: Python's own way, which gives the same numbers on every machine
        chance = random.Random(f"{self._seed} {task.name} {length} {depth} {number}")
        keys: list[str | None] = [*chance.sample(self._haystack.keys, task.keys)] if task.keys else [None]
        values = self._draw(chance, task.needles + task.answers * (CANDIDATES - 1))
        owners = [key for key in keys for _ in range(task.values)]
        needles = [
            np.concatenate([self._encode(needle_start(key)), self._encode(f" {value}{NEEDLE_END}")])
            for key, value in zip(owners, values, strict=False)
        ]
        asked_keys = [key for key in keys[: task.asked] if key is not None]
        asked = self._encode(question(asked_keys, values=task.values))
        space = length - self._answer_tokens(task) - len(asked) - sum(map(len, needles))
        places = [chance.randint(0, space) for _ in needles]
        if depth is not None:
            places[0] = round(depth * space)
        elif task.values > 1:
            places.sort()  # the answer has the order of the text
        text, starts = _insert(needles, self._stretch(chance, space, repeats=task.repeats), places=places)
        return Prompt(
            tokens=np.concatenate([text, asked]),
            values=tuple(values[: task.answers]),
            candidates=tuple(self._candidates(task, values, slot) for slot in range(task.answers)),
            starts=tuple(starts[: task.answers]),
        )

    def _answer_tokens(self, task: RetrievalTask) -> int:
        return (task.answers - 1) * self._widths[SEPARATOR] + self._widths[NEEDLE_END]

    def _candidates(self, task: RetrievalTask, values: Sequence[str], slot: int) -> NDArray[np.int64]:
        """Return a right number and wrong ones: those of the prompt's other keys, and others that it does not hold."""
        others = (
            [] if task.values > 1 else [value for place, value in enumerate(values[: task.needles]) if place != slot]
        )
        unseen = values[task.needles + slot * (CANDIDATES - 1) :]
        end = SEPARATOR if slot < task.answers - 1 else NEEDLE_END
        return np.stack([self._encode(f" {value}{end}") for value in [values[slot], *others, *unseen][:CANDIDATES]])

    def _draw(self, chance: random.Random, count: int) -> list[str]:
        """Return numbers that differ, of equally many tokens each."""
        drawn: dict[str, None] = {}
        while len(drawn) < count:
            number = str(chance.choice(_NUMBERS))
            if all(len(self._encode(f" {number}{end}")) == width for end, width in self._widths.items()):
                drawn[number] = None
        return list(drawn)

    def _stretch(self, chance: random.Random, count: int, *, repeats: bool) -> NDArray[np.int64]:
        tokens = self._haystack.tokens
        taken = min(_REPEATED_TOKENS, count) if repeats else count
        first = chance.randint(0, len(tokens) - taken)
        return np.resize(tokens[first : first + taken], count)

    def _encode(self, text: str) -> NDArray[np.int64]:
        return np.array(self._tokenizer.encode(text), dtype=np.int64)


def _insert(
    needles: Sequence[NDArray[np.int64]], text: NDArray[np.int64], *, places: Sequence[int]
) -> tuple[NDArray[np.int64], list[int]]:
    """Return a text with needles in front of its tokens at some places, and where each needle begins."""
    parts, starts, done, size = list[NDArray[np.int64]](), [0] * len(needles), 0, 0
    for number in sorted(range(len(needles)), key=lambda number: places[number]):
        parts += [text[done : places[number]], needles[number]]
        starts[number] = size + places[number] - done
        done, size = places[number], starts[number] + len(needles[number])
    return np.concatenate([*parts, text[done:]]), starts
