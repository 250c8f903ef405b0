"""Runs that read, record and save like real ones, but train nothing.

Samples are read rank by rank from real datasets and digested; the recorder writes lines, facts and
ledgers; what goes on from what is planned by the real planner.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.base.errors import MegatronError
from megatron.config.batch_geometry import BatchGeometry
from megatron.config.topology import Topology
from megatron.ledger.attempt_facts import AttemptFacts
from megatron.ledger.attempts import EvaluationRecord, StepRecord
from megatron.ledger.digests import batch_digest, digest_text
from megatron.ledger.ledger_file import (
    DatasetNote,
    Ledger,
    ModelPart,
    read_ledger,
    write_ledger,
)
from megatron.ledger.planning.component_ranges import cursors_at
from megatron.ledger.planning.inputs import Found, Wanted
from megatron.ledger.planning.plan import plan_resume
from megatron.ledger.recorder import Recorder
from megatron.ledger.run_directory import checkpoint_path, read_latest, write_latest
from megatron.ledger.run_file import new_run, read_run_file, write_run_file
from megatron.stream.descriptions import describe_streams, open_order_alone
from megatron.stream.sample_counts import requested_samples
from megatron.stream.stream_settings import StreamSettings, identify_datasets
from tests.stream.recorded import write_dataset

SEQ_LENGTH = 16
TWO_RANKS = BatchGeometry(2, 2, 2)
ONE_RANK = BatchGeometry(4, 1, 1)


def write_corpus(prefix: Path, *, documents: int = 60, seed: int = 0) -> str:
    """Write a dataset of documents of 1 to 40 random tokens; return its prefix."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 40, size=documents)
    return write_dataset(prefix, [generator.integers(0, 1000, size=size) for size in sizes])


