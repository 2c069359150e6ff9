"""Every legal layout of up to eight ranks has the same losses: `make test-layouts`, some minutes."""

from itertools import product
from pathlib import Path

import pytest

from configs.errors import InputError
from parallel.layout import Layout
from tests.support.layouts import config_of, name_of, train_layouts
from tests.support.ranks import run_ranks

MORE = ("train.micro_batch=1",)  # so that each of eight data ranks has one
JAIS = ("model.family=jais",)
UNTIED_MPT = ("model.family=mpt", "model.tie_embeddings=false", "model.alibi_bias_max=5")
STEPS = range(10)
AXES = (1, 2, 4, 8)


def legal_layouts(ranks: int) -> list[dict[str, int]]:
    """Return the layouts that a run's rules and the number of ranks allow."""
    layouts = []
    for tensor, pipeline, zero in product(AXES, AXES, range(4)):
        keys = {"tensor": tensor, "pipeline": pipeline, "zero": zero}
        try:
            Layout.of(config_of(keys, run_dir=Path("unused"), more=MORE), world_size=ranks)
        except InputError:
            continue
        layouts.append(keys)
    return layouts


def test_the_rules_allow_the_layouts_known_to_work() -> None:
    assert [len(legal_layouts(ranks)) for ranks in (1, 2, 4, 8)] == [4, 9, 15, 17]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("all_layouts")


def _train(
    runs: Path, *, ranks: int, layouts: list[dict[str, int]], model: tuple[str, ...] = ()
) -> dict[str, list[list[tuple[float, float]]]]:
    tokenizer = runs / "tokenizer.model"
    tokenizer.write_bytes(b"no test here reads it")
    arguments = {"steps": STEPS, "folder": runs, "tokenizer": tokenizer, "start_from": None, "long": None}
    by_rank = run_ranks(
        train_layouts, ranks=ranks, arguments={**arguments, "layouts": layouts, "more": (*MORE, *model)}
    )
    return {name_of(keys, ranks=ranks): [r[i].steps for r in by_rank] for i, keys in enumerate(layouts)}


@pytest.fixture(scope="module")
def expected(runs: Path) -> list[tuple[float, float]]:
    reference = {"tensor": 1, "pipeline": 1, "zero": 0}
    return _train(runs, ranks=1, layouts=[reference])["t1p1z0w1"][0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_legal_layout_has_the_same_losses_and_norms(
    runs: Path, expected: list[tuple[float, float]], ranks: int
) -> None:
    for name, by_rank in _train(runs, ranks=ranks, layouts=legal_layouts(ranks)).items():
        for steps in by_rank:
            assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=1e-5), name
            assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in expected], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "ranks"), [(UNTIED_MPT, 4), (JAIS, 4), (("train.optimizer=muon",), 8)], ids=["mpt", "jais", "muon"]
)
def test_other_runs_have_the_same_losses_in_every_layout(tmp_path: Path, model: tuple[str, ...], ranks: int) -> None:
    reference = _train(tmp_path, ranks=1, layouts=[{"tensor": 1, "pipeline": 1, "zero": 0}], model=model)
    losses, norms = zip(*reference["t1p1z0w1"][0], strict=True)
    layouts = [*legal_layouts(ranks), {"tensor": 2, "pipeline": 2, "zero": 1, "sequence": True}]
    for name, by_rank in _train(tmp_path, ranks=ranks, layouts=layouts, model=model).items():
        for steps in by_rank:
            assert [loss for loss, _ in steps] == pytest.approx(losses, rel=1e-5), name
            assert [norm for _, norm in steps] == pytest.approx(norms, rel=1e-5), name


# Dynamo asks each tensor for its gradient.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_has_the_same_losses_on_tensor_ranks(
    runs: Path, expected: list[tuple[float, float]], tmp_path: Path
) -> None:
    losses, norms = zip(*expected, strict=True)
    layouts = [{"tensor": 2, "pipeline": 1, "zero": 1, "sequence": sequence} for sequence in (False, True)]
    for name, by_rank in _train(tmp_path, ranks=2, layouts=layouts, model=("train.compile=on",)).items():
        for steps in by_rank:
            assert [loss for loss, _ in steps] == pytest.approx(losses, rel=1e-5), name
            assert [norm for _, norm in steps] == pytest.approx(norms, rel=1e-5), name
