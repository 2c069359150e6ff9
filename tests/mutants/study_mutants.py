"""Mistakes of studies, each with the test that must catch it."""

from tests.mutants.mutants import Mutant

TESTS = "tests/unit/test_study.py::"

STUDY_MUTANTS = (
    Mutant(
        "studies: a finished run with fewer steps counts",
        "training/study/rows.py",
        "if key == _STEPS or not key.startswith",
        "if not key.startswith",
        TESTS + "test_a_changed_run_is_refused",
    ),
    Mutant(
        "studies: a report of other weights counts",
        "training/study/progress.py",
        'report.get("weights_sha256") == model_sha256(manifest)',
        "True",
        TESTS + "test_a_report_of_other_weights_is_no_result",
    ),
    Mutant(
        "studies: rows of other data count",
        "launch/study/execution.py",
        "before != sha256",
        "False",
        TESTS + "test_runs_on_other_data_are_refused",
    ),
)
