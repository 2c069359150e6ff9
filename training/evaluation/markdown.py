"""The report of an evaluation as Markdown. Imports no torch."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from configs.terminal import printable
from training.evaluation.results import (
    Change,
    Result,
    changes,
    protocol_name,
    result_key,
    shown_density,
    shown_error,
)

_PROTOCOLS = """\
`nonoverlapping`: the text is cut into windows of the length. `sliding:STRIDE`: the window moves by STRIDE
tokens and scores its last STRIDE, so all but the first window's predictions see at least length - STRIDE
tokens of context. `last:TOKENS`: the windows of `nonoverlapping`, each scores its last TOKENS only. Loss is in nats
per token.
"""


def format_table(report: dict[str, Any], *, plot: str) -> str:
    """Return the report as Markdown, with its plot.

    Args:
        report: The contents of the JSON.
        plot: Path of the PNG, from the folder of the Markdown.
    """
    results = report["results"]
    columns = _columns(report)
    return "\n".join(
        [
            "# Perplexity against length",
            "",
            f"![Perplexity against length]({plot})",
            "",
            *_facts(report),
            "",
            f"| {' | '.join(name for name, _, _ in columns)} |",
            f"|{'|'.join(align for _, align, _ in columns)}|",
            *(f"| {' | '.join(cell(each) for _, _, cell in columns)} |" for each in results),
            "",
            *_verdict(report),
            _PROTOCOLS,
            *_notes(report),
            *_context_lines(report.get("context")),
            *_weight_lines((report.get("context") or {}).get("attention")),
            *_density_lines(results),
        ]
    )


def _facts(report: dict[str, Any]) -> Iterator[str]:
    """Yield what was evaluated, on what, by whom, as items of a list."""
    data, unigram = report["data"], report["unigram_perplexity"]
    yield f"- checkpoint: {verbatim(report['checkpoint'])} (step {report['step']:,})"
    yield f"- position: {report['position']}, trained at {report['train_length']:,} tokens"
    yield f"- evaluated with attention {report['attention']} in {report['precision']}"
    sizes = [(key, data.get(key)) for key in ("words", "bytes")]
    known = "".join(f", {number:,} {key}" for key, number in sizes if number is not None)
    yield f"- text: {verbatim(data['name'])}, {data['tokens']:,} tokens{known}"
    if unigram is not None:
        yield f"- a unigram model's perplexity: {unigram:,.1f}"
    yield from (f"- evaluated {made_by(each)}" for each in (report, *reversed(report.get("earlier", ()))))


def _verdict(report: dict[str, Any]) -> Iterator[str]:
    """Yield what the figures say, as a section."""
    verdict = report["verdict"]
    yield "## Verdict\n"
    yield from (f"- {words}" for words in verdict["words"])
    yield f"- not tested: {'; '.join(map(printable, verdict['not_tested']))}"
    yield ""


def _context_lines(context: dict[str, Any] | None) -> Iterator[str]:
    """Yield the loss of the same tokens by the context that they see, as a section."""
    if context is None:
        return
    shuffled = dict(zip(context["shuffled_contexts"], context["shuffled_loss"], strict=True))
    yield "## Context\n"
    yield (
        f"The loss of the same {context['tokens']:,} tokens, which see at least so many tokens and at most a quarter "
        f"more; in the last row, windows of {context['longest']:,} tokens. `error`: standard error of the difference "
        "from the last row. `rest shuffled`: perplexity where they see the others too, in random order (none in the "
        "last row).\n"
    )
    yield "| context | loss | perplexity | error | rest shuffled |"
    yield "|---:|---:|---:|---:|---:|"
    for number, loss, error in zip(context["contexts"], context["loss"], context["error_from_longest"], strict=True):
        rest = f"{math.exp(shuffled[number]):,.2f}" if number in shuffled else "-"
        yield f"| {number:,} | {loss:.4f} | {math.exp(loss):,.2f} | {error:.4f} | {rest} |"
    yield ""


def _weight_lines(weights: dict[str, Any] | None) -> Iterator[str]:
    """Yield the share of attention's weight on the nearest keys, by layer and by head."""
    if weights is None:
        return
    layers: list[list[list[float]]] = weights["share_by_layer_and_head"]
    heads = [*zip(*layers, strict=True)]
    yield (
        f"Share of attention's weight that lies on the nearest keys, mean over {weights['queries']:,} queries at the "
        "ends of windows of the longest length. By layer, mean over heads, and in brackets the head with the least; by "
        "head, mean over layers, and the layer with the least:\n"
    )
    yield f"| nearest keys | {' | '.join(f'{number:,}' for number in weights['nearest'])} |"
    yield "|---|" + "---:|" * len(weights["nearest"])
    for name, rows in (("layer", layers), ("head", heads)):
        for number, parts in enumerate(rows):
            cells = [f"{fmean(each):.1%} ({min(each):.1%})" for each in zip(*parts, strict=True)]
            yield f"| {name} {number} | {' | '.join(cells)} |"
    yield ""


