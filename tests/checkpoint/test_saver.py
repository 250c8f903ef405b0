"""A save in flight: what it holds, who waits for it, and how it fails."""

import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from megatron.base import atomic_files, write_points
from megatron.base.errors import CheckpointError
from megatron.checkpoint.free_space import require_free_space
from megatron.checkpoint.save_settings import SaveSettings
from megatron.checkpoint.saver import Saver
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.stored import StoredFacts
from megatron.config.topology import Topology
from megatron.ledger.lease import Lease
from megatron.ledger.manifest import digest_problems, read_manifest
from megatron.ledger.run_directory import list_checkpoints, read_latest
from megatron.model.facts import ModelFacts
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import run_ranks

pytestmark = pytest.mark.distributed

ONE = TinySettings(Topology(1, 1, 1))
PP2 = TinySettings(Topology(2, 1, 1), dropout=0.1)


def saver_of(run: TinyRun, save: Path, **options) -> Saver:
    settings = run.settings
    return Saver(
        run.engine,
        SaveSettings(
            directory=save,
            model_arguments=settings.model_arguments,
            facts=StoredFacts(
                ModelFacts(settings.padded_vocab_size, settings.bias_multiplicity),
                settings.topology.tensor_parallel_size,
            ),
            config_files={"tiny.yml": "train_iters: 20\n"},
        ),
        rank=run.groups.rank,
        world_size=run.groups.topology.world_size,
        gather=run.groups.gather,
        **options,
    )


class Gate:
    """Holds a writer thread at a write point until it is opened."""

    def __init__(self, point: str) -> None:
        self._point = point
        self._open = threading.Event()
        self.reached = threading.Event()
        write_points.install(self._hook)

    def open(self) -> None:
        self._open.set()

    def _hook(self, name: str) -> None:
        if name == self._point:
            self.reached.set()
            assert self._open.wait(60)


def poll_until_over(saver: Saver) -> None:
    while not saver.poll():
        saver.wait(0.01)


def hidden(save: Path) -> list[str]:
    return [name for name in os.listdir(save) if name.startswith(".")]


@pytest.mark.parametrize(
    "settings",
    [
        PP2,
        TinySettings(Topology(1, 2, 1), precision="bfloat16", grad_accum_dtype="fp32"),
        TinySettings(Topology(1, 1, 1, uses_pipeline_engine=False), zero_stage=0, dropout=0.1),
    ],
    ids=["PP2", "DP2 bf16", "sequential, ZeRO 0"],
)
def test_training_goes_on_and_the_files_are_those_of_a_save_that_waits(settings, tmp_path):
    def worker(context):
        run = TinyRun(context, settings)
        run.train(1)
        saver_of(run, tmp_path / "waits", is_async=False).save(1)
        gate = Gate("save: file opened")
        saver = saver_of(run, tmp_path / "goes on")
        saver.save(1)
        assert saver.is_in_flight
        run.train(2)
        assert not saver.poll()
        assert list_checkpoints(tmp_path / "goes on") == []
        gate.open()
        assert saver.finish()
        return saver.committed_step

    assert set(run_ranks(worker, settings.topology.world_size, tmp_path)) == {1}
    waited = read_manifest(tmp_path / "waits" / "global_step1")
    went_on = read_manifest(tmp_path / "goes on" / "global_step1")
    assert went_on == waited
    assert digest_problems(tmp_path / "goes on" / "global_step1", went_on, went_on.files) == []
    assert hidden(tmp_path / "goes on") == []


