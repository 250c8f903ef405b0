"""What is read from a checkpoint of another topology, and what is refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megatron.base.errors import CheckpointError
from megatron.checkpoint.parameter_state import ParameterStates, open_parameter_states
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.config.topology import Topology
from megatron.model.tp_layout import split
from megatron.optim.param_groups import decays_by_name, weight_decay_groups
from tests.checkpoint.reshaped import STEP, TOPOLOGIES, begin
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import run_ranks

WRITER = TOPOLOGIES["TP2 x PP2"]
PLAIN = replace(TOPOLOGIES["1 process"], zero_stage=0, overrides={"gpt_j_tied": True})
ORACLE = Path(__file__).parents[1] / "data" / "oracle"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a checkpoint of two stages and two tensor ranks, and the whole tensors it holds."""
    directory = tmp_path_factory.mktemp("written")
    return directory / f"global_step{STEP}", begin(WRITER, directory)["tensors"]


@pytest.fixture(scope="module")
def written_plainly(tmp_path_factory):
    """Return a checkpoint of the plain optimizer, of a model with unused parameters."""
    directory = tmp_path_factory.mktemp("plain")

    def worker(context):
        run = TinyRun(context, PLAIN)
        run.train(STEP)
        run.iteration = STEP
        run.save(directory)

    run_ranks(worker, 1, directory)
    return directory / f"global_step{STEP}"


@pytest.fixture
def copied(written, tmp_path):
    return Path(shutil.copytree(written[0], tmp_path / written[0].name))


def opened(checkpoint: Path, settings: TinySettings = WRITER) -> ParameterStates:
    return open_parameter_states(StoredCheckpoint(checkpoint), settings.model)


def read_everything(checkpoint: Path, settings: TinySettings = WRITER) -> None:
    states = opened(checkpoint, settings)
    for layer, name in states.names:
        states.require(layer, name, size=1, rank=0)
        states.stored.weights(layer, 0)


def edit(path: Path, change: Any) -> None:
    content = torch.load(path, weights_only=False)  # our own file, of a second ago
    change(content)
    torch.save(content, path)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_tensor_rank_gets_its_slice_of_the_whole(size, written):
    checkpoint, whole = written
    states = opened(checkpoint)
    kinds = ("master", "exp_avg", "exp_avg_sq")
    assert {(kind, *key) for key in states.names for kind in kinds} == {
        key for key in whole if key[0] in kinds
    }
    for layer, name in states.names:
        for kind in kinds:
            full = torch.from_numpy(whole[kind, layer, name])
            for rank in range(size):
                part = states.part(layer, name, kind, size=size, rank=rank)
                assert part.dtype == torch.float32
                assert torch.equal(
                    part, split(name, full, size=size, rank=rank, settings=WRITER.model)
                )


@pytest.mark.distributed
def test_trained_padding_rows_are_kept_and_rows_beyond_the_vocabulary_are_zeros(written):
    checkpoint, whole = written
    states = opened(checkpoint)
    key = states.names[-1]
    assert key[1] == "final_linear.weight"
    parts = [states.part(*key, "exp_avg", size=3, rank=rank) for rank in range(3)]
    rows = torch.cat(parts)
    assert [len(part) for part in parts] == [107, 107, 107]  # for 320 rows
    assert rows[300:320].abs().amin() > 0  # no token is above 299: only the softmax trains them
    assert np.array_equal(rows[:320], whole["exp_avg", *key])
    assert not rows[320:].any()


@pytest.mark.distributed
def test_groups_steps_and_counters_are_told(written):
    states = opened(written[0])
    assert (states.step, states.has_moments, states.scaler, states.notices) == (
        STEP,
        True,
        None,
        (),
    )
    assert (states.weight_dtype, states.tensor_parallel_size) == (torch.float32, 2)
    assert states.metadata["iteration"] == STEP
    groups = {group.name: group for group in states.groups}
    assert groups["weight_decay_params"].options["weight_decay"] == WRITER.weight_decay
    assert groups["no_weight_decay_params"].options["weight_decay"] == 0.0
    for name, group in groups.items():
        assert {decays_by_name(key[1]) for key in group.keys} == {name == "weight_decay_params"}
    assert sorted(key for group in states.groups for key in group.keys) == sorted(states.names)


