"""The description of a model fits its modules, its initial weights, and the names of other programs."""

from math import prod

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM

from configs.backends import BACKENDS
from configs.choices import FAMILIES, OPTIMIZERS
from configs.load import load_run
from configs.positions import POSITIONS
from configs.schema import Model
from parallel.seeds import initial_weights
from parallel.shards import declared, shard_of
from tests.support.models import ONE_RANK
from training.families.bloom import BLOOM
from training.families.mpt import MPT
from training.families.table import describe, parameter_count
from training.model.positions.method import PositionMethod
from training.model.single import lone_decoder

VOCABULARY = 97


def model_of(family: str = "bloom", position: str = "alibi") -> Model:
    return Model(layers=3, hidden=24, heads=3, feed_forward=40, family=family, position=position, init_std=0.5)


def test_every_word_of_the_schema_has_its_implementation() -> None:
    assert all(issubclass(position.load(), PositionMethod) for position in POSITIONS.values())
    assert all(callable(backend.load()) for backend in BACKENDS.values())
    assert all(callable(optimizer.load()) for optimizer in OPTIMIZERS.values())
    for name, family in FAMILIES.items():
        assert family.load().name == name
        assert callable(family.load_layers())
        assert family.feed_forward_matrices == 2 + family.load().gated
    # One file per choice: no two values share a file.
    rows = (*POSITIONS.values(), *BACKENDS.values(), *FAMILIES.values())
    files = [str(row.implementation).rpartition(".")[0] for row in rows]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_description_is_that_of_the_modules(family: str, position: str) -> None:
    model = model_of(family, position).model_copy(update={"tie_embeddings": position != "t5"})
    described = {parameter.shard.name: parameter.shard for parameter in describe(model, vocab_size=VOCABULARY)}
    built = declared(lone_decoder(model, vocab_size=VOCABULARY))
    assert {name: shard for name, (_, shard) in built.items()} == described
    assert len(described) == len(describe(model, vocab_size=VOCABULARY))
    for name, (parameter, shard) in built.items():
        assert tuple(parameter.shape) == shard.shape, name
    assert parameter_count(model, vocab_size=VOCABULARY) == sum(prod(shard.shape) for shard in described.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_have_the_described_std(family: str) -> None:
    model = Model(layers=2, hidden=96, heads=3, family=family, init_std=0.5, embedding_init_std=0.3)
    decoder = lone_decoder(model, vocab_size=VOCABULARY)
    initial_weights(decoder, seed=1, tensor=ONE_RANK)
    for name, (parameter, shard) in declared(decoder).items():
        if shard.init_std is None:
            assert parameter.unique().tolist() == [1.0 if name.endswith("norm.weight") else 0.0], name
        else:
            # Weights that add to the residual stream are smaller, by the square root of the number of additions.
            adds = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            std = 0.3 if name == "embedding.word.weight" else 0.25 if adds else 0.5
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.05), name


def test_matrices_decay_and_norms_biases_and_tables_do_not() -> None:
    model = model_of(position="t5").model_copy(update={"tie_embeddings": False})
    decoder = lone_decoder(model, vocab_size=VOCABULARY)
    train = load_run("demo").train
    groups = OPTIMIZERS["adamw"].load()(decoder.parameters(), train=train).param_groups
    decayed = {group["weight_decay"]: {shard_of(p).name for p in group["params"]} for group in groups}
    names = {parameter.shard.name for parameter in describe(model, vocab_size=VOCABULARY)}
    matrices = {name for name in names if name.endswith(".weight") and "norm" not in name} - {"positions.t5.weight"}
    assert decayed == {train.weight_decay: matrices, 0.0: names - matrices}


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_transformers_has_the_described_names_and_shapes(family: str, ties: bool) -> None:
    model = Model(layers=3, hidden=24, heads=3, family=family, tie_embeddings=ties)
    bloom = BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=3, n_head=3)
    mpt = MptConfig(vocab_size=VOCABULARY, d_model=24, n_layers=3, n_heads=3)
    with torch.device("meta"):
        module = BloomForCausalLM(bloom) if family == "bloom" else MptForCausalLM(mpt)
    theirs = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if ties:
        del theirs["lm_head.weight"]  # the embedding again
    ours = {p.huggingface: p.shard.shape for p in describe(model, vocab_size=VOCABULARY)}
    assert ours == theirs


def test_gguf_names_are_those_of_llama_cpp() -> None:
    names = {p.shard.name: p.gguf for p in describe(Model(layers=2, hidden=24, heads=3), vocab_size=VOCABULARY)}
    assert names["embedding.word.weight"] == "token_embd.weight"
    assert names["embedding.norm.bias"] == "token_embd_norm.bias"
    assert names["final_norm.weight"] == "output_norm.weight"
    block = {name.removeprefix("blocks.1."): gguf for name, gguf in names.items() if name.startswith("blocks.1.")}
    layers = {
        "attention_norm": "attn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.output": "attn_output",
        "feed_forward_norm": "ffn_norm",
        "feed_forward.up": "ffn_up",
        "feed_forward.down": "ffn_down",
    }
    assert block == {
        f"{ours}.{p}": f"blk.1.{theirs}.{p}" for ours, theirs in layers.items() for p in ("weight", "bias")
    }
    # llama.cpp wants all queries, then all keys, then all values
    assert BLOOM.gguf.qkv == MPT.gguf.qkv == MPT.huggingface.qkv == ("part", "head", "dim")
    mpt = describe(Model(layers=2, hidden=24, heads=3, family="mpt", tie_embeddings=False), vocab_size=VOCABULARY)
    assert {p.gguf for p in mpt} == {
        name for name in names.values() if "bias" not in name and "embd_norm" not in name
    } | {"output.weight"}
