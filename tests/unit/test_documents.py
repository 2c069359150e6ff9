"""Documents of a micro-batch: attention, positions, losses and gradients are those of each document alone."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.positions import POSITIONS, T5_BUCKETS
from configs.protocols import parse_protocol
from data_pipeline.documents import document_begins
from parallel.axes import Group
from parallel.documents import Documents, split_batch
from parallel.plan import Recompute
from tests.support.models import LAYERS, VOCABULARY, learned_bias, make_decoder
from training.evaluation.perplexity import score_windows
from training.evaluation.resampling import units_of
from training.evaluation.sums import LossSums
from training.evaluation.windows import place_windows
from training.model.attention import make_attention
from training.model.kernels import sdpa
from training.model.kernels.each_document import attend_each
from training.model.kernels.flex import Flex
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.positions.alibi import local_slopes
from training.model.positions.bias import Bias, SlopeBias
from training.model.positions.t5 import bucket_in_integers
from training.model.single import SingleModel
from training.model.windows import LosslessWindows

CPU = torch.device("cpu")
HEADS, SEQ = 3, 40
FIRSTS = ((0, 1, 17, 39), (0,), (0, 20))  # first tokens of each row's documents: some have a single token
SLOPES = local_slopes(HEADS, tensor=Group(0, 1, None))
T5_TABLE = torch.linspace(-2, 2, HEADS * T5_BUCKETS, dtype=torch.float64).view(HEADS, T5_BUCKETS)


class Own(Reference):
    """A kernel that takes documents as docs/extending.md says."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        if documents is not None:
            return attend_each(Reference, q, k, v, documents=documents, bias=self.bias)
        return super().__call__(q, k, v)


KERNELS = {"reference": Reference, "sdpa": Sdpa, "own": Own}


def begins_of(firsts: Sequence[Sequence[int]], *, seq: int) -> Tensor:
    """Return which tokens begin a document, [batch, seq]."""
    begins = torch.zeros(len(firsts), seq, dtype=torch.long)
    for row, places in zip(begins, firsts, strict=True):
        row[list(places)] = 1
    return begins


def pieces_of(firsts: Sequence[Sequence[int]], *, seq: int) -> list[tuple[slice, slice]]:
    """Return the documents: a row each, and its tokens."""
    return [
        (slice(row, row + 1), slice(first, end))
        for row, places in enumerate(firsts)
        for first, end in pairwise((*places, seq))
    ]


def bias_of(position: str, *, window: int | None = None) -> Bias:
    if position == "t5":
        learned = learned_bias(HEADS)
        learned.weight.data = T5_TABLE
        bias: Bias = learned
    else:
        bias = SlopeBias(SLOPES if position == "alibi" else None)
    bias.lossless, bias.window = LosslessWindows(), window
    return bias


def formula(q: Tensor, k: Tensor, v: Tensor, *, position: str, window: int | None) -> Tensor:
    """Return the attention of one document written out, [1, heads, tokens, head_dim]."""
    tokens = q.shape[2]
    rows = []
    for query in range(tokens):
        first = 0 if window is None else max(0, query - window + 1)
        distances = [query - key for key in range(first, query + 1)]
        scores = (k[:, :, first : query + 1] @ q[:, :, query, :, None])[..., 0] / q.shape[3] ** 0.5
        if position == "alibi":
            scores = scores - SLOPES[:, None] * torch.tensor(distances)
        if position == "t5":
            scores = scores + T5_TABLE[:, [bucket_in_integers(distance) for distance in distances]]
        rows.append((scores.softmax(-1)[..., None] * v[:, :, first : query + 1]).sum(2, keepdim=True))
    return torch.cat(rows, dim=2)


