"""Write the report of an evaluation: report.json for programs, report.md to read."""

import json
import math
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.files import whole_file
from configs.terminal import printable
from training.evaluation.perplexity import PerplexityResult
from training.evaluation.text import EvaluationText


def build_report(
    results: Sequence[PerplexityResult],
    *,
    checkpoint: Path,
    step: int,
    train_length: int,
    certificate: dict[str, Any],
    text: EvaluationText,
) -> dict[str, Any]:
    """Return the contents of report.json.

    Other programs read these keys: checkpoint, train_length, and for each result length, protocol, stride (equal to
    the length if windows do not overlap), tokens (predictions scored), loss (nats per token), perplexity (per token),
    and word_perplexity if the text's words are known.

    Args:
        results: One result per length and protocol, in the order of the report.
        checkpoint: The step folder that was evaluated.
        step: Its training step.
        train_length: Tokens of a training sequence.
        certificate: Certificate of the model that was evaluated; it ran on one rank.
        text: The text it was evaluated on.
    """
    (rank,) = certificate["ranks"]
    return {
        "checkpoint": str(checkpoint),
        "step": step,
        "train_length": train_length,
        "position": rank["position"],
        # those of the evaluation: training may have used others
        "attention": rank["backend"],
        "precision": rank["precision"],
        "data": {"name": text.name, "tokens": len(text.tokens), "words": text.words},
        "unigram_perplexity": text.unigram_perplexity,
        "results": [_result_to_json(result, text=text) for result in results],
    }


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


def write_report(report: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write report.md, then report.json, each whole or not at all; return the paths of report.json and report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, table_path = folder / "report.json", folder / "report.md"
    # in ASCII: a file name that is not UTF-8 can then be written too
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    for path, content in ((table_path, format_table(report)), (json_path, text)):
        with whole_file(path, mark=f".{secrets.token_hex(4)}") as temporary:
            temporary.write_text(content, encoding="utf-8")
    return json_path, table_path


def format_table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    data = report["data"]
    unigram = report["unigram_perplexity"]
    words = any("word_perplexity" in result for result in report["results"])
    lines = [
        "# Perplexity against length",
        "",
        f"- checkpoint: {_verbatim(report['checkpoint'])} (step {report['step']:,})",
        f"- position: {report['position']}, trained at {report['train_length']:,} tokens",
        f"- evaluated with attention {report['attention']} in {report['precision']}",
        f"- text: {_verbatim(data['name'])}, {data['tokens']:,} tokens"
        + (f", {data['words']:,} words" if data["words"] is not None else ""),
        *([f"- a unigram model's perplexity: {unigram:,.1f}"] if unigram is not None else []),
        "",
        "| length | x training length | protocol | scored tokens | loss | perplexity |"
        + (" per word |" if words else ""),
        "|---:|---:|---|---:|---:|---:|" + ("---:|" if words else ""),
        *(_row(result, train_length=report["train_length"], words=words) for result in report["results"]),
        "",
        "`nonoverlapping`: the text is cut into windows of the length. `sliding:STRIDE`: the window moves by STRIDE",
        "tokens and scores its last STRIDE, so all but the first window's predictions see at least length - STRIDE",
        "tokens of context. Loss is in nats per token.",
        "",
    ]
    return "\n".join(lines)


def _verbatim(text: str) -> str:
    """Return text as Markdown's code, which changes no character, in one line."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, gap = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{gap}{printable(text)}{gap}{fence}"


def _result_to_json(result: PerplexityResult, *, text: EvaluationText) -> dict[str, Any]:
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
    return entry


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
