"""Worlds of ranks forked from the warm test process: 1-2 s each instead of 10 with a launcher.

The parent must not have started threads of its own or initialised torch.distributed.
``tests/conftest.py`` sets one torch thread before anything else runs.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_GRACE_S = 5.0


@dataclass(frozen=True)
class RankContext:
    """What a worker knows of its world."""

    rank: int
    world_size: int
    tmp_path: Path  # shared by all ranks
    init_method: str  # for torch.distributed.init_process_group: a file store, so no ports


class WorldFailed(AssertionError):  # noqa: N818 - reads as the sentence it is
    """At least one rank failed; the message holds every traceback, labelled with its rank."""


def run_ranks(
    worker: Callable[[RankContext], Any], world_size: int, tmp_path: Path, timeout_s: float = 120.0
) -> list[Any]:
    """Run ``worker`` in ``world_size`` forked processes and return the results in rank order.

    The worker may be a closure; results must pickle. On the first failure the survivors get a
    moment to fail too (their tracebacks often explain the first) and are then killed.

    Raises:
        WorldFailed: a rank raised, died or ran past ``timeout_s``.
    """
    fork = multiprocessing.get_context("fork")
    store = tmp_path / f"store-{time.monotonic_ns()}"
    pipes: list[Connection] = []
    processes = []
    for rank in range(world_size):
        context = RankContext(rank, world_size, tmp_path, f"file://{store}")
        reader, writer = fork.Pipe(duplex=False)
        process = fork.Process(target=_run_rank, args=(worker, context, writer), daemon=False)
        process.start()
        writer.close()
        pipes.append(reader)
        processes.append(process)
    try:
        results, failures = _collect(pipes, time.monotonic() + timeout_s, timeout_s)
    finally:
        for process in processes:
            process.join(timeout=0.2)
            if process.is_alive():
                process.kill()
                process.join()
    if failures:
        raise WorldFailed("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))
    return [results[rank] for rank in range(world_size)]


def _run_rank(
    worker: Callable[[RankContext], Any], context: RankContext, writer: Connection
) -> None:
    os.environ.update(
        RANK=str(context.rank),
        LOCAL_RANK=str(context.rank),
        WORLD_SIZE=str(context.world_size),
        LOCAL_SIZE=str(context.world_size),
    )
    try:
        writer.send(("ok", worker(context)))
        code = 0
    except BaseException:  # noqa: BLE001 - the parent reports it, whatever it is
        writer.send(("failed", traceback.format_exc()))
        code = 1
    writer.close()
    os._exit(code)  # no atexit handlers of the parent's


def _collect(
    pipes: list[Connection], deadline: float, timeout_s: float
) -> tuple[dict[int, Any], dict[int, str]]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        left = deadline - time.monotonic()
        ready = wait(list(waiting), timeout=max(0.0, left))
        if not ready:
            reason = "survivor, killed" if failures else f"no answer within {timeout_s} s"
            failures.update(dict.fromkeys(waiting.values(), reason))
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                kind, value = pipe.recv()
            except EOFError:
                kind, value = "failed", "died without an answer (killed by a signal?)"
            if kind == "ok":
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    return results, failures
