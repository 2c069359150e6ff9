"""Output of `evaluate` and `generate`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from configs.terminal import status_console
from launch.show.console import narrow_table, show_json, show_lines, show_table, show_text

if TYPE_CHECKING:
    from training.generation import GeneratedText


def show_report(report: dict[str, Any]) -> None:
    """Write the perplexity table of an evaluation report."""
    # Only a text whose words were counted has a perplexity per word.
    per_word = any("word_perplexity" in result for result in report["results"])
    show_lines(f"{report['checkpoint']}, trained at {report['train_length']:,} tokens")
    table = narrow_table(("length", "x trained", "tokens", "loss", "perplexity", *(["per word"] if per_word else [])))
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
        sliding = result["protocol"] != "nonoverlapping"
        table.add_row(*cells, f"sliding:{result['stride']}" if sliding else "nonoverlapping")
    if report.get("unigram_perplexity") is not None:
        gap = ["-"] if per_word else []
        table.add_section()
        table.add_row("-", "-", "-", "-", f"{report['unigram_perplexity']:,.2f}", *gap, "unigram model")
    show_table(table)


def show_generated(generated: "GeneratedText", *, as_json: bool) -> None:
    """Write a generated text and a line break; its timings go to standard error."""
    if as_json:
        show_json(asdict(generated))
        return
    show_text(f"{generated.text}\n")
    each = "" if generated.token_seconds is None else f", {1000 * generated.token_seconds:.1f} ms for each further one"
    total = generated.prompt_tokens + generated.tokens
    status_console().print(
        f"{generated.prompt_tokens} tokens of prompt in {generated.prefill_seconds:.2f} s, "
        f"{generated.tokens} new{each}; "
        f"{total:,} in all, {total / generated.train_length:.3g} x the training length"
        f"{'; the document ended' if generated.ended else ''}",
        soft_wrap=True,
    )
