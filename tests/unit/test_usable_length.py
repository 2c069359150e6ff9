"""The usable length: which report it comes from, what it says, and that an export holds it."""

import contextlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.command_line import Call
from tests.support.edited_manifest import edit_manifest
from training.checkpoint.disk import describe_file
from training.checkpoint.manifest import model_sha256, read_manifest
from training.evaluation.usable import find_held_out_report, usable_length
from training.evaluation.verdict import verdict_of

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
NAME = "step_0000002"
TRAIN_LENGTH = 8


def report_of(perplexities: dict[int, float], **changed: Any) -> dict[str, Any]:
    """Return a report of version 0.1.0 of the fixture's checkpoint."""
    results = [
        {"length": length, "protocol": "nonoverlapping", "stride": length, "loss": 5.0, "perplexity": perplexity}
        for length, perplexity in perplexities.items()
    ]
    report = {
        "checkpoint": f"elsewhere/checkpoints/{NAME}",
        "step": 2,
        "train_length": TRAIN_LENGTH,
        "data": {"name": "held-out", "tokens": 900},
        "results": results,
    }
    return report | changed


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    shutil.copytree(OLD_RUN, tmp_path / "run")
    return tmp_path / "run"


def write(report: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report), encoding="utf-8")
    return path


def found_in(run_dir: Path) -> Path | None:
    checkpoint = run_dir / "checkpoints" / NAME
    manifest = read_manifest(checkpoint)
    report = find_held_out_report(checkpoint, step=manifest.step, sha256=model_sha256(manifest))
    return report and report.path


@pytest.mark.parametrize(
    ("perplexities", "usable"),
    [
        ({8: 100.0, 16: 90.0, 32: 90.9, 64: 91.0}, 32),
        ({64: 89.0, 8: 100.0, 16: 90.0}, 64),
        ({8: 100.0, 16: 102.0, 32: 100.5}, 32),
        ({8: 100.0, 16: 102.0}, 8),
        ({4: 50.0, 8: 100.0}, 8),
        ({2: 50.0}, 8),
    ],
)
def test_usable_is_within_a_percent_of_the_best(perplexities: dict[int, float], usable: int) -> None:
    assert usable_length(report_of(perplexities)) == usable


@pytest.mark.parametrize(
    ("perplexities", "words"),
    [
        ({8: 100.0}, "8 tokens, within 1 % of the best perplexity, 100.00 at 8; the training length"),
        (
            {8: 100.0, 16: 99.0},
            "16 tokens, within 1 % of the best perplexity, 99.00 at 16; no longer text was measured",
        ),
        (
            {8: 100.0, 16: 102.0},
            "8 tokens, within 1 % of the best perplexity, 100.00 at 8; at 16 perplexity is 2.0% above the best",
        ),
        (
            {2: 50.0, 4: 60.0},
            "8 tokens, the training length: no measured length from it on is within 1 % of the best perplexity, "
            "50.00 at 2",
        ),
        (
            {4: 50.0, 8: 100.0, 16: 90.0},
            "8 tokens, the training length: no measured length from it on is within 1 % of the best perplexity, "
            "50.00 at 4; at 16 perplexity is 80.0% above the best",
        ),
    ],
)
def test_the_verdict_claims_a_percent_only_where_it_holds(perplexities: dict[int, float], words: str) -> None:
    assert verdict_of(report_of(perplexities))["words"] == [f"usable length: {words}"]


def test_sliding_windows_do_not_count() -> None:
    report = report_of({8: 100.0, 16: 120.0})
    report["results"][1] |= {"protocol": "sliding", "stride": 4, "perplexity": 10.0}
    assert usable_length(report) == TRAIN_LENGTH


def test_a_report_is_found_where_any_version_wrote_it(run_dir: Path) -> None:
    assert found_in(run_dir) is None
    evaluation = run_dir / "evaluation"
    for path in (evaluation / "report.json", evaluation / NAME / "report.json", evaluation / NAME / "held-out.json"):
        assert found_in(run_dir) != path
        write(report_of({8: 1.0}), path)
        assert found_in(run_dir) == path


def test_a_report_of_other_weights_or_text_is_not_used(run_dir: Path) -> None:
    path = run_dir / "evaluation" / "report.json"
    good = report_of({8: 1.0})
    for wrong in (
        {"checkpoint": "run/checkpoints/step_0000001"},
        {"step": 1},
        {"data": {"name": "book.txt"}},
        {"text_path": "/a/held-out"},
        {"weights_sha256": "0" * 64},
        {"documents_sha256": "0" * 64},
        {"results": [{**good["results"][0], "protocol": "sliding"}]},
        {"results": []},
        {"results": [{"length": 8}]},
        {"data": None},
    ):
        write(good | wrong, path)
        assert found_in(run_dir) is None, wrong
    for broken in (b"", b"{", b"[]", b"\xff"):
        path.write_bytes(broken)
        assert found_in(run_dir) is None, broken
    manifest = read_manifest(run_dir / "checkpoints" / NAME)
    write(good | {"step": 1, "weights_sha256": model_sha256(manifest)}, path)
    assert found_in(run_dir) == path
    write(good, path)
    assert found_in(run_dir) == path
    os.utime(path, (0, 0))  # older than the checkpoint: the run was trained again in its folder
    assert found_in(run_dir) is None


