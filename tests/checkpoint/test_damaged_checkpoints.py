"""A checkpoint that cannot be loaded is the same error on every rank, and changes nothing."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.safe_torch import read_torch_file
from megatron.config.topology import Topology
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import run_ranks

ORACLE = Path(__file__).parents[1] / "data" / "oracle"
GOOD = ORACLE / "ckpt_b" / "global_step10"
SETTINGS = TinySettings(Topology(2, 1, 2), padded_vocab_size=384, bias_multiplicity=2)
LAYER_5 = "layer_05-model_01-model_states.pt"
OPTIMIZER_3 = "zero_pp_rank_0_mp_rank_03_optim_states.pt"
METADATA_1 = "mp_rank_01_model_states.pt"


def remove(*names):
    def damage(directory):
        for name in names:
            (directory / name).unlink()

    return damage


def truncate(name, size):
    return lambda directory: os.truncate(directory / name, size)


def rewrite(name, change):
    def damage(directory):
        content = read_torch_file(directory / name)
        changed = change(content)
        # Not in place: `content` maps the file.
        torch.save(content if changed is None else changed, directory / "rewritten")
        (directory / "rewritten").replace(directory / name)

    return damage


def without(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def take_from_step_0(name):
    source = ORACLE / "ckpt_b_step0" / "global_step0" / name
    return lambda directory: shutil.copyfile(source, directory / name)


class Payload:
    """Runs code in a careless reader."""

    def __reduce__(self):
        return (os.system, ("touch /tmp/must-not-exist",))


DAMAGES = {
    "a tensor rank's part of a layer is missing": (
        remove(LAYER_5),
        r"^ranks 2, 3: .*layer_05-model_01-model_states\.pt missing: layer 5 was saved in 2 parts$",
    ),
    "a whole layer is missing": (
        remove(LAYER_5, LAYER_5.replace("model_01", "model_00")),
        r"^ranks 2, 3: .*model_00.*, .*model_01.* missing: layer 5",
    ),
    "a layer file is truncated": (
        truncate(LAYER_5, 50_000),
        r"^rank 3: .*layer_05-model_01.* \(50000 bytes\) cannot be read; it is truncated",
    ),
    "an optimizer file is truncated": (
        truncate(OPTIMIZER_3, 10_000),
        r"^rank 3: .*zero_pp_rank_0_mp_rank_03.* cannot be read",
    ),
    "an optimizer file is missing": (
        remove(OPTIMIZER_3),
        r"^rank 3: .*zero_pp_rank_0_mp_rank_03_optim_states\.pt is missing",
    ),
    "a metadata file is missing": (
        remove(METADATA_1),
        r"^rank 1: .*mp_rank_01_model_states\.pt is missing",
    ),
    "a metadata file is empty": (
        truncate(METADATA_1, 0),
        r"^rank 1: .*mp_rank_01_model_states\.pt \(0 bytes\) cannot be read",
    ),
    "a layer file is of another shape": (
        rewrite(LAYER_5, lambda layer: {name: tensor[:8] for name, tensor in layer.items()}),
        r"^rank 3: .*layer_05-model_01.*: input_layernorm\.weight of layer 5 has shape \(8,\), but "
        r"this model needs \(64,\) on tensor rank 1 of 2: the file is stale",
    ),
    "a layer file lacks a tensor": (
        rewrite(LAYER_5, without("mlp.linear1.bias")),
        r"^rank 3: .*layer_05-model_01.*it lacks mlp\.linear1\.bias",
    ),
    "the directory was renamed": (
        rewrite("mp_rank_00_model_states.pt", lambda metadata: metadata.update(iteration=9)),
        r"^ranks 0, 1, 2, 3: .*global_step10 holds the checkpoint of step 9",
    ),
    "a file holds code": (
        rewrite(LAYER_5, lambda layer: {"weight": Payload()}),
        r"^rank 3: .*layer_05-model_01.* is refused: it names posix\.system",
    ),
    "the order of parameters differs": (
        rewrite(
            METADATA_1,
            lambda metadata: metadata["param_shapes"].reverse(),
        ),
        r"^rank 1: .*zero_pp_rank_0_mp_rank_01.*group 0 holds 2\.input_layernorm\.weight \(64,\) "
        r"where this model has 0\.word_embeddings\.weight",
    ),
    "the optimizer state is of another kind": (
        rewrite(OPTIMIZER_3, without("optimizer_state_dict", "base_optimizer_state")),
        r"^rank 3: .*lacks base_optimizer_state: .* no_load_optim: true",
    ),
}


@pytest.mark.distributed
def test_every_damage_is_the_same_error_on_all_ranks_and_changes_nothing(tmp_path):
    for name, (damage, _) in DAMAGES.items():
        directory = tmp_path / name / "global_step10"
        shutil.copytree(GOOD, directory, copy_function=shutil.copyfile)
        damage(directory)

    def worker(context):
        run = TinyRun(context, SETTINGS)
        before = run.state()
        messages = {}
        for name in DAMAGES:
            with pytest.raises(CheckpointError) as error:
                run.load(tmp_path / name / "global_step10")
            messages[name] = str(error.value)
        return messages, run.state() == before

    results = run_ranks(worker, 4, tmp_path)
    assert all(unchanged for _, unchanged in results)
    assert all(messages == results[0][0] for messages, _ in results)
    for name, (_, pattern) in DAMAGES.items():
        # pytest's way to compare a message with a pattern, one damage at a time
        with pytest.raises(CheckpointError, match=pattern):
            raise CheckpointError(results[0][0][name])
    assert not Path("/tmp/must-not-exist").exists()


@pytest.mark.distributed
def test_a_layer_file_of_another_save_is_found_by_the_optimizers_copy(tmp_path):
    directory = tmp_path / "global_step10"
    shutil.copytree(GOOD, directory, copy_function=shutil.copyfile)
    take_from_step_0(LAYER_5)(directory)

    def worker(context):
        run = TinyRun(context, SETTINGS)
        with pytest.raises(CheckpointError, match=r"^rank 3: .*come from different saves"):
            run.load(directory)

    run_ranks(worker, 4, tmp_path)


@pytest.mark.distributed
def test_a_checkpoint_of_another_model_is_refused_key_by_key(tmp_path):
    settings = TinySettings(
        Topology(1, 1, 1), padded_vocab_size=384, bias_multiplicity=2, num_layers=2, heads=8
    )

    def worker(context):
        run = TinyRun(context, settings)
        with pytest.raises(
            CheckpointError,
            match=r"holds another model: num_layers is 4 in the checkpoint and 2 here; "
            r"num_attention_heads is 4 in the checkpoint and 8 here\. Change",
        ):
            run.load(GOOD, restores_optimizer=False)

    run_ranks(worker, 1, tmp_path)
