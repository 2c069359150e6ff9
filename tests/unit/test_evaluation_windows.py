"""Which predictions windows score, and what each one sees, compared with each protocol's definition in plain lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from configs.protocols import WindowProtocol, parse_protocol
from training.evaluation.windows import Windows, place_windows, same_tokens

Seen = dict[int, int]
"""First input that the prediction of each scored token sees."""

LENGTHS = st.integers(1, 40)
PLACED = LENGTHS.flatmap(
    lambda length: st.tuples(
        st.just(length), st.integers(1, length), st.sampled_from(("nonoverlapping", "sliding", "last"))
    )
)


def seen_by(windows: Windows) -> Seen:
    """Return what windows score; no token twice, none with another one's place."""
    seen: Seen = {}
    for start, first, end in zip(windows.starts, windows.scored_from, windows.scored_to, strict=True):
        assert 0 <= first < end <= windows.length
        for place in range(first, end):
            token = int(start) + place + 1
            assert token not in seen
            seen[token] = int(start)
    return seen


def defined(kind: str, number: int, *, length: int, tokens: int) -> Seen:
    """Return what a protocol scores by its definition, window by window."""
    seen: Seen = {}
    step = number if kind == "sliding" else length
    for start in range(0, tokens - length, step):
        targets = range(start + 1, start + length + 1)
        scored = targets if kind == "nonoverlapping" or (kind == "sliding" and not start) else targets[-number:]
        seen |= dict.fromkeys(scored, start)
    return seen


def protocol_of(kind: str, number: int) -> WindowProtocol:
    return parse_protocol(kind if kind == "nonoverlapping" else f"{kind}:{number}")


@given(PLACED, st.integers(1, 250))
def test_each_protocol_scores_what_it_defines(placed: tuple[int, int, str], more: int) -> None:
    length, number, kind = placed
    tokens = length + more
    windows = place_windows(tokens, length=length, protocol=protocol_of(kind, number))
    assert seen_by(windows) == defined(kind, number, length=length, tokens=tokens)
    seen = seen_by(windows)
    assert (windows.scored, max(seen)) == (len(seen), max(seen))
    assert windows.scored_at().tolist() == [
        sum(token - start == place for token, start in seen.items()) for place in range(1, length + 1)
    ]
    assert [token for token, is_scored in enumerate(windows.scored_in(np.arange(tokens))) if is_scored] == sorted(seen)
    if kind == "nonoverlapping":
        assert (windows.count, windows.scored) == ((tokens - 1) // length, (tokens - 1) // length * length)


@given(st.lists(LENGTHS, min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 250))
def test_the_same_tokens_are_scored_at_each_length(lengths: list[int], number: int, more: int) -> None:
    tokens, number = max(lengths) + more, min(number, *lengths)
    for kinds in (("nonoverlapping", "sliding"), ("last",)):
        protocols = [protocol_of(kind, number) for kind in kinds]
        same = same_tokens(tokens, lengths=lengths, protocols=protocols)
        scored = set()
        for kind, protocol in zip(kinds, protocols, strict=True):
            for length in lengths:
                seen = seen_by(place_windows(tokens, length=length, protocol=protocol, same=same))
                scored.add(tuple(sorted(seen)))
                if kind != "last":  # a context is that of the protocol; only the end of the text is left out
                    whole = defined(kind, number, length=length, tokens=tokens)
                    assert seen == {token: whole[token] for token in seen}
                else:
                    assert all(length - number < token - start <= length for token, start in seen.items())
        assert len(scored) == 1
        assert scored != {()}


def fairseq_contexts(tokens: int, *, length: int, stride: int) -> Seen:
    """Return the context of each target as fairseq's `LMContextWindowDataset.collater` builds it, batch of one.

    `fairseq-eval-lm --tokens-per-sample LENGTH --context-window LENGTH - STRIDE` cuts the text into blocks of STRIDE
    and puts the last `LENGTH - STRIDE` inputs before each. Its inputs are an end token and the text without its last
    token, its targets the text: here the end token is token 0.
    """
    window = length - stride
    before: list[int] = []
    contexts: Seen = {}
    for block in range(0, tokens - 1, stride):
        inputs = list(range(block, min(block + stride, tokens - 1)))
        extra = len(before) + len(inputs) - length
        if extra > 0:
            before = before[extra:]
        contexts |= {source + 1: (before + inputs)[0] for source in inputs}
        before = (before + inputs)[-window:] if window else []
    return contexts


@pytest.mark.parametrize(("length", "stride"), [(12, 12), (12, 4), (12, 1), (7, 1), (64, 16)])
def test_windows_are_those_of_fairseq(length: int, stride: int) -> None:
    """The paper's protocols: --context-window 0 does not overlap, length - 1 is a stride of 1."""
    theirs = fairseq_contexts(150, length=length, stride=stride)
    protocol = parse_protocol("nonoverlapping" if stride == length else f"sliding:{stride}")
    ours = seen_by(place_windows(150, length=length, protocol=protocol))
    assert ours == {token: theirs[token] for token in ours}
    left_out = theirs.keys() - ours.keys()
    assert all(token > 150 - stride for token in left_out), "only a block at the end that is no whole one"


def test_a_window_that_scores_more_is_a_batch_of_its_own() -> None:
    windows = place_windows(100, length=10, protocol=parse_protocol("sliding:4"))
    assert windows.starts[3:6].tolist() == [12, 16, 20]
    assert [*windows.batches(most=8)] == [slice(0, 1), slice(1, 9), slice(9, 17), slice(17, 23)]
    assert [*windows.batches(most=8, first=9)] == [slice(9, 17), slice(17, 23)]
    together = place_windows(100, length=10, protocol=parse_protocol("nonoverlapping"))
    assert [*together.batches(most=8)] == [slice(0, 8), slice(8, 9)]


def test_protocols_parse_and_format_alike() -> None:
    for text in ("nonoverlapping", "sliding:1", "sliding:512", "last:1", "last:64"):
        assert str(parse_protocol(text)) == text
    assert parse_protocol("sliding:64") == WindowProtocol(stride=64)
    assert parse_protocol("last:64") == WindowProtocol(stride=None, last=64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sliding:0", "stride 0, so its window would not move: use a stride of 1 or more"),
        ("last:0", "'last:0' scores no tokens: use 1 or more"),
        ("sliding", "'sliding' is not known: use nonoverlapping, sliding:STRIDE or last:TOKENS"),
    ],
)
def test_unknown_protocol_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_protocol(text)


def test_misspelled_protocols_are_refused() -> None:
    for text in ("sliding:-1", "sliding:1.5", "sliding:08", "sliding:٣", "Nonoverlapping", "last", "last:01", ""):
        with pytest.raises(InputError, match="is not known"):
            parse_protocol(text)


@pytest.mark.parametrize(
    ("tokens", "length", "protocol", "message"),
    [
        (100, 0, "nonoverlapping", "length must be 1 or more, got 0"),
        (100, 10, "sliding:11", "sliding:11 moves further than its window of 10 tokens.*at most 10"),
        (100, 10, "last:11", "last:11 scores more tokens than its window of 10 has: use at most 10"),
        (10, 10, "nonoverlapping", "length 10 needs a text of 11 tokens, this one has 10: use at most 9"),
        (1, 10, "sliding:1", "needs a text of 11 tokens, this one has 1: give more text"),
    ],
)
def test_windows_that_do_not_fit_are_refused(tokens: int, length: int, protocol: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        place_windows(tokens, length=length, protocol=parse_protocol(protocol))
