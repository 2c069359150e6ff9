"""Tell which part of a step an operation or a kernel belongs to, by its name and those around it. Imports no torch.

The names are torch's own: `aten::mm` on a CPU, `nvjet_tst_...` on a GPU, `Optimizer.step#AdamW.step` around one step;
and those of this project's Triton kernels.
"""

import re
from collections.abc import Sequence

MATRIX = "matrix products"
ATTENTION_WORK = "attention"
ELEMENTWISE = "element-wise and norms"
LOSS = "loss"
OPTIMIZER = "optimizer"
COMMUNICATION = "communication"
HOST = "data and host"
IDLE = "idle"
OTHER = "other"
CATEGORIES = (MATRIX, ATTENTION_WORK, ELEMENTWISE, LOSS, OPTIMIZER, COMMUNICATION, HOST, IDLE, OTHER)

# torch's and our own ranges, whatever runs in them
_OPTIMIZER_RANGE = re.compile(r"Optimizer\.|optimizer|_foreach_|_fused_adam|linalg_vector_norm")
_ATTENTION_RANGE = re.compile(r"scaled_dot_product|attention|flex|flash|sdpa", re.IGNORECASE)
_LOSS_RANGE = re.compile(r"MeanLoss|log_softmax|nll_loss|cross_entropy", re.IGNORECASE)
# A batch of small matrix products is the attention of a backend without a fused kernel; a linear layer is one product.
_BATCHED = ("aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::_softmax", "aten::_softmax_backward_data")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::mv", "aten::addmv", "aten::addmv_")
_AROUND_PRODUCTS = ("aten::matmul", "aten::linear")  # what they do themselves, before and after a product
_COLLECTIVE = re.compile(r"c10d|nccl|gloo", re.IGNORECASE)
_COMPILED = re.compile(r"Compiled|CompiledFxGraph|^graph_|^triton_|cpp_fused", re.IGNORECASE)
_AUTOGRAD = re.compile(r"^autograd::|^torch::autograd|Backward|^[A-Z_]\w*$|#")

_ATTENTION_KERNEL = re.compile(r"flash|fmha|attention|flex_|sdpa|^search$", re.IGNORECASE)
_PRODUCT_KERNEL = re.compile(r"gemm|nvjet|xmma|cublas|gemv|splitk|cutlass|triton_(tem|mm)|Cijk_", re.IGNORECASE)
_OPTIMIZER_KERNEL = re.compile(r"multi_tensor|adam", re.IGNORECASE)
_LOSS_KERNEL = re.compile(r"softmax|nll_loss|cross_entropy", re.IGNORECASE)
_ELEMENTWISE_KERNEL = re.compile(
    r"at::native|triton_|elementwise|reduce|norm|cub::|thrust|Memset|DtoD|vectorized"
    r"|^(residual|gelu|swiglu|heads)_(forward|backward)$|^column_sums$",
    re.IGNORECASE,
)


def category_of_operation(path: Sequence[str]) -> str:
    """Return what a CPU's time is spent on.

    Args:
        path: Names of the operations that ran, from the outermost to the innermost; empty if none did.
    """
    if not path:
        return HOST
    around = "\n".join(path)
    if _COLLECTIVE.search(path[-1]):
        return COMMUNICATION
    if _is_optimizers(path):
        return OPTIMIZER
    if any(name in _PRODUCTS for name in path) or path[-1] in _AROUND_PRODUCTS:
        return MATRIX
    if _ATTENTION_RANGE.search(around) or any(name in _BATCHED for name in path):
        return ATTENTION_WORK
    is_tensor_work = path[-1].startswith("aten::") or _COMPILED.search(path[-1]) is not None
    if is_tensor_work:
        return LOSS if _LOSS_RANGE.search(around) else ELEMENTWISE
    return HOST if _AUTOGRAD.search(path[-1]) else OTHER


def category_of_kernel(name: str, path: Sequence[str]) -> str:
    """Return what a GPU's time is spent on.

    Args:
        name: The kernel.
        path: Names around the operation that launched it, its own last; empty if unknown.
    """
    around = "\n".join(path)
    if _COLLECTIVE.search(name):
        return COMMUNICATION
    if "HtoD" in name or "DtoH" in name:
        return HOST
    if _is_optimizers(path) or _OPTIMIZER_KERNEL.search(name):
        return OPTIMIZER
    if _ATTENTION_KERNEL.search(name):
        return ATTENTION_WORK
    if _PRODUCT_KERNEL.search(name):
        return ATTENTION_WORK if any(outer in _BATCHED for outer in path) else MATRIX
    if _LOSS_RANGE.search(around) or _LOSS_KERNEL.search(name):
        return LOSS
    is_known = _ELEMENTWISE_KERNEL.search(name) or any(outer.startswith("aten::") for outer in path)
    return ELEMENTWISE if is_known else OTHER


def _is_optimizers(path: Sequence[str]) -> bool:
    # A compiled kernel is named after all that it computes. Attention's windows have norms too, and no optimizer's are
    # compiled.
    return any(_OPTIMIZER_RANGE.search(name) and not _COMPILED.search(name) for name in path)
