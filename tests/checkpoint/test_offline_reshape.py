"""A checkpoint rewritten offline is the one that a run at the new topology would have written."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from megatron.base.errors import CheckpointError, ConfigError
from megatron.checkpoint.parameter_state import open_parameter_states
from megatron.checkpoint.reshape import offline
from megatron.checkpoint.reshape.offline import (
    ReshapeSettings,
    find_checkpoint,
    reshape_checkpoint,
)
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.structure import structural_problems
from megatron.config.topology import Topology
from megatron.ledger.manifest import digest_problems, quick_problems, read_manifest
from tests.checkpoint.tiny_run import TinyRun, TinySettings, as_batch
from tests.worlds import WorldFailed, run_ranks

ONE = Topology(1, 1, 1)
SEQUENTIAL = Topology(1, 1, 1, uses_pipeline_engine=False)
BF16 = {"precision": "bfloat16"}
TIED_GATED = {
    "tied": True,
    "overrides": {"num_kv_heads": 2, "activation": "swiglu", "mlp_up_size": 512},
}
# 321 rows: two ranks don't share them evenly, and none of them is beyond what was trained.
ODD_VOCABULARY = {"padded_vocab_size": 321, "bias_multiplicity": 2}

SOURCES = {
    "one rank": TinySettings(ONE),
    "tensor 2": TinySettings(Topology(1, 1, 2), bias_multiplicity=2),
    "pipeline 2, tied, grouped, gated": TinySettings(Topology(2, 1, 1), **TIED_GATED),
    "data 2": TinySettings(Topology(1, 2, 1), gradient_accumulation_steps=1),
    "one rank, ZeRO 0": TinySettings(ONE, zero_stage=0, **ODD_VOCABULARY),
    "pipeline 2, bf16, ZeRO 0": TinySettings(Topology(2, 1, 1), zero_stage=0, **BF16),
}
MATRIX_SOURCES = {
    "data 2, bf16, fp32 accumulation": TinySettings(
        Topology(1, 2, 1), grad_accum_dtype="fp32", gradient_accumulation_steps=1, **BF16
    ),
    "bf16": TinySettings(Topology(1, 1, 2), **BF16),
    "fp16": TinySettings(ONE, precision="fp16"),
    "fp16, ZeRO 0": TinySettings(Topology(2, 1, 1), precision="fp16", zero_stage=0),
    "sequential": TinySettings(Topology(1, 1, 2, uses_pipeline_engine=False)),
    "sequential, bf16, ZeRO 0": TinySettings(SEQUENTIAL, zero_stage=0, **BF16),
    "pipeline 2 x tensor 2": TinySettings(Topology(2, 1, 2), **ODD_VOCABULARY),
    "no decay": TinySettings(Topology(2, 1, 1), weight_decay=0.0),
}
RANDOM_STATES = {
    "random_rng_state",
    "np_rng_state",
    "torch_rng_state",
    "cuda_rng_state",
    "rng_tracker_states",
}

pytestmark = pytest.mark.distributed


def cases(quick: Mapping[str, Any], matrix: Mapping[str, Any]) -> list[Any]:
    return [
        *(pytest.param(value, id=name) for name, value in quick.items()),
        *(pytest.param(value, id=name, marks=pytest.mark.matrix) for name, value in matrix.items()),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that trains two steps, once for each settings, and returns where."""
    type(get_accelerator()).is_fp16_supported = lambda self: True
    done: dict[str, Path] = {}

    def source(settings: TinySettings) -> Path:
        key = repr(settings)
        if key not in done:
            directory = tmp_path_factory.mktemp("trained")

            def worker(context):
                run = TinyRun(context, settings)
                run.train(2, lambda step: global_batches(run, step))
                run.save(directory / "save")

            run_ranks(worker, settings.topology.world_size, directory)
            done[key] = directory / "save" / "global_step2"
        return done[key]

    return source


def global_batches(run: TinyRun, step: int) -> Any:
    """Yield this rank's part of a batch that is the same at every topology."""
    size, rank = run.settings.topology.data_parallel_size, run.groups.place.data_parallel_rank
    for micro_step in range(run.settings.gradient_accumulation_steps):
        generator = np.random.default_rng([step, micro_step * size + rank])
        yield as_batch(generator.integers(0, 300, size=(4, run.settings.seq_length + 1)))


