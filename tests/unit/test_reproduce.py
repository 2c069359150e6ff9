"""`trainshort reproduce`: what each start records, what differs here and now, and the commands that repeat a run."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import load_run
from launch.machine import core_count
from parallel.layout import Layout
from parallel.start import ProcessRank, rank_threads
from tests.support.command_line import Call, refused
from tests.support.edited_manifest import edit_manifest
from training.checkpoint.disk import describe_file
from training.checkpoint.manifest import Manifest, write_manifest
from training.folder import claim_run_folder, with_fixed_keys
from training.reproduction.differences import differences
from training.reproduction.facts import cpu_name
from training.reproduction.starts import COMMAND_VARIABLE, record_start, recorded_starts

RUN = Path("run")
OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
TYPED = "trainshort train run.yaml --set track.uri=https://me:pw@host"

pytestmark = pytest.mark.usefixtures("started")


def start(*overrides: str, step: int = 0) -> None:
    """Record a start of the run on CPU ranks, as rank 0 does."""
    config = with_fixed_keys(load_run("run.yaml", overrides=overrides), run_dir=RUN)
    layout = Layout.of(config, world_size=config.parallel.tensor * config.parallel.pipeline)
    process = ProcessRank(0, layout.world_size, 0, "", "local")
    fence = claim_run_folder(config, layout=layout, device=torch.device("cpu"))
    record_start(config, process, fence=fence, layout=layout, step=step, gpu=None, gpus=0)


@pytest.fixture
def started(prepared_once: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run after its first start, in the test's working directory."""
    shutil.copytree(prepared_once, folder, dirs_exist_ok=True, copy_function=shutil.copy2)
    monkeypatch.setenv("OMP_NUM_THREADS", rank_threads(cores=core_count(), ranks=4))
    monkeypatch.setenv(COMMAND_VARIABLE, "trainshort train run.yaml")
    start()
    return folder


def reproduced(trainshort: Call, *options: str, code: int = 0) -> dict[str, Any]:
    answer = trainshort("reproduce", "run", "--json", *options)
    assert (answer.code, answer.error) == (code, ""), answer
    document: dict[str, Any] = json.loads(answer.out)
    return document


def only_difference(trainshort: Call, *options: str, code: int = 0) -> tuple[str, str, str, str]:
    """Return the one fact that differs: its name, its two values and its grade."""
    [each] = reproduced(trainshort, *options, code=code)["differences"]
    return each["what"], each["then"], each["now"], each["grade"]


def edit(change: Callable[[dict[str, Any]], None]) -> None:
    """Change the newest start in the manifest of reproduction."""
    file = RUN / "reproduce.json"
    document = json.loads(file.read_text())
    change(document["starts"][-1])
    file.write_text(json.dumps(document))


def test_nothing_differs_right_after_a_start(trainshort: Call) -> None:
    for option in ((), ("--verify",)):
        document = reproduced(trainshort, *option)
        assert (document["differences"], document["changes"], document["notes"]) == ([], [], [])
        assert (document["verdict"], document["verified"]) == ("bit for bit the same", bool(option))
        assert document["commands"] == ["trainshort train run/config.yaml --ranks 4 --set run.dir=run-again"]
    answer = trainshort("reproduce", "run")
    assert (
        "repeated from here it is at worst: bit for bit the same\nto repeat it:\n  trainshort train run/" in answer.out
    )
    assert "the same: code, configuration, data, tokenizer, weights, versions, hardware," in answer.out
    Path("run-again").mkdir()
    assert reproduced(trainshort)["commands"][0].endswith("run.dir=run-again-2")
    went_back = {"step": 8, "next_sample": 64, "left_out": 16, "from_step": 10, "why": "the loss is nan", "at": "now"}
    (RUN / "rollbacks.json").write_text(json.dumps({"rollbacks": [went_back]}))
    document = reproduced(trainshort)
    assert [note.partition(":")[0] for note in document["notes"]] == ["it diverged and went back once"]
    assert document["commands"][0] == "mkdir -p run-again-2 && cp run/rollbacks.json run-again-2"


