"""Exported files hold what the steps read."""

import json

import numpy as np
import pyarrow.parquet
import pytest

from megatron.base.errors import RunDirectoryError
from megatron.ledger.digests import batch_digest, digest_text
from megatron.ledger.queries.export import NpyWriter, ParquetWriter, batches, export
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import open_run
from megatron.ledger.queries.samples import step_frame
from tests.ledger.queries.histories import eventful_run


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    return open_run(eventful_run(tmp_path_factory.mktemp("eventful")).save)


def exported(view, writer, steps, **options):
    stream = options.pop("stream", "train")
    frames = [step_frame(view, step, stream) for step in steps]
    found = batches(frames, RunData(view.ledger.datasets).stream, **options)
    return export(found, writer, num_steps=len(steps))


def test_arrays_have_the_digests_that_were_recorded(view, tmp_path):
    assert exported(view, NpyWriter(tmp_path / "out"), range(14, 18)) == 2 * 8 + 2 * 4
    arrays = {path.stem: np.load(path) for path in (tmp_path / "out").glob("*.npy")}
    assert arrays["tokens"].dtype == np.uint16
    for step in range(14, 18):
        rows = arrays["steps"] == step
        digest = batch_digest(arrays["tokens"][rows], arrays["positions"][rows])
        assert digest_text(digest) == view.lineage.step(step).digest


def test_documents_say_where_each_token_is_from(view, tmp_path):
    exported(view, NpyWriter(tmp_path / "out"), range(3, 5))
    tokens = np.load(tmp_path / "out/tokens.npy")
    dataset = RunData(view.ledger.datasets).dataset(next(iter(view.ledger.datasets)))
    again = [[] for _ in tokens]
    for sample, document, start, stop in np.load(tmp_path / "out/documents.npy").tolist():
        again[sample].extend(dataset[document][start:stop].tolist())
    assert again == tokens.tolist()
    lines = [json.loads(text) for text in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [line["position"] for line in lines] == list(range(16, 32))
    assert {line["data_parallel_rank"] for line in lines} == {0, 1}


def test_parquet_holds_the_same(view, tmp_path):
    exported(view, NpyWriter(tmp_path / "out"), range(3, 5))
    exported(view, ParquetWriter(tmp_path / "out.parquet"), range(3, 5))
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["tokens"] for row in table] == np.load(tmp_path / "out/tokens.npy").tolist()
    lines = [json.loads(text) for text in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    for row, line in zip(table, lines, strict=True):
        assert {name: row[name] for name in line} == line


def test_text_is_added_by_a_tokenizer(view, tmp_path):
    def spell(ids):
        return " ".join(map(str, ids))

    exported(view, NpyWriter(tmp_path / "out"), range(1, 2), detokenize=spell)
    lines = [json.loads(text) for text in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    tokens = np.load(tmp_path / "out/tokens.npy").tolist()
    assert [line["text"] for line in lines] == [spell(ids) for ids in tokens]


def test_samples_of_two_lengths_are_not_mixed(tmp_path):
    run = eventful_run(tmp_path)
    run.settings["seq_length"] = 8
    run.launch(26, saves=[26], accept=["seq_length"])
    view = open_run(run.save)
    with pytest.raises(RunDirectoryError, match="step 25 has samples of 8 tokens, those before it"):
        exported(view, NpyWriter(tmp_path / "out"), range(24, 27))
