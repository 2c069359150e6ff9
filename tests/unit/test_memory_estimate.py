"""The estimate of a rank's memory, what would need less, and `check --memory`."""

import json
import time
from pathlib import Path

import pytest

from configs.load import load_run
from configs.schema import RunConfig
from launch import layout_choice, machine, start_check
from parallel.layout import Layout
from tests.support.command_line import Call, refused
from training import host_memory
from training.host_memory import MemoryLimit
from training.memory import StageMemory, estimate_memory
from training.memory_activations import stage_activations
from training.memory_changes import change_lines, memory_changes
from training.memory_fit import AvailableMemory, fit_memory
from training.model.kernels.sdpa import NEAR_KEYS
from training.model.positions.bias import QUERY_BLOCK

ONE_RANK = ("parallel.tensor=1", "parallel.pipeline=1", "train.global_batch=16")


def run_of(*overrides: str) -> RunConfig:
    return load_run("alibi-1b3", overrides=list(overrides))


def stages_of(*overrides: str, ranks: int) -> tuple[StageMemory, ...]:
    config = run_of(*overrides)
    return estimate_memory(config, layout=Layout.of(config, world_size=ranks), on_gpu=True).stages


def use_gpus(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machine, start_check, layout_choice):
        monkeypatch.setattr(module, "gpu_count", lambda _: number)


def changes_of(*overrides: str, ranks: int, on_gpu: bool = True) -> list[str]:
    config = run_of(*overrides)
    return change_lines(memory_changes(config, layout=Layout.of(config, world_size=ranks), on_gpu=on_gpu))


# Torch's peak of allocated GB on one H100: bf16, ZeRO-1, two micro-batches of 8 x 1024 a step. Since then the bf16
# gradients are gone, and their largest in fp32; of the logits only a chunk is left, and the head's gradients are new.
@pytest.mark.parametrize(("attention", "position", "measured"), [("flex", "alibi", 43.3), ("sdpa", "none", 43.3)])
def test_the_estimate_is_what_an_h100_held_less_what_is_gone(attention: str, position: str, measured: float) -> None:
    tokens, hidden, vocabulary, parameters = 8 * 1024, 2048, 50_304, 1_361_987_584
    logits = (2 + 4) * tokens * vocabulary
    bf16_gradients, largest = 2 * parameters, (4 + 2) * hidden * vocabulary
    chunk, sum_in_fp32 = 2 * 2 * 2048 * vocabulary, 4 * hidden * vocabulary
    then = measured * 1e9 - logits - bf16_gradients - largest + chunk + sum_in_fp32
    (stage,) = stages_of(*ONE_RANK, f"model.attention={attention}", f"model.position={position}", ranks=1)
    assert stage.total - stage.overhead == pytest.approx(then, rel=0.03)


# The same today, of the shipped run files.
@pytest.mark.parametrize(
    ("run", "keys", "measured"),
    [
        ("alibi-1b3-80gb", [], 52.8),
        ("sinusoidal-1b3-80gb", [], 52.8),
        ("alibi-125m", [], 22.9),
        ("alibi-125m", ["train.micro_batch=32"], 13.0),
    ],
)
def test_the_estimate_is_what_an_h100_held(run: str, keys: list[str], measured: float) -> None:
    config = load_run(run, overrides=[*keys, "model.attention=flex"])
    (stage,) = estimate_memory(config, layout=Layout.of(config, world_size=1), on_gpu=True).stages
    assert stage.total - stage.overhead == pytest.approx(measured * 1e9, rel=0.03)


def test_runs_for_80_gb_fit_and_twice_the_micro_batch_does_not() -> None:
    for name in ("alibi-1b3-80gb", "sinusoidal-1b3-80gb"):
        config = load_run(name)
        more = load_run(name, overrides=[f"train.micro_batch={2 * config.train.micro_batch}"])
        (needs, twice) = (
            estimate_memory(each, layout=Layout.of(each, world_size=1), on_gpu=True).largest for each in (config, more)
        )
        assert needs < 0.75 * 80e9, name
        assert twice > 80e9, name


