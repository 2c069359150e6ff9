"""All problems of a run file come at once: one kind of mistake hides no other, and each names what to write instead."""

import re
from pathlib import Path
from typing import Any

import pytest

from configs.backends import ANY_WIDTH
from configs.errors import InputError
from configs.load import check_run, load_run
from configs.schema import RunConfig
from configs.strict_yaml import as_yaml, parse_yaml
from tests.support.small_run import small_run

VALID = """\
run: {name: mine, dir: runs/mine}
model:
  layers: 4
  hidden: 64
  heads: 4
data: {sources: [book.txt], vocab_size: 600, sequence_length: 32}
train: {micro_batch: 2, global_batch: 8, steps: 10, warmup_steps: 2, learning_rate: 8e-3}
"""


def problems_of(path: Path, text: str, *overrides: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_run(str(path), overrides=overrides)
    head, *lines = str(caught.value).splitlines()
    if not lines:
        return [head]
    assert head == f"{path} has {len(lines)} problems:"
    return [line.removeprefix("  ") for line in lines]


def message_of(values: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        check_run(values, name="small")
    return str(caught.value)


WORDS = "'auto', 'reference', 'sdpa', 'flex', 'flash4' or 'flash'"
# A mistake of each kind, with a word of its message.
MISTAKES = {
    "an unknown key": ({"model": {"head": 4}}, "unknown key model.head: did you mean heads?"),
    "a wrong type": ({"train": {"steps": "ten"}}, "train.steps: must be a valid integer, got 'ten'"),
    "a number out of range": ({"data": {"vocab_size": 3}}, "data.vocab_size: must be greater than or equal to 300"),
    "a word that is none": ({"model": {"position": "alibbi"}}, "model.position: must be 'alibi'"),
    "a list that is none": ({"evaluate": {"lengths": 64}}, "evaluate.lengths must be a list, got 64: write [64]"),
    "null for a list": ({"slurm": {"setup": None}}, "slurm.setup must be a list, got null: write []"),
    "an unknown section": ({"optimizer": {"lr": 1}}, "unknown key optimizer: did you mean train.optimizer?"),
    "a section that is a number": ({"checkpoint": 3}, "checkpoint: must be a section of keys, got 3"),
    "a variable that is not set": ({"data": {"dir": "$NOT_SET_HERE/x"}}, "data.dir is '$NOT_SET_HERE/x', but the"),
    "a missing key": ({"run": {"name": None}}, "run.name: must be a valid string, got null"),
}
# Rules that none of the mistakes is about.
BROKEN = {"parallel": {"tensor": 3, "pipeline": 1}, "train": {"micro_batch": 3}, "slurm": {"time": "soon"}}
RULES = (
    "parallel.tensor must divide model.heads (4), got 3",
    "train.micro_batch must divide train.global_batch (8), got 3",
    "slurm.time must be hours:minutes:seconds in quotes, got soon",
)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_hides_no_broken_rule(name: str) -> None:
    mistake, expected = MISTAKES[name]
    values: dict[str, Any] = small_run(BROKEN)
    for section, keys in mistake.items():
        values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
    message = message_of(values)
    assert all(rule in message for rule in (expected, *RULES)), message


def test_mistakes_of_all_kinds_come_in_one_message() -> None:
    values: dict[str, Any] = small_run(BROKEN)
    for section, keys in (item for mistake, _ in MISTAKES.values() for item in mistake.items()):
        values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
    message = message_of(values)
    assert all(expected in message for _, expected in MISTAKES.values()), message
    assert all(rule in message for rule in RULES), message
    assert len(message.splitlines()) == 1 + len(MISTAKES) + len(RULES) + 1  # tensor 3 divides no feed-forward either


@pytest.mark.parametrize("section", RunConfig.model_fields)
def test_a_missing_section_hides_no_broken_rule(section: str) -> None:
    values = small_run(BROKEN, {"checkpoint": {"every": 2, "keep_every": 3}})
    values.pop(section, None)
    message = message_of(values)
    required = RunConfig.model_fields[section].is_required()
    assert (f"{section} is missing: add it" in message) == required
    assert ("checkpoint.keep_every must be a multiple" in message) == (section != "checkpoint")
    assert ("slurm.time must be" in message) == (section != "slurm")


def test_a_rule_says_nothing_of_values_that_are_refused() -> None:
    # With the default or an example's value instead, each of these would break a rule.
    for mistake in ({"model": {"heads": "x"}}, {"model": {"hidden": 6.5}}, {"train": {"steps": -1}}):
        values = small_run({"model": {"hidden": 66, "heads": 3}, "parallel": {"tensor": 1}}, mistake)
        assert len(message_of(values).splitlines()) == 1
    values = small_run({"train": {"warmup_steps": 500}})
    del values["train"]["steps"]
    assert message_of(values) == "small: train.steps is missing: add it"


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        ("train", "batch_size", "did you mean micro_batch or global_batch or batch_warmup?"),
        ("model", "tensor", "did you mean parallel.tensor or evaluate.tensor?"),
        ("model", "sequence_length", "did you mean data.sequence_length?"),
        ("model", "seq_length", "did you mean data.sequence_length?"),
        ("train", "seed", "did you mean run.seed?"),
        ("train", "every", "did you mean log_every or checkpoint.every or evaluate.every?"),
        ("train", "lr", "did you mean learning_rate?"),
        ("train", "max_steps", "did you mean steps?"),
        ("model", "n_layers", "did you mean layers?"),
        ("model", "HEADS", "did you mean heads?"),
        ("slurm", "gpus", "did you mean gpus_per_node?"),
        ("model", "seq_len", "did you mean data.sequence_length?"),
        ("parallel", "pipe", "did you mean pipeline?"),
        ("data", "validation", "did you mean evaluate.validation_lengths?"),
        ("model", "activation", "remove it"),
        ("data", "zzz", "remove it"),
    ],
)
def test_an_unknown_key_names_the_one_that_is_meant(section: str, key: str, expected: str) -> None:
    assert message_of(small_run({section: {key: 2}})) == f"small: unknown key {section}.{key}: {expected}"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("modle", "did you mean model?"),
        ("Train", "did you mean train?"),
        ("steps", "did you mean train.steps?"),
        ("tensor", "did you mean parallel.tensor or evaluate.tensor?"),
        ("name", "did you mean run.name?"),
        ("qqq", "remove it"),
    ],
)
def test_an_unknown_section_names_what_is_meant(key: str, expected: str) -> None:
    assert message_of({**small_run(), key: {"a": 1}}) == f"small: unknown key {key}: {expected}"


