"""Positions, norms and activations beyond Pythia's and Llama's, through stop and reshape."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_reshaped_runs import STOP, config, numbers, stopped
from tests.engine.test_topologies import TOPOLOGIES
from tests.engine.training_runs import run_training

pytestmark = pytest.mark.distributed

QUICK = {
    "ALiBi, window, GEGLU, ScaleNorm": (
        "TP2 x PP2",
        "one process",
        {
            "pos_emb": "alibi",
            "sliding_window_width": 5,
            "activation": "geglu",
            "mlp_multiple_of": 8,
            "norm": "scalenorm",
        },
    ),
}
MATRIX = {
    "relative positions": ("one process", "TP2", {"pos_emb": "rpe"}),
    "relative positions without a pipeline": ("sequential", "DP2", {"pos_emb": "rpe"}),
    "sinusoids, normed queries": (
        "PP2",
        "TP2",
        {"pos_emb": "sinusoidal", "use_qk_layernorm": True, "norm": "rmsnorm"},
    ),
    "saved frequencies, layer scaling, mish": (
        "TP2",
        "PP2",
        {
            "rotary_save_freqs_buffer": True,
            "apply_query_key_layer_scaling": True,
            "activation": "mish",
        },
    ),
    "no parameters in norms": ("DP2", "PP2", {"norm": "non_parametric_layernorm"}),
}


@pytest.mark.parametrize(
    ("source", "target", "changes"),
    [
        *(pytest.param(*case, id=name) for name, case in QUICK.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.matrix) for name, case in MATRIX.items()),
    ],
)
def test_a_variant_goes_on_at_another_topology(
    source: str, target: str, changes: dict[str, Any], tmp_path: Path
):
    undisturbed = run_training(
        config(tmp_path, "whole", **TOPOLOGIES[source], **changes), tmp_path / "whole-world"
    )
    first = stopped(tmp_path, "parts", **TOPOLOGIES[source], **changes)
    second = run_training(
        config(tmp_path, "parts", **TOPOLOGIES[target], **changes), tmp_path / "second"
    )
    assert len(first.records) == STOP
    assert numbers(first) + numbers(second) == numbers(undisturbed)
    assert first.losses + second.losses == pytest.approx(undisturbed.losses, rel=1e-5)
