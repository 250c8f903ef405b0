"""What a user is told when a checkpoint doesn't fit."""

import os
import types

import pytest

from megatron.base.errors import CheckpointError
from megatron.checkpoint.free_space import require_free_space


def test_room_that_is_left_to_the_record_is_told(tmp_path, monkeypatch):
    system = types.SimpleNamespace(f_blocks=9, f_bfree=3, f_bavail=3, f_frsize=1_000_000)
    monkeypatch.setattr(os, "statvfs", lambda directory: system)
    told = r"it needs 2\.5 MB, but .* has only 3\.0 MB free, and 1\.0 MB of that are left to the"
    with pytest.raises(CheckpointError, match=told):
        require_free_space(tmp_path, 2_500_000, what="it")
    require_free_space(tmp_path, 1_900_000, what="it")
