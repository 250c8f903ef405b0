"""Plain values of torch files, read without torch."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from megatron.base.errors import CheckpointError
from megatron.base.torch_metadata import Placeholder, read_torch_metadata
from tests.architecture.source_tree import ROOT

CHECKPOINT = ROOT / "tests/data/oracle/ckpt_b" / "global_step10" / "mp_rank_00_model_states.pt"


def test_what_neox_wrote_is_what_torch_reads():
    mine = read_torch_metadata(CHECKPOINT)
    theirs = torch.load(CHECKPOINT, weights_only=False)  # NeoX's own file, of our recordings
    assert list(mine) == list(theirs)
    for name in ("lr_scheduler", "iteration", "args", "ds_config", "dp_world_size"):
        assert mine[name] == theirs[name]
    assert isinstance(mine["torch_rng_state"], Placeholder)


def test_tensors_and_arrays_are_placeholders(tmp_path):
    torch.save({"step": 3, "weight": torch.ones(2), "array": np.ones(2)}, tmp_path / "a.pt")
    content = read_torch_metadata(tmp_path / "a.pt")
    assert content["step"] == 3
    assert isinstance(content["weight"], Placeholder)
    assert isinstance(content["array"], Placeholder)


class _Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_that_a_file_names_is_run(tmp_path):
    target = tmp_path / "touched"
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"a": _Touches(str(target)), "step": 1}))
    assert read_torch_metadata(tmp_path / "evil.pt")["step"] == 1
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a zip", "is damaged, or was written by a torch older than 1.6"),
        (b"", "is damaged, or was written by a torch older than 1.6"),
    ],
)
def test_a_damaged_file_is_an_error(content, message, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_torch_metadata(tmp_path / "a.pt")


def test_files_that_hold_something_else_are_errors(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a dictionary"):
        read_torch_metadata(tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(CheckpointError, match=r"is no torch file: it holds no data\.pkl"):
        read_torch_metadata(tmp_path / "zip.pt")
    with zipfile.ZipFile(tmp_path / "cut.pt", "w") as archive:
        archive.writestr("cut/data.pkl", pickle.dumps({"step": 1})[:-4])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_torch_metadata(tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_torch_metadata(tmp_path / "missing.pt")
