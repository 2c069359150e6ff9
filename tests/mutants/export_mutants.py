"""Mistakes of export, import and averages, each with the test that must catch it."""

from tests.mutants.mutants import Mutant

WEIGHTS, CARRIED = "training/export/format_weights.py", "training/export/formats/carried/modeling_trainshort.py"
VERIFIED = "tests/unit/test_export_verified.py"
BY_GGUF = "tests/unit/test_export_gguf.py::test_transformers_reads_the_logits_of_its_own_format"
BY_FAMILIES = "tests/unit/test_export_families.py::test_both_formats_have_the_logits_of_the_formula"
AVERAGE = "tests/unit/test_average.py"
BY_ROUND_TRIP = "tests/unit/test_import_hf.py::test_a_model_comes_in_and_goes_out_bit_for_bit"

EXPORT_MUTANTS = (
    Mutant(
        "gguf: rows stay in our order",
        WEIGHTS,
        "parts.permute(*order, *range(3, parts.ndim))",
        "parts",
        BY_GGUF,
    ),
    Mutant(
        "gguf: biases stay in our order",
        WEIGHTS,
        "    if parameter.is_qkv:\n",
        "    if parameter.is_qkv and weight.ndim > 1:\n",
        BY_GGUF,
    ),
    Mutant(
        "gguf: a space is added before a text",
        "training/export/formats/gguf.py",
        "writer.add_add_space_prefix(False)",
        "writer.add_add_space_prefix(True)",
        "tests/unit/test_export_gguf.py::test_the_tokenizer_gives_the_ids_and_text_of_sentencepiece",
    ),
    Mutant(
        "export: what is compared keeps its weights",
        "training/export/trained.py",
        "    model.change_weights(partial(exporter.rounded, model=checkpoint.config.model))\n",
        "",
        "tests/unit/test_export_run.py::test_rounded_weights_are_compared_as_they_are_written",
    ),
    Mutant(
        "export: another greedy token passes",
        "training/export/parity.py",
        "if ours is not None and theirs in expected.as_likely(place, tolerance=tolerance):",
        "if ours is not None:",
        f"{VERIFIED}::test_a_greedy_text_that_differs_is_not_exported",
    ),
    Mutant(
        "export: another text of a server passes",
        "training/export/parity.py",
        "if any(follows([*expected.ids[:place], other]) for other in likely):",
        "if likely:",
        f"{VERIFIED}::test_a_text_is_compared_up_to_tokens_as_likely",
    ),
    Mutant(
        "carried code: other slopes between two powers of two",
        CARRIED,
        "(head + 0.5)",
        "(head + 1.5)",
        "tests/unit/test_export_with_code.py::test_every_model_has_its_own_logits[alibi]",
    ),
    Mutant(
        "carried code: padding counts as positions",
        CARRIED,
        "if padding is None else ~padding",
        "if padding is None else padding == padding",
        "tests/unit/test_export_with_code.py::test_padding_on_any_side_changes_no_logits[sinusoidal]",
    ),
    Mutant(
        "export: the slopes between two powers of two come reversed",
        "configs/positions.py",
        "return first + between",
        "return first + between[::-1]",
        "tests/unit/test_model_decoder.py::test_logits_and_gradients_equal_mpt[True]",
    ),
    Mutant(
        "export: a head of its own is tied",
        "training/export/formats/huggingface_config.py",
        '"tie_word_embeddings": model.tie_embeddings,',
        '"tie_word_embeddings": True,',
        f"{BY_FAMILIES}[mpt-untied]",
    ),
    Mutant(
        "export: Mpt's matrix has Bloom's order",
        "training/families/mpt.py",
        'huggingface=WeightLayout(("part", "head", "dim"))',
        'huggingface=WeightLayout(("head", "part", "dim"))',
        f"{BY_FAMILIES}[mpt]",
    ),
    Mutant(
        "gguf: Mpt has Bloom's slopes",
        "training/export/formats/gguf.py",
        "writer.add_max_alibi_bias(float(model.alibi_bias_max))",
        "writer.add_max_alibi_bias(8.0)",
        "tests/unit/test_export_families.py::test_gguf_holds_mpts_other_slopes",
    ),
    Mutant(
        "export: a bias is dropped",
        WEIGHTS,
        "    weight = weights[parameter.shard.name]\n",
        "    weight = weights[parameter.shard.name] * (parameter.shard.name != 'blocks.1.attention.output.bias')\n",
        f"{BY_FAMILIES}[bloom-untied]",
    ),
    Mutant(
        "gguf: queries of Jais are not larger",
        WEIGHTS,
        "return model.head_dim**0.5 if layout.divides_by_width else 1.0",
        "return 1.0",
        "tests/unit/test_export_families.py::test_gguf_has_the_logits_of_a_jais",
    ),
    Mutant(
        "gguf: Jais's queries are rounded as they were trained",
        "training/export/formats/gguf.py",
        "scale = 1.0 if shard.heads is None else query_scale(FAMILIES[model.family].load().gguf, model)",
        "scale = 1.0",
        "tests/unit/test_export_families.py::test_gguf_has_the_logits_of_a_jais",
    ),
    Mutant(
        "import: the logits' scale of a tied Jais stays out of the last norm's bias",
        "training/export/import_hf.py",
        'dict.fromkeys(("final_norm.weight", "final_norm.bias"), scales.logits / scales.embedding)',
        'dict.fromkeys(("final_norm.weight",), scales.logits / scales.embedding)',
        "tests/unit/test_import_jais.py::test_a_jais_has_the_logits_of_the_formula",
    ),
    Mutant(
        "import: rows stay in their order",
        WEIGHTS,
        "source=layout.qkv, target=QKV_ORDER",
        "source=QKV_ORDER, target=QKV_ORDER",
        f"{BY_ROUND_TRIP}[mpt]",
    ),
    Mutant(
        "import: a tied weight that differs passes",
        "training/export/import_hf.py",
        'return name == "lm_head.weight" and torch.equal(',
        'return name == "lm_head.weight" or torch.equal(',
        "tests/unit/test_import_hf.py::test_other_files_of_weights_are_read",
    ),
    Mutant(
        "average: the sum is rounded at each checkpoint",
        "training/averaging/average.py",
        "part=None).double()",
        "part=None).clone()",
        f"{AVERAGE}::test_the_mean_is_that_of_numpy_and_of_torch",
    ),
    Mutant(
        "average: another model of the same shapes passes",
        "training/averaging/chosen.py",
        "*([difference] if difference else []),",
        "",
        f"{AVERAGE}::test_what_has_no_mean_is_refused[another model]",
    ),
)
