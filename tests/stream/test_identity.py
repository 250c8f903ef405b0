"""A dataset is its content: not its name, its place, or how its bytes are cut into files."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.stream import identity as identity_module
from megatron.stream.identity import identify
from tests.stream.recorded import write_dataset

DOCUMENTS = [[1, 2, 3, 0], [], [4, 5, 0], [6, 0], [7, 8, 9, 10, 11, 0]]


def changed(tmp_path, documents=DOCUMENTS, dtype=np.uint16):
    folder = tmp_path / f"changed{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return identify(write_dataset(folder / "d", documents, dtype))


def cut(prefix, borders):
    """Replace the token file by shards that end at ``borders``."""
    content = Path(f"{prefix}.bin").read_bytes()
    os.unlink(f"{prefix}.bin")
    ends = [*sorted(borders), len(content)]
    start = 0
    for index, end in enumerate(ends):
        with open(f"{prefix}-{index:05d}-of-{len(ends) - 1:05d}.bin", "wb") as file:
            file.write(content[start:end])
        start = end


def test_numbers_and_level_are_told(tmp_path):
    identity = identify(write_dataset(tmp_path / "d", DOCUMENTS))
    assert (identity.num_documents, identity.num_tokens) == (5, 15)
    assert identity.level == "complete"
    assert identity.complete_digest == identity.digest
    assert len(identity.digest) == 32


def test_the_digest_is_the_documented_one(tmp_path):
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)
    tokens = Path(f"{prefix}.bin").read_bytes()
    sizes = np.array([4, 0, 3, 2, 6], dtype="<i4").tobytes()
    lines = [
        "neox-ledger dataset 1",
        "uint16",
        "5",
        "30",
        hashlib.sha256(sizes).hexdigest(),
        "complete",
        hashlib.sha256(hashlib.sha256(tokens).digest()).hexdigest(),
    ]
    expected = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
    assert identify(prefix).digest == expected


def test_names_and_places_are_no_part_of_it(tmp_path):
    first = identify(write_dataset(tmp_path / "d", DOCUMENTS))
    assert changed(tmp_path) == first


@settings(max_examples=25)
@given(borders=st.lists(st.integers(0, 30), max_size=4))
def test_cuts_are_no_part_of_it(tmp_path_factory, borders):
    folder = tmp_path_factory.mktemp("cut")
    prefix = write_dataset(folder / "d", DOCUMENTS)
    expected = identify(prefix)
    cut(prefix, borders)
    assert identify(prefix) == expected


def test_one_token_one_size_or_the_type_changes_it(tmp_path):
    found = {
        changed(tmp_path).digest,
        changed(tmp_path, [[1, 2, 3, 0], [], [4, 5, 0], [6, 1], [7, 8, 9, 10, 11, 0]]).digest,
        changed(tmp_path, [[1, 2, 3], [0], [4, 5, 0], [6, 0], [7, 8, 9, 10, 11, 0]]).digest,
        changed(tmp_path, DOCUMENTS, np.int32).digest,
        changed(tmp_path, DOCUMENTS[::-1]).digest,
        changed(tmp_path, [*DOCUMENTS, []]).digest,
    }
    assert len(found) == 6


def test_the_document_index_changes_nothing(tmp_path):
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)
    expected = identify(prefix)
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[-8:] = bytes(8)
    Path(f"{prefix}.idx").write_bytes(content)
    assert identify(prefix) == expected


def test_companions_count_by_role_and_content(tmp_path):
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)
    one = write_dataset(tmp_path / "one", [[-100] * len(d) for d in DOCUMENTS], np.int32)
    two = write_dataset(tmp_path / "two", [[1] * len(d) for d in DOCUMENTS], np.int32)
    found = [
        identify(prefix),
        identify(prefix, [("label", one)]),
        identify(prefix, [("label", two)]),
        identify(prefix, [("ref", one)]),
        identify(prefix, [("label", one), ("ref", two)]),
    ]
    assert len({identity.digest for identity in found}) == len(found)
    assert {identity.num_tokens for identity in found} == {15}
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{one}{suffix}", tmp_path / f"moved{suffix}")
    assert identify(prefix, [("label", str(tmp_path / "moved"))]) == found[1]


@pytest.fixture
def _small_limits(monkeypatch):
    monkeypatch.setattr(identity_module, "_WHOLE_BYTES", 100_000)
    monkeypatch.setattr(identity_module, "_SAMPLED_BLOCKS", 9)
    monkeypatch.setattr(identity_module, "_SAMPLED_BLOCK_BYTES", 500)


def large(tmp_path, change_at=None):
    tokens = (np.arange(60_000) % 50_000).astype(np.uint16)
    if change_at is not None:
        tokens[change_at] ^= 1
    folder = tmp_path / f"large{change_at}"
    folder.mkdir()
    return write_dataset(folder / "d", [tokens[:20_000], tokens[20_000:]])


@pytest.mark.usefixtures("_small_limits")
def test_large_datasets_are_sampled_from_first_to_last_byte(tmp_path):
    whole = identify(large(tmp_path))
    assert (whole.level, whole.complete_digest) == ("sampled", None)
    for seen in (0, 249, 59_999, 30_000):
        assert identify(large(tmp_path, seen)).digest != whole.digest
    assert identify(large(tmp_path, 400)).digest == whole.digest


@pytest.mark.usefixtures("_small_limits")
def test_looking_at_every_byte_keeps_the_name_and_finds_every_change(tmp_path):
    prefix, other = large(tmp_path), large(tmp_path, 400)
    sampled = identify(prefix)
    full = identify(prefix, full=True)
    assert (full.digest, full.level) == (sampled.digest, "complete")
    assert full.complete_digest not in (None, full.digest)
    assert identify(other, full=True).complete_digest != full.complete_digest
    assert identify(prefix) == full  # what is known stays known


@pytest.mark.usefixtures("_small_limits")
def test_sampling_does_not_see_cuts(tmp_path):
    prefix = large(tmp_path)
    expected = identify(prefix, full=True)
    cut(prefix, [7, 501, 33_333, 99_999])
    assert identify(prefix, full=True) == expected


def test_bytes_are_hashed_once(tmp_path):
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)
    hashed = []
    for _ in range(3):
        identify(prefix, on_bytes=hashed.append)
    assert hashed == [30]


def test_a_file_that_was_replaced_is_hashed_again(tmp_path):
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)
    before = identify(prefix)
    write_dataset(tmp_path / "d", DOCUMENTS[::-1])
    assert identify(prefix) != before


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"version": 1}', b'{"version": 0, "files": 1}'])
def test_a_damaged_cache_is_not_used(tmp_path, damage):
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)
    expected = identify(prefix)
    (tmp_path / "d_identity.json").write_bytes(damage)
    assert identify(prefix) == expected
    assert json.loads((tmp_path / "d_identity.json").read_bytes())["digest"] == expected.digest


def test_a_folder_that_cannot_be_written_is_no_problem(tmp_path, monkeypatch):
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)
    expected = identify(prefix)
    (tmp_path / "d_identity.json").unlink()

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(identity_module, "write_atomically", refuse)
    assert identify(prefix) == expected
    assert not (tmp_path / "d_identity.json").exists()


def test_files_that_change_meanwhile_are_an_error(tmp_path):
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)

    def touch(_):
        os.utime(f"{prefix}.bin", ns=(1, 1))

    with pytest.raises(DatasetError, match="its files changed while they were read"):
        identify(prefix, on_bytes=touch)


def test_a_missing_companion_is_named(tmp_path):
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)
    with pytest.raises(DatasetError, match=r"nowhere\.idx and .*nowhere\.bin do not exist"):
        identify(prefix, [("label", str(tmp_path / "nowhere"))])
