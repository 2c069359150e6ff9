"""The report of an evaluation: JSON for programs, Markdown to read. Imports no torch."""

import json
import math
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.files import whole_file
from configs.terminal import printable
from training.evaluation.usable import USABLE, usable_length, whole_windows

if TYPE_CHECKING:
    from training.checkpoint.read import Checkpoint
    from training.evaluation.perplexity import PerplexityResult
    from training.evaluation.provenance import Provenance
    from training.evaluation.text import EvaluationText

# results of two evaluations stand in one report only if they agree in these
_ONE_REPORT = ("weights_sha256", "text_sha256", "attention", "precision")


def build_report(
    results: "Sequence[PerplexityResult]",
    *,
    checkpoint: "Checkpoint",
    certificate: dict[str, Any],
    text: "EvaluationText",
    provenance: "Provenance",
) -> dict[str, Any]:
    """Return the contents of report.json.

    Other programs read these keys: checkpoint, train_length, and for each result length, protocol, stride (equal to
    the length if windows do not overlap), tokens (predictions scored), loss (nats per token), perplexity (per token),
    word_perplexity if the text's words are known, and attention_density, the share of the causal scores that attention
    computed, with attention_density_by_layer, if its kernel counts them.

    Args:
        results: One result per length and protocol, in the order of the report.
        checkpoint: The checkpoint that was evaluated.
        certificate: Certificate of the model that was evaluated; it ran on one rank.
        text: The text it was evaluated on.
        provenance: What the evaluation was made from, and when.
    """
    (rank,) = certificate["ranks"]
    return {
        "checkpoint": str(checkpoint.path.absolute()),
        "step": checkpoint.step,
        "train_length": checkpoint.config.data.sequence_length,
        "position": rank["position"],
        # those of the evaluation: training may have used others
        "attention": rank["backend"],
        "precision": rank["precision"],
        "data": {"name": text.name, "tokens": len(text.tokens), "words": text.words},
        "unigram_perplexity": text.unigram_perplexity,
        "date": provenance.date,
        "command": provenance.command,
        "versions": provenance.versions,
        "weights_sha256": provenance.weights_sha256,
        "tokenizer_sha256": provenance.tokenizer_sha256,
        "text_sha256": provenance.text_sha256,
        "text_path": provenance.text_path,
        "results": [_result_to_json(result, text=text, date=provenance.date) for result in results],
    }


def merge_reports(earlier: dict[str, Any], newest: dict[str, Any]) -> dict[str, Any] | None:
    """Return the newest report with the results that only an earlier one has, ordered by protocol and length.

    A result of the same length, protocol and stride is the newest one's. The evaluations that the other results are
    from are listed as `earlier`, each with its date, command and versions.

    Returns:
        The report, or None if the two are not of the same weights and text, at the same precision.
    """
    if any(key not in earlier or earlier[key] != newest[key] for key in _ONE_REPORT):
        return None
    results = {result_key(result): result for result in (*earlier["results"], *newest["results"])}
    dates = {result["date"] for result in results.values()} - {newest["date"]}
    made = {each["date"]: each for each in (*earlier.get("earlier", ()), _evaluation_of(earlier))}
    merged = {key: value for key, value in newest.items() if key != "results"}
    if dates:
        merged["earlier"] = [made[date] for date in sorted(dates)]
    return {**merged, "results": [results[key] for key in sorted(results)]}


def result_key(result: dict[str, Any]) -> tuple[str, int, int]:
    """Return what a result was measured with: protocol, stride (0 if windows do not overlap) and length.

    Sorted by it, results stand as in a table: those without overlap first.
    """
    stride = result["stride"] if result["protocol"] == "sliding" else 0
    return result["protocol"], stride, result["length"]


def protocol_name(result: dict[str, Any]) -> str:
    """Return the protocol of a result as on the command line: nonoverlapping or sliding:STRIDE."""
    return f"sliding:{result['stride']}" if result["protocol"] == "sliding" else str(result["protocol"])


def shown_density(result: dict[str, Any]) -> str:
    """Return the share of the scores that a result's attention computed; - if it was not counted."""
    return f"{result['attention_density']:.1%}" if "attention_density" in result else "-"


def _evaluation_of(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("date", "command", "versions")}


def word_perplexity(loss: float, *, tokens: int, words: int) -> float | None:
    """Return the perplexity per word, which can be compared between models with different tokenizers.

    It is exp(total / words), where total is the negative log-likelihood of the text. Windows leave the first token
    unscored, and may leave the end of the text unscored. Assume that words and tokens are scored in the same
    proportion: the number of scored tokens cancels, which leaves exp(loss * tokens / words).

    Args:
        loss: Mean negative log-likelihood of a token, in nats.
        tokens: Tokens of the whole text.
        words: Words of the whole text.
    Returns:
        The perplexity, or None if it is not finite (a text that is one very long word).
    """
    if words == 0:
        return None
    # math.exp raises OverflowError where the result does not fit.
    exponent = loss * tokens / words
    return math.exp(exponent) if exponent < math.log(1e300) else None