def at(settings: TinySettings, topology: Topology) -> TinySettings:
    """Return the same run at another topology, with the same global batch."""
    batches = settings.gradient_accumulation_steps * settings.topology.data_parallel_size
    return dataclasses.replace(
        settings,
        topology=topology,
        gradient_accumulation_steps=batches // topology.data_parallel_size,
    )


def reshaped(source: Path, destination: Path, settings: TinySettings, topology: Topology) -> Path:
    wanted = ReshapeSettings(model=settings.model, topology=topology)
    return reshape_checkpoint(source, destination, wanted).checkpoint


def content(checkpoint: Path) -> dict[str, Any]:
    """Return everything in a checkpoint's torch files that doesn't belong to its writer's ranks."""
    values: dict[str, Any] = {}
    for path in sorted(checkpoint.glob("*.pt")):
        file = torch.load(path, weights_only=False)  # our own file, of a second ago
        if path.name.startswith("mp_rank"):
            for key in (*RANDOM_STATES, "reshaped_from"):
                file.pop(key, None)
            if any(checkpoint.glob("bf16_zero*")):
                file["optimizer"] = None  # DeepSpeed keeps rank 0's part twice at ZeRO 0
        flatten(file, path.name, values)
    return values


def flatten(value: Any, name: str, into: dict[str, Any]) -> None:
    if torch.is_tensor(value):
        into[name] = (str(value.dtype), value.requires_grad, value.detach())
    elif isinstance(value, Mapping):
        into[name] = type(value).__name__
        for key, inner in value.items():
            flatten(inner, f"{name}/{key}", into)
    elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        into[name] = (type(value).__name__, len(value))
        for index, inner in enumerate(value):
            flatten(inner, f"{name}/{index}", into)
    else:
        into[name] = vars(value) if hasattr(value, "cur_scale") else value


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        if isinstance(value, tuple) and torch.is_tensor(value[-1]):
            assert other[name][:2] == value[:2], name
            assert torch.equal(other[name][2], value[2]), name
        else:
            assert other[name] == value, name


def merged_state(checkpoint: Path, settings: TinySettings) -> dict[str, torch.Tensor]:
    states = open_parameter_states(StoredCheckpoint(checkpoint), settings.model)
    return {
        f"{layer}.{name} {kind}": states.part(layer, name, kind, size=1, rank=0).clone()
        for layer, name in states.names
        for kind in ("master", "exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize("settings", cases(SOURCES, MATRIX_SOURCES))
def test_there_and_back_again_every_file_holds_what_the_run_wrote(settings, trained, tmp_path):
    source = trained(settings)
    away = Topology(2, 2, 2)
    if settings.topology == away:
        away = Topology(1, 1, 4)
    there = reshaped(source, tmp_path / "there", settings, away)
    sequential = Topology(1, 1, 2, uses_pipeline_engine=False)
    further = reshaped(there, tmp_path / "further", settings, sequential)
    back = reshaped(further, tmp_path / "back", settings, settings.topology)
    assert_same(content(source), content(back))
    for checkpoint in (there, further, back):
        manifest = read_manifest(checkpoint)
        assert quick_problems(checkpoint, manifest) == []
        assert digest_problems(checkpoint, manifest, manifest.files) == []
        assert structural_problems(checkpoint) == []


QUICK_TARGETS = {
    "pipeline 2, tied, grouped, gated": Topology(1, 1, 2),
    "data 2": SEQUENTIAL,
    "one rank, ZeRO 0": Topology(1, 1, 2),
}
MATRIX_TARGETS = {
    "one rank": Topology(1, 1, 2),
    "tensor 2": Topology(2, 1, 1),
    "pipeline 2, bf16, ZeRO 0": Topology(1, 2, 1),
    "data 2, bf16, fp32 accumulation": Topology(1, 1, 2),
    "fp16": Topology(1, 2, 1),
    "fp16, ZeRO 0": Topology(1, 1, 2),
    "sequential, bf16, ZeRO 0": Topology(2, 1, 1),
    "pipeline 2 x tensor 2": Topology(1, 2, 1),
}


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        *QUICK_TARGETS.items(),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in MATRIX_TARGETS.items()),
    ],
)
def test_a_run_at_the_new_topology_goes_on_from_it(name, topology, trained, tmp_path):
    settings = (SOURCES | MATRIX_SOURCES)[name]
    source = trained(settings)
    target = at(settings, topology)
    checkpoint = reshaped(source, tmp_path / "reshaped", settings, topology)

    def went_on(context):
        run = TinyRun(context, settings)
        run.load(source)
        return run.train(3, lambda step: global_batches(run, step))

    def goes_on(context):
        run = TinyRun(context, target)
        state = run.load(checkpoint)
        run.save(tmp_path / "again")
        losses = run.train(3, lambda step: global_batches(run, step))
        return state.iteration, losses

    expected = run_ranks(went_on, settings.topology.world_size, tmp_path)[0]
    for iteration, losses in run_ranks(goes_on, topology.world_size, tmp_path):
        assert iteration == 2
        tolerance = 1e-5 if settings.precision == "fp32" else 5e-3
        assert losses == pytest.approx(expected, rel=tolerance)
    again = merged_state(tmp_path / "again" / "global_step2", target)
    for key, tensor in merged_state(source, settings).items():
        assert torch.equal(tensor, again[key]), key


