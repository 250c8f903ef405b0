"""From a branch of the hub to a run that goes on at its step, on the right data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
import yaml

from megatron.base.errors import CheckpointError, ConfigError
from megatron.checkpoint.parameter_state import open_parameter_states
from megatron.checkpoint.stored import StoredCheckpoint, read_model_facts
from megatron.checkpoint.verification import verify_checkpoint
from megatron.cli.ledger.main import main as ledger
from megatron.cli.pythia.importing import import_step, import_with_moments_of
from megatron.cli.pythia.main import main
from megatron.cli.pythia.models import model_of_files
from megatron.cli.pythia.warm_up import import_warm
from megatron.stream.index_file import read_index
from tests.engine.training_runs import copy_corpus, run_training
from tests.hugging_face.hub_models import save as save_model
from tests.pythia import recorded_runs
from tests.pythia_models.stand_ins import CONFIG, branch, released_model, trained, write_config

VOCABULARY = 304  # the 300 entries of tests/data/tokenizer, padded
STEP, BATCH = 30, 8


def states_of(checkpoint, settings):
    return open_parameter_states(StoredCheckpoint(checkpoint), settings)


def test_a_branch_becomes_a_checkpoint_of_its_step(tmp_path):
    model = released_model(tmp_path)
    hub = trained(3000)
    imported = import_step(branch(tmp_path, 3000, hub), tmp_path / "start", model, 3000)
    assert (imported.step, imported.position) == (3000, 3000 * BATCH)
    assert imported.learning_rate_step == 3000
    assert imported.learning_rate == pytest.approx(9.9943e-4, rel=1e-3)
    assert imported.adam_step == 3001
    stored = StoredCheckpoint(imported.checkpoint)
    assert stored.iteration == 3000
    assert stored.model_states(0)["lr_scheduler"]["num_iters"] == 3000
    states = states_of(imported.checkpoint, model.settings)
    assert (states.step, states.scaler) == (3001, None)
    whole = {"size": 1, "rank": 0}
    weight = dict(hub.named_parameters())["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    assert torch.equal(states.part(3, "mlp.linear1.weight", "master", **whole), weight.float())
    for layer, name in states.names:
        assert not states.part(layer, name, "exp_avg", **whole).any()
        assert not states.part(layer, name, "exp_avg_sq", **whole).any()
    verdict = verify_checkpoint(imported.checkpoint)
    assert (verdict.problems, verdict.unknown) == ([], [])
    assert (tmp_path / "start" / "latest").read_text() == "global_step3000"


def test_cold_moments_take_no_room(tmp_path):
    model = released_model(tmp_path)
    source = branch(tmp_path, 3000, trained(3000))
    imported = import_step(source, tmp_path / "start", model, 3000)
    weights = sum(path.stat().st_size for path in imported.checkpoint.glob("layer_*"))
    metadata = (imported.checkpoint / "mp_rank_00_model_states.pt").stat().st_size
    assert metadata < 10_000
    assert weights < 1.4 * (source / "model.safetensors").stat().st_size


def test_an_upcast_is_rounded_back_exactly(tmp_path):
    model = released_model(tmp_path)
    half = import_step(branch(tmp_path / "a", 3000, trained(5)), tmp_path / "half", model, 3000)
    wide = branch(tmp_path / "b", 3000, trained(5).float())
    wide = import_step(wide, tmp_path / "wide", model, 3000)
    for path in sorted(half.checkpoint.glob("layer_*")):
        assert path.read_bytes() == (wide.checkpoint / path.name).read_bytes()


def test_skipped_steps_hold_back_learning_rate_and_adam_but_not_the_data(tmp_path):
    model = released_model(tmp_path)
    source = branch(tmp_path, 3000, trained(3000))
    imported = import_step(source, tmp_path / "start", model, 3000, skipped_steps=7)
    assert (imported.position, imported.learning_rate_step) == (24000, 2993)
    assert states_of(imported.checkpoint, model.settings).step == 2994
    content = StoredCheckpoint(imported.checkpoint).model_states(0)
    assert (content["skipped_steps"], content["lr_scheduler"]["num_iters"]) == (7, 2993)


def test_biases_of_a_model_divided_over_tensor_ranks_are_counted_as_trained(tmp_path):
    changes = {"model_parallel_size": 2, "tp_bias_multiplicity": 2, "train_batch_size": 8}
    model = released_model(tmp_path, **changes)
    hub = trained(3000, vocab_size=model.settings.padded_vocab_size)
    imported = import_step(branch(tmp_path, 3000, hub), tmp_path / "start", model, 3000)
    facts = read_model_facts(imported.checkpoint, gpt_j_residual=True)
    assert (facts.model.tp_bias_multiplicity, facts.tensor_parallel_size) == (2, 2)
    effective = dict(hub.named_parameters())["gpt_neox.layers.0.attention.dense.bias"]
    for rank in (0, 1):
        states = states_of(imported.checkpoint, model.settings)
        bias = states.part(2, "attention.dense.bias", "master", size=2, rank=rank)
        assert torch.allclose(2 * bias, effective.float(), atol=1e-4)


def test_a_download_that_is_proven_wrong_is_refused_and_nothing_is_written(tmp_path):
    model = released_model(tmp_path)
    source = branch(tmp_path, 3000, trained(1, num_hidden_layers=3))
    with pytest.raises(CheckpointError, match=r"is not tiny step 3000: config\.json describes"):
        import_step(source, tmp_path / "start", model, 3000)
    assert not (tmp_path / "start").exists()
    (tmp_path / "taken").mkdir()
    good = branch(tmp_path / "good", 3000, trained(1))
    with pytest.raises(CheckpointError, match="taken exists already"):
        import_step(good, tmp_path / "taken", model, 3000)


def test_more_skipped_steps_than_steps_are_refused(tmp_path):
    model = released_model(tmp_path)
    source = branch(tmp_path, 10, trained(10))
    for skipped in (11, -1):
        with pytest.raises(ConfigError, match=f"--skipped-steps {skipped}: of 10 steps"):
            import_step(source, tmp_path / "start", model, 10, skipped_steps=skipped)
    assert not list(tmp_path.glob("*start*"))


# -- NeoX's own checkpoints ------------------------------------------------------------------------


@pytest.fixture
def neox(tmp_path):
    """A recorded run's checkpoint at the top of a directory, as the repositories have it."""
    recorded = recorded_runs.unpack("tp2_dp2_zero1", tmp_path / "recorded")
    directory = tmp_path / "neox" / "step5"
    directory.parent.mkdir()
    shutil.move(recorded / "global_step5", directory)
    keys = yaml.safe_load((directory / "configs" / "tiny.yml").read_text())
    keys |= {"train_batch_size": 8, "tp_bias_multiplicity": 2, "neox_version": "v1.0"}
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(keys))
    return directory, model_of_files([path], name="recorded", num_tokens=250)


