"""How the next token is sampled, and when generation ends. The whole job tests the text of a trained model."""

import math
import sys
from io import BytesIO, TextIOWrapper
from itertools import islice
from pathlib import Path

import pytest
import torch

from configs.errors import InputError, TrainshortError
from data_pipeline.sources import file_chunks
from tests.support.command_line import Call, refused
from tests.support.models import VOCABULARY, counterpart_of, make_wandering_decoder, small_model, weights_of
from training.generation import continue_tokens, sample_token
from training.model.cache import ROOM, KeyValueCache
from training.model.single import SingleModel
from training.sampling import Sampling, choose_sampling, read_prompt

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()  # from the likeliest: tokens 1, 3, 2, 0


def drawn(sampling: Sampling, *, draws: int = 2000) -> list[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    return [sample_token(LOGITS, sampling=sampling, generator=generator) for _ in range(draws)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(drawn(Sampling())) == {1}
    assert set(drawn(Sampling(temperature=1e-300))) == {1}


def test_top_p_keeps_the_likeliest_tokens_that_sum_to_it() -> None:
    for top_p, kept in ((0.01, {1}), (0.4, {1}), (0.41, {1, 3}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        assert set(drawn(Sampling(temperature=1.0, top_p=top_p))) == kept, top_p


def test_draws_follow_probabilities_and_temperature() -> None:
    plain = drawn(Sampling(temperature=1.0), draws=8000)
    assert plain.count(1) / 8000 == pytest.approx(0.4, abs=0.03)
    assert plain.count(0) / 8000 == pytest.approx(0.1, abs=0.03)
    cold = drawn(Sampling(temperature=0.5), draws=8000)  # probabilities squared
    assert cold.count(1) / 8000 == pytest.approx(0.16 / 0.30, abs=0.03)


def test_draws_depend_on_the_seed_alone() -> None:
    first = drawn(Sampling(temperature=1.0, seed=5))
    assert first == drawn(Sampling(temperature=1.0, seed=5))
    assert first != drawn(Sampling(temperature=1.0, seed=6))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1: 0 takes the likeliest token"),
        ({"temperature": math.nan}, "temperature must be 0 or more, got nan: 0 takes the likeliest token"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1, got 0.0: 1 draws from all tokens"),
        ({"top_p": 1.5}, "top-p must be above 0 and at most 1, got 1.5: 1 draws from all tokens"),
        ({"seed": -1}, "seed must be from 0 to 18446744073709551615, got -1: use 1"),
        ({"seed": 2**64}, f"seed must be from 0 to 18446744073709551615, got {2**64}: use 1"),
        (
            {"top_p": 0.5},
            "top-p 0.5 draws, but temperature 0 takes the likeliest token: raise the temperature or drop top-p",
        ),
    ],
)
def test_sampling_values_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(**values)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_logits_that_are_not_finite_are_refused() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(TrainshortError, match="the model's logits are not finite"):
            sample_token(torch.tensor([0.0, value]), sampling=Sampling(), generator=torch.Generator())


def test_the_largest_seed_is_accepted() -> None:
    assert drawn(Sampling(temperature=1.0, seed=2**64 - 1), draws=1)[0] in range(4)


def test_a_prompt_is_text_a_file_or_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("two lines\n\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO("größer\n".encode())))
    assert read_prompt("as it is\n", None) == "as it is\n"
    assert read_prompt("", None) == ""
    assert read_prompt(None, file) == "two lines\n"
    assert read_prompt(None, Path("-")) == "größer"


def test_a_prompt_is_read_as_training_reads_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    for raw, prompt in (
        (b"\xef\xbb\xbfOnce\r\n", "Once"),
        (b"\xef\xbb\xbf", ""),
        (b"\r\n", ""),
        (b"", ""),
        (b"one\r\n\xef\xbb\xbftwo\r\n\r\n", "one\r\n\ufefftwo\r\n"),
        (b"no break\r", "no break\r"),
        (b"\xef\xbb\xbf \t\x0c x \n", " \t\x0c x "),
    ):
        file.write_bytes(raw)
        assert read_prompt(None, file) == prompt
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(raw)))
        assert read_prompt(None, Path("-")) == prompt
    (chunk,) = file_chunks(file, separator=None)
    assert chunk.text == " \t\x0c x \n"
    assert read_prompt("\ufeffOnce", None) == "Once"  # as from "$(cat FILE)"


def test_a_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match=r"--prompt-file standard input cannot be read \(it is closed\)"):
        read_prompt(None, Path("-"))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--prompt TEXT or --prompt-file FILE must be given, got neither: give one, or --interactive"),
        (
            ("--prompt", "", "--prompt-file", "-"),
            "--prompt TEXT or --prompt-file FILE must be given, got both: give one of them",
        ),
        (
            ("--prompt-file", "none.txt"),
            "--prompt-file none.txt cannot be read (No such file or directory): give a text file, or -",
        ),
        (("--prompt-file", "latin1.txt"), "--prompt-file latin1.txt is not UTF-8 at byte 2: write it in UTF-8"),
        (
            ("--prompt", "x", "--seed", "18446744073709551616"),
            "seed must be from 0 to 18446744073709551615, got 18446744073709551616: use 1",
        ),
        (
            ("--prompt", "x", "--seed", "1.5"),
            "--seed must be a whole number, got '1.5': write --seed 1",
        ),
        (
            ("--prompt", "x", "--temperature", "warm"),
            "--temperature must be a number, got 'warm': write --temperature 1",
        ),
        (
            ("--prompt", "x", "--temperature", "-1"),
            "temperature must be 0 or more, got -1.0: 0 takes the likeliest token",
        ),
        (
            ("--prompt", "x", "--greedy", "--temperature", "0.7"),
            "--greedy takes the likeliest token, so --temperature 0.7 has no effect: drop one of them",
        ),
        (
            ("--prompt", "x", "--greedy", "--top-p", "0.9"),
            "--greedy takes the likeliest token, so --top-p 0.9 has no effect: drop one of them",
        ),
        (
            ("--prompt", "x", "--greedy", "--seed", "0"),
            "--greedy takes the likeliest token, so --seed 0 has no effect: drop one of them",
        ),
        (
            ("--interactive", "--prompt", "x"),
            "--interactive reads prompts from standard input and streams, so --prompt x has no effect: drop "
            "one of them",
        ),
        (
            ("--interactive", "--json"),
            "--interactive reads prompts from standard input and streams, so --json has no effect: drop one of them",
        ),
        (("--prompt", "x"), "checkpoint nowhere does not exist: give a folder of RUN_DIR/checkpoints, or RUN_DIR"),
    ],
)
def test_a_wrong_command_line_is_one_line(trainshort: Call, arguments: tuple[str, ...], message: str) -> None:
    Path("latin1.txt").write_bytes("größer".encode("latin-1"))
    assert refused(trainshort, "generate", "nowhere", *arguments) == message


