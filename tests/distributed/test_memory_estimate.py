"""The estimate of a rank's memory is what its tensors take: weights, gradients, optimizer, activations, logits."""

from pathlib import Path

import pytest
import torch

from parallel import zero
from parallel.groups import make_groups
from parallel.layout import Layout
from parallel.start import ProcessRank
from tests.support.layouts import config_of, save, tokens_of
from tests.support.memory import PeakBytes
from tests.support.ranks import run_ranks, start_again
from training.build import build_engine
from training.checkpoint.rank_part import BackgroundWriter
from training.memory import estimate_memory

RANKS, BUCKET, LENGTH, VOCABULARY = 4, 500_000, 272, 4096  # more than one block of queries
MORE = (
    "model.layers=4",
    "model.hidden=256",
    "model.heads=4",
    f"data.sequence_length={LENGTH}",
    f"data.vocab_size={VOCABULARY}",
    "train.micro_batch=1",
    "train.global_batch=4",
)
RECOMPUTE, SELECTIVE, SEQUENCE = "train.recompute=true", "train.recompute=selective", "parallel.sequence=true"
MUON, GATE = "train.optimizer=muon", "model.family=jais"
BF16 = "train.precision=bf16"
FP16 = ("train.precision=fp16", "data.sequence_length=64")  # in which CPUs multiply slowly
# at 64 times the training length, or 16
VALIDATED = ("data.sequence_length=64", "evaluate.every=1", "evaluate.samples=4")
LONG, LESS_LONG = ((*VALIDATED, f"evaluate.validation_lengths=[{length}]") for length in (4096, 1024))
TWO = "train.global_batch=2"  # micro-batches of one data rank: without stages, more of them hold no more
CASES: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "zero 2": ({"tensor": 1, "pipeline": 1, "zero": 2}, ()),
    "zero 3": ({"tensor": 1, "pipeline": 1, "zero": 3}, ()),
    "zero 1, bf16": ({"tensor": 1, "pipeline": 1, "zero": 1}, (BF16,)),
    "zero 1, fp16": ({"tensor": 1, "pipeline": 1, "zero": 1}, FP16),
    "zero 1, fp16, two micro-batches": ({"tensor": 1, "pipeline": 1, "zero": 1}, (*FP16, "train.global_batch=8")),
    "tensor 2": ({"tensor": 2, "pipeline": 1, "zero": 1}, ()),
    "saved in the background": ({"tensor": 4, "pipeline": 1, "zero": 1}, ("checkpoint.background=true", TWO)),
    "pipeline 2": ({"tensor": 1, "pipeline": 2, "zero": 1}, ()),
    "tensor 2 x pipeline 2, recompute": ({"tensor": 2, "pipeline": 2, "zero": 1}, (RECOMPUTE,)),
    "one data rank": ({"tensor": 4, "pipeline": 1, "zero": 1}, (TWO,)),
    "one data rank, one micro-batch": ({"tensor": 4, "pipeline": 1, "zero": 1}, ("train.global_batch=1",)),
    "one data rank, bf16": ({"tensor": 4, "pipeline": 1, "zero": 1}, (BF16, TWO)),
    "selective": ({"tensor": 2, "pipeline": 1, "zero": 1}, (SELECTIVE,)),
    "sequence": ({"tensor": 4, "pipeline": 1, "zero": 1}, (SEQUENCE, "train.global_batch=1", "train.micro_batch=1")),
    "sequence, selective": ({"tensor": 2, "pipeline": 2, "zero": 1}, (SEQUENCE, SELECTIVE)),
    "muon, zero 3": ({"tensor": 2, "pipeline": 1, "zero": 3}, (MUON,)),
    "muon, bf16": ({"tensor": 1, "pipeline": 2, "zero": 1}, (MUON, BF16)),
    "muon, one data rank": ({"tensor": 4, "pipeline": 1, "zero": 1}, (MUON,)),
    "gate": ({"tensor": 2, "pipeline": 1, "zero": 1}, (GATE,)),
    "gate, sequence": ({"tensor": 4, "pipeline": 1, "zero": 1}, (GATE, SEQUENCE, "train.global_batch=1")),
    "gate, sequence, selective": ({"tensor": 2, "pipeline": 2, "zero": 1}, (GATE, SEQUENCE, SELECTIVE)),
    "reference": ({"tensor": 2, "pipeline": 1, "zero": 1}, ("model.attention=reference",)),
    "validation, zero 3": ({"tensor": 1, "pipeline": 1, "zero": 3}, LONG),
    "validation, bf16": ({"tensor": 1, "pipeline": 1, "zero": 1}, (*LONG, BF16)),
    "validation, tensor 2 x pipeline 2": ({"tensor": 2, "pipeline": 2, "zero": 1}, LONG),
    "validation, sequence": ({"tensor": 4, "pipeline": 1, "zero": 1}, (*LONG, SEQUENCE)),
    "validation, reference": ({"tensor": 2, "pipeline": 1, "zero": 1}, (*LESS_LONG, "model.attention=reference")),
}


def measure_training(process: ProcessRank, *, folder: Path) -> dict[str, tuple[int, int]]:
    """Return the most bytes of tensors that this rank held in each case, and the estimate of them."""
    zero.REDUCE_BUCKET = BUCKET  # its size is fixed: here it would be larger than the model
    measured = {}
    for number, (name, (keys, more)) in enumerate(CASES.items()):
        start_again(process, number=number)
        config = config_of(keys, run_dir=folder, more=(*MORE, *more))
        layout = Layout.of(config, world_size=process.world_size)
        groups = make_groups(layout)
        length = config.data.sequence_length
        batches = [tokens_of(number, samples=1, length=length) for _ in range(layout.micro_batches)]
        with PeakBytes() as memory:
            engine, _ = build_engine(
                config, layout=layout, groups=groups, vocab_size=VOCABULARY, device=torch.device("cpu")
            )
            engine.train_step(batches, learning_rate=1e-3)
            if config.checkpoint.background:
                writer = BackgroundWriter()
                places = {"groups": groups, "tokenizer": folder / "tokenizer.model"}
                save(engine, config, **places, step=number, background=writer)
            memory.forget_peak()
            engine.train_step(batches, learning_rate=1e-3)
            for length in config.validation_lengths:
                passes = 3 if layout.pipeline > 1 else 1
                engine.mean_loss([tokens_of(number, samples=1, length=length) for _ in range(passes)])
        stage = estimate_memory(config, layout=layout, on_gpu=False, bucket=BUCKET).stages[groups.pipeline.rank]
        measured[name] = (memory.peak, stage.total - stage.overhead)
    return measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[int, int]]]:
    """Bytes of each case, measured and estimated, by rank."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "tokenizer.model").write_bytes(b"no test here reads it")
    return run_ranks(measure_training, ranks=RANKS, arguments={"folder": folder})


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_training_holds(measured: list[dict[str, tuple[int, int]]], case: str) -> None:
    for peak, estimate in (rank[case] for rank in measured):
        assert estimate == pytest.approx(peak, rel=0.1)
