"""checkpoint_validation_with_forward_pass: found by it, left alone by it."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.stored_answer import StoredAnswer, answer_places, read_answer
from megatron.cli.run_check import RunCheck
from megatron.config.topology import Topology
from megatron.engine.forward_check import ForwardCheck
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.engine.interrupted_runs import SEQ_LENGTH, InterruptedRun
from tests.engine.training_runs import checkpoint_tensors, copy_corpus
from tests.worlds import WorldFailed, run_ranks

CHECKED = {"checkpoint_validation_with_forward_pass": True}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
TOPOLOGIES = {
    "one rank": {"pipe_parallel_size": 0, "num_gpus": 1},
    "tp2 pp2": {"pipe_parallel_size": 2, "model_parallel_size": 2, "num_gpus": 4},
}
OURS, NEOX = "forward_check", "checkpoint_validation_logits"

pytestmark = pytest.mark.distributed


def short_run(folder: Path, **changes: object) -> InterruptedRun:
    folder.mkdir(parents=True, exist_ok=True)
    data = {"data_path": copy_corpus(folder)["data_path"], "split": "90,5,5"}
    return InterruptedRun(folder, data, **{"train_iters": 6, "eval_interval": 4} | changes)


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_training_goes_on_as_without_it(tmp_path, topology):
    plain = short_run(tmp_path / "plain", **topology, **DROPOUT)
    checked = short_run(tmp_path / "checked", **topology, **DROPOUT, **CHECKED)
    assert checked.launch().losses == plain.launch().losses
    assert checked.read() == plain.read()
    expected = checkpoint_tensors(plain.save / "global_step6")
    found = checkpoint_tensors(checked.save / "global_step6")
    more = {name for name in found if f"/{OURS}/" in name or name.endswith(f"/{NEOX}")}
    assert more
    assert set(found) - more == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_loaded_model_answers_bit_for_bit_or_to_rounding_and_a_changed_one_is_refused(
    tmp_path,
):
    run = short_run(tmp_path, **CHECKED, **TOPOLOGIES["tp2 pp2"])
    run.launch(train_iters=3)
    says = (
        rf"forward-pass check: the model answers as it did when {run.save}/global_step3 was saved"
    )
    again = run.launch(train_iters=3)
    assert re.search(rf"{says}, bit for bit", again.printed)
    reshaped = run.launch(train_iters=3, pipe_parallel_size=0, model_parallel_size=1, num_gpus=1)
    assert re.search(rf"{says}, up to \d\.\de-0[5-9] of the largest logit", reshaped.printed)
    with pytest.raises(
        WorldFailed,
        match=r"does not answer as it did when .*global_step3 was saved: the largest difference of "
        r"two logits is .*after token \d+ of the sample at position 20, where entry \d+ .*"
        r"Under the same conditions nothing may differ",
    ) as failed:
        run.launch(train_iters=6, rotary_pct=1.0)
    assert all(f"rank {rank}: " in str(failed.value) for rank in range(4))


def test_a_checkpoint_saved_without_it_is_loaded_and_said_to_be_unchecked(tmp_path):
    run = short_run(tmp_path)
    assert "forward-pass" not in run.launch(train_iters=3).printed
    printed = run.launch(train_iters=3, **CHECKED).printed
    assert f"{run.save}/global_step3 was saved without it; nothing is compared" in printed


def test_weights_alone_in_a_new_run_are_compared_too(tmp_path):
    run = short_run(tmp_path / "old", **CHECKED)
    run.launch(train_iters=3)
    new = {"load": str(run.save), "save": str(tmp_path / "new"), "finetune": True, "seed": 7}
    assert "was saved, bit for bit" in run.launch(**new, train_iters=1).printed


def test_what_is_kept_is_small_and_the_end_of_a_run_reads_nothing_new(tmp_path):
    run = short_run(tmp_path, **CHECKED, **TOPOLOGIES["tp2 pp2"])
    run.launch(train_iters=6)
    for step, position in ((3, 3 * 8), (6, 6 * 8 - 4)):  # the last one: what was read last
        stored = StoredCheckpoint(run.save / f"global_step{step}")
        assert [OURS in stored.model_states(rank) for rank in range(4)] == [
            False,
            False,
            True,
            True,
        ]
        answer = read_answer(stored, seq_length=SEQ_LENGTH, vocabulary_size=384)
        assert answer.position == position
        assert answer.tokens.shape == (4, SEQ_LENGTH + 1)
        assert answer.logits.shape == (16, 384)
        columns = [stored.model_states(rank)[NEOX].shape[-1] for rank in (2, 3)]
        assert sum(columns) == 384


def neox_answers(context, topology, folder):
    """Write an untrained model's answer in NeoX's key alone, or compare with one that is there."""
    run = TinyRun(context, TinySettings(topology))
    check = ForwardCheck(
        run.groups, run.engine, micro_batch_size=4, seq_length=64, vocabulary_size=320
    )
    if not folder.exists():
        tokens = np.zeros((4, 65), dtype=np.int64) if context.rank == 0 else None
        state = check.state(0, tokens)
        run.groups.barrier()
        folder.mkdir(exist_ok=True)
        path = folder / f"mp_rank_{context.rank:02d}_model_states.pt"
        torch.save({NEOX: state[NEOX]} if state else {}, path)
        return None
    stored = StoredCheckpoint(folder)
    answer = read_answer(stored, seq_length=64, vocabulary_size=320)
    assert answer.tokens.tolist() == [list(range(65))]
    return check.compare(answer, source="theirs")


def test_neox_s_own_answer_is_read_at_any_topology(tmp_path):
    folder = tmp_path / "global_step0"
    writer = Topology(1, 1, 2, uses_pipeline_engine=False)
    run_ranks(lambda context: neox_answers(context, writer, folder), 2, tmp_path)
    reader = Topology(2, 1, 1)
    (said, _) = run_ranks(lambda context: neox_answers(context, reader, folder), 2, tmp_path)
    assert said.startswith("forward-pass check: the model answers as it did when theirs was saved")


def test_other_tokens_at_the_same_position_of_the_same_order_are_an_error(tmp_path):
    tokens = np.arange(8).reshape(2, 4)
    answer = StoredAnswer(tokens, [0], torch.zeros(1, 1), position=5)
    data = SimpleNamespace(
        has_read_before=lambda position: position == 5, train_tokens=lambda positions: tokens + 1
    )
    check = RunCheck(None, SimpleNamespace(rank=0), data, None)
    with pytest.raises(CheckpointError, match=r"position 5 of the training stream holds other"):
        check._require_same_tokens(answer, tmp_path, is_continued=True)
    check._require_same_tokens(answer, tmp_path, is_continued=False)


@pytest.mark.parametrize("seq_length", [1, 2, 15, 16, 17, 2048])
def test_the_kept_places_are_within_the_sample_with_both_ends(seq_length):
    places = answer_places(seq_length)
    assert places[0] == 0
    assert places[-1] == seq_length - 1
    assert len(places) == min(16, seq_length)
