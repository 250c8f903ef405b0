"""Rewrite a checkpoint for another number of GPUs, offline.

Not needed to go on training: a launch reads checkpoints of any topology. It is for what reads
files by itself, and for handing weights back to NeoX (--for-neox).

Example:
    python tools/ckpts/reshape.py runs/pythia/global_step1000 runs/pythia-tp4 --tp 4 --pp 2
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.base.errors import MegatronError
from megatron.checkpoint.reshape.configured import configured_model
from megatron.checkpoint.reshape.offline import (
    ReshapeSettings,
    find_checkpoint,
    reshape_checkpoint,
)
from megatron.config.topology import Topology


def main(input_args: Sequence[str] | None = None) -> None:
    """Run the tool with ``input_args``, or with the command line's.

    Raises:
        MegatronError: the source is damaged or doesn't fit; nothing is written.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a global_stepN, or a directory with `latest`")
    parser.add_argument("destination", type=Path, help="a new directory")
    parser.add_argument("--tp", type=_size, required=True, help="model_parallel_size")
    parser.add_argument(
        "--pp", type=_size_or_none, required=True, help="pipe_parallel_size; 0: no pipeline"
    )
    parser.add_argument("--dp", type=_size, help="data-parallel ranks; the source's if not given")
    parser.add_argument(
        "--for-neox", action="store_true", help="weights alone, so that NeoX reads the same model"
    )
    parser.add_argument(
        "--vocab-size",
        type=_size,
        help="entries of the tokenizer, for --for-neox without its files",
    )
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[], help="instead of the source's configs/"
    )
    options = parser.parse_args(input_args)
    source = find_checkpoint(options.source)
    model = configured_model(source, options.config)
    topology = Topology(
        pipeline_parallel_size=max(1, options.pp),
        data_parallel_size=options.dp or model.data_parallel_size,
        tensor_parallel_size=options.tp,
        uses_pipeline_engine=options.pp > 0,
    )
    settings = ReshapeSettings(
        model=model.settings,
        topology=topology,
        partition_method=model.config.parallelism.pipe_partition_method,
        for_neox=model.for_neox(options.tp, options.vocab_size) if options.for_neox else None,
    )
    reshaped = reshape_checkpoint(source, options.destination, settings)
    print(
        f"{reshaped.checkpoint}: {reshaped.num_files} files, {reshaped.num_bytes:,} bytes, for "
        f"pipe_parallel_size {options.pp}, model_parallel_size {options.tp}, "
        f"{topology.data_parallel_size} data-parallel ranks"
    )
    for notice in reshaped.notices:
        print(f"note: {notice}")


def _size(text: str) -> int:
    if (size := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {size}")
    return size


def _size_or_none(text: str) -> int:
    if (size := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {size}")
    return size


if __name__ == "__main__":
    try:
        main()
    except MegatronError as error:
        sys.exit(f"error: {error}")
