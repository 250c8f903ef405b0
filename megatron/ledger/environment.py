"""Where an attempt runs, and which of it acts on numbers."""

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.config.registry import keys
from megatron.config.topology import Topology

__all__ = ["LAUNCH", "LAUNCH_VARIABLE", "describe_environment", "numerics_hash"]

LAUNCH = "launch"
"""Key under which the environment of an attempt names the launch that made it."""

LAUNCH_VARIABLE = "NEOX_LAUNCH_ID"
"""Environment variable that tells ranks which launch they belong to."""

_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "tokenizers", "xxhash", "neox-ledger")
_JOB_VARIABLES = (
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_NODELIST",
    "PBS_JOBID",
    "LSB_JOBID",
)

_GROUPS_WITHOUT_NUMBERS = {"runner", "logging", "text_generation"}
_KEYS_WITHOUT_NUMBERS = {
    # what a run begins with and keeps; what it was given is in the lineage
    *("save", "load", "iteration", "finetune", "no_load_optim", "no_load_rng"),
    *("checkpoint_scale", "checkpoint_factor", "extra_save_iters", "keep_last_n_checkpoints"),
    *("save_iters", "config_files", "s3_path", "s3_chunk_size", "no_save_optim", "no_save_rng"),
    *("async_save", "on_save_error", "checkpoint_validation_with_forward_pass"),
    # how long a run goes on, and what it evaluates
    *("exit_interval", "exit_duration_in_mins", "hang_timeout", "eval_interval", "eval_iters"),
    "elastic_batch",  # the sizes that it leads to count
    *("char_level_ppl", "do_train", "do_valid", "do_test", "eval_tasks"),
    # data: the order of a line's segment says what was read, whatever the files are called
    *("data_path", "train_data_paths", "valid_data_paths", "test_data_paths", "split"),
    *("train_label_data_paths", "valid_label_data_paths", "test_label_data_paths"),
    *("train_data_weights", "valid_data_weights", "test_data_weights", "data_impl"),
    *("weight_by_num_documents", "weighted_sampler_alpha", "mmap_warmup", "num_workers"),
    *("vocab_file", "merge_file", "use_shared_fs", "accept_data_change"),
    # of this process, or measuring only
    *("rank", "local_rank", "user_script", "steps_per_print", "wall_clock_breakdown"),
    *("dump_state", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comms_logger"),
}
_VERSIONS_WITHOUT_NUMBERS = {"tokenizers", "xxhash", "neox-ledger"}


def describe_environment(
    environ: Mapping[str, str] = os.environ,
    *,
    device: str,
    num_threads: int,
    nodes: Sequence[str] = (),
    git_commit: str | None = None,
) -> dict[str, Any]:
    """Return machine, job and versions as plain values for ``attempts/NNNN.json``.

    Args:
        environ: environment variables; those of batch systems that name a job are kept.
        device: name of the accelerator, "cpu" without one.
        num_threads: threads a sum may be divided over.
        nodes: names of the machines with ranks, in the ranks' order.
        git_commit: of the code, if known.
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "git_commit": git_commit,
        "host": socket.gethostname(),
        "nodes": list(nodes),
        "pid": os.getpid(),
        LAUNCH: environ.get(LAUNCH_VARIABLE),
        "job": {name: environ[name] for name in _JOB_VARIABLES if name in environ},
        "cpu": _cpu_model(),
        "device": device,
        "num_threads": num_threads,
    }


def numerics_hash(
    config: Mapping[str, Any], topology: Topology, environment: Mapping[str, Any]
) -> str:
    """Return 16 hexadecimal digits; attempts with equal ones compute bitwise equal numbers.

    Everything counts that isn't known to leave numbers alone: a difference that doesn't matter only
    keeps losses from being compared.

    Args:
        config: every key, resolved.
        topology: of the attempt.
        environment: what :func:`describe_environment` gave.
    """
    declared = keys()
    acting = {
        name: value
        for name, value in config.items()
        if name not in _KEYS_WITHOUT_NUMBERS
        and not (name in declared and declared[name].group in _GROUPS_WITHOUT_NUMBERS)
    }
    if config.get("lr_decay_iters") is not None:
        # The learning rate then no longer follows from how long the run shall be.
        acting.pop("train_iters", None)
        acting.pop("train_epochs", None)
    versions = environment["versions"]
    values = {
        "config": acting,
        "topology": asdict(topology),
        "versions": {
            name: versions[name] for name in versions if name not in _VERSIONS_WITHOUT_NUMBERS
        },
        **{name: environment[name] for name in ("cpu", "device", "num_threads")},
    }
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
