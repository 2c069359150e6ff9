"""Times, counts, sizes and what others say are written in one way."""

import re

from configs.errors import first_line, in_brief
from configs.figures import byte_size, counted, duration, scaled
from tests.support.house.source import FLOORS, sources_of


def test_a_time_has_its_two_largest_units() -> None:
    times = (0, 0.04, 9.94, 9.96, 99.4, 99.6, 3599, 3599.6, 3600, 5000, 172_000, 176_000, 1e7)
    assert [*map(duration, times)] == [
        *("0.0 s", "0.0 s", "9.9 s", "10 s", "99 s", "1m40s", "59m59s", "1h00m", "1h00m", "1h23m"),
        *("47h47m", "2d00h", "115d17h"),
    ]


def test_a_count_has_three_digits_and_a_letter() -> None:
    counts = (0, 7, 9.87, 999, 999.4, 999.6, 1000, 36_749, 819_200, 1_317_888, 1.5e6, 999_600, 1_330_876_416, 1.4e12)
    assert [*map(scaled, counts)] == [
        *("0", "7", "9.87", "999", "999", "1.00k", "1.00k", "36.7k", "819k", "1.32M", "1.50M", "1.00M"),
        *("1.33B", "1.40T"),
    ]
    assert scaled(2.5e18) == "2,500,000T"


def test_a_long_message_ends_after_a_sentence_or_word() -> None:
    message = "Should have a `model_type` key, or one of these:\n  albert, align, bert"
    assert in_brief(message) == message.replace("\n ", "")
    assert in_brief(message, most=60) == "Should have a `model_type` key, or one of these: ..."
    assert in_brief(message, most=29) == "Should have a ..."
    assert in_brief("It is so. It is not so.", most=20) == "It is so. It is ..."
    assert in_brief("It is not so . Or is it so?", most=22) == "It is not so ..."
    assert in_brief("a" * 300, most=20) == "a" * 16 + " ..."
    assert first_line(ValueError("word " * 100 + "\nmore")) == "word " * 39 + "..."


def test_a_size_has_three_digits_and_a_unit() -> None:
    sizes = (0, 512, 1_860, 9.96e8, 61.3e9, 1.0613e12, 5e15)
    assert [*map(byte_size, sizes)] == ["0 B", "512 B", "1.86 kB", "996 MB", "61.3 GB", "1.06 TB", "5,000 TB"]


def test_one_thing_is_no_plural() -> None:
    assert [counted(number, "step") for number in (0, 1, 2, 1200)] == ["0 steps", "1 step", "2 steps", "1,200 steps"]


def test_no_other_module_writes_units_or_plurals_by_hand() -> None:
    # a unit behind a number with digits after the point, or an s that depends on a number
    by_hand = re.compile(r"\.\d[fg]\} ?(?:[kKMGT]i?B|s|min|h|[kKMGBT])\b|'s' (?:if|\*)|'' if [^}]*'s'")
    allowed = ("configs/figures.py", "launch/show/generation.py")  # the latter's first token takes milliseconds
    lines = [
        f"{source.name}: {line.strip()}"
        for source in sources_of(*FLOORS)
        if source.name not in allowed
        for line in source.text.splitlines()
        if by_hand.search(line)
    ]
    assert not lines
    assert by_hand.search('f"{size / 1e9:.2f} GB"')
    assert by_hand.search("""f"{ranks} rank{'s' if ranks > 1 else ''}\"""")
