"""``neox-slurm decide``: whether a job is done, is requeued, or stops."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from megatron.base.errors import MegatronError
from megatron.base.exit_codes import FAILED, FINISHED, STOPPED
from megatron.cli.slurm.queue import submit_time
from megatron.cli.slurm.situation import Job, Situation, read_run_keys
from megatron.cli.slurm.verdict import Verdict, verdict
from megatron.config.command_line import parse_command_line
from megatron.ledger.launches_file import EndedLaunch, append_launch
from megatron.ledger.queries.advance import AttemptAdvance

if TYPE_CHECKING:
    from megatron.cli.slurm.batches import Batch

__all__ = ["EXIT_STATUS", "add_options", "run"]

EXIT_STATUS = {"done": FINISHED, "requeue": STOPPED, "stop": FAILED}
"""The command's own, by what it decides."""

EPILOG = """exit status:
  0   done: the run is finished, or stopped where its configuration says
  75  once more: requeue the job; asked before a launch: launch
  1   stop: another launch would come to nothing; the reason is printed
  2   can't tell

Without --status the launch is still to come: is there anything left to do? With it, the verdict is
also a line in launches.jsonl of the run's save directory.

examples:
  neox-slurm decide my.yml
  neox-slurm decide --status 75 my.yml
  neox-slurm decide --status 137 --json -- -d configs 125M.yml local.yml"""

_JSON_FORMAT = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--status", type=int, metavar="N", help="exit status of the launch")
    parser.add_argument(
        "--since",
        type=float,
        metavar="SECONDS",
        help="when the launch was started, since the epoch: tells its attempt from older ones",
    )
    parser.add_argument(
        "--tries",
        type=int,
        default=3,
        metavar="K",
        help="give up after K launches in a row without a new step or checkpoint (default: 3)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="CONFIG",
        help="what follows `deepy.py train.py`; put -- before it if it begins with an option",
    )


def run(options: argparse.Namespace) -> int:
    """Decide, note it, print it.

    Raises:
        MegatronError: the configuration or the run's directory cannot be read.
    """
    if options.tries < 1:
        raise MegatronError(f"--tries {options.tries}: must be 1 or more")
    environ = os.environ
    # Any script will do: which one is launched makes no difference here.
    command = parse_command_line([__file__, *options.arguments])
    situation = Situation.read(
        read_run_keys(command.config_paths),
        status=options.status,
        job=Job.of_environment(environ, submit_time=submit_time(environ)),
        since=options.since,
        now=time.time(),
        tries=options.tries,
    )
    decision = verdict(situation)
    _note(situation, decision)
    batches = _batches(situation, decision)
    if options.json:
        _print_json(_as_json(situation, decision, batches))
    else:
        sys.stdout.write("".join(f"{line}\n" for line in _lines(situation, decision, batches)))
    return EXIT_STATUS[decision.action]


def _note(situation: Situation, decision: Verdict) -> None:
    save, newest = situation.keys.save, situation.newest
    gives_up = decision.action == "stop" and (decision.stalled or decision.unbegun)
    if save is None or (situation.status is None and not gives_up):
        return
    launch = EndedLaunch(
        time=situation.now,
        job=situation.job.number,
        restarts=situation.job.restarts,
        status=situation.status,
        attempt=None if newest is None else newest.facts.number,
        has_begun=situation.own_attempt is not None,
        counts=decision.counts,
        action=decision.action,
        reason=decision.reason,
    )
    try:
        append_launch(save, launch)
    except OSError as error:  # a full disk is no reason to decide otherwise
        sys.stderr.write(f"neox-slurm: {save}: the verdict could not be noted: {error}\n")


def _batches(situation: Situation, decision: Verdict) -> "list[Batch]":
    """Return the batch of each step that a run given up has died in, each once."""
    save = situation.keys.save
    if decision.action != "stop" or save is None:
        return []
    # Opening data takes longer than all the rest, and most launches end well.
    from megatron.cli.slurm.batches import batch_of

    found = [batch for one in decision.stalled if (batch := batch_of(save, one)) is not None]
    return list({(batch.stream, batch.step): batch for batch in found}.values())


def _lines(situation: Situation, decision: Verdict, batches: "Sequence[Batch]") -> Iterator[str]:
    is_first = situation.status is None and decision.action == "requeue"
    action = "launch" if is_first else decision.action
    yield f"neox-slurm: {action}: {decision.reason}"
    if decision.action != "stop" or not decision.stalled:
        return
    for attempt in decision.stalled:
        yield f"  {_attempt_line(attempt)}"
    assert situation.keys.save is not None  # noqa: S101 - attempts are recorded there
    for batch in batches:
        yield from batch.lines(situation.keys.save)
    yield (
        "If the same step failed each time, look at its documents and at the traceback in the log; "
        "if not, at the machines. Submitting again begins the count anew."
    )


def _attempt_line(attempt: AttemptAdvance) -> str:
    facts, stop = attempt.facts, attempt.facts.stop
    started = datetime.fromtimestamp(facts.started).strftime("%Y-%m-%d %H:%M:%S")
    parts = [f"attempt {facts.number}, {started}"]
    if attempt.job is not None:
        parts.append(f"job {attempt.job} restart {attempt.restarts}")
    parts.append(f"on {attempt.nodes}")
    parts.append(f"began after step {facts.begin.step}")
    died = attempt.died_in
    if died is None:
        parts.append(f"recorded up to step {attempt.last_step}")
    elif attempt.unfinished_evaluation is not None:
        parts.append(f"died after step {attempt.last_step}, in its validation")
    elif len(died) == 1:
        parts.append(f"died in step {died.start}")
    else:
        parts.append(f"died in one of the steps {died.start}..{died.stop - 1}")
    parts.append(stop.reason if stop is not None else "killed")
    return ", ".join(parts)


def _as_json(situation: Situation, decision: Verdict, batches: "Sequence[Batch]") -> dict[str, Any]:
    newest, keys = situation.newest, situation.keys
    return {
        "format": _JSON_FORMAT,
        "action": decision.action,
        "reason": decision.reason,
        "status": situation.status,
        "save": None if keys.save is None else str(keys.save),
        "step": None if newest is None else newest.last_step,
        "train_iters": keys.train_iters,
        "tries": situation.tries,
        "launches_without_attempt": decision.unbegun,
        "attempts_without_progress": [_attempt_json(attempt) for attempt in decision.stalled],
        "batches": [batch.as_json() for batch in batches],
    }


def _attempt_json(attempt: AttemptAdvance) -> Mapping[str, Any]:
    facts, died = attempt.facts, attempt.died_in
    return {
        "attempt": facts.number,
        "started": facts.started,
        "job": attempt.job,
        "restarts": attempt.restarts,
        "nodes": attempt.nodes,
        "began_after": facts.begin.step,
        "last_step": attempt.last_step,
        "died_in": None if died is None else [died.start, died.stop - 1],
        "died_in_validation": attempt.unfinished_evaluation is not None,
        "stop": None if facts.stop is None else facts.stop.reason,
    }


def _print_json(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer, indent=1) + "\n")
