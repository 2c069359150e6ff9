"""Mistakes in noticing a divergence and going back from it, each with the test that must catch it."""

from tests.mutants.mutants import Mutant

ROLLBACKS, TRAINER, DIVERGENCE = "training/rollbacks.py", "training/trainer.py", "training/divergence.py"
ENGINE = "parallel/deepspeed_engine.py"
TESTS = "tests/unit/test_rollbacks.py"
BESIDE = "tests/unit/test_rollbacks_beside.py"
BY_RUN = f"{TESTS}::test_a_diverged_run_goes_on_without_the_samples[0]"
BY_KILL = f"{TESTS}::test_a_kill_after_the_rollback_forgets_nothing"
BY_SECOND = f"{TESTS}::test_a_second_divergence_stops_or_goes_back_again"
BY_SPIKE = f"{TESTS}::test_a_spike_removes_what_was_saved_in_it"
BY_WATCH = f"{TESTS}::test_only_a_lasting_rise_is_a_spike"
BY_SCALE = "tests/unit/test_loss_scale.py::test_a_run_keeps_its_scale_over_restarts_and_rollbacks"
BY_GRADIENTS = "tests/unit/test_loss_scale.py::test_small_gradients_need_the_scale"
BY_Z_LOSS = "tests/unit/test_z_loss.py::test_z_loss_is_in_the_gradient_alone"

DIVERGENCE_MUTANTS = (
    Mutant(
        "divergence: the samples that a run diverged on follow again",
        TRAINER,
        "self._launch(self._without_left_out(state, rollbacks), read_step, exchange)",
        "self._launch(state, read_step, exchange)",
        BY_RUN,
    ),
    Mutant(
        "divergence: a later checkpoint forgets what was left out",
        "training/saver.py",
        "left_out_samples=state.left_out_samples,",
        "left_out_samples=0,",
        BY_RUN,
    ),
    Mutant(
        "divergence: the samples of the last step stay in",
        ROLLBACKS,
        "left_out=diverged.state.next_sample - manifest.next_sample,",
        "left_out=(diverged.state.step - 1 - manifest.step) * 4,",
        BY_RUN,
    ),
    Mutant(
        "divergence: weights come back without the optimizer's step",
        "training/resume.py",
        "    state.set_step(checkpoint.step)\n",
        "",
        BY_RUN,
    ),
    Mutant(
        "divergence: a start knows nothing of the rollbacks before",
        TRAINER,
        "broadcast_from_first(partial(inherited_and_own, run_dir), group=world)",
        "inherited_and_own(run_dir) if self.start.step < 3 else ([], [])",
        BY_KILL,
    ),
    Mutant(
        "divergence: the first of two rollbacks to a checkpoint counts",
        ROLLBACKS,
        "for rollback in reversed(rollbacks):",
        "for rollback in rollbacks:",
        BY_SECOND,
    ),
    Mutant(
        "divergence: a run goes back for ever",
        ROLLBACKS,
        "if folders and done < train.rollbacks:",
        "if folders and train.rollbacks:",
        BY_SECOND,
    ),
    Mutant(
        "divergence: what was saved in the spike stays the newest",
        ROLLBACKS,
        "removed = remove_after(manifest.step, fence=fence)",
        "removed = []",
        BY_SPIKE,
    ),
    Mutant(
        "divergence: a checkpoint of the spike is taken for good",
        DIVERGENCE,
        "began=step - SPIKE_STEPS + 1, state=state)",
        "began=step, state=state)",
        BY_SPIKE,
    ),
    Mutant("divergence: one loss of ten is enough", DIVERGENCE, "if min(last) >", "if max(last) >", BY_WATCH),
    Mutant("divergence: a gradient that is nan trains on", DIVERGENCE, " and math.isfinite(grad_norm)", "", BY_WATCH),
    Mutant(
        "divergence: a branch takes the samples on which its trunk diverged",
        "training/resume.py",
        "            broadcast_from_first(lambda: inherit_rollbacks(train, fence=fence), group=groups.world)\n",
        "",
        f"{BESIDE}::test_a_branch_leaves_out_what_its_trunk_left_out",
    ),
    Mutant(
        "divergence: an older start takes the newer one's metrics",
        TRAINER,
        "        self.fence.check()\n        for observer in observers:",
        "        for observer in observers:",
        f"{BESIDE}::test_a_start_that_was_overtaken_touches_nothing",
    ),
    Mutant(
        "divergence: retention leaves no checkpoint from before a spike",
        "training/saver.py",
        "in_use={*in_use, *self._before_spike(begun.saved.step)}",
        "in_use=in_use",
        f"{BESIDE}::test_a_checkpoint_from_before_a_spike_is_kept",
    ),
    Mutant("z-loss: it is left out", "training/build.py", "z_loss=train.z_loss,", "z_loss=0.0,", BY_Z_LOSS),
    Mutant(
        "z-loss: the target has none",
        "parallel/head.py",
        "target += more * torch.exp(-losses)",
        "pass",
        "tests/distributed/test_head.py::test_split_losses_equal_torch_on_whole_logits[dtype0]",
    ),
    Mutant(
        "fp16: a checkpoint forgets the loss scale",
        "training/saver.py",
        "loss_scale=state.loss_scale,",
        "loss_scale=None,",
        BY_SCALE,
    ),
    Mutant(
        "fp16: a restart forgets the loss scale",
        "training/resume.py",
        ", loss_scale=saved.loss_scale\n",
        "\n",
        BY_SCALE,
    ),
    Mutant(
        "fp16: a step that overflowed is left out",
        ENGINE,
        'if not getattr(self._engine.optimizer, "overflow", False):',
        "if True:",
        BY_SCALE,
    ),
    Mutant(
        "fp16: the loss is not scaled",
        ENGINE,
        "self._engine.optimizer.override_loss_scale(loss_scale)",
        "pass",
        BY_GRADIENTS,
    ),
    Mutant(
        "fp16: a step is taken again with another dropout",
        ENGINE,
        "torch.manual_seed(seed)",
        "torch.manual_seed(seed + 1)",
        f"{BY_SCALE.partition('::')[0]}::test_a_step_that_overflowed_equals_one_that_did_not",
    ),
    Mutant(
        "a divergence stays in offloaded gradients",
        ENGINE,
        "zero.drop_gradients(self._engine)",
        "pass",
        f"{BESIDE}::test_offloaded_gradients_of_a_divergence_are_dropped[bf16]",
    ),
)
