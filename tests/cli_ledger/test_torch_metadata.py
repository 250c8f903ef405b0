"""Plain values of torch files, read without torch."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from megatron.base.errors import CheckpointError
from megatron.base.torch_metadata import StoredArray, StoredTensor, read_torch_metadata
from tests.architecture.source_tree import ROOT

CHECKPOINT = ROOT / "tests/data/oracle/ckpt_b" / "global_step10" / "mp_rank_00_model_states.pt"


def write_archive(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/data.pkl", pickled)


def test_what_neox_wrote_is_what_torch_reads():
    mine = read_torch_metadata(CHECKPOINT)
    theirs = torch.load(CHECKPOINT, weights_only=False)  # NeoX's own file, of our recordings
    assert list(mine) == list(theirs)
    for name in ("lr_scheduler", "iteration", "args", "ds_config", "dp_world_size"):
        assert mine[name] == theirs[name]
    assert [list(group.items()) for group in mine["param_shapes"]] == [
        [(name, tuple(shape)) for name, shape in group.items()] for group in theirs["param_shapes"]
    ]
    assert mine["random_rng_state"] == theirs["random_rng_state"]
    assert mine["torch_rng_state"].shape == tuple(theirs["torch_rng_state"].shape)
    assert mine["np_rng_state"][1].dtype == "u4"


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_tensors_and_arrays_are_described(tmp_path, is_zip):
    whole = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    content = {"step": 3, "part": whole[1:3, 2:], "array": np.ones((2, 5), np.float32)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    read = read_torch_metadata(tmp_path / "a.pt")
    assert read["step"] == 3
    assert isinstance(read["part"], StoredTensor)
    assert (read["part"].dtype, read["part"].shape) == ("bfloat16", (2, 4))
    assert (read["part"].offset, read["part"].strides) == (8, (6, 1))
    assert read["array"] == StoredArray("f4", (2, 5))


class _Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_what_a_file_names_is_not_run_but_refused(tmp_path):
    target = tmp_path / "touched"
    write_archive(tmp_path / "evil.pt", pickle.dumps({"a": _Touches(str(target))}, protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pt is refused: it names \w+\.open, which no"):
        read_torch_metadata(tmp_path / "evil.pt")
    assert not target.exists()


@pytest.mark.parametrize("content", [b"not a zip", b""])
def test_a_damaged_file_is_an_error(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"\({len(content)} bytes\) cannot be read"):
        read_torch_metadata(tmp_path / "a.pt")


def test_files_that_hold_something_else_are_errors(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a dictionary"):
        read_torch_metadata(tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(CheckpointError, match=r"it does not hold one data\.pkl"):
        read_torch_metadata(tmp_path / "zip.pt")
    write_archive(tmp_path / "cut.pt", pickle.dumps({"step": 1}, protocol=2)[:-4])
    with pytest.raises(CheckpointError, match="damaged"):
        read_torch_metadata(tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match=r"missing\.pt is missing"):
        read_torch_metadata(tmp_path / "missing.pt")
