"""The loss in chunks, on tensor ranks that split the logits, equals cross entropy of whole logits in fp64.

Gradients included; with whole and with split states, a vocabulary that does not divide, and chunks that do not divide.
"""

import gc
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel import head
from parallel.axes import Group
from parallel.head import Head
from parallel.layout import padded_vocabulary
from parallel.start import ProcessRank
from tests.support.layouts import LENGTH, VOCABULARY, build, config_of, tokens_of
from tests.support.ranks import run_ranks

RANKS, HIDDEN = 3, 24
SEQ, BATCH = 12, 3
# Tokens of a chunk, which takes a power of two: one at a time; as many as only a rank with padding could hold; with a
# rest; more than there are.
CHUNKS = (1, 4, 5, 2**20)


def whole_problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return states [seq, batch, hidden], the weight [vocabulary, hidden] and targets [batch, seq]."""
    torch.manual_seed(0)
    x, weight = torch.randn(SEQ, BATCH, HIDDEN, dtype=dtype), torch.randn(VOCABULARY, HIDDEN, dtype=dtype)
    targets = torch.randint(0, VOCABULARY, (BATCH, SEQ))
    targets[:, :4] = torch.tensor([0, VOCABULARY - 1, VOCABULARY // 3, VOCABULARY // 2])
    return x, weight, targets


def expected_of(dtype: torch.dtype, *, z_loss: float = 0.0) -> dict[str, Tensor]:
    """Return losses, and the gradients of a third of their mean with the z-loss, by torch from whole logits."""
    x, weight, targets = whole_problem(dtype)
    x.requires_grad_()
    weight.requires_grad_()
    logits = x @ weight.t()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.t().flatten(), reduction="none").view(SEQ, BATCH)
    ((losses + z_loss * logits.logsumexp(-1).square()).mean() / 3).backward()
    assert x.grad is not None
    assert weight.grad is not None
    parts = {"losses": losses, "logits": logits.transpose(0, 1), "dx": x.grad, "dw": weight.grad}
    return {name: part.detach() for name, part in parts.items()}


def measure(tensor: Group, *, dtype: torch.dtype, sequence: bool, chunk: int, z_loss: float) -> dict[str, Any]:
    """Return this rank's losses, logits, and the gradients of a third of the mean loss."""
    x, whole, targets = whole_problem(dtype)
    rows = padded_vocabulary(VOCABULARY, tensor=tensor.size) // tensor.size
    first = tensor.rank * rows
    weight = torch.full((rows, HIDDEN), 9.0, dtype=dtype)  # padding, which must not matter
    real = min(VOCABULARY - first, rows)
    weight[:real] = whole[first : first + real]
    weight.requires_grad_()
    embedding = SimpleNamespace(weight=weight, padding=rows - real, vocab_start_index=first)
    if sequence:
        x = x.chunk(tensor.size)[tensor.rank].clone()
    x.requires_grad_()
    split = Head(tensor=tensor, sequence=sequence, z_loss=z_loss)
    with patch.object(head, "HEAD_CHUNK_BYTES", chunk * (rows - 1) * x.element_size()):
        loss = split.loss(embedding, x, targets)
        (loss / 3).backward()
        with torch.no_grad():
            again = split.loss(embedding, x, targets)
            losses = split.token_losses(embedding, split.gather(x), targets.t())
            logits = split.logits(embedding, x)
    assert x.grad is not None
    assert weight.grad is not None
    assert not weight.grad[real:].any(), "padding has no gradient"
    assert torch.isinf(logits[..., real:]).all(), "padding is no token"
    result = {"loss": loss.detach(), "again": again, "losses": losses, "logits": logits[..., :real]}
    return {**result, "dx": x.grad, "dw": weight.grad[:real], "rank": tensor.rank}


DTYPES = (torch.float64, torch.float32, torch.bfloat16)
Z_LOSS = 0.1
CASES = [
    *product((1, 2, 3), DTYPES, (False, True), CHUNKS, (0.0,)),
    *product((1, 2, 3), DTYPES, (False,), (4,), (Z_LOSS,)),
]


