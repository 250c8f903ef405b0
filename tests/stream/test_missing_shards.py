"""Shards that nobody reads need not be there; one that is needed is named."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.stream import identity as identity_module
from megatron.stream.identity import identify
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.shard_layout import assumed_shards, find_shards
from megatron.stream.stream_settings import StreamSettings, identify_datasets
from tests.stream.recorded import GOLDEN, write_dataset
from tests.stream.test_token_bytes import cut

SIZE = 36  # bytes of GOLDEN


def sharded(folder, shard_bytes, documents=GOLDEN["docs"]):
    """Write a dataset in shards of one size."""
    prefix = write_dataset(folder / "t", documents)
    size = os.path.getsize(prefix + ".bin")
    cut(prefix, range(shard_bytes, size, shard_bytes))
    return prefix


@settings(max_examples=60)
@given(shard_bytes=st.integers(1, 40), data=st.data())
def test_what_is_there_reads_the_same_and_what_is_not_is_named(tmp_path_factory, shard_bytes, data):
    folder = tmp_path_factory.mktemp("gaps")
    prefix = sharded(folder, shard_bytes)
    whole = IndexedDataset(prefix)
    expected = [whole.get(index).tolist() for index in range(len(whole))]
    places = [(shard.path.name, shard.start, shard.stop) for shard in whole.tokens.shards]
    paths = find_shards(prefix)
    missing = data.draw(st.sets(st.sampled_from(paths), max_size=len(paths) - 1))
    for path in missing:
        os.unlink(path)
    dataset = IndexedDataset(prefix)
    assert [(one.path.name, one.start, one.stop) for one in dataset.tokens.shards] == places
    assert {shard.path for shard in dataset.tokens.missing} == missing
    for index in range(len(dataset)):
        start = int(dataset.pointers[index])
        stop = start + 2 * int(dataset.sizes[index])
        needed = [
            shard for shard in dataset.tokens.shards if shard.start < stop > start < shard.stop
        ]
        absent = [shard.path for shard in needed if shard.path in missing]
        if absent:
            with pytest.raises(
                DatasetError, match=f"{absent[0].name} does not exist .*{len(missing)} of"
            ):
                dataset.get(index)
        else:
            assert dataset.get(index).tolist() == expected[index]


def test_a_shard_that_comes_later_is_read(tmp_path):
    prefix = sharded(tmp_path, 10)
    path = find_shards(prefix)[1]
    content = path.read_bytes()
    path.unlink()
    dataset = IndexedDataset(prefix)
    with pytest.raises(DatasetError, match=r"t-00001-of-00003\.bin does not exist \(1 of 4"):
        dataset.tokens.read(12, 14)
    path.write_bytes(content[:5])
    with pytest.raises(
        DatasetError, match=r"has 5 bytes now; it holds bytes 10\.\.20 .* copy it again"
    ):
        dataset.tokens.read(12, 14)
    path.write_bytes(content)
    assert dataset.tokens.read(12, 14).tobytes() == content[2:4]


def test_reading_all_wants_all(tmp_path):
    prefix = sharded(tmp_path, 10)
    os.unlink(find_shards(prefix)[2])
    with pytest.raises(DatasetError, match=r"t-00002-of-00003\.bin does not exist"):
        IndexedDataset(prefix).tokens.require_all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({0: 9, 1: None}, r"00000-of-00003\.bin has 9 bytes and t-00002-of-00003\.bin has 10"),
        ({1: None, 3: 5}, r"leave 6 for t-00003-of-00003\.bin, which has 5"),
        (
            {0: 4, 1: None, 2: None, 3: None},
            r"3 shards of 4 bytes .* of 36 in all leave 24 for the",
        ),
        ({0: 13, 1: None, 2: None, 3: None}, r"leave -3 for the last one"),
        ({0: None, 1: None, 2: None, 3: 5}, r"leaves 31 of 36 for the 3 shards before it"),
        ({0: None, 1: None, 2: None, 3: 39}, r"leaves -3 of 36"),
    ],
)
def test_offsets_that_cannot_be_told_are_refused(tmp_path, damage, message):
    prefix = sharded(tmp_path, 10)
    for index, size in damage.items():
        path = find_shards(prefix)[index]
        if size is None:
            path.unlink()
        else:
            os.truncate(path, size)
    with pytest.raises(DatasetError, match=message):
        IndexedDataset(prefix)


def test_a_number_beyond_the_last_is_refused(tmp_path):
    prefix = sharded(tmp_path, 10)
    Path(f"{prefix}-00004-of-00003.bin").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"00004-of-00003\.bin: its number is beyond the last"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("size", "shard_bytes", "count", "last"),
    [
        (664_230_651_068, 5_000_000_000, 133, 4_230_651_068),  # Pythia's standard data
        (600_078_336_000, 30_000_000_000, 21, 78_336_000),  # preshuffled
        (10, 5, 3, 0),
    ],
)
def test_files_are_assumed_as_pythia_cut_them(size, shard_bytes, count, last):
    shards = assumed_shards("p", size, shard_bytes)
    assert len(shards) == count
    assert shards[-1].path.name == f"p-{count - 1:05d}-of-{count - 1:05d}.bin"
    assert (shards[-1].stop - shards[-1].start, shards[-1].stop) == (last, size)


@pytest.fixture
def _small_blocks(monkeypatch):
    """Of 100 bytes; more than 10,000 bytes are sampled, in 50 blocks of 20."""
    monkeypatch.setattr(identity_module, "_WHOLE_BYTES", 10_000)
    monkeypatch.setattr(identity_module, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(identity_module, "_SAMPLED_BLOCKS", 50)
    monkeypatch.setattr(identity_module, "_SAMPLED_BLOCK_BYTES", 20)


def corpus(folder, num_tokens, *, seed=0, shard_bytes=777, keep=None):
    """Write documents of sizes that don't depend on the seed; keep some shards only."""
    folder.mkdir()
    tokens = np.random.default_rng(seed).integers(0, 50_000, num_tokens).astype(np.uint16)
    prefix = sharded(folder, shard_bytes, np.array_split(tokens, 40))
    for index, path in enumerate(find_shards(prefix)):
        if keep is not None and index not in keep:
            path.unlink()
    return prefix


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("num_tokens", [4_000, 20_000])
class TestIdentity:
    def test_a_run_knows_its_data_while_shards_are_missing(self, tmp_path, num_tokens):
        whole = identify(corpus(tmp_path / "a", num_tokens))
        part = identify(corpus(tmp_path / "b", num_tokens, keep={2, 3}))
        assert (part.level, part.complete_digest) == ("index", None)
        assert part.digest == part.index_digest == whole.index_digest != whole.digest
        named = part.named_by({whole.digest: _Record(whole)})
        assert named.digest == whole.digest
        assert named.pieces == whole.pieces  # what is known is not forgotten
        assert whole.named_by({whole.digest: _Record(named)}) == whole

    def test_a_run_that_began_with_some_shards_keeps_its_name(self, tmp_path, num_tokens):
        first = identify(corpus(tmp_path / "a", num_tokens, keep={2}))
        record = {first.digest: _Record(first)}
        other = identify(corpus(tmp_path / "b", num_tokens, keep={5, 6})).named_by(record)
        assert other.digest == first.digest
        record = {first.digest: _Record(other)}
        whole = identify(corpus(tmp_path / "c", num_tokens)).named_by(record)
        assert (whole.digest, whole.level == "index") == (first.digest, False)

    def test_other_bytes_of_the_same_sizes_are_told_apart(self, tmp_path, num_tokens):
        mine = identify(corpus(tmp_path / "a", num_tokens))
        part = identify(corpus(tmp_path / "b", num_tokens, keep={2}))
        theirs = identify(corpus(tmp_path / "c", num_tokens, seed=1, keep={2, 7}))
        assert theirs.digest == mine.index_digest
        for record in (mine, part):
            assert theirs.named_by({record.digest: _Record(record)}).digest != record.digest
        all_of_theirs = identify(corpus(tmp_path / "d", num_tokens, seed=1))
        for record in (mine, part):
            assert all_of_theirs.named_by({record.digest: _Record(record)}) == all_of_theirs
        several = {one.digest: _Record(one) for one in (mine, all_of_theirs)}
        assert theirs.named_by(several).digest == all_of_theirs.digest
        nothing = identify(corpus(tmp_path / "e", num_tokens, shard_bytes=77, keep={1}))
        assert set(nothing.pieces) == {"-"}
        with pytest.raises(DatasetError, match="several datasets whose documents have the sizes"):
            nothing.named_by(several)

    def test_labels_count_too(self, tmp_path, num_tokens):
        tokens = corpus(tmp_path / "a", num_tokens)
        label = corpus(tmp_path / "l", num_tokens, seed=3)
        part = corpus(tmp_path / "m", num_tokens, seed=3, keep={1, 2})
        whole = identify(tokens, [("label", label)])
        missing = identify(tokens, [("label", part)])
        assert missing.level == "index"
        assert missing.named_by({whole.digest: _Record(whole)}).digest == whole.digest
        other = corpus(tmp_path / "o", num_tokens, seed=4, keep={1, 2})
        unlike = identify(tokens, [("label", other)])
        assert unlike.named_by({whole.digest: _Record(whole)}).digest != whole.digest

    def test_two_partial_datasets_of_one_index_are_refused(self, tmp_path, num_tokens):
        paths = (
            corpus(tmp_path / "a", num_tokens, keep={2}),
            corpus(tmp_path / "b", num_tokens, seed=1, keep={2}),
        )
        settings = StreamSettings(seq_length=8, seed=1, train_data_paths=paths)
        with pytest.raises(DatasetError, match="equal document sizes, and with shards missing"):
            identify_datasets(settings)

    def test_what_was_hashed_is_kept_until_a_shard_comes(self, tmp_path, num_tokens):
        prefix = corpus(tmp_path / "a", num_tokens, keep={2, 3})
        read = []
        first = identify(prefix, on_bytes=read.append)
        once = len(read)
        assert once > 0
        assert identify(prefix, on_bytes=read.append) == first
        assert len(read) == once
        source = corpus(tmp_path / "b", num_tokens)
        for path in find_shards(source):
            Path(prefix).with_name(path.name).write_bytes(path.read_bytes())
        assert identify(prefix) == identify(source)


class _Record:
    """What a ledger keeps."""

    def __init__(self, identity):
        self.index = identity.index_digest
        self.pieces = identity.pieces


def test_the_index_alone_has_a_name(tmp_path):
    prefix = write_dataset(tmp_path / "t", GOLDEN["docs"])
    whole = identify(prefix)
    os.unlink(f"{prefix}.bin")
    alone = identify(prefix)
    assert (alone.digest, alone.level) == (whole.index_digest, "index")
    assert alone.num_tokens == SIZE // 2
