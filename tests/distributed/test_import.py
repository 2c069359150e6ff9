"""Imported models load in tensor ranks and stages, go out bit for bit, and learn."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from parallel.start import ProcessRank
from tests.support.huggingface_models import save_random
from tests.support.layouts import LENGTH, VOCABULARY, build, config_of, save, take_step, tokens_of
from tests.support.ranks import run_ranks, start_again
from training.checkpoint.read import load_slices, open_checkpoint
from training.export.import_hf import import_model
from training.export.run import export_checkpoint

LAYOUT = {"tensor": 2, "pipeline": 2, "zero": 1}
KINDS = ("bloom", "mpt-untied")
KEYS = ("layers", "hidden", "heads", "family", "tie_embeddings")


def save_and_train(process: ProcessRank, *, folder: Path, tokenizer: Path) -> dict[str, list[float]]:
    """Load each imported model, save it as it is, and train; return the losses."""
    losses = {}
    for number, kind in enumerate(KINDS):
        start_again(process, number=number)
        imported = open_checkpoint(folder / kind / "run")
        shape = tuple(f"model.{key}={json.dumps(getattr(imported.config.model, key))}" for key in KEYS)
        config = config_of(LAYOUT, run_dir=folder / kind / "split", more=(*shape, "train.clip=1.0"))
        engine, groups, layout = build(config, world_size=process.world_size)
        load_slices(engine.state(), imported, kinds=("weight",), groups=groups)
        save(engine, config, groups=groups, tokenizer=tokenizer, step=1)
        steps = [
            take_step(engine, tokens_of(0), groups=groups, layout=layout, learning_rate=3e-3).loss for _ in range(8)
        ]
        losses[kind] = steps
    return losses


def test_imported_models_leave_two_by_two_ranks_and_learn(tmp_path: Path, tokenizer: Path) -> None:
    for kind in KINDS:
        source = save_random(tmp_path / kind / "hf", kind, tokenizer=tokenizer, rows=VOCABULARY)
        import_model(source, out=tmp_path / kind / "run")
    losses, *others = run_ranks(save_and_train, ranks=4, arguments={"folder": tmp_path, "tokenizer": tokenizer})
    assert all(other == losses for other in others)
    for kind in KINDS:
        first, *_, last = losses[kind]
        assert last < 0.9 * first, losses[kind]
        result = export_checkpoint(tmp_path / kind / "split", format="hf", out=tmp_path / kind / "out")
        assert result.logits.difference < 1e-4
        before, after = (load_file(tmp_path / kind / name / "model.safetensors") for name in ("hf", "out"))
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert result.logits.lengths == (LENGTH, 4 * LENGTH)
