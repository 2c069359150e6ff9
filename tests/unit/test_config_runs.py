"""The shipped runs, their sizes, the folders of a run, and the pages generated from code."""

from pathlib import Path
from typing import Any

import pytest

from configs.document import ATTENTION, TARGET, configuration_page, replace_backend_table
from configs.errors import InputError
from configs.load import RUNS, check_run, load_run
from configs.paths import check_run_folder, data_folder, run_folder
from configs.schema import Model
from training.families.table import parameter_count


def test_parameter_counts_are_the_published_ones() -> None:
    # The counts of bloom-560m and bloom-7b1 in their model cards and state dicts.
    assert parameter_count(Model(layers=24, hidden=1024, heads=16), vocab_size=250880) == 559_214_592
    assert parameter_count(Model(layers=30, hidden=4096, heads=32), vocab_size=250880) == 7_069_016_064


def test_shipped_runs_state_their_own_size() -> None:
    for run, parameters in (
        ("alibi-1b3", 1_361_987_584),
        ("alibi-1b3-80gb", 1_361_987_584),
        ("sinusoidal-1b3", 1_361_987_584),
        ("sinusoidal-1b3-80gb", 1_361_987_584),
        ("wikitext103", 235_098_112),
        ("bloom-176b", 176_244_404_224),
    ):
        config = load_run(run)
        assert parameter_count(config.model, vocab_size=config.data.vocab_size) == parameters, run
        text = (RUNS / f"{run}.yaml").read_text(encoding="utf-8")
        assert run.startswith("sinusoidal-1b3") or f"{parameters:,} parameters" in text, run


def test_the_reference_job_is_the_papers_shape_and_blooms_recipe() -> None:
    config = load_run("alibi-1b3")
    model, train = config.model, config.train
    assert (model.layers, model.hidden, model.heads, model.inner, model.position) == (25, 2048, 16, 8192, "alibi")
    assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.zero) == (2, 2, 1)
    tokens_a_step = train.global_batch * config.data.sequence_length
    assert 0.9e6 < tokens_a_step < 1.1e6
    assert train.warmup_steps * tokens_a_step == pytest.approx(375e6, rel=0.01)
    assert (train.learning_rate, train.min_learning_rate) == (2e-4, 1e-5)
    sinusoidal = load_run("sinusoidal-1b3")
    assert sinusoidal.data.sequence_length == 2 * config.data.sequence_length
    assert sinusoidal.train.global_batch * sinusoidal.data.sequence_length == tokens_a_step


def test_the_runs_for_80_gb_differ_in_the_layout_alone() -> None:
    for name in ("alibi-1b3", "sinusoidal-1b3"):
        split, whole = load_run(name), load_run(f"{name}-80gb")
        assert (whole.parallel.tensor, whole.parallel.pipeline) == (1, 1)
        train = whole.train.model_copy(update={"micro_batch": split.train.micro_batch})
        assert split == whole.model_copy(update={"run": split.run, "parallel": split.parallel, "train": train})


def test_the_demo_stays_legal_when_made_smaller() -> None:
    overrides = ["train.steps=12", "data.sequence_length=128", "data.vocab_size=2048"]
    assert load_run("demo", overrides=overrides).train.steps == 12


def test_data_is_in_the_run_folder_unless_set_otherwise(run_values: dict[str, Any], tmp_path: Path) -> None:
    config = check_run(run_values, name="small")
    assert data_folder(config) == run_folder(config) / "data" == tmp_path / "run" / "data"
    run_values["data"]["dir"] = "shared"
    assert data_folder(check_run(run_values, name="small")) == Path("shared")


def test_a_file_in_the_run_folders_place_is_refused(run_values: dict[str, Any], tmp_path: Path) -> None:
    config = check_run(run_values, name="small")
    assert check_run_folder(config) == tmp_path / "run"
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"run.dir .*/run: .*/run is a file, not a folder: move it away or set"):
        check_run_folder(config)
    run_values["run"]["dir"] = str(tmp_path / "run" / "below")
    with pytest.raises(InputError, match=r"run.dir .*/run/below: .*/run is a file, not a folder"):
        check_run_folder(check_run(run_values, name="small"))


def test_the_page_is_generated_from_the_schema() -> None:
    assert TARGET.read_text(encoding="utf-8") == configuration_page(), "run: python -m configs.document"


def test_the_page_on_attention_has_the_current_backends() -> None:
    page = ATTENTION.read_text(encoding="utf-8")
    assert page == replace_backend_table(page), "run: python -m configs.document"
