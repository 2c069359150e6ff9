"""The code keeps its rules: floors and libraries, what imports torch, names, lengths, and where a choice is made."""

from collections.abc import Callable, Iterable, Iterator

from configs.backends import BACKENDS
from configs.choices import FAMILIES, OPTIMIZERS
from configs.positions import POSITIONS
from configs.precisions import PRECISIONS
from configs.schedules import SCHEDULES
from tests.support.house.choices import ChoiceRule, choice_problems, class_problems
from tests.support.house.imports import environment_problems, import_problems, import_routes, is_part_of
from tests.support.house.names import (
    length_problems,
    long_test_names,
    private_uses,
    renamed_imports,
    shared_names,
)
from tests.support.house.source import FLOORS, HOUSE, Source, is_under, sources_of
from training.export.formats.table import FORMATS

PRODUCT = sources_of(*FLOORS)
TESTS = sources_of("tests")

# These libraries import torch, or take as long to import.
HEAVY = ("torch", "deepspeed", "megatron", "transformers", "safetensors.torch", "mlflow")
# A login node imports these: they must load no heavy library, neither directly nor indirectly.
LIGHT = (
    "configs/",
    "parallel/axes.py",
    "parallel/compilers.py",
    "parallel/layout.py",
    "parallel/parameter.py",
    "data_pipeline/counts.py",
    "data_pipeline/manifest.py",
    "data_pipeline/manifest_file.py",
    "data_pipeline/prepare.py",
    "data_pipeline/sources.py",
    "data_pipeline/text.py",
    "training/appended_lines.py",
    "training/averaging/chosen.py",
    "training/averaging/record.py",
    "training/check_notes.py",
    "training/checkpoint/disk.py",
    "training/checkpoint/manifest.py",
    "training/checkpoint/reshape.py",
    "training/checkpoint/retention.py",
    "training/checkpoint/verify.py",
    "training/comparison/",
    "training/evaluation/kept.py",
    "training/evaluation/markdown.py",
    "training/evaluation/plot.py",
    "training/evaluation/provenance.py",
    "training/evaluation/report.py",
    "training/evaluation/positions.py",
    "training/evaluation/precheck.py",
    "training/curves/copied.py",
    "training/curves/copy.py",
    "training/curves/trackers.py",
    "training/energy.py",
    "training/evaluation/tracked.py",
    "training/evaluation/verdict.py",
    "training/evaluation/request.py",
    "training/evaluation/resampling.py",
    "training/evaluation/results.py",
    "training/export/card.py",
    "training/export/folder.py",
    "training/evaluation/usable.py",
    "training/export/facts.py",
    "training/export/formats/model_card.py",
    "training/export/formats/readers.py",
    "training/export/formats/servers.py",
    "training/export/formats/table.py",
    "training/export/result.py",
    "training/export/while_training.py",
    "training/hook.py",
    "training/families/",
    "training/folder.py",
    "training/followed_log.py",
    "training/followed_metrics.py",
    "training/harness/kept.py",
    "training/harness/report.py",
    "training/harness/tasks.py",
    "training/host_memory.py",
    "training/incarnation.py",
    "training/least_density.py",
    "training/memory.py",
    "training/memory_activations.py",
    "training/memory_changes.py",
    "training/memory_fit.py",
    "training/metrics_reader.py",
    "training/out_of_memory.py",
    "training/own_file.py",
    "training/page/",
    "training/preflight.py",
    "training/profiling/categories.py",
    "training/profiling/report.py",
    "training/profiling/timeline.py",
    "training/rank_errors.py",
    "training/reproduction/",
    "training/retrieval/corpus.py",
    "training/retrieval/kept.py",
    "training/retrieval/plot.py",
    "training/retrieval/prompts.py",
    "training/retrieval/report.py",
    "training/retrieval/request.py",
    "training/retrieval/shares.py",
    "training/retrieval/tasks.py",
    "training/same_model.py",
    "training/sampling.py",
    "training/schedule.py",
    "training/simpler_layouts.py",
    "training/step_columns.py",
    "training/study/",
    "training/tracking/registry.py",
    "training/versions.py",
    "launch/",
)
# Whoever imports one of these waits for DeepSpeed and megatron-core: few should.
SLOW_TO_IMPORT = (
    "parallel/deepspeed_engine.py",
    "parallel/gradients.py",
    "parallel/groups.py",
    "parallel/layers.py",
    "parallel/libraries.py",
    "parallel/pipeline.py",
    "parallel/zero.py",
    "training/api.py",
    "training/build.py",
    "training/evaluation/run.py",
    "training/export/hf_baseline.py",
    "training/export/import_hf.py",
    "training/export/run.py",
    "training/export/trained.py",
    "training/harness/run.py",
    "training/model/blocks/prenorm.py",
    "training/model/distributed.py",
    "training/model/single.py",
    "training/profiling/run.py",
    "training/retrieval/run.py",
    "training/run.py",
)
SLOW_TO_IMPORT_LIMIT = 21
# Each module that logs has its own logger.
NAMES_OF_MANY_MODULES = ("logger",)

