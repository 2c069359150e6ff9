"""Measure a GPU: the training step of the 1.36B model by variant, attention alone, peers, small models, commands.

    python -m benchmarks.gpu [--only PART ...] [--budget SECONDS] [--device cpu --tiny]

Prints a JSON line a row, then tables. Each part has a share of the time; a variant that would begin after it, or that
does not fit, is skipped, and the line says so. `--tiny` on a CPU only shows that it runs.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu_lab import FULL, TINY, Lab, Row, Variant
from benchmarks.gpu_parts import PARTS
from benchmarks.machine import print_result
from configs.errors import TrainshortError
from parallel.start import ProcessRank, start, start_alone

# shares of the budget; what a part leaves over goes to those after it
SHARES = {
    "step": 0.48,
    "attention": 0.08,
    "windows": 0.10,
    "bloom": 0.08,
    "small": 0.06,
    "decoding": 0.04,
    "commands": 0.16,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--budget", type=float, default=230.0, metavar="SECONDS", help="default: 230")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of no use, to try the script itself")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    names = options.only or [name for name in PARTS if not (options.tiny and name == "commands")]
    lab = Lab(_start(options.device), TINY if options.tiny else FULL)
    print_result("gpu", device=lab.device, part="machine")
    began, until, tables = time.perf_counter(), 0.0, {}
    for name in names:
        until += options.budget * SHARES[name] / sum(SHARES[other] for other in names)
        tables[name] = list(_rows(name, PARTS[name](lab), deadline=began + until))
    for name, rows in tables.items():
        print(f"\n{name}\n" + "\n".join(_table(rows)))
    print(f"\n{time.perf_counter() - began:.0f} s")


def _start(kind: str) -> torch.device:
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if kind == "cpu":
        start_alone()
        return torch.device("cpu")
    meet = f"file://{tempfile.mkdtemp()}/meet"
    return start(ProcessRank(rank=0, world_size=1, local_rank=0, rendezvous=meet, starter="local"))


def _rows(part: str, variants: Iterator[Variant], *, deadline: float) -> Iterator[Row]:
    for number, (name, measure) in enumerate(variants):
        row: Row = {"variant": name}
        if number and time.perf_counter() > deadline:  # the first one of a part always runs
            row["skipped"] = "out of time"
        else:
            try:
                row |= measure()
            except (RuntimeError, ImportError, TrainshortError) as error:  # memory, too
                row["skipped"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
        print(json.dumps({"benchmark": "gpu", "part": part, **row}), flush=True)
        yield row


def _table(rows: Sequence[Row]) -> list[str]:
    """Return rows as lines of a table, whose columns are all fields that a row has."""
    columns = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list)))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
