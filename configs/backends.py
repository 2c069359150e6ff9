"""What each attention backend can do; rules, the launcher and `doctor` read it. Imports no torch.

The kernels are in `training/model/kernels/`, a file per backend.
"""

from dataclasses import dataclass

from configs.choices import Choice
from configs.positions import POSITIONS, BiasKind

Device = str

ANY_WIDTH = 1 << 20
ANY_BIAS: tuple[BiasKind, ...] = ("none", "slopes", "table")
COMPUTED_BIAS: tuple[BiasKind, ...] = ("none", "slopes")  # the kernel computes it and takes no tensor


@dataclass(frozen=True)
class Backend(Choice):
    """One way to compute attention; `implementation` is the kernel's class.

    Attributes:
        what: In a few words, how it adds the bias.
        biases: What it can add to the scores.
        precisions: Values of `train.precision` that it can compute.
        head_dims: The smallest and the largest width of a head.
        devices: Kinds of device that it trains on.
        capability: The least compute capability of a GPU.
        package: A module that must be installed beside torch, or None.
        memory: How its memory grows with the length.
        has_run: Where its tests have run.
    """

    what: str
    biases: tuple[BiasKind, ...]
    precisions: tuple[str, ...]
    head_dims: tuple[int, int]
    devices: tuple[Device, ...]
    capability: tuple[int, int]
    package: str | None
    memory: str
    has_run: str

    @property
    def positions(self) -> tuple[str, ...]:
        """Values of `model.position` that it can compute."""
        return tuple(position.name for position in POSITIONS.values() if position.bias in self.biases)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="reference",
            implementation="training.model.kernels.reference.Reference",
            what="written out, one piece, fp32 or wider; the oracle",
            biases=ANY_BIAS,
            precisions=("fp32", "bf16"),
            head_dims=(1, ANY_WIDTH),
            devices=("cpu", "cuda"),
            capability=(0, 0),
            package=None,
            memory="length x length",
            has_run="CPU: fp64, fp32, bf16",
        ),
        Backend(
            name="sdpa",
            implementation="training.model.kernels.sdpa.Sdpa",
            what="torch's scaled_dot_product_attention, blocks of queries over one shared strip of bias",
            biases=ANY_BIAS,
            precisions=("fp32", "bf16"),
            head_dims=(1, ANY_WIDTH),
            devices=("cpu", "cuda"),
            capability=(0, 0),
            package=None,
            memory="length; on a GPU length x length unless heads are a multiple of 8 wide (4 in fp32)",
            has_run="CPU: fp64, fp32, bf16; one H100: bf16, training steps",
        ),
        Backend(
            name="flex",
            implementation="training.model.kernels.flex.Flex",
            what="torch's FlexAttention, compiled; the bias is computed inside the kernel",
            biases=COMPUTED_BIAS,
            precisions=("fp32", "bf16"),
            head_dims=(16, ANY_WIDTH),
            devices=("cuda",),
            capability=(7, 0),
            package=None,
            memory="length",
            has_run="CPU: its formula, uncompiled, forward; one H100: bf16, training steps",
        ),
        Backend(
            name="flash",
            implementation="training.model.kernels.flash.Flash",
            what="flash-attn 2 with alibi_slopes",
            biases=COMPUTED_BIAS,
            precisions=("bf16",),
            head_dims=(1, 256),
            devices=("cuda",),
            capability=(8, 0),
            package="flash_attn",
            memory="length",
            has_run="never; written against its documentation",
        ),
    )
}
AUTO = "sdpa"  # the only one tested on CPUs and GPUs; the others must be asked for


def backend_of(attention: str) -> Backend:
    """Return the backend that a value of `model.attention` means."""
    return BACKENDS[AUTO if attention == "auto" else attention]


def unsupported(backend: Backend, *, position: str, precision: str, head_dim: int) -> str | None:
    """Return why a backend cannot do what a run asks, on any machine, with what to do; None where it can."""
    if position not in backend.positions:
        fitting = [other.name for other in BACKENDS.values() if position in other.positions]
        return f"{backend.name} cannot compute model.position {position}: use {' or '.join(fitting)}"
    fitting = [other.name for other in BACKENDS.values() if precision in other.precisions]
    if fitting and precision not in backend.precisions:  # what none can compute is refused by a rule of its own
        return f"{backend.name} cannot compute train.precision {precision}: use {' or '.join(fitting)}"
    smallest, largest = backend.head_dims
    if not smallest <= head_dim <= largest:
        return (
            f"{backend.name} cannot compute heads of {head_dim} (model.hidden / model.heads), only {smallest} to "
            f"{largest}: use {AUTO} or other heads"
        )
    return None


def unavailable(
    backend: Backend, *, device: Device, packages: frozenset[str], capability: tuple[int, int] | None = None
) -> str | None:
    """Return what a machine lacks for a backend, with what to do; None where it lacks nothing.

    Args:
        backend: The backend.
        device: Kind of device of the ranks: cpu or cuda.
        packages: Those of the backends' packages that are installed.
        capability: The GPU's compute capability, where it is known: asking for it takes torch.
    """
    if device not in backend.devices:
        return f"{backend.name} needs a GPU and this machine's ranks run on {device}: use {AUTO}"
    if backend.package is not None and backend.package not in packages:
        return f"{backend.name} needs the package {backend.package}, which is not installed: install it or use {AUTO}"
    if capability is not None and capability < backend.capability:
        seen, needed = (".".join(map(str, some)) for some in (capability, backend.capability))
        return f"{backend.name} needs a GPU of compute capability {needed}, this one has {seen}: use {AUTO}"
    return None