CHOICES = (
    ChoiceRule(
        "model.position",
        POSITIONS,
        # An export carries its modelling code, which must do without the product.
        ("configs/positions.py", "training/model/positions/", "training/export/formats/carried/modeling_trainshort.py"),
    ),
    ChoiceRule(
        "model.attention",
        {"auto", *BACKENDS},
        ("configs/backends.py", "training/model/attention.py", "training/model/kernels/"),
    ),
    ChoiceRule("model.family", FAMILIES, ("configs/choices.py", "training/families/", "training/model/blocks/")),
    ChoiceRule("train.precision", PRECISIONS, ("configs/precisions.py",)),
    ChoiceRule("train.optimizer", OPTIMIZERS, ("configs/choices.py", "parallel/optimizers.py")),
    ChoiceRule("train.schedule", SCHEDULES, ("configs/schedules.py", "training/schedule.py")),
    ChoiceRule("--format", {*FORMATS}, ("training/export/formats/",)),
)


def keeps(rule: Callable[[Source], Iterator[str]], sources: Iterable[Source] = PRODUCT) -> None:
    none_of(problem for source in sources for problem in rule(source))


def none_of(problems: Iterable[str]) -> None:
    seen = list(problems)
    assert not seen, "\n".join(["", *seen])


def needs_deepspeed(name: str, imported: str) -> bool:
    """Return whether an import loads DeepSpeed or megatron-core; megatron's datasets do not count."""
    data = name.startswith("data_pipeline/") and is_part_of(imported, "megatron.core.datasets")
    return not data and (is_part_of(imported, "deepspeed") or is_part_of(imported, "megatron"))


def test_modules_import_lower_floors_and_libraries_they_own() -> None:
    keeps(import_problems)


def test_the_environment_is_read_where_ranks_start() -> None:
    keeps(environment_problems)


def test_every_folder_of_code_is_a_package() -> None:
    folders = {(HOUSE / source.name).parent for source in (*PRODUCT, *TESTS)}
    none_of(str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file())


def test_light_modules_import_no_heavy_library() -> None:
    routes = import_routes(PRODUCT, lambda _, imported: any(is_part_of(imported, heavy) for heavy in HEAVY))
    none_of(route for name, route in routes.items() if is_under(name, LIGHT))
    names = [source.name for source in PRODUCT]
    none_of(f"{place} is listed and is not there" for place in LIGHT if not any(is_under(n, (place,)) for n in names))


def test_few_modules_import_deepspeed() -> None:
    routes = import_routes(PRODUCT, needs_deepspeed)
    none_of(route for name, route in routes.items() if name not in SLOW_TO_IMPORT)
    none_of(f"{name} is listed and imports it no longer" for name in SLOW_TO_IMPORT if name not in routes)
    assert len(SLOW_TO_IMPORT) <= SLOW_TO_IMPORT_LIMIT


def test_no_public_name_is_in_two_modules() -> None:
    none_of(shared_names(PRODUCT, allowed=NAMES_OF_MANY_MODULES))


def test_our_names_are_imported_as_they_are() -> None:
    keeps(renamed_imports)


def test_tests_use_no_private_name_of_ours() -> None:
    keeps(private_uses, TESTS)


def test_a_choice_is_asked_for_in_its_own_files() -> None:
    keeps(lambda source: choice_problems(source, CHOICES))
    keeps(lambda source: class_problems(source, PRODUCT, CHOICES))


def test_files_functions_and_names_of_tests_stay_short() -> None:
    keeps(length_problems, (*PRODUCT, *TESTS))
    keeps(long_test_names, TESTS)
