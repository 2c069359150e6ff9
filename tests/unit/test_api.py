"""The Python interface, on a checkpoint that an older version wrote and on the model of tests.support."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import InputError, TrainshortError
from data_pipeline.tokenizer import load_tokenizer
from tests.support.exports import train_sentencepiece
from training.api import TrainedModel, load
from training.generation import TextStream
from training.model.cache import KeyValueCache
from training.sampling import Sampling

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
TEXT = "Once, and\n  twice: é日👍\x00</s> "


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    return load(OLD_RUN)


def test_a_run_folder_or_a_checkpoint_is_loaded(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = OLD_RUN / "checkpoints" / "step_0000002"
    monkeypatch.setenv("RUNS", str(OLD_RUN.parent))
    for path in (str(OLD_RUN), checkpoint, "$RUNS/run_of_0.1.0"):
        other = load(path)
        assert torch.equal(other.logits([5, 6]), model.logits([5, 6]))
    assert (model.step, model.train_length, model.vocab_size) == (2, 8, 400)
    assert model.path == checkpoint
    assert model.config.model.position == model.certificate["ranks"][0]["position"] == "alibi"
    assert "step 2" in repr(model)
    with pytest.raises(InputError, match="checkpoint .*nowhere does not exist"):
        load("nowhere")
    assert capfd.readouterr() == ("", ""), "it prints nothing"


def test_the_text_is_the_prompt_and_its_continuation(model: TrainedModel) -> None:
    generated = model.generate(TEXT, tokens=20, seed=3)
    assert str(generated) == generated.text == TEXT + model.decode(generated.token_ids)
    assert (generated.temperature, generated.top_p, generated.seed) == (0.8, 0.95, 3)
    assert generated.prompt_tokens == len(model.encode(TEXT))
    assert 0 < generated.tokens == len(generated.token_ids) <= 20
    assert model.generate(TEXT, tokens=20, seed=3).text == generated.text
    drawn = model.generate(TEXT, tokens=20)  # a seed of its own, which repeats it
    assert model.generate(TEXT, tokens=20, seed=drawn.seed).text == drawn.text
    assert len({model.generate("", tokens=20).text for _ in range(4)}) > 1


def test_temperature_zero_takes_the_likeliest_tokens(model: TrainedModel) -> None:
    generated = model.generate("Once", tokens=12, temperature=0)
    ids = model.encode("Once")
    for token in generated.token_ids:
        assert token == int(model.logits(ids)[-1].argmax())
        ids.append(token)
    assert (generated.seed, generated.top_p) == (None, 1.0)


def test_an_empty_prompt_starts_a_document(model: TrainedModel) -> None:
    generated = model.generate(tokens=3, temperature=0)
    assert (generated.prompt, generated.prompt_tokens) == ("", 1)
    assert generated.token_ids[0] == int(model.logits([2])[-1].argmax())


def test_pieces_are_the_text_at_any_temperature(model: TrainedModel) -> None:
    # a hot model draws bytes that are no characters, and parts of some
    for temperature, prompt in ((0, "Once"), (1, TEXT), (50, ""), (50, TEXT)):
        stream = model.stream(prompt, tokens=60, temperature=temperature, seed=4)
        pieces = list(stream)
        assert "".join(pieces) == stream.result.text
        assert stream.result.text == model.generate(prompt, tokens=60, temperature=temperature, seed=4).text
        assert all(pieces)
        assert pieces[0] == prompt or not prompt
        assert len(pieces) > 10


def test_a_stream_shows_each_token_as_it_comes(model: TrainedModel) -> None:
    stream = model.stream("Once", tokens=1000, temperature=0)
    assert next(stream) == "Once"
    assert stream.result.tokens == 0
    for number in range(1, 5):
        next(stream)
        assert stream.result.tokens == number
    other = model.stream("Once", tokens=1000, temperature=0)  # a cache of its own
    assert [next(other) for _ in range(5)] == ["Once", *(model.decode([token]) for token in stream.result.token_ids)]


def test_losses_and_logits_keep_the_shape_of_the_tokens(model: TrainedModel) -> None:
    ids = model.encode(TEXT)
    losses, logits = model.losses(ids), model.logits(ids)
    assert losses.shape == (len(ids) - 1,)
    assert logits.shape == (len(ids), 400)
    expected = -logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    assert (losses.dtype, logits.dtype, losses.requires_grad) == (torch.float32, torch.float32, False)
    for same in (np.array(ids, np.uint16), np.array(ids, ">i4"), torch.tensor(ids, dtype=torch.int32), tuple(ids)):
        assert torch.equal(model.losses(same), losses)
    for batch in ([ids, ids[::-1]], torch.tensor([ids, ids[::-1]]), np.array([ids, ids[::-1]])):
        assert model.losses(batch).shape == (2, len(ids) - 1)
        torch.testing.assert_close(model.logits(batch)[0], logits, atol=1e-5, rtol=0)
    assert model.logits([5]).shape == (1, 400)


def test_text_is_encoded_and_decoded_exactly(model: TrainedModel) -> None:
    assert model.decode(model.encode(TEXT)) == TEXT
    assert model.decode(torch.tensor(model.encode(TEXT))) == TEXT
    assert (model.encode(""), model.decode([])) == ([], "")


SHAPE = r"tokens must have the shape \[length\] or \[batch, length\] with a length of at least 2, got "


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("Once", "tokens must be token ids, got text: encode"),
        ([1], SHAPE + r"\[1\]"),
        ([], SHAPE + r"\[0\]"),
        ([[]], SHAPE + r"\[1, 0\]"),
        (3, SHAPE + r"\[\]"),
        (torch.zeros(0, 4, dtype=torch.long), SHAPE + r"\[0, 4\]"),
        (torch.zeros(2, 2, 2, dtype=torch.long), SHAPE + r"\[2, 2, 2\]"),
        ([[1, 2], [3]], "tokens must be rows of one length"),
        ([1.0, 2.0], "tokens must be integers, got float64: use the ids that encode"),
        (torch.ones(3, dtype=torch.bfloat16), r"tokens must be integers, got torch\.bfloat16"),
        ([True, False], "tokens must be integers, got bool"),
        (["a", "b"], "tokens must be integers, got <U1"),
        ([None, 1], "tokens must be integers, got object"),
        (None, "tokens must be integers, got object"),
        ([1, 2**70], "tokens must be integers, got object"),
        ([1, 400], "token ids must be from 0 to 399, got 400: use the ids that encode"),
        ([1, -1], "token ids must be from 0 to 399, got -1"),
        (np.array([1, 2**64 - 1], np.uint64), "token ids must be from 0 to 399, got 18446744073709551615"),
    ],
)
def test_what_is_no_text_in_tokens_is_refused(model: TrainedModel, tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.losses(tokens)


def test_other_wrong_input_is_refused(model: TrainedModel) -> None:
    wrong: dict[str, Callable[[], object]] = {
        "the prompt must be text, got list: give a str": lambda: model.generate([5, 6]),  # type: ignore[arg-type]
        "what is encoded must be text, got bytes: decode its bytes": lambda: model.encode(b"x"),  # type: ignore[arg-type]
        "the prompt is not UTF-8 at character 1": lambda: model.stream("a\udcff"),
        "what is encoded is not UTF-8 at character 0": lambda: model.encode("\udcff"),
        "tokens to generate must be 1 or more, got 0": lambda: model.stream("x", tokens=0),
        "tokens to generate must be a whole number, got 2.5": lambda: model.stream("x", tokens=2.5),  # type: ignore[arg-type]
        "tokens to generate must be a whole number, got True": lambda: model.stream("x", tokens=True),
        "temperature must be 0 or more, got nan": lambda: model.stream("x", temperature=math.nan),
        "temperature must be 0 or more, got inf": lambda: model.stream("x", temperature=10**400),
        "temperature must be a number, got '1': give an int": lambda: model.stream("x", temperature="1"),  # type: ignore[arg-type]
        r"temperature must be a number, got \[1\]": lambda: model.stream("x", temperature=[1]),  # type: ignore[arg-type]
        "top-p must be a number, got '1'": lambda: model.stream("x", top_p="1"),  # type: ignore[arg-type]
        "seed must be a whole number, got 'a': give an int": lambda: model.stream("x", seed="a"),  # type: ignore[arg-type]
        r"scale '4' is not known: use linear or ntk or yarn": lambda: load(OLD_RUN, scale=4),  # type: ignore[arg-type]
        "seed must be a whole number, got 1.5": lambda: model.stream("x", seed=1.5),  # type: ignore[arg-type]
        r"a length of at least 1, got \[0\]": lambda: model.logits([]),
        r"must have the shape \[length\], got \[1, 2\]": lambda: model.decode([[5, 6]]),  # type: ignore[list-item]
    }
    for message, call in wrong.items():
        with pytest.raises(InputError, match=message):
            call()


def test_numbers_of_numpy_are_numbers(model: TrainedModel) -> None:
    generated = model.generate("Once", tokens=np.int64(3), temperature=np.float32(0.5), seed=np.uint8(4))  # type: ignore[arg-type]
    assert generated.text == model.generate("Once", tokens=3, temperature=0.5, seed=4).text
    assert [type(value) for value in (generated.temperature, generated.seed)] == [float, int]


def test_threads_share_a_model(model: TrainedModel) -> None:
    texts: dict[int, str] = {}

    def work(number: int) -> None:
        mine = load(OLD_RUN) if number == 0 else model
        texts[number] = mine.generate("Once", tokens=20, seed=9).text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(texts.values()) == 3 * [model.generate("Once", tokens=20, seed=9).text]


class Diverged:
    """A model whose logits are not finite after some tokens."""

    def __init__(self, vocab_size: int, *, good: int) -> None:
        self.left, self.logits = good, torch.zeros(1, vocab_size)

    def next_logits(self, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        self.left -= 1
        return self.logits if self.left >= 0 else self.logits + math.nan


def test_a_diverged_model_says_so_after_its_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path))
    stream = TextStream(
        Diverged(tokenizer.vocab_size, good=2),
        tokenizer,
        prompt="x",
        tokens=5,
        sampling=Sampling(),
        train_length=8,
    )
    with pytest.raises(TrainshortError, match="the model's logits are not finite"):
        list(stream)
    assert stream.result.token_ids == (0, 0)
