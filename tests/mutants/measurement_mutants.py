"""Mistakes in how answers are scored and needles placed, each with the test that must catch it."""

from tests.mutants.mutants import Mutant

HARNESS, PROMPTS = "training/harness/scoring.py", "training/retrieval/prompts.py"
SCORING = "training/retrieval/scoring.py"
OF_HARNESS, OF_PROMPTS = "tests/unit/test_harness_scoring.py", "tests/unit/test_retrieval_prompts.py"
OF_SCORES = "tests/unit/test_retrieval_scores.py"
BY_ROW = f"{OF_HARNESS}::test_scores_are_those_of_each_row_alone[alibi]"
BY_CUT = f"{OF_HARNESS}::test_a_long_context_loses_its_beginning"
BY_ORDER = f"{OF_PROMPTS}::test_several_needles_lie_in_the_order_of_the_answer"
BY_PASS = f"{OF_SCORES}::test_scores_are_those_of_one_pass_over_the_text"
INFERENCE = "tests/processes/test_simulated_gpu.py::test_inference_waits_where_it_reads_alone[one process]"

MEASUREMENT_MUTANTS = (
    Mutant(
        "saves: two tensors are gathered at a time",
        "training/checkpoint/rank_part.py",
        "            del value",
        "            parts += ()",
        "tests/unit/test_background_saves.py::test_a_save_gathers_one_tensor_at_a_time",
    ),
    Mutant(
        "harness: a GPU counts the rows of each block's cache",
        "training/model/cache.py",
        ".repeat_interleave(counts).to(keys.device)",
        ".to(keys.device).repeat_interleave(counts.to(keys.device))",
        INFERENCE,
    ),
    Mutant(
        "harness: the context's last token counts",
        HARNESS,
        "[-(max_length + 1) :], len(pair.continuation))",
        "[-(max_length + 1) :], len(pair.continuation) + 1)",
        BY_CUT,
    ),
    Mutant(
        "harness: a long row loses its end",
        HARNESS,
        "(*pair.context, *pair.continuation)[-(max_length + 1) :]",
        "(*pair.context, *pair.continuation)[: max_length + 1]",
        BY_CUT,
    ),
    Mutant(
        "harness: a short row's padding is scored",
        HARNESS,
        "where[place, length - 1 - row.scored : length - 1] = True",
        "where[place, width - 1 - row.scored : width - 1] = True",
        BY_ROW,
    ),
    Mutant(
        "harness: one greedy token makes an answer greedy",
        HARNESS,
        "bool(best.all())",
        "bool(best.any())",
        BY_ROW,
    ),
    Mutant(
        "harness: answers of all questions share the first context",
        HARNESS,
        "[group.rows[0].tokens[:shared] for group in batch]",
        "[batch[0].rows[0].tokens[:shared] for group in batch]",
        BY_ROW,
    ),
    Mutant(
        "retrieval: depth is counted from the end",
        PROMPTS,
        "places[0] = round(depth * space)",
        "places[0] = round((1 - depth) * space)",
        BY_ORDER,
    ),
    Mutant(
        "retrieval: another key's needle lies at the depth",
        PROMPTS,
        "places[0] = round(depth * space)",
        "places[-1] = round(depth * space)",
        BY_ORDER,
    ),
    Mutant(
        "retrieval: several values lie in any order",
        PROMPTS,
        "            places.sort()",
        "            pass",
        BY_ORDER,
    ),
    Mutant(
        "retrieval: a tie is a right choice",
        SCORING,
        "chosen = (right >= wrong).all(1) / ties",
        "chosen = (right >= wrong).all(1).double()",
        f"{OF_SCORES}::test_a_model_that_knows_nothing_scores_as_by_chance",
    ),
    Mutant(
        "retrieval: one number of several is a whole recall",
        SCORING,
        "recall=sum(value in numbers for value in prompt.values) / len(prompt.values)",
        "recall=float(any(value in numbers for value in prompt.values))",
        f"{OF_SCORES}::test_half_of_several_numbers_is_half_a_score",
    ),
    Mutant(
        "retrieval: choices are scored behind the generated answer",
        SCORING,
        "    cache.cut(after)\n",
        "",
        f"{BY_PASS}[single]",
    ),
    Mutant(
        "retrieval: a wrong number stands before the next one",
        SCORING,
        "answers[slot - 1][:, 0]",
        "answers[slot - 1][:, 1]",
        f"{BY_PASS}[multi-value]",
    ),
)
