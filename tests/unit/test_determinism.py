"""`train.deterministic`: what it sets, what it says, and how it names an operation that cannot repeat."""

import os
from collections.abc import Iterator

import pytest
import torch

from configs.errors import InputError
from configs.load import load_run
from parallel.groups import lone_groups
from parallel.layers import WordEmbedding
from parallel.layout import Layout
from parallel.parameter import Shard
from parallel.start import start_alone, use_deterministic_algorithms
from training.determinism import limits_of_determinism, nondeterminism_named


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch asked for deterministic algorithms, as in a rank of such a run."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "so that it is restored")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    use_deterministic_algorithms()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_torch_cublas_and_nccl_are_asked() -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "Ring")


def test_a_cublas_setting_that_cannot_repeat_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":8:8")
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    with pytest.raises(InputError, match=r"sets CUBLAS_WORKSPACE_CONFIG to ':8:8': unset it, or use :4096:8 or :16:8"):
        use_deterministic_algorithms()
    assert not torch.are_deterministic_algorithms_enabled()
    assert "NCCL_ALGO" not in os.environ


@pytest.mark.usefixtures("deterministic")
def test_an_operation_that_cannot_repeat_is_named() -> None:
    with pytest.raises(InputError, match=r"true, but put_ has no deterministic algorithm on this device: set train"):
        with nondeterminism_named():
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), nondeterminism_named():
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.mark.usefixtures("deterministic")
def test_the_embeddings_gradient_is_that_of_indexing() -> None:
    start_alone()
    shard = Shard("embedding.word.weight", (11, 4), "vocabulary", init_std=1.0)
    embedding = WordEmbedding(shard, tensor=lone_groups().tensor)
    step, names = embedding(torch.tensor([[1, 7, 1, 1]])).grad_fn, []
    while step is not None:
        names.append(type(step).__name__)
        step = step.next_functions[0][0] if step.next_functions else None
    assert "IndexBackward0" in names
    assert "EmbeddingBackward0" not in names


def test_gpus_sum_products_of_16_bit_numbers_in_fp32() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True
    start_alone()  # as `start` does for a rank
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction


def test_what_may_differ_is_said() -> None:
    config = load_run("alibi-125m")
    on_cpu = limits_of_determinism(Layout.of(config, world_size=1), device="cpu")
    assert on_cpu.endswith(f"on this kind of CPU and with OMP_NUM_THREADS={torch.get_num_threads()}")
    alone = limits_of_determinism(Layout.of(config, world_size=1), device="cuda")
    assert "NCCL" not in alone
    many = limits_of_determinism(Layout.of(config, world_size=8), device="cuda")
    assert many == f"{alone}; NCCL may add in another order, and change the last bits, when the ranks run on other " + (
        "GPUs or nodes"
    )
