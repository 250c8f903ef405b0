"""Every kind of wrong release that was reported is caught on a stand-in; good ones pass."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron.base.errors import ConfigError
from megatron.cli.pythia.checks import check_release
from megatron.cli.pythia.downloaded import step_named
from megatron.cli.pythia.findings import exit_status
from megatron.cli.pythia.idx_files import RELEASED_INDEXES, check_index
from megatron.cli.pythia.known_releases import KNOWN_RELEASES, KnownRelease, known_of
from megatron.cli.pythia.main import main
from megatron.cli.pythia.models import find_model, model_of_files
from megatron.cli.pythia.sha256 import sha256_of
from megatron.stream.index_file import write_index
from tests.pythia import recorded_runs
from tests.pythia_models.stand_ins import (
    branch,
    first_values,
    released_model,
    trained,
    write_config,
)


def texts(findings, kind="wrong"):
    return [finding.text for finding in findings if finding.kind == kind]


@pytest.fixture
def tiny(tmp_path):
    return released_model(tmp_path)


def test_a_good_step_beside_its_neighbours_is_good(tiny, tmp_path):
    steps = [branch(tmp_path, step, trained(step)) for step in (2000, 3000, 4000)]
    assert check_release(steps[1], tiny, 3000, against=[steps[0], steps[2]]) == []


# -- reported of 2.8b, 12b and weight-seed1 -------------------------------------------------------


def test_two_steps_with_the_same_weights_are_refused(tiny, tmp_path):
    same = trained(143000)
    steps = branch(tmp_path, 3000, same), branch(tmp_path, 143000, same)
    findings = check_release(steps[0], tiny, 3000, against=[steps[1]])
    (problem,) = texts(findings)
    assert "all 10 matrices are those of" in problem
    assert "step143000 (step 143000)" in problem
    assert exit_status(findings) == 1


def test_the_same_weights_as_fp32_are_the_same(tiny, tmp_path):
    steps = (
        branch(tmp_path, 3000, trained(7)),
        branch(tmp_path, 4000, trained(7).float()),
    )
    assert "all 10 matrices" in texts(check_release(steps[0], tiny, 3000, against=[steps[1]]))[0]


def test_one_shard_of_another_step_is_refused_by_the_tensors_in_it(tiny, tmp_path):
    sharded = {"max_shard_size": "30KB", "safe_serialization": True}
    mine = branch(tmp_path, 50000, trained(50000), **sharded)
    last = branch(tmp_path, 143000, trained(143000), **sharded)
    name = sorted(path.name for path in last.glob("*.safetensors"))[0]
    shutil.copy(last / name, mine / name)
    findings = check_release(mine, tiny, 50000, against=[last])
    (problem,) = texts(findings)
    assert problem.startswith("mixed: ")
    assert "layer 0's word_embeddings.weight" in problem


def test_a_file_whose_digest_was_published_is_refused_without_the_other_step(tiny, tmp_path):
    step = branch(tmp_path, 3000, trained(3000))
    digest = sha256_of(step / "model.safetensors")
    known = KnownRelease(
        "tiny", {3000}, "all are one file", "issue", {"model.safetensors": digest[:16]}, {143000}
    )
    findings = check_release(step, tiny, 3000, entries=[known])
    assert "of a file known to be another step's: all are one file" in texts(findings)[0]
    right = check_release(step, tiny, 143000, entries=[known])
    assert texts(right) == []


def test_a_report_alone_warns_with_its_source_and_refuses_nothing(tiny, tmp_path):
    step = branch(tmp_path, 3000, trained(3000))
    known = KnownRelease("tiny", {3000}, "was wrong once", "issue #1")
    findings = check_release(step, tiny, 3000, entries=[known])
    assert [str(one) for one in findings] == ["warning: tiny step 3000: was wrong once [issue #1]"]
    assert exit_status(findings) == 0


def test_steps_0_and_1_are_equal_and_must_be(tiny, tmp_path):
    first = branch(tmp_path, 0, first_values())
    second = branch(tmp_path, 1, first_values())
    assert texts(check_release(second, tiny, 1, against=[first])) == []
    shutil.rmtree(second)
    second = branch(tmp_path, 1, first_values(run=5))
    (problem,) = texts(check_release(second, tiny, 1, against=[first]))
    assert problem.startswith("steps 0 and 1 differ in 10 of 10 matrices")
    assert "step 1 is of another run" in problem


def test_weights_of_a_run_with_another_seed_are_refused(tiny, tmp_path):
    mine = branch(tmp_path / "weight-seed1", 1, first_values(run=3))
    theirs = branch(tmp_path / "data-seed1", 1, first_values(run=3))
    (problem,) = texts(check_release(mine, tiny, 1, other_runs=[theirs]))
    assert "10 of 10 matrices are those of" in problem
    assert "another run's" in problem


def test_steps_equal_so_early_prove_nothing(tiny, tmp_path):
    early = branch(tmp_path, 2, first_values()), branch(tmp_path, 0, first_values())
    findings = check_release(early[0], tiny, 2, against=[early[1]])
    assert texts(findings) == []
    assert any("possible so early" in one for one in texts(findings, "warning"))


# -- first values --------------------------------------------------------------------------------


def test_first_values_of_another_scale_are_refused(tiny, tmp_path):
    assert texts(check_release(branch(tmp_path, 0, first_values()), tiny, 0)) == []
    large = branch(tmp_path / "large", 0, first_values(factor=1.3))
    (problem,) = texts(check_release(large, tiny, 0))
    assert "small_init gives 0.111803" in problem


def test_trained_weights_are_no_step_0(tiny, tmp_path):
    problems = texts(check_release(branch(tmp_path, 0, trained(9)), tiny, 0))
    assert "are not 0 (biases) and 1 (norms) as at first" in problems[0]


def test_first_values_are_no_step_3000(tiny, tmp_path):
    (problem,) = texts(check_release(branch(tmp_path, 3000, first_values()), tiny, 3000))
    assert "these are first values, not those of step 3000" in problem


# -- the wrong model, files, types ---------------------------------------------------------------


def test_another_models_size_is_refused_with_its_numbers(tiny, tmp_path):
    step = branch(tmp_path, 3000, trained(1, num_hidden_layers=3))
    (problem,) = texts(check_release(step, tiny, 3000))
    assert "config.json describes a model of" in problem
    assert "num_layers is 3, tiny's is 2" in problem


def test_another_vocabulary_is_refused(tiny, tmp_path):
    step = branch(tmp_path, 3000, trained(1, vocab_size=112))
    (problem,) = texts(check_release(step, tiny, 3000))
    assert "the embedding has 112 rows; tiny was trained with 104: 100 tokens, padded" in problem


def test_an_upcast_is_told_and_other_fp32_warned_of(tiny, tmp_path):
    upcast = branch(tmp_path, 3000, trained(1).float())
    (note,) = check_release(upcast, tiny, 3000)
    assert note.kind == "note"
    assert "every value exact in fp16: an upcast" in note.text
    other = trained(2).float()
    with torch.no_grad():
        other.lm_head.weight[0, 0] = 0.1
    (warning,) = check_release(branch(tmp_path, 4000, other), tiny, 4000)
    assert warning.kind == "warning"
    assert "layer 6's final_linear.weight hold values that fp16 cannot" in warning.text


def test_a_value_that_is_not_finite_is_refused(tiny, tmp_path):
    broken = trained(3)
    with torch.no_grad():
        broken.lm_head.weight[5, 5] = float("nan")
    (problem,) = texts(check_release(branch(tmp_path, 3000, broken), tiny, 3000))
    assert problem == "layer 6's final_linear.weight hold NaN or infinite values"


def test_a_missing_shard_cannot_be_told_from(tiny, tmp_path):
    step = branch(tmp_path, 40000, trained(1), max_shard_size="30KB")
    next(step.glob("model-00002*")).unlink()
    known = KnownRelease("tiny", {40000}, "weights are missing", "issue #202")
    findings = check_release(step, tiny, 40000, entries=[known])
    assert exit_status(findings) == 2
    assert "model-00002-of" in texts(findings, "unknown")[0]
    assert texts(findings, "warning") == ["tiny step 40000: weights are missing"]


def test_a_bit_that_changed_on_the_way_is_found_where_the_hubs_digest_is_on_record(tiny, tmp_path):
    step = branch(tmp_path, 3000, trained(1))
    weights = step / "model.safetensors"
    record = step / ".cache" / "huggingface" / "download" / f"{weights.name}.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{'0' * 40}\n{sha256_of(weights)}\n1764000000.0\n")
    assert check_release(step, tiny, 3000) == []
    damage(weights)
    (problem,) = texts(check_release(step, tiny, 3000))
    assert "is damaged; remove it and download it again" in problem


def test_a_directory_called_after_another_step_is_warned_of(tiny, tmp_path):
    step = branch(tmp_path, 4000, trained(1))
    (warning,) = texts(check_release(step, tiny, 3000), "warning")
    assert warning.endswith("step4000 is called after step 4000, not 3000")


def test_main_is_step_143000_only_as_the_branchs_own_name(tmp_path):
    assert step_named(tmp_path / "main") == 143000
    assert step_named(tmp_path / "main" / "downloads") is None


def test_weights_without_their_config_json_are_no_checkpoint(tiny, tmp_path):
    step = branch(tmp_path, 3000, trained(1))
    (step / "config.json").unlink()
    (problem,) = texts(check_release(step, tiny, 3000), "unknown")
    assert "no global_stepN, and no config.json as a branch of the hub has" in problem


def test_a_flat_checkpoint_is_told_what_to_become(tiny, tmp_path):
    torch.save(trained(1).state_dict(), tmp_path / "model.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3000")
    (problem,) = texts(check_release(tmp_path, tiny, 3000), "unknown")
    assert "holds model.pt, latest_checkpointed_iteration.txt: a flat checkpoint" in problem
    assert "Hugging Face's form: config.json and pytorch_model.bin" in problem


def test_steps_before_the_first_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="tiny has no step -3: steps count from 0"):
        check_release(tmp_path, tiny, -3)


# -- NeoX's form, by real NeoX v1.0 ---------------------------------------------------------------


@pytest.fixture(scope="module", params=["tp1_dp2_zero1", "tp2_dp2_zero1"])
def recorded(request, tmp_path_factory):
    return recorded_runs.unpack(request.param, tmp_path_factory.mktemp("neox"))


@pytest.fixture
def neox(recorded, tmp_path):
    """A copy of a recorded run's directory, and its model."""
    copy = tmp_path / "run"
    shutil.copytree(recorded, copy)
    keys = yaml.safe_load((copy / "global_step5" / "configs" / "tiny.yml").read_text())
    config = tmp_path / "run.yml"
    config.write_text(yaml.safe_dump({**keys, "train_batch_size": 8}))
    return copy, model_of_files([config], name="recorded", num_tokens=250)


