"""Damaged and malicious checkpoints: named in one line, skipped, never loaded, never deleted."""

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from tests.support.command_line import Call, contents
from tests.support.edited_manifest import edit_manifest
from tests.support.one_rank import STEPS, OneRank
from training.checkpoint.disk import describe_file
from training.checkpoint.manifest import list_checkpoints, read_manifest
from training.checkpoint.read import open_checkpoint

FILES = (
    "config.yaml",
    "tokenizer.model",
    "stage_00_tensor_00.weight.safetensors",
    "stage_00_tensor_00.exp_avg.safetensors",
    "stage_00_tensor_00.exp_avg_sq.safetensors",
    "manifest.json",
)
NEWEST, BEFORE = "step_0000003", "step_0000002"


@pytest.fixture(scope="module")
def trained(rank: OneRank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    rank.start(run_dir, steps=3)
    return run_dir


@pytest.fixture
def run_dir(trained: Path, folder: Path) -> Path:
    """A copy of a run folder with two checkpoints, in the current folder."""
    return copy_again(trained, folder / "run")


def copy_again(trained: Path, run_dir: Path) -> Path:
    """Replace a run folder by a copy of the trained one."""
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(trained, run_dir)
    return run_dir


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / NEWEST


def flip(path: Path, *, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_in_any_file_is_seen_and_skipped(
    rank: OneRank, trained: Path, folder: Path, trainshort: Call, caplog: pytest.LogCaptureFixture
) -> None:
    for name, at in product(FILES, (0, -1)):
        case = f"byte {at} of {name}"
        caplog.clear()
        run_dir = copy_again(trained, folder / "run")
        flip(newest(run_dir) / name, at=at)
        answer = trainshort("checkpoint", "verify", "run", "--json")
        assert answer.code == 2, case
        older, newer = json.loads(answer.out)
        assert (older["whole"], newer["whole"]) == (True, False), case
        assert len(newer["problems"]) == 1, case
        assert f"run/checkpoints/{NEWEST}" in newer["problems"][0], case
        assert name in newer["problems"][0], case
        before = contents(newest(run_dir))
        assert rank.start(run_dir, "checkpoint.every=4", steps=4).step == 2, case
        assert list_checkpoints(run_dir)[-1].step == 4, case
        (warning,) = (line for line in caplog.messages if "is skipped" in line)
        assert f"{newest(run_dir)}" in warning, case
        assert warning.endswith(f"; it is skipped, and {BEFORE} is used instead"), case
        assert contents(newest(run_dir)) == before, f"{case}: a broken checkpoint was touched"


def test_a_flip_of_any_byte_of_the_manifest_is_seen(run_dir: Path) -> None:
    manifest = newest(run_dir) / "manifest.json"
    content = manifest.read_bytes()
    assert read_manifest(newest(run_dir)).step == 3
    for at in range(len(content)):
        for bit in (1, 1 << at % 8):
            manifest.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            with pytest.raises(InputError, match=re.escape(str(newest(run_dir)))):
                read_manifest(newest(run_dir))


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run_dir: Path, trainshort: Call) -> None:
    newest(run_dir).rename(newest(run_dir).with_name("step_0000004"))
    answer = trainshort("export", "run/checkpoints/step_0000004", "--format", "hf", "--out", "out")
    assert (answer.code, answer.error.count("\n")) == (2, 1)
    assert "step_0000004 holds step 3, not the step of its name: rename it to step_0000003" in answer.error


def test_the_target_of_a_link_is_never_removed(rank: OneRank, run_dir: Path, tmp_path: Path) -> None:
    """An unfinished checkpoint, and a checkpoint that no rule keeps, are links to folders elsewhere."""
    archive, precious = tmp_path / "archive", tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").touch()
    checkpoints = run_dir / "checkpoints"
    (checkpoints / ".step_0000009.1-abcdabcd").symlink_to(precious)
    shutil.move(checkpoints / BEFORE, archive)
    (checkpoints / BEFORE).symlink_to(archive)
    before = contents(archive)
    rank.start(run_dir, "checkpoint.keep=1")
    assert (precious / "thesis").exists()
    assert contents(archive) == before
    assert not (checkpoints / ".step_0000009.1-abcdabcd").is_symlink(), "the link itself is removed"
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [2, STEPS]


def test_verify_names_broken_files_and_exits_0_without_any(run_dir: Path, trainshort: Call) -> None:
    answer = trainshort("checkpoint", "verify", "run")
    assert (answer.code, answer.error) == (0, "")
    assert [line.split()[0] for line in answer.out.splitlines()] == ["whole", "whole"]
    flip(newest(run_dir) / FILES[2], at=-1)
    flip(newest(run_dir) / FILES[4], at=-1)
    answer = trainshort("checkpoint", "verify", f"run/checkpoints/{NEWEST}")
    assert answer.code == 2
    first, *problems = answer.out.splitlines()
    assert first == f"broken  run/checkpoints/{NEWEST}"
    assert {line.split(" was altered")[0].strip() for line in problems} == {
        f"checkpoint file run/checkpoints/{NEWEST}/{FILES[4]}",
        f"checkpoint file run/checkpoints/{NEWEST}/{FILES[2]}",
    }
    assert json.loads(trainshort("checkpoint", "list", "run", "--json").out)[1]["whole"], "list reads no bytes"


def test_list_shows_steps_sizes_and_what_is_broken(run_dir: Path, trainshort: Call) -> None:
    shown = trainshort("checkpoint", "list", "run").out
    assert [line.split()[0] for line in shown.splitlines() if "step_" in line] == ["2", "3"]
    (listed,) = json.loads(trainshort("checkpoint", "list", f"run/checkpoints/{BEFORE}", "--json").out)
    assert (listed["step"], listed["tensor"], listed["pipeline"], listed["validation_loss"]) == (2, 1, 1, None)
    assert listed["bytes"] > 3 * 4 * 400 * 16
    assert 5 < listed["probe_loss"] < 7
    (newest(run_dir) / "manifest.json").write_text("{")
    shown = trainshort("checkpoint", "list", "run").out
    assert "broken" in shown
    assert f"checkpoint run/checkpoints/{NEWEST} has a broken manifest.json (" in shown


def test_list_verify_and_reshape_import_no_torch(run_dir: Path) -> None:
    code = "import sys\nfrom trainshort import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    for command in (["verify"], ["list"], ["reshape", "--dry-run"]):
        arguments = ["checkpoint", *command, str(run_dir)]
        done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout, command


def test_any_truncated_or_missing_file_is_seen_without_reading(
    rank: OneRank, trained: Path, folder: Path, trainshort: Call, caplog: pytest.LogCaptureFixture
) -> None:
    for name, how in product(FILES[:-1], ("truncated", "missing")):
        case = f"{name} is {how}"
        caplog.clear()
        run_dir = copy_again(trained, folder / "run")
        path = newest(run_dir) / name
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1])
        listed = json.loads(trainshort("checkpoint", "list", "run", "--json").out)
        assert [each["whole"] for each in listed] == [True, False], case
        assert f"{NEWEST}/{name} " in listed[1]["problems"][0], case
        assert rank.start(run_dir, steps=2).step == 2, case
        assert str(path) in caplog.text, case


