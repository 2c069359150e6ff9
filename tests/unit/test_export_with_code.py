"""Export a folder with its own modelling code; compare it with our decoder, stock Bloom, a formula and exact rows."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from configs.errors import InputError
from configs.positions import POSITIONS, slopes
from configs.precisions import PRECISIONS
from configs.schema import Model
from data_pipeline.vocabulary import read_vocabulary
from parallel.seeds import initial_weights
from tests.support.bloom_formula import bloom_logits
from tests.support.exports import SHAPE, random_weights, train_sentencepiece, write_export
from tests.support.models import ONE_RANK, counterpart_of, small_model, weights_of
from training.export.formats.carried import modeling_trainshort
from training.export.formats.carried.modeling_trainshort import (
    CARRIED_POSITIONS,
    TrainshortConfig,
    TrainshortForCausalLM,
    attend_blockwise,
    distance_bias,
)
from training.export.formats.table import load_format
from training.export.formats.with_code import WithCodeFormat
from training.families.table import shards_of
from training.model.decoder import Decoder
from training.model.proof.attention_weights import read_rows, total_variation
from training.model.single import lone_decoder

FORMAT = WithCodeFormat()
TRAINED, VOCABULARY = 64, 97
MPT = {"family": "mpt", "tie_embeddings": False, "feed_forward": 100}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def vocab_size(tokenizer: Path) -> int:
    return len(read_vocabulary(tokenizer))


def decoder_of(model: Model, *, vocab_size: int) -> Decoder:
    """Return a decoder in which every weight changes the logits."""
    decoder = lone_decoder(model, vocab_size=vocab_size)
    initial_weights(decoder, seed=3, tensor=ONE_RANK)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * (parameter.ndim == 1))
    return decoder.eval()


def tokens_of(vocab_size: int, *, length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def carried_of(position: str = "alibi", **keys: Any) -> TrainshortForCausalLM:
    """Return a small model of the carried code whose positions matter."""
    torch.manual_seed(2)
    shape = {"vocab_size": VOCABULARY, "layers": 2, "hidden": 48, "heads": 6, "feed_forward": 192}
    model = TrainshortForCausalLM(TrainshortConfig(**shape, position=position, **keys)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def folder_of(form: WithCodeFormat, folder: Path, decoder: Decoder, *, model: Model, tokenizer: Path) -> Path:
    folder.mkdir()
    form.check(model)
    weights = {name: weight.detach() for name, weight in weights_of(decoder).items()}
    return write_export(form, folder, weights=weights, model=model, tokenizer=tokenizer)


def test_the_facts_name_the_positions_that_the_code_has() -> None:
    assert [row.name for row in POSITIONS.values() if row.carried] == [*CARRIED_POSITIONS]


@pytest.mark.parametrize("position", CARRIED_POSITIONS)
def test_every_model_has_its_own_logits(tmp_path: Path, tokenizer: Path, vocab_size: int, position: str) -> None:
    steep = {"alibi_bias_max": 5} if POSITIONS[position].slopes else {}
    jais = {"jais": {"family": "jais"}} if position in ("alibi", "rotary") else {}
    for name, keys in {"bloom": {}, "mpt": {**MPT, **steep}, "window": {"window": 40}, **jais}.items():
        model = small_model(6, position=position, **keys)
        decoder = decoder_of(model, vocab_size=vocab_size)
        folder = folder_of(FORMAT, tmp_path / name, decoder, model=model, tokenizer=tokenizer)
        exported = FORMAT.read_logits(folder)
        for length in (TRAINED, 8 * TRAINED):
            tokens = tokens_of(vocab_size, length=length)
            with torch.no_grad():
                difference = (exported(tokens) - decoder(tokens)).abs().max()
            assert difference < 1e-4, (name, length)


def test_bf16_is_nearer_to_fp32_than_stock_bloom(tmp_path: Path, tokenizer: Path, vocab_size: int) -> None:
    form = WithCodeFormat("bf16")
    weights = random_weights(SHAPE, vocab_size=vocab_size)
    folder = write_export(form, tmp_path, weights=weights, model=SHAPE, tokenizer=tokenizer)
    shards = shards_of(SHAPE, vocab_size=vocab_size)
    rounded = {name: form.rounded(weight, shards[name], model=SHAPE) for name, weight in weights.items()}
    tokens = tokens_of(vocab_size, length=8 * 128)
    exact = bloom_logits(rounded, tokens, layers=SHAPE.layers, heads=SHAPE.heads)
    loader: Any = TrainshortForCausalLM
    stock: Any = counterpart_of(rounded, SHAPE).to(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(form.read_logits(folder)(tokens), exact, atol=1e-4, rtol=0)
        ours, theirs = loader.from_pretrained(folder)(tokens).logits, stock(tokens).logits
    assert ours.dtype == torch.bfloat16  # as the folder says
    assert (ours - exact).abs().max() < 0.02 * exact.abs().max() < 0.2 * (theirs - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_rows_are_within_the_audits_limit(dtype: torch.dtype) -> None:
    heads, keys, queries = 6, 2000, 260
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(1, heads, queries, 64, generator=generator).to(torch.bfloat16)
    k = torch.randn(1, heads, keys, 64, generator=generator).to(torch.bfloat16)
    slope = torch.tensor(slopes(heads), dtype=torch.float64)
    by_distance = -slope.float()[:, None] * torch.arange(keys)
    # a CPU takes the bias in fp32, a GPU in the type of the queries
    strip = distance_bias(by_distance.to(dtype), rows=256, window=None)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = (q, k, v) if dtype == torch.float32 else (q.float(), k.float(), v.float())
        mask = strip if dtype == torch.float32 else strip.float()
        return attend_blockwise(*wide, bias=mask, padding=None)

    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    scores = q[0].double() @ k[0].double().mT / 8 - slope[:, None, None] * distance
    exact = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    apart = total_variation(read_rows(attend, q, k), exact)  # type: ignore[arg-type]
    assert float(apart.max()) < PRECISIONS["bf16"].row_tolerance


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_stock_classes_give_the_same_logits(family: str) -> None:
    plain = {"biases": False, "embedding_norm": False, "activation": "gelu_erf", "tie_word_embeddings": False}
    carried = carried_of(**(plain if family == "mpt" else {}))
    model = small_model(6, family=family, tie_embeddings=family == "bloom")
    weights = {
        name: weight for name, weight in carried.state_dict().items() if name != "head.weight" or family == "mpt"
    }
    tokens = tokens_of(VOCABULARY, length=512)
    with torch.no_grad():
        theirs = counterpart_of(weights, model)(tokens).logits
        torch.testing.assert_close(carried(tokens).logits, theirs, atol=1e-4, rtol=0)


def test_automodel_runs_the_code_in_the_folder(
    tmp_path: Path, tokenizer: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = tmp_path / "copies"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(copies))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = small_model(6, position="t5", **MPT)
    folder = folder_of(
        FORMAT, tmp_path / "mine", decoder_of(model, vocab_size=vocab_size), model=model, tokenizer=tokenizer
    )
    tokens = tokens_of(vocab_size, length=100)
    with torch.no_grad():
        verified = FORMAT.read_logits(folder)(tokens)
    assert FORMAT.read_tokenizer(folder).encode("The quick")
    assert not copies.exists()
    assert "__pycache__" not in {path.name for path in folder.iterdir()}
    with torch.no_grad():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(loaded(tokens).logits, verified)
    assert type(loaded).__module__.startswith("transformers_modules.mine")
    assert list(copies.rglob("modeling_trainshort.py"))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_trainshort.py").is_file()
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def test_the_folder_holds_code_weights_and_configuration(tmp_path: Path, tokenizer: Path, vocab_size: int) -> None:
    model = small_model(6, position="t5", window=40, dropout=0.1, **MPT)
    folder = folder_of(
        WithCodeFormat("bf16"),
        tmp_path / "out",
        decoder_of(model, vocab_size=vocab_size),
        model=model,
        tokenizer=tokenizer,
    )
    code = folder / "modeling_trainshort.py"
    assert code.read_text() == Path(modeling_trainshort.__file__).read_text()
    config = json.loads((folder / "config.json").read_text())
    del config["transformers_version"]
    assert config == {
        "architectures": ["TrainshortForCausalLM"],
        "model_type": "trainshort",
        "auto_map": {
            "AutoConfig": "modeling_trainshort.TrainshortConfig",
            "AutoModelForCausalLM": "modeling_trainshort.TrainshortForCausalLM",
        },
        "dtype": "bfloat16",
        "vocab_size": vocab_size,
        "layers": 2,
        "hidden": 48,
        "heads": 6,
        "feed_forward": 100,
        "position": "t5",
        "alibi_bias_max": 8,
        "window": 40,
        "biases": False,
        "embedding_norm": False,
        "activation": "gelu_erf",
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "dropout": 0.1,
        "train_length": 32,
        "seq_length": 96,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {path.name for path in folder.iterdir()} > {"generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("position", CARRIED_POSITIONS)
def test_padding_on_any_side_changes_no_logits(position: str) -> None:
    model = carried_of(position)
    text, padded = tokens_of(VOCABULARY, length=40, batch=3), torch.zeros(3, 60, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, start in enumerate((20, 0, 7)):
        padded[row, start : start + 40], mask[row, start : start + 40] = text[row], 1
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
        assert bool(logits.isfinite().all())
        torch.testing.assert_close(logits[mask == 1].view(3, 40, -1), model(text).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["alibi", "rotary", "sinusoidal"])
def test_a_padded_batch_generates_what_each_text_does(position: str) -> None:
    # a head of its own: sharing the embedding, it would repeat the last token
    model: Any = carried_of(position, window=None if position == "alibi" else 20, tie_word_embeddings=False)
    tokens = tokens_of(VOCABULARY, length=300, batch=2)
    mask = torch.ones_like(tokens)
    tokens[0, :37], mask[0, :37] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(tokens, attention_mask=mask, **options)[:, 300:]
    for row, first in enumerate((37, 0)):
        alone = tokens[row : row + 1, first:]
        text = model.generate(alone, attention_mask=torch.ones_like(alone), **options)[0]
        assert together[row].tolist() == text[-8:].tolist()
        without = model.generate(alone, attention_mask=torch.ones_like(alone), use_cache=False, **options)[0]
        assert without.tolist() == text.tolist()
    assert len({*together.flatten().tolist()}) > 4
    sampled = model.generate(tokens, attention_mask=mask, **{**options, "do_sample": True, "num_beams": 2})
    assert sampled.shape == (2, 308)


def test_a_cache_filled_in_parts_changes_nothing() -> None:
    for position, window in (("t5", None), ("alibi", 40), ("none", None)):
        model = carried_of(position, window=window)
        tokens, cache, parts = tokens_of(VOCABULARY, length=600), None, []
        with torch.no_grad():
            for part in tokens.split([1, 300, 1, 298], dim=1):
                out = model(part, past_key_values=cache, use_cache=True)
                parts.append(out.logits)
                cache = out.past_key_values
            torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, atol=1e-4, rtol=0)


def test_loss_states_and_last_logits_are_those_of_the_logits() -> None:
    model = carried_of()
    tokens = tokens_of(VOCABULARY, length=50, batch=2)
    out = model(tokens, labels=tokens, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(model.head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(model(tokens, logits_to_keep=1).logits, out.logits[:, -1:])
    torch.testing.assert_close(model(tokens, return_dict=False)[0], out.logits)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_masks_and_caches_that_do_not_fit_are_refused() -> None:
    model = carried_of()
    tokens = tokens_of(VOCABULARY, length=10)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, 10\], got \[1, 9\]"):
        model(tokens, attention_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match="needs a cache that grows, such as DynamicCache"):
        model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    with pytest.raises(ValueError, match="position is 'learned', and this code knows alibi, "):
        TrainshortConfig(position="learned")


def test_only_hf_carries_code() -> None:
    assert type(load_format("hf", with_code=True)) is WithCodeFormat
    assert type(load_format("hf")) is not WithCodeFormat
    with pytest.raises(InputError, match="format gguf cannot carry code: drop --with-code, or use --format hf"):
        load_format("gguf", with_code=True)
