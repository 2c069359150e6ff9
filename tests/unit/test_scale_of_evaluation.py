"""`--scale` of evaluate, retrieval and generate: what it refuses, and that its results stay apart from the others."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import InputError
from tests.support.command_line import Call, refused
from tests.support.compared_runs import make_run
from tests.support.evaluation import UniformModel, evaluate, uniform_run
from training.api import load
from training.evaluation.results import protocol_name
from training.evaluation.usable import find_held_out_report, usable_length

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"  # ALiBi, trained at 8 tokens


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is what takes time."""

    def draw(_: object, path: Path) -> Path:
        path.write_text("a plot")
        return path

    monkeypatch.setattr("training.evaluation.folder.draw_plot", draw)
    monkeypatch.setattr("training.retrieval.report.draw_retrieval", draw)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the old run as `run` and a text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD_RUN, "run")
    Path("book.txt").write_text("Once upon a time there was a small text with a number of words. " * 60)
    return tmp_path


def test_what_cannot_be_scaled_is_refused_in_one_line(folder: Path, trainshort: Call) -> None:
    known = "is not known: use linear or ntk or yarn, with a factor as in linear:4 or without"
    refusals = {
        "linaer": f"scale 'linaer' {known}",
        "4": f"scale '4' {known}",
        "ntk:": "scale 'ntk:' must have a factor from 1 to 1,000,000: use ntk:4",
        "yarn": "scale yarn is for rotary positions, and this model has alibi: use linear or ntk",
    }
    for number in ("0.5", "0", "-2", "inf", "nan", "1e3", "2000000", "4x"):
        refusals[f"linear:{number}"] = f"scale 'linear:{number}' must have a factor from 1 to 1,000,000: use linear:4"
    for scale, message in refusals.items():
        assert refused(trainshort, "evaluate", "run", "--data", "book.txt", "--scale", scale) == message
    for command in (("retrieval", "--data", "book.txt"), ("generate", "--prompt", "x")):
        for scale in ("linaer", "yarn", "linear:0.5"):
            message = refused(trainshort, command[0], "run", *command[1:], "--scale", scale)
            assert message == refusals[scale]
    message = refused(trainshort, "generate", "run", "--prompt", "x", "--scale", "ntk")
    assert message == "scale 'ntk' follows the length, which grows as text is generated: give a factor, as in ntk:4"
    with pytest.raises(InputError, match="scale 'linear' follows the length"):
        load("run", scale="linear")
    for options, message in (
        (("--hf", "run"), "--scale ntk is for a checkpoint's positions, and --hf measures another model: drop one"),
        (("--context",), "--context measures positions as trained, and --scale ntk changes them: drop one of them,"),
    ):
        assert refused(trainshort, "evaluate", "run", "--scale", "ntk", *options).startswith(message)


def test_a_model_without_rates_to_scale_is_refused(folder: Path, trainshort: Call) -> None:
    def message_of(scale: str, **model: Any) -> str:
        name = "-".join(map(str, model.values()))
        make_run(Path(name), model=model)
        return refused(trainshort, "evaluate", name, "--data", "book.txt", "--scale", scale)

    for position in ("sinusoidal", "t5", "none"):
        assert message_of("linear:2", position=position) == (
            f"scale linear is for alibi or rotary positions, and this model has {position}: leave --scale out"
        )
    one = "and this model has one: use linear"
    assert message_of("ntk", heads=1, position="alibi") == f"scale ntk needs more than one head, {one}"
    narrow = message_of("yarn", hidden=32, heads=16, position="rotary")
    assert narrow == f"scale yarn needs more than one pair of dimensions in a head, {one}"


