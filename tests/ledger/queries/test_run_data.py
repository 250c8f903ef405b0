"""Datasets are found by content, wherever they and their labels lie now."""

import pytest

from megatron.base.errors import DatasetError
from megatron.ledger.ledger_file import DatasetNote
from megatron.ledger.queries.run_data import RunData
from megatron.stream.identity import identify
from megatron.stream.stream_settings import DatasetFiles
from tests.ledger.queries.simulated_run import write_corpus


def move(tmp_path, name):
    """Rename a dataset; return its new prefix."""
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    for suffix in ("bin", "idx"):
        path = tmp_path / f"{name}.{suffix}"
        path.rename(tmp_path / "elsewhere" / f"other-{name}.{suffix}")
    return str(tmp_path / "elsewhere" / f"other-{name}")


@pytest.fixture
def notes(tmp_path):
    prefix = write_corpus(tmp_path / "text")
    label = write_corpus(tmp_path / "label", seed=1)
    identity = identify(prefix, [("label", label)])
    note = DatasetNote(
        path=prefix,
        level=identity.level,
        num_documents=identity.num_documents,
        num_tokens=identity.num_tokens,
        companions={"label": label},
    )
    return {identity.digest: note}


@pytest.mark.parametrize("moved", [["text"], ["label"], ["text", "label"], ["label", "text"]])
def test_moved_files_are_found_in_any_order(moved, notes, tmp_path):
    places = {name: str(tmp_path / name) for name in ("text", "label")}
    places |= {name: move(tmp_path, name) for name in moved}
    data = RunData(notes, [places[name] for name in moved])
    (identity,) = notes
    assert data.files(identity) == DatasetFiles(places["text"], places["label"])


def test_missing_labels_are_named(notes, tmp_path):
    move(tmp_path, "label")
    (identity,) = notes
    with pytest.raises(DatasetError, match=rf"label dataset {tmp_path}/label is not there; if it"):
        RunData(notes).files(identity)
