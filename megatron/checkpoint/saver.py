"""Saving while training goes on.

    main thread            writer thread of each rank         writer thread of rank 0
    ───────────            ──────────────────────────         ───────────────────────
    snapshot        ──>    copy weights and moments
    forward, backward
    optimizer       <──    all is copied
    next steps             write, hash, sync its files
                           leave an entry beside them   ──>   all entries there: commit
    poll at every                                             retention, copy to s3_path
    step boundary   <──    done, or a problem           <──   done, or a problem

The ranks meet through files, so the threads need no collective. One save is in flight at most: the
memory of its snapshot is that of the next one.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.base.errors import CheckpointError, MegatronError, RunDirectoryError
from megatron.base.write_points import reach
from megatron.checkpoint.agreement import Gather, all_or_none, require_agreement
from megatron.checkpoint.free_space import require_free_space
from megatron.checkpoint.hashed_file import write_torch_file
from megatron.checkpoint.recovery_scripts import place_recovery_scripts
from megatron.checkpoint.remote_copy import copy_checkpoint
from megatron.checkpoint.rng import capture_rng_states
from megatron.checkpoint.save_settings import SaveSettings, own_texts
from megatron.checkpoint.snapshot import Snapshot, SnapshotBuffers, take_snapshot
from megatron.ledger import commit as committing
from megatron.ledger.lease import Lease
from megatron.ledger.ledger_file import Ledger
from megatron.ledger.manifest import Manifest, StoredFile
from megatron.ledger.retention import delete_expired
from megatron.ledger.run_directory import checkpoint_path, temporary_path

__all__ = ["OnCommit", "Saver"]

logger = logging.getLogger(__name__)

OnCommit = Callable[[Manifest], None]

_LOOKS_EVERY_S = 0.02


class Saver:
    """Writes the checkpoints of one engine.

    Args:
        engine: DeepSpeed's.
        settings: of the run.
        rank: global rank of this process.
        world_size: number of ranks.
        gather: collects a value of every rank, outside of the training's process groups.
        lease: on rank 0, that on the save directory; None: nobody else can write there.
        attempt: on rank 0, the number of this launch, if it is recorded.
        parent: on rank 0, the commit sequence of the checkpoint that was loaded from the same
            directory, if one was.
        is_async: False: :meth:`save` returns when the checkpoint is committed.
    """

    def __init__(
        self,
        engine: Any,
        settings: SaveSettings,
        *,
        rank: int,
        world_size: int,
        gather: Gather,
        lease: Lease | None = None,
        attempt: int | None = None,
        parent: int | None = None,
        is_async: bool = True,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._rank = rank
        self._world_size = world_size
        self._gather = gather
        self._lease = lease
        self._attempt = attempt
        self._parent = parent
        self._last_sequence: int | None = None
        self._buffers = SnapshotBuffers() if is_async else None
        self._flight: _Flight | None = None
        if is_async:
            engine.basic_optimizer.register_step_pre_hook(self._await_copy)
        self.committed_step: int | None = None
        """Of the last checkpoint known to be committed, on every rank."""
        self.slowest_s: float | None = None
        """Seconds that the longest complete save took from beginning to end, as rank 0 saw it."""

    @property
    def is_in_flight(self) -> bool:
        """Whether a save isn't over yet; the same on every rank."""
        return self._flight is not None

    @property
    def step_in_flight(self) -> int | None:
        """Step whose checkpoint is being written."""
        return None if self._flight is None else self._flight.step

    @property
    def snapshot_bytes(self) -> int:
        """Memory kept for snapshots."""
        return 0 if self._buffers is None else self._buffers.num_bytes

    def save(
        self,
        step: int,
        ledger: Ledger | None = None,
        on_commit: OnCommit = lambda manifest: None,
        *,
        client_state: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to save the engine's present state as the checkpoint of ``step``. Collective.

        Args:
            step: steps trained so far.
            ledger: the lineage up to this checkpoint, on rank 0; without one, ``ledger.json``
                holds the pinned facts of the model alone.
            on_commit: told on rank 0's main thread, within a later :meth:`poll`.
            client_state: more for this rank's ``mp_rank_XX_model_states.pt``.

        Raises:
            CheckpointError: on all ranks: the save before failed, or this one could not begin.
        """
        self.finish()
        temporary = self._begin(step)
        try:
            state = self._client_state(step, client_state or {})
            snapshot = take_snapshot(self._engine, temporary, state, self._buffers)
            self._require_space(step, snapshot)
        except BaseException:
            if self._rank == 0:
                committing.abandon(temporary)
            raise
        flight = _Flight(temporary, step, ledger, on_commit)
        flight.thread = threading.Thread(
            target=self._write, args=(flight, snapshot), name=f"save {step}", daemon=True
        )
        self._flight = flight
        flight.thread.start()
        if self._buffers is None:
            self.finish()
        elif not snapshot.is_private:
            flight.files_written.wait()

    def poll(self) -> bool:
        """Look how the save is doing; return whether none is in flight. Collective while one is.

        Raises:
            CheckpointError: on all ranks: it failed on those that the message names. Nothing of it
                is left.
        """
        return self._meet(is_given_up=False)

    def wait(self, timeout_s: float) -> None:
        """Wait until this rank's part of the save in flight is over, at most so long."""
        if self._flight is not None:
            self._flight.over.wait(timeout_s)

    def finish(self, timeout_s: float | None = None) -> bool:
        """Wait for the save in flight; return whether it is complete. Collective.

        Args:
            timeout_s: give the save up after so long; None: never.

        Raises:
            CheckpointError: see :meth:`poll`.
        """
        flight = self._flight
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._flight is not None:
            self.wait(_LOOKS_EVERY_S)
            is_late = deadline is not None and time.monotonic() >= deadline
            self._meet(is_given_up=is_late)
        return flight is None or self.committed_step == flight.step

    def settle(self, time_left_s: Callable[[], float]) -> None:
        """End the save in flight without the other ranks, which may be in no state to answer.

        Waits until it is complete, or gives it up. A failure is logged: whoever settles has an
        error to tell already.

        Args:
            time_left_s: how long it may still take; asked again and again.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            while time_left_s() > 0 and not flight.is_over_everywhere(self._rank):
                time.sleep(_LOOKS_EVERY_S)
        finally:
            if not flight.over.is_set():
                flight.stop()
                self._discard(flight)
        report = self._report(flight, is_given_up=False)
        if report.problem is not None:
            logger.error("the checkpoint of step %s failed: %s", flight.step, report.problem)

    def may_write(self) -> bool:
        """Whether, as far as this rank knows, the directory is still this job's."""
        return self._lease is None or self._lease.still_held()

    def why_lost(self) -> str | None:
        """Return who has taken the directory over, if the heartbeat has found that; costs nothing.

        None on other ranks than the one that holds the lease.
        """
        if self._lease is None or not self._lease.is_lost:
            return None
        try:
            self._lease.require_held()
        except (OSError, RunDirectoryError) as error:
            return str(error)
        return None

    def _await_copy(self, *_: object) -> None:
        """Keep the optimizer from changing what is still being copied."""
        if self._flight is not None:
            self._flight.copied.wait()

    def _begin(self, step: int) -> Path:
        directory = self._settings.directory
        token, problem = committing.new_token(), None
        if self._rank == 0:
            try:
                committing.begin(directory, step, token)
            except OSError as error:
                problem = str(error)
        answers = self._gather((token, problem))
        require_agreement(None, lambda _: [answer[1] for answer in answers])
        return temporary_path(directory, step, answers[0][0])

    def _require_space(self, step: int, snapshot: Snapshot) -> None:
        """Fail before a disk is filled on which the run's own record has to grow too."""
        sizes = self._gather(snapshot.num_bytes)

        def look() -> None:
            if self._rank == 0:
                require_free_space(
                    self._settings.directory, sum(sizes), what=f"the checkpoint of step {step}"
                )

        all_or_none(look, self._gather)

    def _meet(self, *, is_given_up: bool) -> bool:
        """Exchange how far the save is, and draw the same conclusion on every rank."""
        flight = self._flight
        if flight is None:
            return True
        reports = self._gather(self._report(flight, is_given_up=is_given_up))
        if any(report.is_given_up or report.problem for report in reports):
            self._flight = None
            flight.stop()
            self._gather(None)  # nobody writes anymore
            self._discard(flight)
            # Again: meanwhile it may have been committed. And nobody goes on before all has gone.
            reports = self._gather(self._report(flight, is_given_up=True))
        elif all(report.is_over for report in reports):
            self._flight = None
            self.slowest_s = max(self.slowest_s or 0.0, flight.took_s)
        if reports[0].is_committed:
            self.committed_step = flight.step
        require_agreement(None, lambda _: [report.problem for report in reports])
        return self._flight is None

    def _report(self, flight: "_Flight", *, is_given_up: bool) -> "_Report":
        is_over = flight.over.is_set()  # looked at first: the rest is then the last word
        manifest = flight.manifest
        if manifest is not None and not flight.is_noted:
            flight.is_noted = True
            self._parent = manifest.sequence
            try:
                flight.on_commit(manifest)
            except Exception as error:  # noqa: BLE001 - the other ranks wait for this report
                flight.problem = flight.problem or _described(error)
        problem = None if flight.problem is None else self._cause(flight.problem)
        return _Report(is_over, problem, manifest is not None, is_given_up)

    def _cause(self, problem: str) -> str:
        """Return what is behind ``problem``: who takes a directory over removes the files there."""
        try:
            if self._lease is not None:
                self._lease.require_held()
        except (OSError, RunDirectoryError) as error:
            return str(error)
        return problem

    def _discard(self, flight: "_Flight") -> None:
        if self._rank == 0 and flight.manifest is None:
            committing.abandon(flight.temporary)

    def _client_state(self, step: int, more: Mapping[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = {
            "sparse_tensor_module_names": set(),  # NeoX's DeepSpeed has it, the newer one doesn't
            "iteration": step,
            "args": dict(self._settings.model_arguments),
            **more,
        }
        return state | (capture_rng_states() if self._settings.saves_rng else {})

    def _write(self, flight: "_Flight", snapshot: Snapshot) -> None:
        """Do this rank's part; the whole of the writer thread."""
        try:
            self._write_files(flight, snapshot)
            if self._rank == 0:
                self._commit(flight, snapshot)
        except Exception as error:  # noqa: BLE001 - told by poll, on all ranks
            if not flight.cancelled.is_set():
                flight.problem = flight.problem or _described(error)
        finally:
            flight.took_s = time.monotonic() - flight.began
            flight.copied.set()
            flight.files_written.set()
            flight.over.set()

    def _write_files(self, flight: "_Flight", snapshot: Snapshot) -> None:
        files: dict[str, StoredFile] = {}
        flight.problem = snapshot.problem
        snapshot.copy_rest()
        flight.copied.set()
        try:
            for name, content in snapshot.contents.items():
                files[name] = write_torch_file(
                    content, flight.temporary / name, is_cancelled=flight.cancelled.is_set
                )
        except CheckpointError as error:
            flight.problem = str(error)
        flight.files_written.set()
        try:
            committing.leave_entry(flight.temporary, self._rank, files, flight.problem)
        except FileNotFoundError:
            # Rank 0 has found the entry and removed it before it was synced; or another job has
            # taken the directory, which rank 0 will tell.
            if self._rank == 0:
                raise

    def _commit(self, flight: "_Flight", snapshot: Snapshot) -> None:
        entries = committing.await_entries(
            flight.temporary, self._world_size, flight.cancelled.is_set
        )
        if any(entry.problem for entry in entries.values()):
            return  # each rank tells its own
        settings = self._settings
        if snapshot.has_recovery_scripts:
            place_recovery_scripts(settings.directory, flight.temporary)
            reach("save: recovery scripts placed")
        # Looked up in the directory once, and after a failure; otherwise this job alone counts on.
        last, self._last_sequence = self._last_sequence, None
        manifest = committing.commit(
            flight.temporary,
            flight.step,
            entries=entries,
            texts=own_texts(settings, has_ledger=flight.ledger is not None),
            ledger=flight.ledger,
            attempt=self._attempt,
            parent=self._parent,
            lease=self._lease,
            sequence=None if last is None else last + 1,
        )
        self._last_sequence = manifest.sequence
        flight.manifest = manifest
        if settings.keep_last_n is not None:
            delete_expired(
                settings.directory, settings.keep_last_n, manifest, may_write=self.may_write
            )
        if settings.s3_path is not None:
            copy_checkpoint(
                checkpoint_path(settings.directory, flight.step),
                manifest,
                settings.s3_path,
                settings.directory.resolve().name,
                settings.s3_chunk_size,
                is_cancelled=flight.cancelled.is_set,
            )


@dataclass
class _Flight:
    """A save that isn't over yet. Threads share it; each member is set once."""

    temporary: Path
    step: int
    ledger: Ledger | None
    on_commit: OnCommit
    thread: threading.Thread | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    copied: threading.Event = field(default_factory=threading.Event)
    files_written: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    problem: str | None = None
    manifest: Manifest | None = None  # on rank 0, once committed
    is_noted: bool = False
    began: float = field(default_factory=time.monotonic)
    took_s: float = 0.0  # on rank 0 until it was committed, and copied to s3_path

    def stop(self) -> None:
        """Give it up, and wait until this rank writes no more."""
        self.cancelled.set()
        if self.thread is not None:
            self.thread.join()

    def is_over_everywhere(self, rank: int) -> bool:
        """Whether it is over here and, as far as the directory tells, on rank 0."""
        if not self.over.is_set():
            return False
        if rank == 0 or self.problem is not None:
            return True
        with contextlib.suppress(OSError):
            return not self.temporary.exists()
        return True


@dataclass(frozen=True)
class _Report:
    """What a rank knows of the save."""

    is_over: bool
    problem: str | None
    is_committed: bool  # known to rank 0 alone
    is_given_up: bool


def _described(error: Exception) -> str:
    if isinstance(error, MegatronError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"
