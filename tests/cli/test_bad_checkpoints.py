"""Checkpoints that cannot be loaded: an earlier one is, or that is told once; never step 0."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.ledger.manifest import quick_problems, read_manifest
from tests.checkpoint.damages import reseal
from tests.cli.bad_runs import the_one_message, train_in_forked_ranks, write_dataset

pytestmark = pytest.mark.distributed

# Two tensor ranks, each with layer files of its own.
RUN = {
    "num_gpus": 2,
    "model_parallel_size": 2,
    "pipe_parallel_size": 1,
    "lr_decay_iters": 10,
    "eval_iters": 0,
    "checkpoint_factor": 1,
}


@dataclass(frozen=True)
class SavedRun:
    """A run of two saved steps that a test may damage, and go on from."""

    save: Path
    data: Path

    @property
    def checkpoint(self) -> Path:
        return self.save / "global_step2"

    @property
    def layer_file(self) -> Path:
        return self.checkpoint / "layer_02-model_01-model_states.pt"

    def refusal(self, *, teller: int = 0, **keys: Any) -> str:
        """Return what a third step, or what ``keys`` say, fails with; ``save`` stays as it is."""
        keys = {"load": str(self.save), "save": str(self.save), "train_iters": 3, **keys}
        before = sorted(self.save.rglob("*"))
        ends = train_in_forked_ranks(
            self.save.parent, **{**RUN, "data_path": str(self.data), **keys}
        )
        assert sorted(self.save.rglob("*")) == before
        return the_one_message(ends, teller=teller).rstrip("\n")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    write_dataset(directory / "text")
    save = str(directory / "saved")
    ends = train_in_forked_ranks(directory, **RUN, save=save, load=save)
    assert [len(end.losses) for end in ends] == [2, 2]
    return directory


@pytest.fixture
def saved(finished_run, tmp_path):
    shutil.copytree(finished_run / "saved", tmp_path / "saved")
    return SavedRun(tmp_path / "saved", finished_run / "text")


def test_a_damaged_checkpoint_is_told_and_the_run_goes_on_from_the_one_before(saved, capfd):
    file = saved.checkpoint / "mp_rank_01_model_states.pt"
    os.truncate(file, 500)
    keys = {"load": str(saved.save), "save": str(saved.save), "train_iters": 3}
    ends = train_in_forked_ranks(saved.save.parent, **{**RUN, "data_path": str(saved.data), **keys})
    assert [(end.status, len(end.losses)) for end in ends] == [(0, 2), (0, 2)]  # steps 2 and 3
    printed = capfd.readouterr().out
    assert re.search(rf"NOT LOADED: {saved.checkpoint}: {file.name} has 500 bytes instead", printed)
    assert "rolled back from step 2 to step 1 because global_step2 is damaged: " in printed
    assert f"loaded {saved.save}/global_step1, iteration 1" in printed
    # The damaged one was replaced by the next save of the same step.
    manifest = read_manifest(saved.checkpoint)
    assert (manifest.sequence, manifest.parent) == (3, 1)
    assert quick_problems(saved.checkpoint, manifest) == []


def test_without_a_good_checkpoint_the_run_stops_and_says_all_of_it(saved):
    for step in (1, 2):
        os.truncate(saved.save / f"global_step{step}" / "mp_rank_01_model_states.pt", 500)
    message = saved.refusal()
    assert message.startswith(
        f"rank 0: CheckpointError: {saved.save}: no checkpoint of the run can be loaded, and "
        "nothing is deleted:\n"
    )
    for step in (1, 2):
        told = f"  {saved.save}/global_step{step}: mp_rank_01_model_states.pt has 500 bytes instead"
        assert told in message


@pytest.mark.parametrize("start", ["resume", "finetune"])
def test_a_stale_layer_files_shape_is_told_with_both_shapes(saved, tmp_path, start):
    layer = torch.load(saved.layer_file, weights_only=True)
    name = "attention.query_key_value.weight"
    layer[name] = torch.cat([layer[name], layer[name]])
    torch.save(layer, saved.layer_file)
    reseal(saved.checkpoint)
    # a new run from the weights alone has a save directory of its own
    keys = {"finetune": True, "save": None, "checkpoint_factor": None}
    assert saved.refusal(teller=1, **(keys if start == "finetune" else {})) == (
        f"CheckpointError: rank 1: {saved.layer_file}: {name} of layer 2 has shape (48, 16), but "
        "this model needs (24, 16) on tensor rank 1 of 2: the file is stale or belongs to another "
        "model"
    )


def test_another_models_checkpoint_is_refused_with_both_numbers(saved):
    assert saved.refusal(hidden_size=32) == (
        f"CheckpointError: ranks 0, 1: {saved.checkpoint} holds another model: hidden_size is 16 "
        "in the checkpoint and 32 here. Change the configuration to the checkpoint's values"
    )


def test_another_schedule_is_refused_with_ways_on(saved):
    message = saved.refusal(lr_decay_iters=5)
    assert message.startswith(
        "rank 0: ConfigError: the learning-rate schedule is not the checkpoint's: "
    )
    assert "override_lr_scheduler: true goes on with the configured one from here" in message


def test_a_step_that_was_not_saved_is_told_with_those_that_were(saved):
    message = saved.refusal(iteration=7)
    assert message.startswith("rank 0: CheckpointError: iteration: 7 was asked for, but ")
    assert message.endswith("holds global_step2, global_step1")


def test_nothing_to_load_is_no_start_at_0(saved, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert saved.refusal(load=str(nowhere), save=None, checkpoint_factor=None) == (
        f"rank 0: CheckpointError: load: {nowhere} does not exist. A run starts at iteration 0 "
        "only without load, or when load equals save"
    )


def test_a_new_run_does_not_overwrite_a_saved_one(saved):
    message = saved.refusal(load=None)
    assert f"save: {saved.save} holds global_step2, global_step1, but load is not set" in message
    assert f"To continue that run set load: {saved.save}" in message


def test_a_save_directory_that_cannot_be_made_is_told(saved, tmp_path):
    (tmp_path / "file").touch()
    assert saved.refusal(save=str(tmp_path / "file" / "saved"), load=None) == (
        f"rank 0: RunDirectoryError: save: {tmp_path}/file/saved cannot be made: Not a directory; "
        "name a directory this job may write"
    )


def test_a_tokenizer_larger_than_the_checkpoints_vocabulary_is_refused(saved):
    size = "the tokenizer has 512 entries, but the model in {} has only 256 (padded) rows; use"
    record = saved.checkpoint / "ledger.json"
    text = record.read_text()
    assert '"padded_vocab_size": 512' in text
    record.write_text(text.replace('"padded_vocab_size": 512', '"padded_vocab_size": 256'))
    reseal(saved.checkpoint)
    assert size.format(saved.checkpoint) in saved.refusal()