def test_recompute_and_split_sequences_keep_less() -> None:
    split = ("parallel.tensor=2", "parallel.pipeline=1")
    kept = [
        stages_of(*split, *more, ranks=2)[0].activations
        for more in (
            ["train.recompute=false"],
            ["parallel.sequence=true"],
            ["train.recompute=selective"],
            ["train.recompute=selective", "parallel.sequence=true"],
            ["train.recompute=true"],
        )
    ]
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("length", [128, 1024, 32_768])
def test_a_cpu_keeps_a_row_of_bias_for_far_keys(length: int) -> None:
    def activations_of(position: str) -> int:
        keys = [f"data.sequence_length={length}", "train.micro_batch=1", "train.precision=fp32"]
        config = run_of(*ONE_RANK, f"model.position={position}", *keys)
        layout = Layout.of(config, world_size=1)
        return stage_activations(config, layout, 0, on_gpu=False).kept

    rows, near = min(length, QUERY_BLOCK), min(length, NEAR_KEYS)
    assert activations_of("alibi") - activations_of("none") == 4 * 16 * (rows * near + length)


def test_ranks_share_the_state_as_the_layout_says() -> None:
    (alone,) = stages_of(*ONE_RANK, ranks=1)
    (shared,) = stages_of(*ONE_RANK, ranks=2)
    assert shared.optimizer == pytest.approx(alone.optimizer / 2, rel=1e-6)
    assert (shared.weights, shared.activations) == (alone.weights, alone.activations)
    (partitioned,) = stages_of(*ONE_RANK, "parallel.zero=3", ranks=2)
    assert partitioned.weights == pytest.approx(alone.weights / 2, rel=1e-6)
    (split,) = stages_of("parallel.tensor=2", "parallel.pipeline=1", ranks=2)
    assert alone.weights / 2 < split.weights < 0.51 * alone.weights  # norms and biases are whole
    first, last = stages_of("parallel.tensor=1", ranks=2)
    assert first.activations > 1.9 * last.activations, "two micro-batches in flight"
    assert last.head > first.head, "the logits"
    (recomputed,) = stages_of(*ONE_RANK, "train.recompute=true", ranks=1)
    assert recomputed.activations < alone.activations / 10


def test_muon_exchanges_matrices_only_where_they_are_cut() -> None:
    small = (*ONE_RANK, "train.micro_batch=1", "data.sequence_length=128", "train.precision=fp32")
    (whole, whole_without), (cut, cut_without) = (
        [
            stages_of(*small, f"parallel.zero={zero}", f"train.optimizer={name}", ranks=2)[0].buffers
            for name in ("muon", "adamw")
        ]
        for zero in (0, 1)
    )
    assert whole - whole_without == 4 * 4 * (4 * 2048**2), "fp32 values in a few copies of the largest matrix"
    assert cut - cut_without > 10 * (whole - whole_without)


def test_a_thousand_layers_on_stages_take_no_time() -> None:
    config = load_run("demo", overrides=["model.layers=1000"])
    began = time.perf_counter()
    estimate_memory(config, layout=Layout.of(config, world_size=4), on_gpu=False)
    assert time.perf_counter() - began < 2, "the split into stages is searched once a stage, not once a parameter"


def test_changes_are_in_order_legal_and_new() -> None:
    assert changes_of(*ONE_RANK, ranks=2) == [
        "train.micro_batch 8 -> 4",
        "train.recompute false -> selective or true",
        "parallel.zero 1 -> 2 or 3",
        "parallel.offload none -> cpu",
        "parallel.tensor 1 -> 2",
        "parallel.pipeline 1 -> 2",
    ]
    # one data rank has nobody to share with
    done = ("train.micro_batch=1", "train.recompute=true")
    assert changes_of(*done, ranks=4, on_gpu=False) == [
        "parallel.sequence false -> true",
        "parallel.tensor 2 -> 4, with 8 ranks",
        "parallel.pipeline 2 -> 3, with 6 ranks",
    ]
    offloaded = (*ONE_RANK, *done, "parallel.zero=3", "parallel.offload=cpu")
    assert changes_of(*offloaded, ranks=2) == ["parallel.tensor 1 -> 2"]  # ZeRO 3 is not legal with stages
    assert changes_of(*offloaded, ranks=2, on_gpu=False) == ["parallel.tensor 1 -> 2"]