def test_scaled_results_stand_beside_the_others(folder: Path, trainshort: Call) -> None:
    options = ("--data", "book.txt", "--lengths", "8,32")
    for more in ((), ("--scale", "linear"), ("--scale", "linear:4"), ("--scale", "ntk:4.0")):
        answer = trainshort("evaluate", "run", *options, *more)
        assert answer.code == 0, answer
    assert "2/2  nonoverlapping ntk:4 at 32: loss " in answer.error
    assert "nonoverlapping ntk:4" in answer.out
    assert "usable length with --scale ntk:4: " in answer.out
    (kept,) = Path("run/evaluation/step_0000002").glob("book.json")
    report = json.loads(kept.read_text())
    losses = {(protocol_name(each), each["length"]): each["loss"] for each in report["results"]}
    assert [*losses] == [
        (f"nonoverlapping{scale}", length) for scale in ("", " linear", " linear:4", " ntk:4") for length in (8, 32)
    ]
    assert losses["nonoverlapping linear", 8] == losses["nonoverlapping", 8]  # the factor is 1
    assert losses["nonoverlapping linear", 32] == losses["nonoverlapping linear:4", 32]
    assert len(set(losses.values())) == 6
    factors = [each.get("scale_factor") for each in report["results"]]
    assert factors == [None, None, 1.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    assert "| 4 | nonoverlapping linear:4 |" in kept.with_suffix(".md").read_text()
    assert [each["scale"] for each in report["verdict"]["scaled"]] == ["linear", "linear:4", "ntk:4"]
    again = trainshort("evaluate", "run", *options, "--scale", "ntk:4", "--json")
    assert [each["loss"] for each in json.loads(again.out)["results"]] == [*losses.values()][-2:]
    assert len(json.loads(kept.read_text())["results"]) == 8, "it replaces those of its scale"


class Worse(UniformModel):
    """A model whose loss grows with the length beyond the training length of 32, unless it is scaled."""

    def __init__(self, scale: object) -> None:
        self._scale = scale

    def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
        length = tokens.shape[1] - 1
        extra = 0.0 if self._scale is not None else max(0.0, np.log2(length / 32))
        return super().losses(tokens, last=last) + float(extra) - (0.5 if self._scale is not None else 0.0)


def test_a_usable_length_is_never_a_scaled_one(
    tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = uniform_run(tmp_path / "one", run_values, monkeypatch)
    monkeypatch.setattr("training.evaluation.run.load_single", lambda *_, scale, **__: Worse(scale))
    options: dict[str, Any] = {"lengths": (32, 64, 128), "protocols": ("nonoverlapping",)}
    scaled = evaluate(run_dir, **options, scale="linear")
    assert scaled["verdict"]["usable_length"] is None
    (beyond,) = scaled["verdict"]["scaled"]
    assert (beyond["scale"], beyond["usable_length"], beyond["usable_length_interval"]) == ("linear", 128, [128, 128])
    assert "without --scale" in scaled["verdict"]["not_tested"][0]
    (run_dir / "checkpoints" / "step_0000007").mkdir()
    checkpoint, sha256 = run_dir / "checkpoints" / "step_0000007", scaled["weights_sha256"]
    assert find_held_out_report(checkpoint, step=7, sha256=sha256) is None
    evaluate(run_dir, **options)
    known = find_held_out_report(checkpoint, step=7, sha256=sha256)
    assert known is not None
    assert usable_length(known.contents) == 32, "and so an export's longest text"
    verdict = known.contents["verdict"]
    assert (verdict["usable_length"], verdict["scaled"][0]["usable_length"]) == (32, 128)
    assert [words.split(":")[0] for words in verdict["words"]] == [
        "usable length",
        "usable length with --scale linear",
    ]


def test_an_interrupted_scale_does_not_go_on_as_another(
    tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = uniform_run(tmp_path / "one", run_values, monkeypatch)
    caplog.set_level("INFO")

    class Stopped(UniformModel):
        def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
            if tokens.shape[1] > 100:
                raise KeyboardInterrupt
            return super().losses(tokens, last=last)

    options: dict[str, Any] = {"lengths": (64, 128), "protocols": ("nonoverlapping",)}
    with monkeypatch.context() as patch:
        patch.setattr("training.evaluation.run.load_single", lambda *_, **__: Stopped())
        with pytest.raises(KeyboardInterrupt):
            evaluate(run_dir, **options, scale="linear")
    for scale in (None, "ntk", "linear:2"):
        evaluate(run_dir, **options, scale=scale)
    assert "going on with an interrupted evaluation" not in caplog.text
    evaluate(run_dir, **options, scale="linear")
    assert "going on with an interrupted evaluation" in caplog.text


def test_retrieval_with_a_scale_has_files_of_its_own(folder: Path, trainshort: Call) -> None:
    Path("long.txt").write_text((Path("book.txt").read_text() + "More words follow here, and more.\n") * 8)
    options = ("--data", "long.txt", "--lengths", "320,400", "--depths", "2", "--samples", "1", "--tasks", "single")
    for more in ((), ("--scale", "linear"), ("--scale", "linear:50")):
        answer = trainshort("retrieval", "run", *options, *more)
        assert answer.code == 0, answer
    assert answer.out.startswith("run/checkpoints/step_0000002, trained at 8 tokens, positions scaled by linear:50\n")
    files = sorted(Path("run/evaluation/step_0000002/retrieval").glob("*.json"))
    reports = {json.loads(file.read_text()).get("scale"): file for file in files}
    assert set(reports) == {None, "linear", "linear:50"}
    assert reports["linear:50"].stem.endswith("-linear-50")
    assert "trained at 8 tokens, `--scale linear:50`" in reports["linear:50"].with_suffix(".md").read_text()
    cells = {
        scale: {cell["length"]: cell["log_probability"] for cell in json.loads(file.read_text())["results"]}
        for scale, file in reports.items()
    }
    assert cells["linear"][400] == cells["linear:50"][400] != cells[None][400]
    assert cells["linear"][320] != cells["linear:50"][320]


def test_generate_takes_a_factor(folder: Path, trainshort: Call) -> None:
    options = ("--prompt", "Once upon", "--greedy", "--tokens", "6")
    answer = trainshort("generate", "run", *options, "--scale", "linear:8")
    assert answer.code == 0, answer
    assert answer.out == f"{load('run', scale='linear:8').generate('Once upon', tokens=6, temperature=0)}\n"
