"""An evaluation on tensor and pipeline ranks finds what one process finds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from configs.errors import InputError
from parallel.start import ProcessRank, start, stop
from tests.support.layouts import build, config_of, save
from tests.support.ranks import run_ranks, start_again
from training.evaluation import run
from training.evaluation.request import EvaluationRequest
from training.evaluation.run import evaluate_checkpoint, evaluate_rank
from training.model.single import load_single

# The second has what the first lacks: weights that all blocks share, a head of its own, a norm before the head only.
# Stages of the third need to know where documents begin.
MODELS: dict[str, tuple[str, ...]] = {
    "alibi": (),
    "t5": ("model.position=t5", "model.tie_embeddings=false", "model.family=mpt"),
    "masked": ("model.position=sinusoidal", "data.mask_documents=true"),
}
PROTOCOLS = ("nonoverlapping", "sliding:8", "last:8")
FIGURES = ("loss", "perplexity", "standard_error", "bits_per_byte", "word_perplexity", "draws", "attention_density")
FIGURES += ("attention_density_by_layer",)
LENGTHS = (16, 48)


def save_models(process: ProcessRank, *, folder: Path, tokenizer: Path) -> None:
    for number, (name, more) in enumerate(MODELS.items()):
        start_again(process, number=number)
        layout = {"tensor": 1, "pipeline": 1, "zero": 0}
        config = config_of(layout, run_dir=folder / name, more=(*more, "run.seed=5"))
        engine, groups, _ = build(config, world_size=1)
        save(engine, config, groups=groups, tokenizer=tokenizer, step=1)


def evaluate_in_turn(process: ProcessRank, *, asked: list[tuple[Path, EvaluationRequest]]) -> list[Any]:
    reports = []
    for number, (run_dir, request) in enumerate(asked):
        stop()
        place = replace(process, rendezvous=f"{process.rendezvous}_{number}")
        try:
            reports.append(evaluate_rank(run_dir, request, place))
        except InputError as error:
            reports.append(str(error))
    stop()  # the last one may have ended with an error
    start(replace(process, rendezvous=f"{process.rendezvous}_last"))
    return reports


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Run folders by the names of the models, and a text of 40 documents."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(save_models, ranks=1, arguments={"folder": folder, "tokenizer": tokenizer})
    words = np.random.default_rng(3).integers(97, 123, (40, 5, 4)).astype(np.uint8)
    texts = [" ".join(bytes(word).decode() for word in document) for document in words]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def request_of(runs: Path, **more: Any) -> EvaluationRequest:
    return EvaluationRequest(**{"lengths": LENGTHS, "protocols": PROTOCOLS, "data": runs / "text.jsonl", **more})


class Interrupted:
    """A model that is interrupted at its third pass, in the middle of the first measurement."""

    batch_tokens = 128
    blocks = ()

    def __init__(self, model: Any) -> None:
        self._model, self._passes = model, 0
        self.certificate, self.windows = model.certificate, model.windows

    def losses(self, tokens: Tensor, *, last: int | None = None) -> Tensor:
        """Return the model's losses."""
        self._passes += 1
        if self._passes == 3:
            raise KeyboardInterrupt
        losses: Tensor = self._model.losses(tokens, last=last)
        return losses


def interrupt(run_dir: Path, request: EvaluationRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin an evaluation in one process, and leave it."""
    with monkeypatch.context() as patched:
        patched.setattr(run, "load_single", lambda opened, **options: Interrupted(load_single(opened, **options)))
        with pytest.raises(KeyboardInterrupt):
            evaluate_checkpoint(run_dir, request)
    assert [*run_dir.glob("evaluation/*/partial-*.npz")]


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare two reports."""
    assert len(ours["results"]) == len(theirs["results"])
    for one, other in zip(ours["results"], theirs["results"], strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            if key in FIGURES:
                assert one[key] == pytest.approx(value, rel=1e-5), key
            elif key == "loss_by_position":
                assert one[key]["loss"] == pytest.approx(value["loss"], rel=1e-5)
            elif key != "date":
                assert one[key] == value, key
    in_one_process = {"attention"} & theirs.get("context", {}).keys()
    assert ours.get("context", {}).keys() == theirs.get("context", {}).keys() - in_one_process
    for key in ("loss", "shuffled_loss", "contexts") if "context" in ours else ():
        assert ours["context"][key] == pytest.approx(theirs["context"][key], rel=1e-5), key


def test_ranks_measure_what_one_process_measures(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks in three layouts; the second goes on with what one process has left."""
    request = request_of(runs)
    with_context = replace(request, context=True)
    single = evaluate_checkpoint(runs / "alibi", with_context)
    assert single["resampling"]["unit"] == "document"
    interrupt(runs / "alibi", replace(request, same_tokens=True), monkeypatch)
    asked = [
        (runs / "alibi", replace(with_context, tensor=2, pipeline=2)),
        (runs / "alibi", replace(request, tensor=1, pipeline=4, same_tokens=True)),
        (runs / "t5", replace(request, tensor=2, pipeline=2)),
        (runs / "masked", replace(request, tensor=2, pipeline=2)),
        (runs / "t5", replace(request, tensor=4, lengths=(100_000,))),
    ]
    first, *others = run_ranks(evaluate_in_turn, ranks=4, arguments={"asked": asked})
    split, gone_on, shared, masked, refused = first
    tokens = single["data"]["tokens"]
    assert f"the text has {tokens} tokens, too short for length 100000: use lengths up to {tokens - 1}" in refused
    assert others == [[None, None, None, None, refused]] * 3, "so that no rank waits for one that has ended"
    same(split, single)
    same(shared, evaluate_checkpoint(runs / "t5", request))
    whole = evaluate_checkpoint(runs / "masked", request)
    same(masked, whole)
    assert masked["text_sha256"] == whole["text_sha256"] == single["text_sha256"]
    assert masked["documents_sha256"] == whole["documents_sha256"] is not None
    assert single["documents_sha256"] is None
    assert not [*runs.glob("*/evaluation/*/partial-*.npz")]
    same(gone_on, evaluate_checkpoint(runs / "alibi", replace(request, same_tokens=True)))
