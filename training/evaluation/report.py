"""The evaluation's report: one JSON document, and the same as a table to read."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.files import whole_file
from training.evaluation.perplexity import Result
from training.evaluation.text import EvaluationText


def build_document(
    results: Sequence[Result],
    *,
    checkpoint: Path,
    step: int,
    train_length: int,
    certificate: dict[str, Any],
    text: EvaluationText,
) -> dict[str, Any]:
    """Return the document of report.json.

    Keys others rely on: checkpoint, train_length, and per result length, protocol, stride (the length itself where
    windows do not overlap), tokens (predictions scored), loss (nats per token), perplexity (per token), and
    word_perplexity where the text's words are known.

    Args:
        results: The measurements, in the order asked for.
        checkpoint: The step folder evaluated.
        step: Its training step.
        train_length: Tokens of a training sequence.
        certificate: What was measured of the positions of the model that read the text.
        text: What was evaluated.
    """
    (reader,) = certificate["ranks"]
    return {
        "checkpoint": str(checkpoint),
        "step": step,
        "train_length": train_length,
        "position": reader["position"],
        # What computed these numbers, which may not be what trained.
        "attention": reader["backend"],
        "precision": reader["precision"],
        "data": {"name": text.name, "tokens": len(text.tokens), "words": text.words},
        "unigram_perplexity": text.unigram_perplexity,
        "results": [_result(result, text=text) for result in results],
    }


def word_perplexity(loss: float, *, tokens: int, words: int) -> float | None:
    """Return the perplexity per word, which compares models whose tokenizers differ.

    It is exp(total / words), where total is the negative log-likelihood of the text. Windows may leave the text's
    first token and last part unscored; the share of the words that was scored is taken to be the share of the
    tokens. The number of scored tokens then cancels, and what remains is exp(loss * tokens / words).

    Args:
        loss: Mean negative log-likelihood of a token, in nats.
        tokens: Tokens of the whole text.
        words: Words of the whole text.
    Returns:
        The perplexity, or None where it is no finite number (a text of one endless word).
    """
    if words == 0:
        return None
    exponent = loss * tokens / words
    return math.exp(exponent) if exponent < math.log(1e300) else None


def write_report(document: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write report.json and report.md into a folder, each whole or not at all; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_table = folder / "report.json", folder / "report.md"
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    for path, content in ((as_json, text), (as_table, format_table(document))):
        with whole_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return as_json, as_table


def format_table(document: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    data = document["data"]
    unigram = document["unigram_perplexity"]
    words = any("word_perplexity" in result for result in document["results"])
    lines = [
        "# Perplexity against length",
        "",
        f"- checkpoint: `{document['checkpoint']}` (step {document['step']:,})",
        f"- position: {document['position']}, trained at {document['train_length']:,} tokens",
        f"- read by attention {document['attention']} in {document['precision']}",
        f"- text: {data['name']}, {data['tokens']:,} tokens"
        + (f", {data['words']:,} words" if data["words"] is not None else ""),
        *([f"- a unigram model's perplexity: {unigram:,.1f}"] if unigram is not None else []),
        "",
        "| length | x training length | protocol | scored tokens | loss | perplexity |"
        + (" per word |" if words else ""),
        "|---:|---:|---|---:|---:|---:|" + ("---:|" if words else ""),
        *(_row(result, train_length=document["train_length"], words=words) for result in document["results"]),
        "",
        "`nonoverlapping`: the text is cut into windows of the length. `sliding:STRIDE`: the window moves by STRIDE",
        "tokens and scores its last STRIDE, so all but the first window's predictions see at least length - STRIDE",
        "tokens of context. Loss is in nats per token.",
        "",
    ]
    return "\n".join(lines)


def _result(result: Result, *, text: EvaluationText) -> dict[str, Any]:
    found: dict[str, Any] = {
        "length": result.length,
        "protocol": result.protocol.name,
        "stride": result.protocol.stride or result.length,
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
    }
    if text.words is not None:
        per_word = word_perplexity(result.loss, tokens=len(text.tokens), words=text.words)
        if per_word is not None:
            found["word_perplexity"] = per_word
    return found


def _row(result: dict[str, Any], *, train_length: int, words: bool) -> str:
    protocol = "nonoverlapping" if result["protocol"] == "nonoverlapping" else f"sliding:{result['stride']}"
    cells = [
        f"{result['length']:,}",
        f"{result['length'] / train_length:g}",
        protocol,
        f"{result['tokens']:,}",
        f"{result['loss']:.4f}",
        f"{result['perplexity']:,.2f}",
    ]
    if words:
        cells.append(f"{result['word_perplexity']:,.4g}" if "word_perplexity" in result else "-")
    return f"| {' | '.join(cells)} |"