def test_neoxs_state_is_taken_as_it_is(neox, tmp_path):
    directory, model = neox
    imported = import_step(directory, tmp_path / "start", model, 5)
    assert (imported.step, imported.position, imported.adam_step) == (5, 40, None)
    before, after = (states_of(path, model.settings) for path in (directory, imported.checkpoint))
    assert (after.step, after.scaler) == (before.step, before.scaler)
    assert after.step == 6
    for layer, name in before.names:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            parts = [s.part(layer, name, kind, size=1, rank=0) for s in (before, after)]
            assert torch.equal(*parts)
    assert sorted(path.name for path in (imported.checkpoint / "configs").iterdir()) == ["run.yml"]


@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_01_optim_states.pt"]
)
def test_a_download_that_lacks_a_file_is_refused_and_nothing_is_written(name, neox, tmp_path):
    directory, model = neox
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"could not be checked as recorded step 5.*{name}"):
        import_step(directory, tmp_path / "start", model, 5)
    assert not list(tmp_path.glob("*start*"))


def test_what_a_checkpoint_says_itself_is_not_asked_for(neox, tmp_path, capsys):
    directory, model = neox
    with pytest.raises(ConfigError, match="says itself how many there were"):
        import_step(directory, tmp_path / "start", model, 5, skipped_steps=1)
    command = f"import --config {tmp_path / 'run.yml'} --step 5 --from {directory} --moments cold"
    assert main([*command.split(), "--to", str(tmp_path / "start")]) == 2
    assert "has moments of its own; leave --moments out" in capsys.readouterr().err