@pytest.mark.distributed
def test_parameters_without_gradients_have_no_moments(written_plainly):
    states = opened(written_plainly, PLAIN)
    unused = [key for key in states.names if "post_attention_layernorm" in key[1]]
    assert len(unused) == 2 * PLAIN.num_layers
    for key in unused:
        assert not states.part(*key, "exp_avg", size=1, rank=0).any()
        assert states.part(*key, "master", size=1, rank=0).shape == (PLAIN.hidden_size,)


@pytest.mark.distributed
def test_fp16s_fused_optimizer_is_read_like_the_unfused_one(written_plainly, tmp_path):
    # NVIDIA's optimizer needs a GPU; its file holds the same numbers, flattened by group.
    checkpoint = Path(shutil.copytree(written_plainly, tmp_path / written_plainly.name))
    expected = opened(written_plainly, PLAIN)
    settings = PLAIN.model
    weights = {
        f"{layer}.{name}": tensor
        for layer in expected.stored.layer_numbers
        for name, tensor in expected.stored.weights(layer, 0)[1].items()
    }

    def flatten(content):
        groups = [
            [name for name in weights if decays_by_name(name) == decays] for decays in (True, False)
        ]

        def flat(kind, names):
            keys = [(int(name.partition(".")[0]), name.partition(".")[2]) for name in names]
            parts = [expected.part(*key, kind, size=1, rank=0).reshape(-1) for key in keys]
            return torch.cat(parts)

        old = content["optimizer"]
        content["optimizer"] = {
            "dynamic_loss_scale": True,
            "cur_scale": 512,
            "cur_iter": 5,
            "last_overflow_iter": 3,
            "scale_factor": 2.0,
            "scale_window": 1000,
            "fp32_groups_flat": [flat("master", names) for names in groups],
            "optimizer_state_dict": {
                "state": {
                    number: {
                        "step": STEP,
                        "exp_avg": flat("exp_avg", names),
                        "exp_avg_sq": flat("exp_avg_sq", names),
                    }
                    for number, names in enumerate(groups)
                },
                "param_groups": [
                    {**group, "params": [number]}
                    for number, group in enumerate(old["param_groups"])
                ],
            },
            "clip_grad": 1.0,
        }

    edit(checkpoint / "mp_rank_00_model_states.pt", flatten)
    states = open_parameter_states(StoredCheckpoint(checkpoint), settings)
    assert states.names == expected.names
    for key in states.names:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            part = states.part(*key, kind, size=2, rank=1)
            assert torch.equal(part, expected.part(*key, kind, size=2, rank=1)), (key, kind)
    assert states.scaler is not None
    assert (states.scaler.scale, states.scaler.iteration) == (512.0, 5)
    assert states.scaler.last_overflow_iteration == 3


def test_a_name_decays_if_the_module_says_so():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_layernorm = nn.LayerNorm(2)
            self.linear1 = nn.Linear(2, 2)
            self.norm = nn.RMSNorm(2)

    module = Block()
    decaying, _ = weight_decay_groups(module, 0.1)
    chosen = {id(parameter) for parameter in decaying["params"]}
    for name, parameter in module.named_parameters():
        assert decays_by_name(f"2.{name}") == (id(parameter) in chosen), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    [
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
        "mp_rank_02_model_states.pt",
        "layer_03-model_01-model_states.pt",
    ],
)
def test_a_missing_file_is_named(name, copied):
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.* missing"):
        read_everything(copied)


@pytest.mark.distributed
def test_files_of_different_saves_are_told_by_their_steps(copied):
    path = copied / "zero_pp_rank_0_mp_rank_03_optim_states.pt"

    def take_a_step_more(content):
        optimizer = content["optimizer_state_dict"]["base_optimizer_state"]
        for group in optimizer["param_groups"]:
            group["step"] += 1

    edit(path, take_a_step_more)
    with pytest.raises(CheckpointError, match=rf"{path.name} was saved after 3 optimizer steps"):
        read_everything(copied)