def test_what_is_not_given_has_a_default() -> None:
    chosen = choose_sampling()
    assert (chosen.temperature, chosen.top_p) == (0.8, 0.95)
    assert len({choose_sampling().seed for _ in range(20)}) > 1
    assert choose_sampling(temperature=0).greedy
    assert choose_sampling(temperature=0, seed=3) == Sampling(0, 1.0, 3)
    assert choose_sampling(top_p=0.5, seed=3) == Sampling(0.8, 0.5, 3)
    assert choose_sampling(temperature=2, seed=3) == Sampling(2, 0.95, 3)
    with pytest.raises(InputError, match=r"top-p 0\.5 draws, but temperature 0"):
        choose_sampling(temperature=0, top_p=0.5)


@pytest.mark.parametrize("position", ["alibi", "sinusoidal", "rotary", "t5", "none"])
def test_cached_greedy_tokens_match_those_of_the_whole_sequence(monkeypatch: pytest.MonkeyPatch, position: str) -> None:
    decoder = make_wandering_decoder(position=position)
    model = SingleModel(decoder, device=torch.device("cpu"), certificate={})
    prompt = torch.randint(3, VOCABULARY, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = list(prompt)
    for _ in range(60):
        expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
    for prefill_tokens in (4096, 4, 1):
        monkeypatch.setattr("training.generation.PREFILL_TOKENS", prefill_tokens)
        stream = continue_tokens(model, prompt, sampling=Sampling(), end=None)
        assert prompt + list(islice(stream, 60)) == expected
    assert len(set(expected[20:])) > 4


def test_cache_has_room_behind_the_prompt_without_a_copy() -> None:
    cache, prompt = KeyValueCache(), torch.randn(2, 1, 3, 700, 4)  # keys and values: [2, batch, heads, seq, head_dim]
    addresses = {cache.extend(0, *prompt)[0].data_ptr()}
    cache.advance(700)
    written = [prompt]
    for _ in range(ROOM):
        new = torch.randn(2, 1, 3, 1, 4)
        keys, values = cache.extend(0, *new)
        cache.advance(1)
        written.append(new)
        addresses.add(keys.data_ptr())
    assert len(addresses) == 1
    assert torch.equal(torch.stack([keys, values]), torch.cat(written, dim=3))


TRAIN_LENGTH = 32


def test_greedy_tokens_past_train_length_match_transformers() -> None:
    decoder = make_wandering_decoder()
    model = SingleModel(decoder, device=torch.device("cpu"), certificate={})
    prompt = torch.randint(3, VOCABULARY, (1, TRAIN_LENGTH - 12), generator=torch.Generator().manual_seed(0))
    expected = counterpart_of(weights_of(decoder), small_model(4)).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False, eos_token_id=None
    )[0, prompt.shape[1] :]
    stream = continue_tokens(model, prompt[0].tolist(), sampling=Sampling(), end=None)
    assert list(islice(stream, 60)) == expected.tolist()
    assert len(set(expected.tolist())) > 4, "repeated tokens would hide a cache that forgets"


class CountingModel:
    """A model for which the likeliest next token is the last one plus 1."""

    def next_logits(self, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens[:, -1] + 1, 10).float()


def test_generation_stops_at_the_end_of_the_document() -> None:
    assert list(continue_tokens(CountingModel(), [3], sampling=Sampling(), end=6)) == [4, 5, 6]
