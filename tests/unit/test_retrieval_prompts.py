"""The prompts of `retrieval`: their length, where needles lie, what they ask for."""

import random
import re
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import patch

import numpy as np
import pytest

from configs.errors import InputError
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.support.evaluation import TOKENIZER
from training.retrieval.corpus import WORDS, recall_document, write_recall_corpus
from training.retrieval.prompts import CANDIDATES, PromptMaker, make_haystack
from training.retrieval.request import RetrievalRequest
from training.retrieval.tasks import TASKS, require_tasks, without_own_lines

TEXT = "\n".join(topics.values())[:60_000]
LENGTH = 700
NEEDLE = re.compile(r"\nThe (?:pass key|code of (\w+)) is (\d{5})\.\n")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def maker(tokenizer: Tokenizer) -> PromptMaker:
    haystack = make_haystack(np.array(tokenizer.encode(TEXT)), tokenizer, longest=4000)
    return PromptMaker(haystack, tokenizer, seed=1)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_prompt_and_answer_fill_the_length(task: object, maker: PromptMaker, tokenizer: Tokenizer) -> None:
    (task,) = require_tasks([task.name])  # type: ignore[attr-defined]
    for length in (maker.shortest(task), LENGTH):
        for depth in (None,) if task.is_spread else (0.0, 0.3, 1.0):
            prompt = maker.make(task, length=length, depth=depth, number=0)
            assert len(prompt.tokens) + prompt.answer_tokens == length
            text = tokenizer.decode(prompt.tokens.tolist())
            needles, (*_, question) = NEEDLE.findall(text), text.split("\n")
            assert len(needles) == task.needles
            assert len(set(needles)) == task.needles
            by_key = {key: [value for owner, value in needles if owner == key] for key, _ in needles}
            asked = re.findall(r"\w+", question.removeprefix("The pass key is").split(" of ")[-1])
            keys = [word for word in asked if word in by_key] or [""]
            assert len(keys) == task.asked
            assert [value for key in keys for value in by_key[key]] == list(prompt.values)
            answer = tokenizer.decode([token for each in prompt.candidates for token in each[0].tolist()])
            assert answer == f" {', '.join(prompt.values)}.\n"


def test_a_needle_lies_at_its_depth(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    (task,) = require_tasks(["single"])
    for depth in (0.0, 0.25, 0.5, 1.0):
        prompt = maker.make(task, length=LENGTH, depth=depth, number=2)
        text = tokenizer.decode(prompt.tokens.tolist())
        needle, question = NEEDLE.search(text), text[text.rindex("\nThe code of") :]
        assert needle is not None
        around = LENGTH - prompt.answer_tokens - len(tokenizer.encode(needle[0])) - len(tokenizer.encode(question))
        assert prompt.starts == (round(depth * around),)
        assert tokenizer.decode(prompt.tokens[: prompt.starts[0]].tolist()) == text[: needle.start()]


def test_several_needles_lie_in_the_order_of_the_answer(maker: PromptMaker) -> None:
    (values, queries, keys) = require_tasks(["multi-value", "multi-query", "multi-key"])
    starts = [maker.make(values, length=LENGTH, depth=None, number=number).starts for number in range(8)]
    assert all(list(each) == sorted(each) for each in starts)
    assert len(set(starts)) == 8
    orders = [np.argsort(maker.make(queries, length=LENGTH, depth=None, number=n).starts).tolist() for n in range(8)]
    assert len(set(map(tuple, orders))) > 1
    assert all(maker.make(keys, length=LENGTH, depth=0.0, number=n).starts == (0,) for n in range(4))


def test_wrong_numbers_are_those_of_other_keys_and_unseen_ones(maker: PromptMaker, tokenizer: Tokenizer) -> None:
    for task in TASKS.values():
        prompt = maker.make(task, length=LENGTH, depth=None if task.is_spread else 0.5, number=1)
        needles = [value for _, value in NEEDLE.findall(tokenizer.decode(prompt.tokens.tolist()))]
        for slot, candidates in enumerate(prompt.candidates):
            numbers = [re.findall(r"\d+", tokenizer.decode(each.tolist()))[0] for each in candidates]
            assert len(set(numbers)) == CANDIDATES
            assert numbers[0] == prompt.values[slot]
            others = set(needles) - ({numbers[0]} if task.values == 1 else set(needles))
            assert set(numbers[1:]) & set(needles) == others


def test_prompts_depend_on_the_seed_alone(tokenizer: Tokenizer, maker: PromptMaker) -> None:
    (task,) = require_tasks(["multi-key"])
    haystack = make_haystack(np.array(tokenizer.encode(TEXT)), tokenizer, longest=4000)
    again, other = (PromptMaker(haystack, tokenizer, seed=seed) for seed in (1, 2))
    again.make(task, length=600, depth=0.0, number=0)  # what else is measured changes nothing
    place = {"length": LENGTH, "depth": 0.5, "number": 3}
    first = maker.make(task, **place)  # type: ignore[arg-type]
    assert first.tokens.tolist() == again.make(task, **place).tokens.tolist()  # type: ignore[arg-type]
    assert first.tokens.tolist() != other.make(task, **place).tokens.tolist()  # type: ignore[arg-type]
    assert first.values != maker.make(task, length=LENGTH, depth=0.5, number=4).values


def test_a_passkey_lies_in_a_repeated_stretch(maker: PromptMaker) -> None:
    prompt = maker.make(TASKS["passkey"], length=LENGTH, depth=1.0, number=0)
    stretch = prompt.tokens[:24].tolist()
    assert prompt.tokens[24:48].tolist() == stretch
    single = maker.make(TASKS["single"], length=LENGTH, depth=1.0, number=0)
    assert single.tokens[24:48].tolist() != single.tokens[:24].tolist()


def test_a_haystack_holds_no_needle_of_its_own(tokenizer: Tokenizer) -> None:
    text = "first\nThe code of it is 12345.\nThe codes of a and b are 1, 2.\nlast The pass key is\nThe pass key is 5.\n"
    assert without_own_lines(text) == "firstlast The pass key is"
    documents = "".join(recall_document(random.Random(number)) for number in range(60))
    tokens = [*tokenizer.encode(documents), tokenizer.end_of_document]
    haystack = make_haystack(np.array(tokens), tokenizer, longest=1000)
    assert not re.search(r"\d", tokenizer.decode(haystack.tokens.tolist()))
    assert tokenizer.end_of_document not in haystack.tokens
    assert set(haystack.keys) <= set(WORDS)


def test_a_text_or_a_length_that_is_too_short_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="the text has [0-9]+ tokens, too short for length 4000: use lengths up to"):
        make_haystack(np.array(tokenizer.encode("only a few words")), tokenizer, longest=4000)
    with pytest.raises(InputError, match="the text has 2 different words of 4 to 12 letters, and keys need 8"):
        make_haystack(np.array(tokenizer.encode("only this " * 50)), tokenizer, longest=40)