def test_retention_ignores_broken_checkpoints(
    rank: OneRank, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    flip(newest(run_dir) / FILES[3], at=-1)
    # From now on the run saves other steps than the broken one.
    rank.start(run_dir, "checkpoint.keep=1", "checkpoint.every=4", steps=4)
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [3, 4]
    assert "was altered" in caplog.text


def test_an_evaluation_skips_altered_weights_but_not_moments(run_dir: Path) -> None:
    flip(newest(run_dir) / FILES[3], at=-1)
    assert open_checkpoint(run_dir).path == newest(run_dir)
    flip(newest(run_dir) / FILES[2], at=-1)
    assert open_checkpoint(run_dir).path.name == BEFORE
    with pytest.raises(InputError, match="weight.safetensors was altered: its SHA-256 begins with"):
        open_checkpoint(newest(run_dir))


def test_a_checkpoint_without_a_manifest_is_named_and_refused(
    rank: OneRank, run_dir: Path, trainshort: Call, caplog: pytest.LogCaptureFixture
) -> None:
    (newest(run_dir) / "manifest.json").unlink()
    listed = json.loads(trainshort("checkpoint", "list", "run", "--json").out)
    assert [each["whole"] for each in listed] == [True, False]
    shutil.rmtree(run_dir / "checkpoints" / BEFORE)
    with pytest.raises(InputError, match="it has no manifest.json"):
        rank.start(run_dir)
    assert newest(run_dir).is_dir()
    (listed,) = json.loads(trainshort("checkpoint", "list", f"run/checkpoints/{NEWEST}", "--json").out)
    assert "it has no manifest.json" in listed["problems"][0]


def replace(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and put its size and hash into the manifest, as an attacker would."""
    (folder / name).write_bytes(content)
    entry = describe_file(folder / name)
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: vars(entry)}))


class Harm:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def pickled_weights(folder: Path) -> None:
    replace(folder, FILES[2], pickle.dumps(Harm()))


def huge_header(folder: Path) -> None:
    replace(folder, FILES[2], struct.pack("<Q", 1 << 60) + b"{}")


def other_shape(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"]["blocks.0.attention_norm.weight"]["shape"] = [1 << 40]

    edit_manifest(folder, change)


def file_elsewhere(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder.parent / "outside").write_bytes(b"")
        entry = vars(describe_file(folder.parent / "outside"))
        edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))

    return apply


def link(folder: Path) -> None:
    outside = folder.parent / "outside"
    shutil.move(folder / FILES[2], outside)
    (folder / FILES[2]).symlink_to(outside)


def linked_manifest(folder: Path) -> None:
    shutil.move(folder / "manifest.json", folder.parent / "outside")
    (folder / "manifest.json").symlink_to(folder.parent / "outside")


def yaml_tag(folder: Path) -> None:
    replace(folder, "config.yaml", b"run: !!python/object/apply:os.system ['touch harmed']\n")


def yaml_bomb(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 7)]
    replace(folder, "config.yaml", "\n".join(lines).encode())


def deep_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 200_000)


def huge_manifest(folder: Path) -> None:
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)


def other_format(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(format=99))


def many_ranks(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(tensor=1 << 19))


def unknown_rule(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"]["blocks.0.attention_norm.weight"]["rule"] = "diagonal"

    edit_manifest(folder, change)


def not_a_number(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(step=-1))


MALICIOUS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle under another name": (pickled_weights, "weight.safetensors cannot be read (Error while deserializing"),
    "a header of an exabyte": (huge_header, "weight.safetensors cannot be read (Error while deserializing"),
    "a path out of the folder": (file_elsewhere("../outside"), "names a file '../outside' that cannot be in it"),
    "an absolute path": (file_elsewhere("/etc/passwd"), "names a file '/etc/passwd' that cannot be in it"),
    "a link": (link, "weight.safetensors is missing or no regular file,"),
    "a linked manifest": (linked_manifest, "it has no manifest.json"),
    "a Python tag": (yaml_tag, "could not determine a constructor for the tag 'tag:yaml.org,2002:python/object"),
    "a bomb of YAML": (yaml_bomb, "unknown key a0"),
    "a manifest of brackets": (deep_manifest, "broken manifest.json (it is nested too deeply)"),
    "a manifest of a terabyte": (huge_manifest, "it has 1099511627776 bytes"),
    "another format": (other_format, "is of format 99, this version reads 2: use the version that wrote it"),
    "a rank's file that is not named": (many_ranks, "has no file stage_00_tensor_01.weight.safetensors"),
    "another shape": (other_shape, "for blocks.0.attention_norm.weight, the model needs [16]: it is of another model"),
    "an unknown rule": (unknown_rule, "has a tensor with the unknown rule 'diagonal': use the version that wrote it"),
    "a step before the first": (not_a_number, "broken manifest.json (step: Input should be greater than"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_checkpoint_is_refused_in_one_line(run_dir: Path, trainshort: Call, name: str) -> None:
    harm, expected = MALICIOUS[name]
    harm(newest(run_dir))
    before = {path: path.stat().st_size for path in Path.cwd().rglob("*") if path.is_file()}
    answer = trainshort("export", f"run/checkpoints/{NEWEST}", "--format", "hf", "--out", "out")
    assert answer.code == 2
    assert answer.error.startswith("error: ")
    message = answer.error.splitlines()[0] if name == "a bomb of YAML" else answer.error
    assert len(answer.error) < 4000
    assert expected in answer.error, message
    if name != "a bomb of YAML":  # which has one line per key
        assert len(answer.error.splitlines()) == 1
    assert {path: path.stat().st_size for path in Path.cwd().rglob("*") if path.is_file()} == before
    assert not Path("harmed").exists()


def test_verify_sees_a_wrong_format_behind_a_right_hash(run_dir: Path, trainshort: Call) -> None:
    pickled_weights(newest(run_dir))
    answer = trainshort("checkpoint", "verify", f"run/checkpoints/{NEWEST}")
    assert answer.code == 2
    assert "stage_00_tensor_00.weight.safetensors is not a safetensors file" in answer.out


def test_reshape_lists_the_rule_of_every_tensor(run_dir: Path, trainshort: Call) -> None:
    assert trainshort("checkpoint", "reshape", "run").out.startswith("nothing has to be done: a run resumes from any")
    before = contents(run_dir)
    arguments = ("checkpoint", "reshape", "run", "--dry-run", "--set", "parallel.tensor=2", "--json")
    rules = {cut["name"]: cut for cut in json.loads(trainshort(*arguments).out)["cuts"]}
    manifest = json.loads((newest(run_dir) / "manifest.json").read_text())
    assert rules.keys() == manifest["tensors"].keys()
    word = rules["embedding.word.weight"]
    assert (word["rule"], word["tied"], word["shape"], word["wanted"]) == ("vocabulary", True, [400, 16], [200, 200])
    down = rules["blocks.0.feed_forward.down.weight"]
    assert (down["rule"], down["saved"], down["wanted"]) == ("row", [64], [32, 32])
    assert rules["blocks.0.attention_norm.weight"]["wanted"] == []
    assert contents(run_dir) == before
    assert "vocabulary, tied" in trainshort(*arguments[:-1]).out
    answer = trainshort("checkpoint", "reshape", "run", "--dry-run", "--set", "parallel.tensor=4")
    assert answer.code == 2
    assert "parallel.tensor must divide model.heads (2), got 4" in answer.error
    unknown_rule(newest(run_dir))
    assert trainshort(*arguments).code == 2
