"""The decoder: its list of layers, the same with and without pipeline stages, and one module of all layers."""

from torch import Tensor, nn

from configs.choices import FAMILIES
from configs.schema import Model
from parallel.axes import Group
from parallel.plan import LayerPlan
from training.families.table import shards_of
from training.model.attention import make_attention
from training.model.cache import KeyValueCache
from training.model.positions.method import make_position


def plan_layers(model: Model, *, vocab_size: int, tensor: Group, recompute: bool) -> LayerPlan:
    """Return the layers of a decoder, not yet built: a pipeline stage builds only its own.

    Args:
        model: The decoder's shape.
        vocab_size: Tokens, without padding.
        tensor: The tensor axis; each rank builds its own heads, columns and rows.
        recompute: Recompute each block in the backward pass.
    """
    shards = shards_of(model, vocab_size=vocab_size)
    position = make_position(model, shards, tensor=tensor)
    attend = make_attention(model.attention, position.bias)
    plan_family = FAMILIES[model.family].load_layers()
    plan: LayerPlan = plan_family(model, shards, tensor=tensor, position=position, attend=attend, recompute=recompute)
    return plan


class Decoder(nn.Module):
    """All layers of a plan in one module, for the engine without a pipeline and for one process."""

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        self.embedding = plan.embedding()
        self.head = plan.head
        self.layers = nn.ModuleList(make() for make in (*plan.before, *plan.blocks, *plan.after))
        self.shared = plan.shared

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return the states before the head: [batch, seq] -> [batch, seq, hidden].

        With a cache, the tokens follow those in it and are added to it.
        """
        x: Tensor = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        """Return this rank's logits: [batch, seq] -> [batch, seq, local_vocab]."""
        return self.logits(self.hidden(tokens))

    def logits(self, x: Tensor) -> Tensor:
        """Return this rank's logits of states [..., hidden]: [..., local_vocab]."""
        return self.head(self.embedding, x)
