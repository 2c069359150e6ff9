"""Wrong run files and their messages."""

import copy
from typing import Any

import pytest

from configs.errors import InputError
from configs.load import check_run


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    copied = copy.deepcopy(values)
    for where, value in changes.items():
        section, key = where.split(".")
        copied.setdefault(section, {})[key] = value
    return copied


def message_of(values: dict[str, Any], changes: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        check_run(changed(values, changes), name="small")
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("model.head", 4, "unknown key model.head: did you mean heads?"),
        ("model.zzz", 4, "unknown key model.zzz: remove it"),
        ("model.layers", "four", "model.layers: must be a valid integer, got 'four'"),
        ("model.layers", 4.0, "model.layers: must be a valid integer, got 4.0"),
        ("model.layers", True, "model.layers: must be a valid integer, got true"),
        ("model.layers", 0, "model.layers: must be greater than or equal to 1, got 0"),
        (
            "model.position",
            "alibbi",
            "model.position: must be 'alibi', 'sinusoidal', 'rotary', 't5', 'kerple', 'sandwich' or 'none', got",
        ),
        ("model.dropout", 1.0, "model.dropout: must be less than 1, got 1.0"),
        ("train.learning_rate", float("nan"), "train.learning_rate must be a finite number, got nan"),
        ("train.learning_rate", float("inf"), "train.learning_rate must be a finite number, got inf"),
        ("train.learning_rate", 0.0, "train.learning_rate: must be greater than 0, got 0.0"),
        ("train.learning_rate", "fast", "train.learning_rate: must be a valid number, got 'fast'"),
        ("train.deterministic", "on", "train.deterministic: must be true or false, got 'on'"),
        ("data.sources", "text.txt", "data.sources must be a list, got 'text.txt': write ['text.txt']"),
        ("data.sources", [], "data.sources must have at least one item, got none: add one"),
        ("data.sources", [3], "data.sources.0 must be a path or {path: ..., weight: ...}, got 3"),
        ("data.sources", [{"path": "a", "wait": 1.0}], "unknown key data.sources.0.wait"),
        ("data.vocab_size", 200, "data.vocab_size: must be greater than or equal to 300, got 200"),
        ("parallel.zero", 4, "parallel.zero: must be less than or equal to 3, got 4"),
        ("run.name", "a b", "run.name: string should match pattern"),
        ("slurm.time", 5400, "slurm.time must be hours:minutes:seconds in quotes, got 5400: write "),
        ("slurm.time", "90", "slurm.time must be hours:minutes:seconds in quotes, got 90: write "),
        ("slurm.time", "24:00", "slurm.time must be hours:minutes:seconds in quotes, got 24:00: write "),
        ("slurm.time", "soon", "slurm.time must be hours:minutes:seconds in quotes, got soon: write "),
        ("slurm.time", True, "slurm.time: must be a valid string, got true"),
        ("slurm.env", {"A": True}, "slurm.env.A: must be a valid string, got true"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_seen(
    run_values: dict[str, Any], where: str, value: Any, message: str
) -> None:
    seen = message_of(run_values, {where: value})
    assert seen.startswith(f"small: {message}")
    assert "\n" not in seen


def test_missing_keys_are_named(run_values: dict[str, Any]) -> None:
    del run_values["train"]["steps"]
    del run_values["model"]
    with pytest.raises(InputError) as caught:
        check_run(run_values, name="small")
    assert str(caught.value) == ("small has 2 problems:\n  model is missing: add it\n  train.steps is missing: add it")


def test_a_section_that_is_not_a_mapping_is_refused(run_values: dict[str, Any]) -> None:
    run_values["train"] = 3
    with pytest.raises(InputError, match="small: train: .*got 3"):
        check_run(run_values, name="small")


RULES = [
    (
        {"model.position": "rotary", "model.hidden": 60},
        "model.hidden / model.heads must be even for rotary positions, got 15: use fewer heads",
    ),
    ({"model.hidden": 66}, "model.heads must divide model.hidden (66), got 4: use 1, 2, 3, 6, 11, 22, 33 or 66"),
    (
        {"parallel.tensor": 3},
        "parallel.tensor must divide model.heads (4), got 3: use 1, 2 or 4\n"
        "  parallel.tensor must divide model.feed_forward (256), "
        "got 3: use 1, 2, 4, 8, 16, 32, 64, 128 or 256",
    ),
    (
        {"evaluate.tensor": 8, "evaluate.pipeline": 5, "data.vocab_size": 300},
        "evaluate.tensor must divide model.heads (4), got 8: use 1, 2 or 4\n"
        "  evaluate.pipeline must be at most model.layers (4), got 5: use 4 stages or fewer",
    ),
    (
        {"model.feed_forward": 101},
        "parallel.tensor must divide model.feed_forward (101), got 2: use 1 or 101",
    ),
    (
        {"model.layers": 1},
        "parallel.pipeline must be at most model.layers (1), got 2: use 1 stages or fewer",
    ),
    (
        {"parallel.zero": 2},
        "parallel.zero must be 1 with pipeline stages (parallel.pipeline is 2), got 2: DeepSpeed's pipeline refuses "
        "ZeRO 2 and 3 and clips wrongly at ZeRO 0; set parallel.zero to 1, or parallel.pipeline to 1",
    ),
    (
        {"parallel.zero": 0},
        "parallel.zero must be 1 with pipeline stages (parallel.pipeline is 2), got 0: DeepSpeed's pipeline refuses "
        "ZeRO 2 and 3 and clips wrongly at ZeRO 0; set parallel.zero to 1, or parallel.pipeline to 1",
    ),
    (
        {"parallel.tensor": 32, "model.heads": 32, "model.hidden": 64, "data.vocab_size": 310, "parallel.pipeline": 1},
        "parallel.tensor 32 leaves a rank without any of the 310 tokens of data.vocab_size: use fewer tensor ranks, or "
        "a larger vocabulary",
    ),
    (
        {"parallel.sequence": True, "data.sequence_length": 33},
        "data.sequence_length must be a multiple of parallel.tensor (2) with parallel.sequence true, got 33: use 32, "
        "or set parallel.sequence to false",
    ),
    (
        {"parallel.zero": 0, "parallel.pipeline": 1, "train.precision": "bf16"},
        "parallel.zero must be 1 or more with train.precision bf16, got 0: ZeRO keeps the fp32 master weights",
    ),
    (
        {"data.sources": ["a", {"path": "b", "weight": 1.0}]},
        "data.sources must all have a weight or none, got 1 of 2 with one: write each as {path: ..., weight: ...}",
    ),
    (
        {"train.micro_batch": 3},
        "train.micro_batch must divide train.global_batch (8), got 3: use 1, 2, 4 or 8",
    ),
    (
        {"train.warmup_steps": 10},
        "train.warmup_steps must be less than the schedule's steps (10), got 10: lower it or set train.decay_steps "
        "(that of RUN_DIR/config.yaml, if the run has started)",
    ),
    (
        {"train.warmup_steps": 10, "train.decay_steps": 9},
        "train.warmup_steps must be less than the schedule's steps (9), got 10: lower it or raise train.decay_steps",
    ),
    (
        {"train.min_learning_rate": 0.1},
        "train.min_learning_rate must be at most train.learning_rate (0.008), got 0.1: lower it",
    ),
    (
        {"evaluate.protocols": ["overlapping"]},
        "evaluate.protocols has 'overlapping': use nonoverlapping, sliding:STRIDE or last:TOKENS",
    ),
    (
        {"evaluate.protocols": ["sliding:08"]},
        "evaluate.protocols has 'sliding:08': use nonoverlapping, sliding:STRIDE or last:TOKENS",
    ),
    (
        {"evaluate.protocols": ["sliding:0"]},
        "evaluate.protocols has 'sliding:0': use nonoverlapping, sliding:STRIDE or last:TOKENS",
    ),
    (
        {"evaluate.protocols": ["sliding:33"]},
        "evaluate.protocols has 'sliding:33', a stride over the shortest evaluated length (32): use at most that",
    ),
    (
        {"evaluate.protocols": ["last:33"]},
        "evaluate.protocols has 'last:33', more tokens than the shortest evaluated length (32): use at most that",
    ),
    (
        {"evaluate.every": 5, "data.split": 0.0},
        "evaluate.every is 5 but data.split is 0, so nothing is held out: set data.split to 0.02",
    ),
    (
        {
            "evaluate.validation_lengths": [64],
            "evaluate.by_source": True,
            "data.sources": [{"path": "a.txt", "weight": 1.0}],
        },
        "evaluate.validation_lengths is [64] but evaluate.every is 0, so nothing is validated: set evaluate.every to "
        "the steps between two validations\n"
        "  evaluate.by_source is true but evaluate.every is 0, so nothing is validated: set evaluate.every to "
        "the steps between two validations",
    ),
    (
        {"evaluate.validation_lengths": [64, 96], "evaluate.every": 5, "data.split": 0.1},
        "data.sequence_length and evaluate.validation_lengths must divide the longest of them (96), got 64: the same "
        "text is cut into each length, so use multiples such as 64 and 128",
    ),
    (
        {"evaluate.validation_lengths": [3, 96], "parallel.sequence": True, "evaluate.every": 5, "data.split": 0.1},
        "with parallel.sequence, parallel.tensor (2) must divide evaluate.validation_lengths, got 3: use multiples",
    ),
    (
        {"evaluate.by_source": True, "evaluate.every": 5, "data.split": 0.1},
        "evaluate.by_source is true but not all of data.sources have a weight: without weights they are prepared as "
        "one; write each as {path: ..., weight: ...}, or set it to false",
    ),
    (
        {"track.tags": {"team/a b": "1", "ticket#5": "1"}},
        "track.tags has 'ticket#5', which MLflow refuses as the name of a tag: use at most 250 letters, digits, blanks "
        "and _ - . : /",
    ),
    (
        {"slurm.env": {"NOT A NAME": "1"}},
        "slurm.env has 'NOT A NAME', which cannot name an environment variable: use letters, digits and _",
    ),
    ({"slurm.extra": ["exclusive"]}, "slurm.extra has 'exclusive': write one option per line, as in --exclusive"),
    ({"slurm.extra": ["--a\nrm"]}, "slurm.extra has '--a\\nrm': write one option per line, as in --exclusive"),
    (
        {"slurm.extra": ["--exclusive -J mine"]},
        "slurm.extra has '--exclusive -J mine', but job names come from run.name: set that and remove the option",
    ),
    (
        {"slurm.time": "0:02:00"},
        "slurm.signal_seconds must be less than slurm.time (0:02:00, 120 seconds), got 120: lower it or raise "
        "slurm.time",
    ),
    ({"slurm.memory": "500"}, 'slurm.memory must be a number with M, G or T, got \'500\': write "500M" or "500G"'),
    ({"slurm.memory": 500}, 'slurm.memory must be a number with M, G or T, got \'500\': write "500M" or "500G"'),
    (
        {"slurm.mounts": ["/scratch"]},
        "slurm.mounts is ['/scratch'] but slurm.container is not set: set it or remove slurm.mounts",
    ),
    ({"slurm.setup": ["a\nb"]}, "slurm.setup must be one line, got 'a\\nb': remove the line break"),
    ({"slurm.qos": "a\nb"}, "slurm.qos must be one line, got 'a\\nb': remove the line break"),
    (
        {"model.position": "sinusoidal", "model.hidden": 63, "model.heads": 1, "parallel.tensor": 1},
        "model.hidden must be even for sinusoidal positions, got 63: use 64",
    ),
]


@pytest.mark.parametrize(("changes", "message"), RULES)
def test_a_broken_rule_says_what_was_seen_and_what_to_do(
    run_values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    seen = message_of(run_values, changes)
    assert seen in (f"small: {message}", f"small has {message.count(chr(10)) + 1} problems:\n  {message}")


def test_offload_needs_state_that_zero_keeps(run_values: dict[str, Any]) -> None:
    values = {"parallel.pipeline": 1, "parallel.zero": 0, "parallel.offload": "cpu"}
    message = "parallel.zero must be 1 or more with parallel.offload cpu, got 0: ZeRO keeps the state that is offloaded"
    assert message_of(run_values, values) == f"small: {message}"


def test_overlap_needs_gradients_in_one_buffer(run_values: dict[str, Any]) -> None:
    values = {"parallel.overlap": True, "train.precision": "bf16"}
    load_problems = (
        ({"train.precision": "fp32"}, "fp32, 1 and none"),
        ({"parallel.pipeline": 1, "parallel.zero": 2}, "bf16, 2 and none"),
        ({"parallel.offload": "cpu"}, "bf16, 1 and cpu"),
    )
    for more, got in load_problems:
        message = (
            "parallel.overlap true needs train.precision bf16, parallel.zero 1 and parallel.offload none, got "
            f"{got}: set it to false"
        )
        assert message_of(run_values, {**values, **more}) == f"small: {message}"


def test_all_problems_come_at_once(run_values: dict[str, Any]) -> None:
    in_the_schema = message_of(run_values, {"model.layers": "x", "train.steps": 0, "data.colour": 1})
    assert in_the_schema.splitlines()[0] == "small has 3 problems:"
    between_keys = message_of(run_values, {"parallel.tensor": 3, "train.micro_batch": 3, "train.warmup_steps": 99})
    assert between_keys.splitlines()[0] == "small has 4 problems:"
    assert all(line.startswith("  ") for line in between_keys.splitlines()[1:])


def test_a_number_is_the_text_of_an_environment_variable(run_values: dict[str, Any]) -> None:
    run_values["slurm"] = {"env": {"OMP_NUM_THREADS": 4, "RATIO": 0.5, "NAME": "x"}}
    env = check_run(run_values, name="small").slurm.env
    assert env == {"OMP_NUM_THREADS": "4", "RATIO": "0.5", "NAME": "x"}


def test_defaults_follow_the_training_length(run_values: dict[str, Any]) -> None:
    assert check_run(run_values, name="small").evaluation_lengths == (32, 64, 128, 256)
    lengths = changed(run_values, {"evaluate.lengths": [7]})
    assert check_run(lengths, name="small").evaluation_lengths == (7,)
