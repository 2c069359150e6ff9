"""The parameters of families with a norm before attention and before the feed-forward. Imports no torch."""

from collections.abc import Iterator

from configs.schema import Model
from parallel.parameter import Rule, Shard
from training.families.description import Family, Parameter, embedding_std


def prenorm_parameters(family: Family, model: Model, vocab_size: int) -> Iterator[Parameter]:
    """Yield the parameters of a model, in the order of the layers.

    Args:
        family: Its names, and whether it has biases, a norm after the word embedding and a gate.
        model: The decoder's shape.
        vocab_size: Rows of the embedding, without padding.
    """
    shape, std = (vocab_size, model.hidden), embedding_std(model, vocab_size=vocab_size)
    word = Shard("embedding.word.weight", shape, "vocabulary", std, decays=True, tied=model.tie_embeddings)
    yield _named(family, word, "embedding.word")
    if family.embedding_norm:
        yield from _norm(family, model, "embedding.norm")
    for block in range(model.layers):
        yield from _block(family, model, block)
    yield from _norm(family, model, "final_norm")
    if not model.tie_embeddings:
        yield _named(family, Shard("head.weight", shape, "vocabulary", model.init_std, decays=True), "head")


def _block(family: Family, model: Model, block: int) -> Iterator[Parameter]:
    hidden, inner, std = model.hidden, model.inner, model.init_std
    # Each block adds to the residual stream twice: this keeps its variance independent of the depth.
    out_std = std / (2 * model.layers) ** 0.5
    yield from _norm(family, model, "attention_norm", block=block)
    yield from _linear(
        family, "attention.query_key_value", (3 * hidden, hidden), "column", std, block=block, heads=model.heads
    )
    yield from _linear(family, "attention.output", (hidden, hidden), "row", out_std, block=block)
    yield from _norm(family, model, "feed_forward_norm", block=block)
    if family.gated:
        yield from _linear(family, "feed_forward.gate", (inner, hidden), "column", std, block=block)
    yield from _linear(family, "feed_forward.up", (inner, hidden), "column", std, block=block)
    yield from _linear(family, "feed_forward.down", (hidden, inner), "row", out_std, block=block)


def _norm(family: Family, model: Model, module: str, *, block: int | None = None) -> Iterator[Parameter]:
    name = module if block is None else f"blocks.{block}.{module}"
    for part, constant in (("weight", 1.0), ("bias", 0.0)):
        if part == "weight" or family.biases:
            shard = Shard(f"{name}.{part}", (model.hidden,), "replicated", constant=constant)
            yield _named(family, shard, module, block=block)


def _linear(
    family: Family, module: str, shape: tuple[int, int], rule: Rule, std: float, *, block: int, heads: int | None = None
) -> Iterator[Parameter]:
    """Yield weight and bias of a linear of shape [outputs, inputs]."""
    name = f"blocks.{block}.{module}"
    weight = Shard(f"{name}.weight", shape, rule, std, decays=True, heads=heads)
    yield _named(family, weight, module, block=block)
    if family.biases:
        # A row-split linear adds its bias after the sum over the tensor ranks, so each rank holds all of it.
        bias_rule: Rule = "replicated" if rule == "row" else rule
        yield _named(family, Shard(f"{name}.bias", shape[:1], bias_rule), module, block=block)


def _named(family: Family, shard: Shard, module: str, *, block: int | None = None) -> Parameter:
    part = shard.name.rpartition(".")[2]
    huggingface, gguf = (f"{name.format(block=block)}.{part}" for name in family.names[module])
    return Parameter(shard, huggingface, gguf, is_qkv=module == "attention.query_key_value")
