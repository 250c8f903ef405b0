"""NeoX's small recorded runs: losses and evaluations, step by step."""

from pathlib import Path

import pytest

from tests.engine.golden_runs import golden_config, golden_run
from tests.engine.test_neox_runs import evaluations
from tests.engine.training_runs import run_training

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "name",
    [
        *("pp1", "pp0", "z1", "dp2", "noloss", "llama_gqa", "tied_learned", "tp2pp2"),
        *("rpe_sliding_pp1", "sinus_tiedln_biasgelu"),
    ],
)
def test_fp32_runs(name: str, tmp_path: Path):
    trained = run_training(golden_config(name, tmp_path), tmp_path)
    golden = golden_run(name)
    assert trained.losses == pytest.approx(golden["losses"], rel=1e-5)
    expected = [
        value for key, _, value in golden["logged"] if key in ("validation/lm_loss", "test/lm_loss")
    ]
    assert expected
    assert evaluations(trained.printed)[: len(expected)] == pytest.approx(expected, rel=1e-5)


def test_without_a_pipeline_neox_forgets_the_window(tmp_path: Path):
    config = golden_config("rpe_sliding", tmp_path)
    assert config["sliding_window_width"] == 4
    golden = golden_run("rpe_sliding")["losses"]
    whole = run_training(config | {"sliding_window_width": None}, tmp_path)
    assert whole.losses == pytest.approx(golden, rel=1e-5)


@pytest.mark.parametrize("name", ["bf16", "bf16pp1"])
def test_bfloat16_runs(name: str, tmp_path: Path):
    trained = run_training(golden_config(name, tmp_path), tmp_path)
    assert trained.losses == pytest.approx(golden_run(name)["losses"], rel=2e-3)
