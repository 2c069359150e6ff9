"""`init`, `check` with its notes, `train --dry-run`, and the commands that messages tell the user to type."""

import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from configs.commands import name_run_file, run_file_named, typed_path
from configs.errors import MachineError
from configs.load import RUNS, dump_run, load_run, shipped_runs
from launch.show.train import train_command_line
from launch.slurm.script import ranks_per_node
from tests.support.command_line import Call, contents, refused
from tests.support.small_run import set_options
from training.checkpoint.disk import describe_file
from training.checkpoint.manifest import Manifest, write_manifest
from training.folder import with_fixed_keys
from training.tracking.store import Store, require_known_scheme


@pytest.fixture
def prepared(prepared_once: Path, folder: Path) -> Path:
    # with their times, which prepared data records
    shutil.copytree(prepared_once, folder, dirs_exist_ok=True, copy_function=shutil.copy2)
    return folder


@pytest.fixture
def trained(prepared: Path) -> Path:
    """A run folder after a first start, with a checkpoint of step 4 that has no tensors."""
    config = with_fixed_keys(load_run("run.yaml"), run_dir=Path("run"))
    checkpoint = prepared / "run" / "checkpoints" / "step_0000004"
    checkpoint.mkdir(parents=True)
    for file in (prepared / "run" / "config.yaml", checkpoint / "config.yaml"):
        file.write_text(dump_run(config), encoding="utf-8")
    shutil.copy(prepared / "data" / "tokenizer.model", checkpoint)
    files = {name: describe_file(checkpoint / name) for name in ("config.yaml", "tokenizer.model")}
    write_manifest(
        checkpoint,
        Manifest(4, 32, 6.0, "", None, tensor=2, pipeline=2, vocab_size=600, tensors={}, files=files),
    )
    return prepared


def notes(trainshort: Call, *overrides: str) -> list[str]:
    """Return the notes of `check`, after comparing both forms of its output; nothing may be written."""
    before = contents(Path.cwd())
    answer = trainshort("check", "run.yaml", *set_options(overrides))
    assert (answer.code, answer.error) == (0, ""), answer
    lines = [line.removeprefix("note: ") for line in answer.out.splitlines() if line.startswith("note: ")]
    assert json.loads(trainshort("check", "run.yaml", *set_options(overrides), "--json").out)["notes"] == lines
    assert contents(Path.cwd()) == before
    return lines


def test_check_notes_sources_that_prepare_would_refuse(trainshort: Call, folder: Path) -> None:
    (folder / "empty.txt").write_text(" \n")
    (folder / "empty.gz").write_bytes(gzip.compress(b""))
    (folder / "table.csv").write_text("a,b\n1,2\n")
    (folder / "paper.txt").write_bytes(b"%PDF-1.4 ...")
    (folder / "texts").mkdir()
    sources = ["no.txt", "*.none", "empty.txt", "empty.gz", "table.csv", "paper.txt", "texts", "book.txt"]
    seen = notes(trainshort, f"data.sources={sources}".replace("'", '"'))
    for note, expected in zip(
        seen,
        (
            f"data source no.txt does not exist: check the path, it is relative to {folder}",
            "data source *.none matches no file: check the pattern",
            "data source empty.txt holds no text: remove it",
            "data source empty.gz holds no text: remove it",
            "data source table.csv is a table: ",
            "data source paper.txt is a PDF file, not text",
            "data source texts is a folder: give its files",
            "data is not prepared in data ",
        ),
        strict=True,
    ):
        assert note.startswith(expected)
    assert notes(trainshort, 'data.sources=["book.txt", "./book.txt"]')[0].startswith(
        "data.sources book.txt and ./book.txt both name the file"
    )
    (folder / "mine.bin").write_bytes(b"")
    (folder / "mine.idx").write_bytes(b"")
    assert notes(trainshort, "data.sources=[mine.bin]")[0].startswith("data source mine.bin is already tokenized, but")


def test_check_notes_what_else_is_missing(trainshort: Call, folder: Path) -> None:
    ready = f"data is not prepared in data (relative to {folder}): run `trainshort prepare run.yaml`"
    assert notes(trainshort) == [ready]
    seen = notes(trainshort, "data.tokenizer=no.model", "train.init_from=no/run", "track.uri=localhost:5000")
    assert seen[0] == f"data.tokenizer no.model does not exist: check the path, it is relative to {folder}"
    assert seen[1].startswith(ready[:-1])
    assert seen[2].startswith("train.init_from no/run: checkpoint no/run does not exist: ")
    assert seen[3] == "track.uri is localhost:5000, a host without http: write http://localhost:5000"
    (folder / "run").write_text("mine")
    assert notes(trainshort)[-1].startswith("run.dir run: run is a file, not a folder")


