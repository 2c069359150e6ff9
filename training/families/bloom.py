"""The bloom family: word embedding with a LayerNorm, pre-norm blocks with biases, a head that shares the embedding.

Source: BigScience, "BLOOM", 2022, section 3.2; the names are those of transformers' BloomForCausalLM and llama.cpp.
"""

from collections.abc import Iterator
from itertools import chain

from configs.schema import Model
from parallel.parameter import Rule, Shard
from training.families.description import QKV_ORDER, Family, Parameter, embedding_std

Names = tuple[str, str, str]
"""A module's names: here, in transformers, in GGUF."""


def _parameters(model: Model, vocab_size: int) -> tuple[Parameter, ...]:
    hidden = model.hidden
    std = embedding_std(model, vocab_size=vocab_size)
    word = Shard("embedding.word.weight", (vocab_size, hidden), "vocabulary", std, decays=True, tied=True)
    embedding_norm = ("embedding.norm", "transformer.word_embeddings_layernorm", "token_embd_norm")
    return (
        Parameter(word, "transformer.word_embeddings.weight", "token_embd.weight"),
        *_norm(embedding_norm, hidden=hidden),
        *chain.from_iterable(_block(model, block) for block in range(model.layers)),
        *_norm(("final_norm", "transformer.ln_f", "output_norm"), hidden=hidden),
    )


def _block(model: Model, block: int) -> Iterator[Parameter]:
    hidden, inner, std = model.hidden, model.inner, model.init_std
    # Each block adds to the residual stream twice: this keeps its variance independent of the depth.
    out_std = std / (2 * model.layers) ** 0.5

    def names(here: str, huggingface: str, gguf: str) -> Names:
        return f"blocks.{block}.{here}", f"transformer.h.{block}.{huggingface}", f"blk.{block}.{gguf}"

    qkv = names("attention.query_key_value", "self_attention.query_key_value", "attn_qkv")
    output = names("attention.output", "self_attention.dense", "attn_output")
    up = names("feed_forward.up", "mlp.dense_h_to_4h", "ffn_up")
    down = names("feed_forward.down", "mlp.dense_4h_to_h", "ffn_down")
    yield from _norm(names("attention_norm", "input_layernorm", "attn_norm"), hidden=hidden)
    yield from _linear(qkv, (3 * hidden, hidden), "column", std, is_qkv=True)
    yield from _linear(output, (hidden, hidden), "row", out_std)
    yield from _norm(names("feed_forward_norm", "post_attention_layernorm", "ffn_norm"), hidden=hidden)
    yield from _linear(up, (inner, hidden), "column", std)
    yield from _linear(down, (hidden, inner), "row", out_std)


def _norm(names: Names, *, hidden: int) -> Iterator[Parameter]:
    for part, constant in (("weight", 1.0), ("bias", 0.0)):
        here, huggingface, gguf = (f"{name}.{part}" for name in names)
        yield Parameter(Shard(here, (hidden,), "replicated", constant=constant), huggingface, gguf)


def _linear(
    names: Names, shape: tuple[int, int], rule: Rule, std: float, *, is_qkv: bool = False
) -> Iterator[Parameter]:
    """Yield weight and bias of a linear of shape [outputs, inputs]."""
    # A row-split linear adds its bias after the sum over the tensor ranks, so each rank holds all of it.
    bias_rule: Rule = "replicated" if rule == "row" else rule
    here, huggingface, gguf = names
    weight = Shard(f"{here}.weight", shape, rule, std, decays=True)
    yield Parameter(weight, f"{huggingface}.weight", f"{gguf}.weight", is_qkv)
    yield Parameter(Shard(f"{here}.bias", shape[:1], bias_rule), f"{huggingface}.bias", f"{gguf}.bias", is_qkv)


BLOOM = Family(
    name="bloom",
    parameters=_parameters,
    norm_epsilon=1e-5,
    huggingface_qkv=QKV_ORDER,
    gguf_qkv=("part", "head", "dim"),
)
