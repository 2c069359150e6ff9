"""Models of Hugging Face become checkpoints, bit for bit, and go out again; what does not fit is refused by name."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import InputError, MachineError
from data_pipeline.vocabulary import read_vocabulary
from launch.show.model import show_export
from tests.support.byte_level import train_byte_level
from tests.support.exports import train_sentencepiece
from tests.support.huggingface_models import ROWS, save_random
from training.checkpoint.read import open_checkpoint
from training.checkpoint.tensors import TensorFile
from training.export.import_hf import import_model
from training.export.run import export_checkpoint
from training.folder import with_fixed_keys
from training.preflight import newest_to_resume, require_learning

KINDS = ("bloom", "bloom-untied", "mpt", "mpt-untied", "mpt-steep")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = train_sentencepiece(tmp_path_factory.mktemp("tokenizer"))
    assert len(read_vocabulary(file)) <= ROWS
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_in_and_goes_out_bit_for_bit(
    tmp_path: Path, tokenizer: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_random(tmp_path / "hf", kind, tokenizer=tokenizer, shards="40KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    result = import_model(source, out=tmp_path / "run")
    assert result.difference < 1e-4 < result.scale
    assert result.checkpoint == tmp_path / "run/checkpoints/step_0000000"
    opened = open_checkpoint(tmp_path / "run")
    assert (opened.step, opened.vocab_size, opened.config.data.sequence_length) == (0, ROWS, 32)
    with pytest.raises(InputError, match=r"weights without optimizer state, .* with train\.init_from: "):
        newest_to_resume(with_fixed_keys(opened.config, run_dir=opened.run_dir), run_dir=opened.run_dir)
    require_learning(opened.config.train, trained=0)  # which a start asks next
    assert opened.config.model.tie_embeddings is ("untied" not in kind)
    if "steep" in kind:  # transformers' class computes with 8 whatever the key says, so nothing goes out to it
        assert opened.config.model.alibi_bias_max == 5
        return
    exported = export_checkpoint(tmp_path / "run", format="hf", out=tmp_path / "out")
    why = "its perplexity by length was not measured, as an imported model has no held-out text"
    assert exported.facts.reason == f"the training length: {why}"
    show_export(exported, checkpoint=tmp_path / "run")
    assert f"{why}\n" in capsys.readouterr().out, "no command to measure it"
    assert f"Not measured: {why}." in (tmp_path / "out" / "README.md").read_text()
    before = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = load_file(tmp_path / "out/model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    import_model(tmp_path / "out", out=tmp_path / "again")
    first, second = (opened.weights(), open_checkpoint(tmp_path / "again").weights())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_files_of_weights_are_read(tmp_path: Path, tokenizer: Path) -> None:
    source = save_random(tmp_path / "hf", "bloom", tokenizer=tokenizer)
    weights = load_file(source / "model.safetensors")
    import_model(source, out=tmp_path / "run")
    # as older versions of transformers wrote them: names without a prefix, the tied weight twice, a pickle
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    old["lm_head.weight"] = old["word_embeddings.weight"]
    (source / "model.safetensors").unlink()
    torch.save(old, source / "pytorch_model.bin")
    import_model(source, out=tmp_path / "old")
    first, second = (open_checkpoint(tmp_path / name).weights() for name in ("run", "old"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    old["lm_head.weight"] = old["lm_head.weight"] + 1.0
    torch.save(old, source / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"has a tensor lm_head\.weight, for which BLOOM has no place"):
        import_model(source, out=tmp_path / "other")
    (source / "pytorch_model.bin").unlink()
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halves, source / "model.safetensors", metadata={"format": "pt"})
    import_model(source, out=tmp_path / "halves")
    rounded = open_checkpoint(tmp_path / "halves").weights()
    assert all(torch.equal(rounded[name], first[name].bfloat16().float()) for name in first)


def change_config(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return changed


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": partial(print, "run")}, folder / "pytorch_model.bin")


def few_rows(folder: Path) -> None:
    change_config(vocab_size=200)(folder)
    train_byte_level(folder)
    (folder / "tokenizer.model").unlink()
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = dict(list(document["model"]["vocab"].items())[:100])
    document["model"] |= {"vocab": vocabulary, "merges": []}
    document["added_tokens"] = document["added_tokens"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    change_config(eos_token_id=0)(folder)


NORM = "transformer.blocks.1.norm_2.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a truncated file": (truncate, r"model\.safetensors cannot be read .*: download it again"),
    "a pickle with code": (only_a_pickle, r"pytorch_model\.bin is a pickle that holds more than tensors"),
    "a missing tensor": (change_weights(lambda w: w.__delitem__(NORM)), f"has no tensor {NORM}"),
    "an extra tensor": (
        change_weights(lambda w: w.update({"transformer.wpe.weight": torch.zeros(2)})),
        r"has a tensor transformer\.wpe\.weight, for which MPT has no place",
    ),
    "a misshapen tensor": (
        change_weights(lambda w: w.update({NORM: torch.zeros(47)})),
        r"has transformer\.blocks\.1\.norm_2\.weight as \[47\], its config\.json implies \[48\]",
    ),
    "whole numbers": (
        change_weights(lambda w: w.update({NORM: torch.zeros(48, dtype=torch.int8)})),
        r"norm_2\.weight in int8",
    ),
    "another architecture": (change_config(model_type="llama"), r"a model of type 'llama': only bloom, mpt, jais"),
    "clipped queries": (
        change_config(attn_config={"clip_qkv": 6.0}),
        r"MPT with attn_config\.clip_qkv 6\.0 \(only null\): it cannot be represented exactly",
    ),
    "learned positions": (change_config(attn_config={"alibi": False}), r"attn_config\.alibi false \(only true\)"),
    "another epsilon": (change_config(layer_norm_epsilon=1e-6), r"layer_norm_epsilon 1e-06 \(only 1e-05\)"),
    "heads that do not divide": (
        change_config(n_heads=7),
        r"describes no model that can run: model\.heads must divide",
    ),
    "few rows": (few_rows, r"cannot be a run: data\.vocab_size 200: Input should be greater than or equal to 300"),
    "rows in words": (
        change_config(vocab_size="405"),
        r"does not describe a model \(vocab_size '405' is not a whole number",
    ),
    "an odd end token": (
        change_config(eos_token_id=2.0),
        r"not describe a model \(eos_token_id 2\.0 is not a whole",
    ),
    "two architectures": (change_config(model_type=["mpt"]), r"a model of type \['mpt'\]: only bloom, mpt, jais"),
    "another number's type": (
        change_config(n_layers="2"),
        r"does not describe a model \(model\.layers '2': Input should be a valid integer\)",
    ),
    "what transformers refuses": (
        change_config(expansion_ratio=4.0),
        r"holds no causal model that transformers .* 'expansion_ratio' expected int, got float",
    ),
    "two widths": (change_config(hidden_size=96), r"has weights that cannot be read "),
    "odd attention": (change_config(attn_config="alibi"), r"does not describe a model"),
    "no shape": (change_config(n_layers=None), r"does not describe a model"),
    "another end token": (change_config(eos_token_id=5), r"ends a document with token 2, config\.json says .* 5"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.touch()), r"^HF_DIR .*/hf is a file: give a folder with"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), r"does not hold a JSON object"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), r"tokenizer"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights: it needs"),
}


@pytest.fixture(scope="module")
def mpt_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return save_random(tmp_path_factory.mktemp("mpt") / "hf", "mpt", tokenizer=tokenizer)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_left(tmp_path: Path, mpt_folder: Path, name: str) -> None:
    break_it, message = REFUSED[name]
    source = tmp_path / "hf"
    shutil.copytree(mpt_folder, source)
    break_it(source)
    with pytest.raises(InputError, match=message) as refused:
        import_model(source, out=tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_broken_shards_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    source = save_random(tmp_path / "hf", "bloom", tokenizer=tokenizer, shards="40KB")
    last = sorted(source.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(InputError, match=f"lacks {last.name}, which its index names"):
        import_model(source, out=tmp_path / "run")
    save_file({"lm_head.bias": torch.zeros(2)}, last)
    with pytest.raises(InputError, match="and its index differ in"):
        import_model(source, out=tmp_path / "run")
    last.write_bytes(content)
    (source / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index\.json cannot be read"):
        import_model(source, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_length_that_is_nowhere_must_be_given(tmp_path: Path, tokenizer: Path) -> None:
    source = save_random(tmp_path / "hf", "bloom", tokenizer=tokenizer)
    change_config(seq_length=None)(source)
    with pytest.raises(InputError, match="does not say at which length the model was trained: give --length"):
        import_model(source, out=tmp_path / "run")
    import_model(source, out=tmp_path / "run", train_length=24)
    assert open_checkpoint(tmp_path / "run").config.data.sequence_length == 24
    with pytest.raises(InputError, match="has files in it"):
        import_model(source, out=tmp_path / "run", train_length=24)


def test_a_length_may_exceed_what_transformers_takes(tmp_path: Path, mpt_folder: Path) -> None:
    change = change_config(eos_token_id=[])
    shutil.copytree(mpt_folder, tmp_path / "hf")
    change(tmp_path / "hf")  # it names no end token then
    assert json.loads((mpt_folder / "config.json").read_text())["max_seq_len"] < 80
    result = import_model(tmp_path / "hf", out=tmp_path / "run", train_length=80)
    assert result.length == 80
    assert result.difference < 1e-4 < result.scale


@pytest.mark.parametrize("bloom", [True, False])
def test_a_model_keeps_its_own_tokenizer_json(tmp_path: Path, tokenizer: Path, bloom: bool) -> None:
    source = save_random(tmp_path / "hf", "bloom" if bloom else "mpt", tokenizer=tokenizer)
    (source / "tokenizer.model").unlink()
    train_byte_level(source, bloom=bloom, end="</s>" if bloom else "<|endoftext|>")
    change_config(eos_token_id=0)(source)
    import_model(source, out=tmp_path / "run")
    opened = open_checkpoint(tmp_path / "run")
    assert opened.tokenizer.read_bytes() == (source / "tokenizer.json").read_bytes()
    export_checkpoint(tmp_path / "run", format="hf", out=tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    with pytest.raises(InputError, match=r"tokenizer\.json.*hf"):
        export_checkpoint(tmp_path / "run", format="gguf", out=tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, mpt_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(TensorFile, "finish", full)
        with pytest.raises(MachineError, match=r"cannot be written .*No space left .*: nothing was imported"):
            import_model(mpt_folder, out=tmp_path / "deep" / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(MachineError, match=r"has 1\.?0* kB free, 300 kB are needed"):
        import_model(mpt_folder, out=tmp_path / "deep" / "run")
    assert not list(tmp_path.iterdir())