def test_check_notes_data_of_other_inputs(trainshort: Call, prepared: Path) -> None:
    assert notes(trainshort) == []
    (other,) = notes(trainshort, "data.vocab_size=700")
    assert other == (
        "data holds data prepared from other inputs: data.vocab_size was 600 then and is 700 now; set data.dir to "
        "another folder, or delete that one and run `trainshort prepare run.yaml --set data.vocab_size=700`"
    )
    book = prepared / "book.txt"
    book.write_text("Another text.")
    (changed,) = notes(trainshort)
    assert f"data source {book} changed (" in changed
    assert changed.endswith("(training does without: its data is prepared)")
    book.unlink()
    (gone,) = notes(trainshort)
    assert gone.startswith("data source book.txt does not exist: ")
    (prepared / "data" / "part-000.bin").unlink()
    assert notes(trainshort)[1].startswith("prepared data data/part-000.bin is missing: ")


@pytest.mark.usefixtures("trained")
def test_check_notes_what_a_start_would_do(trainshort: Call) -> None:
    assert notes(trainshort) == ["training resumes from step 4, run/checkpoints/step_0000004"]
    assert notes(trainshort, "train.steps=4") == ["run is trained to its last step, 4: raise train.steps to continue"]
    assert notes(trainshort, "run.seed=3") == [
        "run holds a run that this one would change: run.seed was 1, is 3: set the old values, or choose another "
        "run.dir"
    ]
    for change, advice in (
        ("train.optimizer=muon", "train.init_from lets begin with the weights of this one"),
        ("train.beta1=0.8", "train.branch_from lets go on from a checkpoint of this one"),
    ):
        assert notes(trainshort, change)[0].endswith(f", or choose another run.dir, which {advice}")
    for change in ("model.windows=off", "evaluate.tensor=2"):
        assert notes(trainshort, change) == ["training resumes from step 4, run/checkpoints/step_0000004"]
    assert notes(trainshort, "model.window=8")[0].startswith(
        "run holds a run that this one would change: model.window was null, is 8: "
    )
    assert notes(trainshort, "train.steps=3")[0].startswith("train.steps is 3, but run is trained to step 4: ")
    assert notes(trainshort, "run.dir=new", "train.init_from=run") == []
    other = notes(trainshort, "run.dir=new", "train.init_from=run", "model.heads=2")
    assert "has model.heads 4, the run has 2" in other[0]
    other = notes(trainshort, "run.dir=new", "train.init_from=run", "model.window=8")
    assert "has model.window null, the run has 8: initial weights need the same model" in other[0]
    for change, then, now in (("model.alibi_bias_max=16", "8", "16"), ("model.tie_embeddings=false", "true", "false")):
        other = notes(trainshort, "run.dir=new", "train.init_from=run", change)
        assert f"has {change.partition('=')[0]} {then}, the run has {now}: " in other[0]


@pytest.mark.usefixtures("trained")
def test_a_run_that_started_stops_within_its_warm_up(trainshort: Call) -> None:
    fixed = load_run("run/config.yaml").train
    sets = set_options([f"train.warmup_steps={fixed.warmup_steps}", "train.steps=1"])
    assert "set train.decay_steps (that of RUN_DIR/config.yaml" in refused(trainshort, "check", "run.yaml", *sets)
    (note,) = notes(
        trainshort,
        f"train.warmup_steps={fixed.warmup_steps}",
        "train.steps=1",
        f"train.decay_steps={fixed.decay_steps}",
    )
    assert note.startswith("train.steps is 1, but run is trained to step 4: ")


def test_no_more_steps_are_advised_at_a_rate_of_zero(trainshort: Call, trained: Path) -> None:
    file = trained / "run" / "config.yaml"
    file.write_text(file.read_text().replace("decay_steps: 10", "decay_steps: 4"))
    ended = (
        "run is trained to its last step, 4: its learning rate has fallen to 0, so continue in another run.dir with "
    )
    assert notes(trainshort, "train.steps=4") == [f"{ended}train.branch_from"]
    assert trainshort("train", "run.yaml", "--set", "train.steps=4").out.startswith(ended)
    assert refused(trainshort, "train", "run.yaml").startswith("train.steps is 10, but from step 4 on")
    file.write_text(file.read_text().replace("min_learning_rate: 0.0", "min_learning_rate: 0.001"))
    (note,) = notes(trainshort, "train.steps=4", "train.min_learning_rate=1e-3")
    assert note == "run is trained to its last step, 4: raise train.steps to continue"


