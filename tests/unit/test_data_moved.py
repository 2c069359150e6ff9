"""Prepared data that was moved or copied, or is named in another way, is the same data: a run resumes with it."""

import os
import shutil
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.load import dump_run, load_run
from configs.schema import RunConfig
from data_pipeline.counts import load_trainable
from data_pipeline.manifest import load_prepared
from data_pipeline.prepare import prepare_data
from launch import local
from tests.support.command_line import Call, prepare_here, refused
from tests.support.data import BOOK, small_data, write_book
from training.checkpoint.disk import describe_file
from training.checkpoint.manifest import Manifest, write_manifest
from training.folder import with_fixed_keys


@pytest.fixture(scope="module")
def started_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file, prepared data and the records of a first start."""
    folder = tmp_path_factory.mktemp("started")
    prepare_here(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "run").mkdir()
        config = with_fixed_keys(load_run("run.yaml"), run_dir=Path("run"))
        (folder / "run" / "config.yaml").write_text(dump_run(config), encoding="utf-8")
    return folder


@pytest.fixture
def started(started_once: Path, folder: Path) -> Path:
    # with the times of the files, as `cp -a` copies them
    shutil.copytree(started_once, folder, dirs_exist_ok=True)
    return folder


def resume(*overrides: str) -> RunConfig:
    """Check a second start of the run as the launcher does, and return what it would write to config.yaml."""
    config = with_fixed_keys(load_run("run.yaml", overrides=overrides), run_dir=Path("run"))
    load_trainable(config, folder=Path(config.data.dir or "run/data"))
    return config


def resume_problem(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        resume(*overrides)
    return str(caught.value)


@pytest.mark.usefixtures("started")
def test_a_run_resumes_with_a_copy_of_its_data(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("data", "elsewhere/copy")
    assert resume("data.dir=elsewhere/copy").data.dir == "elsewhere/copy"
    shutil.rmtree("data")
    commands: list[list[str]] = []
    monkeypatch.setattr(local, "start_ranks", lambda command, **_: commands.append(command) or 0)
    assert trainshort("train", "run.yaml", "--set", "data.dir=elsewhere/copy").code == 0
    assert "data.dir=elsewhere/copy" in commands[0]
    assert "data.dir was 'data', is 'no'" in refused(trainshort, "train", "run.yaml", "--set", "data.dir=no")


@pytest.mark.usefixtures("started")
def test_other_data_in_another_folder_is_refused() -> None:
    Path("more").mkdir()
    # as many bytes at the same time: only the tokens tell
    write_book(Path("more"), text=BOOK.replace("the", "het"))
    state = Path("book.txt").stat()
    os.utime("more/book.txt", ns=(state.st_atime_ns, state.st_mtime_ns))
    config = load_run("run.yaml")
    other = config.data.model_copy(update={"sources": small_data("more/book.txt").sources})
    prepare_data(other, folder=Path("other"), progress=False)
    assert "data.dir was 'data', is 'other'" in resume_problem("data.dir=other", "data.sources=[more/book.txt]")
    assert "data.dir was 'data', is 'other'" in resume_problem("data.dir=other")


def test_data_used_in_place_may_be_prepared_again_elsewhere(started: Path) -> None:
    keys = ["data.sources=[corpus/part-000.bin]", "data.tokenizer=data/tokenizer.model"]
    shutil.copytree("data", "corpus")
    for name in ("first", "second"):
        prepare_data(load_run("run.yaml", overrides=keys).data, folder=Path(name), progress=False)
    Path("run/config.yaml").write_text(dump_run(load_run("run.yaml", overrides=[*keys, "data.dir=first"])))
    resume(*keys, "data.dir=second")
    manifest = Path("first/manifest.json")  # as if all had been moved here after the first start
    manifest.write_text(manifest.read_text().replace(str(started), "/moved/since"))
    assert "/moved/since/corpus/part-000.bin is missing: set data.dir" in resume_problem(*keys, "data.dir=first")
    resume(*keys, "data.dir=second")


@pytest.mark.usefixtures("started")
def test_sources_may_be_spelled_in_another_way(started: Path) -> None:
    for path in ("./book.txt", str(started / "book.txt"), "b*.txt"):
        assert resume(f"data.sources=['{path}']").data.sources[0].path == path
        prepare_data(resume(f"data.sources=['{path}']").data, folder=Path("data"), progress=False)
    Path("corpus").mkdir()
    Path("book.txt").rename("corpus/book.txt")
    resume("data.sources=[corpus/book.txt]")
    resume()  # the old place is empty, but nothing is read from there
    os.utime("corpus/book.txt")
    with pytest.raises(InputError, match=r"data source \S*corpus/book\.txt changed \(modified since\)"):
        load_prepared(small_data("corpus/book.txt"), folder=Path("data"))
    assert "data.sources was" in resume_problem("data.sources=[corpus/book.txt]")
    assert "data.sources was" in resume_problem("data.sources=[{path: book.txt, weight: 1.0}]")


@pytest.mark.usefixtures("started")
def test_weights_follow_sources_that_are_spelled_anew() -> None:
    write_book(Path(), "other.txt", text=BOOK[::-1])
    prepare_data(small_data(("book.txt", 1.0), ("other.txt", 3.0)), folder=Path("blend"), progress=False)
    prepared = load_prepared(small_data(("./book.txt", 1.0), ("./other.txt", 2.0)), folder=Path("blend"))
    assert prepared.weights == (1.0, 2.0)
    with pytest.raises(InputError, match=r"data\.sources was"):
        load_prepared(small_data(("./other.txt", 1.0), ("./book.txt", 2.0)), folder=Path("blend"))
    blend = "data.sources=[{path: %sbook.txt, weight: 1}, {path: other.txt, weight: %s}]"
    keys = ["data.dir=blend", "data.split=0.1"]
    Path("run/config.yaml").write_text(dump_run(load_run("run.yaml", overrides=[*keys, blend % ("", 3)])))
    resume(*keys, blend % ("./", 3))
    assert "data.sources was" in resume_problem(*keys, blend % ("", 2)), "a started run keeps its weights"


@pytest.mark.usefixtures("started")
def test_a_tokenizer_is_known_by_its_content() -> None:
    shutil.copy("data/tokenizer.model", "mine.model")
    given = "data.tokenizer=mine.model"
    prepare_data(load_run("run.yaml", overrides=[given]).data, folder=Path("given"), progress=False)
    Path("run/config.yaml").write_text(dump_run(load_run("run.yaml", overrides=[given, "data.dir=given"])))
    Path("mine.model").rename("moved.model")
    resume("data.dir=given", "data.tokenizer=moved.model")
    resume("data.dir=given", given)
    Path("moved.model").write_bytes(b"another")
    assert "data.tokenizer was 'mine.model', is 'moved.model'" in resume_problem(
        "data.dir=given", "data.tokenizer=moved.model"
    )


def test_initial_weights_may_be_spelled_in_another_way(started: Path) -> None:
    config = load_run("run.yaml", overrides=["train.init_from=old/run"])
    Path("run/config.yaml").write_text(dump_run(config))
    resume(f"train.init_from={started}/old/run")
    assert "train.init_from was 'old/run', is 'new/run'" in resume_problem("train.init_from=new/run")


@pytest.mark.usefixtures("started")
def test_advice_on_a_moved_run_folder_means_that_folder(trainshort: Call) -> None:
    """Its run file says where it was: a command on that file alone would begin another run there."""
    config = load_run("run/config.yaml", overrides=["data.dir=null"])
    Path("run").rename("my run")
    checkpoint = Path("my run/checkpoints/step_0000004")
    checkpoint.mkdir(parents=True)
    for file in (Path("my run/config.yaml"), checkpoint / "config.yaml"):
        file.write_text(dump_run(config))
    shutil.copy("data/tokenizer.model", checkpoint)
    files = {name: describe_file(checkpoint / name) for name in ("config.yaml", "tokenizer.model")}
    manifest = Manifest(4, 32, 6.0, "", None, tensor=2, pipeline=2, vocab_size=600, tensors={}, files=files)
    write_manifest(checkpoint, manifest)
    this = "'my run/config.yaml' --set 'run.dir=my run'"
    assert refused(trainshort, "evaluate", "my run").endswith(f": run `trainshort prepare {this}`")
    train = f"trainshort train {this}"
    assert f"as in `{train} --set parallel.tensor=4`" in trainshort("checkpoint", "reshape", "my run").out
    assert refused(trainshort, "jobs", "status", "my run").endswith(f" with trainshort slurm {this} --submit")
    Path("my run/config.yaml").unlink()
    inner = "'my run/checkpoints/step_0000004/config.yaml' --set 'run.dir=my run'"
    assert refused(trainshort, "evaluate", "my run").endswith(f": run `trainshort prepare {inner}`")
    (checkpoint / "config.yaml").rename("my run/config.yaml")
    shutil.rmtree(checkpoint)
    assert refused(trainshort, "generate", "my run", "--prompt", "a").endswith(f" with `{train}`")
