"""Output of `evaluate`, `export` and `import`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from configs.commands import typed_path
from configs.paths import checkpoints_folder
from configs.terminal import printable
from launch.show.console import fits, narrow_table, show_folded, show_lines, show_table
from training.evaluation.kept import other_precision
from training.evaluation.results import Result, protocol_name, shown_density, shown_error

if TYPE_CHECKING:
    from training.export.import_hf import ImportResult
    from training.export.result import ExportResult


_ALL = 0.9995  # of the scores, as shown: windows have left nothing out

# Columns that are shown if a result has something to say there, the most important one first: a narrow terminal leaves
# out the last ones. Only a text whose words were counted has a perplexity per word.
_MORE: dict[str, Callable[[Result], bool]] = {
    "per word": lambda result: "word_perplexity" in result,
    "scores": lambda result: result.get("attention_density", 1.0) < _ALL,
    "s.e.": lambda result: "standard_error" in result,
    "bits/byte": lambda result: "bits_per_byte" in result,
}
_CELLS: dict[str, Callable[[Result], str]] = {
    "per word": lambda result: f"{result['word_perplexity']:,.4g}" if "word_perplexity" in result else "-",
    "scores": shown_density,
    "s.e.": shown_error,
    "bits/byte": lambda result: f"{result['bits_per_byte']:.4f}" if "bits_per_byte" in result else "-",
}


def show_measured_checkpoint(report: dict[str, Any], *, checkpoint: Path) -> None:
    """Write which checkpoint a report is about, its training length, its scale, and another precision than the default.

    Args:
        report: Its contents.
        checkpoint: What was measured, as given: the checkpoint, or its run folder.
    """
    measured = Path(report["checkpoint"])
    if checkpoint.resolve() != measured.resolve():
        checkpoint = checkpoints_folder(checkpoint) / measured.name
    precision = other_precision(report)
    computed = "" if precision is None else f", computed in {precision}"
    scale = f", positions scaled by {report['scale']}" if "scale" in report else ""
    show_lines(f"{checkpoint}, trained at {report['train_length']:,} tokens{scale}{computed}")


def show_report(report: dict[str, Any], *, checkpoint: Path) -> None:
    """Write the perplexity table of an evaluation report.

    Args:
        report: Its contents.
        checkpoint: What was evaluated, as given: the checkpoint, or its run folder.
    """
    show_measured_checkpoint(report, checkpoint=checkpoint)
    more = [name for name, is_wanted in _MORE.items() if any(map(is_wanted, report["results"]))]
    table = _results_table(report, more=more)
    while more and not fits(table):
        more.pop()
        table = _results_table(report, more=more)
    show_table(table)
    verdict = Table.grid()
    for words in (*report["verdict"]["words"], f"not tested: {'; '.join(report['verdict']['not_tested'])}"):
        verdict.add_row(printable(words))
    show_folded(verdict)


def _results_table(report: dict[str, Any], *, more: Sequence[str]) -> Table:
    """Return the results, with more columns of `_MORE`."""
    table = narrow_table(("length", "x trained", "tokens", "loss", "perplexity", *more))
    table.add_column("protocol")
    for result in report["results"]:
        cells = [
            f"{result['length']:,}",
            f"{result['length'] / report['train_length']:g}",
            f"{result['tokens']:,}",
            f"{result['loss']:.4f}",
            f"{result['perplexity']:,.2f}",
        ]
        table.add_row(*cells, *(_CELLS[name](result) for name in more), protocol_name(result))
    if report.get("unigram_perplexity") is not None:
        gap = ["-" for _ in more]
        table.add_section()
        table.add_row("-", "-", "-", "-", f"{report['unigram_perplexity']:,.2f}", *gap, "unigram model")
    return table


def show_export(result: "ExportResult", *, checkpoint: Path) -> None:
    """Write how an export compared, the longest text that it allows, and in the last line its folder."""
    facts = result.facts
    advice = f"; run `trainshort evaluate {typed_path(checkpoint)}` and export again"
    show_lines(
        f"exported {result}",
        f"longest text: {facts.longest:,} tokens, {facts.reason}{'' if facts.report or facts.unmeasured else advice}",
        *([f"registered: {result.registered}"] if result.registered else []),
        f"exported: {result.folder}",
    )


def show_import(result: "ImportResult", *, out: Path) -> None:
    """Write how an imported model compared, what to do with it, and in the last line its run folder."""
    folder = typed_path(out)
    show_lines(
        f"imported {result}",
        f"next: `trainshort evaluate {folder} --data FILE`, `trainshort generate {folder}`, or train on with "
        f"train.init_from: {folder}",
        f"imported: {out}",
    )
