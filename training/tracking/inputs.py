"""What a run reads, as MLflow's datasets: prepared data, tokenizer, and the text of an evaluation."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.paths import data_folder
from configs.schema import RunConfig
from configs.secrets import hide_secrets
from data_pipeline.content import data_sha256
from data_pipeline.manifest_file import read_data_manifest
from data_pipeline.split import held_out_count
from data_pipeline.tokenizer_files import find_tokenizer


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset of a run.

    Attributes:
        name: What MLflow shows.
        sha256: Hash of the content; MLflow's digest is the part of it that has room there, `profile` has all of it.
        path: File or folder; None for none.
        context: training, validation, evaluation or tokenizer.
        profile: What else to know; `num_rows` and `num_elements` are MLflow's own words, for sequences and tokens.
    """

    name: str
    sha256: str
    path: str | None
    context: str
    profile: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the dataset as the event holds it, without secrets."""
        shown = json.dumps(asdict(self))
        hidden: dict[str, Any] = json.loads(hide_secrets(shown))
        return hidden


def data_inputs(config: RunConfig) -> list[DatasetFacts]:
    """Return the prepared data of a run: what it trains on, what it holds out, and the tokenizer.

    Empty if no data is prepared. The two parts of the data share a hash: which sequences are held out depends on
    `data.split` alone.
    """
    folder = data_folder(config)
    try:
        manifest = read_data_manifest(folder)
    except InputError:
        manifest = None
    if manifest is None:
        return []
    # of data that an older version prepared, only what it was made from is known
    sha256 = data_sha256(manifest) or manifest.inputs_sha256
    parts, share = manifest.parts, config.data.split
    name = ", ".join(part.name for part in parts)
    held_out = sum(held_out_count(part.sequences, share=share) for part in parts)
    sequences, tokens = sum(part.sequences for part in parts), sum(part.tokens for part in parts)
    about = {"tokens_with_held_out": tokens, "split": share, "parts": len(parts)}
    inputs = [_dataset(name, sha256, folder, "training", num_rows=sequences - held_out, **about)]
    if held_out:
        inputs.append(_dataset(f"{name}, held out", sha256, folder, "validation", num_rows=held_out, **about))
    tokenizer = find_tokenizer(folder)
    profile = {"vocab_size": manifest.vocab_size}
    return [*inputs, _dataset(tokenizer.name, manifest.tokenizer_sha256, tokenizer, "tokenizer", **profile)]


def evaluation_input(report: dict[str, Any]) -> DatasetFacts:
    """Return the text of an evaluation.

    Args:
        report: The contents of its JSON.
    """
    data = report["data"]
    words = data.get("words")  # they are not counted in a haystack
    profile = {"num_elements": data["tokens"], "words": words, "tokenizer_sha256": report["tokenizer_sha256"]}
    path = report["text_path"]
    return _dataset(data["name"], report["text_sha256"], None if path is None else Path(path), "evaluation", **profile)


def inputs_event(datasets: Iterable[DatasetFacts]) -> dict[str, Any]:
    """Return the event that logs datasets."""
    return {"kind": "inputs", "datasets": [dataset.to_json() for dataset in datasets]}


def _dataset(name: str, sha256: str, path: Path | None, context: str, **profile: Any) -> DatasetFacts:
    return DatasetFacts(name, sha256, None if path is None else str(path.absolute()), context, profile)
