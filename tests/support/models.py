"""Build small decoders in which every weight matters, and the same model in transformers."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM

from configs.schema import Model
from parallel.axes import Group
from parallel.groups import lone_groups
from parallel.seeds import initial_weights
from parallel.shards import declared
from parallel.start import start_alone
from tests.support.bloom_formula import bloom_logits
from training.families.table import huggingface_names, shards_of
from training.model.decoder import Decoder, plan_layers
from training.model.positions.t5 import BucketBias

VOCABULARY = 97
LAYERS = 2
ONE_RANK = Group(0, 1, None)


def learned_bias(heads: int, *, tensor: Group = ONE_RANK) -> BucketBias:
    """Return T5's bias of a model with `heads` heads, on one tensor rank; its weights are not set."""
    table = shards_of(Model(layers=1, hidden=heads, heads=heads, position="t5"), vocab_size=1)["positions.t5.weight"]
    return BucketBias(table, tensor=tensor)


def small_model(heads: int, *, head_dim: int = 8, **keys: Any) -> Model:
    """Return a model of two blocks, with the schema's defaults and further keys."""
    hidden = head_dim * heads
    std = 1.2 / hidden**0.5
    return Model(layers=LAYERS, hidden=hidden, heads=heads, init_std=std, embedding_init_std=std, **keys)


def make_decoder(
    heads: int, *, head_dim: int = 8, backend: str = "sdpa", recompute: bool = False, **keys: Any
) -> Decoder:
    """Return a decoder of two blocks in one process; at any width, every weight changes the logits.

    Args:
        heads: Its heads.
        head_dim: Width of each.
        backend: Value of `model.attention`.
        recompute: Whether blocks are recomputed in the backward pass.
        keys: Further keys of the section `model`.
    """
    start_alone()
    model = small_model(heads, head_dim=head_dim, attention=backend, **keys)
    tensor = lone_groups().tensor
    decoder = Decoder(plan_layers(model, vocab_size=VOCABULARY, tensor=tensor, recompute=recompute))
    initial_weights(decoder, seed=3, tensor=tensor)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:  # biases and norms begin as zeros and ones
                parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder


def make_wandering_decoder(*, position: str = "alibi") -> Decoder:
    """Return a decoder of 4 heads whose greedy tokens keep changing, so that they depend on its attention.

    The output layer shares the embedding, so most tokens would be their own likeliest successors: random signs in the
    final norm prevent that.
    """
    decoder = make_decoder(4, position=position)
    norm = decoder.layers[-1].norm
    signs = torch.randint(0, 2, norm.weight.shape, generator=torch.Generator().manual_seed(7)) * 2 - 1
    with torch.no_grad():
        norm.weight.copy_(signs)  # type: ignore[operator, union-attr]
        norm.bias.zero_()  # type: ignore[operator, union-attr]
    return decoder


def weights_of(decoder: Decoder) -> dict[str, Tensor]:
    """Return copies of a decoder's weights by logical name, in its type; they take gradients."""
    return {name: p.detach().clone().requires_grad_() for name, (p, _) in declared(decoder).items()}


def counterpart_of(weights: Mapping[str, Tensor], model: Model) -> BloomForCausalLM | MptForCausalLM:
    """Return transformers' model of the family with these whole weights, copied by the project's table of names."""
    config: dict[str, Any] = {
        "vocab_size": len(weights["embedding.word.weight"]),
        "hidden_size": model.hidden,
        "tie_word_embeddings": model.tie_embeddings,
    }
    theirs: BloomForCausalLM | MptForCausalLM
    if model.family == "mpt":
        theirs = MptForCausalLM(MptConfig(n_layers=model.layers, n_heads=model.heads, **config))
    else:
        theirs = BloomForCausalLM(BloomConfig(n_layer=model.layers, n_head=model.heads, **config))
    parameters, names = dict(theirs.named_parameters()), huggingface_names(model)
    with torch.no_grad():
        for name, weight in weights.items():
            parts_first = model.family == "mpt" and "query_key_value" in name
            by_head = (model.heads, 3, -1, *weight.shape[1:])
            theirs_order = weight.view(by_head).transpose(0, 1).reshape(weight.shape) if parts_first else weight
            parameters.pop(names[name]).copy_(theirs_order)
    assert not parameters, f"never set: {list(parameters)}"
    return theirs.eval()


def logits_and_gradients(
    weights: Mapping[str, Tensor], model: Model, tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a model's logits of tokens [batch, seq + 1] but the last, and the gradients of its mean loss, by name.

    They are those of transformers' model of the family, or of the formula where transformers has none.
    """
    theirs = None if model.family == "jais" else counterpart_of(weights, model)
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    inputs = tokens[:, :-1]
    if theirs is None:
        logits = bloom_logits(leaves, inputs, layers=model.layers, heads=model.heads)
    else:
        logits = theirs(inputs).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    if theirs is not None:
        return logits.detach(), gradients_of(theirs, model)
    return logits.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def gradients_of(theirs: BloomForCausalLM | MptForCausalLM, model: Model) -> dict[str, Tensor]:
    """Return the gradients of transformers' model by logical name, with rows in our order."""
    parameters, gradients = dict(theirs.named_parameters()), {}
    for ours, name in huggingface_names(model).items():
        gradient = parameters[name].grad
        assert gradient is not None
        if model.family == "mpt" and "query_key_value" in ours:
            by_part = (3, model.heads, -1, *gradient.shape[1:])
            gradient = gradient.view(by_part).transpose(0, 1).reshape(gradient.shape)
        gradients[ours] = gradient
    return gradients
