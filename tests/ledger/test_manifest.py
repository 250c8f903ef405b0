"""What a manifest says of a checkpoint's files, and what it finds wrong with them."""

import dataclasses
import json
import os
import random
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import CheckpointError
from megatron.base.file_digests import FileDigest, digest_file
from megatron.ledger.manifest import (
    MANIFEST_FILE,
    Manifest,
    StoredFile,
    digest_problems,
    manifest_text,
    quick_problems,
    read_manifest,
    share_of_files,
    write_manifest,
)

CONTENT = {
    "layer_00-model_00-model_states.pt": b"embedding" * 1000,
    "mp_rank_00_model_states.pt": b"states" * 321,
    "configs/run.yml": b"num-layers: 2\n",
    "empty.json": b"",
}


def digest_of(data):
    digest = FileDigest()
    digest.update(data)
    return digest.hexdigest()


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "global_step7"
    for name, data in CONTENT.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    files = {name: StoredFile(len(data), digest_of(data)) for name, data in CONTENT.items()}
    write_manifest(
        directory,
        Manifest(sequence=3, step=7, run_id="run", attempt=2, parent=None, files=files),
    )
    return directory


def all_problems(checkpoint):
    manifest = read_manifest(checkpoint)
    return quick_problems(checkpoint, manifest), digest_problems(
        checkpoint, manifest, manifest.files
    )


def test_an_untouched_checkpoint_has_no_problems(checkpoint):
    assert all_problems(checkpoint) == ([], [])


def test_a_checkpoint_of_neox_has_no_manifest(tmp_path):
    assert read_manifest(tmp_path) is None


def test_the_digest_of_a_file_is_that_of_its_bytes_in_any_pieces(tmp_path):
    data = random.Random(1).randbytes(5_000_011)
    (tmp_path / "file").write_bytes(data)
    pieces = FileDigest()
    for start in range(0, len(data), 1_234_567):
        pieces.update(memoryview(data)[start : start + 1_234_567])
    assert digest_file(tmp_path / "file") == pieces.hexdigest() == digest_of(data)
    assert pieces.size == len(data)


@pytest.mark.parametrize("name", CONTENT)
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    quick, deep = all_problems(checkpoint)
    assert quick == deep == [f"{name} is missing"]


@pytest.mark.parametrize("name", [name for name, data in CONTENT.items() if data])
def test_a_shorter_or_longer_file_is_found_without_reading_it(checkpoint, name):
    size = len(CONTENT[name])
    os.truncate(checkpoint / name, size - 1)
    assert all_problems(checkpoint)[0] == [f"{name} has {size - 1} bytes instead of {size}"]
    os.truncate(checkpoint / name, 0)
    assert all_problems(checkpoint)[0] == [f"{name} has 0 bytes instead of {size}"]


@given(st.data())
def test_any_flipped_bit_is_found(tmp_path_factory, data):
    name = data.draw(st.sampled_from([name for name, content in CONTENT.items() if content]))
    content = bytearray(CONTENT[name])
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    directory = tmp_path_factory.mktemp("flip")
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes(content)
    original = StoredFile(len(content), digest_of(CONTENT[name]))
    manifest = Manifest(
        sequence=1, step=1, run_id=None, attempt=None, parent=None, files={name: original}
    )
    (problem,) = digest_problems(directory, manifest, [name])
    assert problem.startswith(f"{name} holds other bytes than were written (digest ")
    shutil.rmtree(directory)


def test_a_directory_fifo_or_link_in_a_files_place_is_refused(checkpoint, tmp_path):
    path = checkpoint / "mp_rank_00_model_states.pt"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "symbolic link" in all_problems(checkpoint)[0][0]
    assert "symbolic link" in all_problems(checkpoint)[1][0]
    path.unlink()
    os.mkfifo(path)  # opening it would hang
    assert all_problems(checkpoint)[1] == [f"{path.name} is not a regular file"]
    path.unlink()
    path.mkdir()
    assert all_problems(checkpoint)[1] == [f"{path.name} is not a regular file"]


def test_a_file_behind_a_linked_folder_is_refused(checkpoint, tmp_path):
    (checkpoint / "configs").rename(tmp_path / "configs")
    (checkpoint / "configs").symlink_to(tmp_path / "configs")
    assert "configs/run.yml is, or lies behind, a symbolic link" in all_problems(checkpoint)[0][0]


def test_an_unlisted_tensor_file_is_a_problem_and_a_note_is_not(checkpoint):
    (checkpoint / "NOTES.md").write_text("the good one")
    (checkpoint / ".nfs000001.pt").write_text("")
    assert all_problems(checkpoint) == ([], [])
    (checkpoint / "layer_00-model_01-model_states.pt").write_text("")
    assert all_problems(checkpoint)[0] == [
        "layer_00-model_01-model_states.pt does not belong to it"
    ]


def test_a_checkpoint_under_another_steps_name_is_a_problem(checkpoint):
    moved = checkpoint.rename(checkpoint.with_name("global_step8"))
    assert all_problems(moved)[0] == ["its manifest is that of step 7"]


@pytest.mark.parametrize(
    "name", ["../out.pt", "/etc/passwd", "a/../../b", "a//b", "./a", "", "a\0b", MANIFEST_FILE]
)
def test_names_that_leave_the_checkpoint_are_refused(checkpoint, name):
    manifest = read_manifest(checkpoint)
    files = {**manifest.files, name: StoredFile(1, "0" * 32)}
    with pytest.raises(CheckpointError, match="is not the name of a file inside"):
        write_manifest(checkpoint, dataclasses.replace(manifest, files=files))
    values = json.loads((checkpoint / MANIFEST_FILE).read_text())
    values["files"][name] = {"size": 1, "digest": "0" * 32}
    del values["checksum"]
    values["checksum"] = digest_of(json.dumps(values, sort_keys=True).encode())
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"manifest\.json: .* is not the name of a file"):
        read_manifest(checkpoint)


def test_any_flipped_bit_of_a_manifest_is_found_or_changes_nothing(checkpoint):
    good = read_manifest(checkpoint)
    path = checkpoint / MANIFEST_FILE
    original = path.read_bytes()
    num_found = 0
    for index in range(len(original)):
        damaged = bytearray(original)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        try:
            assert read_manifest(checkpoint) == good
        except CheckpointError as error:
            assert "manifest.json" in str(error)  # noqa: PT017 - either outcome is right
            num_found += 1
    assert num_found > len(original) * 0.9


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "[" * 100_000])
def test_a_torn_manifest_is_an_error(checkpoint, text):
    (checkpoint / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is not a manifest"):
        read_manifest(checkpoint)


def test_a_newer_format_is_refused_by_its_number(checkpoint):
    text = manifest_text(read_manifest(checkpoint)).replace('"format": 1', '"format": 2')
    (checkpoint / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="manifest format 2 is not known"):
        read_manifest(checkpoint)


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 9))
def test_each_file_is_checked_by_one_rank_and_no_rank_has_much_more_than_its_share(sizes, ranks):
    files = {f"file_{index}": StoredFile(size, "") for index, size in enumerate(sizes)}
    manifest = Manifest(sequence=1, step=1, run_id=None, attempt=None, parent=None, files=files)
    shares = [share_of_files(manifest, rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(files[name].size + 1 for name in share) for share in shares]
    if sizes:
        assert max(loads) - min(loads) <= max(sizes) + 1
