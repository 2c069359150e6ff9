"""Mistakes that train without a word, each with the test that must catch it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One wrong change of the code.

    Attributes:
        name: What is wrong with it.
        file: Where, from the repository's root.
        right: Text that stands there, exactly once.
        wrong: What takes its place.
        caught_by: Id of the test that must fail.
    """

    name: str
    file: str
    right: str
    wrong: str
    caught_by: str


POSITIONS, KERNELS = "training/model/positions", "training/model/kernels"
ALIBI, BIAS, T5 = f"{POSITIONS}/alibi.py", f"{POSITIONS}/bias.py", f"{POSITIONS}/t5.py"
SDPA, FLEX, BLOCKS = f"{KERNELS}/sdpa.py", f"{KERNELS}/flex.py", f"{KERNELS}/bias_blocks.py"
PRENORM, CERTIFICATE = "training/model/blocks/prenorm.py", "training/model/proof/certificate.py"
BY_FORMULA = "tests/unit/test_model_alibi.py::test_both_backends_equal_the_formula_in_fp64"
BY_SLICES = "tests/unit/test_model_alibi.py::test_slices_of_any_tensor_size_join_to_the_whole"
BY_BIAS = "tests/unit/test_model_alibi.py::test_bias_is_minus_slope_times_distance_and_nothing_ahead"
BY_LENGTH = "tests/unit/test_model_alibi.py::test_bias_is_exact_at_distances_past_65536"
BY_CACHE = "tests/unit/test_model_properties.py::test_token_by_token_past_a_query_block_equals_the_whole"
BY_GREEDY = "tests/unit/test_generation.py::test_greedy_tokens_past_train_length_match_transformers"
BY_FAR = "tests/unit/test_model_properties.py::test_blocks_of_any_size_equal_the_whole_with_gradients"
BY_FLEX = "tests/unit/test_model_backends.py::test_flex_on_the_cpu_equals_the_reference[5-40-alibi]"
BY_BLOOM = "tests/unit/test_model_decoder.py::test_logits_and_gradients_equal_bloom[32-all_heads0]"
BY_CHUNKS = "tests/unit/test_model_decoder.py::test_the_loss_in_chunks_equals_cross_entropy_with_gradients"
REFUSED = "tests/unit/test_model_certificate.py"

