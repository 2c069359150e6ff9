"""Wrong input of a run through the real command line: one clear line, exit 2, nothing written, no rank started.

Broken sources have their own file, test_bad_sources.py.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import dump_run, load_run
from launch import local
from tests.support.command_line import Answer, Call, contents, refused
from training.checkpoint.disk import describe_file
from training.checkpoint.manifest import Manifest, write_manifest
from training.folder import with_fixed_keys


@pytest.fixture
def prepared(prepared_once: Path, folder: Path) -> Path:
    shutil.copytree(prepared_once, folder, dirs_exist_ok=True)
    (folder / "empty").mkdir()
    return folder


CHECKED = {
    "heads that do not divide": (
        ["model.heads=5", "parallel.tensor=1"],
        "run.yaml: model.heads must divide model.hidden (64), got 5: use 1, 2, 4, 8, 16, 32 or 64",
    ),
    "tensor ranks that do not divide the heads": (
        ["parallel.tensor=8"],
        "run.yaml: parallel.tensor must divide model.heads (4), got 8: use 1, 2 or 4",
    ),
    "layers fewer than stages": (
        ["model.layers=1"],
        "run.yaml: parallel.pipeline must be at most model.layers (1), got 2: use 1 stages or fewer",
    ),
    "unknown key": (["model.head=4"], "run.yaml: unknown key model.head: did you mean heads?"),
    "unknown section": (["modle.heads=4"], "run.yaml: unknown key modle: did you mean model?"),
    "wrong type": (
        ["model.layers=four"],
        "run.yaml: model.layers: must be a valid integer, got 'four'",
    ),
    "not a number": (
        ["train.learning_rate=.nan"],
        "run.yaml: train.learning_rate must be a finite number, got nan",
    ),
    "infinity": (["train.clip=.inf"], "run.yaml: train.clip must be a finite number, got inf"),
    "a kernel without learned biases": (
        ["model.attention=flex", "model.position=t5"],
        "run.yaml: model.attention flex cannot compute model.position t5: use reference or sdpa",
    ),
    "a kernel without fp32": (
        ["model.attention=flash"],
        "run.yaml: model.attention flash cannot compute train.precision fp32: use reference or sdpa or flex (on a GPU)",
    ),
    "a window without a token": (
        ["model.window=0"],
        "run.yaml: model.window: must be greater than or equal to 1, got 0",
    ),
    "a window that is no number": (
        ["model.window=off"],
        "run.yaml: model.window: must be a valid integer, got 'off'",
    ),
    "exports of steps that are not saved": (
        ["checkpoint.every=4", "checkpoint.export_every=6"],
        "run.yaml: checkpoint.export_every must be a multiple of checkpoint.every (4), got 6: no other step is saved",
    ),
    "exports of a model without a format": (
        ["checkpoint.every=4", "checkpoint.export_every=4", "model.position=rotary"],
        "BLOOM cannot hold model.position rotary (it holds alibi): "
        "set checkpoint.export_every (4) to 0, or change the model",
    ),
    "an unknown format of exports": (
        ["checkpoint.export_format=onnx"],
        "checkpoint.export_format 'onnx' is not known: use hf or gguf",
    ),
    "no override": (["model.heads"], "--set 'model.heads' is not an override: write section.key=value"),
}


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.usefixtures("folder")
def test_a_wrong_run_file_is_refused(trainshort: Call, name: str) -> None:
    overrides, expected = CHECKED[name]
    sets = [argument for override in overrides for argument in ("--set", override)]
    assert refused(trainshort, "check", "run.yaml", *sets) == expected


@pytest.mark.parametrize("command", ["prepare", "train", "slurm", "doctor --alibi"])
@pytest.mark.usefixtures("folder")
def test_every_command_checks_its_run_file(trainshort: Call, command: str) -> None:
    message = refused(trainshort, *command.split(), "run.yaml", "--set", "model.head=4")
    assert message == "run.yaml: unknown key model.head: did you mean heads?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"run: {name: a\n", "run.yaml, line 2: it ends before a closing }: add it"),
        (b"run: {name: \xff}\n", "run file run.yaml is not UTF-8 at byte 12: save it as UTF-8"),
        (b"model: {heads: 2}\nmodel: {heads: 4}\n", "run.yaml, line 2: key 'model' appears twice: remove one"),
        (
            b"just words\n",
            "run file run.yaml must hold sections of keys, got text: type `trainshort init NAME` for one to edit",
        ),
    ],
)
def test_a_file_that_is_no_run_file_is_refused(trainshort: Call, folder: Path, text: bytes, expected: str) -> None:
    (folder / "run.yaml").write_bytes(text)
    assert refused(trainshort, "check", "run.yaml") == expected


@pytest.mark.usefixtures("folder")
def test_a_missing_run_file_is_named_with_the_shipped_runs(trainshort: Call) -> None:
    message = refused(trainshort, "check", "no.yaml")
    assert message.startswith("run file no.yaml does not exist: give a YAML file or one of ")
    assert "demo" in message


def test_a_tokenizer_that_does_not_fit_is_refused(trainshort: Call, prepared: Path) -> None:
    shutil.copy(prepared / "data" / "tokenizer.model", prepared / "own.model")
    sets = ["--set", "data.tokenizer=own.model", "--set", "data.dir=other"]
    assert refused(trainshort, "prepare", "run.yaml", *sets, "--set", "data.vocab_size=500") == (
        "data.vocab_size must be at least that of data.tokenizer own.model (600), got 500: use 600"
    )
    assert trainshort("prepare", "run.yaml", *sets).code == 0
    (prepared / "own.model").write_bytes(b"another")
    assert refused(trainshort, "train", "run.yaml", *sets) == (
        "data.tokenizer own.model is not the one that other was prepared with: "
        "set data.dir to another folder, or delete that one and run "
        f"`trainshort prepare run.yaml {' '.join(sets)}`"
    )
    assert refused(trainshort, "prepare", "run.yaml", "--set", "data.tokenizer=no.model") == (
        "tokenizer no.model cannot be read (No such file or directory): check the path"
    )


def cut(file: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "data" / file
        path.write_bytes(path.read_bytes()[:-2])

    return apply


def file_in_place_of_the_run(folder: Path) -> None:
    (folder / "run").write_text("mine")


def nothing(folder: Path) -> None:
    pass


AGAIN = "set data.dir to another folder, or delete that one and run `trainshort prepare run.yaml`"
TRAINED: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "a cut .bin": (
        cut("part-000.bin"),
        [],
        rf"prepared data data/part-000.bin has \d+ bytes, \d+ were written: {AGAIN}",
    ),
    "another tokenizer": (
        cut("tokenizer.model"),
        [],
        f"tokenizer data/tokenizer.model is not the one that the data was prepared with: {AGAIN}",
    ),
    "another vocabulary": (
        nothing,
        ["--set", "data.vocab_size=700"],
        "data holds data prepared from other inputs: data.vocab_size was 600 then and is 700 now; "
        f"{AGAIN[:-1]} --set data.vocab_size=700`",
    ),
    "a kernel for GPUs": (
        nothing,
        ["--set", "model.attention=flex"],
        "model.attention flex needs a GPU and this machine's ranks run on cpu: use sdpa",
    ),
    "a kernel of a package for GPUs": (
        nothing,
        ["--set", "model.attention=flash", "--set", "train.precision=bf16"],
        "model.attention flash needs a GPU and this machine's ranks run on cpu: use sdpa",
    ),
    "data that is not prepared": (
        nothing,
        ["--set", "data.dir=elsewhere"],
        r"data is not prepared in elsewhere \(relative to .*\): "
        "run `trainshort prepare run.yaml --set data.dir=elsewhere`",
    ),
    "text shorter than a sample": (
        nothing,
        ["--set", "data.sequence_length=1000000"],
        r"book.txt has \d+ training tokens and one sample needs 1000001: add text or lower data.sequence_length",
    ),
    "held-out text shorter than a sample": (
        nothing,
        ["--set", "data.sequence_length=20000", "--set", "evaluate.every=5"],
        r"book.txt has \d+ held-out tokens and one sample needs 20001: "
        r"add text, raise data.split or lower data.sequence_length",
    ),
    "ranks that do not fit": (
        nothing,
        ["--ranks", "3"],
        r"ranks must be a multiple of parallel.tensor x parallel.pipeline \(2 x 2 = 4\), got 3: "
        r"start 4 or 8 ranks, or change parallel",
    ),
    "a batch that does not divide over the ranks": (
        nothing,
        ["--ranks", "12"],
        r"train.global_batch must be a multiple of train.micro_batch x data ranks \(2 x 3 = 6\), got 8: "
        r"change one of them",
    ),
    "an unknown format of exports": (
        nothing,
        ["--set", "checkpoint.export_format=onnx"],
        "checkpoint.export_format 'onnx' is not known: use hf or gguf",
    ),
    "a run folder that is a file": (
        file_in_place_of_the_run,
        [],
        "run.dir run: run is a file, not a folder: move it away or set another run.dir",
    ),
    "first weights that are not there": (
        nothing,
        ["--set", "train.init_from=no/checkpoint"],
        "checkpoint no/checkpoint does not exist: give a folder of RUN_DIR/checkpoints, or RUN_DIR",
    ),
    "first weights that are none": (
        nothing,
        ["--set", "train.init_from=empty"],
        ".*/empty is not a checkpoint, it has no manifest.json: give a folder of RUN_DIR/checkpoints, or RUN_DIR",
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_train_refuses_before_any_rank_starts(trainshort: Call, prepared: Path, name: str) -> None:
    break_it, arguments, expected = TRAINED[name]
    break_it(prepared)
    assert_matches(refused(trainshort, "train", "run.yaml", *arguments), expected)


def test_train_refuses_before_torch_would_fail_to_compile(
    trainshort: Call, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    told = r"train.compile is on, but this machine cannot compile: install a C\+\+ compiler \(g\+\+\), or set .* off"
    assert_matches(refused(trainshort, "train", "run.yaml", "--set", "train.compile=on"), told)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "run.yaml")
    told = "TORCHINDUCTOR_CACHE_DIR is 'run.yaml', where .*: name a folder that can be written, or unset it"
    for command in ("train", "profile"):
        assert_matches(refused(trainshort, command, "run.yaml"), told)
    assert any(re.search(told, note) for note in json.loads(trainshort("check", "run.yaml", "--json").out)["notes"])


def assert_matches(message: str, expected: str) -> None:
    assert re.fullmatch(expected, message), message


@pytest.fixture
def trained(prepared: Path) -> Path:
    """A run folder after a first start, with a checkpoint of step 4 that has no tensors."""
    config = with_fixed_keys(load_run("run.yaml"), run_dir=Path("run"))
    checkpoint = prepared / "run" / "checkpoints" / "step_0000004"
    checkpoint.mkdir(parents=True)
    (prepared / "run" / "config.yaml").write_text(dump_run(config), encoding="utf-8")
    (checkpoint / "config.yaml").write_text(dump_run(config), encoding="utf-8")
    shutil.copy(prepared / "data" / "tokenizer.model", checkpoint)
    files = {name: describe_file(checkpoint / name) for name in ("config.yaml", "tokenizer.model")}
    layout = {"tensor": 2, "pipeline": 2, "vocab_size": 600}
    write_manifest(checkpoint, Manifest(4, 32, 6.0, "", None, **layout, tensors={}, files=files))
    return prepared


@pytest.mark.usefixtures("trained")
def test_a_second_start_with_other_keys_is_refused_by_name(trainshort: Call) -> None:
    sets = ["--set", "train.learning_rate=0.5", "--set", "run.seed=3", "--set", "train.steps=20"]
    assert refused(trainshort, "train", "run.yaml", *sets) == (
        "run holds a run that this one would change: run.seed was 1, is 3; train.learning_rate was 0.008, is 0.5: "
        "set the old values, or choose another run.dir"
    )


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("options", [(), ("--accept-change",)])
def test_accept_change_is_passed_on_to_the_ranks(
    trainshort: Call, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(local, "start_ranks", lambda command, **_: commands.append(command) or 0)
    assert trainshort("train", "run.yaml", *options).code == 0
    assert [word for word in commands[0] if word == "--accept-change"] == list(options)


@pytest.mark.usefixtures("trained")
def test_a_finished_run_is_left_as_it_is(trainshort: Call) -> None:
    lines = [f'{{"step": {step}, "loss": 5.0, "validation_loss": {loss}}}\n' for step, loss in ((2, 4.5), (4, "NaN"))]
    Path("run/metrics.jsonl").write_text("".join(lines))
    before = contents(Path.cwd())
    assert trainshort("train", "run.yaml", "--set", "train.steps=4") == Answer(
        0,
        "run is trained to its last step, 4: raise train.steps to continue\n"
        "best validation: loss 4.5000 at step 2\n"
        "next: trainshort evaluate run\n",
        "",
    )
    assert contents(Path.cwd()) == before


def test_a_broken_newest_checkpoint_is_refused(trainshort: Call, trained: Path) -> None:
    checkpoint = trained / "run" / "checkpoints" / "step_0000004"
    cut_file = checkpoint / "tokenizer.model"
    size = len(cut_file.read_bytes())
    cut_file.write_bytes(b"")
    expected = f"checkpoint file .*/step_0000004/tokenizer.model has 0 bytes, expected {size}: use another checkpoint"
    assert_matches(refused(trainshort, "train", "run.yaml"), expected)
    assert_matches(refused(trainshort, "evaluate", "run"), expected)
    assert_matches(refused(trainshort, "export", "run", "--format", "hf", "--out", "out"), expected)
    (checkpoint / "manifest.json").write_text("{")
    expected = r"checkpoint .* has a broken manifest.json \(it is not JSON: .*\): use another checkpoint"
    assert_matches(refused(trainshort, "train", "run.yaml"), expected)


def test_an_evaluation_longer_than_the_text_is_refused(trainshort: Call, trained: Path) -> None:
    message = refused(trainshort, "evaluate", "run", "--lengths", "16,50000,100000")
    assert_matches(
        message,
        r"the text has \d+ tokens, too short for length 50000, 100000: use lengths up to \d+, "
        r"or give a longer text with --data",
    )
    (trained / "short.txt").write_text("Two words")
    message = refused(trainshort, "evaluate", "run", "--lengths", "64", "--data", "short.txt")
    assert_matches(message, r"the text has \d+ tokens, too short for length 64: use lengths up to \d+, or .*--data")
    assert refused(trainshort, "evaluate", "run", "--data", "no.txt").startswith("data source no.txt ")
    message = refused(trainshort, "evaluate", "run", "--protocol", "rolling")
    assert message.startswith("protocol 'rolling' is not known: ")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("command", [("evaluate",), ("export", "--format", "hf", "--out", "out")])
def test_a_missing_checkpoint_is_refused_by_name(trainshort: Call, command: tuple[str, ...]) -> None:
    name, *options = command
    for path, expected in (
        ("no/run", "checkpoint no/run does not exist: give a folder of RUN_DIR/checkpoints, or RUN_DIR"),
        ("run.yaml", "checkpoint run.yaml is a file: give a folder of RUN_DIR/checkpoints, or RUN_DIR"),
        (
            "empty",
            ".*/empty is not a checkpoint, it has no manifest.json: give a folder of RUN_DIR/checkpoints, or RUN_DIR",
        ),
    ):
        assert_matches(refused(trainshort, name, path, *options), expected)


def test_prepared_data_is_no_checkpoint(trainshort: Call, prepared: Path) -> None:
    expected = (
        ".*/data is not a checkpoint, its manifest.json is of something else: give a folder of RUN_DIR/checkpoints"
    )
    for command in ("list", "verify", "reshape"):
        assert_matches(refused(trainshort, "checkpoint", command, str(prepared / "data")), f"{expected}, or RUN_DIR")


def test_an_export_overwrites_nothing(trainshort: Call, trained: Path) -> None:
    (trained / "out").mkdir()
    (trained / "out" / "mine.txt").write_text("kept")
    for out, expected in (
        ("out", "folder out has files in it: remove them or choose another --out"),
        ("out/mine.txt", "folder out/mine.txt is a file: choose another --out"),
    ):
        assert refused(trainshort, "export", "run", "--format", "hf", "--out", out) == expected
    assert refused(trainshort, "export", "run", "--format", "gguf", "--out", "new", "--with-code") == (
        "format gguf cannot carry code: drop --with-code, or use --format hf"
    )
    assert refused(trainshort, "export", "run", "--format", "onnx", "--out", "new") == (
        "format 'onnx' is not known: use hf or gguf"
    )


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("export", "run", "--format", "hf"), "hf"),
        (("import", "hf"), "imported"),
        (("profile", "run.yaml"), "profile"),
        (("report", "run"), "page.html"),
        (("compare", "run"), "plot.png"),
        (("init", "mine"), "mine.yaml"),
    ],
)
def test_nothing_is_written_among_checkpoints(trainshort: Call, command: tuple[str, ...], name: str) -> None:
    Path("link").symlink_to("run/checkpoints/step_0000004", target_is_directory=True)
    for out in (f"run/checkpoints/{name}", f"run/checkpoints/step_0000004/new/{name}", f"link/{name}"):
        assert refused(trainshort, *command, "--out", out) == (
            f"--out {out} is in {Path.cwd()}/run/checkpoints, where checkpoints are removed with all that is in them: "
            "choose another --out"
        )
