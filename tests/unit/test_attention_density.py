"""`attention_density`: the share of the scores that attention computes, in a step and in an evaluation."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.backends import BACKENDS
from configs.load import load_run
from configs.protocols import WindowProtocol, parse_protocol
from configs.schema import Model
from launch.show.model import show_report
from parallel.axes import Group
from tests.support.evaluation import measure, report_of
from tests.support.models import VOCABULARY, make_decoder
from tests.support.one_rank import OneRank, one_rank
from training.evaluation.markdown import format_table
from training.evaluation.perplexity import PerplexityResult
from training.least_density import least_density
from training.metrics_file import MetricsFile
from training.model.attention import AttentionBlock, windows_of
from training.model.kernels.flex import Flex
from training.model.kernels.sdpa import Sdpa
from training.model.positions.method import make_position
from training.model.single import SingleModel
from training.validator import Validation, Validator

LONG = 1280
NONOVERLAPPING = parse_protocol("nonoverlapping")


@pytest.fixture(scope="module")
def long_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneRank]:
    """A rank whose sequences are longer than the keys that the CPU's kernel takes in any case."""
    keys = (f"data.sequence_length={LONG}", "model.layers=2", "train.micro_batch=1", "train.global_batch=2")
    with one_rank(tmp_path_factory.mktemp("long"), *keys) as rank:
        yield rank


def model_of(*keys: str) -> Model:
    return load_run("demo", overrides=list(keys)).model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("backend", "length", "window", "most"),
    [
        ("sdpa", 64, None, 1.0),
        ("sdpa", 512, None, 1.0),  # a block's last 512 keys are computed in any case
        ("sdpa", 700, None, 0.99),
        ("sdpa", 3000, None, 0.7),
        ("sdpa", 700, 100, 0.8),
        ("sdpa", 64, 10, 1.0),
        ("flex", 1920, None, 1.0),  # shorter than the kernel looks for windows in
        ("flex", 2048, None, 0.6),
        ("flex", 700, 100, 0.6),
    ],
)
@torch.no_grad()
def test_the_least_share_is_that_of_zero_queries(
    backend: str, length: int, window: int | None, most: float, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.model.kernels.flex.flex_kernel", lambda *_: lambda q, *_, **__: q)
    model = model_of(f"model.window={'null' if window is None else window}")
    bias = make_position(model, {}, tensor=Group(0, 1, None)).bias
    zeros = torch.zeros(1, model.heads, length, 16, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    {"sdpa": Sdpa, "flex": Flex}[backend](bias)(zeros, zeros, zeros)
    assert bias.lossless is not None
    computed = float(bias.lossless.take()[0])
    device = "cpu" if backend == "sdpa" else "cuda"
    least = least_density(model, BACKENDS[backend], device=device, precision=precision, length=length)
    assert least is not None
    assert computed - 0.07 < least <= computed + 1e-6
    assert (least == 1) == (most == 1)
    assert least <= most


def test_what_computes_all_scores_has_no_least_share() -> None:
    for keys, backend, device in (
        ((), "reference", "cpu"),
        (("model.window=9",), "reference", "cpu"),
        ((), "sdpa", "cuda"),
        (("model.windows=off",), "sdpa", "cpu"),
        (("model.position=none",), "sdpa", "cpu"),
    ):
        found = least_density(model_of(*keys), BACKENDS[backend], device=device, precision="fp32", length=4096)
        assert found is None, (keys, backend)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_step_says_the_share_of_the_scores_that_it_computed(
    long_rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own calls alone: what a validation or a model's check computed before is none of them."""
    windows = windows_of(long_rank.engine.module)
    assert windows is not None
    wrong = torch.tensor(100.0)
    windows.add(wrong)
    monkeypatch.setattr(Validator, "is_due", lambda self, step: True)
    monkeypatch.setattr(Validator, "measure", lambda self: windows.add(wrong) or Validation(1.0, {}, {}))
    long_rank.start(tmp_path / "run", steps=3)
    steps = lines_of(tmp_path / "run")
    shares = [step["attention_density"] for step in steps]
    # of two heads, only the steeper one, 2^-4, leaves keys out
    assert all(0.6 < share < 0.9 for share in shares)
    least = least_density(model_of("model.heads=2"), BACKENDS["sdpa"], device="cpu", precision="fp32", length=LONG)
    assert least is not None
    assert min(shares) >= least


def test_a_late_result_has_the_share_of_its_own_step(long_rank: OneRank, tmp_path: Path) -> None:
    shares, keys = {}, ("train.steps=3", "train.decay_steps=3", "checkpoint.every=100")
    for ahead in (0, 1):
        run_dir = tmp_path / str(ahead)
        trainer = replace(long_rank.trainer(long_rank.config(run_dir, *keys)), steps_ahead=ahead)
        trainer.run([MetricsFile(run_dir, last_step=0)])
        shares[ahead] = [step["attention_density"] for step in lines_of(run_dir)]
    assert shares[0] == shares[1]


def test_an_evaluation_says_the_share_of_each_layer() -> None:
    decoder = make_decoder(4)
    blocks = [layer for layer in decoder.modules() if isinstance(layer, AttentionBlock)]
    with torch.no_grad():
        blocks[1].query_key_value.weight.mul_(30.0)  # longer queries and keys, with larger scores: it needs more
    model = SingleModel(decoder, device=torch.device("cpu"), certificate={})
    tokens = torch.randint(0, VOCABULARY, (3 * LONG,), generator=torch.Generator().manual_seed(1)).numpy()
    by_length = {
        length: measure(
            model, tokens, length=length, protocol="nonoverlapping", batch_tokens=4000, attention=model.windows
        )
        for length in (64, LONG)
    }
    assert set(by_length[64].density_by_layer) == {1.0}
    assert by_length[64].attention_density == 1.0
    first, second, *_ = by_length[LONG].density_by_layer
    assert first < second
    assert len(by_length[LONG].density_by_layer) == len(blocks)
    assert by_length[LONG].attention_density == pytest.approx(sum(by_length[LONG].density_by_layer) / len(blocks))


def test_a_report_has_the_shares_and_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [
        PerplexityResult(65_536, NONOVERLAPPING, 1_245_184, 3.25, density_by_layer=(0.251, 0.349)),
        PerplexityResult(1_024, WindowProtocol(stride=64), 1_310_000, 3.5),
    ]
    report = report_of(*results)
    assert report["results"][0]["attention_density"] == pytest.approx(0.3)
    assert report["results"][0]["attention_density_by_layer"] == [0.251, 0.349]
    assert "attention_density" not in report["results"][1]
    table = format_table(report, plot="held-out.png")
    assert "| per word | bits per byte | scores |\n" in table
    assert "| 30.0% |\n" in table
    assert table.count("| - |\n") == 1
    assert "| layer | 65,536 |\n|---:|---:|\n| 0 | 25.1% |\n| 1 | 34.9% |\n" in table
    for columns in (84, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        show_report(report, checkpoint=Path(report["checkpoint"]))
        shown = capsys.readouterr().out.splitlines()
        assert max(map(len, shown[1:])) <= columns
        assert (" 30.0%  nonoverlapping" in shown[4]) == (columns == 84), "the share is there if it fits"
    assert "scores |" not in format_table(report_of(results[1]), plot="held-out.png")
