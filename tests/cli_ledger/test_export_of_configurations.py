"""``neox-ledger export`` without a run: steps of a configuration, and Pythia's by a name."""

import json

import numpy as np
import pytest
import yaml

from megatron.base.errors import ConfigError
from megatron.cli import pythia_data
from megatron.cli.ledger.main import main
from megatron.cli.pythia_data import config_with_data
from megatron.stream.indexed_dataset import IndexedDatasetBuilder
from tests.cli.bad_runs import CONFIG

SEQ_LENGTH, BATCH, PYTHIA_BATCH = 8, 2, 1024


def write_rows(prefix, rows):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for row in rows:
        builder.add_item(row)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def random_documents(sizes):
    random = np.random.default_rng(0)
    return [random.integers(1, 256, size=size).astype(np.uint16) for size in sizes]


def write_config(folder, prefix, **changes):
    paths = {f"{split}_data_paths": [str(prefix)] for split in ("train", "valid", "test")}
    config = {**CONFIG, "data_path": None, **paths, "train_iters": 40, **changes}
    path = folder / "my.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    return path


def exported(*arguments):
    folder = arguments[-1]
    assert main(["export", *map(str, arguments[:-1]), "--output", str(folder)]) == 0
    return np.load(folder / "tokens.npy"), np.load(folder / "positions.npy")


def test_the_steps_of_a_configuration_are_those_its_run_would_read(tmp_path):
    write_rows(tmp_path / "data", random_documents(range(5, 45)))
    config = write_config(tmp_path, tmp_path / "data")
    tokens, positions = exported("3..4", config, "--world-size", 1, tmp_path / "out")
    assert positions.tolist() == [4, 5, 6, 7]
    doc, sample, shuffle = (
        np.load(next(tmp_path.glob(f"data_train_0_indexmap_*_{kind}_idx.npy")))
        for kind in ("doc", "sample", "shuffle")
    )
    documents = random_documents(range(5, 45))
    flat = np.concatenate([documents[index] for index in doc])
    begins = np.cumsum([0, *(len(documents[index]) for index in doc)])
    for row, position in zip(tokens, positions, strict=True):
        place, offset = sample[shuffle[position]]
        begin = begins[place] + offset
        assert row.tolist() == flat[begin : begin + SEQ_LENGTH + 1].tolist()
    rows = map(json.loads, (tmp_path / "out" / "samples.jsonl").read_text().splitlines())
    assert {row["data_parallel_rank"] for row in rows} == {None}  # the launch decides


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Two steps of a preshuffled set, in the place of the released one."""
    rows = random_documents([2049] * 2 * PYTHIA_BATCH)
    write_rows(tmp_path / "document", rows)
    monkeypatch.setattr(pythia_data, "_PRESHUFFLED_TOKENS", (2049 * len(rows),) * 2)
    return np.array(rows)


@pytest.mark.parametrize("name", ["standard", "deduped"])
def test_rows_of_the_preshuffled_set_are_pythias_steps(name, rows, tmp_path):
    tokens, positions = exported(
        "2", "--pythia", name, "--data", tmp_path / "document", tmp_path / "out"
    )
    assert positions.tolist() == list(range(PYTHIA_BATCH, 2 * PYTHIA_BATCH))
    assert np.array_equal(tokens, rows[PYTHIA_BATCH:])


def test_rows_of_another_seed_are_refused(rows, tmp_path, capsys):
    command = ["export", "2", "--pythia", "seed3", "--data", str(tmp_path / "document")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "rows of seed 3 were not released: name the tokenised set" in capsys.readouterr().err


def test_a_data_set_of_another_size_is_refused(tmp_path, capsys):
    write_rows(tmp_path / "mine", random_documents([5, 6]))
    command = ["export", "2", "--pythia", "deduped", "--data", str(tmp_path / "mine")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert (
        "mine holds 11 tokens in 2 documents; Pythia's deduped set has 205,000,000,000 to "
        "207,500,000,000. For a data set of your own"
    ) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_whose_steps_must_be_clear(tmp_path, capsys):
    config = write_config(tmp_path, tmp_path / "data")
    for more in (["--pythia", "deduped"], ["--run", str(tmp_path)]):
        command = ["export", "2", str(config), "--output", str(tmp_path / "out"), *more]
        assert main(command) == 2
        assert "--run or --pythia, only one of them" in capsys.readouterr().err


def test_a_data_set_elsewhere_is_read_as_its_form_says(tmp_path):
    write_rows(tmp_path / "rows", random_documents([SEQ_LENGTH + 1] * 6))
    write_rows(tmp_path / "text", random_documents([5, 6, 7]))
    config = write_config(tmp_path, tmp_path / "elsewhere", seed=1234)
    assert config_with_data([config], str(tmp_path / "rows")).get("data_order") == "sequential"
    assert config_with_data([config], str(tmp_path / "text")).get("data_order") != "sequential"
    config = write_config(tmp_path, tmp_path / "elsewhere", seed=7)
    with pytest.raises(ConfigError, match="rows of seed 7 were not released"):
        config_with_data([config], str(tmp_path / "rows"))
