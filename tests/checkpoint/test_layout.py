"""What we write has NeoX's layout, key by key."""

import json
from pathlib import Path

import pytest

from megatron.config.topology import Topology
from tests.checkpoint.layout import Layout, recorded_layout, written_layout
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import run_ranks

LISTINGS = Path(__file__).parents[1] / "data" / "checkpoint" / "layout"
TWO = {"padded_vocab_size": 384, "bias_multiplicity": 2}
CASES = {
    "a": TinySettings(Topology(1, 1, 1)),
    "a_bf16": TinySettings(Topology(1, 1, 1), precision="bfloat16", grad_accum_dtype="fp32"),
    "a_z0": TinySettings(Topology(1, 1, 1), zero_stage=0),
    "b": TinySettings(Topology(2, 1, 2), **TWO),
    "b_z0": TinySettings(Topology(2, 1, 2), zero_stage=0, **TWO),
    "c1": TinySettings(Topology(1, 2, 2), **TWO),
    "c0": TinySettings(Topology(1, 2, 2, uses_pipeline_engine=False), **TWO),
    "c0_z0": TinySettings(Topology(1, 2, 2, uses_pipeline_engine=False), zero_stage=0, **TWO),
}
QUICK = ("a", "a_bf16", "a_z0", "b", "c0")

# DeepSpeed's own copy of the configuration is as the user wrote it.
NOT_COMPARED = "ds_config"


def comparable(layout: Layout) -> Layout:
    return {path: kind for path, kind in layout.items() if NOT_COMPARED not in path[:-1]}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        case if case in QUICK else pytest.param(case, marks=pytest.mark.matrix)
        for case in sorted(CASES)
    ],
)
def test_files_keys_shapes_and_types_are_those_of_neox(case, tmp_path):
    settings = CASES[case]

    def save_after_a_step(context):
        run = TinyRun(context, settings)
        run.train(1)
        return run.save(tmp_path / "save")

    saved = set(run_ranks(save_after_a_step, settings.topology.world_size, tmp_path))
    assert saved == {tmp_path / "save" / "global_step1"}
    directory = saved.pop()
    wanted = comparable(recorded_layout(LISTINGS / f"{case}.txt"))
    written = comparable(written_layout(directory))
    assert {path[0] for path in written} == {path[0] for path in wanted}
    different = {
        path: (kind, written.get(path))
        for path, kind in wanted.items()
        if written.get(path) != kind
    }
    assert not different
    unknown_tensors = [
        path for path, kind in written.items() if kind.startswith("Tensor") and path not in wanted
    ]
    assert not unknown_tensors
    assert (directory / "configs" / "tiny.yml").read_text() == "train_iters: 20\n"
    assert (tmp_path / "save" / "latest").read_text() == "global_step1"
    assert json.loads((directory / "ledger.json").read_text()) == {
        "model": {
            "padded_vocab_size": settings.padded_vocab_size,
            "tp_bias_multiplicity": settings.bias_multiplicity,
            "tensor_parallel_size": settings.topology.tensor_parallel_size,
        }
    }