@pytest.mark.parametrize(
    "settings",
    [
        TinySettings(Topology(1, 1, 1), precision="bfloat16"),
        TinySettings(Topology(1, 1, 1), precision="bfloat16", grad_accum_dtype="fp32"),
        TinySettings(Topology(1, 1, 1, uses_pipeline_engine=False)),
        TinySettings(Topology(1, 1, 1), zero_stage=0),
    ],
    ids=["ZeRO 1, bf16", "BF16_Optimizer", "sequential", "ZeRO 0"],
)
def test_the_optimizer_waits_until_its_state_is_copied(settings, tmp_path, monkeypatch):
    copied_after = []
    copy_rest = Snapshot.copy_rest

    def worker(context):
        run = TinyRun(context, settings)
        run.train(1)
        saver_of(run, tmp_path / "waits", is_async=False).save(1)
        begun = time.monotonic()

        def copy_late(snapshot: Snapshot) -> None:
            time.sleep(0.5)
            copied_after.append(len(snapshot.copies_left))
            copy_rest(snapshot)

        monkeypatch.setattr(Snapshot, "copy_rest", copy_late)
        saver = saver_of(run, tmp_path / "goes on")
        saver.save(1)
        assert copied_after == []
        run.train(1)
        assert time.monotonic() - begun > 0.5
        saver.finish()
        return copied_after

    (copies,) = run_ranks(worker, 1, tmp_path)
    assert copies[0] > 5
    assert read_manifest(tmp_path / "goes on" / "global_step1") == read_manifest(
        tmp_path / "waits" / "global_step1"
    )


def test_each_commit_is_told_on_the_main_thread_and_continues_the_one_before(tmp_path):
    def worker(context):
        run = TinyRun(context, PP2)
        told = []
        saver = saver_of(run, tmp_path / "save", parent=None)

        def on_commit(manifest):
            assert threading.current_thread() is threading.main_thread()
            told.append((manifest.step, manifest.sequence, manifest.parent))

        gate = Gate("commit: latest replaced")
        saver.save(0, on_commit=on_commit)
        if context.rank == 0:
            assert gate.reached.wait(60)
        run.train(1)
        saver.poll()
        assert told == []
        gate.open()
        saver.save(1, on_commit=on_commit)  # waits for the one before
        saver.finish()
        return told

    first, second = run_ranks(worker, 2, tmp_path)
    assert first == [(0, 1, None), (1, 2, 1)]
    assert second == []
    assert read_latest(tmp_path / "save") == 1


def test_memory_is_that_of_one_copy_however_often_is_saved(tmp_path):
    def worker(context):
        run = TinyRun(context, ONE)
        run.train(1)  # the optimizer's state comes into being
        saver = saver_of(run, tmp_path / "save")
        sizes = []
        for step in (1, 2, 3):
            run.train(1)
            saver.save(step)
            sizes.append(saver.snapshot_bytes)
        saver.finish()
        return sizes

    (sizes,) = run_ranks(worker, 1, tmp_path)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "save" / "global_step3").glob("*.pt"))
    assert sizes[0] == sizes[1] == sizes[2]
    assert 0.8 * on_disk < sizes[0] <= on_disk


def limit_file_size(num_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_fails_the_save_on_all_at_the_next_step(failing, tmp_path):
    save = tmp_path / "save"

    def worker(context):
        run = TinyRun(context, PP2)
        saver = saver_of(run, save)
        saver.save(0)
        saver.finish()
        if context.rank == failing:
            limit_file_size(65536)
        saver.save(1)
        with pytest.raises(CheckpointError, match=rf"^rank {failing}: .*File too large"):
            poll_until_over(saver)
        run.groups.barrier()
        seen = list_checkpoints(save), read_latest(save), hidden(save), saver.committed_step
        if context.rank == failing:
            limit_file_size(resource.RLIM_INFINITY)
        run.groups.barrier()
        saver.save(1)
        assert saver.finish()
        return seen, (list_checkpoints(save), read_latest(save), hidden(save))

    for seen, after in run_ranks(worker, 2, tmp_path):
        assert seen == ([0], 0, [], 0)
        assert after == ([0, 1], 1, [])
    assert read_manifest(save / "global_step1").parent == 1


def test_too_little_room_is_found_before_a_byte_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"step 7 needs 1000000000000.0 MB, but .* MB free"):
        require_free_space(tmp_path, 10**18, what="the checkpoint of step 7")
    require_free_space(tmp_path, 1, what="a byte")