def test_moments_from_neox_need_the_same_weights(neox, tmp_path):
    directory, model = neox
    copy = tmp_path / "other" / "step5"
    shutil.copytree(directory, copy)
    for path in copy.glob("*zero_pp*"):
        path.unlink()
    imported = import_with_moments_of(directory, copy, tmp_path / "start", model, 5)
    assert states_of(imported.checkpoint, model.settings).step == 6
    with pytest.raises(CheckpointError, match="holds no optimizer state to take moments from"):
        import_with_moments_of(copy, directory, tmp_path / "again", model, 5)
    path = copy / "layer_03-model_00-model_states.pt"
    layer = torch.load(path, weights_only=True)
    layer["attention.dense.weight"] += 1
    torch.save(layer, path)
    with pytest.raises(
        CheckpointError, match=r"1 of .* matrices differ, layer 3's attention\.dense"
    ):
        import_with_moments_of(directory, copy, tmp_path / "again", model, 5)


def test_neoxs_weights_alone_begin_cold(neox, tmp_path):
    directory, model = neox
    for path in directory.glob("*zero_pp*"):
        path.unlink()
    imported = import_step(directory, tmp_path / "start", model, 5)
    states = states_of(imported.checkpoint, model.settings)
    assert (states.step, states.tensor_parallel_size) == (6, 2)
    assert not states.part(2, "mlp.linear1.weight", "exp_avg", size=1, rank=0).any()
    assert verify_checkpoint(imported.checkpoint).problems == []


# -- the command, and a run that goes on ----------------------------------------------------------