UNQUOTED = parse_yaml("2026.10").value


def test_what_yaml_reads_as_another_type_says_what_to_write() -> None:
    for keys, expected in (
        ({"train": {"steps": 1e3}}, "train.steps: must be a valid integer, got 1000.0: write 1000"),
        ({"train": {"deterministic": "on"}}, "train.deterministic: must be true or false, got 'on': write true"),
        ({"parallel": {"sequence": "maybe"}}, "parallel.sequence: must be true or false, got 'maybe'"),
        ({"parallel": {"sequence": 1}}, "parallel.sequence: must be true or false, got 1: write true"),
        ({"train": {"compile": True}}, "train.compile: must be 'auto', 'on', 'triton' or 'off', got true: write on"),
        ({"model": {"attention": "On"}}, f"model.attention: must be {WORDS}, got 'On': write auto"),
        ({"parallel": {"offload": False}}, "parallel.offload: must be 'none' or 'cpu', got false: write none"),
        ({"evaluate": {"lengths": [8, 1]}}, "evaluate.lengths.1: must be greater than or equal to 2, got 1"),
        ({"train": {"recompute": "No"}}, "train.recompute: must be false, true or 'selective', got 'No': write false"),
        ({"train": {"recompute": 1}}, "train.recompute: must be false, true or 'selective', got '1': write true"),
        ({"model": {"layers": "4"}}, "model.layers: must be a valid integer, got '4': write 4"),
        ({"model": {"layers": "010"}}, "model.layers: must be a valid integer, got '010': write 10"),
        ({"train": {"clip": "0.5"}}, "train.clip: must be a valid number, got '0.5': write 0.5"),
        ({"run": {"name": 7}}, 'run.name: must be a valid string, got 7: write "7"'),
        ({"run": {"name": UNQUOTED}}, 'run.name: must be a valid string, got 2026.1: write "2026.10"'),
        ({"run": {"name": True}}, 'run.name: must be a valid string, got true: write "true"'),
        ({"data": {"sources": []}}, "data.sources must have at least one item, got none: add one"),
        ({"run": {"name": ""}}, "run.name must not be empty: write a text"),
        ({"track": {"uri": ""}}, "track.uri must not be empty: write a text"),
        ({"data": {"dir": ""}}, "data.dir must not be empty: write a text"),
        ({"data": {"sources": [""]}}, "data.sources.0.path must not be empty: write a text"),
        ({"data": {"tokenizer": ""}}, "data.tokenizer must not be empty: write a text"),
        ({"train": {"init_from": ""}}, "train.init_from must not be empty: write a text"),
        ({"slurm": {"container": ""}}, "slurm.container must not be empty: write a text"),
        ({"slurm": {"modules": [""]}}, "slurm.modules.0 must not be empty: write a text"),
        ({"slurm": {"env": 3}}, "slurm.env: must be a map of names to values, got 3"),
        ({"data": {"sources": [3]}}, "data.sources.0 must be a path or {path: ..., weight: ...}, got 3"),
        ({"model": {"layers": 10**12}}, f"model.layers: must be less than or equal to 2000, got {10**12}"),
        (
            {"train": {"global_batch": 2**53 - 1}},
            f"train.micro_batch must divide train.global_batch ({2**53 - 1}), got 2: use a divisor of it",
        ),
        ({"train": {"steps": 10**22}}, f"train.steps: must be at most 2^53, got {10**22}"),
        ({"data": {"vocab_size": 2**53 + 1}}, f"data.vocab_size: must be at most 2^53, got {2**53 + 1}"),
        ({"evaluate": {"lengths": [10**30]}}, f"evaluate.lengths.0: must be at most 2^53, got {10**30}"),
        (
            {"model": {"hidden": 4 * (ANY_WIDTH + 1), "heads": 4}},
            f"model.attention sdpa cannot compute heads of {ANY_WIDTH + 1} (model.hidden / model.heads), only 1 to "
            f"{ANY_WIDTH}: set a smaller model.hidden or more heads",
        ),
        ({"model": {3: 1}}, "unknown key model.3: remove it"),
        (
            {"data": {"sources": [{"path": "a", "weigt": 1.0}]}},
            "unknown key data.sources.0.weigt: did you mean weight?",
        ),
    ):
        assert message_of(small_run(keys)) == f"small: {expected}"


