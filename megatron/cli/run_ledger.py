"""The ledger of a launch: what it begins with, and who writes it."""

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron.checkpoint.save_settings import model_part
from megatron.checkpoint.stored import StoredFacts
from megatron.cli.resume_plan import PlannedLaunch
from megatron.config.run_config import RunConfig
from megatron.engine.distributed import ProcessGroups
from megatron.engine.journal import Journal
from megatron.engine.steps import MicroBatchSource
from megatron.ledger.attempt_facts import AttemptFacts, LoadedCheckpoint
from megatron.ledger.environment import describe_environment, numerics_hash
from megatron.ledger.ledger_file import Ledger, Parent
from megatron.ledger.manifest import read_manifest
from megatron.ledger.planning.component_ranges import cursors_at
from megatron.ledger.recorder import Recorder, flush_interval
from megatron.ledger.run_file import RunFile, new_run, read_run_file, write_run_file

__all__ = ["node_names", "open_journal"]


def open_journal(
    config: RunConfig,
    groups: ProcessGroups,
    launch: PlannedLaunch,
    model: StoredFacts,
    sources: dict[str, MicroBatchSource | None],
    nodes: Sequence[str],
) -> Journal | None:
    """Return the journal of this rank; None if the run isn't saved.

    Args:
        config: of the run.
        groups: of this rank.
        launch: what was planned.
        model: what the run has fixed about its model.
        sources: this rank's micro batches, by stream name.
        nodes: see :func:`node_names`.

    Raises:
        RunDirectoryError: the run directory contradicts itself.
        OSError: it cannot be written.
    """
    if config.training.save is None:
        return None
    save = Path(config.training.save)
    recorder = None
    if groups.rank == 0:
        facts = _attempt_facts(config, groups, launch, model, _run_of(save, config, launch), nodes)
        recorder = Recorder(save, facts)
    return Journal(
        groups,
        recorder,
        {name: source for name, source in sources.items() if source is not None},
        interval=flush_interval(config.logging.log_interval),
        component_cursors=lambda stream, position: cursors_at(
            launch.plan.streams[stream].order, position
        ),
    )


def node_names(groups: ProcessGroups) -> list[str]:
    """Return the names of the machines that ranks run on, in the ranks' order. Collective."""
    return list(dict.fromkeys(groups.gather(socket.gethostname())))


def _run_of(save: Path, config: RunConfig, launch: PlannedLaunch) -> RunFile:
    """Return the run that ``save`` holds, or begin one there."""
    run = read_run_file(save)
    if run is None:
        run = new_run(config.flat(), now=time.time(), parent=_parent(config, launch))
        write_run_file(save, run)
    return run


def _parent(config: RunConfig, launch: PlannedLaunch) -> Parent | None:
    ledger = _ledger(launch)
    if ledger is None:
        return None
    return Parent(
        run_id=ledger.run_id,
        step=ledger.step,
        chain=ledger.chain,
        save=str(Path(config.training.load).resolve()),
        is_continued=not launch.source.finetune,
        parent=ledger.parent,
    )


def _attempt_facts(
    config: RunConfig,
    groups: ProcessGroups,
    launch: PlannedLaunch,
    model: StoredFacts,
    run: RunFile,
    nodes: Sequence[str],
) -> AttemptFacts:
    environment = describe_environment(
        os.environ,
        device=groups.device.type,
        num_threads=torch.get_num_threads(),
        nodes=nodes,
        git_commit=_git_commit(),
    )
    values = config.flat()
    training = config.training
    return AttemptFacts(
        run_id=run.run_id,
        number=0,
        started=time.time(),
        begin=_begin(launch, model, run),
        topology=groups.topology,
        geometry=config.geometry,
        config=values,
        numerics=numerics_hash(values, groups.topology, environment),
        restores_numbers=not (training.no_load_optim or training.no_load_rng),
        environment=environment,
        loaded=_loaded(launch),
        instruction=launch.source.instruction,
        obeyed=launch.source.decision.obeys,
    )


def _begin(launch: PlannedLaunch, model: StoredFacts, run: RunFile) -> Ledger:
    """Return the ledger as it is before the first step: the past, with the planned segments."""
    plan = launch.plan
    past = None if launch.source.finetune else _ledger(launch)
    return Ledger(
        model=model_part(model),
        run_id=run.run_id,
        step=plan.step,
        streams={name: stream.state for name, stream in plan.streams.items()},
        orders=plan.orders,
        spans=past.spans if past is not None else (),
        evaluation_due=plan.evaluates_first,
        tokenizer=launch.wanted.tokenizer,
        datasets=plan.datasets,
        parent=run.parent,
        instructions=past.instructions if past is not None else (),
        adopted=plan.adopted,
        accepted=plan.accepted,
    )


def _loaded(launch: PlannedLaunch) -> LoadedCheckpoint | None:
    source, ledger = launch.source.checkpoint, _ledger(launch)
    if source is None:
        return None
    manifest = read_manifest(source)
    return LoadedCheckpoint(
        path=str(source.resolve()),
        run_id=ledger.run_id if ledger is not None else None,
        step=launch.plan.source_step or 0,
        chain=ledger.chain if ledger is not None else None,
        sequence=manifest.sequence if manifest is not None else None,
    )


def _ledger(launch: PlannedLaunch) -> Ledger | None:
    """The ledger of the checkpoint that is loaded; None without one."""
    record = launch.found.record if launch.found is not None else None
    return record if isinstance(record, Ledger) else None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
