"""Mistakes with a run's data that train without a word, each with the test that must catch it."""

from tests.mutants.mutants import Mutant

LOADER, SAMPLES, COUNTS = (f"data_pipeline/{name}.py" for name in ("loader", "samples", "counts"))
MANIFEST, PREPARE, PIECES = (f"data_pipeline/{name}.py" for name in ("manifest", "prepare", "sentencepiece_tokenizer"))
BY_TOKENIZER = "tests/unit/test_data_tokenizer.py::"
BY_HELD_OUT = "tests/unit/test_data_samples.py::test_held_out_text_is_in_no_training_sample"

DATA_MUTANTS = (
    Mutant(
        "data: a step has other micro-batches with more ranks",
        LOADER,
        "ids.reshape(-1, self._data_size, self._micro_batch)[:, self._data_rank]",
        "ids.reshape(self._data_size, -1, self._micro_batch)[self._data_rank]",
        "tests/unit/test_data_samples.py::test_a_step_has_the_same_samples_for_any_ranks",
    ),
    Mutant(
        "data: held-out text is trained on",
        COUNTS,
        "held_out_sequences if held_out else training_sequences\n",
        "held_out_sequences if held_out else lambda count, share: np.arange(count)\n",
        BY_HELD_OUT,
    ),
    Mutant(
        "data: every seed joins the documents in one order",
        SAMPLES,
        "int(np.random.SeedSequence(seed).generate_state(1)[0])",
        "1",
        BY_HELD_OUT,
    ),
    Mutant(
        "data: a started run takes other weights",
        MANIFEST,
        "weights = {tuple(source.weight for source in data.sources) for data in sections}",
        "weights = {len(sections)}",
        "tests/unit/test_data_moved.py::test_weights_follow_sources_that_are_spelled_anew",
    ),
    Mutant(
        "data: the tokenizer is trained on the first file alone",
        PREPARE,
        "                wanted -= len(text)\n",
        "",
        f"{BY_TOKENIZER}test_every_file_has_its_share_of_the_sample",
    ),
    Mutant(
        "data: text is cut inside a token of newlines",
        PIECES,
        "return [text] if self._newlines_merge else _SOME_LINES.findall(text)",
        "return _SOME_LINES.findall(text)",
        f"{BY_TOKENIZER}test_a_model_whose_pieces_hold_newlines_is_encoded_in_one_go",
    ),
)
