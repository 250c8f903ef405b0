"""Checkpoints written by real NeoX go on here with the losses they had there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron.base.errors import CheckpointError
from megatron.checkpoint.stored import StoredCheckpoint, read_model_facts
from megatron.config.topology import Topology
from megatron.model.facts import ModelFacts
from tests.checkpoint.tiny_run import TinyRun, TinySettings, as_batch
from tests.worlds import run_ranks

DATA = Path(__file__).parents[1] / "data"
ORACLE = DATA / "oracle"
TOKENS = np.load(DATA / "checkpoint" / "oracle_train_tokens.npy")
TRACES = json.loads((ORACLE / "traces.json").read_text())

# Vocabulary padded at tensor size 1 and 2; at 2 NeoX counts every replicated bias twice.
RUNS = {
    "a": TinySettings(Topology(1, 1, 1)),
    "b": TinySettings(Topology(2, 1, 2), padded_vocab_size=384, bias_multiplicity=2),
}


def recorded_batches(iteration):
    for tokens in TOKENS[iteration]:
        yield as_batch(tokens)


@pytest.mark.distributed
@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_full_resume_goes_on_with_neox_losses(name, tmp_path):
    settings = RUNS[name]

    def worker(context):
        run = TinyRun(context, settings)
        state = run.load(ORACLE / f"ckpt_{name}" / "global_step10")
        counters = (run.engine.global_steps, run.engine.global_samples, run.engine.skipped_steps)
        step = [int(entry["step"]) for entry in run.engine.optimizer.optimizer.state.values()]
        return run.train(10, recorded_batches), state, counters, step, run.engine.lr_scheduler

    def picklable(context):
        losses, state, counters, step, scheduler = worker(context)
        return losses, state, counters, step, scheduler.num_iters

    losses, state, counters, step, num_iters = run_ranks(
        picklable, settings.topology.world_size, tmp_path
    )[0]
    assert losses == pytest.approx(TRACES[f"{name}_resume10"]["losses"], rel=2e-6)
    assert (state.iteration, counters, step, num_iters) == (10, (10, 80, 0), [10, 10], 20)
    assert state.notices == (
        "NeoX's pipeline sums gradients over the micro steps where we average: the optimizer's "
        "exp_avg is divided by 2, exp_avg_sq by 4",
    )


# Step 0 of a (tensor size 1) and b (tensor size 2, two stages), at their own and other topologies.
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("a", Topology(1, 1, 1)),
        ("b", Topology(2, 1, 2)),
        ("b", Topology(1, 1, 1)),
        ("a", Topology(1, 1, 2, uses_pipeline_engine=False)),
        pytest.param("a", Topology(2, 1, 2), marks=pytest.mark.matrix),
        pytest.param("b", Topology(1, 1, 1, uses_pipeline_engine=False), marks=pytest.mark.matrix),
        pytest.param("b", Topology(4, 1, 1), marks=pytest.mark.matrix),
    ],
)
def test_weights_alone_train_like_neox_at_any_topology(name, topology, tmp_path):
    written = RUNS[name]
    settings = TinySettings(
        topology,
        padded_vocab_size=written.padded_vocab_size,
        bias_multiplicity=written.bias_multiplicity,
    )
    steps = 5

    def worker(context):
        source = ORACLE / f"ckpt_{name}_step0" / "global_step0"
        return TinyRun(context, settings, weights_from=source).train(steps, recorded_batches)

    losses = run_ranks(worker, topology.world_size, tmp_path)[0]
    assert losses == pytest.approx(TRACES[name]["losses"][:steps], rel=5e-6)


def test_facts_of_neox_checkpoints_come_from_arguments_or_shapes():
    for step in ("_step0/global_step0", "/global_step10"):
        facts = read_model_facts(ORACLE / f"ckpt_b{step}", gpt_j_residual=True)
        assert facts.model == ModelFacts(384, 2)
        assert facts.tensor_parallel_size == 2
    assert read_model_facts(
        ORACLE / "ckpt_a" / "global_step10", gpt_j_residual=True
    ).model == ModelFacts(320, 1)
    sequential = read_model_facts(ORACLE / "ckpt_b" / "global_step10", gpt_j_residual=False)
    assert sequential.model == ModelFacts(384, 1)


def test_a_checkpoint_of_neox_is_told_from_ours():
    stored = StoredCheckpoint(ORACLE / "ckpt_b" / "global_step10")
    assert not stored.is_ours
    assert (stored.iteration, stored.tensor_parallel_size) == (10, 2)


def test_gradient_accumulation_is_found_in_the_file_or_in_the_saved_configuration(tmp_path):
    directory = tmp_path / "global_step10"
    shutil.copytree(ORACLE / "ckpt_a" / "global_step10", directory)
    stored = StoredCheckpoint(directory)
    assert stored.gradient_accumulation_steps({"gradient_accumulation_steps": 4}) == 4
    assert stored.gradient_accumulation_steps({}) == 2
    shutil.rmtree(directory / "configs")
    with pytest.raises(CheckpointError, match=r"neither .* say gradient_accumulation_steps"):
        stored.gradient_accumulation_steps(None)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "topology", "zero_stage"),
    [
        ("b", Topology(1, 1, 1), 1),
        ("a", Topology(2, 1, 2), 0),
        pytest.param("b", Topology(1, 1, 4), 1, marks=pytest.mark.matrix),
        pytest.param(
            "b", Topology(1, 1, 1, uses_pipeline_engine=False), 2, marks=pytest.mark.matrix
        ),
    ],
)
def test_a_full_resume_at_another_topology_goes_on_with_neox_losses(
    name, topology, zero_stage, tmp_path
):
    written = RUNS[name]
    settings = TinySettings(
        topology,
        zero_stage=zero_stage,
        padded_vocab_size=written.padded_vocab_size,
        bias_multiplicity=written.bias_multiplicity,
    )

    def worker(context):
        run = TinyRun(context, settings)
        state = run.load(ORACLE / f"ckpt_{name}" / "global_step10")
        counters = (run.engine.global_steps, run.engine.global_samples, run.engine.skipped_steps)
        steps = {int(entry["step"]) for entry in run.engine.basic_optimizer.state.values()}
        return run.train(10, recorded_batches), state, counters, steps

    losses, state, counters, steps = run_ranks(worker, topology.world_size, tmp_path)[0]
    assert losses == pytest.approx(TRACES[f"{name}_resume10"]["losses"], rel=5e-6)
    assert (state.iteration, counters, steps, state.reseeds_rng) == (10, (10, 80, 0), {10}, True)
    random_states, resharded, moments = state.notices
    assert "dropout's are seeded from (seed, step, stage, tensor rank)" in random_states
    assert "optimizer's state is resharded, exactly: it was written at pipe_par" in resharded
    assert "exp_avg is divided by 2, exp_avg_sq by 4" in moments
