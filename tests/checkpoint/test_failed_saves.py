"""A save that fails on one rank fails on all, and `latest` keeps naming a complete checkpoint."""

import os
import resource
import signal

import pytest

from megatron.base.errors import CheckpointError
from megatron.config.topology import Topology
from megatron.ledger.run_directory import list_checkpoints, read_latest
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import run_ranks

SETTINGS = TinySettings(Topology(2, 1, 1))


@pytest.mark.distributed
def test_a_rank_that_cannot_write_stops_all_and_leaves_nothing_visible(tmp_path):
    save = tmp_path / "save"

    def worker(context):
        run = TinyRun(context, SETTINGS)
        run.save(save)
        run.train(1)
        if context.rank == 1:
            # A real failure at the operating system: rank 1 may not write files beyond 64 KiB.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match=r"^rank 1: .*could not be written"):
            run.save(save)
        run.groups.barrier()
        seen = list_checkpoints(save), read_latest(save)
        hidden = [name for name in os.listdir(save) if name.startswith(".")]
        if context.rank == 1:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
        run.groups.barrier()
        run.save(save)  # the failure went away: the next one works
        return seen, hidden, list_checkpoints(save), read_latest(save)

    for seen, hidden, after, latest in run_ranks(worker, 2, tmp_path):
        assert seen == ([0], 0)
        assert hidden == []
        assert (after, latest) == ([0, 1], 1)


@pytest.mark.distributed
def test_a_save_directory_that_cannot_be_made_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")

    def worker(context):
        with pytest.raises(CheckpointError, match=r"^rank 0: .*Not a directory.*file"):
            TinyRun(context, SETTINGS).save(tmp_path / "file" / "save")

    run_ranks(worker, 2, tmp_path)


@pytest.mark.distributed
def test_old_checkpoints_go_and_saving_a_step_again_replaces_it(tmp_path):
    save = tmp_path / "save"

    def worker(context):
        run = TinyRun(context, TinySettings(Topology(1, 1, 1)))
        for _ in range(3):
            run.train(1)
            run.save(save, keep_last_n=2)
        first = os.stat(save / "global_step3").st_ino
        run.save(save, keep_last_n=2)
        return first

    (first,) = run_ranks(worker, 1, tmp_path)
    assert list_checkpoints(save) == [2, 3]
    assert os.stat(save / "global_step3").st_ino != first
    assert not [path for path in save.iterdir() if path.name.startswith(".")]
