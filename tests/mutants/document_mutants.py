"""Mistakes of attention inside documents, each with the test that must catch it."""

from tests.mutants.mutants import KERNELS, Mutant

DOCUMENTS, DATA, TILES = "parallel/documents.py", "data_pipeline/documents.py", f"{KERNELS}/tiles.py"
HERE = "tests/unit/test_documents.py::"
BY_KERNEL = HERE + "test_attention_of_documents_is_that_of_each_alone"
BY_PACKED = HERE + "test_a_packed_window_is_its_documents_alone"
BY_SAMPLES = "tests/unit/test_data_samples.py::test_samples_say_where_documents_begin"
BY_TILES = "tests/unit/test_flex_tiles.py::"

DOCUMENT_MUTANTS = (
    Mutant(
        "documents: the end token belongs to the document that it ends",
        DATA,
        "    begins[:1] = True\n",
        "    begins[1:] = begins[:-1].copy()\n    begins[:1] = True\n",
        BY_SAMPLES + "[5]",
    ),
    Mutant(
        "documents: text that follows without an end token is of the same document",
        DATA,
        "    begins[joins[tokens[joins - 1] != end]] = True\n",
        "",
        BY_SAMPLES + "[None]",
    ),
    Mutant(
        "documents: the next document begins behind the end token too",
        DATA,
        "joins[tokens[joins - 1] != end]",
        "joins",
        BY_SAMPLES + "[5]",
    ),
    Mutant(
        "documents: those of the targets, one token late",
        DOCUMENTS,
        "Documents(batch[:, 1, :-1], device=device)",
        "Documents(batch[:, 1, 1:], device=device)",
        BY_PACKED + "[alibi-False]",
    ),
    Mutant(
        "documents: positions go on from the document before",
        "training/model/blocks/prenorm.py",
        "cache.places(first, len(x)) if cache else first",
        "cache.start if cache else first",
        BY_PACKED + "[sinusoidal-False]",
    ),
    Mutant(
        "documents: reference does not mask them",
        f"{KERNELS}/reference.py",
        "scores = scores.masked_fill(outside, -torch.inf)",
        "pass",
        BY_KERNEL + "[alibi-None-reference]",
    ),
    Mutant(
        "documents: sdpa does not mask them",
        f"{KERNELS}/sdpa.py",
        "if documents is not None:",
        "if documents is None:",
        BY_KERNEL + "[alibi-None-sdpa]",
    ),
    Mutant(
        "documents: each row has the first one's",
        f"{KERNELS}/each_document.py",
        "zip(documents.lengths, q.unbind()",
        "zip(documents.lengths[:1] * batch, q.unbind()",
        BY_PACKED + "[none-False]",
    ),
    Mutant(
        "documents: flex sees the last key of the document before",
        TILES,
        "(key >= starts[batch, query])",
        "(key >= starts[batch, query] - 1)",
        BY_TILES + "test_the_tiles_of_documents_are_those_of_torch[None]",
    ),
    Mutant(
        "documents: flex takes the tile's last query's document",
        TILES,
        "starts[:, None, ::TILE] // TILE",
        "starts[:, None, TILE - 1 :: TILE] // TILE",
        BY_TILES + "test_the_tiles_of_documents_are_those_of_torch[None]",
    ),
    Mutant(
        "documents: the nearest keys are of another document",
        TILES,
        "        place = (place - starts)[:, None]  # [batch, 1, queries]: within the document\n",
        "        pass\n",
        BY_TILES + "test_the_nearest_keys_are_of_the_same_document",
    ),
)
