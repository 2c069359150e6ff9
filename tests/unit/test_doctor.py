"""`trainshort doctor`: the report of a machine, and the audit of a run's ALiBi."""

import json
import os
import shutil
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

from configs.backends import BACKENDS
from configs.errors import MachineError
from launch import doctor
from launch.machine import gpu_bytes, gpu_name, require_usable_gpus
from tests.support.command_line import Call, refused
from training.evaluation.text import EvaluationText
from training.model.positions import bias
from training.model.positions.bias import causal_bias
from training.model.proof import audit
from training.model.windows import LosslessWindows

HOUSE = Path(__file__).parents[2]
BACKEND_KEYS = "name what positions precisions head_dims devices capability package memory has_run lacks".split()


def test_the_report_has_every_concern_of_the_machine(trainshort: Call) -> None:
    answer = trainshort("doctor", "--json")
    assert (answer.code, answer.error) == (0, "")
    report = json.loads(answer.out)
    assert list(report) == ["python", "packages", "cpu", "gpus", "network", "slurm", "attention"]
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu"]["memory_bytes"] > report["cpu"]["available_bytes"] > 0
    assert report["network"]["free_port"] > 0
    assert [backend["name"] for backend in report["attention"]] == list(BACKENDS)
    assert all(list(backend) == BACKEND_KEYS for backend in report["attention"])
    lacks = {backend["name"]: backend["lacks"] for backend in report["attention"]}
    assert lacks["sdpa"] is None
    if not report["gpus"]["usable"]:
        assert "needs a GPU" in lacks["flex"]


