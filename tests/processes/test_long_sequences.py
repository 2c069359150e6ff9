"""One sequence of 65,536 tokens in bounded memory, with the numbers of the whole computation."""

import json
import math
import subprocess
import sys
from pathlib import Path

LONGEST = 65_536


def test_65536_tokens_take_linear_memory_and_have_the_losses_of_the_whole_computation() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.long_sequences", str(LONGEST)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert math.log(97) < found["mean_loss"] < 10  # targets are drawn at random: nobody guesses better
    # What comes later changes no loss, and every score written out gives the same.
    assert found["prefix_difference"] < 1e-4
    assert found["whole_difference"] < 1e-4
    # Each doubling takes about twice what the one before took, not four times.
    peaks = [found["peaks_gb"][str(LONGEST // part)] for part in (8, 4, 2, 1)]
    growth = [after - before for before, after in zip(peaks, peaks[1:], strict=False)]
    assert growth[2] < 3 * growth[1], found
    # All scores of one layer would take 4 heads x 65,536 x 65,536 x 4 bytes: 69 GB.
    assert peaks[-1] < 2