def test_a_change_that_needs_more_is_left_out() -> None:
    # two stages need as much, three would take more ranks
    config = load_run("alibi-125m", overrides=["train.micro_batch=16"])
    layout = Layout.of(config, world_size=4)
    changes = memory_changes(config, layout=layout, on_gpu=True)
    assert change_lines(changes)[-1] == "parallel.pipeline 1 -> 4"
    now = estimate_memory(config, layout=layout, on_gpu=True).largest
    assert all(estimate_memory(each.config, layout=each.layout, on_gpu=True).largest < now for each in changes)
    # `check` knows no rank that ran out before the peak of the estimate: what leaves that as it is does not help
    small = load_run("demo", overrides=["parallel.pipeline=1"])
    fit = fit_memory(
        small, layout=Layout.of(small, world_size=4), available=AvailableMemory(701_000_000, "", on_gpu=False)
    )
    assert [change.key for change, _ in fit.changes] == ["parallel.tensor", "parallel.pipeline"]
    assert all(then.largest < fit.estimate.largest for _, then in fit.changes)


def test_check_says_what_fits_and_what_to_change(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.process_time()
    fits = trainshort("check", "alibi-1b3", "--memory", "--gpu-memory-gb", "80")
    assert fits.code == 0
    assert "estimated for 4 ranks (tensor x pipeline; see --ranks)" in fits.out
    assert "it fits a GPU of 80.0 GB (--gpu-memory-gb)" in fits.out
    assert time.process_time() - began < 2
    does_not = trainshort("check", "alibi-1b3", "--memory", "--gpu-memory-gb", "14", "--ranks", "8").out
    assert "it does not fit a GPU of 14.0 GB" in does_not
    words = (
        "train.micro_batch 8 -> 4: ",
        "parallel.sequence",
        "train.recompute false -> selective: ",
        "parallel.tensor",
        "or use a GPU",
    )
    assert [does_not.index(word) for word in words] == sorted(does_not.index(word) for word in words)
    assert all(len(line) <= 80 for line in does_not[does_not.index("memory of a rank") :].splitlines())

    use_gpus(0, monkeypatch)
    monkeypatch.setattr(host_memory, "host_limit", lambda: MemoryLimit(20 * 10**9, "this machine's memory"))
    values = json.loads(trainshort("check", "alibi-1b3", "--memory", "--json").out)["memory"]
    assert (values["device"], values["available"], values["fits"]) == ("cpu", 5 * 10**9, False)
    assert values["largest"] == max(stage["total"] for stage in values["stages"])
    assert values["changes"][0]["key"] == "train.micro_batch"

    monkeypatch.setattr(machine, "gpu_bytes", lambda environ: None)
    use_gpus(8, monkeypatch)
    unknown = trainshort("check", "alibi-1b3", "--memory").out
    assert "whether it fits is not known" in unknown
    assert "estimated for 8 ranks (this machine's GPUs; see --ranks)" in unknown, "as many as train starts"
    assert "estimated for 4 ranks\n" in trainshort("check", "alibi-1b3", "--memory", "--ranks", "4").out
    use_gpus(1, monkeypatch)  # a run for another machine
    assert "estimated for 4 ranks (tensor x pipeline; " in trainshort("check", "alibi-1b3", "--memory").out


def test_nothing_is_advised_where_libraries_alone_need_more(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    check = ("check", "demo", "--memory")
    too_small = trainshort(*check, "--gpu-memory-gb", "1.5")
    assert too_small.out.endswith(
        "\nit does not fit a GPU of 1.50 GB (--gpu-memory-gb)\nPython and libraries alone take 1.50 GB of a rank's "
        "memory\nuse a GPU with more memory\nevaluate: 5.27 MB of weights in one process, which leaves no room\n"
    )
    assert "\nto need less memory, change " in trainshort(*check, "--gpu-memory-gb", "1.51").out
    use_gpus(0, monkeypatch)
    monkeypatch.setattr(host_memory, "host_limit", lambda: MemoryLimit(2 * 10**9, "this machine's memory"))
    shared = trainshort(*check).out
    assert (
        "\nPython and libraries alone take 700 MB of a rank's memory\nuse a machine with more memory, or fewer"
        in shared
    )
    values = json.loads(trainshort(*check, "--json").out)["memory"]
    assert (values["available"], values["fits"], values["changes"]) == (5 * 10**8, False, [])


def test_check_says_whether_the_evaluation_fits(trainshort: Call) -> None:
    """A chain of jobs comes to it when all is trained."""
    check = ("check", "bloom-176b", "--memory", "--gpu-memory-gb", "80")
    assert trainshort(*check).out.endswith("\nevaluate: 46.2 GB of weights on each of 16 ranks, which fits\n")
    one = ("--set", "evaluate.tensor=1", "--set", "evaluate.pipeline=1")
    assert trainshort(*check, *one).out.endswith(
        "\nevaluate: 705 GB of weights in one process, which leaves no room\n"
        "  raise evaluate.tensor or evaluate.pipeline\n"
    )
    weights = 4 * 176_244_404_224
    whole = json.loads(trainshort(*check, *one, "--json").out)["memory"]["evaluation"]
    assert whole == {"ranks": 1, "weights": weights, "fits": False}
    split = json.loads(trainshort(*check, "--json").out)["memory"]["evaluation"]
    assert weights / 16 < split["weights"] < 1.05 * weights / 16, "both stages have the embedding"
    assert (split["ranks"], split["fits"]) == (16, True)


def test_check_says_that_a_simpler_layout_fits(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    check = ("check", "alibi-1b3", "--memory", "--gpu-memory-gb")
    said = trainshort(*check, "80").out
    assert "\ntensor 1 x pipeline 1 would fit too, and each split costs speed: it needs " in said
    assert "\n  --set parallel.tensor=1 --set parallel.pipeline=1\n" in said
    simpler = json.loads(trainshort(*check, "80", "--json").out)["memory"]["simpler"]
    assert simpler["set"] == ["parallel.tensor=1", "parallel.pipeline=1"]
    now = ("check", "alibi-1b3", "--set", "parallel.tensor=1", "--set", "parallel.pipeline=1", "--memory", "--json")
    values = json.loads(trainshort(*now, "--gpu-memory-gb", "80", "--ranks", "4").out)["memory"]
    assert (values["largest"], values["simpler"]) == (simpler["largest"], None)
    # the fewest splits that fit with a margin, and that are legal
    some = json.loads(trainshort(*check, "31", "--json").out)["memory"]["simpler"]
    assert some["set"] == ["parallel.pipeline=1"]
    assert json.loads(trainshort(*check, "18", "--json").out)["memory"]["simpler"] is None
    uneven = json.loads(trainshort(*check, "80", "--set", "train.global_batch=16", "--json").out)["memory"]
    assert uneven["simpler"]["set"] == ["parallel.pipeline=1"], "16 samples are 8 for each of 2 data ranks, not of 4"
    split = (*check, "80", "--set", "parallel.sequence=true", "--json")
    assert json.loads(trainshort(*split).out)["memory"]["simpler"]["set"][-1] == "parallel.sequence=false"
    assert "would fit" not in trainshort("check", "alibi-1b3").out
    monkeypatch.setattr(layout_choice, "gpu_bytes", lambda environ: 80 * 10**9)
    use_gpus(4, monkeypatch)
    assert "note: tensor 1 x pipeline 1 would fit too" in trainshort("check", "alibi-1b3").out


def test_a_long_validation_counts_and_may_be_left_out(trainshort: Call) -> None:
    check = ("check", "alibi-1b3-80gb", "--memory", "--gpu-memory-gb", "80", "--json", "--set")
    usual, long = (
        json.loads(trainshort(*check, f"evaluate.validation_lengths={lengths}").out)["memory"]
        for lengths in ([2048], [2048, 2**20])
    )
    assert (usual["stages"][0]["validation"], usual["fits"], usual["changes"]) == (0, True, [])
    # 17 states of 2^20 tokens in bf16, in place of activations and of the gradients of the head
    (stage,) = long["stages"]
    states = 17 * 2 * 2**20 * 2048
    held = sum(stage[part] for part in ("weights", "gradients", "optimizer", "buffers"))
    assert held + states == pytest.approx(stage["total"] - stage["overhead"], rel=0.01)
    first = {"key": "evaluate.validation_lengths", "old": "[2048, 1048576]", "new": "[2048]", "ranks": 1}
    assert long["changes"][0] == {**first, "largest": usual["largest"]}
    assert long["fits"] is False


def test_offloaded_state_must_fit_the_machine(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    # 4.55 GB of each rank
    check = ("check", "alibi-1b3", "--memory", "--set", "parallel.offload=cpu", "--ranks")
    monkeypatch.setattr(machine, "gpu_bytes", lambda environ: 80 * 10**9)
    monkeypatch.setattr(host_memory, "host_limit", lambda: MemoryLimit(15 * 10**9, "this machine's memory"))
    use_gpus(4, monkeypatch)
    too_much = trainshort(*check, "4").out
    assert "for 4 ranks that exceeds 15.0 GB, this machine's memory\n" in too_much
    assert "\nset parallel.offload to none, or use a machine with more memory\n" in too_much
    values = json.loads(trainshort(*check, "4", "--json").out)["memory"]
    assert (values["fits"], values["host_available"], values["changes"]) == (False, 15 * 10**9, [])
    use_gpus(2, monkeypatch)  # the other ranks are on another machine
    fits = trainshort(*check, "4").out
    assert "for 2 ranks that is within 15.0 GB" in fits
    assert "\nit fits this machine's GPU of 80.0 GB" in fits
    other = trainshort(*check, "4", "--gpu-memory-gb", "80").out
    assert "whether its machine has that for each rank is not checked\n" in other
    # nor does a change fit that offloads more than there is
    monkeypatch.setattr(machine, "gpu_bytes", lambda environ: 16 * 10**9)
    use_gpus(4, monkeypatch)
    change = next(line for line in trainshort("check", "alibi-1b3", "--memory").out.splitlines() if "-> cpu" in line)
    assert not change.endswith("which fits")


def test_copies_of_a_save_in_the_background_count(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    # 4.55 GB of weights and moments on each of four ranks; of two data ranks one takes two of the three kinds: 3.03 GB
    check = ("check", "alibi-1b3", "--memory", "--set", "checkpoint.background=true")
    monkeypatch.setattr(machine, "gpu_bytes", lambda environ: 80 * 10**9)
    monkeypatch.setattr(host_memory, "host_limit", lambda: MemoryLimit(15 * 10**9, "this machine's memory"))
    use_gpus(4, monkeypatch)
    too_much = trainshort(*check).out
    assert "  and 4.55 GB of its machine's memory (checkpoint.background)\n" in too_much
    assert "\nset checkpoint.background to false, or use a machine with more memory\n" in too_much
    both = trainshort(*check, "--set", "parallel.offload=cpu").out
    assert "  and 9.09 GB of its machine's memory (parallel.offload, checkpoint.background)\n" in both
    use_gpus(8, monkeypatch)
    shared = json.loads(trainshort(*check, "--ranks", "8", "--json").out)["memory"]
    assert shared["copies"] == pytest.approx(3.03e9, rel=0.01)
    # all kinds of four slices are 18.2 GB, of the whole model, however many data ranks it has, 16.3 GB
    for layout, size in (((), 18.2), (("parallel.tensor=1", "parallel.pipeline=1"), 16.4)):
        sets = [word for key in layout for word in ("--set", key)]
        for limit, verb in ((size + 0.1, "is within"), (size - 0.2, "exceeds")):
            held = MemoryLimit(int(limit * 1e9), "this machine's memory")
            monkeypatch.setattr(host_memory, "host_limit", lambda held=held: held)
            assert f"for 8 ranks that {verb} " in trainshort(*check, "--ranks", "8", *sets).out, (layout, limit)
    assert changes_of("checkpoint.background=true", ranks=4, on_gpu=False)[0] == "checkpoint.background true -> false"
    assert not any("checkpoint" in change for change in changes_of("checkpoint.background=true", ranks=4))


def test_check_refuses_options_that_mean_nothing(folder: Path, trainshort: Call) -> None:
    assert "add --memory" in refused(trainshort, "check", "demo", "--gpu-memory-gb", "80")
    assert "add --memory" in refused(trainshort, "check", "demo", "--ranks", "4")
    assert "must be a multiple of" in refused(trainshort, "check", "demo", "--memory", "--ranks", "3")
    for value in ("0", "-80", "nan", "inf", "80GB", ""):
        assert "must be a number of GB above 0" in refused(
            trainshort, "check", "demo", "--memory", f"--gpu-memory-gb={value}"
        )