def test_a_start_records_what_decides_its_result() -> None:
    [start] = recorded_starts(RUN)
    assert (start["step"], start["folder"], start["command"]) == (0, str(Path.cwd()), "trainshort train run.yaml")
    assert start["layout"] == {
        **{"tensor": 2, "pipeline": 2, "data": 1, "zero": 1, "offload": "none", "overlap": False},
        **{"ranks": 4, "nodes": 1, "starter": "local"},
    }
    assert start["hardware"]["device"] == start["hardware"]["cpu"] == cpu_name()
    assert set(start["code"]["sha256"]) == {
        *("configs", "parallel", "data_pipeline", "training", "launch", "trainshort.py"),
    }
    manifest = json.loads(Path("data/manifest.json").read_text())
    assert start["data"]["fingerprint"] == manifest["inputs_sha256"]
    assert start["data"]["tokenizer_sha256"] == manifest["tokenizer_sha256"]
    assert start["versions"]["torch"] == torch.__version__
    assert start["settings"]["run.seed"] == load_run("run.yaml").run.seed


def test_the_command_line_is_kept_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMMAND_VARIABLE)
    monkeypatch.setattr("sys.argv", shlex.split(TYPED))
    start()
    assert [each["command"] for each in recorded_starts(RUN)] == [
        "trainshort train run.yaml",
        "trainshort train run.yaml --set track.uri=https://host",
    ]
    assert "pw" not in (RUN / "reproduce.json").read_text()


def test_versions_differ_up_to_rounding_or_not_at_all(trainshort: Call) -> None:
    edit(lambda start: start["versions"].update(torch="2.1.0"))
    assert only_difference(trainshort) == ("torch", "2.1.0", torch.__version__, "rounding")
    assert reproduced(trainshort)["notes"] == ["for the same versions: pip install torch==2.1.0"]
    edit(lambda start: start["versions"].update(torch=torch.__version__, mlflow="1.0"))
    assert only_difference(trainshort)[3] == "same"


def test_with_dropout_what_draws_otherwise_makes_another_run(trainshort: Call) -> None:
    one_tensor_rank, one_rank = ("parallel.tensor=1",), ("parallel.tensor=1", "parallel.pipeline=1")
    for dropout, worst in (("0.0", "rounding"), ("0.1", "other")):
        shutil.rmtree(RUN)
        for step, keys in enumerate(((), one_tensor_rank, one_rank, (*one_rank, "train.micro_batch=1"))):
            start(f"model.dropout={dropout}", *keys, step=step)
        edit(lambda start: start["versions"].update(torch="2.1.0"))
        document = reproduced(trainshort, code=3 if worst == "other" else 0)
        assert [(each["what"], each["grade"]) for each in document["changes"]] == [
            ("layout", "rounding"),
            ("layout", worst),
            ("torch", worst),
            ("train.micro_batch", worst),
        ]
        assert [each["grade"] for each in document["differences"]] == [worst]
        edit(lambda start: start["hardware"].update(device="NVIDIA H100", gpus=8))
        edit(lambda start: start["layout"].update(ranks=8))
        document = reproduced(trainshort, code=3 if worst == "other" else 0)
        lacking = [each["grade"] for each in document["differences"] if each["now"] == "needs 8 GPUs, 0 here"]
        assert lacking == [worst]


def test_tensor_ranks_draw_otherwise_where_a_sequence_is_split() -> None:
    then = recorded_starts(RUN)[-1]
    now = {**then, "layout": {**then["layout"], "tensor": 4}}
    for split, worst in ((False, "rounding"), (True, "other")):
        sides = [{**side, "settings": {**side["settings"], "parallel.sequence": split}} for side in (then, now)]
        assert [each.grade for each in differences(*sides, drops=True)] == [worst]
        assert [each.grade for each in differences(*sides, drops=False)] == ["rounding"]


def test_other_code_makes_another_run(trainshort: Call) -> None:
    edit(lambda start: start["code"]["sha256"].update(launch="0"))
    assert only_difference(trainshort)[0::3] == ("code of launch", "same")
    edit(lambda start: start["code"]["sha256"].update(training="0"))
    edit(lambda start: start["code"].update(commit="0123456789abcdef", changed=True))
    seen = only_difference(trainshort, code=3)
    assert seen == ("code of training, launch", "0123456789 with changes", "installed", "other")
    [note] = reproduced(trainshort, code=3)["notes"]
    assert note.endswith("git checkout 0123456789abcdef, and apply the diff in run/environment.json")