@pytest.mark.usefixtures("trained")
def test_check_knows_a_schedule_that_ends_early(trainshort: Call) -> None:
    (note,) = notes(trainshort, "run.dir=new", "train.steps=10", "train.decay_steps=5")
    assert note.startswith("train.steps is 10, but from step 5 on the learning rate is 0 ")
    assert note.endswith("nothing more would be learned; set train.steps to 5 or train.decay_steps to 10")
    assert notes(trainshort, "run.dir=new", "train.decay_steps=5", "train.min_learning_rate=1e-3") == []


@pytest.mark.usefixtures("trained")
def test_a_checkpoint_command_refuses_what_it_would_ignore(trainshort: Call) -> None:
    reshape = ("checkpoint", "reshape", "run")
    for option in (("--json",), ("--ranks", "4"), ("--set", "parallel.tensor=4")):
        assert refused(trainshort, *reshape, *option).startswith(f"{option[0]} is for --dry-run: ")
    assert "model.layers was 4, is 8" in refused(trainshort, *reshape, "--dry-run", "--set", "model.layers=8")
    for command in ("list", "verify"):
        message = refused(trainshort, "checkpoint", command, "run/checkpoints")
        assert message.startswith("run/checkpoints holds the checkpoints of a run: ")
    assert refused(trainshort, "checkpoint", "list", "run.yaml").startswith("run folder run.yaml is a file: ")


def test_messages_name_the_command_to_type(trainshort: Call, folder: Path) -> None:
    (folder / "my runs").mkdir()
    shutil.copy("run.yaml", "my runs/a.yaml")
    arguments = ("my runs/a.yaml", "--set", "data.dir=my data", "--set", "train.steps=20")
    message = refused(trainshort, "train", *arguments)
    head, _, command = message.removesuffix("`").partition("`")
    assert head == f"data is not prepared in my data (relative to {folder}): run "
    assert shlex.split(command) == ["trainshort", "prepare", *arguments]
    assert trainshort(*shlex.split(command)[1:]).code == 0
    assert trainshort("train", *arguments, "--dry-run").code == 0
    again = refused(trainshort, "prepare", *arguments, "--set", "data.vocab_size=700")
    assert "run `trainshort prepare 'my runs/a.yaml' --set 'data.dir=my data' --set train.steps=20 --set " in again
    # a secret is not repeated, neither in an error nor in a note
    secret = ("run.yaml", "--set", "slurm.env={HF_TOKEN: hf_hunter2hunter2}")
    assert "hunter2" not in refused(trainshort, "train", *secret)
    assert "hunter2" not in trainshort("check", *secret).out


def test_messages_of_a_run_folder_name_its_run_file(trainshort: Call, trained: Path) -> None:
    shutil.rmtree("data")
    assert refused(trainshort, "evaluate", "run") == (
        f"data is not prepared in data (relative to {trained}): run `trainshort prepare run/config.yaml`"
    )
    shutil.rmtree("run/checkpoints/step_0000004")
    assert refused(trainshort, "generate", "run", "--prompt", "a") == (
        "run has no checkpoint yet: train it first with `trainshort train run/config.yaml`"
    )
    assert refused(trainshort, "jobs", "status", "run") == (
        "run has no submitted jobs: submit them with trainshort slurm run/config.yaml --submit"
    )
    assert refused(trainshort, "checkpoint", "reshape", "no").startswith("checkpoint no does not exist: ")