def test_the_command_says_where_the_run_goes_on(tmp_path, capsys):
    config = write_config(tmp_path)
    source = branch(tmp_path, 3000, trained(3000))
    command = ["import", "--config", str(config), "--step", "3000", "--from", str(source)]
    assert main([*command, "--to", str(tmp_path / "start")]) == 0
    printed = capsys.readouterr().out
    assert "next sample    position 24,000" in printed
    assert "Adam's step    3,001" in printed
    assert f"load: {tmp_path / 'start'}" in printed
    assert main([*command, "--to", str(tmp_path / "b"), "--moments", "hot"]) == 2
    assert "it is `cold`" in capsys.readouterr().err
    assert main([*command, "--to", str(tmp_path / "b"), "--moments", "warm:3001"]) == 2
    assert "warm:3001: K must be 1 to 3000, the batches before step 3000" in capsys.readouterr().err
    assert main(["check", str(source), "--step", "3000"]) == 2
    assert "which model? give --model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """Import a branch of step 30 and train 3 steps from there on two ranks, in fp16."""
    folder = tmp_path_factory.mktemp("continued")
    keys = copy_corpus(folder)
    prefix = keys.pop("data_path")
    config = {
        **CONFIG,
        **keys,
        **{f"{split}_data_paths": [prefix] for split in ("train", "valid", "test")},
        "tokenizer_type": "HFTokenizer",
        "train_iters": 100,
        "eval_iters": 0,
    }
    path = folder / "tiny.yml"
    path.write_text(yaml.safe_dump(config))
    hub = trained(STEP, vocab_size=VOCABULARY)
    source = save_model(hub, folder / "hub" / f"step{STEP}")
    status = main(
        f"import --config {path} --step {STEP} --from {source} --to {folder / 'start'}".split()
    )
    assert status == 0
    launch = {"load": str(folder / "start"), "save": str(folder / "run"), "num_gpus": 2}
    run = run_training(
        config | launch | {"exit_interval": STEP + 3, "checkpoint_factor": STEP + 3},
        folder / "world",
        allows_fp16=True,
    )
    return folder, prefix, run


@pytest.mark.distributed
def test_the_run_goes_on_at_the_step_and_position_of_the_branch(continued):
    _, _, run = continued
    assert [record.step for record in run.records] == [31, 32, 33]
    assert [record.position for record in run.records] == [240, 248, 256]
    assert "which has no ledger, and goes on with steps 31..100" in run.printed
    assert "step 31 begins at position 240, sample 240 of order" in run.printed
    assert "exact: nothing is repeated, nothing skipped" in run.printed


@pytest.mark.distributed
def test_every_token_it_trained_on_is_the_orders(continued):
    """The proof: index maps and the data alone give the digests that the ranks recorded."""
    folder, prefix, run = continued
    maps = {
        kind: np.load(next(folder.glob(f"*train_0_indexmap_*_{kind}_idx.npy")))
        for kind in ("doc", "sample", "shuffle")
    }
    index = read_index(Path(f"{prefix}.idx"))
    tokens = np.fromfile(f"{prefix}.bin", index.dtype)
    starts = index.pointers // index.dtype.itemsize
    flat = np.concatenate(
        [tokens[starts[doc] : starts[doc] + index.sizes[doc]] for doc in maps["doc"]]
    )
    lengths = np.concatenate([[0], np.cumsum(index.sizes[maps["doc"]])])
    for record in run.records:
        total = 0
        for position in range(record.position, record.position + BATCH):
            place, offset = maps["sample"][maps["shuffle"][position]]
            begin = lengths[place] + offset
            row = flat[begin : begin + 17].astype("<i8")
            total += xxhash.xxh3_64_intdigest(row.tobytes(), seed=position)
        assert record.digest == f"{total % 2**64:016x}"


@pytest.mark.distributed
def test_neox_ledger_proves_it_afterwards(continued, capsys):
    folder, _, _ = continued
    assert ledger(["verify", "--run", str(folder / "run"), "--all"]) == 0
    printed = capsys.readouterr().out
    assert "digests    3 steps and 0 evaluations computed from the data" in printed
    record = json.loads((folder / "run" / "global_step33" / "ledger.json").read_text())
    assert (
        "Adam's moments are zeros (cold), not the run's: numbers are not exact"
        in (record["adopted"]["assumed"])
    )
    ledger(["step", "31", "--run", str(folder / "run"), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["samples"][0]["position"] == 240
    ledger(["step", "30", "--run", str(folder / "run"), "--json"])
    assert json.loads(capsys.readouterr().out)["samples"][0]["position"] == 232


# -- moments from the batches before the step ------------------------------------------------------


@pytest.mark.distributed
def test_warm_moments_are_those_of_the_batches_before_the_step(tmp_path):
    keys = copy_corpus(tmp_path)
    prefix = keys.pop("data_path")
    config = {
        **{key: value for key, value in CONFIG.items() if key != "fp16"},
        **keys,
        **{f"{split}_data_paths": [prefix] for split in ("train", "valid", "test")},
        "tokenizer_type": "HFTokenizer",
        "precision": "bfloat16",
        "train_iters": 100,
        "eval_iters": 0,
    }
    path, machine = tmp_path / "tiny.yml", tmp_path / "machine.yml"
    path.write_text(yaml.safe_dump(config))
    machine.write_text(yaml.safe_dump({"num_gpus": 2, "load": "elsewhere", "save": "elsewhere"}))
    model = model_of_files([path], num_tokens=300)
    hub = trained(STEP, vocab_size=VOCABULARY).bfloat16()
    source = save_model(hub, tmp_path / "hub" / f"step{STEP}")
    seen = []

    def launch(file):
        run = run_training(yaml.safe_load(file.read_text()), tmp_path / "world")
        seen.extend(run.records)
        return 0

    imported = import_warm(
        source, tmp_path / "start", model, STEP, 3, launch_files=[machine], launch=launch
    )
    assert [record.position for record in seen] == [27 * BATCH, 28 * BATCH, 29 * BATCH]
    assert {record.lr for record in seen} == {0.0}
    assert (imported.step, imported.adam_step) == (STEP, STEP + 1)
    cold = states_of(tmp_path / "start.warm-up" / "start" / "global_step27", model.settings)
    run = states_of(tmp_path / "start.warm-up" / "run" / "global_step30", model.settings)
    warm = states_of(imported.checkpoint, model.settings)
    assert (cold.step, run.step, warm.step) == (0, 3, STEP + 1)
    for layer, name in warm.names:
        before, gathered, after = (
            [
                states.part(layer, name, kind, size=1, rank=0)
                for kind in ("master", "exp_avg", "exp_avg_sq")
            ]
            for states in (cold, run, warm)
        )
        assert torch.equal(before[0], after[0])
        assert torch.equal(gathered[0], after[0])  # frozen to the last bit
        assert torch.allclose(after[1], gathered[1] / (1 - 0.9**3), rtol=1e-5)
        assert torch.allclose(after[2], gathered[2] / (1 - 0.95**3), rtol=1e-5)
        assert after[2].any()
