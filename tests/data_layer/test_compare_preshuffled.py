"""The proof that data with index maps gives the rows of a preshuffled copy, and its refutation."""

import numpy as np
import pytest
import yaml

from megatron.base.errors import ConfigError, DatasetError
from megatron.data.shard_files import cut_dataset
from megatron.stream.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.stream.shard_layout import find_shards
from tests.cli.bad_runs import CONFIG, write_dataset
from tests.cli_ledger.test_shards import numpy_maps, sample_bytes
from tests.ledger.queries.histories import eventful_run
from tools.datasets.compare_preshuffled import main

NUM_ROWS = 80  # 40 steps of 2 samples


@pytest.fixture
def config(tmp_path):
    write_dataset(tmp_path / "text")
    paths = {
        f"{split}_data_paths": [str(tmp_path / "text")] for split in ("train", "valid", "test")
    }
    keys = {**CONFIG, **paths, "train_iters": 40}
    del keys["data_path"]
    path = tmp_path / "my.yml"
    path.write_text(yaml.safe_dump(keys))
    return path


def write_rows(prefix, rows):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for row in rows:
        builder.add_item(np.asarray(row, dtype=np.uint16))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def rows(tmp_path, config):
    """The rows that NeoX v1.0 would have written, by NumPy's own maps."""
    dataset = IndexedDataset(tmp_path / "text")
    content = (tmp_path / "text.bin").read_bytes()
    maps = numpy_maps(dataset.sizes, NUM_ROWS)
    return [
        np.frombuffer(bytes(content[byte] for byte in sample_bytes(dataset, maps, sample)), "<u2")
        for sample in maps[2][:NUM_ROWS]
    ]


def test_equal_rows_are_the_proof_in_whatever_files(tmp_path, config, rows, capsys):
    write_rows(tmp_path / "rows", rows)
    cut_dataset(tmp_path / "rows", tmp_path / "document", 97)  # a row has 18 bytes
    assert main(["1..40", str(tmp_path / "document"), str(config)]) == 0
    assert (
        "steps 1..40: 80 of 80 samples are the rows of their positions" in capsys.readouterr().out
    )


def test_only_the_shards_of_the_steps_are_read(tmp_path, config, rows):
    write_rows(tmp_path / "rows", rows)
    cut_dataset(tmp_path / "rows", tmp_path / "document", 97)
    for path in find_shards(str(tmp_path / "document"))[:4]:
        path.unlink()
    assert main(["20..40", str(tmp_path / "document"), str(config)]) == 0
    with pytest.raises(DatasetError, match=r"document-00002-of-\d+\.bin does not exist"):
        main(["9..40", str(tmp_path / "document"), str(config)])


def test_one_other_token_is_named(tmp_path, config, rows, capsys):
    damaged = rows[21].copy()
    damaged[8] += 1
    write_rows(tmp_path / "rows", [*rows[:21], damaged, *rows[22:]])
    assert main(["1..40", str(tmp_path / "rows"), str(config)]) == 1
    printed = capsys.readouterr().out
    expected = int(rows[21][8])
    assert printed.startswith(
        f"step 11, position 21: row 21 has {expected + 1} at token 8, the run reads {expected}\n"
    )
    assert "79 of 80 samples" in printed


def test_rows_of_another_seed_differ(tmp_path, config, rows, capsys):
    write_rows(tmp_path / "rows", rows[::-1])
    assert main(["1..40", str(tmp_path / "rows"), str(config)]) == 1
    assert "and " in capsys.readouterr().out


def test_copies_may_begin_later(tmp_path, config, rows):
    write_rows(tmp_path / "rows", [*rows[:3], *rows])
    assert main(["1..40", str(tmp_path / "rows"), str(config), "--first-row", "3"]) == 0
    with pytest.raises(DatasetError, match=r"has rows 0\.\.82, not 3\.\.102"):
        main(["1..50", str(tmp_path / "rows"), str(config), "--first-row", "3"])


def test_rows_of_another_length_are_refused(tmp_path, config, rows):
    write_rows(tmp_path / "rows", [*rows[:5], rows[5][:-1], *rows[6:]])
    with pytest.raises(DatasetError, match="row 5 has 8 tokens; samples have 9"):
        main(["1..40", str(tmp_path / "rows"), str(config)])


def test_a_run_can_be_compared_too(tmp_path, capsys):
    eventful_run(tmp_path / "run")
    write_rows(tmp_path / "rows", [[1, 2, 3]])
    with pytest.raises(DatasetError, match=r"has rows 0\.\.0, not"):
        main(["3", str(tmp_path / "rows"), "--run", str(tmp_path / "run/save")])
    with pytest.raises(ConfigError, match="either configuration files or --run"):
        main(["3", str(tmp_path / "rows")])
