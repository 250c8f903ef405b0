"""tools/ckpts/reshape.py, on real runs of ours and of NeoX's."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron.base.errors import CheckpointError, ConfigError
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.ledger.ledger_file import read_ledger
from tests.engine.training_runs import ORACLE, neox_config, recorded, run_training
from tools.ckpts.reshape import main

pytestmark = pytest.mark.distributed
NEOX_B = ORACLE / "ckpt_b" / "global_step10"  # two stages x two tensor ranks, ZeRO 1


def reshape(source: Path, destination: Path, *options: str) -> None:
    main([str(source), str(destination), *options])


def test_a_neox_checkpoint_goes_on_with_neox_losses_at_another_topology(tmp_path, capsys):
    reshape(NEOX_B, tmp_path / "one", "--tp", "1", "--pp", "0")
    notes = capsys.readouterr().out
    assert "exp_avg is divided by 2, exp_avg_sq by 4" in notes
    assert "random states are left out" in notes
    changes = {"model_parallel_size": 1, "pipe_parallel_size": 0, "num_gpus": 1}
    config = neox_config(tmp_path, "b", load=str(tmp_path / "one"), **changes)
    trained = run_training(config, tmp_path)
    assert trained.losses == pytest.approx(recorded("b")["losses"][10:], rel=1e-5)


def test_our_run_goes_on_in_a_new_save_with_its_record(tmp_path, capsys):
    first = tmp_path / "first"
    undisturbed = run_training(
        neox_config(tmp_path, save=str(first), checkpoint_factor=4, train_iters=8), tmp_path
    )
    reshape(first / "global_step4", tmp_path / "away", "--tp", "2", "--pp", "1", "--dp", "1")
    assert "for pipe_parallel_size 1, model_parallel_size 2, 1 data" in capsys.readouterr().out
    before = read_ledger(first / "global_step4")
    after = read_ledger(tmp_path / "away" / "global_step4")
    assert before is not None
    assert after is not None
    assert (after.run_id, after.spans, after.streams) == (
        before.run_id,
        before.spans,
        before.streams,
    )
    config = neox_config(
        tmp_path,
        model_parallel_size=2,
        load=str(tmp_path / "away"),
        save=str(tmp_path / "second"),
        checkpoint_factor=4,
        train_iters=8,
    )
    trained = run_training(config, tmp_path)
    assert trained.losses == pytest.approx(undisturbed.losses[4:], rel=1e-5)
    assert [record.position for record in trained.records] == [8 * step for step in range(4, 8)]
    assert [record.digest for record in trained.records] == [
        record.digest for record in undisturbed.records[4:]
    ]


def test_weights_for_neox_hold_its_vocabulary_and_its_share_of_the_biases(tmp_path, capsys):
    reshape(NEOX_B, tmp_path / "one", "--tp", "1", "--pp", "1", "--for-neox", "--vocab-size", "300")
    notes = capsys.readouterr().out
    assert "64 trained rows of padding are cut off" in notes
    assert "multiplied by 2/1" in notes
    ours, theirs = (
        StoredCheckpoint(NEOX_B),
        StoredCheckpoint(tmp_path / "one" / "global_step10"),
    )
    assert not (tmp_path / "one" / "global_step10" / "ledger.json").exists()
    assert theirs.model_arguments["padded_vocab_size"] == 320
    assert theirs.model_arguments["model_parallel_size"] == 1
    rows = torch.cat([ours.weights(0, rank)[1]["word_embeddings.weight"] for rank in (0, 1)])
    assert torch.equal(theirs.weights(0, 0)[1]["word_embeddings.weight"], rows[:320])
    for name, factor in (
        ("attention.dense.bias", 2),
        ("mlp.linear2.bias", 2),
        ("input_layernorm.bias", 1),
    ):
        expected = ours.weights(2, 0)[1][name] * factor
        assert torch.equal(theirs.weights(2, 0)[1][name], expected), name


def test_read_as_neox_reads_them_the_weights_compute_the_same(tmp_path):
    # Of 350 entries NeoX makes the 384 rows the model has, at one tensor rank and at two.
    reshape(NEOX_B, tmp_path / "one", "--tp", "1", "--pp", "1", "--for-neox", "--vocab-size", "350")

    def first_losses(source: Path, **topology: int) -> list[float]:
        config = neox_config(
            tmp_path, "b", load=str(source), finetune=True, train_iters=1, **topology
        )
        return run_training(config, tmp_path).losses

    at_one = first_losses(tmp_path / "one", model_parallel_size=1, pipe_parallel_size=1, num_gpus=1)
    assert at_one == pytest.approx(first_losses(NEOX_B.parent), rel=1e-5)


def test_what_cannot_be_done_is_said_with_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer in .*configs cannot be opened.*--vocab-size"):
        reshape(NEOX_B, tmp_path / "x", "--tp", "1", "--pp", "1", "--for-neox")
    with pytest.raises(CheckpointError, match=r"8 samples a step, which 3 data-parallel ranks"):
        reshape(NEOX_B, tmp_path / "x", "--tp", "1", "--pp", "1", "--dp", "3")
    bare = tmp_path / "bare" / "global_step10"
    shutil.copytree(NEOX_B, bare)
    shutil.rmtree(bare / "configs")
    with pytest.raises(CheckpointError, match=r"holds no configs/\*\.yml.*--config"):
        reshape(bare, tmp_path / "x", "--tp", "1", "--pp", "1")
    files = str(NEOX_B / "configs" / "b.yml")
    reshape(bare, tmp_path / "x", "--tp", "1", "--pp", "1", "--config", files)
    with pytest.raises(SystemExit):
        reshape(bare, tmp_path / "y", "--tp", "0", "--pp", "1")