def test_a_damaged_source_is_refused_and_nothing_is_left(trained, tmp_path):
    source = tmp_path / "damaged" / "global_step2"
    shutil.copytree(trained(SOURCES["one rank"]), source)
    path = source / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"is damaged, so nothing was written: zero_pp_rank_0"
    ):
        reshaped(source, tmp_path / "reshaped", SOURCES["one rank"], Topology(1, 1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_an_existing_destination_is_refused(trained, tmp_path):
    with pytest.raises(CheckpointError, match=r"exists already; name a directory that doesn't"):
        reshaped(trained(SOURCES["one rank"]), tmp_path, SOURCES["one rank"], Topology(1, 1, 2))


def test_sizes_that_do_not_divide_the_model_are_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"num_attention_heads \(4\) must be a multiple of"):
        reshaped(
            trained(SOURCES["one rank"]), tmp_path / "x", SOURCES["one rank"], Topology(1, 1, 3)
        )


def test_more_stages_than_layers_are_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"stage \d+ of 9 would hold no parameters"):
        reshaped(
            trained(SOURCES["one rank"]), tmp_path / "x", SOURCES["one rank"], Topology(9, 1, 1)
        )


def test_a_save_directory_stands_for_its_latest_checkpoint(trained, tmp_path):
    source = trained(SOURCES["one rank"])
    assert find_checkpoint(source.parent) == find_checkpoint(source) == source
    with pytest.raises(CheckpointError, match=r"is no global_stepN and holds no `latest`"):
        find_checkpoint(tmp_path)


def test_random_states_are_left_out_and_the_writer_is_named(trained, tmp_path):
    settings = SOURCES["tensor 2"]
    result = reshape_checkpoint(
        trained(settings),
        tmp_path / "reshaped",
        ReshapeSettings(model=settings.model, topology=ONE),
    )
    metadata = torch.load(result.checkpoint / "mp_rank_00_model_states.pt", weights_only=False)
    assert not RANDOM_STATES & set(metadata)
    assert metadata["reshaped_from"]["model_parallel_size"] == 2
    assert any("random states are left out" in notice for notice in result.notices)
    ledger = json.loads((result.checkpoint / "ledger.json").read_text())
    assert ledger["model"]["tensor_parallel_size"] == 1
    assert ledger["model"]["tp_bias_multiplicity"] == 2
    assert (result.checkpoint.parent / "latest").read_text() == "global_step2"


@pytest.mark.parametrize("files_written", [0, 3, 12])
def test_a_killed_reshape_leaves_no_destination_and_can_be_repeated(
    files_written, trained, tmp_path
):
    settings, topology = SOURCES["one rank"], Topology(1, 1, 2)
    source = trained(settings)

    def killed(context):
        write, count = offline.write_streamed_file, itertools.count()

        def write_or_die(*values):
            if next(count) == files_written:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*values)

        offline.write_streamed_file = write_or_die
        reshaped(source, tmp_path / "reshaped", settings, topology)

    with pytest.raises(WorldFailed, match="killed by a signal"):
        run_ranks(killed, 1, tmp_path)
    assert not (tmp_path / "reshaped").exists()
    checkpoint = reshaped(source, tmp_path / "reshaped", settings, topology)
    assert structural_problems(checkpoint) == []


def test_a_disk_that_refuses_is_named_and_nothing_is_left(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(offline, "write_latest", full)
    with pytest.raises(CheckpointError, match=r"reshaped could not be written: .*No space left"):
        reshaped(
            trained(SOURCES["one rank"]),
            tmp_path / "reshaped",
            SOURCES["one rank"],
            Topology(1, 1, 2),
        )
    assert list(tmp_path.iterdir()) == []