def _columns(report: dict[str, Any]) -> list[tuple[str, str, Callable[[Result], str]]]:
    """Return heading, alignment and cell of each column; those that no result fills are left out."""
    number, text = "---:", "---"
    columns: list[tuple[str, str, str | None, Callable[[Result], str]]] = [
        ("length", number, None, lambda each: f"{each['length']:,}"),
        ("x training length", number, None, lambda each: f"{each['length'] / report['train_length']:g}"),
        ("protocol", text, None, protocol_name),
        ("scored tokens", number, None, _scored),
        ("loss", number, None, lambda each: f"{each['loss']:.4f}"),
        ("s.e.", number, "standard_error", shown_error),
        ("perplexity", number, None, lambda each: f"{each['perplexity']:,.2f}"),
        ("per word", number, "word_perplexity", lambda each: _shown(each, "word_perplexity", ",.4g")),
        ("bits per byte", number, "bits_per_byte", lambda each: _shown(each, "bits_per_byte", ".4f")),
        ("scores", number, "attention_density", shown_density),
    ]
    changed = {result_key(each): change for each, change in changes(report["results"]) if change is not None}
    if changed:
        columns.insert(6, ("change", number, None, lambda each: _changed(changed.get(result_key(each)))))
    if report.get("earlier"):  # otherwise all results have the date above the table
        columns.append(("evaluated", text, None, lambda each: str(each["date"])))
    filled = {key for each in report["results"] for key in each}
    return [(name, align, cell) for name, align, key, cell in columns if key is None or key in filled]


def _changed(change: Change | None) -> str:
    return "-" if change is None else f"{change.loss:+.4f} ± {change.error:.4f}"


def _scored(result: Result) -> str:
    return f"{result['tokens']:,}{' *' if result.get('same_tokens') else ''}"


def _shown(result: Result, key: str, form: str) -> str:
    return format(result[key], form) if key in result else "-"


def _notes(report: dict[str, Any]) -> Iterator[str]:
    """Yield what the marks and columns of the table mean."""
    if any("scale" in result for result in report["results"]):
        yield "A scale behind the protocol: the model's positions were scaled (`--scale`), and nothing was trained.\n"
    if any(result.get("same_tokens") for result in report["results"]):
        yield "\\*: with `--same-tokens`: the lengths of a protocol in one evaluation scored the same tokens.\n"
    if "resampling" in report and any("standard_error" in result for result in report["results"]):
        drawn = report["resampling"]
        yield (
            f"`s.e.`: standard error of the loss, from {drawn['draws']} draws of the text's {drawn['units']:,} "
            f"{drawn['unit']}s with replacement (seed {drawn['seed']}). `change`: of the loss from the "
            "protocol's shortest length, with the standard error of the difference on the same draws.\n"
        )


def made_by(measured: Mapping[str, Any], *, note: str = "") -> str:
    """Return date, versions and command of a measurement in a line.

    Args:
        measured: A report, or an entry of one, with these.
        note: What to say before the command.
    """
    versions = {**measured["versions"]}
    if commit := versions.get("commit"):
        sha, *changes = commit.split(" ", 1)
        versions["commit"] = " ".join([sha[:12], *changes])
    names = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    command = f": {verbatim(measured['command'])}" if measured["command"] else ""
    return f"{measured['date']} by {names}{note}{command}"


def verbatim(text: str) -> str:
    """Return text as Markdown's code, which changes no character, in one line."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, gap = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{gap}{printable(text)}{gap}{fence}"


def _density_lines(results: Sequence[Result]) -> Iterator[str]:
    """Yield what the column `scores` means, and its numbers by layer."""
    columns = [result for result in results if "attention_density_by_layer" in result]
    if not columns:
        return
    yield "`scores`: the share of causal attention's scores that were computed. The others weigh less than rounding, or"
    yield "lie outside of the model's sliding window or in another document. By layer:"
    yield ""
    several = len({protocol_name(result) for result in columns}) > 1
    names = [f"{each['length']:,}" + (f" {protocol_name(each)}" if several else "") for each in columns]
    yield f"| layer | {' | '.join(names)} |"
    yield "|---:|" + "---:|" * len(columns)
    for layer, shares in enumerate(zip(*(each["attention_density_by_layer"] for each in columns), strict=True)):
        yield f"| {layer} | {' | '.join(f'{share:.1%}' for share in shares)} |"
    yield ""