def test_a_dry_run_shows_the_plan_and_writes_nothing(trainshort: Call, prepared: Path) -> None:
    before = contents(prepared)
    answer = trainshort("train", "run.yaml", "--dry-run")
    assert (answer.code, answer.error) == (0, "")
    head, *lines = answer.out.splitlines()
    assert head.endswith("  small in run")
    assert lines[1:] == [
        "to go: 10 steps, 2.56k tokens, 256 a step",
        "4 CPU ranks: tensor 2 x pipeline 2 x data 1, ZeRO-1, fp32",
        "attention sdpa, lossless windows: all scores at length 32",
        "begins at step 0",
        f"logs to MLflow at sqlite:///{prepared}/mlflow.db",
        "dry run: no rank was started, nothing was written",
    ]
    more = trainshort("train", "run.yaml", "--dry-run", "--ranks", "8", "--set", "track.uri=http://host").out
    assert "8 CPU ranks: tensor 2 x pipeline 2 x data 2" in more
    assert "logs to MLflow at http://host" in more
    offline = trainshort("train", "run.yaml", "--dry-run", "--set", "track.offline=true").out
    assert "records for MLflow, offline: `trainshort track sync run` sends to sqlite:///" in offline
    assert contents(prepared) == before


@pytest.mark.usefixtures("trained")
def test_no_run_and_no_data_go_among_checkpoints(trainshort: Call) -> None:
    place = "run/checkpoints/step_0000004"
    assert refused(trainshort, "train", "run.yaml", "--set", f"run.dir={place}").startswith(f"run.dir {place} is in ")
    assert refused(trainshort, "prepare", "run.yaml", "--set", f"data.dir={place}/data").startswith(
        f"data.dir {place}/data is in "
    )


@pytest.mark.usefixtures("trained")
def test_a_dry_run_says_what_it_would_resume_from(trainshort: Call) -> None:
    before = contents(Path.cwd())
    out = trainshort("train", "run.yaml", "--dry-run").out
    assert "to go: 6 steps, 1.54k tokens, 256 a step\n" in out
    assert "resumes from step 4, run/checkpoints/step_0000004\n" in out
    assert "begins at" not in out
    started = trainshort("train", "run.yaml", "--dry-run", "--set", "run.dir=new", "--set", "train.init_from=run").out
    assert "begins at step 0, with the weights of run\n" in started
    done = trainshort("train", "run.yaml", "--dry-run", "--set", "train.steps=4")
    finished = [
        "run is trained to its last step, 4: raise train.steps to continue",
        "next: trainshort evaluate run",
    ]
    assert (done.code, done.out.splitlines()) == (0, finished)
    assert contents(Path.cwd()) == before


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--ranks", "3"),
        ("--set", "run.seed=2"),
        ("--set", "data.dir=elsewhere"),
        ("--set", "model.attention=flex"),
        ("--set", "run.dir=new", "--set", "train.init_from=no"),
        ("--set", "run.dir=book.txt/below"),
        ("--set", "track.uri=htp://host"),
        ("--set", "track.uri=https:/host"),
        ("--set", "train.stepps=3"),
    ],
)
def test_a_dry_run_refuses_what_a_start_refuses(trainshort: Call, arguments: tuple[str, ...]) -> None:
    assert refused(trainshort, "train", "run.yaml", *arguments, "--dry-run") == refused(
        trainshort, "train", "run.yaml", *arguments
    )


@pytest.mark.parametrize("source", shipped_runs())
def test_init_keeps_the_shipped_run_and_shows_every_key(trainshort: Call, tmp_path: Path, source: str) -> None:
    file = tmp_path / "mine.yaml"
    assert trainshort("init", "mine", "--from", source, "--out", str(file)).code == 0
    config, shipped = load_run(str(file)), load_run(source)
    assert (config.run.name, config.run.dir) == ("mine", "runs/mine")
    assert config == shipped.model_copy(update={"run": config.run})
    text = file.read_text(encoding="utf-8")
    for line in (RUNS / f"{source}.yaml").read_text(encoding="utf-8").splitlines():
        assert " ".join(line.partition("# ")[2].split()) in " ".join(text.replace("\n  #", " ").split())
    # with the # removed before every key, it is the same run with all defaults written out
    keys = [re.sub(r"^  #(\S)", r"  \1", line) for line in text.splitlines()]
    file.write_text("\n".join(keys), encoding="utf-8")
    assert load_run(str(file)) == config
    for name, section in config.model_dump().items():
        assert all(f"  {key}:" in "\n".join(keys) for key in section), name


