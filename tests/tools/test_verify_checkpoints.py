"""``tools/ckpts/verify.py``: what it says of good and bad checkpoints, and its exit status."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron.base.file_digests import digest_file
from megatron.checkpoint.safe_torch import read_torch_file
from megatron.cli.checkpoints.verify import main
from megatron.ledger.manifest import Manifest, StoredFile, write_manifest
from tests.architecture.source_tree import ROOT
from tests.architecture.test_imports import HEAVY, modules_after
from tests.checkpoint.malicious_files import ATTACKS

ORACLE = ROOT / "tests/data/oracle"
TP2_PP2 = ORACLE / "ckpt_b/global_step10"
LAYER_5 = "layer_05-model_01-model_states.pt"
OPTIMIZER_3 = "zero_pp_rank_0_mp_rank_03_optim_states.pt"
METADATA_1 = "mp_rank_01_model_states.pt"


@pytest.fixture
def save(tmp_path):
    """A run's directory with one checkpoint of NeoX's."""
    shutil.copytree(TP2_PP2, tmp_path / "run/global_step10", copy_function=shutil.copyfile)
    (tmp_path / "run/latest").write_text("global_step10")
    return tmp_path / "run"


def changed(path, change):
    """Rewrite a torch file, so that its checksums are right again."""
    content = read_torch_file(path)
    change(content)
    torch.save(content, path.with_name("new"))
    path.with_name("new").replace(path)


def moved_on(save, step, *, by):
    """Copy the newest checkpoint as that of a later step; every weight and moment moves ``by``."""
    source, target = save / "global_step10", save / f"global_step{step}"
    shutil.copytree(source, target)
    for path in target.glob("*.pt"):
        changed(path, lambda content: move(content, step, by))
    (save / "latest").write_text(target.name)
    return target


@torch.no_grad()
def move(content, step, by):
    if "iteration" in content:
        content["iteration"] = step
        return
    state = content.get("optimizer_state_dict")
    if state is None:
        for tensor in content.values():
            tensor += by
        return
    for moments in state["base_optimizer_state"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] += by
    for copy in state["single_partition_of_fp32_groups"]:
        copy += by


def with_manifest(checkpoint):
    files = {
        path.relative_to(checkpoint).as_posix(): StoredFile(path.stat().st_size, digest_file(path))
        for path in checkpoint.rglob("*")
        if path.is_file()
    }
    manifest = Manifest(sequence=3, step=10, run_id="r", attempt=1, parent=None, files=files)
    write_manifest(checkpoint, manifest)


def verified(capsys, *arguments):
    status = main([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def problems_of(answer):
    [checkpoint] = answer["checkpoints"]
    return checkpoint["problems"]


def test_a_good_checkpoint_is_0(save, capsys):
    assert main([str(save)]) == 0
    assert capsys.readouterr().out == (
        "good global_step10  22 files, 4 MB, compared with torch's checksums\n"
        "result   1 checkpoint good\n"
    )
    status, answer = verified(capsys, save / "global_step10")
    assert (status, answer["checkpoints"][0]["step"]) == (0, 10)


def test_a_manifest_is_what_bytes_are_compared_with(save, capsys):
    with_manifest(save / "global_step10")
    status, answer = verified(capsys, save)
    assert (status, answer["checkpoints"][0]["sequence"]) == (0, 3)
    config = next((save / "global_step10/configs").iterdir())
    config.write_text(config.read_text().replace("2", "3", 1))  # no torch file: no checksum
    status, answer = verified(capsys, save)
    assert status == 1
    [problem] = problems_of(answer)
    assert problem.startswith(f"configs/{config.name} holds other bytes than were written (digest")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", [LAYER_5, OPTIMIZER_3, METADATA_1])
def test_a_flipped_bit_anywhere_in_a_neox_file_is_1(name, seed, save, capsys):
    path = save / "global_step10" / name
    data = bytearray(path.read_bytes())
    [tensor_bytes] = [part for part in zip_parts(path) if part.name.endswith("data/0")]
    place = tensor_bytes.start + int(np.random.default_rng(seed).integers(tensor_bytes.size))
    data[place] ^= 1 << seed
    path.write_bytes(bytes(data))
    status, answer = verified(capsys, save)
    assert status == 1
    assert [problem.split()[0] for problem in problems_of(answer)] == [name]


def zip_parts(path):
    from megatron.base.zip_parts import read_parts

    with path.open("rb") as file:
        return list(read_parts(file).values())


def test_files_of_other_ranks_are_found_by_the_optimizers_copies(save, capsys):
    twin = LAYER_5.replace("model_01", "model_00")
    checkpoint = save / "global_step10"
    (checkpoint / LAYER_5).rename(checkpoint / "swap")
    (checkpoint / twin).rename(checkpoint / LAYER_5)
    (checkpoint / "swap").rename(checkpoint / twin)
    status, answer = verified(capsys, save)
    assert status == 1
    first, second = problems_of(answer)
    assert first == (
        f"{twin}: attention.query_key_value.weight, attention.dense.weight, mlp.linear1.weight "
        "and 3 more of layer 5 differ from the optimizer's copies in "
        "zero_pp_rank_0_mp_rank_02_optim_states.pt: they come from different saves or ranks"
    )
    assert second.startswith(f"{LAYER_5}: attention.query_key_value.weight, ")


def test_a_layer_file_of_another_step_is_found_by_the_optimizers_copies(save, capsys):
    shutil.copyfile(
        ORACLE / "ckpt_b_step0/global_step0" / LAYER_5, save / "global_step10" / LAYER_5
    )
    status, answer = verified(capsys, save)
    assert status == 1
    [problem] = problems_of(answer)
    assert problem.startswith(f"{LAYER_5}: attention.query_key_value.weight, ")


def test_a_value_that_is_no_number_is_1(save, capsys):
    changed(save / "global_step10" / LAYER_5, lambda layer: layer["mlp.linear1.bias"].fill_(np.inf))
    status, answer = verified(capsys, save)
    assert status == 1
    assert problems_of(answer) == [f"{LAYER_5}: mlp.linear1.bias holds 128 infinite values"]


def test_a_bad_checkpoint_is_told_from_good_ones(save, capsys):
    moved_on(save, 20, by=0.25)
    (save / "global_step20" / LAYER_5).unlink()
    assert main([str(save)]) == 1
    assert capsys.readouterr().out == (
        "good global_step10  22 files, 4 MB, compared with torch's checksums\n"
        "BAD  global_step20  21 files, 4 MB, compared with torch's checksums\n"
        f"     PROBLEM  {LAYER_5} is missing\n"
        "result   1 of 2 checkpoints bad\n"
    )


def test_steps_that_differ_are_good_when_looked_at_deeply(save, capsys):
    moved_on(save, 20, by=0.25)
    assert verified(capsys, save, "--deep")[0] == 0


def test_the_weights_of_one_step_under_two_names_are_found(save, capsys):
    moved_on(save, 20, by=0)
    assert verified(capsys, save)[0] == 0  # each is whole
    status, answer = verified(capsys, save, "--deep")
    assert status == 1
    assert answer["problems"] == [
        "global_step10 and global_step20: all 104 weight tensors are identical: one of them holds "
        "the other step's weights, unless nothing was learnt in between (a learning rate of 0)",
        "global_step10 and global_step20: all 16 optimizer moments are identical",
    ]


def test_one_layer_of_another_step_is_found_between_neighbours(save, capsys):
    target = moved_on(save, 20, by=0.25)
    for path in target.glob("zero_*"):  # nothing else tells: weights alone were published
        path.unlink()
    shutil.copyfile(save / "global_step10" / LAYER_5, target / LAYER_5)
    status, answer = verified(capsys, save, "--deep", "--weights-only")
    assert status == 1
    assert answer["problems"] == [
        "global_step10 and global_step20: all 12 tensors of layer 5, tensor rank 1, are identical, "
        "those of other layers are not: the file is another step's"
    ]


def test_one_checkpoint_has_no_neighbour(save, capsys):
    status, answer = verified(capsys, save, "--deep")
    assert status == 2
    assert answer["unknown"] == ["--deep compares neighbouring checkpoints, and there is only one"]


def test_a_pointer_to_nothing_is_1_and_none_is_a_note(save, capsys):
    (save / "latest").write_text("global_step30")
    status, answer = verified(capsys, save)
    assert status == 1
    assert answer["problems"][0].startswith("latest names global_step30, which is not")
    (save / "latest").unlink()
    status, answer = verified(capsys, save)
    assert status == 0
    assert answer["notes"] == ["latest: there is no such file, so NeoX would not find a checkpoint"]


def test_what_a_killed_save_left_is_said(save, capsys):
    (save / ".tmp-global_step20-0123456789ab").mkdir()
    status, answer = verified(capsys, save)
    assert status == 0
    [note] = answer["notes"]
    assert note.startswith(".tmp-global_step20-0123456789ab: left by a save or deletion that was")


@pytest.mark.parametrize("is_there", [True, False])
def test_a_directory_without_checkpoints_is_2(is_there, tmp_path, capsys):
    directory = tmp_path / "empty"
    if is_there:
        directory.mkdir()
    assert main([str(directory)]) == 2
    what = "holds no checkpoint: no global_stepN" if is_there else "is not a directory"
    assert capsys.readouterr().err == f"verify: {directory} {what}\n"


def test_missing_optimizer_state_is_missed_unless_told_otherwise(save, capsys):
    for path in (save / "global_step10").glob("zero_*"):
        path.unlink()
    status, answer = verified(capsys, save)
    assert status == 1
    assert "--weights-only doesn't miss an optimizer" in answer["checkpoints"][0]["notes"][-1]
    status, answer = verified(capsys, save, "--weights-only")
    assert status == 0
    assert not any("--weights-only" in note for note in answer["checkpoints"][0]["notes"])


@pytest.mark.parametrize("name", [LAYER_5, OPTIMIZER_3, METADATA_1])
def test_code_in_a_file_is_refused_by_name_and_not_run(name, save, tmp_path, capsys):
    canary = tmp_path / "canary"
    ATTACKS["os.system"].write(save / "global_step10" / name, canary)
    status, answer = verified(capsys, save, "--deep")
    assert status == 1
    assert f"{name} is refused: it names posix.system," in problems_of(answer)[0]
    assert not canary.exists()


def test_the_tool_loads_nothing_heavy_and_answers_from_anywhere(save, tmp_path):
    assert modules_after("import megatron.cli.checkpoints.verify") & set(HEAVY) == set()
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools/ckpts/verify.py"), str(save)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("result   1 checkpoint good\n")
