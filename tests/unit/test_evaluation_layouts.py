"""On which ranks `evaluate` runs: what is refused before one is started."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.load import check_run, dump_run, load_run
from launch import local
from tests.support.command_line import Call
from tests.support.house.source import HOUSE
from training.checkpoint.disk import describe_file
from training.checkpoint.manifest import read_manifest, write_manifest
from training.evaluation.precheck import check_ranks, chosen_splits, evaluation_layout
from training.evaluation.request import EvaluationRequest, options_of_run

REFUSED = {
    ("--pipeline", "3"): "--pipeline must be at most model.layers (2), got 3: use 2 stages or fewer",
    ("--tensor", "3", "--pipeline", "3"): (
        "--tensor must divide model.heads (2), got 3: use 1 or 2; "
        "--tensor must divide model.feed_forward (32), got 3: use 1, 2, 4, 8, 16 or 32; "
        "--pipeline must be at most model.layers (2), got 3: use 2 stages or fewer"
    ),
    ("--tensor", "0"): "--tensor must be a whole number from 1 to 999999999, got '0': write --tensor 4",
    ("--tensor", "2", "--hf", "model"): (
        "--hf measures in one process, so it does not go with --tensor 2 --pipeline 1: use --tensor 1 --pipeline 1"
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a run, a text and a folder that may hold a model of Hugging Face."""
    shutil.copytree(HOUSE / "tests" / "fixtures" / "run_of_0.1.0", tmp_path / "run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("some words")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_a_layout_that_does_not_fit_is_one_line(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = ("evaluate", "run", "--data", "text.txt")
    for options, words in REFUSED.items():
        answer = trainshort(*evaluate, *options)
        assert (answer.code, answer.error) == (2, f"error: {words}\n")
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    answer = trainshort(*evaluate)
    assert (answer.code, answer.error) == (
        2,
        "error: evaluate runs on --tensor x --pipeline ranks (1 x 1 = 1), but 4 were started: start 1, or change "
        "--tensor and --pipeline\n",
    )


def test_ranks_are_one_for_each_gpu(folder: Path) -> None:
    request = EvaluationRequest(tensor=2, pipeline=2)
    assert evaluation_layout(request).world_size == 4
    for gpus in (0, 4, 8):
        check_ranks(folder / "run", request, started=None, gpus=gpus)
    check_ranks(folder / "run", request, started=4, gpus=1)  # each sees one of its own
    with pytest.raises(InputError) as refused:
        check_ranks(folder / "run", request, started=None, gpus=2)
    assert str(refused.value) == (
        "--tensor 2 --pipeline 2 needs 4 GPUs, and this machine has 2: lower one of them, or set "
        'CUDA_VISIBLE_DEVICES="" for CPU ranks'
    )


def test_the_run_file_says_on_which_ranks(folder: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the checkpoint's; each option counts before it. Another model's size is no matter of the run."""
    assert chosen_splits(folder / "run", tensor=None, pipeline=None, hf=None) == (1, 1), "a file without the keys"
    (checkpoint,) = folder.glob("run/checkpoints/*")
    manifest, file = read_manifest(checkpoint), checkpoint / "config.yaml"
    config = load_run(str(file), overrides=["evaluate.tensor=2", "evaluate.pipeline=2"])
    file.write_text(dump_run(config))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, replace(manifest, files={**manifest.files, file.name: describe_file(file)}))
    given: dict[str, Any] = {"tensor": None, "pipeline": None, "hf": None}
    asked = (given, {**given, "tensor": 1}, {**given, "pipeline": 1}, {**given, "hf": folder / "model"})
    assert [chosen_splits(folder / "run", **each) for each in asked] == [(2, 2), (1, 2), (2, 1), (1, 1)]
    started: list[int] = []
    monkeypatch.setattr(local, "start_ranks", lambda command, ranks, **_: started.append(ranks) or 0)
    assert trainshort("evaluate", "run", "--data", "text.txt").code == 0
    assert started == [4]
    of_run = "--tensor 2 --pipeline 2 (evaluate.tensor and evaluate.pipeline of the run)"
    answer = trainshort("evaluate", "run", "--data", "text.txt", "--scale", "linear:2")
    assert (answer.code, answer.error) == (
        2,
        f"error: --scale measures in one process, so it does not go with {of_run}: use --tensor 1 --pipeline 1\n",
    )
    with pytest.raises(InputError, match=rf"^{re.escape(of_run)} needs 4 GPUs, and this machine has 1: lower one"):
        check_ranks(folder / "run", EvaluationRequest(tensor=2, pipeline=2), started=None, gpus=1)


def test_a_chain_and_a_study_say_all_that_the_run_file_does(run_values: dict[str, Any]) -> None:
    """The checkpoint's copy of the file may be older than what is submitted."""
    run_values["evaluate"] = {"lengths": [32, 64], "protocols": ["nonoverlapping", "last:8"], "pipeline": 2}
    options = options_of_run(check_run(run_values, name="small"))
    words = "--lengths 32,64 --protocol nonoverlapping --protocol last:8 --tensor 1 --pipeline 2"
    assert options == words.split()


@pytest.mark.usefixtures("folder")
def test_ranks_repeat_the_command_and_show_the_report(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    def start(command: list[str], **options: Any) -> int:
        started.append({"command": command, **options})
        return 3

    monkeypatch.setattr(local, "start_ranks", start)
    words = ("--quiet", "evaluate", "run", "--data", "text.txt", "--tensor", "2", "--pipeline", "2")
    assert trainshort(*words).code == 3, "that of the ranks"
    (seen,) = started
    assert seen["command"][1:] == ["-P", "-m", "trainshort", *words]
    assert (seen["ranks"], seen["logs"]) == (4, Path("run/logs/evaluate"))
    assert hasattr(seen["results"], "write")
    words_of_a_rank = seen["explain_memory"](3, "ran out of memory").splitlines()
    assert words_of_a_rank[0] == "rank 3 ran out of memory"
    assert "place: tensor rank 1, pipeline rank 1, data rank 0" in words_of_a_rank[1]
    assert [line.strip() for line in words_of_a_rank[3:5]] == ["shorter --lengths", "a larger --tensor or --pipeline"]
