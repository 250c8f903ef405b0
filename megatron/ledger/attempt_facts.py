"""``<save>/attempts/NNNN.json``: one launch of a run: where it began, on what, and how it ended.

Written when the attempt starts, again after every checkpoint, and when it stops; a launch that was
killed has no stop reason. With the ledger it began with, the lineage of an attempt is known even
when its checkpoints are gone.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import MegatronError, RunDirectoryError
from megatron.config.batch_geometry import BatchGeometry
from megatron.config.topology import Topology
from megatron.ledger.attempts import next_attempt_number
from megatron.ledger.instructions import InstructedAttempt, Instruction
from megatron.ledger.ledger_file import FORMAT, Ledger, ledger_from_json, ledger_to_json

__all__ = [
    "RESET",
    "AttemptFacts",
    "CommittedCheckpoint",
    "LoadedCheckpoint",
    "Stop",
    "attempt_facts_path",
    "claim_attempt",
    "instructed_attempts",
    "is_finished",
    "read_all_attempt_facts",
    "read_attempt_facts",
    "write_attempt_facts",
]

RESET = "!"
"""Stands between what acts on numbers and the attempt that began without its full state."""


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """What an attempt went on from."""

    path: str
    run_id: str | None  # None: a checkpoint without a ledger
    step: int
    chain: str | None  # its chain head
    sequence: int | None = None  # of its commit, in its own directory; None: it has no manifest


@dataclass(frozen=True, kw_only=True)
class CommittedCheckpoint:
    """A checkpoint that an attempt published."""

    step: int
    chain: str
    sequence: int | None = None  # of its commit; None: made by a release that didn't count them


@dataclass(frozen=True, kw_only=True)
class Stop:
    """How an attempt ended."""

    reason: str  # "finished": train_iters steps are done
    time: float  # seconds since the epoch
    step: int  # the last one recorded
    chain: str  # of the last line
    done_step: int | None = None  # the last one done, also if it has no line; None: not told


@dataclass(frozen=True, kw_only=True)
class AttemptFacts:
    """One launch of a run."""

    run_id: str
    number: int  # of the attempt; 0 until it is claimed
    started: float  # seconds since the epoch
    begin: Ledger  # what the attempt goes on from, with the segments it will take its steps in
    topology: Topology
    geometry: BatchGeometry
    config: Mapping[str, Any]  # every key, resolved
    numerics: str  # hash of everything that acts on numbers
    restores_numbers: bool = True  # False: optimizer or random state are not the checkpoint's
    environment: Mapping[str, Any] = field(default_factory=dict)  # versions, machine, job, commit
    loaded: LoadedCheckpoint | None = None
    instruction: Instruction | None = None
    obeyed: bool = False
    committed: tuple[CommittedCheckpoint, ...] = ()  # oldest first
    startup_s: Mapping[str, float] = field(default_factory=dict)  # by phase, once a step is done
    stop: Stop | None = None

    @property
    def span_numerics(self) -> str:
        """What the lineage notes of the numbers in this attempt's steps.

        A state that wasn't restored makes them unlike those of any other attempt.
        """
        if self.restores_numbers or self.begin.step == 0:
            return self.numerics
        return f"{self.numerics}{RESET}{self.run_id}/{self.number}"


def attempt_facts_path(save: Path, number: int) -> Path:
    """Return where the facts of an attempt are or would be."""
    return save / "attempts" / f"{number:04d}.json"


def claim_attempt(save: Path, facts: AttemptFacts) -> AttemptFacts:
    """Write the facts of a new attempt under the next free number; return them with it.

    A number that the lineage knows isn't free, even if its files are lost.

    Raises:
        OSError: the run directory cannot be written.
    """
    (save / "attempts").mkdir(parents=True, exist_ok=True)
    begin = facts.begin
    known = max((span.attempt for span in begin.spans if span.run_id == facts.run_id), default=0)
    claimed = replace(facts, number=max(next_attempt_number(save), known + 1))
    # Exclusive: a number is never given twice, not even to two jobs that both believe to hold save.
    os.close(
        os.open(attempt_facts_path(save, claimed.number), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    )
    write_attempt_facts(save, claimed)
    return claimed


def write_attempt_facts(save: Path, facts: AttemptFacts) -> None:
    """Write ``NNNN.json``, durably; readers see the old one or the new."""
    values = {
        "format": FORMAT,
        **{name: getattr(facts, name) for name in ("run_id", "number", "started")},
        "topology": asdict(facts.topology),
        "geometry": asdict(facts.geometry),
        "numerics": facts.numerics,
        "restores_numbers": facts.restores_numbers,
        "environment": dict(facts.environment),
        "loaded": None if facts.loaded is None else asdict(facts.loaded),
        "instruction": None if facts.instruction is None else asdict(facts.instruction),
        "obeyed": facts.obeyed,
        "committed": [asdict(one) for one in facts.committed],
        "startup_s": {phase: round(spent, 3) for phase, spent in facts.startup_s.items()},
        "stop": None if facts.stop is None else asdict(facts.stop),
        "begin": ledger_to_json(facts.begin),
        "config": dict(facts.config),
    }
    text = json.dumps(values, indent=1, default=str)
    write_atomically(attempt_facts_path(save, facts.number), text + "\n")


def read_attempt_facts(save: Path, number: int) -> AttemptFacts | None:
    """Return the facts of an attempt.

    Returns:
        None if there are none: it was killed as it began, or ran under a release that kept none.

    Raises:
        RunDirectoryError: the file was damaged, edited, or written by a newer release.
    """
    path = attempt_facts_path(save, number)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error
    if not text:
        return None  # killed between claiming the number and writing
    try:
        return _from_json(json.loads(text))
    except MegatronError as error:
        raise RunDirectoryError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirectoryError(
            f"{path} does not describe an attempt ({type(error).__name__}: {error}); it was "
            "damaged or edited"
        ) from error


def read_all_attempt_facts(save: Path) -> list[AttemptFacts]:
    """Return the facts of every attempt that has some, oldest first.

    Raises:
        RunDirectoryError: see :func:`read_attempt_facts`.
    """
    numbers = range(1, next_attempt_number(save))
    return [facts for n in numbers if (facts := read_attempt_facts(save, n)) is not None]


def instructed_attempts(attempts: Sequence[AttemptFacts]) -> list[InstructedAttempt]:
    """Return what :func:`megatron.ledger.instructions.decide` needs to know of attempts."""
    return [
        InstructedAttempt(
            number=facts.number,
            instruction=facts.instruction,
            obeyed=facts.obeyed,
            committed_steps=[one.step for one in facts.committed],
        )
        for facts in attempts
    ]


def is_finished(newest: AttemptFacts, train_iters: int) -> bool:
    """Whether a run whose newest attempt is ``newest`` has nothing left to do."""
    stop = newest.stop
    return stop is not None and stop.reason == "finished" and stop.step >= train_iters


def _from_json(values: Mapping[str, Any]) -> AttemptFacts:
    if values["format"] != FORMAT:
        raise RunDirectoryError(
            f"format {values['format']} is not known; this release reads format {FORMAT}"
        )
    loaded, instruction, stop = values["loaded"], values["instruction"], values["stop"]
    return AttemptFacts(
        run_id=values["run_id"],
        number=values["number"],
        started=values["started"],
        begin=ledger_from_json(values["begin"]),
        topology=Topology(**values["topology"]),
        geometry=BatchGeometry(**values["geometry"]),
        config=values["config"],
        numerics=values["numerics"],
        restores_numbers=values["restores_numbers"],
        environment=values["environment"],
        loaded=None if loaded is None else LoadedCheckpoint(**loaded),
        instruction=None if instruction is None else Instruction(**instruction),
        obeyed=values["obeyed"],
        committed=tuple(CommittedCheckpoint(**one) for one in values["committed"]),
        startup_s=values.get("startup_s", {}),  # not kept by earlier releases
        stop=None if stop is None else Stop(**stop),
    )