def test_every_wrong_override_is_reported_with_the_file(tmp_path: Path) -> None:
    text = VALID.replace("heads: 4", "heads: 5")
    overrides = ["train.steps", "train.x=[", "train.steps.more=3", "model.hiden=64", "TRAIN.steps=4", "train.clip=x"]
    assert problems_of(tmp_path / "mine.yaml", text, *overrides) == [
        "--set 'train.steps' is not an override: write section.key=value",
        "--set train.x is not YAML: it ends where a value is expected: close every bracket",
        "--set 'train.steps.more=3': steps has no keys of its own: write section.key=value",
        "unknown key model.hiden: did you mean hidden?",
        "train.clip: must be a valid number, got 'x'",
        "unknown key TRAIN: did you mean train?",
        "model.heads must divide model.hidden (64), got 5: use 1, 2, 4, 8, 16, 32 or 64",
    ]
    wrong = tmp_path / "wrong.yaml"
    assert problems_of(wrong, "run: {name: a\n", "steps=3") == [
        f"{wrong}, line 2: it ends before a closing }}: add it",
        "--set 'steps=3' is not an override: write section.key=value",
    ]


def test_a_repeated_key_hides_nothing_and_invents_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = VALID.replace("  heads: 4\n", "  heads: 4\n  heads: 5\n  head: 1\n")
    assert problems_of(file, text) == [
        f"{file}, line 6: key 'heads' appears twice: remove one",
        "unknown key model.head: did you mean heads?",
        "model.heads must divide model.hidden (64), got 5: use 1, 2, 4, 8, 16, 32 or 64",
    ]
    # the keys of the first `model` are not missing
    assert problems_of(file, f"{VALID}model: {{layers: 2}}\n") == [
        f"{file}, line 8: key 'model' appears twice: remove one"
    ]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("partition", "", "slurm.partition must not be empty, got '': write a name, or remove the key"),
        ("qos", " ", "slurm.qos must not be empty, got ' ': write a name, or remove the key"),
        ("memory", "", 'slurm.memory must be a number with M, G or T, got \'\': write "500M" or "500G"'),
    ],
)
def test_an_empty_request_of_slurm_is_refused(key: str, value: str, problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        load_run("demo", overrides=[f"slurm.{key}={value!r}"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("run:\n\tname: a", "line 2: found character '\\t' that cannot start any token: indent with spaces, not tabs"),
        (
            "run:\n  name: a: b",
            "line 2: mapping values are not allowed here: indent the line like its neighbours, or quote a value with "
            "a colon in it",
        ),
        ("a: 1\n---\nb: 2", "line 2: expected a single document in the stream, but found another document"),
        (
            "a:\n  b: 1\n c: 2",
            "line 3: a line does not fit what is above it: check its indentation, quotes and brackets",
        ),
        ("a: [1, 2\nb: 3", "line 2: a comma or a closing ] is missing before ':': add it"),
        ("a: !!bool x", "is not YAML: a number is too long, or a value is not of its tag's type: quote it"),
        ("a: !!timestamp x", "is not YAML: a number is too long, or a value is not of its tag's type: quote it"),
        ("[" * 5000, "is not YAML: its brackets are nested too deeply"),
        ("a: 1\nb: \x07", "is not YAML: line 2 holds the control character '\\x07': remove it"),
    ],
)
def test_what_is_no_yaml_names_its_line(text: str, problem: str) -> None:
    assert parse_yaml(text).problems == (problem,)


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{VALID}slurm:\n  # partition: gpu\ncheckpoint:\n", encoding="utf-8")
    assert load_run(str(file)).slurm.gpus_per_node == 8
    assert problems_of(file, VALID.replace("run: {name: mine, dir: runs/mine}", "run:")) == [
        "run.name is missing: add it",
        "run.dir is missing: add it",
    ]


def test_sections_that_are_one_object_are_judged_apart(tmp_path: Path) -> None:
    text = VALID.replace(
        "run: {name: mine, dir: runs/mine}", "run: &one {name: mine, dir: runs/mine}\ncheckpoint: *one"
    )
    assert problems_of(tmp_path / "mine.yaml", text) == [
        "unknown key checkpoint.name: did you mean run.name?",
        "unknown key checkpoint.dir: did you mean run.dir or data.dir?",
    ]


def test_a_value_is_shown_as_a_run_file_holds_it() -> None:
    shown = {
        "null": None,
        "true": True,
        "'a b'": "a b",
        "1e-08": 1e-8,
        '"\\n\\n"': "\n\n",
        r"'\n'": r"\n",
        '"it\'s"': "it's",
    }
    assert {as_yaml(value): value for value in shown.values()} == shown
    for value in (*shown.values(), "é\u2028\x00", "null", "", ({"path": "a.txt", "weight": None},)):
        read = parse_yaml(as_yaml(value)).value
        assert read == (list(value) if isinstance(value, tuple) else value)
