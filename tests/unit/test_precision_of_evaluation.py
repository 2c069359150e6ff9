"""The precision that `evaluate` and `generate` compute in: what it changes, what it keeps apart, what is refused."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.errors import InputError
from configs.precisions import PRECISIONS, require_precision
from configs.schema import Model
from tests.support.command_line import Call, refused
from tests.support.compared_runs import add_report, make_run
from tests.support.evaluation import UniformModel, evaluate, measure, report_of, text_of, uniform_run
from tests.support.models import LAYERS, VOCABULARY, make_decoder, weights_of
from training.api import load
from training.evaluation.kept import checkpoint_reports, report_label
from training.evaluation.usable import find_held_out_report
from training.model.single import GPU_BATCH_TOKENS, SingleModel, free_bytes, gpu_batch_tokens, inference, load_single

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
CPU = torch.device("cpu")


def single(position: str, *, precision: str) -> SingleModel:
    """Return the same model at any precision, as it is loaded."""
    weights = weights_of(make_decoder(4, position=position))
    checkpoint: Any = SimpleNamespace(
        config=SimpleNamespace(
            model=Model(layers=LAYERS, hidden=32, heads=4, position=position),
            data=SimpleNamespace(mask_documents=False),
        ),
        vocab_size=VOCABULARY,
        slice=lambda shard, *, kind, part: weights[shard.name].detach().clone(),
    )
    return load_single(checkpoint, precision=precision)


@pytest.mark.parametrize(
    ("position", "half"), [("alibi", "bf16"), ("alibi", "fp16"), ("t5", "bf16"), ("rotary", "fp16")]
)
def test_16_bits_differ_from_fp32_by_their_rounding(position: str, half: str) -> None:
    tokens = torch.randint(0, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
    models = [single(position, precision=precision) for precision in ("fp32", half)]
    exact, rounded = (model.losses(tokens) for model in models)
    assert exact.dtype == rounded.dtype == torch.float32
    most = {"bf16": 0.5, "fp16": 0.06}[half]
    assert most / 5000 < (exact - rounded).abs().max() < most
    assert abs(float(exact.mean() - rounded.mean())) < most / 25
    assert models[1].logits(tokens).dtype == torch.float32
    (rank,) = models[1].certificate["ranks"]
    assert (rank["precision"], rank["error"] <= PRECISIONS[half].row_tolerance) == (half, True)
    assert rank["error"] > PRECISIONS["fp32"].row_tolerance, "it was measured in 16 bits"


def test_a_precision_says_how_a_gpu_multiplies() -> None:
    before = torch.get_float32_matmul_precision()
    for outside in ("high", "highest"):
        torch.set_float32_matmul_precision(outside)
        for name, products in (("fp32", "highest"), ("tf32", "high"), ("bf16", "highest"), ("fp16", "highest")):
            with inference(require_precision(name)):
                assert torch.get_float32_matmul_precision() == products
                assert torch.backends.cuda.matmul.allow_tf32 is (name == "tf32")
            assert torch.get_float32_matmul_precision() == outside
    torch.set_float32_matmul_precision(before)


def test_threads_of_two_precisions_take_turns() -> None:
    before, products, done = torch.get_float32_matmul_precision(), torch.get_float32_matmul_precision, threading.Event()
    torch.set_float32_matmul_precision("medium")
    seen: dict[str, str] = {}
    entered = {name: threading.Event() for name in ("fp32", "bf16", "tf32")}

    def compute(name: str) -> None:
        try:
            with inference(require_precision(name)):
                entered[name].set()
                assert done.wait(60)
                seen[name] = products()
                raise InputError("a call that fails")
        except InputError:
            pass

    threads = {name: threading.Thread(target=compute, args=(name,)) for name in entered}
    try:
        for name in ("fp32", "bf16"):
            threads[name].start()
            assert entered[name].wait(60), "calls that multiply alike run at once"
        threads["tf32"].start()
        assert not entered["tf32"].wait(0.2), "it would change how the others multiply"
    finally:
        done.set()
    for thread in threads.values():
        thread.join(60)
    assert seen == {"fp32": "highest", "bf16": "highest", "tf32": "high"}
    assert products() == "medium", "as it was before the first"
    torch.set_float32_matmul_precision(before)


def test_a_precision_gets_its_turn_while_others_come() -> None:
    first, waits, done = threading.Event(), threading.Event(), threading.Event()
    order: list[str] = []

    def compute(name: str, entered: threading.Event) -> None:
        waits.set()
        with inference(require_precision(name)):
            order.append(name)
            entered.set()
            assert done.wait(60)

    threads = [threading.Thread(target=compute, args=("fp32", first))]
    threads[0].start()
    assert first.wait(60)
    try:
        for name in ("tf32", "fp32"):
            waits.clear()
            threads.append(threading.Thread(target=compute, args=(name, threading.Event())))
            threads[-1].start()
            assert waits.wait(60)
            threads[-1].join(0.5)
        assert order == ["fp32"], "who comes later waits behind the call that waits"
    finally:
        done.set()
    for thread in threads:
        thread.join(60)
    assert order == ["fp32", "tf32", "fp32"]


def test_tf32_without_a_gpu_is_refused_in_one_line(
    trainshort: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("a text")
    for command in (("evaluate", "--data", "book.txt"), ("generate", "--prompt", "x")):
        message = refused(trainshort, command[0], str(OLD_RUN), *command[1:], "--precision", "tf32")
        assert message == "precision tf32 needs a GPU, and this machine has none: use fp32"
        message = refused(trainshort, command[0], str(OLD_RUN), *command[1:], "--precision", "fp8")
        assert message == "precision 'fp8' is not known: use fp32 or bf16 or fp16 or tf32 (on a GPU)"
    with pytest.raises(InputError, match="precision tf32 needs a GPU"):
        load(OLD_RUN, precision="tf32")


def test_python_and_the_command_line_take_bf16(trainshort: Call) -> None:
    model = load(OLD_RUN, precision="bf16")
    assert (model.precision, model.certificate["ranks"][0]["precision"]) == ("bf16", "bf16")
    assert load(OLD_RUN).precision == "fp32"
    answer = trainshort(
        "generate", str(OLD_RUN), "--prompt", "Once", "--greedy", "--precision", "bf16", "--tokens", "5"
    )
    assert answer.code == 0
    assert answer.out == f"{model.generate('Once', tokens=5, temperature=0)}\n"


def test_reports_of_two_precisions_are_kept_apart(
    tmp_path: Path, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, trainshort: Call
) -> None:
    class Rounded(UniformModel):
        def __init__(self, precision: str) -> None:
            self.certificate = {"ranks": [{"position": "alibi", "backend": "sdpa", "precision": precision}]}

    run_dir = uniform_run(tmp_path / "one", run_values, monkeypatch)
    monkeypatch.setattr("training.evaluation.run.load_single", lambda _, *, precision, **__: Rounded(precision))
    for lengths, precision in (((32,), "fp32"), ((64,), "bf16"), ((128,), "bf16")):
        evaluate(run_dir, lengths=lengths, protocols=("nonoverlapping",), data=None, precision=precision)
    folder = run_dir / "evaluation" / "step_0000007"
    kept = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert {label: report["precision"] for label, report in kept.items()} == {
        "held-out": "fp32",
        "held-out-bf16": "bf16",
    }
    assert [result["length"] for result in kept["held-out"]["results"]] == [32]
    assert [result["length"] for result in kept["held-out-bf16"]["results"]] == [64, 128]
    assert "- evaluated with attention sdpa in bf16\n" in (folder / "held-out-bf16.md").read_text()
    assert list(checkpoint_reports(run_dir, checkpoint="step_0000007")) == ["held-out", "held-out-bf16"]
    answer = trainshort("evaluate", str(run_dir), "--lengths", "32", "--precision", "bf16")
    assert answer.out.splitlines()[0].endswith("trained at 32 tokens, computed in bf16")
    (folder / "held-out.json").unlink()
    (run_dir / "evaluation" / "report.json").unlink()
    (run_dir / "checkpoints" / "step_0000007").mkdir()
    known = find_held_out_report(
        run_dir / "checkpoints" / "step_0000007", step=7, sha256=kept["held-out"]["weights_sha256"]
    )
    assert known is not None
    assert known.path.stem == "held-out-bf16"


def test_a_text_with_a_precisions_name_keeps_its_own_file(tmp_path: Path) -> None:
    def label(name: str, precision: str) -> str:
        report = report_of(of=text_of(1000), text_path=f"/texts/{name}")
        return report_label({**report, "data": {"name": name}, "precision": precision}, tmp_path)

    labels = [label("book.txt", "fp32"), label("book.txt", "bf16"), label("book-bf16.txt", "fp32")]
    assert labels == ["book", "book-bf16", "book-bf16-33333333"]


def test_precisions_are_never_compared_in_one_table(
    trainshort: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.comparison.plot.draw_comparison", lambda *_: None)
    for name, precision in (("a", "fp32"), ("b", "bf16")):
        add_report(make_run(Path(name)), {32: 20.0}, precision=precision)
    document = json.loads(trainshort("compare", "a", "b", "--json").out)
    assert [each["text"] for each in document["perplexity"]] == ["held-out", "held-out in bf16"]
    (note,) = (note for note in document["notes"] if "do not compare" in note)
    assert note == (
        "evaluated in precisions that differ, so their perplexities do not compare: a on held-out; b on held-out in "
        "bf16. Evaluate each in the same --precision; fp32 is the default"
    )


class Reads(TorchDispatchMode):
    """Counts the values of tensors that Python reads: each would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) == "aten._local_scalar_dense.default"
        return func(*args, **(kwargs or {}))


def test_a_length_is_measured_without_waiting_for_a_batch() -> None:
    model = SingleModel(make_decoder(4), device=CPU, certificate={})
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=1000, dtype=np.int64)
    perplexities = []
    for batch_tokens in (16, 100, 1000):
        with Reads() as reads:
            result = measure(model, tokens, length=16, protocol="nonoverlapping", batch_tokens=batch_tokens)
        assert reads.count == 0, "the sums are copied at the end, and nothing before"
        perplexities.append(result.perplexity)
    assert perplexities == pytest.approx([perplexities[0]] * 3, rel=1e-6)


def test_a_gpus_batch_is_what_fits_into_its_free_memory() -> None:
    assert gpu_batch_tokens(70 * 2**30, hidden=768, width=4) == GPU_BATCH_TOKENS
    assert gpu_batch_tokens(8 * 2**30, hidden=2048, width=4) == 32768
    assert gpu_batch_tokens(8 * 2**30, hidden=2048, width=2) == GPU_BATCH_TOKENS
    assert gpu_batch_tokens(2**20, hidden=2048, width=4) == 4


def test_memory_that_torch_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (3, 100), "memory_reserved": 50, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert free_bytes(torch.device("cuda")) == 33, "a second evaluation makes passes as large as the first one's"
