"""From one saved state every layout has the same weights, losses, gradient norms and logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.support.layouts import LENGTH, Trained, name_of, tokens_of, train_layouts, whole_of
from tests.support.ranks import run_ranks
from training.averaging.average import average_checkpoints
from training.checkpoint.manifest import list_checkpoints, read_manifest
from training.checkpoint.read import open_checkpoint

WARM_STEPS = range(3)  # so that Adam's moments are not zero in the saved state
STEPS = range(3, 8)


def _layout(tensor: int, pipeline: int, zero: int, *, sequence: bool = False) -> dict[str, int | bool]:
    return {"tensor": tensor, "pipeline": pipeline, "zero": zero, "sequence": sequence}


REFERENCE = _layout(1, 1, 0)
LAYOUTS = {
    1: [REFERENCE],
    2: [_layout(2, 1, 1), _layout(1, 2, 1), _layout(1, 1, 2), _layout(1, 1, 3), _layout(2, 1, 0, sequence=True)],
    4: [
        *(_layout(2, 2, 1), _layout(4, 1, 0), _layout(2, 1, 3), _layout(1, 2, 1), _layout(2, 1, 2)),
        *(_layout(2, 2, 1, sequence=True), _layout(2, 1, 3, sequence=True), _layout(2, 1, 2, sequence=True)),
    ],
}
NAMES = [name_of(keys, ranks=ranks) for ranks, some in LAYOUTS.items() for keys in some]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(runs: Path, tokenizer: Path) -> dict[str, list[Trained]]:
    """Each layout's ranks, all trained from the state that one rank saved after a few steps."""
    base = {"folder": runs / "warm", "tokenizer": tokenizer, "start_from": None}
    run_ranks(train_layouts, ranks=1, arguments={**base, "layouts": [REFERENCE], "steps": WARM_STEPS})
    saved = runs / "warm" / name_of(REFERENCE, ranks=1)
    by_layout = {}
    for ranks, layouts in LAYOUTS.items():
        arguments = {**base, "folder": runs, "layouts": layouts, "steps": STEPS, "start_from": saved}
        by_rank = run_ranks(train_layouts, ranks=ranks, arguments=arguments)
        for index, keys in enumerate(layouts):
            by_layout[name_of(keys, ranks=ranks)] = [results[index] for results in by_rank]
    return by_layout


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_has_the_same_losses_and_gradient_norms(trained: dict[str, list[Trained]], name: str) -> None:
    expected = trained[name_of(REFERENCE, ranks=1)][0].steps
    assert all(norm > 0.3 for _, norm in expected), "nothing was clipped, so this test would miss wrong clipping"
    for rank in trained[name]:
        for (loss, norm), (expected_loss, expected_norm) in zip(rank.steps, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_starts_from_the_same_weights(trained: dict[str, list[Trained]], name: str) -> None:
    expected = trained[name_of(REFERENCE, ranks=1)][0].initial
    seen: set[str] = set()
    for rank in trained[name]:
        for parameter, part in rank.initial.items():
            seen.add(parameter)
            full = expected[parameter]
            if part.shape == full.shape:
                assert torch.equal(part, full), parameter
            elif parameter == "embedding.word.weight":
                continue  # padded: joined below
            else:
                dim = 0 if part.shape[0] != full.shape[0] else 1
                assert torch.equal(part, full.chunk(rank.size, dim=dim)[rank.rank]), parameter
    assert seen == set(expected)
    assert torch.equal(whole_of(trained[name], "initial", "embedding.word.weight"), expected["embedding.word.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_has_the_same_logits_at_any_length(trained: dict[str, list[Trained]], name: str) -> None:
    reference = trained[name_of(REFERENCE, ranks=1)]
    for length in (LENGTH, 4 * LENGTH):
        torch.testing.assert_close(
            whole_of(trained[name], "logits", length), whole_of(reference, "logits", length), atol=1e-4, rtol=0
        )
    for rank in trained[name]:
        assert rank.held_out_loss == pytest.approx(reference[0].held_out_loss, rel=1e-5)
        # of the same 3 samples, which neither the data ranks nor the micro-batch divide
        assert rank.validation_losses == pytest.approx(reference[0].validation_losses, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_computes_the_same_share_of_the_scores(trained: dict[str, list[Trained]], name: str) -> None:
    expected = trained[name_of(REFERENCE, ranks=1)][0].long_density
    assert expected is not None
    assert 0.5 < expected < 0.95, "the steep half of the heads, which one tensor rank has, leaves keys out"
    assert [rank.long_density for rank in trained[name]] == pytest.approx([expected] * len(trained[name]), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_every_layout_hold_the_same_tensors(
    trained: dict[str, list[Trained]], runs: Path, name: str
) -> None:
    expected = open_checkpoint(runs / name_of(REFERENCE, ranks=1))
    checkpoint = open_checkpoint(runs / name)
    assert [saved.step for saved in list_checkpoints(runs / name)] == [STEPS.stop]
    assert checkpoint.manifest.tensors.keys() == expected.manifest.tensors.keys()
    for parameter in expected.manifest.tensors:
        for kind, tolerance in (("weight", 1e-4), ("exp_avg", 1e-4), ("exp_avg_sq", 1e-4)):
            one, other = checkpoint.tensor(parameter, kind=kind), expected.tensor(parameter, kind=kind)
            torch.testing.assert_close(one, other, atol=tolerance, rtol=0, msg=f"{parameter} {kind}")


def joined(folder: Path, name: str) -> NDArray[np.float64]:
    """Return one whole weight of a checkpoint, joined from the files of its tensor ranks."""
    entry = read_manifest(folder).tensors[name]
    files = sorted(folder.glob(f"stage_{entry.stage:02d}_tensor_*.weight.safetensors"))
    parts = [load_file(file)[name].astype(np.float64) for file in files]
    if parts[0].shape == entry.shape:
        return parts[0]
    return np.concatenate(parts, axis=0 if parts[0].shape[1:] == entry.shape[1:] else 1)


@pytest.mark.usefixtures("trained")
def test_the_mean_of_other_layouts_is_that_of_their_files(runs: Path, tmp_path: Path) -> None:
    names = ("t2p2z1w4", "t4p1z0w4", "t1p2z1w2", f"warm/{name_of(REFERENCE, ranks=1)}")
    folders = [list_checkpoints(runs / name)[-1].path for name in names]
    average_checkpoints(folders, out=tmp_path / "mean")
    opened = open_checkpoint(tmp_path / "mean")
    assert (opened.step, opened.manifest.tensor, opened.manifest.pipeline) == (STEPS.stop, 1, 1)
    moved = 0.0
    for name, weight in opened.weights().items():
        expected = np.mean([joined(folder, name) for folder in folders], axis=0)
        assert np.array_equal(weight.numpy(), expected.astype(np.float32)), name
        moved = max(moved, np.abs(expected - joined(folders[-1], name)).max())
    assert moved > 1e-3, "the steps between them changed the weights"


@pytest.mark.parametrize("name", ["t2p2z1w4", "t4p1z0w4"])
def test_exported_model_equals_the_trained_ranks_in_transformers(
    trained: dict[str, list[Trained]], runs: Path, tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    from training.export.run import export_checkpoint

    out = tmp_path / "exported"
    export_checkpoint(runs / name, format="hf", out=out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for length in (LENGTH, 4 * LENGTH):
        with torch.no_grad():
            logits = model(tokens_of(7, samples=1, length=length - 1)).logits
        torch.testing.assert_close(logits, whole_of(trained[name], "logits", length), atol=1e-4, rtol=0)
