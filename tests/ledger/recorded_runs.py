"""Runs without a model: real recorders, steps that consume what their segment says."""

import contextlib
import hashlib
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron.config.batch_geometry import BatchGeometry
from megatron.config.topology import Topology
from megatron.ledger.attempt_facts import AttemptFacts
from megatron.ledger.attempts import EvaluationRecord, StepRecord
from megatron.ledger.digests import MODULUS, digest_text
from megatron.ledger.ledger_file import Ledger, write_ledger
from megatron.ledger.recorder import Recorder
from megatron.ledger.run_file import RunFile, write_run_file
from tests.ledger.example_ledgers import small_ledger

EVALUATION_SAMPLES = 4


@contextlib.contextmanager
def memory_directory() -> Iterator[Path]:
    """Give a directory for a while; in memory where there is one, since every save syncs files."""
    shared_memory = Path("/dev/shm")
    parent = shared_memory if shared_memory.is_dir() else None
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)


def digest_of(order_id: str, first: int, count: int, stream: str = "train") -> int:
    """Stand in for the digest of samples: a number that only what was read decides."""
    return (
        sum(
            int.from_bytes(hashlib.sha256(f"{stream} {order_id} {at}".encode()).digest()[:8], "big")
            for at in range(first, first + count)
        )
        % MODULUS
    )


def loss_at(step: int) -> float:
    """Stand in for a loss that only depends on the step."""
    return 6.0 / step


def attempt_facts(begin: Ledger, **changes) -> AttemptFacts:
    """Return the facts of a launch on one rank that goes on from ``begin``."""
    values = {
        "run_id": begin.run_id,
        "number": 0,
        "started": 1e9,
        "begin": begin,
        "topology": Topology(1, 1, 1),
        "geometry": BatchGeometry(4, 1, 1),
        "config": {"seed": 1234},
        "numerics": "n1",
    }
    return AttemptFacts(**(values | changes))


@dataclass
class TestRun:
    """A run directory, and the attempt that writes to it now."""

    __test__ = False

    save: Path
    recorder: Recorder
    begin: Ledger
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, save: Path, begin: Ledger | None = None, **facts) -> "TestRun":
        """Begin an attempt at the ledger ``begin``, a new run's if None."""
        begin = small_ledger() if begin is None else begin
        save.mkdir(exist_ok=True)
        write_run_file(
            save, RunFile(run_id=begin.run_id, created=1e9, config_hash="c", parent=begin.parent)
        )
        warnings = []
        recorder = Recorder(
            save, attempt_facts(begin, **facts), warn=warnings.append, clock=lambda: 2e9
        )
        weakref.finalize(recorder, recorder._log._file.close)  # what a kill does
        return cls(save, recorder, begin, warnings)

    @property
    def lines_path(self) -> Path:
        """The file of this attempt's lines."""
        return self.save / "attempts" / f"{self.recorder.number:04d}.jsonl"

    def steps(self, first: int, last: int, *, loss=loss_at, digest=digest_of) -> None:
        """Take steps and write their lines."""
        digests = {}
        segments = self.begin.streams["train"].segments
        for step in range(first, last + 1):
            positions = segments.positions(step)
            segment = segments.at_step(step)
            at = segment.order_position(positions.start)
            digests[step] = digest(segment.order_id, at, len(positions))
            self.recorder.step(
                StepRecord(step, positions.start, len(positions), loss(step), 1e-3, 1.5, False, 0.1)
            )
        self.recorder.flush(digests)

    def evaluate(
        self, after_step: int, stream: str = "valid", *, at_end: bool = False, loss: float = 5.0
    ) -> None:
        """Make an evaluation and write its line."""
        position = self.recorder.next_position(stream)
        digest = digest_of("", position, EVALUATION_SAMPLES, stream)
        self.recorder.evaluation(
            EvaluationRecord(
                stream, after_step, position, EVALUATION_SAMPLES, digest_text(digest), loss, at_end
            )
        )
        self.recorder.flush()

    def save_checkpoint(self, *, evaluation_due: bool = False) -> Path:
        """Publish a checkpoint that holds nothing but its ledger."""
        self.recorder.sync()
        ledger = self.recorder.ledger(
            lambda stream, position: {f"{stream}-component": position},
            evaluation_due=evaluation_due,
        )
        checkpoint = self.save / f"global_step{ledger.step}"
        checkpoint.mkdir(exist_ok=True)
        write_ledger(checkpoint, ledger)
        self.recorder.committed(ledger)
        return checkpoint


def with_batch_size(ledger: Ledger, batch_size: int) -> Ledger:
    """Return the ledger as a plan gives it when the batch size changes at its step."""
    state = ledger.streams["train"]
    last = state.segments.segments[-1]
    segments = state.segments.followed_by(
        after_step=ledger.step,
        batch_size=batch_size,
        order_id=last.order_id,
        first_order_position=last.order_position(state.next_position),
    )
    streams = {**ledger.streams, "train": replace(state, segments=segments)}
    return replace(ledger, streams=streams)
