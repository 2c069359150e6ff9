"""`make bench-gpu` on a CPU with tiny models: it cannot be measured here, but it must run."""

import json

import pytest

from benchmarks.gpu import main
from benchmarks.gpu_parts import PARTS


def test_each_part_runs_tiny_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--device", "cpu", "--tiny", "--budget", "0"])  # the first variant of each part
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    machine, *measured = rows
    assert machine["gemm_gflops"] > 0
    assert machine["versions"]["torch"]
    first = {row["part"]: row for row in reversed(measured)}
    assert set(first) == set(PARTS) - {"commands"}
    assert not [row for row in first.values() if "skipped" in row]
    assert {row["skipped"] for row in measured if "skipped" in row} == {"out of time"}
    assert first["step"]["milliseconds"]["matrix products"] > 0
    assert "\nattention\nvariant" in out
