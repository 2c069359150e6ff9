"""Jais models come in: transposed matrices, and muP's scales folded into the weights; transformers has no class."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import InputError
from tests.support.bloom_formula import bloom_logits
from tests.support.exports import train_sentencepiece
from tests.support.huggingface_models import MUP, OLD_MUP, jais_by_our_names, save_jais
from training.checkpoint.read import open_checkpoint
from training.export.import_hf import import_model
from training.export.run import export_checkpoint
from training.model.single import load_single

HEADS, HEAD_DIM = 6, 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer"))


def expected_logits(weights: dict[str, Tensor], tokens: Tensor, *, scaled: bool) -> Tensor:
    """Return the logits by the formula in fp64, with MUP's scales applied where Jais applies them."""
    ours = jais_by_our_names(weights)
    if scaled:
        ours.setdefault("head.weight", ours["embedding.word.weight"])
        ours["embedding.word.weight"] = ours["embedding.word.weight"] * 9.1
        for name in [name for name in ours if "query_key_value" in name]:
            parts = ours[name].view(HEADS, 3, HEAD_DIM, -1).clone()
            parts[:, 0] /= HEAD_DIM**0.5
            ours[name] = parts.view(ours[name].shape)
    return bloom_logits(ours, tokens, layers=2, heads=HEADS) * (0.5 if scaled else 1.0)


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("scales", [{}, MUP, OLD_MUP], ids=["plain", "mup", "old names"])
def test_a_jais_has_the_logits_of_the_formula(
    tmp_path: Path, tokenizer: Path, ties: bool, scales: dict[str, Any]
) -> None:
    weights = save_jais(tmp_path / "hf", tokenizer=tokenizer, ties=ties, **scales)
    result = import_model(tmp_path / "hf", out=tmp_path / "run")
    assert "differ from those of Jais's formula by" in str(result)
    opened = open_checkpoint(tmp_path / "run")
    model = opened.config.model
    assert (model.family, model.inner, model.tie_embeddings, model.dropout) == ("jais", 100, ties, 0.1)
    assert opened.config.data.sequence_length == 32
    tokens = torch.randint(400, (1, 150), generator=torch.Generator().manual_seed(1))
    expected = expected_logits(weights, tokens, scaled=bool(scales))
    found = load_single(opened).logits(tokens)
    torch.testing.assert_close(found.double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    if not scales:  # bit for bit
        copied = jais_by_our_names(weights)
        assert opened.weights().keys() == copied.keys()
        assert all(torch.equal(opened.weights()[name].double(), copied[name]) for name in copied)


def test_a_jais_goes_out_to_llama_cpp_and_with_code(tmp_path: Path, tokenizer: Path) -> None:
    save_jais(tmp_path / "hf", tokenizer=tokenizer, **MUP)
    import_model(tmp_path / "hf", out=tmp_path / "run")
    for name, options in {"gguf": {"dtype": "f16"}, "hf": {"with_code": True}}.items():
        result = export_checkpoint(tmp_path / "run", format=name, out=tmp_path / f"as-{name}", **options)  # type: ignore[arg-type]
        assert result.logits.difference <= result.logits.tolerance
        assert result.continued > 0
    card = (tmp_path / "as-gguf" / "README.md").read_text()
    assert "divides the scores of Jais by the width of a head" in card
    assert "transformers" not in card  # which has no Jais: it did not read the file back
    with pytest.raises(InputError, match=r"transformers has no class for model\.family jais \(it has bloom, mpt\)"):
        export_checkpoint(tmp_path / "run", format="hf", out=tmp_path / "plain")


def test_masks_and_slopes_that_jais_saves_are_understood(tmp_path: Path, tokenizer: Path) -> None:
    weights = save_jais(tmp_path / "hf", tokenizer=tokenizer)
    file = tmp_path / "hf/model.safetensors"
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])[:, None]  # of six heads
    masks = {f"transformer.h.{block}.attn.bias": torch.ones(1, 1, 8, 8) for block in range(2)}
    more = {**masks, "transformer.relative_pe.slopes": slopes, "lm_head.weight": weights["transformer.wte.weight"]}
    save_file({**weights, **{name: tensor.clone() for name, tensor in more.items()}}, file)
    import_model(tmp_path / "hf", out=tmp_path / "run")
    save_file({**load_file(file), "transformer.relative_pe.slopes": 2 * slopes}, file)
    with pytest.raises(InputError, match=r"has a tensor transformer\.relative_pe\.slopes, for which JAIS has no place"):
        import_model(tmp_path / "hf", out=tmp_path / "other")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mup_embeddings_scale", 0, "0"),  # by which the last norm would be divided
        ("embeddings_scale", float("nan"), "NaN"),
        ("mup_output_alpha", None, "null"),
        ("mup_width_scale", "2", '"2"'),
        ("width_scale", -0.5, "-0.5"),
    ],
)
def test_a_scale_must_be_a_positive_number(tmp_path: Path, tokenizer: Path, key: str, value: Any, said: str) -> None:
    save_jais(tmp_path / "hf", tokenizer=tokenizer, **{key: value})
    with pytest.raises(InputError, match=rf"not describe a model \({key} {said} is not a positive number\): check"):
        import_model(tmp_path / "hf", out=tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"activation_function": "gelu"}, r'JAIS with activation_function "gelu" \(only "swiglu"\)'),
        ({"position_embedding_type": "learned"}, r'position_embedding_type "learned" \(only "alibi"\)'),
        ({"alibi_scaling": {"type": "linear", "factor": 2.0}}, r"alibi_scaling \{.*\} \(only null\)"),
        ({"n_inner": 101}, r"has transformer\.h\.0\.mlp\.c_fc2\.weight as \[48, 100\], its .* implies \[48, 101\]"),
    ],
)
def test_another_jais_is_refused(tmp_path: Path, tokenizer: Path, keys: dict[str, Any], message: str) -> None:
    save_jais(tmp_path / "hf", tokenizer=tokenizer, **keys)
    with pytest.raises(InputError, match=message):
        import_model(tmp_path / "hf", out=tmp_path / "run")
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key not in keys}))
    if "alibi_scaling" not in keys:
        with pytest.raises(InputError, match=r"no activation_function|no position_embedding_type|implies \[48, 192\]"):
            import_model(tmp_path / "hf", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
