"""A run goes on at any topology with the masters and moments it had, to the last bit."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed.accelerator import get_accelerator

from megatron.config.topology import Topology
from tests.checkpoint.reshaped import TOPOLOGIES, begin, resume
from tests.checkpoint.tiny_run import TinySettings

pytestmark = pytest.mark.distributed

PAIRS = list(itertools.permutations(TOPOLOGIES, 2))
QUICK_PAIRS = [("TP2 x PP2", "DP2"), ("DP2 ZeRO 0", "TP2")]


@pytest.fixture(scope="module", autouse=True)
def fp16_on_the_cpu():
    # DeepSpeed refuses it; it works.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Return a function that begins a run once, whoever asks."""
    runs: dict[TinySettings, tuple[Path, dict[str, Any]]] = {}

    def once(settings: TinySettings) -> tuple[Path, dict[str, Any]]:
        name = repr(settings)
        if name not in runs:
            directory = tmp_path_factory.mktemp("begun")
            runs[name] = directory, begin(settings, directory)
        return runs[name]

    return once


def assert_same(tensors: Any, expected: Any, kinds: tuple[str, ...]) -> None:
    chosen = {key for key in expected if key[0] in kinds}
    assert {key for key in tensors if key[0] in kinds} == chosen
    assert {key[0] for key in chosen} == set(kinds)
    different = [key for key in sorted(chosen) if not np.array_equal(tensors[key], expected[key])]
    assert different == []


def assert_goes_on(
    source: TinySettings, target: TinySettings, begun: Any, tmp_path: Path, *, rel: float
) -> None:
    """Go from one topology to another and back."""
    directory, original = begun(source)
    there = resume(target, directory, tmp_path / "there")
    state = ("master", "exp_avg", "exp_avg_sq")
    is_same_precision = source.precision == target.precision
    assert_same(there["tensors"], original["tensors"], state + ("weight",) * is_same_precision)
    assert there["losses"] == pytest.approx(original["losses"], rel=rel)
    back = resume(source, tmp_path / "there", tmp_path / "back", steps=0)
    assert_same(back["tensors"], original["tensors"], (*state, "weight"))
    if source.overrides.get("pos_emb") == "learned" and source.tied:
        return  # the last stage's unused copy of the positions was nowhere in between
    # Everything else too, as each rank's own optimizer, schedule and engine hold it.
    keeps_scale = source.precision == target.precision == "fp16"
    expected = original["states"]
    assert _compared(back["states"], keeps_scale) == _compared(expected, keeps_scale)


def _compared(states: list[dict[str, Any]], keeps_scale: bool) -> list[dict[str, Any]]:
    """Return the ranks' states without the loss scale, if something in between has none."""
    if keeps_scale:
        return states
    without = ("loss_scaler", "cur_scale", "cur_iter", "last_overflow_iter")
    return [
        {
            **state,
            "optimizer": {
                key: value for key, value in state["optimizer"].items() if key not in without
            },
        }
        for state in states
    ]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(*pair, marks=() if pair in QUICK_PAIRS else pytest.mark.matrix)
        for pair in PAIRS
    ],
)
def test_any_topology_goes_on_at_any_other(source: str, target: str, begun: Any, tmp_path: Path):
    assert_goes_on(TOPOLOGIES[source], TOPOLOGIES[target], begun, tmp_path, rel=1e-5)


LLAMA = {
    "num_kv_heads": 2,
    "activation": "swiglu",
    "mlp_up_size": 96,
    "mlp_down_size": 48,
    "norm": "rmsnorm",
    "gpt_j_residual": False,
    "tp_bias_multiplicity": 1,
}
SIMULTANEOUS = {"gpt_j_residual": True, "bias_multiplicity": 2}
BF16 = {"precision": "bfloat16"}
MODELS: dict[str, dict[str, Any]] = {
    "tied embedding": {"tied": True},
    "grouped query, gated": {"overrides": LLAMA},
    "learned positions, tied": {
        "tied": True,
        "overrides": {"pos_emb": "learned", "rotary_dims": 0},
    },
    "biases that count twice": SIMULTANEOUS,
    "one residual after the other": {"gpt_j_residual": False},
    "a vocabulary of 307": {"padded_vocab_size": 307},
    "a tied vocabulary of 307": {"padded_vocab_size": 307, "tied": True},
    "no weight decay": {"weight_decay": 0.0},
    "clipped": {"clip": 0.3},
    "everything at once": {
        "tied": True,
        "padded_vocab_size": 307,
        "overrides": {**LLAMA, "num_kv_heads": 4},
        "clip": 0.3,
    },
}
MOVES = [
    ("1 process", "TP2 x PP2"),
    ("TP2", "DP2"),
    ("TP2 x PP2", "PP2"),
    ("PP2", "DP2 ZeRO 0"),
    ("DP2 ZeRO 0", "TP2 x PP2"),
    ("DP2", "TP2"),
]
QUICK_MODELS = {
    ("everything at once", "TP2 x PP2", "PP2"),
    ("biases that count twice", "TP2", "DP2"),
}


