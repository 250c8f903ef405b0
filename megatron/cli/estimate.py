"""What a configuration comes to: parameters, FLOPs, memory per rank, steps per data shard."""

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.base.errors import ConfigError, MegatronError
from megatron.config.load import load_config
from megatron.config.outcomes import check_launch
from megatron.config.run_config import RunConfig
from megatron.data.tokenizers import build_tokenizer, padded_vocab_size
from megatron.engine.memory import Memory, TrainingShape, memory_of_stage
from megatron.engine.throughput import ModelShape, flops_per_step
from megatron.model.facts import ModelFacts
from megatron.model.parameter_shapes import Shapes, parameter_shapes
from megatron.model.settings import ModelSettings
from megatron.stream.index_file import read_index
from megatron.stream.shard_layout import lay_out

__all__ = ["Estimate", "estimate", "main"]

# Entries of the tokenizers that configurations without a vocabulary at hand are meant for.
_USUAL_VOCABULARY = {"GPT2BPETokenizer": 50257, "HFTokenizer": 50277, "SPMTokenizer": 32000}
_GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """What a configuration comes to."""

    parameters: int  # of the model, embedding included; a table that blocks share counts once
    padded_vocab_size: int
    topology: dict[str, int]
    batch: dict[str, int]  # samples: micro batch, accumulation, global batch
    tokens_per_step: int
    flops_per_step: float  # over all ranks
    memory_by_stage: list[Memory]  # of one rank
    shards: list[dict[str, Any]]  # of every dataset that is there
    assumed: list[str]

    @property
    def largest(self) -> Memory:
        """The memory of the stage that needs most."""
        return max(self.memory_by_stage, key=lambda memory: memory.total)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit status: 0, or 2 if the configuration is no good."""
    parser = argparse.ArgumentParser(
        prog="estimate.py", description="Tell what a configuration comes to, without any GPU."
    )
    parser.add_argument("config", nargs="+", help="configuration files, as for deepy.py")
    parser.add_argument("--world-size", type=int, required=True, help="ranks (GPUs)")
    parser.add_argument("--vocab-size", type=int, help="tokenizer entries, if it isn't at hand")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    try:
        found = estimate(options.config, options.world_size, vocab_size=options.vocab_size)
    except MegatronError as error:
        print(f"estimate: {error}", file=sys.stderr)  # noqa: T201 - a command's own output
        return 2
    text = json.dumps(asdict(found), indent=2) if options.json else _described(found)
    print(text)  # noqa: T201 - a command's own output
    return 0


def estimate(
    configs: Sequence[str],
    world_size: int,
    *,
    vocab_size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Estimate:
    """Return what ``configs`` come to on ``world_size`` ranks.

    Args:
        configs: files; ``.yml`` is added to a name without suffix.
        world_size: ranks.
        vocab_size: tokenizer entries, if the tokenizer isn't at hand.
        overrides: keys that win over the files.

    Raises:
        ConfigError: they are no good, or the ranks don't fit them.
    """
    paths = [name if name.endswith((".yml", ".json")) else f"{name}.yml" for name in configs]
    config = load_config(
        paths,
        {**(overrides or {}), "global_num_gpus": world_size},
        local_slots=lambda: world_size,
        environ={},
    )
    check_launch(config)
    assumed: list[str] = []
    size = config.topology.tensor_parallel_size
    rows = padded_vocab_size(
        vocab_size or _vocabulary(config, assumed), config.model.make_vocab_size_divisible_by, size
    )
    settings = ModelSettings.from_config(
        config.model, config.training, ModelFacts(rows, 1), neox_version=config.ledger.neox_version
    )
    settings.require_divisible(size)
    geometry = config.geometry
    whole = parameter_shapes(settings)
    return Estimate(
        parameters=_count(whole, settings),
        padded_vocab_size=rows,
        topology={
            "ranks": world_size,
            "pipeline": max(1, config.topology.pipeline_parallel_size),
            "data": config.topology.data_parallel_size,
            "tensor": size,
        },
        batch={
            "micro_batch_size": geometry.micro_batch_size,
            "gradient_accumulation_steps": geometry.gradient_accumulation_steps,
            "train_batch_size": geometry.global_batch_size,
        },
        tokens_per_step=geometry.global_batch_size * settings.seq_length,
        flops_per_step=flops_per_step(
            ModelShape(settings.num_layers, settings.hidden_size, settings.seq_length, rows),
            geometry.global_batch_size,
            recomputes=bool(config.training.checkpoint_activations),
        ),
        memory_by_stage=_memory(config, settings),
        shards=list(_shards(config, geometry.global_batch_size * settings.seq_length, assumed)),
        assumed=assumed,
    )


def _vocabulary(config: RunConfig, assumed: list[str]) -> int:
    kind = config.tokenizer.tokenizer_type
    files = config.training.vocab_file, config.training.merge_file
    if files[0] and Path(files[0]).exists():
        return build_tokenizer(kind, *files).vocab_size
    if kind not in _USUAL_VOCABULARY:
        raise ConfigError(f"vocab_file {files[0]} isn't there; say --vocab-size for a {kind}")
    assumed.append(f"{_USUAL_VOCABULARY[kind]} tokenizer entries: vocab_file isn't there")
    return _USUAL_VOCABULARY[kind]


def _count(layers: dict[int, Shapes], settings: ModelSettings) -> int:
    shared = (settings.num_layers - 1) if settings.pos_emb == "rpe" else 0
    table = settings.rpe_num_buckets * settings.num_attention_heads
    total = sum(math.prod(shape) for shapes in layers.values() for shape in shapes.values())
    return total - shared * table


def _memory(config: RunConfig, settings: ModelSettings) -> list[Memory]:
    topology = config.topology
    stages = max(1, topology.pipeline_parallel_size)
    layers = parameter_shapes(settings, tensor_parallel_size=topology.tensor_parallel_size)
    bounds = _bounds(layers, settings.num_layers, stages, config)
    memory = []
    for stage, (first, last) in enumerate(itertools.pairwise(bounds)):
        held = {index: shapes for index, shapes in layers.items() if first <= index < last}
        if settings.tied_embedding and stages > 1 and stage == stages - 1:
            held[settings.num_layers + 4] = layers[0]
        shape = TrainingShape(
            micro_batch_size=config.geometry.micro_batch_size,
            tensor_parallel_size=topology.tensor_parallel_size,
            data_parallel_size=topology.data_parallel_size,
            micro_batches_in_flight=min(
                stages - stage, config.geometry.gradient_accumulation_steps
            ),
            is_half=config.model.precision != "fp32",
            zero_stage=config.get("zero_stage") or 0,
            recomputes=bool(config.training.checkpoint_activations),
        )
        memory.append(memory_of_stage(held, settings, shape))
    return memory


def _bounds(
    layers: dict[int, Shapes], num_layers: int, stages: int, config: RunConfig
) -> list[int]:
    if stages == 1:
        return [0, num_layers + 5]
    with contextlib.redirect_stdout(
        sys.stderr
    ):  # DeepSpeed has something to say, and takes seconds
        from megatron.engine.stage_bounds import stage_bounds

        return stage_bounds(layers, num_layers, stages, config.parallelism.pipe_partition_method)


def _shards(config: RunConfig, tokens_per_step: int, assumed: list[str]) -> Any:
    """Yield, for every training dataset, how many shards it has and how long one lasts."""
    data = config.training
    prefixes = [data.data_path] if data.data_path else list(data.train_data_paths or [])
    for prefix in dict.fromkeys(prefixes):
        if not os.path.exists(f"{prefix}.idx"):
            assumed.append(f"{prefix} isn't there: nothing is said of its shards")
            continue
        index = read_index(Path(f"{prefix}.idx"))
        shards = lay_out(prefix, index)
        tokens = [(shard.stop - shard.start) / index.dtype.itemsize for shard in shards]
        yield {
            "dataset": prefix,
            "shards": len(shards),
            "tokens": round(sum(tokens)),
            "steps_per_shard": statistics.mean(tokens) / tokens_per_step,
            "steps_per_epoch": sum(tokens) / tokens_per_step,
        }


def _described(found: Estimate) -> str:
    topology, batch = found.topology, found.batch
    lines = [
        f"parameters        {found.parameters:,} (vocabulary {found.padded_vocab_size:,})",
        f"ranks             {topology['ranks']} = pipeline {topology['pipeline']} x data "
        f"{topology['data']} x tensor {topology['tensor']}",
        f"batch             {batch['train_batch_size']:,} samples = micro batch "
        f"{batch['micro_batch_size']} x accumulation {batch['gradient_accumulation_steps']} x "
        f"{topology['data']} data-parallel ranks; {found.tokens_per_step:,} tokens",
        f"FLOPs per step    {found.flops_per_step:.3e} over all ranks",
        "memory per rank   parameters + gradients + optimizer + activations, in GiB (kernels' "
        "scratch isn't in it)",
    ]
    for stage, memory in enumerate(found.memory_by_stage):
        parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations)
        sizes = " + ".join(f"{part / _GIB:.2f}" for part in parts)
        lines.append(f"  stage {stage:<3}       {sizes} = {memory.total / _GIB:.2f}")
    for shard in found.shards:
        lines.append(
            f"data              {shard['dataset']}: {shard['shards']} shards, one lasts "
            f"{shard['steps_per_shard']:.2f} steps if read once in order, an epoch "
            f"{shard['steps_per_epoch']:,.1f}"
        )
    lines += [f"assumed           {one}" for one in found.assumed]
    return "\n".join(lines)