def test_documents_are_where_they_are_said_to_begin() -> None:
    begins = begins_of(FIRSTS, seq=SEQ)
    begins[1] = 0  # a row that begins inside a document, and has no other
    documents = Documents(begins, device=CPU)
    assert documents.lengths == [[1, 16, 22, 1], [40], [20, 20]]
    assert documents.ends.tolist() == [0, 1, 17, 39, 40, 80, 100, 120]
    assert documents.longest == 40
    assert not begins[1].any(), "the caller's are not changed"
    positions = documents.places(0, SEQ).index.t()
    assert positions[0].tolist() == [0, *range(16), *range(22), 0]
    assert positions[1].tolist() == list(range(40))
    assert documents.places(30, 10).index.t()[0].tolist() == [*range(13, 22), 0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("position", "window"), [("alibi", None), ("none", None), ("alibi", 5), ("none", 5), ("t5", None), ("t5", 5)]
)
def test_attention_of_documents_is_that_of_each_alone(kernel: str, position: str, window: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v, weight = torch.randn(4, 3, HEADS, SEQ, 8, dtype=torch.float64, generator=generator)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    documents = Documents(begins_of(FIRSTS, seq=SEQ), device=CPU)
    attend = KERNELS[kernel](bias_of(position, window=window))
    out = attend(*given, documents)
    alone = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.zeros_like(q)
    for row, tokens in pieces_of(FIRSTS, seq=SEQ):
        expected[row, :, tokens] = formula(*(x[row, :, tokens] for x in alone), position=position, window=window)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    ours = torch.autograd.grad(out, given, weight)
    theirs = torch.autograd.grad(expected, alone, weight)
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-12, rtol=0)
    if position != "t5":  # which it does not take; on a CPU it has no gradients
        flex = Flex(bias_of(position, window=window))(q, k, v, documents)
        torch.testing.assert_close(flex, expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 1, 100, 300])
def test_a_learned_bias_is_called_once_for_all_documents(kernel: str, window: int | None) -> None:
    """As ZeRO-3 gathers parameters by the order of modules' calls, and data ranks have other documents."""
    seq, calls = 700, []
    q, k, v, weight = torch.randn(4, 2, HEADS, seq, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for firsts in (((0, 3, 290, 291), (0, 640)), ((0,), (0,))):
        results = []
        for make in (KERNELS[kernel], Reference):
            bias = bias_of("t5", window=window)
            assert isinstance(bias, torch.nn.Module)
            bias.register_forward_hook(lambda *_: calls.append(1))
            given = [x.clone().requires_grad_() for x in (q, k, v)]
            out = make(bias)(*given, Documents(begins_of(firsts, seq=seq), device=CPU))
            results.append([out, *torch.autograd.grad(out, [*given, *bias.parameters()], weight)])
        for mine, exact in zip(*results, strict=True):
            torch.testing.assert_close(mine, exact, atol=1e-11, rtol=0)
    assert len(calls) == 4


def test_auto_and_every_kernel_that_says_so_take_documents() -> None:
    q, k, v = torch.randn(3, 3, HEADS, SEQ, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    documents = Documents(begins_of(FIRSTS, seq=SEQ), device=CPU)
    expected = Reference(bias_of("alibi"))(q, k, v, documents)
    auto = make_attention("auto", bias_of("alibi"), documents=True)
    torch.testing.assert_close(auto(q, k, v, documents), expected, atol=1e-12, rtol=0)
    assert not torch.equal(auto(q, k, v), expected)


def test_windows_of_documents_are_lossless_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "NEAR_KEYS", 32)  # so that the far keys of small documents may be left out
    firsts, seq = ((0, 700), (0, 300)), 1200
    bias = SlopeBias(torch.tensor([0.5, 0.25, 0.1], dtype=torch.float64))
    bias.lossless = LosslessWindows()
    q, k, v = torch.randn(3, 2, HEADS, seq, 8, generator=torch.Generator().manual_seed(3))
    documents = Documents(begins_of(firsts, seq=seq), device=CPU)
    out = Sdpa(bias)(q, k, v, documents)
    (density,) = bias.lossless.take()  # of the whole call: one per block and pass
    exact = Reference(bias)(q.double(), k.double(), v.double(), documents)
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=0)
    shares = []
    for row, tokens in pieces_of(firsts, seq=seq):
        alone = (x[row, :, tokens] for x in (q, k, v))
        assert torch.equal(Sdpa(bias)(*alone), out[row, :, tokens]), "bit by bit"
        length = tokens.stop - tokens.start
        shares.append(float(bias.lossless.take()[0]) * length * (length + 1) / (2 * seq * (seq + 1)))
    assert density.item() == pytest.approx(sum(shares))
    inside = sum(n * (n + 1) for n in (700, 500, 300, 900)) / (2 * seq * (seq + 1))
    assert density.item() < inside - 0.05, "windows leave something out inside of documents"


