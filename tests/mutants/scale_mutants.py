"""Mistakes of scaled positions that no figure shows, each with the test that must catch it."""

from tests.mutants.mutants import Mutant

SCALES, ROTARY = "configs/scales.py", "training/model/positions/rotary.py"
TESTS = "tests/unit/test_model_scaled.py"
BY_RANKS = f"{TESTS}::test_each_rank_attends_with_scaled_slopes_of_its_heads"

SCALE_MUTANTS = (
    Mutant(
        "scale: the slopes of the training",
        "training/model/positions/alibi.py",
        "mine = local_slopes(heads, tensor=self._tensor, bias_max=bias_max, scaling=scaling)",
        "mine = local_slopes(heads, tensor=self._tensor, bias_max=bias_max)",
        f"{BY_RANKS}[linear]",
    ),
    Mutant(
        "scale: ntk divides the steepest slope, not the flattest",
        SCALES,
        "math.log(largest / rate) / span",
        "math.log(rate / smallest) / span",
        f"{BY_RANKS}[ntk]",
    ),
    Mutant(
        "scale: kernels take the slopes of the training",
        "training/model/positions/alibi.py",
        " if scaling is None else None",
        "",
        f"{TESTS}::test_kernels_look_scaled_slopes_up",
    ),
    Mutant(
        "scale: yarn without its temperature",
        ROTARY,
        "self._gain = 1.0 if scaling is None else scaling.gain",
        "self._gain = 1.0",
        f"{TESTS}::test_rotation_takes_scaled_rates_and_gain",
    ),
    Mutant(
        "scale: the factor of the first length stays",
        "training/model/single.py",
        "        self.fit_length(length)\n",
        "",
        f"{TESTS}::test_a_scale_without_a_factor_follows_the_length[rotary]",
    ),
    Mutant(
        "scale: a captured step keeps the bias of before",
        "training/model/single.py",
        "self.windows.take()  # the certificate's calls\n            self._steps = self._new_steps()",
        "self.windows.take()",
        f"{TESTS}::test_a_captured_step_takes_the_newest_scale",
    ),
    Mutant(
        "scale: the certificate compares with the slopes of the training",
        "training/model/proof/certificate.py",
        "slopes = None if promised is None else scaled_rates(promised(model), scaling)",
        "slopes = None if promised is None else promised(model)",
        f"{TESTS}::test_slopes_that_are_not_the_scaled_ones_are_refused",
    ),
    Mutant(
        "scale: a scaled result counts as one without",
        "training/evaluation/results.py",
        ' and result.get("scale") == scale',
        "",
        "tests/unit/test_scale_of_evaluation.py::test_a_usable_length_is_never_a_scaled_one",
    ),
    Mutant(
        "scale: another scale goes on from an interrupted one",
        "training/evaluation/sweep.py",
        'return "" if self.scale is None else f"scale {self.scale}"',
        'return ""',
        "tests/unit/test_scale_of_evaluation.py::test_an_interrupted_scale_does_not_go_on_as_another",
    ),
)
