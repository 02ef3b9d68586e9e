"""Mistakes in the numbers that a resumed run depends on: they may follow from the config and the clock alone."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_TESTS = "tests/trainers"
_STEP = "trainers/step.py"
_TREE = "trainers/tree.py"
_REDUCTION = "trainers/reduction.py"
_DIVERGENCE = "trainers/divergence.py"
_FINGERPRINT = "trainers/fingerprint.py"
_LAYOUTS = f"{_TESTS}/test_reduction.py::test_every_layout_builds_the_same_tree"

NUMBERS = (
    Mutant(
        "the tree of sums begins anew on each rank",
        _REDUCTION,
        "self._own = TreeSum(index)",
        "self._own = TreeSum()",
        f"{_LAYOUTS}[local-3-1]",
    ),
    Mutant(
        "a replica's nodes are counted from its own first one",
        _REDUCTION,
        "TreeSum(self._rounds.leaves(topology.replicas[topology.replica]).start)",
        "TreeSum()",
        f"{_LAYOUTS}[local-6-2]",
    ),
    Mutant(
        "a rank's own slices come first, whichever microbatches they are of",
        "trainers/slices.py",
        "parts=[part for some in parts for part in some]",
        "parts=[*parts[own], *(part for some in (*parts[:own], *parts[own + 1 :]) for part in some)]",
        f"{_LAYOUTS}[local-3-1]",
    ),
    Mutant(
        "a unit of which the backward pass reaches a part only is not reduced",
        _REDUCTION,
        "            for begin in self.after_backward:\n                begin()\n",
        "",
        f"{_TESTS}/test_replicated.py",
    ),
    Mutant(
        "gradients of what several units take are added in another order under ddp",
        "trainers/replicated.py",
        "        module.register_forward_pre_hook(_enter, prepend=True, with_kwargs=True)\n",
        "",
        f"{_TESTS}/test_recomputation.py",
    ),
    Mutant(
        "sums are made as they come, whoever makes them",
        _TREE,
        "self._stack[-1][0] == height and not (first - (1 << height)) % (2 << height):",
        "self._stack[-1][0] == height:",
        f"{_TESTS}/test_tree.py::test_a_sum_that_begins_later_keeps_the_nodes_of_the_tree",
    ),
    Mutant(
        "what is left over is folded from the left",
        _TREE,
        "            _, left = self._stack.pop()\n            total = left.add_(total)",
        "            _, left = self._stack.pop(0)\n            total = left.add_(total)",
        f"{_TESTS}/test_tree.py::test_streaming_sum_is_the_tree",
    ),
    Mutant(
        "data is read from the beginning after a restart",
        _STEP,
        "first = (step - 1) * train.global_batch_size + microbatch * train.microbatch_size",
        "first = microbatch * train.microbatch_size",
        f"{_TESTS}/test_step.py",
    ),
    Mutant(
        "noise repeats itself in every step",
        _STEP,
        "    first = state.progress.samples_seen + index * size\n",
        "    first = index * size\n",
        f"{_TESTS}/test_step.py",
    ),
    Mutant(
        "dropout is another one on each rank",
        _STEP,
        "seed_global_generators(config.seed, state.progress.step, index)",
        "seed_global_generators(config.seed, state.progress.step, state.topology.rank)",
        f"{_TESTS}/test_step.py",
    ),
    Mutant(
        "the generators are left as the last microbatch of a rank leaves them",
        _STEP,
        "    settle(task.config.seed, state.progress.step, task.config.train.num_microbatches)\n",
        "",
        f"{_TESTS}/test_step.py",
    ),
    Mutant(
        "an average takes in the weights of a step that made no update",
        _STEP,
        "        state.ema.update(step)\n    else:\n",
        "        state.ema.update(step)\n    else:\n        state.ema.update(step)\n",
        f"{_TESTS}/test_divergence.py::test_a_bad_step_leaves_weights_moments_and_averages_as_they_were",
    ),
    Mutant(
        "the learning rate follows the updates and not the clock",
        _STEP,
        "optimizer.lr, train.num_steps, state.progress.step)",
        "optimizer.lr, train.num_steps, state.optimizer_steps)",
        f"{_TESTS}/test_divergence.py::test_a_bad_step_leaves_weights_moments_and_averages_as_they_were",
    ),
    Mutant(
        "samples that were left out come back",
        _STEP,
        "    task.leave_out(state.exclusions.left_out(step))  # also of a validation after a step that is skipped\n",
        "",
        f"{_TESTS}/test_step.py",
    ),
    Mutant(
        "noise depends on the place in the microbatch",
        "trainers/data/batch.py",
        "noise=normal(seed, Stream.NOISE, positions, shape)",
        "noise=normal(seed, Stream.NOISE, positions - positions[0], shape)",
        f"{_TESTS}/data/test_batch.py::test_a_sample_is_the_same_alone_and_in_any_company",
    ),
    Mutant(
        "each epoch has the same order",
        "trainers/data/sampler.py",
        "derive_seed(seed, Stream.DATA_ORDER, epoch)",
        "derive_seed(seed, Stream.DATA_ORDER, 0)",
        f"{_TESTS}/data/test_sampler.py::test_every_sample_once_an_epoch_in_a_new_order",
    ),
    Mutant(
        "the first step of what is left out is trained on",
        "trainers/exclusions.py",
        "any(first <= step <= last for",
        "any(first < step <= last for",
        f"{_TESTS}/test_divergence.py::test_exclusions_do_not_show_the_order_in_which_they_were_found",
    ),
    Mutant(
        "a sample is left out one step too late",
        "trainers/exclusions.py",
        "if since <= step)",
        "if since < step)",
        f"{_TESTS}/test_divergence.py::test_exclusions_do_not_show_the_order_in_which_they_were_found",
    ),
    Mutant(
        "a rollback leaves out the bad steps only",
        _DIVERGENCE,
        "first = max(1, self._first_bad - self._config.rollback_steps)",
        "first = max(1, self._first_bad)",
        f"{_TESTS}/test_divergence.py::test_too_many_bad_steps_in_a_row_are_a_divergence",
    ),
    Mutant(
        "after a restart bad steps are counted anew",
        _DIVERGENCE,
        'self._first_bad, self.num_bad = int(scalars["first_bad"]), int(scalars["num_bad"])',
        "self._first_bad = self.num_bad = 0",
        f"{_TESTS}/test_divergence.py::test_a_restored_guard_decides_the_same",
    ),
    Mutant(
        "wide rows may change places unseen",
        _FINGERPRINT,
        "seeds = range(row_offset, row_offset + len(rows))",
        "seeds = [0] * len(rows)",
        f"{_TESTS}/test_fingerprint.py::test_swapping_two_different_rows_counts",
    ),
    Mutant(
        "narrow rows are hashed as if they were the first",
        _FINGERPRINT,
        "first_position = row_offset * (spec.row_bytes // element_bytes)",
        "first_position = 0",
        f"{_TESTS}/test_fingerprint.py::test_every_cut_into_rows_gives_the_same_sum",
    ),
    Mutant(
        "a parameter may take part in some steps only",
        "trainers/steadiness.py",
        "if self._seen is not None and seen != self._seen:",
        "if False:",
        f"{_TESTS}/test_optimizer_steps.py::test_a_parameter_that_is_used_in_some_steps_only_is_refused",
    ),
)