def test_a_checkpoint_of_neox_is_good_and_says_that_its_masters_fit(neox):
    directory, model = neox
    (note,) = check_release(directory, model, 5)
    assert note.text == "all 28 weights are the optimizer's masters, rounded"


def test_neoxs_root_layout_without_latest_is_read(neox, tmp_path):
    directory, model = neox
    shutil.move(directory / "global_step5", tmp_path / "step5")
    assert exit_status(check_release(tmp_path / "step5", model, 5)) == 0
    (problem,) = texts(check_release(tmp_path / "step5", model, 6))
    assert problem == "its files say step 5, not 6"


def test_a_layer_file_of_another_save_is_refused(neox):
    directory, model = neox
    path = directory / "global_step5" / "layer_02-model_00-model_states.pt"
    layer = torch.load(path, weights_only=True)
    layer["attention.dense.weight"] += 1
    torch.save(layer, path)
    problems = texts(check_release(directory, model, 5))
    assert "1 of 28 weights are not the optimizer's masters, rounded" in problems[0]
    assert "layer 2's attention.dense.weight" in problems[0]


def test_metadata_of_several_steps_is_refused(tmp_path):
    directory, model = neox_of_two_ranks(tmp_path)
    path = directory / "mp_rank_01_model_states.pt"
    states = torch.load(path, weights_only=False)
    states["iteration"] = 7
    torch.save(states, path)
    problems = texts(check_release(directory, model, 5))
    assert "files of several steps are mixed" in problems[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mp_rank_01_model_states.pt", "mp_rank_01_model_states.pt is missing"),
        ("zero_pp_rank_1_mp_rank_01_optim_states.pt", "mp_rank_01_optim_states.pt is missing"),
        ("layer_03-model_01-model_states.pt", "layer_03-model_01-model_states.pt missing"),
    ],
)
def test_a_missing_file_of_neoxs_is_named(name, message, tmp_path):
    directory, model = neox_of_two_ranks(tmp_path)
    (directory / name).unlink()
    findings = check_release(directory, model, 5)
    assert exit_status(findings) == 2
    assert message in texts(findings, "unknown")[0]