def measure_all(process: ProcessRank) -> list[dict[str, Any] | None]:
    measured: list[dict[str, Any] | None] = []
    handles = {size: dist.new_group(list(range(size))) for size in range(1, RANKS + 1)}
    for size, dtype, sequence, chunk, z_loss in CASES:
        inside = process.rank < size
        group = Group(process.rank, size, handles[size])
        case = {"dtype": dtype, "sequence": sequence, "chunk": chunk, "z_loss": z_loss}
        measured.append(measure(group, **case) if inside else None)
    return measured


@pytest.fixture(scope="module")
def measured() -> list[list[dict[str, Any] | None]]:
    return run_ranks(measure_all, ranks=RANKS)


def ranks_of(measured: list[list[dict[str, Any] | None]], index: int) -> list[dict[str, Any]]:
    return [part for part in (rank[index] for rank in measured) if part is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_split_losses_equal_torch_on_whole_logits(
    measured: list[list[dict[str, Any] | None]], dtype: torch.dtype
) -> None:
    expected_by_z = {z_loss: expected_of(dtype, z_loss=z_loss) for z_loss in (0.0, Z_LOSS)}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    close = partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance)
    for index, (size, of_case, sequence, _, z_loss) in enumerate(CASES):
        if of_case != dtype:
            continue
        expected = expected_by_z[z_loss]
        ranks = ranks_of(measured, index)
        assert len(ranks) == size
        for rank in ranks:
            for loss in (rank["loss"], rank["again"]):
                close(loss, expected["losses"].mean())
            close(rank["losses"], expected["losses"])
            if not sequence:
                close(rank["dx"], expected["dx"])
        close(torch.cat([rank["dw"] for rank in ranks]), expected["dw"])
        close(torch.cat([rank["logits"] for rank in ranks], dim=-1), expected["logits"])
        if sequence:
            close(torch.cat([rank["dx"] for rank in ranks]), expected["dx"])


def test_bf16_rounds_logits_and_nothing_more(measured: list[list[dict[str, Any] | None]]) -> None:
    x, weight, targets = whole_problem(torch.bfloat16)
    for index, (_, dtype, sequence, _, z_loss) in enumerate(CASES):
        logits = (x @ weight.t()).double().requires_grad_()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.t().flatten(), reduction="none").view(SEQ, BATCH)
        ((losses + z_loss * logits.logsumexp(-1).square()).mean() / 3).backward()
        assert logits.grad is not None
        dw = logits.grad.flatten(0, 1).t() @ x.flatten(0, 1).double()
        gradients = {"dx": logits.grad @ weight.double(), "dw": dw}
        if dtype != torch.bfloat16:
            continue
        ranks = ranks_of(measured, index)
        for rank in ranks:
            assert rank["losses"].dtype == torch.float32
            torch.testing.assert_close(rank["losses"].double(), losses.detach(), atol=1e-5, rtol=1e-5)
        whole = {"dx": torch.cat([rank["dx"] for rank in ranks]) if sequence else ranks[0]["dx"]}
        whole["dw"] = torch.cat([rank["dw"] for rank in ranks])
        for name, gradient in gradients.items():
            error = (whole[name].double() - gradient).norm() / gradient.norm()
            assert error < 2**-8, name


def train_and_list_shapes(process: ProcessRank, *, folder: Path) -> list[tuple[int, ...]]:
    """Train two steps on two stages, and return the shapes of all tensors that are still held."""
    config = config_of({"tensor": 1, "pipeline": 2, "zero": 1}, run_dir=folder)
    engine, _, layout = build(config, world_size=process.world_size)
    for step in range(2):
        engine.train_step(list(tokens_of(step).chunk(layout.micro_batches)), learning_rate=1e-3)
    return [tuple(held.shape) for held in gc.get_objects() if issubclass(type(held), Tensor)]


def test_the_pipeline_keeps_states_and_no_logits(tmp_path: Path) -> None:
    _, last = run_ranks(train_and_list_shapes, ranks=2, arguments={"folder": tmp_path})
    hidden = config_of({}, run_dir=tmp_path).model.hidden
    assert any(shape[0] == LENGTH and shape[-1] == hidden for shape in last if len(shape) == 3), "the last states"
    assert not [shape for shape in last if shape[-1:] == (VOCABULARY,)], "logits"
