"""Run folders made by hand, with what the starts of a run leave in them."""

import json
from pathlib import Path
from typing import Any

from tests.support.compared_runs import add_report, make_run


def certificate(*, step: int, minute: int, ranks: int = 2, **changes: Any) -> dict[str, Any]:
    """Return what a start states in certificates.jsonl.

    Args:
        step: The step that it continues from.
        minute: When it began, after 03:00.
        ranks: Its data ranks.
        changes: Keys that differ.
    """
    stated = [
        {"rank": rank, "tensor_rank": 0, "stage": 0, "data_rank": rank, "position": "alibi", "backend": "sdpa",
         "precision": "fp32", "device": "cpu", "heads": [0, 1, 2, 3], "slopes_sha256": "a", "recency": 0.1,
         "error": 2e-7}
        for rank in range(ranks)
    ]  # fmt: skip
    started_at = f"2026-01-02T03:{minute:02}:00+00:00"
    return {"started_at": started_at, "step": step, "position": "alibi", "heads": 4, "ranks": stated, **changes}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a file of JSON, a line each; its folder is made."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def whole_run(folder: Path) -> Path:
    """Return a run of ten steps whose first start lost steps 6 and 7 and whose second had a save that failed."""
    run_dir = make_run(folder)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "learning_rate": 1e-3, "grad_norm": 0.5} for line in lines]
    for line in lines[1:]:  # the first is of a driver that does not tell
        line["energy_joules"] = 3.6e5
    lines[8] |= {"save_seconds": 3.0, "failed_saves": 1}
    lines[9] |= {"failed_saves": 1}
    write_lines(run_dir / "metrics.jsonl", lines)
    write_lines(run_dir / "logs" / "metrics_discarded.jsonl", [{**lines[5], "save_seconds": 1.0}, lines[6]])
    write_lines(run_dir / "certificates.jsonl", [certificate(step=0, minute=4), certificate(step=5, minute=9)])
    environment = {
        "python": "3.11.7",
        "device": "a card",
        "world_size": 2,
        "packages": {"torch": "2.13.0", "gguf": None},
        "slurm": {"job_id": "77", "nodes": "n[1-2]"},
        "code": {"commit": "a" * 40, "diff": "+"},
    }
    (run_dir / "environment.json").write_text(json.dumps(environment))
    add_report(run_dir, {32: 21.25, 64: 20.5, 128: 20.25})
    return run_dir
