"""The decoder: its list of layers, the same with and without pipeline stages, and one module of all layers."""

from torch import Tensor, nn

from configs.choices import FAMILIES
from configs.schema import Model
from parallel.axes import Group
from parallel.documents import Documents
from parallel.head import Compile, as_it_is
from parallel.plan import LayerPlan, Recompute
from training.families.table import shards_of
from training.model.attention import make_attention
from training.model.cache import Cache
from training.model.positions.method import make_position


def plan_layers(
    model: Model,
    *,
    vocab_size: int,
    tensor: Group,
    recompute: Recompute,
    sequence: bool = False,
    documents: bool = False,
    compiled: Compile = as_it_is,
) -> LayerPlan:
    """Return the layers of a decoder, not yet built: a pipeline stage builds only its own.

    Args:
        model: The decoder's shape.
        vocab_size: Tokens, without padding.
        tensor: The tensor axis; each rank builds its own heads, columns and rows.
        recompute: What each block recomputes in the backward pass.
        sequence: Whether the sequence is split between the linears.
        documents: Whether attention may be asked to stay inside documents.
        compiled: Compiles a function of tensors.
    """
    shards = shards_of(model, vocab_size=vocab_size)
    position = make_position(model, shards, tensor=tensor)
    attend = make_attention(model.attention, position.bias, documents=documents)
    plan_family = FAMILIES[model.family].load_layers()
    plan: LayerPlan = plan_family(
        model,
        shards,
        tensor=tensor,
        position=position,
        attend=attend,
        recompute=recompute,
        sequence=sequence,
        compiled=compiled,
    )
    return plan


class Decoder(nn.Module):
    """All layers of a plan in one module, for the engine without a pipeline and for one process."""

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        self.embedding = plan.embedding()
        self._plan = plan
        self.layers = nn.ModuleList(make() for make in (*plan.before, *plan.blocks, *plan.after))
        self.head_weight = self.embedding if plan.head_weight is None else plan.head_weight()
        self.shared = plan.shared

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the states before the head: [batch, seq] -> [seq, batch, hidden].

        With a cache, the tokens follow those in it and are added to it; with documents, attention stays inside them.
        """
        x: Tensor = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cache=cache)  # by its name: ZeRO's hooks expect tensors among the others
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, documents: Documents | None = None) -> Tensor:
        """Return this rank's logits [batch, seq, local_vocab]; with targets, the mean loss.

        Args:
            tokens: [batch, seq].
            targets: [batch, seq].
            documents: Those that attention stays inside of; None for one per row.
        """
        x = self.hidden(tokens, documents)
        if targets is None:
            return self._plan.logits(self.head_weight, x)
        return self._plan.loss(self.head_weight, x, targets)

    def logits(self, x: Tensor) -> Tensor:
        """Return this rank's logits of whole states: [..., hidden] -> [..., local_vocab]."""
        return self._plan.head.row_logits(self.head_weight, x)

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return each token's loss in nats, without gradients: [..., hidden] and [...] -> [...]."""
        return self._plan.head.token_losses(self.head_weight, x, targets)
