"""The report of an evaluation: JSON for programs, Markdown to read. Imports no torch.

Other programs read these keys of report.json: checkpoint, train_length, and for each result

* length, protocol, stride (equal to the length if windows do not overlap); with the protocol last also scored, the
  predictions of a window, and windows_end_every, the tokens from the end of a window to the end of the next;
* scale, if positions were scaled, as on the command line; scale_factor, what it divided by at this length;
* tokens (predictions scored); same_tokens, if other lengths of the evaluation score the same ones;
* loss (nats per token), perplexity (per token), bits_per_byte; word_perplexity if the text's words are known;
* standard_error (of the loss), and draws: the loss of each draw of the text's units, see
  `training.evaluation.resampling`;
* loss_by_position, see `training.evaluation.positions`;
* attention_density, the share of the causal scores that attention computed, with attention_density_by_layer, if its
  kernel counts them;

and of the whole: `verdict`, see `training.evaluation.verdict`, and `context`, see `training.evaluation.context`.
"""

import json
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.files import write_whole
from training.evaluation.kept import is_same_text
from training.evaluation.markdown import format_table
from training.evaluation.resampling import units_of
from training.evaluation.results import result_key
from training.evaluation.verdict import verdict_of

if TYPE_CHECKING:
    from training.evaluation.perplexity import PerplexityResult
    from training.evaluation.provenance import EvaluatedModel, Provenance
    from training.evaluation.text import EvaluationText

# results of two evaluations stand in one report only if they agree in these, and are of one text
_ONE_REPORT = ("weights_sha256", "attention", "precision")


def build_report(
    results: "Sequence[PerplexityResult]",
    *,
    model: "EvaluatedModel",
    text: "EvaluationText",
    provenance: "Provenance",
    context: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the contents of report.json.

    Args:
        results: One result per length and protocol, in the order of the report.
        model: The model that was evaluated.
        text: The text it was evaluated on.
        provenance: What the evaluation was made from, and when.
        context: What `training.evaluation.context` measured; None if it did not.
    """
    to_json = partial(_result_to_json, text=text, provenance=provenance, train_length=model.train_length)
    report = {
        "checkpoint": str(model.path),
        "step": model.step,
        "train_length": model.train_length,
        "position": model.position,
        "attention": model.attention,
        "precision": model.precision,
        "data": {
            "name": text.name,
            "tokens": len(text.tokens),
            "words": text.words,
            "bytes": provenance.text_bytes,
        },
        "resampling": units_of(text.documents, tokens=len(text.tokens)).to_json(),
        "unigram_perplexity": text.unigram_perplexity,
        "date": provenance.date,
        "command": provenance.command,
        "versions": provenance.versions,
        "weights_sha256": provenance.weights_sha256,
        "tokenizer_sha256": provenance.tokenizer_sha256,
        "text_sha256": provenance.text_sha256,
        "documents_sha256": provenance.documents_sha256,
        "text_path": provenance.text_path,
        **({} if context is None else {"context": {**context, "date": provenance.date}}),
        "results": [to_json(result) for result in results],
    }
    return _with_verdict(report)


def merge_reports(earlier: dict[str, Any], newest: dict[str, Any]) -> dict[str, Any] | None:
    """Return the newest report with what only an earlier one has; its results are ordered by protocol and length.

    A result of the same length, protocol, stride and scale is the newest one's. The evaluations that the other results
    are from are listed as `earlier`, each with its date, command and versions.

    Returns:
        The report, or None if the two are not of the same weights and text, at the same precision.
    """
    agree = all(key in earlier and earlier[key] == newest[key] for key in _ONE_REPORT)
    if not agree or not is_same_text(earlier, newest):
        return None
    results = {result_key(result): result for result in (*earlier["results"], *newest["results"])}
    dates = {result["date"] for result in results.values()} - {newest["date"]}
    made = {each["date"]: each for each in (*earlier.get("earlier", ()), _evaluation_of(earlier))}
    merged = {key: value for key, value in newest.items() if key != "results"}
    if "context" in earlier and "context" not in newest:
        merged["context"] = earlier["context"]
        dates |= {earlier["context"]["date"]}
    if dates:
        merged["earlier"] = [made[date] for date in sorted(dates)]
    return _with_verdict({**merged, "results": [results[key] for key in sorted(results)]})


def _with_verdict(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report with its verdict, above the results."""
    parts = {key: value for key, value in report.items() if key not in ("verdict", "results")}
    return {**parts, "verdict": verdict_of(report), "results": report["results"]}


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
    write_whole(table_path, format_table(report, plot=plot))
    write_whole(json_path, report_text(report))
    return json_path, table_path


def report_text(report: dict[str, Any]) -> str:
    """Return a report as JSON, a list of numbers in one line."""
    # in ASCII, which can hold a file name that is not UTF-8
    text = json.dumps(report, indent=2, allow_nan=False)
    return re.sub(r"\[\n[-+.\deE,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def _result_to_json(
    result: "PerplexityResult", *, text: "EvaluationText", provenance: "Provenance", train_length: int
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "length": result.length,
        "protocol": result.protocol.name,
        "stride": result.protocol.stride or result.length,
        **({} if result.protocol.last is None else {"scored": result.protocol.last}),
        **({} if result.ends_every is None else {"windows_end_every": result.ends_every}),
        **_scale_to_json(result, train_length=train_length),
        "tokens": result.tokens,
        **({"same_tokens": True} if result.same_tokens else {}),
        "loss": result.loss,
        "perplexity": result.perplexity,
    }
    if result.draws:
        entry["standard_error"] = result.standard_error
    if provenance.text_bytes:
        # of the whole text, like word_perplexity
        entry["bits_per_byte"] = result.loss / math.log(2) * len(text.tokens) / provenance.text_bytes
    if text.words is not None:
        # of the whole text, not of the tokens scored; see word_perplexity
        per_word = word_perplexity(result.loss, tokens=len(text.tokens), words=text.words)
        if per_word is not None:
            entry["word_perplexity"] = per_word
    if result.attention_density is not None:
        entry["attention_density"] = result.attention_density
        entry["attention_density_by_layer"] = list(result.density_by_layer)
    if result.by_position is not None:
        entry["loss_by_position"] = result.by_position.to_json()
    entry["date"] = provenance.date
    if result.draws:
        entry["draws"] = [round(loss, 6) for loss in result.draws]
    return entry


def _scale_to_json(result: "PerplexityResult", *, train_length: int) -> dict[str, Any]:
    if result.scale is None:
        return {}
    scaling = result.scale.at(result.length, train_length=train_length)
    return {"scale": str(result.scale), "scale_factor": scaling.factor}
