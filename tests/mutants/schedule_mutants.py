"""Mistakes of schedules and branches, each with the test that must catch it."""

from tests.mutants.mutants import Mutant

SCHEDULES, BRANCHES = "tests/unit/test_schedules.py::", "tests/unit/test_branches.py::"
BY_PIECES = "tests/unit/test_step_sizes.py::test_short_steps_are_those_of_the_engine_on_pieces"
BY_WARM_UP = "tests/unit/test_step_sizes.py::test_a_warm_up_equals_a_run_and_its_branch"

SCHEDULE_MUTANTS = (
    Mutant(
        "schedules: a cooldown falls from the end of the warm-up on",
        "configs/schedules.py",
        "schedule_steps(train) - cooldown_steps(train) if self.cools_down else train.warmup_steps",
        "train.warmup_steps",
        SCHEDULES + "test_rates_of_wsd_are_those_of_transformers[0.1]",
    ),
    Mutant(
        "schedules: a cooldown that has begun may change",
        "training/folder.py",
        "step > trained",
        "step >= trained",
        SCHEDULES + "test_a_cooldown_that_has_begun_stays",
    ),
    Mutant(
        "branches: optimizer state begins at zero",
        "training/resume.py",
        "load_slices(state, checkpoint, kinds=state.kinds, groups=groups)",
        'load_slices(state, checkpoint, kinds=("weight",), groups=groups)',
        BRANCHES + "test_a_branch_with_the_same_keys_equals_its_trunk",
    ),
    Mutant(
        "branches: the samples that follow may be others",
        "training/resume.py",
        "instead = None if accept_change else _ACCEPT if resumes else _WEIGHTS_ALONE",
        "instead = None if accept_change or not resumes else _ACCEPT",
        BRANCHES + "test_other_samples_are_refused_by_their_hash",
    ),
    Mutant(
        "branches: the newest checkpoint of a run folder at each start",
        "training/folder.py",
        "return _with_train(config, branch_from=fixed if Path(fixed).resolve() == there.resolve() else str(there))",
        "return config",
        BRANCHES + "test_the_checkpoint_of_a_branch_is_fixed_at_its_first_start",
    ),
    Mutant(
        "batches: DeepSpeed steps after each micro-batch",
        "parallel/deepspeed_engine.py",
        "zero.set_micro_batches(self._engine, len(micro_batches))",
        "zero.set_micro_batches(self._engine, 1)",
        BY_WARM_UP,
    ),
    Mutant(
        "batches: DeepSpeed steps in the middle of a larger batch",
        "parallel/zero.py",
        "    engine.micro_steps = 0",
        "    pass",
        BY_WARM_UP,
    ),
    Mutant(
        "batches: all steps count as full ones",
        "training/trainer.py",
        "consumed = state.consumed_samples + size.batch",
        "consumed = state.consumed_samples + config.train.global_batch",
        BY_WARM_UP,
    ),
    Mutant(
        "batches: one step too few is small",
        "configs/step_sizes.py",
        "taken = min(left, steps)",
        "taken = min(left, steps - 1)",
        BY_WARM_UP,
    ),
    Mutant(
        "lengths: sequences stay whole",
        "data_pipeline/loader.py",
        "length=size.length)",
        "length=self._samples.sequence_length)",
        BY_PIECES,
    ),
    Mutant(
        "lengths: the token between two pieces is no target",
        "data_pipeline/loader.py",
        "batch.unfold(-1, length + 1, length)",
        "batch.unfold(-1, length + 1, length + 1)",
        BY_PIECES,
    ),
    Mutant(
        "lengths: one step too many is short",
        "configs/step_sizes.py",
        "if step <= end)",
        "if step <= end + 1)",
        BY_PIECES,
    ),
    Mutant(
        "lengths: a jump of the loss at a longer one is a spike",
        "training/divergence.py",
        "[-steps_of_its_length(step, self._train) :]",
        "",
        "tests/unit/test_rollbacks.py::test_only_a_lasting_rise_is_a_spike",
    ),
)