def test_a_file_that_another_save_left_is_told(tmp_path):
    directory, model = neox_of_two_ranks(tmp_path)
    stale = directory / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    shutil.copy(directory / "zero_pp_rank_0_mp_rank_00_optim_states.pt", stale)
    (problem,) = texts(check_release(directory, model, 5), "unknown")
    assert f"{stale.name}: left by another save" in problem


def test_neoxs_files_in_the_hubs_cache_are_read(tmp_path):
    directory, model = neox_of_two_ranks(tmp_path)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123abcd", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in directory.glob("*.pt"):
        blob = blobs / sha256_of(path)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    for _ in range(2):
        (note,) = check_release(snapshot, model, 5)
        assert note.text == "all 28 weights are the optimizer's masters, rounded"
    damage(blobs / (snapshot / "mp_rank_00_model_states.pt").readlink().name)
    assert "the hub's file" in texts(check_release(snapshot, model, 5))[0]


def neox_of_two_ranks(folder):
    """The recorded checkpoint of two tensor ranks, its files at the top, and its model."""
    shutil.move(recorded_runs.unpack("tp2_dp2_zero1", folder) / "global_step5", folder / "step5")
    keys = yaml.safe_load((folder / "step5" / "configs" / "tiny.yml").read_text())
    config = folder / "run.yml"
    config.write_text(yaml.safe_dump({**keys, "train_batch_size": 8}))
    return folder / "step5", model_of_files([config], name="recorded", num_tokens=250)


