"""Benchmarks that read checkpoints: the bias rounded as transformers' Bloom does, perplexity against training time."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import headline
from benchmarks.rounding import WAYS, RoundedAttention, main, perplexity, tokens_of_text
from tests.support.data import write_book
from training.checkpoint.read import open_checkpoint
from training.export.run import export_checkpoint
from training.model.single import load_single

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
LENGTH = 512
SHARPER = 4  # weights are so many times as large, or attention is so even that nothing changes it


def test_each_way_is_what_it_says(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shutil.copytree(OLD_RUN, tmp_path / "run"))  # an export adds to its certificates
    model = load_single(checkpoint)
    model.change_weights(lambda weight, _: SHARPER * weight)
    tokens = torch.randint(0, checkpoint.vocab_size, (LENGTH + 1,), generator=torch.Generator().manual_seed(1))
    ours = model.losses(tokens[None]).double().mean().exp().item()
    measured = {}
    for name in WAYS:
        for block in model.blocks:
            block.attend = RoundedAttention(block.attend.bias, WAYS[name])
        measured[name] = perplexity(model, tokens, length=LENGTH)
    assert measured["relative"] == pytest.approx(ours, rel=1e-6)
    export_checkpoint(checkpoint.path, format="hf", out=tmp_path / "export")
    bloom = _bloom(tmp_path / "export")
    theirs = bloom(tokens[None], labels=tokens[None]).loss.double().exp().item()
    assert theirs == pytest.approx(measured["key-bf16"], rel=1e-6)
    assert abs(measured["key-bf16"] / ours - 1) > 1e-4  # it does round
    assert abs(measured["relative-bf16"] / ours - 1) < abs(measured["key-bf16"] / ours - 1)
    assert measured["key-bf16-scores"] != measured["key-bf16"]


@torch.no_grad()
def _bloom(folder: Path) -> Any:
    """Return transformers' Bloom in fp32, as much sharper, whose blocks get the bias as it would be in bf16."""
    bloom = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def round_bias(_: Any, inputs: Any, named: dict[str, Any]) -> Any:
        return inputs, {**named, "alibi": named["alibi"].bfloat16().float()}

    for weight in bloom.parameters():
        weight.mul_(SHARPER)
    for block in bloom.transformer.h:
        block.register_forward_pre_hook(round_bias, with_kwargs=True)
    return bloom


def test_a_line_for_each_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_book(tmp_path)
    (text,) = tmp_path.glob("*.txt")
    main([str(OLD_RUN), "--data", str(text), "--lengths", "16", "64", "--tokens", "200"])
    short, long = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (short["length"], short["tokens"], long["length"], long["tokens"]) == (16, 192, 64, 192)
    assert set(long["perplexity"]) == set(WAYS)
    assert long["change"]["relative"] == "+0.000%"


def test_the_headline_has_a_point_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_book(tmp_path)
    (text,) = tmp_path.glob("*.txt")
    picture = tmp_path / "picture.png"
    headline.main([str(OLD_RUN), "--data", str(text), "--length", "64", "--tokens", "200", "--picture", str(picture)])
    row = json.loads(capsys.readouterr().out)
    steps = [json.loads(line) for line in (OLD_RUN / "metrics.jsonl").read_text().splitlines()]
    assert row["seconds"] == [round(steps[0]["step_seconds"] + steps[1]["step_seconds"], 1)]
    checkpoint = open_checkpoint(OLD_RUN)
    tokens = tokens_of_text(checkpoint, text)[:193]
    losses = [load_single(checkpoint).losses(tokens[None, at : at + 65]) for at in (0, 64, 128)]
    assert row["perplexity"] == [pytest.approx(float(torch.cat(losses).double().mean().exp()), abs=1e-3)]
    assert picture.read_bytes().startswith(b"\x89PNG")
