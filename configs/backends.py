"""What each attention backend can do; rules, the launcher and `doctor` read it. Imports no torch.

The kernels are in `training/model/kernels/`, a file per backend.
"""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution

from configs.choices import Choice
from configs.positions import POSITIONS, BiasKind

Device = str

ANY_WIDTH = 1 << 20
ANY_BIAS: tuple[BiasKind, ...] = ("none", "slopes", "table")
COMPUTED_BIAS: tuple[BiasKind, ...] = ("none", "slopes")  # for kernels that compute the bias and take no mask


@dataclass(frozen=True)
class Backend(Choice):
    """One way to compute attention; `implementation` is the kernel's class.

    Attributes:
        what: Short description of it.
        biases: Kinds of bias that it can add to the scores.
        precisions: Values of `train.precision` that it supports.
        head_dims: Smallest and largest width of a head.
        devices: Kinds of device that it trains on.
        capability: Lowest compute capability of a GPU.
        package: A package that must be installed in addition to torch, or None.
        memory: How its memory grows with the length.
        has_run: Where its tests have run.
        keeps_scores: Whether it keeps all scores, in fp32, for the backward pass.
        query_block: Queries that it takes at a time where there is a bias, 0 for all. Its output is then joined from
            blocks, and kept twice for the backward pass.
        fused_widths: Widths of heads of which it has fused kernels on every device are multiples of this; with other
            widths it may keep all scores on a GPU.
        compiles: Whether its kernel is compiled when it is first called.
        tile: Queries that take the same keys, where `query_block` does not say.
        leaves_out_on: Kinds of device on which it leaves out keys without weight.
        shortest: Tokens of the shortest sequence of which it leaves out such keys.
        nearest: Keys up to a block's last query of which it leaves out none.
        within_window: Whether it leaves out such keys of a sliding window too.
        documents: Whether it can keep attention inside documents.
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
    keeps_scores: bool = False
    query_block: int = 0
    fused_widths: int = 1
    compiles: bool = False
    tile: int = 1
    leaves_out_on: tuple[Device, ...] = ()
    shortest: int = 0
    nearest: int = 0
    within_window: bool = True
    documents: bool = False

    @property
    def positions(self) -> tuple[str, ...]:
        """Values of `model.position` that it supports."""
        return tuple(position.name for position in POSITIONS.values() if position.bias in self.biases)

    def unmet(self, *, bias: BiasKind, precision: str, head_dim: int, documents: bool = False) -> set[str]:
        """Return the names of the arguments that it supports on no machine."""
        supported = {
            "bias": bias in self.biases,
            "precision": precision in self.precisions,
            "head_dim": self.head_dims[0] <= head_dim <= self.head_dims[1],
            "documents": self.documents or not documents,
        }
        return {name for name, is_supported in supported.items() if not is_supported}


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="reference",
            implementation="training.model.kernels.reference.Reference",
            what="written out, one piece, fp32 or wider; the oracle",
            biases=ANY_BIAS,
            precisions=("fp32", "tf32", "bf16", "fp16"),
            head_dims=(1, ANY_WIDTH),
            devices=("cpu", "cuda"),
            capability=(0, 0),
            package=None,
            memory="length x length",
            has_run="CPU: fp64, fp32, bf16",
            keeps_scores=True,
            documents=True,
        ),
        Backend(
            name="sdpa",
            implementation="training.model.kernels.sdpa.Sdpa",
            what="torch's scaled_dot_product_attention, blocks of queries over one shared strip of bias",
            biases=ANY_BIAS,
            precisions=("fp32", "tf32", "bf16", "fp16"),
            head_dims=(1, ANY_WIDTH),
            devices=("cpu", "cuda"),
            capability=(0, 0),
            package=None,
            memory="length; on a GPU length x length unless heads are a multiple of 8 wide (4 in fp32)",
            has_run="CPU: fp64, fp32, bf16, fp16; one H100: bf16, training steps",
            query_block=256,
            fused_widths=8,
            leaves_out_on=("cpu",),
            nearest=512,
            within_window=False,
            documents=True,
        ),
        Backend(
            name="flex",
            implementation="training.model.kernels.flex.Flex",
            what="torch's FlexAttention, compiled by Triton; the bias is computed inside the kernel",
            biases=COMPUTED_BIAS,
            precisions=("fp32", "tf32", "bf16", "fp16"),
            head_dims=(16, 256),
            devices=("cuda",),
            capability=(7, 0),
            package=None,
            memory="length",
            has_run="CPU: compiled, forward, with windows; its gradients as formulas in fp64; one H100: fp32 and bf16 "
            "with gradients, training steps in bf16, windows",
            compiles=True,
            tile=128,
            leaves_out_on=("cuda",),
            shortest=15 * 128 + 1,
            documents=True,
        ),
        Backend(
            name="flash4",
            implementation="training.model.kernels.flash4.Flash4",
            what="FlexAttention with FlashAttention 4's kernel, compiled; the bias is computed inside the kernel",
            biases=COMPUTED_BIAS,
            precisions=("bf16", "fp16"),
            head_dims=(128, 128),
            devices=("cuda",),
            capability=(9, 0),
            package="flash-attn-4",
            memory="length",
            has_run="one H100: bf16 with gradients and windows, its tests alone (flash-attn-4 4.0.0b16)",
            compiles=True,
            tile=128,
            leaves_out_on=("cuda",),
            shortest=15 * 128 + 1,
        ),
        Backend(
            name="flash",
            implementation="training.model.kernels.flash.Flash",
            what="flash-attn 2 with alibi_slopes",
            biases=COMPUTED_BIAS,
            precisions=("bf16", "fp16"),
            head_dims=(1, 256),
            devices=("cuda",),
            capability=(8, 0),
            package="flash_attn",
            memory="length",
            has_run="never; written against its documentation",
            documents=True,
        ),
    )
}
EVERYWHERE = "sdpa"  # what runs on every machine, with every position method, precision and head width
AUTO = ("flash4", "flex", EVERYWHERE)  # the fastest first; flash-attn 2 must be asked for


def candidates(
    *,
    device: Device,
    bias: BiasKind,
    precision: str,
    head_dim: int,
    packages: frozenset[str],
    documents: bool = False,
    capability: tuple[int, int] | None = None,
) -> list[Backend]:
    """Return the backends that `auto` may use on a device, the fastest first; never empty.

    Args:
        device: Kind of device of the ranks: cpu or cuda.
        bias: What the position method adds to the scores.
        precision: Value of `train.precision`.
        head_dim: Width of a head.
        packages: Installed packages, out of those that backends need.
        documents: Value of `data.mask_documents`.
        capability: The GPU's compute capability; None if unknown, since asking for it needs torch.
    """
    fitting = [
        backend
        for backend in map(BACKENDS.__getitem__, AUTO)
        if not backend.unmet(bias=bias, precision=precision, head_dim=head_dim, documents=documents)
        and unavailable(backend, device=device, packages=packages, capability=capability) is None
    ]
    return fitting or [BACKENDS[EVERYWHERE]]


def named_backend(attention: str) -> Backend | None:
    """Return the backend that a value of `model.attention` names; None for `auto`, which names none."""
    return None if attention == "auto" else BACKENDS[attention]


def backend_of(
    attention: str,
    *,
    device: Device,
    position: str,
    precision: str,
    head_dim: int,
    documents: bool = False,
    capability: tuple[int, int] | None = None,
) -> Backend:
    """Return the backend that a value of `model.attention` means on this machine; `auto` means the fastest.

    Args:
        attention: The value.
        device: Kind of device of the ranks: cpu or cuda.
        position: Value of `model.position`.
        precision: Value of `train.precision`.
        head_dim: Width of a head.
        documents: Value of `data.mask_documents`.
        capability: The GPU's compute capability; None if unknown.
    """
    return (
        named_backend(attention)
        or candidates(
            device=device,
            bias=POSITIONS[position].bias,
            precision=precision,
            head_dim=head_dim,
            packages=installed_packages(),
            documents=documents,
            capability=capability,
        )[0]
    )


def keeps_only_states(attention: str, *, position: str, head_dim: int) -> bool:
    """Return whether attention keeps for the backward pass only queries, keys, values, its output and a sum per query.

    Others keep all scores, or in each layer a strip of the bias. The mask that `sdpa` copies on a GPU, at lengths off a
    multiple of 8, is not counted.

    Args:
        attention: Value of `model.attention`.
        position: Value of `model.position`.
        head_dim: Width of a head.
    """
    backend = named_backend(attention) or BACKENDS[EVERYWHERE]  # the others that `auto` takes keep less
    keeps_scores = backend.keeps_scores or head_dim % backend.fused_widths > 0
    return not keeps_scores and POSITIONS[position].bias in COMPUTED_BIAS


@cache
def installed_packages() -> frozenset[str]:
    """Return the packages of the attention backends that are installed, without importing them."""
    return frozenset(
        backend.package for backend in BACKENDS.values() if backend.package and _installed(backend.package)
    )


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def unsupported(
    backend: Backend, *, position: str, precision: str, head_dim: int, documents: bool = False
) -> str | None:
    """Return the setting that a backend supports on no machine, and what to do; None if there is none."""
    bias = POSITIONS[position].bias
    unmet = backend.unmet(bias=bias, precision=precision, head_dim=head_dim, documents=documents)
    if "bias" in unmet:
        fitting = _in_words([other for other in BACKENDS.values() if bias in other.biases])
        return f"{backend.name} cannot compute model.position {position}: use {fitting}"
    fitting = _in_words([other for other in BACKENDS.values() if precision in other.precisions])
    if "precision" in unmet:
        return f"{backend.name} cannot compute train.precision {precision}: use {fitting}"
    if "head_dim" in unmet:
        smallest, largest = backend.head_dims
        widths = f"{smallest} to {largest}" if smallest < largest else f"{smallest}"
        advice = (
            f"use {EVERYWHERE} or other heads" if head_dim <= ANY_WIDTH else "set a smaller model.hidden or more heads"
        )
        heads = f"heads of {head_dim} (model.hidden / model.heads)"
        return f"{backend.name} cannot compute {heads}, only {widths}: {advice}"
    if "documents" in unmet:
        fitting = _in_words([other for other in BACKENDS.values() if other.documents and bias in other.biases])
        return f"{backend.name} cannot compute data.mask_documents true: use {fitting}"
    return None


def _in_words(backends: list[Backend]) -> str:
    return " or ".join(row.name if "cpu" in row.devices else f"{row.name} (on a GPU)" for row in backends)


def unavailable(
    backend: Backend, *, device: Device, packages: frozenset[str], capability: tuple[int, int] | None = None
) -> str | None:
    """Return what a machine lacks for a backend, and what to do; None if it lacks nothing.

    Args:
        backend: The backend.
        device: Kind of device of the ranks: cpu or cuda.
        packages: Installed packages, out of those that backends need.
        capability: The GPU's compute capability; None if unknown, since asking for it needs torch.
    """
    if device not in backend.devices:
        return f"{backend.name} needs a GPU and this machine's ranks run on {device}: use {EVERYWHERE}"
    if backend.package is not None and backend.package not in packages:
        missing = f"{backend.name} needs the package {backend.package}, which is not installed"
        return f"{missing}: install it or use {EVERYWHERE}"
    if capability is not None and capability < backend.capability:
        seen, needed = (".".join(map(str, some)) for some in (capability, backend.capability))
        return f"{backend.name} needs a GPU of compute capability {needed}, this one has {seen}: use {EVERYWHERE}"
    return None
