"""Output of `evaluate`, `export` and `import`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from configs.commands import typed_path
from configs.paths import checkpoints_folder
from launch.show.console import fits, narrow_table, show_lines, show_table
from training.evaluation.kept import other_precision
from training.evaluation.report import protocol_name, shown_density

if TYPE_CHECKING:
    from training.export.import_hf import ImportResult
    from training.export.result import ExportResult


_ALL = 0.9995  # of the scores, as shown: windows have left nothing out


def show_report(report: dict[str, Any], *, checkpoint: Path) -> None:
    """Write the perplexity table of an evaluation report.

    Args:
        report: Its contents.
        checkpoint: What was evaluated, as given: the checkpoint, or its run folder.
    """
    evaluated = Path(report["checkpoint"])
    if checkpoint.resolve() != evaluated.resolve():
        checkpoint = checkpoints_folder(checkpoint) / evaluated.name
    precision = other_precision(report)
    computed = "" if precision is None else f", computed in {precision}"
    show_lines(f"{checkpoint}, trained at {report['train_length']:,} tokens{computed}")
    left_out = any(result.get("attention_density", 1.0) < _ALL for result in report["results"])
    table = _results_table(report, shares=left_out)
    show_table(table if fits(table) else _results_table(report, shares=False))


def _results_table(report: dict[str, Any], *, shares: bool) -> Table:
    """Return the results; with `shares`, also the share of the scores that attention computed."""
    # Only a text whose words were counted has a perplexity per word.
    per_word = any("word_perplexity" in result for result in report["results"])
    more = [name for name, is_there in (("per word", per_word), ("scores", shares)) if is_there]
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
        if per_word:
            cells.append(f"{result['word_perplexity']:,.4g}" if "word_perplexity" in result else "-")
        if shares:
            cells.append(shown_density(result))
        table.add_row(*cells, protocol_name(result))
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
        f"longest text: {facts.longest:,} tokens, {facts.reason}{'' if facts.report else advice}",
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