def test_links_lead_to_the_run_folder(trainshort: Call, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir.parent)
    for folder in ("disk", "links"):
        Path(folder).mkdir()
    Path("run/checkpoints").rename("disk/saved")  # as where the run folder's disk is small
    Path("run/checkpoints").symlink_to(Path("disk/saved").absolute())
    Path("links/best").symlink_to(Path("run/checkpoints", NAME).absolute())
    Path("book.txt").write_text("A text of some words. " * 9)
    for name in ("links/best", f"run/checkpoints/{NAME}"):
        assert trainshort("evaluate", name, "--data", "book.txt", "--lengths", "8").code == 0
        assert Path("run/evaluation", NAME, "book.json").is_file(), name
        report = write(report_of({8: 1.0}), run_dir / "evaluation" / NAME / "held-out.json")
        assert found_in(run_dir) == report, "for an export"
        (run,) = json.loads(trainshort("compare", name, "--json").out)["runs"]
        assert run["evaluation"]["text"] == "held-out"
        shutil.rmtree("run/evaluation")


def exported(trainshort: Call, run_dir: Path, out: str) -> tuple[list[str], dict[str, Any], str]:
    """Export the run; return the lines of the output, config.json and the model card."""
    with contextlib.chdir(run_dir.parent):
        answer = trainshort("export", "run", "--format", "hf", "--out", out)
    assert (answer.code, answer.error) == (0, "")
    folder = run_dir.parent / out
    card = (folder / "README.md").read_text(encoding="utf-8")
    return answer.out.splitlines(), json.loads((folder / "config.json").read_text()), card


def test_an_export_allows_what_was_measured(trainshort: Call, run_dir: Path) -> None:
    verdict = {"usable_length": 32, "effective_context": 24}
    report = report_of({8: 100.0, 16: 90.0, 32: 90.1, 64: 95.0}, verdict=verdict)
    write(report, run_dir / "evaluation" / NAME / "report.json")
    lines, config, card = exported(trainshort, run_dir, "out")
    first, longest, last = lines
    assert first.startswith("exported out: at lengths 8 and 32 logits differ by ")
    assert longest == "longest text: 32 tokens, the longest whose perplexity on held-out text is within 1 % of the best"
    assert last == "exported: out"
    assert (config["seq_length"], config["train_length"]) == (32, TRAIN_LENGTH)
    assert "Longest text: 32 tokens, the longest whose perplexity" in card
    assert "| 64 | 8 | 5.0000 | 95.00 |" in card
    assert "On 900 tokens of held-out text" in card
    folder, said = run_dir.parent / "out", "Effective context: 24 tokens; with no more context, perplexity"
    assert said in card
    assert said in (folder / "EXPORT.md").read_text()
    assert json.loads((folder / "export.json").read_text())["lengths"]["effective_context"] == 24


def test_an_export_without_a_report_says_what_to_do(trainshort: Call, run_dir: Path) -> None:
    lines, config, card = exported(trainshort, run_dir, "two words")
    assert lines[1:] == [
        "longest text: 8 tokens, the training length: its perplexity by length was not measured; "
        "run `trainshort evaluate run` and export again",
        "exported: two words",
    ]
    assert config["seq_length"] == TRAIN_LENGTH
    assert "Not measured: run `trainshort evaluate` and export again." in card


def test_an_export_says_why_not_longer(trainshort: Call, run_dir: Path) -> None:
    for name, perplexities, why in (
        ("a", {8: 100.0, 16: 110.0}, "no longer text is within 1 % of the best perplexity"),
        ("b", {8: 100.0}, "no longer text was measured"),
    ):
        write(report_of(perplexities), run_dir / "evaluation" / NAME / "held-out.json")
        lines, config, _ = exported(trainshort, run_dir, name)
        assert lines[1] == f"longest text: 8 tokens, the training length: {why}"
        assert config["seq_length"] == TRAIN_LENGTH


def test_no_length_with_masked_documents_is_an_exports(trainshort: Call, run_dir: Path) -> None:
    folder = run_dir / "checkpoints" / NAME
    run_file = folder / "config.yaml"
    run_file.write_text(run_file.read_text().replace("mask_documents: false", "mask_documents: true"))
    entry = asdict(describe_file(run_file))
    edit_manifest(folder, lambda manifest: manifest["files"].update({run_file.name: entry}))
    found = {"weights_sha256": model_sha256(read_manifest(folder)), "documents_sha256": "0" * 64}
    write(report_of({8: 100.0, 32: 90.0}, **found), run_dir / "evaluation" / NAME / "held-out.json")
    lines, config, card = exported(trainshort, run_dir, "out")
    why = "its perplexity by length is measured with masked documents, and an export masks none"
    assert lines[1] == f"longest text: 8 tokens, the training length: {why}"
    assert config["seq_length"] == TRAIN_LENGTH
    assert f"Not measured: {why}." in card


def test_the_card_tells_how_the_model_was_trained(
    trainshort: Call, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, card = exported(trainshort, run_dir, "out")
    _, front, body = card.split("---\n", maxsplit=2)
    assert yaml.safe_load(front) == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alibi", "bloom", "trainshort"],
    }
    for row in (
        "| shape | 2 layers, hidden 8, 2 heads, feed-forward 32 |",
        "| positions | alibi |",
        "| trained on | 64 tokens: 2 steps of 4 sequences |",
        "| data | `book.txt` |",
        "| precision | fp32; the weights here are fp32 |",
    ):
        assert row in body
    assert "vllm serve . --served-model-name demo\n" in body
    # what it tells to type works in its folder
    (code,) = [part.partition("```")[0] for part in body.split("```python\n")[1:]]
    monkeypatch.chdir(run_dir.parent / "out")
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Once")
    tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
    assert model.config.vocab_size == len(tokenizer)
    assert set(tokenizer("Once")) == {"input_ids", "attention_mask"}
