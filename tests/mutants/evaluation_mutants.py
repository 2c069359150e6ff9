"""Mistakes of the evaluation that no figure shows, each with the test that must catch it."""

from tests.mutants.mutants import Mutant

WINDOWS, SUMS, CONTEXT = (f"training/evaluation/{name}.py" for name in ("windows", "sums", "context"))
BY_DEFINITION = "tests/unit/test_evaluation_windows.py::test_each_protocol_scores_what_it_defines"
BY_SAME = "tests/unit/test_evaluation_windows.py::test_the_same_tokens_are_scored_at_each_length"
BY_ERROR = "tests/unit/test_evaluation_perplexity.py::test_the_standard_error_is_that_of_the_documents_mean"
BY_SUMS = "tests/unit/test_evaluation_perplexity.py::test_a_sweep_on_same_tokens_is_their_loss_alone"
BY_HARM = "tests/unit/test_evaluation_context.py::test_the_best_context_counts_not_a_longest_that_harms"
BY_POINTS = "tests/unit/test_evaluation_context.py::test_every_context_scores_the_same_tokens[100]"

EVALUATION_MUTANTS = (
    Mutant(
        "evaluation: a sliding window's first predictions are scored again",
        WINDOWS,
        "scored_from = np.full_like(starts, length - stride)",
        "scored_from = np.full_like(starts, max(0, length - stride - 1))",
        BY_DEFINITION,
    ),
    Mutant(
        "evaluation: the last predictions end elsewhere at each length",
        WINDOWS,
        "step = length if same is None else same.longest",
        "step = length",
        BY_SAME,
    ),
    Mutant(
        "evaluation: a prediction on the edge of two documents counts as one of the first",
        WINDOWS,
        "first[window] + scored[window] - starts)",
        "first[window] + scored[window] - starts - 1)",
        BY_DEFINITION,
    ),
    Mutant(
        "evaluation: predictions beyond the same tokens are scored",
        SUMS,
        "(places >= from_) & (places < to)",
        "places >= from_",
        BY_SUMS,
    ),
    Mutant(
        "evaluation: each measurement draws other documents",
        "training/evaluation/resampling.py",
        "PCG64(SeedSequence(SEED))",
        "PCG64(SeedSequence())",
        BY_ERROR,
    ),
    Mutant(
        "evaluation: a cut context holds more than it says",
        CONTEXT,
        "length = context + scored - 1",
        "length = context + scored",
        BY_POINTS,
    ),
    Mutant(
        "evaluation: a context counts as used that only the longest window needs",
        "training/evaluation/usable.py",
        "limit = min(losses)",
        "limit = losses[-1]",
        BY_HARM,
    ),
    Mutant(
        "evaluation: the same text in other masked documents is the same text",
        "training/evaluation/kept.py",
        'return not recorded or bool(one["documents_sha256"] == other["documents_sha256"])',
        "return True",
        "tests/unit/test_evaluation_reports.py::test_texts_cut_in_other_documents_are_not_one",
    ),
    Mutant(
        "evaluation: the last block adds what the last places read to the states of the first",
        "training/model/blocks/prenorm.py",
        "x, attended = x[-last:], attended[-last:]",
        "x, attended = x[:last], attended[-last:]",
        "tests/unit/test_model_decoder.py::test_single_model_losses_equal_cross_entropy_of_its_logits",
    ),
)
