"""Check which predictions the windows score, by placing each window in plain lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from configs.protocols import WindowProtocol, parse_protocol
from training.evaluation.windows import place_windows

PLACED = st.integers(1, 40).flatmap(
    lambda length: st.tuples(
        st.just(length), st.none() | st.integers(1, length), st.integers(length + 1, 5 * length + 50)
    )
)


@given(PLACED)
def test_each_prediction_is_scored_once_with_enough_context(placed: tuple[int, int | None, int]) -> None:
    length, stride, tokens = placed
    windows = place_windows(tokens, length=length, protocol=WindowProtocol(stride=stride))
    scored = []
    for window, start in enumerate(windows.starts(0, windows.count)):
        for place in range(windows.first_scored(window), length):
            # the prediction of token start + place + 1, which sees place + 1 tokens of the window
            scored.append(int(start) + place + 1)
            if window > 0 and stride is not None:
                assert place + 1 > length - stride
    assert scored == list(range(1, windows.scored + 1))
    assert scored[-1] <= tokens - 1
    # The dropped tokens would not fill another window.
    assert tokens - 1 - scored[-1] < (stride or length)


@given(st.integers(1, 50), st.integers(2, 500))
def test_nonoverlapping_windows_are_counted_by_division(length: int, tokens: int) -> None:
    count = (tokens - 1) // length
    if count == 0:
        with pytest.raises(InputError):
            place_windows(tokens, length=length, protocol=WindowProtocol(stride=None))
        return
    windows = place_windows(tokens, length=length, protocol=WindowProtocol(stride=None))
    assert (windows.count, windows.scored) == (count, count * length)
    assert windows == place_windows(tokens, length=length, protocol=WindowProtocol(stride=length))


def test_starts_of_a_range_of_windows() -> None:
    windows = place_windows(100, length=10, protocol=WindowProtocol(stride=4))
    assert windows.starts(3, 6).tolist() == [12, 16, 20]
    assert windows.starts(windows.count - 1, windows.count + 5).tolist() == [(windows.count - 1) * 4]


def test_protocols_parse_and_format_alike() -> None:
    for text in ("nonoverlapping", "sliding:1", "sliding:512"):
        assert str(parse_protocol(text)) == text
    assert parse_protocol("sliding:64") == WindowProtocol(stride=64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sliding:0", "stride 0, so its window would not move: use a stride of 1 or more"),
        ("sliding", "'sliding' is not known: use nonoverlapping or sliding:STRIDE"),
    ],
)
def test_unknown_protocol_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_protocol(text)


def test_misspelled_protocols_are_refused() -> None:
    for text in ("sliding:-1", "sliding:1.5", "sliding:08", "sliding:٣", "Nonoverlapping", ""):
        with pytest.raises(InputError, match="is not known"):
            parse_protocol(text)


@pytest.mark.parametrize(
    ("tokens", "length", "protocol", "message"),
    [
        (100, 0, "nonoverlapping", "length must be 1 or more, got 0"),
        (100, 10, "sliding:11", "sliding:11 moves further than its window of 10 tokens.*at most 10"),
        (10, 10, "nonoverlapping", "length 10 needs a text of 11 tokens, this one has 10: use at most 9"),
        (1, 10, "sliding:1", "needs a text of 11 tokens, this one has 1: give more text"),
    ],
)
def test_windows_that_do_not_fit_are_refused(tokens: int, length: int, protocol: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        place_windows(tokens, length=length, protocol=parse_protocol(protocol))