@pytest.mark.parametrize("recompute", [False, True, "selective"])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_packed_window_is_its_documents_alone(position: str, recompute: Recompute) -> None:
    decoder = make_decoder(4, position=position, recompute=recompute).double()
    tokens = torch.randint(VOCABULARY, (3, SEQ + 1), generator=torch.Generator().manual_seed(4))
    begins = begins_of(FIRSTS, seq=SEQ + 1)
    # Two micro-batches on their way: the backward pass of the first knows its own documents.
    inputs, targets, documents = split_batch(torch.stack([tokens, begins], dim=1), device=CPU)
    assert documents is not None
    loss = decoder(inputs, targets, documents=documents)
    others = decoder(inputs, targets, documents=Documents(begins.flip(1)[:, 1:], device=CPU))
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}  # type: ignore[union-attr]
    decoder.zero_grad()
    alone = torch.zeros((), dtype=torch.float64)
    for row, some in pieces_of(FIRSTS, seq=SEQ):
        share = (some.stop - some.start) / inputs.numel()
        part = decoder(inputs[row, some], targets[row, some]) * share
        part.backward()
        alone += part.detach()
    torch.testing.assert_close(loss.detach(), alone, atol=1e-12, rtol=0)
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-12, rtol=0, msg=name)
    plain = decoder(inputs, targets)
    assert (plain - loss).abs() > 1e-3, "documents are seen"
    assert others != loss
    one = Documents(begins_of(((0,),) * 3, seq=SEQ), device=CPU)
    assert torch.equal(decoder(inputs, targets, documents=one), plain), "one document is no mask"


def test_evaluation_scores_each_document_alone() -> None:
    model = SingleModel(make_decoder(4), device=CPU, certificate={})
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(1, VOCABULARY, (200,), generator=generator).numpy()
    text[[3, 40, 41, 150]] = 0  # the end of a document, which may be empty
    firsts = np.array([0, 4, 41, 42, 100, 151])  # at 100 one follows another without an end
    begins = document_begins(text, joins=firsts, end=0)
    assert begins.nonzero()[0].tolist() == [0, 3, 40, 41, 100, 150]
    for protocol in ("nonoverlapping", "sliding:7"):
        windows = place_windows(len(text), length=30, protocol=parse_protocol(protocol))
        sums = LossSums(windows, units_of(None, tokens=len(text)), attention=model.windows)
        score_windows(model, text, sums=sums, batch_tokens=60, begins=begins)
        expected = 0.0
        for start, first in zip(windows.starts.tolist(), windows.scored_from.tolist(), strict=True):
            window = torch.from_numpy(text[start : start + 31])
            places = [0, *(at for at in range(1, 30) if begins[start + at])]
            alone = [model.losses(window[None, a : b + 1])[0] for a, b in pairwise([*places, 30])]
            expected += float(torch.cat(alone)[first:].double().sum())
        assert float(sums.totals().by_unit.sum()) == pytest.approx(expected, rel=1e-6)
        assert len(sums.totals().density_by_layer) == LAYERS
        assert max(sums.totals().density_by_layer) < 0.95, "of the causal scores of whole windows"


def test_rows_without_documents_are_split_alike() -> None:
    tokens = torch.arange(22).view(2, 11)
    inputs, targets, documents = split_batch(tokens, device=CPU)
    assert documents is None
    assert torch.equal(inputs, tokens[:, :-1])
    assert torch.equal(targets, tokens[:, 1:])