def test_a_save_that_takes_too_long_is_given_up_on_all_ranks(tmp_path):
    save = tmp_path / "save"

    def worker(context):
        run = TinyRun(context, PP2)
        saver = saver_of(run, save)
        saver.save(0)
        assert saver.finish()
        gate = Gate("save: file synced")
        saver.save(1)
        cancelled = saver._flight.cancelled
        threading.Thread(target=lambda: cancelled.wait(60) and gate.open()).start()
        assert not saver.finish(timeout_s=0.3 if context.rank == 1 else None)
        run.groups.barrier()
        seen = list_checkpoints(save), hidden(save)
        run.groups.barrier()
        saver.save(2)
        assert saver.finish()
        return seen

    assert run_ranks(worker, 2, tmp_path) == [([0], [])] * 2
    assert list_checkpoints(save) == [0, 2]
    assert read_manifest(save / "global_step2").parent == 1


def test_who_has_lost_the_directory_commits_nothing(tmp_path):
    save = tmp_path / "save"

    def worker(context):
        run = TinyRun(context, ONE)
        lease = Lease.acquire(save)
        saver = saver_of(run, save, lease=lease)
        saver.save(0)
        assert saver.finish()
        gate = Gate("commit: manifest written")
        saver.save(1)
        assert gate.reached.wait(60)
        (save / "lock.json").write_text("another job's")
        gate.open()
        with pytest.raises(CheckpointError, match="is no longer this job's"):
            saver.finish()
        return saver.may_write()

    assert run_ranks(worker, 1, tmp_path) == [False]
    assert list_checkpoints(save) == [0]


def test_without_an_answer_from_its_peers_a_rank_waits_only_so_long(tmp_path):
    """Rank 1 dies while it writes: rank 0 can't know, and must not wait for ever."""
    save = tmp_path / "save"

    def worker(context):
        run = TinyRun(context, PP2)
        saver = saver_of(run, save)
        gate = Gate("save: file opened" if context.rank == 1 else "nowhere")
        saver.save(0)
        if context.rank == 1:
            assert gate.reached.wait(60)
            gate.open()
            write_points.install(lambda name: time.sleep(60))  # as good as dead
            time.sleep(2)
            return None
        deadline = time.monotonic() + 1
        saver.settle(lambda: deadline - time.monotonic())
        return list_checkpoints(save), saver.is_in_flight

    assert run_ranks(worker, 2, tmp_path)[0] == ([], False)


def test_with_all_files_there_a_rank_needs_no_answer_to_complete_the_save(tmp_path):
    save = tmp_path / "save"

    def worker(context):
        run = TinyRun(context, PP2)
        saver = saver_of(run, save)
        told = []
        saver.save(0, on_commit=lambda manifest: told.append(manifest.step))
        saver.settle(lambda: 60)
        return told, list_checkpoints(save)

    assert run_ranks(worker, 2, tmp_path) == [([0], [0]), ([], [0])]
    assert read_latest(save) == 0


def test_an_entry_may_be_found_before_its_writer_has_synced_it(tmp_path, monkeypatch):
    save = tmp_path / "save"
    sync = atomic_files.fsync_directory

    def sync_late(directory: Path) -> None:
        if directory.name == ".entries" and os.environ["RANK"] == "1":
            while directory.exists():  # until rank 0 has made a checkpoint of it
                time.sleep(0.01)
        sync(directory)

    monkeypatch.setattr(atomic_files, "fsync_directory", sync_late)

    def worker(context):
        saver = saver_of(TinyRun(context, PP2), save)
        saver.save(0)
        return saver.finish()

    assert run_ranks(worker, 2, tmp_path) == [True, True]


def test_state_that_cannot_be_copied_is_written_before_training_goes_on(tmp_path):
    def worker(context):
        run = TinyRun(context, ONE)
        saver = saver_of(run, tmp_path / "save")
        odd = torch.eye(3).to_sparse()
        gate = Gate("save: entry left")
        saver.save(0, client_state={"odd": odd})
        # Had it not waited, files would still be missing.
        written = sorted(path.name for path in (tmp_path / "save").glob(".tmp-*/*.pt"))
        gate.open()
        saver.finish()
        return written

    (written,) = run_ranks(worker, 1, tmp_path)
    assert written == sorted(
        path.name for path in (tmp_path / "save" / "global_step0").glob("*.pt")
    )
