"""A synthetic corpus that teaches recall: the tasks of `retrieval` in short documents of made-up words.

A model that reads any text scores near nothing until it is large. On this corpus a tiny one has nothing to learn but
recall: once it has, what is lost beyond its training length is lost to its positions.
"""

import itertools
import json
import random
from pathlib import Path

from configs.files import whole_file
from training.retrieval.tasks import NEEDLE_END, SEPARATOR, needle_start, question

_SYLLABLES = ("ba", "do", "fi", "ku", "le", "mo", "na")
WORDS = tuple(map("".join, itertools.product(_SYLLABLES, repeat=2)))  # four letters each, so that all may be keys
# Few sentences, which are soon known by heart: what is left to learn is recall.
_SENTENCES = tuple(f" {' '.join(WORDS[first::7])}." for first in range(7))
_NUMBERS = range(10_000, 100_000)
_MOST_KEYS = 4
_MOST_SENTENCES = 5
_ASKED = 4  # times that each question stands in a document: repetition is what recall is learned from
_PASSKEY_SHARE, _MULTI_VALUE_SHARE, _MULTI_QUERY_SHARE = 0.3, 0.2, 0.3


def write_recall_corpus(path: Path, *, documents: int, seed: int) -> None:
    """Write documents as the lines of a .jsonl file that `data.sources` takes.

    Args:
        path: The file, written whole or not at all.
        documents: How many to write.
        seed: Seed of the words and numbers.
    """
    chance = random.Random(seed)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": recall_document(chance)}) + "\n")


def recall_document(chance: random.Random) -> str:
    """Return a document: needles among filler, then questions about all of them with their answers.

    Args:
        chance: Draws its words and numbers.
    """
    codes = _draw_codes(chance)
    needles = [_answered(needle_start(key), [value]) for key, values in codes.items() for value in values]
    filler = chance.choices(_SENTENCES, k=chance.randint(1, _MOST_SENTENCES))
    # the order of the needles stays: it is that of the answer for several values of a key
    places = sorted(chance.sample(range(len(needles) + len(filler)), len(needles)))
    rest, inserted = iter(filler), iter(needles)
    text = [next(inserted) if place in places else next(rest) for place in range(len(needles) + len(filler))]
    return "".join(text + _questions(codes, chance))


def _draw_codes(chance: random.Random) -> dict[str | None, list[str]]:
    """Return the numbers of each key; the pass key's is None."""
    numbers = iter([str(number) for number in chance.sample(_NUMBERS, 2 * _MOST_KEYS + 1)])
    keys = chance.sample(WORDS, chance.randint(1, _MOST_KEYS))
    codes: dict[str | None, list[str]] = {key: [next(numbers)] for key in keys}
    if chance.random() < _MULTI_VALUE_SHARE:
        codes = {keys[0]: [next(numbers) for _ in range(_MOST_KEYS)]}
    if chance.random() < _PASSKEY_SHARE:
        codes[None] = [next(numbers)]
    return codes


def _questions(codes: dict[str | None, list[str]], chance: random.Random) -> list[str]:
    asked = [_answered(question([key] if key else [], values=len(each)), each) for key, each in codes.items()] * _ASKED
    single = [key for key, values in codes.items() if key and len(values) == 1]
    if len(single) > 1 and chance.random() < _MULTI_QUERY_SHARE:
        chance.shuffle(single)
        asked.append(_answered(question(single, values=1), [codes[key][0] for key in single]))
    chance.shuffle(asked)
    return asked


def _answered(start: str, values: list[str]) -> str:
    return start + SEPARATOR.join(f" {value}" for value in values) + NEEDLE_END
