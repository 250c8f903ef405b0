"""What we write has no structural problem, at every topology, precision and ZeRO stage."""

import pytest

from megatron.checkpoint.stored_values import value_problems
from megatron.checkpoint.structure import examine, torch_files
from megatron.config.topology import Topology
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import run_ranks

KINDS = {
    "DP2": TinySettings(Topology(1, 2, 1)),
    "ZeRO 0": TinySettings(Topology(1, 2, 1), zero_stage=0),
    "bf16 at stage 0": TinySettings(Topology(1, 2, 1), precision="bfloat16", zero_stage=0),
    "bf16": TinySettings(Topology(1, 2, 1), precision="bfloat16"),
    "tied PP2": TinySettings(Topology(2, 1, 1), tied=True),
    "tied PP2 at stage 0": TinySettings(Topology(2, 1, 1), tied=True, zero_stage=0),
    "sequential TP2": TinySettings(Topology(1, 1, 2, uses_pipeline_engine=False)),
    "ZeRO 3": TinySettings(Topology(1, 2, 1, uses_pipeline_engine=False), zero_stage=3),
    "a vocabulary that doesn't divide": TinySettings(Topology(1, 1, 2), padded_vocab_size=321),
}


REPRESENTATIVES = ("ZeRO 3", "bf16 at stage 0", "tied PP2 at stage 0")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in REPRESENTATIVES else pytest.mark.matrix)
        for kind in KINDS
    ],
)
def test_what_we_write_is_whole(kind, tmp_path):
    settings = KINDS[kind]

    def worker(context):
        run = TinyRun(context, settings)
        run.train(1)
        run.save(tmp_path / "save")

    run_ranks(worker, 2, tmp_path)
    structure = examine(tmp_path / "save" / "global_step1")
    assert (structure.problems, structure.notes) == ([], [])
    names = torch_files(structure.checkpoint)
    assert value_problems(structure.checkpoint, names) == []