def test_a_wrong_request_is_refused() -> None:
    for wrong, message in (
        ({"tasks": ["needle"]}, "task 'needle' is not known: use passkey, single, "),
        ({"lengths": ["1x", "2k"]}, "--lengths must be tokens, or training lengths as in 2x, .* got '1x,2k'"),
        ({"lengths": ["0"]}, "got '0'"),
        ({"depths": 1}, "--depths must be from 2 to 101, got 1"),
        ({"seed": -1}, "seed must be from 0 to 18446744073709551615, got -1: use 1"),
    ):
        with pytest.raises(InputError, match=message):
            RetrievalRequest(**wrong)  # type: ignore[arg-type]
    request = RetrievalRequest(lengths=["4x", "100", "1x", "512"], depths=3)
    assert request.resolved_lengths(train_length=128) == (100, 128, 512)
    assert [request.depths_of(TASKS[name]) for name in ("single", "multi-query")] == [(0, 0.5, 1), (None,)]


def test_the_corpus_holds_every_task_and_its_answers(tmp_path: Path) -> None:
    chance, seen = random.Random(5), Counter[str]()
    for _ in range(200):
        text = recall_document(chance)
        needles = NEEDLE.findall(text)
        for key, value in needles:
            is_repeated = needles.count((key, value)) > 1
            assert is_repeated or re.search(rf"The codes of .*{key}.* are .*{value}", text), "its question is asked"
            seen["single" if key else "passkey"] += is_repeated
        for keys, values in re.findall(r"The codes of ([\w, ]+) are ([\d, ]+)\.\n", text):
            names, numbers = re.split(", | and ", keys), values.split(", ")
            owned = [value for name in names for value in dict.fromkeys(v for k, v in needles if k == name)]
            assert owned == numbers
            seen["multi-value" if len(names) == 1 else "multi-query"] += 1
    assert min(seen[name] for name in ("single", "passkey", "multi-value", "multi-query")) > 20
    for name in ("a", "b"):
        write_recall_corpus(tmp_path / name, documents=3, seed=1)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    assert len((tmp_path / "a").read_text().splitlines()) == 3
    documents = iter(["whole"])
    with patch("training.retrieval.corpus.recall_document", lambda _: next(documents)), pytest.raises(StopIteration):
        write_recall_corpus(tmp_path / "interrupted", documents=3, seed=1)
    assert not (tmp_path / "interrupted").exists()
