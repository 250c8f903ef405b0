"""Files that are replaced as a whole."""

import os

import pytest

from megatron.base.atomic_files import write_atomically


def test_a_full_disk_names_the_file_that_stays_as_it_was(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    path = tmp_path / "latest"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*/latest'"):
        write_atomically(path, "new")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("latest", "old")]