def test_the_tables_fit_80_columns_and_cut_nothing(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answer = trainshort("doctor")
    assert max(len(line) for line in answer.out.splitlines()) <= 80
    assert "…" not in answer.out
    words = " ".join(answer.out.split())
    for backend in BACKENDS.values():
        assert backend.has_run in words
        assert backend.what in words


def test_the_reported_packages_are_the_dependencies() -> None:
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {dependency.split(">")[0] for dependency in project["dependencies"]}
    assert named == set(doctor.REPORTED_PACKAGES) - {"flash_attn", "flash-attn-4"}


def test_gpus_that_the_driver_counts_and_cuda_refuses_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the driver is too old, say
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(doctor, "gpu_count", lambda _: 2)
    report = doctor.gpu_report()
    assert (report["present"], report["usable"]) == (2, [])


def test_ranks_refuse_gpus_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update.\nMore.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    require_usable_gpus({}, devices=tmp_path)  # there is none
    for name in ("nvidia0", "nvidia1"):
        (tmp_path / name).touch()
    require_usable_gpus({"CUDA_VISIBLE_DEVICES": ""}, devices=tmp_path)  # CPU ranks are asked for
    with pytest.raises(
        MachineError, match=r"has 2 GPUs, which torch \S+ cannot use \(The .* Please update\): install "
    ):
        require_usable_gpus({}, devices=tmp_path)
    opens = os.open

    def forbidden(path: Path, *flags: int) -> int:
        if Path(path).parent == tmp_path:  # as a job that has asked for no GPU sees them
            raise PermissionError
        return opens(path, *flags)

    monkeypatch.setattr(os, "open", forbidden)
    require_usable_gpus({}, devices=tmp_path)


def test_memory_is_that_of_the_gpus_that_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "Disabled, GPU-aa1, 81559, NVIDIA A",
        "Disabled, GPU-bb2, 24576, NVIDIA B",
        "Enabled, GPU-cc3, 9, NVIDIA C",
    ]

    def seen(count: int, **environ: str) -> tuple[int | None, str | None]:
        answer = subprocess.CompletedProcess([], 0, stdout="\n".join(lines[:count]))
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
        return gpu_bytes(environ), gpu_name(environ)

    large, small = (81559 << 20, "NVIDIA A"), (24576 << 20, "NVIDIA B")
    assert seen(2) == (small[0], large[1])
    assert seen(2, CUDA_VISIBLE_DEVICES="GPU-aa") == seen(3, CUDA_VISIBLE_DEVICES="GPU-aa1") == large
    assert seen(2, CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID") == small
    assert seen(2, CUDA_VISIBLE_DEVICES="0") == (small[0], large[1]), "which one that is, CUDA alone knows"
    assert seen(3) == seen(3, CUDA_VISIBLE_DEVICES="MIG-dd4") == seen(0) == (None, None)
    assert seen(2, CUDA_VISIBLE_DEVICES="MIG-dd4") == (None, None)
    lines = ["No devices were found"]
    assert seen(1) == (None, None)


def test_a_host_name_that_does_not_resolve_is_reported(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "does not resolve" in " ".join(trainshort("doctor").out.split())


def test_memory_is_unknown_without_meminfo(tmp_path: Path) -> None:
    assert doctor.memory_report(tmp_path / "none") == {"memory_bytes": None, "available_bytes": None}


@pytest.mark.usefixtures("folder")
def test_the_audit_takes_the_runs_lengths_and_precision(trainshort: Call) -> None:
    sets = ("--set", "train.precision=bf16", "--set", "evaluate.lengths=[24, 512]")
    answer = trainshort("doctor", "--alibi", "run.yaml", *sets, "--json")
    assert (answer.code, answer.error) == (0, "")
    report = json.loads(answer.out)
    assert (report["backend"], report["precision"], report["heads"], report["limit"]) == ("sdpa", "bf16", 4, 3e-3)
    assert [audit["length"] for audit in report["lengths"]] == [24, 32, 512]
    assert report["within"]
    assert set(report["lengths"][0]["heads"][0]) == {"head", "slope", "measured", "absolute", "relative", "window"}
    assert [audit["density"] for audit in report["lengths"]] == [1.0] * 3
    assert report["lengths"][2]["heads"][3]["window"]["largest"] == 512, "its slope is flat"
    shown = trainshort("doctor", "--alibi", "run.yaml", *sets)
    assert "every row is within the limit for bf16, 0.003" in shown.out
    assert max(len(line) for line in shown.out.splitlines()) <= 80


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("windows", ["auto", "scores"])
def test_the_audit_looks_at_scores_where_the_run_does(
    trainshort: Call, monkeypatch: pytest.MonkeyPatch, windows: str
) -> None:
    made: list[bool] = []

    class Windows(LosslessWindows):
        def __init__(self, *, by_scores: bool = False) -> None:
            made.append(by_scores)
            super().__init__(by_scores=by_scores)

    monkeypatch.setattr(audit, "LosslessWindows", Windows)
    sets = ("--set", f"model.windows={windows}", "--set", "evaluate.lengths=[64]")
    assert trainshort("doctor", "--alibi", "run.yaml", *sets).code == 0
    assert set(made) == {windows == "scores"}


def test_a_run_folder_shows_the_windows_of_its_weights(
    trainshort: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(HOUSE / "tests" / "fixtures" / "run_of_0.1.0", tmp_path / "run")
    (tmp_path / "run" / "data").rename(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    words = ("doctor", "--alibi", "run", "--set", "evaluate.lengths=[1024]")
    unknown = trainshort(*words)
    assert (unknown.code, unknown.error) == (0, "")
    assert "Windows of run/checkpoints/step_0000002" in unknown.out
    assert "not measured: it needs the held-out text, of which evaluate says: data.split is 0" in unknown.out
    tokens = torch.randint(0, 300, (1200,), generator=torch.Generator().manual_seed(1)).numpy()
    text = EvaluationText("held-out", tokens, None, None)
    monkeypatch.setattr("training.evaluation.text.held_out_text", lambda _: text)
    report = json.loads(trainshort(*words, "--json").out)["weights"]
    assert [each["length"] for each in report["lengths"]] == [8, 1024]
    layer, _ = report["lengths"][1]["layers"]
    steep, flat = layer["heads"]
    assert 200 < steep["median"] <= steep["largest"] < 400, "18 / 2^-4 tokens, and what its queries and keys add"
    assert (flat["largest"], flat["share"]) == (1024, 1.0)
    assert steep["share"] < layer["density"] < 1.0
    shown = trainshort(*words).out
    assert f"     0   {layer['density']:.1%}     {steep['largest']}   1.02k\n" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_an_audit_over_the_limit_fails(trainshort: Call, monkeypatch: pytest.MonkeyPatch, form: tuple[str]) -> None:
    monkeypatch.setattr(bias, "causal_bias", lambda *args, **keys: causal_bias(*args, **keys) * torch.nan)
    answer = trainshort("doctor", "--alibi", "run.yaml", *form)
    assert answer.code == 1
    assert answer.error.startswith("error: ALiBi is not exact here: sdpa in fp32 puts 1 of a row's attention of head ")
    assert len(answer.error.splitlines()) == 1
    assert answer.out


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "a.b=1"), "--set a.b=1 changes a run file, and none is given: add --alibi RUN.yaml"),
        (
            ("--alibi", "run.yaml", "--set", "model.position=rotary"),
            "--alibi audits ALiBi, but model.position is rotary: give a run with model.position alibi",
        ),
        (("--alibi", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_bad_input_of_doctor_is_one_line(trainshort: Call, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(trainshort, "doctor", *arguments)


@pytest.mark.usefixtures("folder")
def test_an_audit_needs_the_runs_backend_here(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = refused(trainshort, "doctor", "--alibi", "run.yaml", "--set", "model.attention=flex")
    assert message.startswith("model.attention flex needs a GPU")
