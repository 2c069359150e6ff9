"""Output of `trainshort checkpoint`."""

from pathlib import Path
from typing import TYPE_CHECKING

from configs.commands import typed_path
from configs.figures import byte_size
from configs.terminal import printable
from launch.show.console import show_lines, show_table, wide_table

if TYPE_CHECKING:
    from training.averaging.average import AverageResult
    from training.checkpoint.reshape import Reshape
    from training.checkpoint.verify import Verdict


def show_checkpoints(verdicts: "list[Verdict]", *, folder: Path) -> None:
    """Write the table of a run's checkpoints."""
    if not verdicts:
        show_lines(f"{folder} has no checkpoint yet")
        return
    table = wide_table(("step", "size", "validation", "checkpoint"), left=("checkpoint",))
    for verdict in verdicts:
        values = verdict.to_json()
        step, loss = values["step"], values["validation_loss"]
        size = "broken" if verdict.problems else byte_size(verdict.bytes)
        path = printable(str(verdict.path))
        table.add_row("-" if step is None else f"{step:,}", size, "-" if loss is None else f"{loss:.4f}", path)
    show_table(table)
    show_lines(*(problem for verdict in verdicts for problem in verdict.problems))


def show_verdicts(verdicts: "list[Verdict]") -> None:
    """Write which checkpoints are whole, and the problems of the others."""
    for verdict in verdicts:
        if verdict.problems:
            show_lines(f"broken  {verdict.path}", *(f"        {problem}" for problem in verdict.problems))
        else:
            show_lines(f"whole   {verdict.path}  ({byte_size(verdict.bytes)} read)")


def show_reshape(plan: "Reshape") -> None:
    """Write how each tensor of a checkpoint would be split in another layout."""
    show_lines(
        f"{plan.path}: saved with tensor {plan.tensor} x pipeline {plan.pipeline}, read by {plan.layout}; "
        f"{byte_size(plan.state_bytes)} of tensors"
    )
    names = ("tensor", "rule", "shape", "saved", "read", "padding")
    table = wide_table(names, left=names)
    for cut in plan.cuts:
        rule = f"{cut.rule}, tied" if cut.tied else cut.rule
        sizes = (_slice_sizes(cut.saved), _slice_sizes(cut.wanted))
        table.add_row(cut.name, rule, " x ".join(map(str, cut.shape)), *sizes, str(cut.padding or ""))
    show_table(table)


def show_average(result: "AverageResult", *, out: Path) -> None:
    """Write what was averaged, what to do with it, and in the last line its run folder."""
    folder = typed_path(out)
    show_lines(
        f"averaged {result}",
        f"next: `trainshort evaluate {folder}`, `trainshort generate {folder}`, or train on with "
        f"train.init_from: {folder}",
        f"averaged: {out}",
    )


def _slice_sizes(sizes: tuple[int, ...]) -> str:
    """Return the sizes of a tensor's slices as text: 2 x 200, or 200 + 199 where they differ."""
    if not sizes:
        return "whole"
    return f"{len(sizes)} x {sizes[0]}" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))