def test_threads_differ_up_to_rounding(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = recorded_starts(RUN)[0]["variables"]["OMP_NUM_THREADS"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    document = reproduced(trainshort)
    assert [tuple(each.values())[1:] for each in document["differences"]] == [
        ("OMP_NUM_THREADS", threads, "7", "rounding"),
        ("MKL_CBWR", "not set", "AVX2", "rounding"),
    ]
    assert document["commands"][0].startswith(f"env -u MKL_CBWR OMP_NUM_THREADS={threads} trainshort train run/")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("MKL_CBWR")
    assert reproduced(trainshort)["differences"] == []  # the launcher would set as many


def test_other_hardware_differs_up_to_rounding(trainshort: Call) -> None:
    edit(lambda start: start["hardware"].update(device="Z80", cpu="Z80"))
    assert only_difference(trainshort) == ("device", "Z80", cpu_name(), "rounding")
    edit(lambda start: start["hardware"].update(device="NVIDIA H100", gpus=8))
    edit(lambda start: start["layout"].update(ranks=16, nodes=2, starter="slurm"))
    document = reproduced(trainshort)
    grades = {each["what"]: (each["now"], each["grade"]) for each in document["differences"]}
    assert grades["layout"] == ("needs 8 GPUs, 0 here", "rounding")
    assert grades["train.deterministic"] == ("GPUs repeat no bits without it", "rounding")
    assert grades["CPU"][1] == grades["GPUs"][1] == "same"
    assert document["commands"] == ["trainshort slurm run/config.yaml --nodes 2 --submit --set run.dir=run-again"]
    edit(lambda start: start["layout"].update(starter="torchrun"))
    [command] = reproduced(trainshort)["commands"]
    assert command.startswith("torchrun --nnodes 2 --nproc-per-node 8 --no-python trainshort train run/config.yaml ")


def test_a_run_of_cpu_ranks_is_repeated_on_the_cpu(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.machine.gpu_count", lambda _: 1)
    monkeypatch.setattr("launch.machine.gpu_name", lambda environ: "NVIDIA H100")
    document = reproduced(trainshort)
    assert [(each["what"], each["now"]) for each in document["differences"]] == [
        ("device", "NVIDIA H100"),
        ("GPUs", "1"),
    ]
    assert document["commands"][0].startswith("CUDA_VISIBLE_DEVICES= trainshort train run/config.yaml --ranks 4 ")


def saved_at(source: Path) -> None:
    """Save step 4 of the run there, without tensors."""
    source.mkdir(parents=True)
    for file in ("run/config.yaml", "data/tokenizer.model"):
        shutil.copy(file, source)
    (source / "stage_00_tensor_00.exp_avg.safetensors").write_bytes(b"moments")
    names = ("config.yaml", "tokenizer.model", "stage_00_tensor_00.exp_avg.safetensors")
    files = {name: describe_file(source / name) for name in names}
    manifest = Manifest(4, 32, 6.0, "", None, tensor=2, pipeline=2, vocab_size=600, tensors={}, files=files)
    write_manifest(source, manifest)


def test_initial_weights_must_be_those_of_then(trainshort: Call) -> None:
    source = Path("first/checkpoints/step_0000004")
    saved_at(source)
    shutil.rmtree("run")
    start("train.init_from=first")
    assert reproduced(trainshort, "--verify")["differences"] == []
    (source / "config.yaml").write_text((source / "config.yaml").read_text().replace("heads: 4", "heads: 2"))
    assert reproduced(trainshort)["differences"] == []
    seen = only_difference(trainshort, "--verify", code=3)
    assert seen[0] == "train.init_from"
    assert "config.yaml was altered" in seen[2]
    shutil.rmtree("first")
    assert only_difference(trainshort, code=3)[2:] == ("checkpoint first does not exist", "other")
    assert reproduced(trainshort, code=3)["notes"][0].startswith("bring the checkpoint of train.init_from back first")


def test_a_branch_is_repeated_from_its_checkpoint(trainshort: Call) -> None:
    source = Path("first/checkpoints/step_0000004")
    saved_at(source)
    shutil.rmtree("run")
    start("train.branch_from=first", "train.steps=9", step=4)
    document = reproduced(trainshort)
    assert document["differences"] == []
    assert document["notes"] == [f"steps 1 to 4 are those of {source}, which it branches off from"]
    assert f"branch_from: {source}\n" in Path("run/config.yaml").read_text()
    for step, seen in ((2, []), (4, ["to step 4"])):  # where the trunk went back since; the branch does not come by 2
        back = {"step": step, "next_sample": 8 * step, "left_out": 16, "from_step": 6, "why": "nan", "at": "now"}
        Path("first/rollbacks.json").write_text(json.dumps({"rollbacks": [back]}))
        assert [each["now"] for each in reproduced(trainshort, code=3 * len(seen))["differences"]] == seen
    (RUN / "rollbacks.json").write_text(json.dumps({"rollbacks": [], "inherited": [back]}))
    # once it has saved, it needs the trunk no more: what is there at a later start decides nothing
    Path("first").rename("away")
    (RUN / "metrics.jsonl").write_text('{"step": 6, "loss": 1.0}\n')
    start("train.branch_from=first/checkpoints/step_0000004", "train.steps=9", step=6)
    assert only_difference(trainshort, code=3)[0] == "train.branch_from"
    Path("away").rename("first")
    document = reproduced(trainshort)
    assert (document["differences"], document["changes"], document["grade"]) == ([], [], "same")
    # other optimizer state is another run; it would not be one with the weights alone
    moments = source / "stage_00_tensor_00.exp_avg.safetensors"
    moments.write_bytes(b"otherss")
    edit_manifest(source, lambda manifest: manifest["files"].update({moments.name: vars(describe_file(moments))}))
    assert only_difference(trainshort, code=3)[0] == "train.branch_from"


def test_a_repetition_does_not_copy_over_the_run(trainshort: Call) -> None:
    start("track.hook=rclone copy $TRAINSHORT_CHECKPOINT bucket:x")
    [command] = reproduced(trainshort)["commands"]
    assert command.endswith(" --set run.dir=run-again --set track.hook=null")


def test_missing_data_is_prepared_again(trainshort: Call) -> None:
    shutil.rmtree("data")
    assert only_difference(trainshort, code=3)[2:] == ("not in data", "other"), "it was prepared in another place"
    assert trainshort("prepare", "run.yaml").code == 0
    start()
    shutil.rmtree("data")
    assert only_difference(trainshort)[2:] == ("not in data; its sources are as then", "same")
    prepare, train = reproduced(trainshort)["commands"]
    assert prepare == "trainshort prepare run/config.yaml --set run.dir=run-again --set data.dir=null"
    assert train.endswith(" --set run.dir=run-again --set data.dir=null")
    assert trainshort(*shlex.split(prepare)[1:]).code == 0
    again = json.loads(Path("run-again/data/manifest.json").read_text())
    shutil.copytree("run-again/data", "data")
    assert reproduced(trainshort)["differences"] == []
    with Path("book.txt").open("a") as book:
        book.write("More.\n")
    assert reproduced(trainshort)["differences"] == [], "the sources need not be there"
    shutil.rmtree("data")
    assert only_difference(trainshort, code=3)[2:] == ("not in data", "other")
    assert trainshort("prepare", "run.yaml").code == 0
    seen = reproduced(trainshort, code=3)["differences"]
    assert [(each["what"], each["grade"]) for each in seen] == [("data", "other"), ("tokenizer", "other")]
    assert all(each["then"] != each["now"] for each in seen)
    assert json.loads(Path("data/manifest.json").read_text())["files_sha256"] != again["files_sha256"]


def test_altered_data_is_seen_by_size_or_with_verify(trainshort: Call) -> None:
    tokens = Path("data/part-000.bin")
    content = bytearray(tokens.read_bytes())
    content[10] ^= 1
    tokens.write_bytes(content)
    assert reproduced(trainshort)["differences"] == []
    assert only_difference(trainshort, "--verify", code=3)[2:] == ("data/part-000.bin was altered", "other")
    tokens.write_bytes(content[:-2])
    assert only_difference(trainshort, code=3)[2] == "data/part-000.bin has another size"


def test_data_of_an_older_version_is_known_by_its_inputs(trainshort: Call) -> None:
    file = Path("data/manifest.json")
    manifest = json.loads(file.read_text())
    del manifest["files_sha256"]
    file.write_text(json.dumps(manifest))
    assert reproduced(trainshort, "--verify")["differences"] == []
    file.write_text(json.dumps({**manifest, "inputs_sha256": "0"}))
    assert only_difference(trainshort, code=3)[0] == "data"


def test_a_changed_run_file_is_named_with_its_keys(trainshort: Call) -> None:
    file, copy = RUN / "config.yaml", RUN / "checkpoints" / "step_0000004" / "config.yaml"
    then = file.read_text()
    file.write_text(then.replace("learning_rate: 0.008", "learning_rate: 0.009"))
    assert file.read_text() != then
    assert only_difference(trainshort, code=3)[2:] == ("changed since", "other")
    copy.parent.mkdir(parents=True)
    copy.write_text(then)
    what, _, now, grade = only_difference(trainshort)
    assert (what, grade) == ("config.yaml", "same")
    assert now == "changed since in train.learning_rate; checkpoints/step_0000004/config.yaml is as then"
    assert reproduced(trainshort)["commands"][0].startswith("trainshort train run/checkpoints/step_0000004/config.yaml")


def test_starts_that_differ_are_named(trainshort: Call) -> None:
    start("parallel.tensor=4", step=3)  # its steps are lost: the next start begins before it
    start("parallel.tensor=1", "train.micro_batch=4", step=3)
    document = reproduced(trainshort)
    assert [each["step"] for each in document["starts"]] == [0, 3, 3]
    assert [(each["start"], each["what"], each["then"], each["now"]) for each in document["changes"]] == [
        (3, "layout", "tensor 2 x pipeline 2 x data 1, ZeRO-1", "tensor 1 x pipeline 2 x data 1, ZeRO-1"),
        (3, "train.micro_batch", "2", "4"),
    ]
    assert document["grade"] == "rounding"
    assert "start 3, from step 4, differed from the one before it:\n" in trainshort("reproduce", "run").out
    (RUN / "reproduce.json").unlink()
    start(step=3)
    [note] = reproduced(trainshort)["notes"]
    assert note.startswith("steps 1 to 3 were trained by a version that kept no manifest")


def test_a_run_is_reproduced_from_another_folder(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path.cwd()
    (home / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    answer = trainshort("reproduce", "../run", "--json")
    [command] = json.loads(answer.out)["commands"]
    assert answer.code == 0
    assert command.endswith(f" ../run/config.yaml --ranks 4 --set run.dir=../run-again --set data.dir={home}/data")


@pytest.mark.parametrize("name", ["it's #1", "[a], {b}: c", "-1e3"])
def test_commands_hold_a_folder_of_any_name(trainshort: Call, name: str) -> None:
    for folder in ("run", "data"):
        Path(folder).rename(f"{name} {folder}")
    [*_, command] = json.loads(trainshort("reproduce", "--json", "--", f"{name} run").out)["commands"]
    words = shlex.split(command)
    overrides = [word for option, word in zip(words, words[1:], strict=False) if option == "--set"]
    assert load_run(words[2], overrides=overrides).run.dir == f"{name} run-again"


def test_a_folder_without_a_manifest_says_what_it_has(trainshort: Call, folder: Path) -> None:
    assert refused(trainshort, "reproduce", "none").startswith("run folder none does not exist: give the run.dir")
    assert refused(trainshort, "reproduce", "book.txt").startswith("run folder book.txt is a file: ")
    (folder / "empty").mkdir()
    assert refused(trainshort, "reproduce", "empty").startswith(
        "empty has no reproduce.json: give the run.dir of a run"
    )
    shutil.copytree(OLD_RUN, folder / "old")
    said = refused(trainshort, "reproduce", "old")
    assert said.startswith("old has no reproduce.json, which each start of this version writes; of what decides its ")


def test_a_broken_manifest_is_refused_and_kept(trainshort: Call) -> None:
    file = RUN / "reproduce.json"
    for content in ("{", "[]", '{"format_version": 1, "starts": []}', '{"format_version": 1, "starts": [{"step": 0}]}'):
        file.write_text(content)
        assert refused(trainshort, "reproduce", "run").startswith("run/reproduce.json cannot be read (")
    file.write_text('{"format_version": 2}')
    assert refused(trainshort, "reproduce", "run").startswith("run/reproduce.json has format_version 2, this version")
    start()
    assert len(recorded_starts(RUN)) == 1
    assert (RUN / "reproduce.json.broken").read_text() == '{"format_version": 2}'
