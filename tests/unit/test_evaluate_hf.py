"""Models of Hugging Face on a run's text: an export has the checkpoint's figures, a baseline its own tokens."""

import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, RobertaConfig, RobertaForCausalLM

from tests.support.command_line import Call
from training.export.formats.huggingface import quiet_transformers

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
FIGURES = ("loss", "perplexity", "word_perplexity", "bits_per_byte", "standard_error")


@pytest.fixture
def home(tmp_path: Path, trainshort: Call) -> Path:
    """A folder with a run and its export."""
    shutil.copytree(OLD_RUN, tmp_path / "run")
    texts = [topics[name][:60] for name in sorted(topics)[:40]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with contextlib.chdir(tmp_path):
        assert trainshort("export", "run", "--format", "hf", "--out", "exported").code == 0
    return tmp_path


def report_from(trainshort: Call, home: Path, *arguments: str) -> dict[str, Any]:
    with contextlib.chdir(home):
        answer = trainshort("evaluate", "run", "--data", "texts.jsonl", *arguments, "--json")
    assert answer.code == 0, answer.error
    return dict(json.loads(answer.out))


def test_an_export_has_the_figures_of_the_checkpoint(home: Path, trainshort: Call) -> None:
    asked = ("--lengths", "8,16", "--protocol", "nonoverlapping", "--protocol", "sliding:4", "--protocol", "last:2")
    ours = report_from(trainshort, home, *asked, "--context")
    newest = (home / "run" / "evaluation" / "report.json").read_bytes()
    theirs = report_from(trainshort, home, *asked, "--context", "--hf", "exported")
    for one, other in zip(ours["results"], theirs["results"], strict=True):
        assert [one[key] for key in ("length", "protocol", "stride", "tokens")] == [
            other[key] for key in ("length", "protocol", "stride", "tokens")
        ]
        for key in FIGURES:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), key
        assert one["loss_by_position"]["loss"] == pytest.approx(other["loss_by_position"]["loss"], rel=1e-5)
    assert ours["context"]["loss"] == pytest.approx(theirs["context"]["loss"], rel=1e-5)
    assert ours["context"]["shuffled_loss"] == pytest.approx(theirs["context"]["shuffled_loss"], rel=1e-5)
    assert ours["text_sha256"] == theirs["text_sha256"]
    assert ours["weights_sha256"] != theirs["weights_sha256"]
    assert (theirs["checkpoint"], theirs["position"], theirs["train_length"]) == (str(home / "exported"), "bloom", 8)
    assert theirs["attention"].startswith("transformers' ")
    kept = home / "run" / "evaluation" / "hf-exported"
    assert {path.name for path in kept.iterdir()} == {"texts.json", "texts.md", "texts.png"}
    assert (home / "run" / "evaluation" / "report.json").read_bytes() == newest, "it is the run's own"


def test_a_baseline_is_measured_in_its_own_tokens(home: Path, trainshort: Call) -> None:
    """A model for which every token is equally likely, with a tokenizer whose origin is not known."""
    folder = home / "gpt 2"
    shutil.copytree(home / "exported", folder, ignore=shutil.ignore_patterns("*.safetensors", "export.json"))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    model = GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_positions=24, n_embd=8, n_layer=1, n_head=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(folder)
    report = report_from(trainshort, home, "--lengths", "8,24", "--hf", "gpt 2")
    own = report_from(trainshort, home, "--lengths", "8")
    assert (report["data"]["words"], report["data"]["bytes"]) == (own["data"]["words"], own["data"]["bytes"])
    assert report["data"]["tokens"] == own["data"]["tokens"], "it is the same tokenizer, though nothing says so"
    for result in report["results"]:
        assert result["loss"] == pytest.approx(math.log(rows), rel=1e-5)
        bits = math.log2(rows) * report["data"]["tokens"] / report["data"]["bytes"]
        assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert (report["position"], report["train_length"], report["step"]) == ("gpt2", 24, 0)
    assert (home / "run" / "evaluation" / "hf-gpt-2" / "texts.json").is_file()