def damage(path):
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


# -- the data set --------------------------------------------------------------------------------


def test_the_index_of_another_data_set_is_refused(tmp_path, monkeypatch):
    prefix = tmp_path / "mine"
    write_index(Path(f"{prefix}.idx"), np.dtype(np.uint16), np.array([3, 4], np.int32), [0, 1, 2])
    model = find_model("pythia-70m-deduped")
    (finding,) = check_index(str(prefix), model)
    assert finding.kind == "wrong"
    assert "it is another data set's; 2 documents, 7 tokens" in finding.text
    digest = sha256_of(Path(f"{prefix}.idx"))
    name = "pile_0.87_deduped_text_document"
    monkeypatch.setitem(RELEASED_INDEXES, name, (digest, "here"))
    assert [one.kind for one in check_index(str(prefix), model)] == ["note"]
    (finding,) = check_index(str(prefix), find_model("pythia-70m"))
    assert f"it is {name}'s" in finding.text


# -- names and the table -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("pythia-160m-deduped", ["160M-deduped.yml"]),
        ("EleutherAI/pythia-1.4b", ["1-4B.yml"]),
        ("neox-ckpt-pythia-160m-deduped-v1", ["160M-deduped.yml"]),
        ("pythia-410m-seed3", ["410M.yml", "seed3.yml"]),
        ("pythia-14m-seed0", ["14M.yml"]),
        ("pythia-160m-weight-seed2", ["160M.yml", "weight-seed2.yml"]),
        ("pythia-6.9b-deduped-v0", ["6-9B-deduped.yml"]),
        ("pythia-v1.1-70m-0.25MtokBS", ["70M-0-25M.yml"]),
    ],
)
def test_a_name_means_these_files(name, files):
    assert [file.name for file in find_model(name).files] == files


@pytest.mark.parametrize("name", ["pythia-9b", "pythia-14m-deduped", "pythia-1b-seed3", "gpt2"])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match=f"no model is called '{name}'"):
        find_model(name)


def test_branches_of_version_0_count_two_for_a_step():
    model = find_model("pythia-160m-v0")
    assert model.iteration(3000) == 1500
    with pytest.raises(ConfigError, match="has no step 3001"):
        model.iteration(3001)
    assert find_model("pythia-70m-v0").iteration(3000) == 3000
    with pytest.raises(ConfigError, match="was trained for 143,000"):
        find_model("pythia-70m").iteration(144000)


def test_reports_are_found_by_model_and_step():
    def steps(model):
        every = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 143001, 1000)]
        return [step for step in every if any(True for _ in known_of(model, step))]

    assert len(steps("pythia-2.8b")) == 76 + 10
    assert 66000 not in steps("pythia-2.8b")
    assert steps("pythia-410m-seed9") == [1, 2, 40000]
    assert steps("pythia-70m-deduped") == [1, 2]
    assert all(entry.source for entry in KNOWN_RELEASES)


# -- the command ---------------------------------------------------------------------------------


def test_the_command_answers_in_words_json_and_status(tmp_path, capsys):
    config = write_config(tmp_path)
    steps = [branch(tmp_path, step, trained(7)) for step in (3000, 4000)]
    command = ["check", str(steps[0]), "--config", str(config), "--step", "3000"]
    assert main(command) == 0
    assert "nothing wrong was found" in capsys.readouterr().out
    assert main([*command, "--against", str(steps[1]), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_status"] == 1
    assert answer["findings"][0]["kind"] == "wrong"
    (steps[0] / "model.safetensors").unlink()
    assert main(command) == 2
    assert "could not be checked" in capsys.readouterr().out


def test_the_table_is_printed_with_sources(capsys):
    assert main(["check", "--known", "--model", "pythia-12b"]) == 0
    printed = capsys.readouterr().out
    assert "50000, 58000" in printed
    assert "#206" in printed


def test_what_is_neither_a_directory_nor_a_name_is_told(tmp_path, capsys):
    command = ["check", str(tmp_path / "no where"), "--model", "pythia-70m", "--step", "3000"]
    assert main(command) == 2
    assert "neither a directory nor a model's name on the hub" in capsys.readouterr().err
    assert main(["check", "--model", "pythia-70m"]) == 2
    assert "DIR and --step are needed" in capsys.readouterr().err
