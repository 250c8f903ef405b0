"""A resumed run equals one that was never stopped, to the last bit."""

import pytest
from deepspeed.accelerator import get_accelerator

from megatron.config.topology import Topology
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import run_ranks

SEQUENTIAL = {"uses_pipeline_engine": False}
BF16 = {"precision": "bfloat16"}
QUICK = {
    "one rank, fp32": TinySettings(Topology(1, 1, 1), dropout=0.1),
    "pipeline 2 x tensor 2, fp32": TinySettings(Topology(2, 1, 2), dropout=0.1),
    "pipeline 2, tied, bf16": TinySettings(Topology(2, 1, 1), dropout=0.1, tied=True, **BF16),
    "data 2, ZeRO 0, bf16": TinySettings(Topology(1, 2, 1), zero_stage=0, **BF16),
}
MATRIX = {
    "data 2, fp32": TinySettings(Topology(1, 2, 1), dropout=0.1),
    "tensor 2, fp32 accumulation": TinySettings(
        Topology(1, 1, 2), dropout=0.1, grad_accum_dtype="fp32", **BF16
    ),
    "tensor 2 without pipeline": TinySettings(Topology(1, 1, 2, **SEQUENTIAL), dropout=0.1),
    "one rank, ZeRO 0": TinySettings(Topology(1, 1, 1), zero_stage=0, dropout=0.1),
    "pipeline 2, ZeRO 0, clipped": TinySettings(Topology(2, 1, 1), zero_stage=0, clip=0.5),
    "data 2, ZeRO 2": TinySettings(Topology(1, 2, 1, **SEQUENTIAL), zero_stage=2, dropout=0.1),
    "data 2, ZeRO 3": TinySettings(Topology(1, 2, 1, **SEQUENTIAL), zero_stage=3, dropout=0.1),
    "bf16, ZeRO 0, no pipeline": TinySettings(
        Topology(1, 1, 1, **SEQUENTIAL), zero_stage=0, **BF16
    ),
    "pipeline 2, tied, learned positions": TinySettings(
        Topology(2, 1, 1), tied=True, overrides={"pos_emb": "learned", "rotary_dims": 0}
    ),
    "fp16": TinySettings(Topology(1, 1, 1), precision="fp16", dropout=0.1),
    "fp16, ZeRO 0": TinySettings(Topology(2, 1, 1), precision="fp16", zero_stage=0),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param(settings, id=name) for name, settings in QUICK.items()),
        *(
            pytest.param(settings, id=name, marks=pytest.mark.matrix)
            for name, settings in MATRIX.items()
        ),
    ],
)
def test_resuming_equals_not_having_stopped(settings, tmp_path, monkeypatch):
    # DeepSpeed refuses fp16 on the CPU; it works.
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)

    def undisturbed(context):
        run = TinyRun(context, settings)
        run.train(2)
        run.save(tmp_path / "save")
        return run.train(2), run.state()

    def resumed(context):
        run = TinyRun(context, settings)
        state = run.load(tmp_path / "save" / "global_step2")
        assert (state.iteration, state.notices) == (2, ())
        return run.train(2), run.state()

    world_size = settings.topology.world_size
    expected = run_ranks(undisturbed, world_size, tmp_path)
    assert run_ranks(resumed, world_size, tmp_path) == expected


@pytest.mark.distributed
def test_a_run_that_drops_its_random_state_says_so_and_one_without_any_is_refused(tmp_path):
    settings = TinySettings(Topology(1, 1, 1), dropout=0.1)

    def worker(context):
        run = TinyRun(context, settings)
        run.save(tmp_path / "save", saves_rng=False)
        directory = tmp_path / "save" / "global_step0"
        run.load(directory, restores_rng=False)
        with pytest.raises(Exception, match=r"no random_rng_state.*no_load_rng: true"):
            run.load(directory)

    run_ranks(worker, 1, tmp_path)


@pytest.mark.distributed
def test_changed_settings_of_the_optimizer_hold_and_are_named(tmp_path):
    before = TinySettings(Topology(1, 1, 1), weight_decay=0.1)
    after = TinySettings(Topology(1, 1, 1), weight_decay=0.01)

    def first(context):
        run = TinyRun(context, before)
        run.train(1)
        run.save(tmp_path / "save")

    def second(context):
        run = TinyRun(context, after)
        state = run.load(tmp_path / "save" / "global_step1")
        decays = [group["weight_decay"] for group in run.engine.optimizer.param_groups]
        return state.notices, decays

    run_ranks(first, 1, tmp_path)
    notices, decays = run_ranks(second, 1, tmp_path)[0]
    assert decays == [0.01, 0.0]
    assert notices == (
        "optimizer weight_decay: 0.1 in the checkpoint, 0.01 in the configuration, which holds "
        "from here on",
    )