@pytest.mark.parametrize(
    ("model", "source", "target"),
    [
        pytest.param(
            model,
            *move,
            marks=() if (model, *move) in QUICK_MODELS else pytest.mark.matrix,
        )
        for model in MODELS
        for move in MOVES
    ],
)
def test_any_model_is_divided_otherwise(
    model: str, source: str, target: str, begun: Any, tmp_path: Path
):
    changes = MODELS[model]
    assert_goes_on(
        replace(TOPOLOGIES[source], **changes),
        replace(TOPOLOGIES[target], **changes),
        begun,
        tmp_path,
        rel=1e-5,
    )


# Beyond the six: other sizes, no pipeline, ZeRO 2, and every optimizer DeepSpeed wraps around ours.
SEQUENTIAL = {"uses_pipeline_engine": False}
OTHERS = {
    "1 process": TOPOLOGIES["1 process"],
    "TP2 x PP2": TOPOLOGIES["TP2 x PP2"],
    "sequential": replace(TOPOLOGIES["1 process"], topology=Topology(1, 1, 1, **SEQUENTIAL)),
    "sequential ZeRO 0": replace(
        TOPOLOGIES["1 process"], topology=Topology(1, 1, 1, **SEQUENTIAL), zero_stage=0
    ),
    "sequential TP2 ZeRO 0": replace(
        TOPOLOGIES["TP2"], topology=Topology(1, 1, 2, **SEQUENTIAL), zero_stage=0
    ),
    "sequential DP2 ZeRO 2": replace(
        TOPOLOGIES["DP2"], topology=Topology(1, 2, 1, **SEQUENTIAL), zero_stage=2
    ),
    "PP2 ZeRO 0": replace(TOPOLOGIES["PP2"], zero_stage=0),
    "PP3": replace(TOPOLOGIES["PP2"], topology=Topology(3, 1, 1)),
    "TP4": replace(TOPOLOGIES["TP2"], topology=Topology(1, 1, 4)),
    "DP2 x TP2": replace(TOPOLOGIES["DP2"], topology=Topology(1, 2, 2)),
    "DP2 x PP2": replace(TOPOLOGIES["DP2"], topology=Topology(2, 2, 1)),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": BF16,
    "bf16, fp32 gradients": {**BF16, "grad_accum_dtype": "fp32"},
    "fp16": {"precision": "fp16"},
}
ROUNDED = 2e-2  # relative difference of losses where sums are rounded to 8 bits
QUICK_OTHERS = [
    ("bf16", "PP2 ZeRO 0", "DP2 x TP2"),
    ("fp16", "sequential ZeRO 0", "DP2 x PP2"),
]


def is_possible(precision: str, settings: TinySettings) -> bool:
    """Whether DeepSpeed has an optimizer for it: summing bf16 in fp32 needs ZeRO 1."""
    return precision != "bf16, fp32 gradients" or settings.zero_stage == 1


@pytest.mark.parametrize(
    ("precision", "source", "target"),
    [
        pytest.param(
            precision,
            source,
            target,
            marks=() if (precision, source, target) in QUICK_OTHERS else pytest.mark.matrix,
        )
        for precision in PRECISIONS
        # Each one once as source and once as target, and the quick ones.
        for source, target in {
            **dict.fromkeys(zip(OTHERS, [*list(OTHERS)[4:], *list(OTHERS)[:4]], strict=True)),
            **dict.fromkeys(quick[1:] for quick in QUICK_OTHERS),
        }
        if is_possible(precision, OTHERS[source]) and is_possible(precision, OTHERS[target])
    ],
)
def test_any_optimizer_of_deepspeeds_goes_on_as_any_other(
    precision: str, source: str, target: str, begun: Any, tmp_path: Path
):
    changes = PRECISIONS[precision]
    assert_goes_on(
        replace(OTHERS[source], **changes),
        replace(OTHERS[target], **changes),
        begun,
        tmp_path,
        rel=1e-5 if precision == "fp32" else ROUNDED,
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(*pair, marks=() if pair == ("fp32", "bf16") else pytest.mark.matrix)
        for pair in itertools.permutations(PRECISIONS, 2)
    ],
)
@pytest.mark.parametrize("names", [("TP2 x PP2", "DP2")])
def test_another_precision_keeps_the_masters_and_rounds_the_weights(
    before: str, after: str, names: tuple[str, str], begun: Any, tmp_path: Path
):
    source = replace(TOPOLOGIES[names[0]], **PRECISIONS[before])
    target = replace(TOPOLOGIES[names[1]], **PRECISIONS[after])
    assert_goes_on(source, target, begun, tmp_path, rel=ROUNDED)
