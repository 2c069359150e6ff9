"""Mistakes of the optimizers."""

from tests.mutants.mutants import Mutant

TORCHS = "tests/unit/test_muon.py::test_steps_are_those_of_torchs_muon_and_adamw"
WHOLE = "tests/unit/test_whole_matrices.py::test_results_are_those_of_whole_matrices"
ON_GPU = "tests/processes/test_simulated_gpu.py::test_a_ranks_tensors_lie_on_its_gpu[offload]"
NO_WAIT = "tests/processes/test_simulated_gpu.py::test_no_step_waits_for_the_gpu[default]"
FINITE = "tests/unit/test_muon.py::test_a_step_without_finite_gradients_changes_nothing"

OPTIMIZER_MUTANTS = (
    Mutant(
        "norm: summed over ranks where the optimizer is offloaded to",
        "parallel/gradients.py",
        "own.to(device).square()",
        "own.square()",
        ON_GPU,
    ),
    Mutant(
        "norm: read in each step",
        "parallel/zero.py",
        "torch.as_tensor(engine.get_global_grad_norm(), ",
        "torch.as_tensor(float(engine.get_global_grad_norm()), ",
        NO_WAIT,
    ),
    Mutant(
        "muon: no Nesterov momentum",
        "parallel/muon.py",
        "gradient.lerp_(average, self._momentum)",
        "gradient.copy_(average)",
        TORCHS,
    ),
    Mutant(
        "muon: query, key and value as one matrix",
        "parallel/muon.py",
        "if shard.heads is None:",
        "if True:",
        "tests/unit/test_muon.py::test_query_key_and_value_are_matrices_of_their_own",
    ),
    Mutant(
        "muon: the momentum fades in a step that is left out",
        "parallel/muon.py",
        "(1 - self._momentum) * taken)",
        "1 - self._momentum)",
        FINITE,
    ),
    Mutant(
        "muon: the parts of tensor ranks in the order of data ranks",
        "parallel/whole_matrices.py",
        "[pieces[rank :: self._tensor] for rank in range(self._tensor)]",
        "list(zip(*[iter(pieces)] * (len(pieces) // self._tensor)))",
        WHOLE,
    ),
    Mutant(
        "muon: results cut by rows",
        "parallel/whole_matrices.py",
        ".chunk(self._tensor, dim)",
        ".chunk(self._tensor, 0)",
        WHOLE,
    ),
    Mutant(
        "muon: parts of joined matrices from the beginning",
        "parallel/whole_matrices.py",
        "max(begin - rank * size, 0)",
        "begin",
        WHOLE,
    ),
)
