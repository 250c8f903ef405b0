"""Our reshape on load agrees with DeepSpeed's universal checkpoint, wherever that one works.

DeepSpeed saves the same engine with its own writer, its converter rewrites that, and its loader
fills an engine at the other topology: none of our code touches the numbers on the way.
"""

import argparse
import contextlib
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.checkpoint import ds_to_universal

from megatron.config.topology import Topology
from tests.checkpoint import tiny_run
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import run_ranks

pytestmark = pytest.mark.distributed

BF16 = {"precision": "bfloat16"}
GROUPED_GATED = {"num_kv_heads": 2, "activation": "swiglu", "mlp_up_size": 512}
QUICK = {
    "pipeline 2 x tensor 2 -> data 2": (
        TinySettings(Topology(2, 1, 2), bias_multiplicity=2),
        Topology(1, 2, 1),
    ),
}
MATRIX = {
    "one -> tensor 2": (TinySettings(Topology(1, 1, 1)), Topology(1, 1, 2)),
    "tensor 2 -> pipeline 2": (TinySettings(Topology(1, 1, 2)), Topology(2, 1, 1)),
    "data 2 -> one": (TinySettings(Topology(1, 2, 1)), Topology(1, 1, 1)),
    "data 2 -> tensor 2": (TinySettings(Topology(1, 2, 1)), Topology(1, 1, 2)),
    "tied, pipeline 2 -> tensor 2": (
        TinySettings(Topology(2, 1, 1), tied=True),
        Topology(1, 1, 2),
    ),
    "grouped, gated, tensor 2 -> one": (
        TinySettings(Topology(1, 1, 2), overrides=GROUPED_GATED),
        Topology(1, 1, 1),
    ),
    "grouped, gated, one -> tensor 2": (
        TinySettings(Topology(1, 1, 1), overrides=GROUPED_GATED),
        Topology(1, 1, 2),
    ),
    "bf16, pipeline 2 -> tensor 2": (
        TinySettings(Topology(2, 1, 1), **BF16),
        Topology(1, 1, 2),
    ),
    "bf16, fp32 accumulation, tensor 2 -> data 2": (
        TinySettings(Topology(1, 1, 2), grad_accum_dtype="fp32", **BF16),
        Topology(1, 2, 1),
    ),
}


@pytest.mark.parametrize(
    ("settings", "topology"),
    [
        *(pytest.param(*case, id=name) for name, case in QUICK.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.matrix) for name, case in MATRIX.items()),
    ],
)
def test_masters_and_moments_are_those_of_the_universal_checkpoint(settings, topology, tmp_path):
    run_ranks(functools.partial(train_and_save, settings), settings.topology.world_size, tmp_path)
    source = tmp_path / "theirs" / "global_step2"
    for rank in range(settings.topology.tensor_parallel_size):
        # The converter insists on a file of layer 1, which holds no parameters in NeoX's numbering.
        torch.save({}, source / f"layer_01-model_{rank:02d}-model_states.pt")
    convert(source, tmp_path / "theirs" / "universal")
    target = TinySettings(**{**vars(settings), "topology": topology})
    ours = run_ranks(functools.partial(load_ours, target), topology.world_size, tmp_path)
    theirs = run_ranks(functools.partial(load_theirs, target), topology.world_size, tmp_path)
    for rank, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert sorted(one) == sorted(other)
        for name, tensor in one.items():
            assert np.array_equal(tensor, other[name]), f"rank {rank}: {name}"


def train_and_save(settings: TinySettings, context: Any) -> None:
    run = TinyRun(context, settings)
    run.train(2)
    run.save(context.tmp_path / "ours")
    run.module.universal_checkpoint_info = universal_info(settings)
    run.engine.save_checkpoint(str(context.tmp_path / "theirs"), tag="global_step2")


def load_ours(settings: TinySettings, context: Any) -> dict[str, np.ndarray]:
    run = TinyRun(context, settings)
    run.load(context.tmp_path / "ours" / "global_step2")
    return held(run)


def load_theirs(settings: TinySettings, context: Any) -> dict[str, np.ndarray]:
    use_universal()
    run = TinyRun(context, settings)
    path, _ = run.engine.load_checkpoint(str(context.tmp_path / "theirs"), tag="universal")
    assert path is not None
    return held(run)


def use_universal() -> None:
    """Have this process's engines load universal checkpoints from now on."""
    plain = tiny_run.deepspeed_settings
    tiny_run.deepspeed_settings = lambda *values, **named: {
        **plain(*values, **named),
        "checkpoint": {"load_universal": True},
    }


def held(run: TinyRun) -> dict[str, np.ndarray]:
    """Return the fp32 copies and moments that this rank updates, and its weights."""
    state = run.engine.optimizer.state_dict()
    tensors = {
        f"weight {name}": parameter.detach().clone()
        for name, parameter in run.module.named_parameters()
    }
    for group, master in enumerate(state["single_partition_of_fp32_groups"]):
        tensors[f"master {group}"] = master.detach().clone()
    for number, entry in state["base_optimizer_state"]["state"].items():
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[f"{kind} {number}"] = entry[kind].clone()
        tensors[f"step {number}"] = torch.tensor(float(entry["step"]))
    # Arrays: a tensor on its way to another process is lost when this one ends.
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def convert(source: Path, destination: Path) -> None:
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(destination),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


def universal_info(settings: TinySettings) -> dict[str, Any]:
    """Return how our pipelines' tensors are divided, in the words of DeepSpeed's converter."""
    model = settings.model
    embedding = r"tied_modules\.embed\.word_embeddings\.weight"
    vocabulary = [embedding] if model.tied_embedding else [r"0\.word_emb.*", r"\d+\.final_linear.*"]
    info: dict[str, Any] = {
        "universal_checkpoint_version": 0.2,
        # Rows of padding have been trained: none may be cut off.
        "original_vocab_size": model.padded_vocab_size,
        "vocabulary_parameter_patterns": vocabulary,
        "tp_replicated_parameter_patterns": [
            r"\d+\.(input_layernorm|post_attention_layernorm|norm)\..*",
            r"\d+\.attention\.dense\.bias",
            r"\d+\.mlp\.linear2\.bias",
        ],
        "parameter_with_row_parallelism_patterns": [
            r"\d+\.attention\.dense\.weight",
            r"\d+\.mlp\.linear2\.weight",
        ],
    }
    if model.tied_embedding:
        info["pipeline_replicated_parameter_patterns"] = [embedding]
    if model.is_gated:
        info["parameter_with_2_sub_params_cat_dim_0"] = [r"\d+\.mlp\.linear1\..*"]
    if model.is_grouped_query:
        queries = model.num_attention_heads * model.head_size
        keys = model.num_kv_heads * model.head_size
        sizes = (queries, keys, keys)
        info["parameter_with_sub_params"] = [
            {
                "patterns": [r"\d+\.attention\.query_key_value\.weight"],
                "shape": (sizes, model.hidden_size),
                "partition_dim": 0,
            },
            {
                "patterns": [r"\d+\.attention\.query_key_value\.bias"],
                "shape": (sizes,),
                "partition_dim": 0,
            },
        ]
    return info
