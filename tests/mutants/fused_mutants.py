"""Mistakes of the Triton kernels between the matrix products, each with the test that must catch it."""

from tests.mutants.mutants import Mutant

KERNELS, FUNCTIONS = "parallel/fused_triton.py", "parallel/fused_kernels.py"
BY_KERNEL = "tests/unit/test_fused_kernels.py::test_a_kernel_equals_its_function"

FUSED_MUTANTS = (
    Mutant(
        "fused: columns beyond the width count in a row's variance",
        KERNELS,
        "centered = tl.where(inside, state - mean, 0.0)",
        "centered = state - mean",
        BY_KERNEL + "[37-75-norm]",
    ),
    Mutant(
        "fused: the residual stream's gradient is lost",
        KERNELS,
        "out += tl.load(kept + places, mask=inside, other=0.0).to(tl.float32)",
        "out += 0.0",
        BY_KERNEL + "[37-75-residual norm]",
    ),
    Mutant(
        "fused: an output's bias gets the norm's gradient alone",
        KERNELS,
        "third += out",
        "third += of_row",
        BY_KERNEL + "[37-75-residual norm]",
    ),
    Mutant(
        "fused: a stripe leaves out its last row",
        KERNELS,
        "for row in range(start, tl.minimum(start + each, rows)):",
        "for row in range(start, tl.minimum(start + each - 1, rows)):",
        BY_KERNEL + "[37-75-norm]",
    ),
    Mutant(
        "fused: the sums of columns forget all but a stripe's last tile",
        KERNELS,
        "        total += tl.load(values + places, mask=inside, other=0.0).to(tl.float32)",
        "        total = tl.load(values + places, mask=inside, other=0.0).to(tl.float32)",
        BY_KERNEL + "[37-75-residual]",
    ),
    Mutant(
        "fused: GELU's derivative without its second half",
        KERNELS,
        "return x * share, share + x * rise",
        "return x * share, share",
        BY_KERNEL + "[37-75-tanh]",
    ),
    Mutant(
        "fused: SwiGLU's gate has the slope of a sigmoid times its input alone",
        KERNELS,
        "given * factor * share * (1 + x * (1 - share)), given * x * share",
        "given * factor * share * (x * (1 - share)), given * x * share",
        BY_KERNEL + "[37-75-swiglu]",
    ),
    Mutant(
        "fused: keys' gradients lie where values' belong",
        KERNELS,
        "of_k += _moved(k + apart, result + together, inside, head_dim, 1)",
        "of_k += _moved(v + apart, result + together, inside, head_dim, 1)",
        BY_KERNEL + "[37-75-heads]",
    ),
    Mutant(
        "fused: a gradient that lies otherwise is read as if it did not",
        FUNCTIONS,
        "gradient = torch.zeros_like(states) if gradient is None else gradient.contiguous()",
        "gradient = torch.zeros_like(states) if gradient is None else gradient",
        BY_KERNEL + "[37-75-norm]",
    ),
    Mutant(
        "fused: states that lie otherwise are read as if they did not",
        FUNCTIONS,
        "(rows, width), x = x.shape, x.contiguous()",
        "rows, width = x.shape",
        BY_KERNEL + "[37-75-norm]",
    ),
    Mutant(
        "fused: one stripe's sums are taken for all",
        FUNCTIONS,
        "sums.sum(0)",
        "sums[0]",
        BY_KERNEL + "[37-75-exact]",
    ),
)