def write_report(report: dict[str, Any], folder: Path, *, name: str, plot: str) -> tuple[Path, Path]:
    """Write NAME.md, then NAME.json, each whole or not at all; return the paths of NAME.json and NAME.md.

    Args:
        report: The contents of the JSON.
        folder: Where to write; it is made if it does not exist.
        name: The files' name without its ending.
        plot: Name of the PNG beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    json_path, table_path = folder / f"{name}.json", folder / f"{name}.md"
    # in ASCII: a file name that is not UTF-8 can then be written too
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    for path, content in ((table_path, format_table(report, plot=plot)), (json_path, text)):
        with whole_file(path, mark=f".{secrets.token_hex(4)}") as temporary:
            temporary.write_text(content, encoding="utf-8")
    return json_path, table_path


def format_table(report: dict[str, Any], *, plot: str) -> str:
    """Return the report as Markdown, with its plot.

    Args:
        report: The contents of the JSON.
        plot: Path of the PNG, from the folder of the Markdown.
    """
    data = report["data"]
    unigram = report["unigram_perplexity"]
    words, counted = (
        any(key in each for each in report["results"]) for key in ("word_perplexity", "attention_density")
    )
    dated = bool(report.get("earlier"))  # otherwise all results have the date above the table
    lines = [
        "# Perplexity against length",
        "",
        f"![Perplexity against length]({plot})",
        "",
        f"- checkpoint: {_verbatim(report['checkpoint'])} (step {report['step']:,})",
        f"- position: {report['position']}, trained at {report['train_length']:,} tokens",
        f"- evaluated with attention {report['attention']} in {report['precision']}",
        f"- text: {_verbatim(data['name'])}, {data['tokens']:,} tokens"
        + (f", {data['words']:,} words" if data["words"] is not None else ""),
        *([f"- a unigram model's perplexity: {unigram:,.1f}"] if unigram is not None else []),
        *([f"- longest usable text: {usable_length(report):,} tokens, {USABLE}"] if whole_windows(report) else []),
        *map(_evaluation_line, (report, *reversed(report.get("earlier", ())))),
        "",
        "| length | x training length | protocol | scored tokens | loss | perplexity |"
        + (" per word |" if words else "")
        + (" scores |" if counted else "")
        + (" evaluated |" if dated else ""),
        "|---:|---:|---|---:|---:|---:|" + "---:|" * (words + counted) + ("---|" if dated else ""),
        *(
            _row(result, train_length=report["train_length"], words=words, counted=counted, dated=dated)
            for result in report["results"]
        ),
        "",
        "`nonoverlapping`: the text is cut into windows of the length. `sliding:STRIDE`: the window moves by STRIDE",
        "tokens and scores its last STRIDE, so all but the first window's predictions see at least length - STRIDE",
        "tokens of context. Loss is in nats per token.",
        "",
        *(_density_lines(report["results"]) if counted else []),
    ]
    return "\n".join(lines)


def _evaluation_line(evaluation: dict[str, Any]) -> str:
    """Return the date, versions and command of an evaluation as an item of a list."""
    versions = {**evaluation["versions"]}
    if commit := versions.get("commit"):
        sha, *changes = commit.split(" ", 1)
        versions["commit"] = " ".join([sha[:12], *changes])
    made_by = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    command = "" if evaluation["command"] is None else f": {_verbatim(evaluation['command'])}"
    return f"- evaluated {evaluation['date']} by {made_by}{command}"


def _verbatim(text: str) -> str:
    """Return text as Markdown's code, which changes no character, in one line."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, gap = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{gap}{printable(text)}{gap}{fence}"


def _result_to_json(result: "PerplexityResult", *, text: "EvaluationText", date: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "length": result.length,
        "protocol": result.protocol.name,
        "stride": result.protocol.stride or result.length,
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
    }
    if text.words is not None:
        # of the whole text, not of the tokens scored; see word_perplexity
        per_word = word_perplexity(result.loss, tokens=len(text.tokens), words=text.words)
        if per_word is not None:
            entry["word_perplexity"] = per_word
    if result.attention_density is not None:
        entry["attention_density"] = result.attention_density
        entry["attention_density_by_layer"] = list(result.density_by_layer)
    entry["date"] = date
    return entry


def _density_lines(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what the column `scores` means, and its numbers by layer."""
    yield "`scores`: the share of causal attention's scores that were computed. The others weigh less than rounding, or"
    yield "lie outside of the model's sliding window. By layer:"
    yield ""
    columns = [result for result in results if "attention_density_by_layer" in result]
    several = len({protocol_name(result) for result in columns}) > 1
    names = [f"{each['length']:,}" + (f" {protocol_name(each)}" if several else "") for each in columns]
    yield f"| layer | {' | '.join(names)} |"
    yield "|---:|" + "---:|" * len(columns)
    for layer, shares in enumerate(zip(*(each["attention_density_by_layer"] for each in columns), strict=True)):
        yield f"| {layer} | {' | '.join(f'{share:.1%}' for share in shares)} |"
    yield ""


def _row(result: dict[str, Any], *, train_length: int, words: bool, counted: bool, dated: bool) -> str:
    cells = [
        f"{result['length']:,}",
        f"{result['length'] / train_length:g}",
        protocol_name(result),
        f"{result['tokens']:,}",
        f"{result['loss']:.4f}",
        f"{result['perplexity']:,.2f}",
    ]
    if words:
        cells.append(f"{result['word_perplexity']:,.4g}" if "word_perplexity" in result else "-")
    if counted:
        cells.append(shown_density(result))
    if dated:
        cells.append(result["date"])
    return f"| {' | '.join(cells)} |"