def test_other_tokenizers_and_libraries_are_other_evaluations(home: Path, trainshort: Call) -> None:
    def asked() -> dict[str, Any]:
        return report_from(trainshort, home, "--lengths", "8", "--hf", "exported")

    before = asked()
    assert before["versions"]["transformers"] == transformers.__version__
    assert set(before["versions"]) == {"trainshort", "torch", "transformers", "tokenizers", "commit"}
    (home / "exported" / "README.md").write_text("another text about the model")
    assert asked()["weights_sha256"] == before["weights_sha256"]
    tokenizer = home / "exported" / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert asked()["weights_sha256"] != before["weights_sha256"]


def _change(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def in_torchs_form(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def narrower(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": config["hidden_size"] // 2}))


def without_tokenizer(folder: Path) -> None:
    for file in (*folder.glob("tokenizer*"), folder / "export.json"):
        file.unlink()
    save_gpt2(folder, rows=600)


def save_gpt2(folder: Path, *, rows: int) -> None:
    with quiet_transformers():
        model = GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_positions=24, n_embd=8, n_layer=1, n_head=2))
        model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json: give a folder with a causal model"),
        (lambda folder: (folder / "config.json").write_text("{}"), "key in its config.json): give another"),
        (
            lambda folder: _change(folder, model_type="bloomm"),
            "does not recognize this architecture ...): give another",
        ),
        (lambda folder: _change(folder, hidden_dropout="0.1"), "Field 'hidden_dropout' with value '0.1'"),
        (lambda folder: _change(folder, vocab_size=9999), "or has them in other shapes"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no causal model that transformers "),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "has weights that cannot be read ("),
        (lambda folder: in_torchs_form(folder, b""), "has weights that cannot be read (EOFError): download it again"),
        (
            lambda folder: in_torchs_form(folder, b"\x80\x02x"),
            "has a pickle that is broken or holds more than",
        ),
        (narrower, "such as transformer.h.0.input_layernorm.bias, or has them in other shapes"),
        (without_tokenizer, "has no tokenizer (none of its files are there): copy it into the folder"),
        (
            lambda folder: save_gpt2(folder, rows=30),
            "and a model of 30: use tokenizer and weights of one model",
        ),
    ],
)
def test_a_folder_without_a_model_is_refused(home: Path, trainshort: Call, change: Any, message: str) -> None:
    change(home / "exported")
    with contextlib.chdir(home):
        answer = trainshort("evaluate", "run", "--data", "texts.jsonl", "--hf", "exported")
    assert (answer.code, answer.out) == (2, "")
    assert answer.error.startswith("error: exported ")
    assert message in answer.error
    assert len(answer.error.splitlines()) == 1


def save_opt(folder: Path, *, rows: int) -> None:
    shape = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with quiet_transformers():
        OPTForCausalLM(OPTConfig(vocab_size=rows, max_position_embeddings=24, **shape)).save_pretrained(folder)


def save_roberta(folder: Path, *, rows: int) -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=rows, max_position_embeddings=26, is_decoder=True, pad_token_id=1, **shape)
    with quiet_transformers():
        RobertaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize("save", [save_gpt2, save_opt, save_roberta])
def test_lengths_beyond_learned_positions_are_refused(home: Path, trainshort: Call, save: Any) -> None:
    save(home / "exported", rows=600)
    report_from(trainshort, home, "--lengths", "24", "--hf", "exported")
    with contextlib.chdir(home):
        answer = trainshort("evaluate", "run", "--data", "texts.jsonl", "--lengths", "8,25", "--hf", "exported")
    assert (answer.code, answer.out) == (2, "")
    assert answer.error.endswith(
        "error: the model in exported has learned positions up to 24, so it cannot take 25 tokens: use --lengths up to "
        "24\n"
    )
