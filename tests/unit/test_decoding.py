"""Decoding a token with fixed shapes equals the ordinary cache, uncaptured and with a stand-in for a captured graph."""

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice

import pytest
import torch
from torch import Tensor

from configs.positions import POSITIONS
from tests.support.models import VOCABULARY, make_wandering_decoder
from training.generation import continue_tokens
from training.model.cache import KeyValueCache
from training.model.decoding import SMALLEST, CudaGraph, TokenSteps
from training.model.single import SingleModel
from training.sampling import Sampling

CPU = torch.device("cpu")
BORDER = SMALLEST  # tokens that fit into the first buffers


class RecordedGraph:
    """A graph as CUDA's: it runs once when it is captured, then must be right with new values in the same tensors."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.replays, self._run = 0, run
        self._result = torch.full_like(run(), torch.nan)
        graphs.append(self)

    def __call__(self) -> Tensor:
        self.replays += 1
        return self._result.copy_(self._run())


graphs: list[RecordedGraph] = []


@pytest.fixture(autouse=True)
def _no_graphs() -> None:
    graphs.clear()


def single(position: str, *, capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None) -> SingleModel:
    decoder = make_wandering_decoder(position=position)
    return SingleModel(decoder, device=CPU, certificate={}, capture=capture)


def test_a_cpu_stores_matrices_by_columns() -> None:
    decoder = make_wandering_decoder()
    tokens, before = some_tokens(2, 40), {name: weight.clone() for name, weight in decoder.named_parameters()}
    expected = decoder(tokens).detach()
    torch.testing.assert_close(SingleModel(decoder, device=CPU, certificate={}).logits(tokens), expected)
    for name, weight in decoder.named_parameters():
        assert torch.equal(weight, before[name])
        if name.startswith("layers.") and weight.ndim == 2:
            assert weight.stride() == (1, weight.shape[0]), "a token's matrix products read them in this order"


@pytest.mark.parametrize("position", ["t5", "kerple"])
def test_a_captured_step_takes_changed_weights(position: str) -> None:
    tokens, found = some_tokens(1, 9), []
    for capture in (None, RecordedGraph):
        model = single(position, capture=capture)
        for factor in (1.0, 2.0):  # a table of biases is among the weights
            model.change_weights(lambda weight, _, factor=factor: factor * weight)  # type: ignore[misc]
            cache = KeyValueCache()
            model.next_logits(tokens, cache)
            found.append(model.next_logits(tokens[:, :1], cache).clone())
    torch.testing.assert_close(found[2:], found[:2], atol=2e-5, rtol=2e-5)
    assert len(graphs) == 2


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("position", POSITIONS)
def test_fixed_shapes_give_the_tokens_of_the_cache(position: str) -> None:
    prompt = some_tokens(BORDER - 20).tolist()
    texts = [
        list(islice(continue_tokens(single(position, capture=capture), prompt, sampling=Sampling(), end=None), 50))
        for capture in (None, RecordedGraph)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 4
    assert [graph.replays for graph in graphs] == [20, 29], "one graph before the border, and one behind it"


@pytest.mark.parametrize("position", POSITIONS)
def test_fixed_shapes_give_the_logits_of_the_cache(position: str) -> None:
    tokens = some_tokens(3, BORDER + 30)
    parts = [tokens[:, : BORDER - 10], *tokens[:, BORDER - 10 :].split(1, dim=1)]
    logits = []
    for capture in (None, RecordedGraph):
        model, cache = single(position, capture=capture), KeyValueCache()
        logits.append(torch.stack([model.next_logits(part, cache) for part in parts]))
        assert cache.length == tokens.shape[1]
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=0)


def test_several_tokens_after_fixed_steps_see_them_all() -> None:
    tokens = some_tokens(1, BORDER + 65)
    sizes = [BORDER - 30, *[1] * 20, 7, *[1] * 40, 3, *[1] * 20]
    sizes.append(tokens.shape[1] - sum(sizes))
    logits = []
    for capture in (None, RecordedGraph):
        model, cache = single("alibi", capture=capture), KeyValueCache()
        logits.append(torch.stack([model.next_logits(part, cache) for part in tokens.split(sizes, dim=1)]))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=0)


def test_texts_at_once_have_buffers_of_their_own() -> None:
    model = single("alibi", capture=RecordedGraph)
    prompts = [some_tokens(30).tolist(), some_tokens(40).tolist()[::-1]]
    alone = [list(islice(continue_tokens(model, ids, sampling=Sampling(), end=None), 20)) for ids in prompts]
    gc.collect()
    assert len(graphs) == 1, "the second text uses the graph of the first"
    streams = [continue_tokens(model, ids, sampling=Sampling(), end=None) for ids in prompts]
    taken = [[next(stream) for stream in streams] for _ in range(20)]
    assert [list(text) for text in zip(*taken, strict=True)] == alone
    assert len(graphs) == 2


@pytest.mark.parametrize("working", [0, 1])
def test_a_failed_capture_is_said_once_and_decodes(caplog: pytest.LogCaptureFixture, working: int) -> None:
    def refuse(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if len(graphs) < working:
            return RecordedGraph(run)
        raise RuntimeError("no graph here")

    prompt = some_tokens(BORDER - 5).tolist()
    with caplog.at_level(logging.DEBUG, logger="training.model.decoding"):
        texts = [
            list(islice(continue_tokens(single("alibi", capture=capture), prompt, sampling=Sampling(), end=None), 20))
            for capture in (None, refuse)
        ]
    assert texts[0] == texts[1]
    assert len(graphs) == working
    assert caplog.messages == ["each token is decoded without a CUDA graph: no graph here"]


def test_a_step_needs_only_the_tokens_before_it() -> None:
    decoder = make_wandering_decoder()
    steps, tokens = TokenSteps(decoder, capture=RecordedGraph), some_tokens(1, 9)
    with torch.no_grad():
        for before in (torch.flip(tokens, dims=(1,)), tokens):  # the second text finds the first one's keys
            cache = KeyValueCache()
            decoder.hidden(before[:, :8], cache)
            logits = steps.next_logits(before[:, 8:], cache)
            assert logits is not None
            torch.testing.assert_close(logits, decoder(before)[:, -1], atol=2e-5, rtol=0)
            del cache
    assert len(graphs) == 1


class CountedGraph:
    """Runs a step, and knows the steps whose memory is held."""

    held: weakref.WeakSet["CountedGraph"] = weakref.WeakSet()

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self.held.add(self)

    def __call__(self) -> Tensor:
        return self._run()

    @classmethod
    def count(cls) -> int:
        gc.collect()
        return len(cls.held)


def test_a_growing_text_holds_its_largest_step_only() -> None:
    model = single("alibi", capture=CountedGraph)
    for batch in (1, 2):
        tokens, cache = some_tokens(batch, 4 * BORDER), KeyValueCache()
        for part in tokens.split([BORDER - 1, 1, 1, BORDER - 2, 1, 1, 2 * BORDER - 1], dim=1):
            model.next_logits(part, cache)
        assert CountedGraph.count() == 1, "of three sizes, and two batches"
        del cache
        assert CountedGraph.count() == 1, "it is kept for the next text"


def test_texts_that_end_leave_one_step() -> None:
    model = single("alibi", capture=CountedGraph)
    streams = [
        continue_tokens(model, some_tokens(length).tolist(), sampling=Sampling(), end=None)
        for length in (30, 40, BORDER + 9)
    ]
    assert [len(list(islice(stream, 3))) for stream in streams] == [3, 3, 3]
    assert CountedGraph.count() == 3
    del streams[:]
    assert CountedGraph.count() == 1


def test_nothing_is_kept_after_a_failed_capture() -> None:
    def capture(run: Callable[[], Tensor]) -> CountedGraph:
        if len(caches) > 2:
            del caches[0]  # a text ends meanwhile, in another thread
            raise RuntimeError("CUDA out of memory")
        return CountedGraph(run)

    model, caches = single("alibi", capture=capture), [KeyValueCache(), KeyValueCache()]
    tokens = some_tokens(1, 2 * BORDER)
    for cache in caches:
        for part in tokens[:, :9].split([8, 1], dim=1):
            model.next_logits(part, cache)
    assert CountedGraph.count() == 2
    del cache
    caches.append(KeyValueCache())
    for part in tokens[:, : BORDER + 1].split([BORDER, 1], dim=1):
        model.next_logits(part, caches[-1])
    assert CountedGraph.count() == 1, "the text that goes on"
    model.next_logits(tokens[:, BORDER:], caches[0])
    model.next_logits(tokens[:, :1], caches[0])
    assert CountedGraph.count() == 0, "its step has become too small"
    caches.clear()
    assert CountedGraph.count() == 0


def test_graphs_are_captured_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[str] = []

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        captures.append("begin")
        time.sleep(0.05)
        yield
        captures.append("end")

    class Stream:
        def wait_stream(self, other: "Stream") -> None: ...

    for name, stand_in in (
        ("Stream", Stream),
        ("current_stream", Stream),
        ("CUDAGraph", object),
        ("graph", graph),
        ("stream", lambda _: nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    threads = [threading.Thread(target=CudaGraph, args=(lambda: torch.zeros(1),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert captures == ["begin", "end"] * 3