MUTANTS = (
    Mutant(
        "every rank takes the first heads' slopes",
        ALIBI,
        "every[mine.start : mine.stop]",
        "every[: len(mine)]",
        BY_SLICES,
    ),
    Mutant(
        "slopes of the local head count",
        ALIBI,
        "slopes(heads, bias_max=bias_max), scaling)\n    return torch.tensor(every[mine.start : mine.stop]",
        "slopes(len(mine), bias_max=bias_max), scaling)\n    return torch.tensor(every",
        BY_SLICES,
    ),
    Mutant(
        "wrong sign",
        BIAS,
        "bias = -local_slopes[:, None, None] * distance",
        "bias = local_slopes[:, None, None] * distance",
        BY_BIAS,
    ),
    Mutant(
        "off-by-one distance, one too near",
        BIAS,
        "* distance\n",
        "* (distance - 1).clamp(min=0)\n",
        BY_BIAS,
    ),
    Mutant(
        "off-by-one distance, a query's own key is one away",
        BIAS,
        "* distance\n",
        "* distance.clamp(min=1)\n",
        BY_BIAS,
    ),
    Mutant(
        "the next key is seen",
        BIAS,
        "query = torch.arange(keys - queries, keys, device=device)",
        "query = torch.arange(keys - queries, keys, device=device) + 1",
        "tests/unit/test_model_properties.py::test_a_later_token_never_changes_an_earlier_logit",
    ),
    Mutant(
        "bf16 positions",
        BIAS,
        "distance = query[:, None] - torch.arange(keys, device=device)[None, :]",
        "distance = query[:, None].bfloat16() - torch.arange(keys, device=device).bfloat16()[None, :]",
        BY_LENGTH,
    ),
    Mutant(
        "bf16 distances",
        BIAS,
        "* distance\n",
        "* distance.bfloat16()\n",
        BY_LENGTH,
    ),
    Mutant(
        "reference: bias scaled by 1 / sqrt(head_dim)",
        f"{KERNELS}/reference.py",
        "keys=k.shape[2], device=q.device, dtype=wide)\n",
        "keys=k.shape[2], device=q.device, dtype=wide) / q.shape[-1] ** 0.5\n",
        f"{REFUSED}::test_a_real_decoder_is_certified_to_rounding[alibi-reference]",
    ),
    Mutant(
        "sdpa: bias scaled by 1 / sqrt(head_dim)",
        SDPA,
        "strip = self.bias(rows=rows, keys=width, device=q.device, dtype=dtype)",
        "strip = self.bias(rows=rows, keys=width, device=q.device, dtype=dtype) / q.shape[-1] ** 0.5",
        f"{REFUSED}::test_a_real_decoder_is_certified_to_rounding[alibi-sdpa]",
    ),
    Mutant(
        "sdpa: a short block takes the strip's first rows",
        BLOCKS,
        "strip[:, :, rows - count :, width - (seen - first) :]",
        "strip[:, :, :count, width - (seen - first) :]",
        BY_FORMULA,
    ),
    Mutant(
        "sdpa: a block takes the strip's first columns",
        BLOCKS,
        "strip[:, :, rows - count :, width - (seen - first) :]",
        "strip[:, :, rows - count :, : seen - first]",
        BY_FORMULA,
    ),
    Mutant(
        "sdpa: far keys lack the offset of their query",
        f"{KERNELS}/sdpa_cpu.py",
        "far_total, near_total = far_total - offset,",
        "far_total, near_total = far_total,",
        BY_FAR,
    ),
    Mutant(
        "sdpa: far keys take the bias of the nearest",
        f"{KERNELS}/sdpa_cpu.py",
        "return row[:, heads, :, start + seen.start : start + seen.stop],",
        "return row[:, heads, :, keys - seen.stop + seen.start :],",
        BY_FAR,
    ),
    Mutant(
        "sdpa: gradients of far keys lack the offset",
        f"{KERNELS}/sdpa_cpu.py",
        "sums[:, some, rows] + offset, mask",
        "sums[:, some, rows], mask",
        BY_FAR,
    ),
    Mutant(
        "ALiBi zeroed behind a cache",
        SDPA,
        "strip = self.bias(rows=rows, keys=width, device=q.device, dtype=dtype)",
        "strip = self.bias(rows=rows, keys=width, device=q.device, dtype=dtype) * (queries > 1)",
        BY_GREEDY,
    ),
    Mutant(
        "flex: wrong sign",
        FLEX,
        "score - slope_of(head) * (query",
        "score + slope_of(head) * (query",
        BY_FLEX,
    ),
    Mutant(
        "flex: queries behind a cache come first",
        FLEX,
        "_padded(q, keys - queries, end)",
        "_padded(q, 0, end + keys - queries)",
        BY_FLEX,
    ),
    Mutant(
        "flex: slopes of the local heads",
        ALIBI,
        "number = head + first",
        "number = head",
        "tests/unit/test_model_backends.py::test_the_slope_formula_is_alibis_for_any_heads_and_split",
    ),
    Mutant(
        "flex: a query sees the next key",
        f"{KERNELS}/tiles.py",
        "return query >= key",
        "return query + 1 >= key",
        BY_FLEX,
    ),
    Mutant(
        "t5: far buckets off by one",
        T5,
        "far = exact + (",
        "far = exact + 1 + (",
        "tests/unit/test_model_t5.py::test_buckets_of_distances_to_5000_equal_transformers",
    ),
    Mutant(
        "rotary: values are turned too",
        PRENORM,
        "q, k = self.position.rotate(q, k, start=cache.start if cache else 0)",
        "q, k, v = (self.position.rotate(x, x, start=cache.start if cache else 0)[0] for x in (q, k, v))",
        "tests/unit/test_model_rotary.py::test_decoder_equals_the_formula_with_llamas_rotation[30-sdpa]",
    ),
    Mutant(
        "sinusoidal: embeddings are not scaled",
        f"{POSITIONS}/sinusoidal.py",
        "out: Tensor = x * hidden**0.5 + table.to(x.dtype)",
        "out: Tensor = x + table.to(x.dtype)",
        "tests/unit/test_model_sinusoidal.py::test_decoder_equals_the_formula_in_logits_and_gradients[30-sdpa]",
    ),
    Mutant(
        "rotary: position off by one behind a cache",
        PRENORM,
        "rotate(q, k, start=cache.start if cache else 0)",
        "rotate(q, k, start=max(cache.start - 1, 0) if cache else 0)",
        f"{BY_CACHE}[rotary-sdpa]",
    ),
    Mutant(
        "sinusoidal: position off by one behind a cache",
        PRENORM,
        "cache.places(first, len(x)) if cache else first",
        "cache.places(first + 1, len(x)) if cache else first",
        f"{BY_CACHE}[sinusoidal-sdpa]",
    ),
    Mutant(
        "certificate: slopes not checked",
        CERTIFICATE,
        "if certificate.slopes_sha256 != expected:",
        "if False:",
        f"{REFUSED}::test_slopes_of_other_heads_are_refused_whatever_the_error",
    ),
    Mutant(
        "certificate: sign not checked",
        CERTIFICATE,
        "if not prefers_near:",
        "if False:",
        f"{REFUSED}::test_a_sign_is_refused_whatever_the_error",
    ),
    Mutant(
        "certificate: shape not checked",
        CERTIFICATE,
        "if not certificate.error <= tolerance:",
        "if False:",
        f"{REFUSED}::test_a_shape_that_is_not_the_slopes_is_refused[1.01]",
    ),
    Mutant(
        "certificate: heads need not be complete",
        CERTIFICATE,
        "if sorted(heads) != list(range(model.heads)):",
        "if False:",
        f"{REFUSED}::test_heads_held_twice_are_refused",
    ),
    Mutant(
        "certificate: nothing past a query block is read",
        CERTIFICATE,
        "LONG = 2 * QUERY_BLOCK + 17",
        "LONG = PROBED",
        f"{REFUSED}::test_a_bias_that_is_wrong_past_a_query_block_is_seen[17]",
    ),
    Mutant(
        "certificate: a rank's heads are what its modules say",
        CERTIFICATE,
        "heads = local_heads(model.heads, tensor=groups.tensor)",
        "heads = position.heads",
        f"{REFUSED}::test_slopes_of_another_ranks_place_are_refused",
    ),
    Mutant(
        "description: the output of attention is split like its input",
        "training/families/prenorm.py",
        '_linear(family, "attention.output", (hidden, hidden), "row", out_std',
        '_linear(family, "attention.output", (hidden, hidden), "column", out_std',
        "tests/unit/test_model_description.py::test_the_description_is_that_of_the_modules[bloom-alibi]",
    ),
    Mutant(
        "certificate: ALiBi promises nothing",
        ALIBI,
        "return -slope[:, None] * torch.arange(distances)",
        "return 0 * slope[:, None] * torch.arange(distances)",
        f"{REFUSED}::test_a_real_decoder_is_certified_to_rounding[alibi-sdpa]",
    ),
    Mutant(
        "description: what adds to the residual stream starts as large as all else",
        "training/families/prenorm.py",
        "out_std = std / (2 * model.layers) ** 0.5",
        "out_std = std",
        "tests/unit/test_model_description.py::test_initial_weights_have_the_described_std[bloom]",
    ),
    Mutant(
        "head: targets in another order than states",
        "parallel/head.py",
        "targets = targets.t()",
        "targets = targets.reshape(targets.shape[::-1])",
        BY_CHUNKS,
    ),
    Mutant(
        "head: only the last chunk's weight gradient counts",
        "parallel/weight_gradient.py",
        "total.addmm_(gradient.t(), x)",
        "total.addmm_(gradient.t(), x, beta=0)",
        BY_CHUNKS,
    ),
    Mutant(
        "head: the gradient does not know the loss's scale",
        "parallel/head.py",
        "scale = grad / ctx.tokens",
        "scale = 1 / ctx.tokens + 0 * grad",
        BY_CHUNKS,
    ),
    Mutant(
        "heads: keys' gradients go to the values",
        "parallel/heads.py",
        "joined[:, :, :, part] = grad.permute(2, 0, 1, 3)",
        "joined[:, :, :, (0, 2, 1)[part]] = grad.permute(2, 0, 1, 3)",
        BY_BLOOM,
    ),
    Mutant(
        "description: a parameter that no module has",
        "training/families/table.py",
        "return (*family.parameters(family, model, vocab_size), *_position_table(model))",
        "return (*(all_of := (*family.parameters(family, model, vocab_size),)), all_of[0], *_position_table(model))",
        "tests/unit/test_model_description.py::test_the_description_is_that_of_the_modules[bloom-alibi]",
    ),
)