@pytest.mark.distributed
def test_the_state_of_another_optimizer_is_refused(copied):
    def become_momentum(content):
        state = content["optimizer_state_dict"]["base_optimizer_state"]["state"]
        for entry in state.values():
            entry["momentum_buffer"] = entry.pop("exp_avg")
            del entry["exp_avg_sq"]

    for path in copied.glob("*_optim_states.pt"):
        edit(path, become_momentum)
    with pytest.raises(
        CheckpointError, match=r"momentum_buffer.* no exp_avg: .* another optimizer than Adam"
    ):
        read_everything(copied)


@pytest.mark.distributed
def test_another_model_is_refused_by_the_tensor_that_differs(written):
    wider = replace(WRITER, overrides={"mlp_up_size": 256, "mlp_down_size": 256})
    with pytest.raises(CheckpointError, match=r"mlp\.linear1\.\w+ with shape .* model needs"):
        opened(written[0], wider)


def test_micro_steps_that_the_files_lack_are_looked_up_in_the_saved_configuration(tmp_path):
    checkpoint = Path(
        shutil.copytree(ORACLE / "ckpt_b" / "global_step10", tmp_path / "global_step10")
    )
    for path in checkpoint.glob("*_optim_states.pt"):
        edit(path, lambda content: content.pop("ds_config"))
    settings = replace(TinySettings(Topology(1, 1, 1)), padded_vocab_size=384)
    assert opened(checkpoint, settings).gradient_multiple == 2


@pytest.mark.distributed
def test_elastic_state_and_weights_alone_are_refused(copied, tmp_path):
    def become_elastic(content):
        content["optimizer_state_dict"]["base_optimizer_state"] = []

    edit(copied / "zero_pp_rank_0_mp_rank_00_optim_states.pt", become_elastic)
    with pytest.raises(CheckpointError, match=r"elastic or older ZeRO format.*no_load_optim"):
        opened(copied)
    for path in (*copied.glob("mp_rank_*"), *copied.glob("zero_*")):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"holds weights alone; .*no_load_optim: true"):
        opened(copied)


@pytest.mark.distributed
def test_a_refusal_reaches_every_rank_and_changes_nothing(copied, tmp_path):
    name = "zero_pp_rank_0_mp_rank_03_optim_states.pt"  # of the second stage alone
    (copied / name).unlink()
    (copied / "manifest.json").unlink(missing_ok=True)
    settings = TOPOLOGIES["PP2"]

    def worker(context):
        run = TinyRun(context, settings)
        before = run.state()
        with pytest.raises(CheckpointError) as error:
            run.load(copied)
        return str(error.value), run.state() == before

    messages, unchanged = zip(*run_ranks(worker, 2, tmp_path), strict=True)
    assert len(set(messages)) == 1
    assert "rank 1:" in messages[0]
    assert name in messages[0]
    assert unchanged == (True, True)


@pytest.mark.distributed
def test_weights_and_masters_of_different_saves_are_told_apart(copied, tmp_path):
    path = copied / "layer_02-model_00-model_states.pt"
    edit(path, lambda content: content["mlp.linear1.weight"].add_(1))

    def worker(context, precision):
        run = TinyRun(context, replace(TOPOLOGIES["1 process"], precision=precision))
        with pytest.raises(CheckpointError, match="come from different saves"):
            run.load(copied)

    for precision in ("fp32", "bfloat16"):
        run_ranks(lambda context, precision=precision: worker(context, precision), 1, tmp_path)


@pytest.mark.distributed
def test_a_run_saved_before_its_first_step_begins_anywhere(tmp_path):
    def write(context):
        run = TinyRun(context, TOPOLOGIES["PP2"])
        run.save(tmp_path)
        return run.train(2)

    def read(context):
        run = TinyRun(context, TOPOLOGIES["1 process"])
        run.load(tmp_path / "global_step0")
        assert not run.engine.basic_optimizer.state
        return run.train(2)

    expected = run_ranks(write, 2, tmp_path)[0]
    assert run_ranks(read, 1, tmp_path)[0] == pytest.approx(expected, rel=1e-6)
    assert json.loads((tmp_path / "global_step0" / "ledger.json").read_text())["model"]
