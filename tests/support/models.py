"""Build small decoders in which every weight matters, and the same model in transformers."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM

from configs.schema import Model
from parallel.axes import Group
from parallel.groups import lone_groups
from parallel.seeds import initial_weights
from parallel.shards import declared
from parallel.start import start_alone
from training.families.table import huggingface_names, shards_of
from training.model.decoder import Decoder, plan_layers
from training.model.positions.t5 import LearnedBias

VOCABULARY = 97
LAYERS = 2
ONE_RANK = Group(0, 1, None)


def learned_bias(heads: int, *, tensor: Group = ONE_RANK) -> LearnedBias:
    """Return T5's bias of a model with `heads` heads, on one tensor rank; its weights are not set."""
    table = shards_of(Model(layers=1, hidden=heads, heads=heads, position="t5"), vocab_size=1)["positions.t5.weight"]
    return LearnedBias(table, tensor=tensor)


def make_decoder(
    heads: int,
    *,
    head_dim: int = 8,
    position: str = "alibi",
    backend: str = "sdpa",
    recompute: bool = False,
    window: int | None = None,
) -> Decoder:
    """Return a decoder of two blocks in one process; at any width, every weight changes the logits."""
    start_alone()
    hidden = head_dim * heads
    model = Model(
        layers=LAYERS,
        hidden=hidden,
        heads=heads,
        init_std=1.2 / hidden**0.5,
        embedding_init_std=1.2 / hidden**0.5,
        position=position,
        attention=backend,
        window=window,
    )
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


def bloom_names(*, layers: int = LAYERS) -> dict[str, str]:
    """Return the names of a bloom model's parameters in transformers, by logical name."""
    return huggingface_names(Model(layers=layers, hidden=1, heads=1))


def bloom_of(weights: Mapping[str, Tensor], *, heads: int, layers: int = LAYERS) -> BloomForCausalLM:
    """Return transformers' Bloom with these whole weights, copied by the project's table of names."""
    vocab_size, hidden = weights["embedding.word.weight"].shape
    config = BloomConfig(vocab_size=vocab_size, hidden_size=hidden, n_layer=layers, n_head=heads)
    bloom = BloomForCausalLM(config)
    theirs, names = dict(bloom.named_parameters()), bloom_names(layers=layers)
    with torch.no_grad():
        for name, weight in weights.items():
            theirs.pop(names[name]).copy_(weight)
    assert not theirs, f"never set: {list(theirs)}"
    return bloom.eval()