def test_init_writes_once_and_says_what_to_type(trainshort: Call, folder: Path) -> None:
    answer = trainshort("init", "mine")
    assert answer.out.splitlines()[0].startswith("mine.yaml is written from demo: ")
    commands = [shlex.split(line) for line in answer.out.splitlines()[1:]]
    assert [command[1] for command in commands] == ["check", "prepare", "train"]
    assert trainshort(*commands[0][1:]).code == 0
    assert max(map(len, (folder / "mine.yaml").read_text(encoding="utf-8").splitlines())) <= 121
    # for the cluster that it is edited for: as many ranks as GPUs
    assert ranks_per_node(load_run("mine.yaml", overrides=["slurm.gpus_per_node=8"]), nodes=1) == 8
    assert refused(trainshort, "init", "mine").startswith("mine.yaml exists already: choose another NAME or --out")
    for arguments, message in (
        (("a/b",), "NAME is the name of a run, not a path, got 'a/b': "),
        (("mine.yaml",), "NAME is the name of a run, not a path, got 'mine.yaml': "),
        (("..",), "NAME is the name of a run, not a path, got '..': "),
        (("two words",), "NAME is the name of a run, not a path, got 'two words': "),
        (("other", "--from", "dmo"), "--from dmo is not a shipped run: use one of alibi-125m, "),
        (("other", "--out", "no/x.yaml"), "folder no does not exist: make it, or choose another --out FILE"),
        (("other", "--out", "."), ". exists already: "),
        (("other", "--out", "book.txt"), "book.txt exists already: "),
    ):
        assert refused(trainshort, "init", *arguments).startswith(message)
    for name in ("123", "1e3", "1_000", "true", "null", "on", "1.5"):  # YAML reads some of them as no text
        assert trainshort("init", name).code == 0
        assert load_run(f"{name}.yaml").run.name == name
    quoted = trainshort("init", "other", "--out", "my file.yaml").out
    assert "trainshort train 'my file.yaml'" in quoted


def test_a_run_file_that_begins_with_a_dash_is_one_word(trainshort: Call, folder: Path) -> None:
    (folder / "run.yaml").rename(folder / "-x.yaml")
    messages = [trainshort("check", "--", "-x.yaml").out, trainshort("train", "--", "-x.yaml").error]
    for message in messages:
        [command] = re.findall(r"run `(trainshort prepare [^`]*)`", message)
        assert command == "trainshort prepare ./-x.yaml"
    assert trainshort(*shlex.split(command)[1:]).code == 0
    plan = ["--set", "run.dir=-runs/a b"]
    assert trainshort("prepare", "./-x.yaml", *plan).code == 0
    answer = refused(trainshort, "jobs", "status", "./-runs/a b")
    assert "-runs/a b" in answer
    assert train_command_line("-x.yaml", options=["--ranks", "2"], overrides=["run.name=a b"]) == (
        "trainshort train ./-x.yaml --ranks 2 --set 'run.name=a b'"
    )
    assert typed_path(Path("-runs/a b")) == "'./-runs/a b'"
    assert [typed_path(path) for path in ("runs/-x", "a", "/x")] == ["runs/-x", "a", "/x"]


def test_a_command_in_a_message_is_named_once() -> None:
    words = ("my run.yaml", ["run.name=a b"])
    named = "`trainshort train 'my run.yaml' --set 'run.name=a b'"
    assert name_run_file("accept it with `trainshort train --accept-change`", *words) == (
        f"accept it with {named} --accept-change`"
    )
    for whole in (f"run {named}`", "run `trainshort train other.yaml`", "see `trainshort check --help`", "prepare it"):
        assert name_run_file(whole, *words) == whole
    assert name_run_file("run `trainshort prepare`", "-x.yaml") == "run `trainshort prepare ./-x.yaml`"
    with pytest.raises(MachineError, match=re.escape("run `trainshort prepare demo`")), run_file_named("demo"):
        raise MachineError("run `trainshort prepare`")


@pytest.mark.parametrize(
    "uri",
    [
        *("./mlruns", "file:///m", "http://host:5000", "https://me:${PW}@host/path", "sqlite:///m.db", "databricks"),
        *("databricks://profile", "postgresql+psycopg2://me@host/db", "mysql://host/db"),
    ],
)
def test_a_store_that_mlflow_can_open_is_accepted(uri: str) -> None:
    assert require_known_scheme(Store(uri, "track.uri")) is None


@pytest.mark.usefixtures("prepared")
def test_ranks_of_a_scheduler_show_one_plan(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    for name, value in {**torchrun, "TORCHELASTIC_RUN_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "8 CPU ranks: " in trainshort("train", "run.yaml", "--dry-run").out
    monkeypatch.setenv("RANK", "1")
    answer = trainshort("train", "run.yaml", "--dry-run")
    assert (answer.code, answer.out, answer.error) == (0, "", "")