class SimulatedRun:
    """A run in ``save``; every launch is an attempt."""

    def __init__(self, save: Path, datasets: Sequence[str]) -> None:
        self.save = save
        save.mkdir(parents=True, exist_ok=True)
        self.datasets = list(datasets)
        self.weights: list[float] | None = None
        self.settings: dict[str, Any] = {"seq_length": SEQ_LENGTH, "seed": 1234}
        self.eval_interval = 4
        self.eval_iters = 1
        self.clock = 1_700_000_000.0

    def launch(
        self,
        until: int,
        *,
        geometry: BatchGeometry = TWO_RANKS,
        saves: Collection[int] = (),
        iteration: int | None = None,
        accept: Collection[str] = (),
        train_iters: int | None = None,
        stop: str | None = "finished",
        misread_step: int | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> int:
        """Take steps up to ``until``; return the attempt's number.

        Args:
            until: the last step.
            geometry: of the batches.
            saves: steps after which a checkpoint is committed.
            iteration: go on from this checkpoint instead of the latest.
            accept: accept_data_change.
            train_iters: configured, ``until`` if None.
            misread_step: of this one another batch is read than was to be.
            stop: why it ends; None: it is killed, and what wasn't flushed is lost.
            environment: machine and job, as attempts record them.
        """
        begin = self._begin(geometry, iteration, accept, train_iters or until)
        facts = AttemptFacts(
            run_id=begin.run_id,
            number=0,
            started=self._tick(),
            begin=begin,
            topology=Topology(1, geometry.data_parallel_size, 1),
            geometry=geometry,
            config={},
            numerics="n",
            environment=environment or {},
        )
        recorder = Recorder(self.save, facts, clock=self._tick)
        streams = {
            name: open_order_alone(
                begin.orders[state.segments.segments[-1].order_id],
                lambda identity: begin.datasets[identity].path,
            )
            for name, state in begin.streams.items()
        }

        def digest(name: str, positions: range) -> int:
            segment = begin.streams[name].segments.segments[-1]
            places = np.arange(positions.start, positions.stop)
            tokens = streams[name].read(
                places - segment.first_position + segment.first_order_position
            )
            return batch_digest(tokens, places)

        def cursors(name: str, position: int) -> Mapping[str, int]:
            segment = begin.streams[name].segments.segments[-1]
            return cursors_at(begin.orders[segment.order_id], position)

        def evaluate(step: int) -> None:
            start = recorder.next_position("valid")
            size = begin.streams["valid"].segments.segments[-1].batch_size
            recorder.evaluation(
                EvaluationRecord(
                    stream="valid",
                    after_step=step,
                    position=start,
                    samples=size,
                    digest=digest_text(digest("valid", range(start, start + size))),
                    loss=2 / step,
                )
            )

        digests: dict[int, int] = {}
        with _closed_if_it_fails(recorder):
            if begin.evaluation_due:
                evaluate(begin.step)
            for step in range(begin.step + 1, until + 1):
                positions = begin.streams["train"].segments.positions(step)
                digests[step] = digest("train", positions) + (step == misread_step)
                recorder.step(
                    StepRecord(
                        step=step,
                        position=positions.start,
                        samples=len(positions),
                        loss=1 / step,
                        lr=1e-3,
                        grad_norm=1.0,
                        skipped=False,
                        seconds=0.1,
                    )
                )
                is_due = step % self.eval_interval == 0
                if step in saves:
                    recorder.flush(digests)
                    self._save(recorder, recorder.ledger(cursors, evaluation_due=is_due))
                if is_due:
                    evaluate(step)
                if step % 5 == 0:
                    recorder.flush(digests)
            if stop is None:
                recorder._log.close()  # a killed process leaves no more than that
            else:
                recorder.flush(digests)
                recorder.close(stop)
        return recorder.number

    def ledger(self, step: int) -> Ledger:
        """Return the ledger of a checkpoint."""
        ledger = read_ledger(checkpoint_path(self.save, step))
        assert ledger is not None
        return ledger

    def _save(self, recorder: Recorder, ledger: Ledger) -> None:
        directory = checkpoint_path(self.save, ledger.step)
        directory.mkdir(exist_ok=True)
        write_ledger(directory, ledger)
        write_latest(self.save, ledger.step)
        recorder.committed(ledger)

    def _begin(
        self,
        geometry: BatchGeometry,
        iteration: int | None,
        accept: Collection[str],
        train_iters: int,
    ) -> Ledger:
        run = read_run_file(self.save)
        if run is None:
            run = new_run({}, now=self._tick())
            write_run_file(self.save, run)
        step = iteration if iteration is not None else read_latest(self.save)
        earlier = None if step is None else self.ledger(step)
        found = None if earlier is None else Found(path=str(self.save), record=earlier)
        plan = plan_resume(self._wanted(geometry, accept, train_iters), found)
        plan.raise_if_refused()
        ledger = earlier or Ledger(
            model=ModelPart(padded_vocab_size=1024, tp_bias_multiplicity=1, tensor_parallel_size=1),
            run_id=run.run_id,
            step=0,
            streams={},
            orders={},
        )
        return replace(
            ledger,
            streams={name: one.state for name, one in plan.streams.items()},
            orders=plan.orders,
            datasets=plan.datasets,
            accepted=plan.accepted,
        )

    def _wanted(self, geometry: BatchGeometry, accept: Collection[str], train_iters: int) -> Wanted:
        one = len(self.datasets) == 1
        settings = StreamSettings(
            **self.settings,
            data_path=self.datasets[0] if one else None,
            split="90,10,0",
            train_data_paths=() if one else tuple(self.datasets),
            valid_data_paths=() if one else (self.datasets[0],),
            train_data_weights=None if self.weights is None else tuple(self.weights),
        )
        identities = identify_datasets(settings)
        requested = requested_samples(
            train_iters=train_iters,
            train_batch_size=geometry.global_batch_size,
            eval_interval=self.eval_interval,
            eval_iters=self.eval_iters,
        )
        return Wanted(
            orders=describe_streams(settings, requested, identities),
            datasets={
                identity.digest: DatasetNote(
                    path=files.prefix,
                    level=identity.level,
                    num_documents=identity.num_documents,
                    num_tokens=identity.num_tokens,
                    index=identity.index_digest,
                    pieces=identity.pieces,
                )
                for files, identity in identities.items()
            },
            train_batch_size=geometry.global_batch_size,
            gradient_accumulation_steps=geometry.gradient_accumulation_steps,
            train_iters=train_iters,
            eval_interval=self.eval_interval,
            eval_iters=self.eval_iters,
            accept_data_change=frozenset(accept),
        )

    def _tick(self) -> float:
        self.clock += 1.0
        return self.clock


@contextlib.contextmanager
def _closed_if_it_fails(recorder: Recorder) -> Iterator[None]:
    try:
        yield
    except MegatronError:
        recorder._log.close()
        raise
