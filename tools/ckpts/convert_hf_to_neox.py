"""Write a Hugging Face GPTNeoXForCausalLM as a checkpoint that a run can start from.

The result holds weights alone: go on from it with `load: SAVE` and `finetune: true` (a new run), or
with `no_load_optim: true` (at its step).

Example:
    python tools/ckpts/convert_hf_to_neox.py hub/pythia-160m runs/pythia-160m --tp 2 --step 3000
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.base.errors import MegatronError
from megatron.checkpoint.hugging_face.download import local_directory
from megatron.checkpoint.hugging_face.to_neox import ImportSettings, import_model
from megatron.checkpoint.hugging_face.values import DTYPES


def main(input_args: Sequence[str] | None = None) -> None:
    """Run the tool with ``input_args``, or with the command line's.

    Raises:
        MegatronError: the model is damaged, or isn't one we know; nothing is written.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", help="a directory with config.json and weights, or a model's name on the hub"
    )
    parser.add_argument("save", type=Path, help="a new directory")
    parser.add_argument("--revision", help="of the hub's model, such as step3000")
    parser.add_argument("--tp", type=_size, default=1, help="model_parallel_size of the files")
    parser.add_argument(
        "--pp",
        type=_count,
        default=1,
        help="pipe_parallel_size; 0: a sequential module, others all read the same layer files",
    )
    parser.add_argument("--step", type=_count, default=0, help="the step the weights are of")
    parser.add_argument(
        "--bias-multiplicity",
        type=_size,
        help="tp_bias_multiplicity of runs from here: biases are divided by it",
    )
    parser.add_argument("--dtype", choices=[*DTYPES], help="the source's if not given")
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[], help="NeoX configuration to check and keep"
    )
    options = parser.parse_args(input_args)
    source = local_directory(options.source, options.revision)
    settings = ImportSettings(
        tensor_parallel_size=options.tp,
        step=options.step,
        uses_pipeline_engine=options.pp > 0,
        bias_multiplicity=options.bias_multiplicity,
        dtype=DTYPES.get(options.dtype),
        config_files=options.config,
    )
    written = import_model(source, options.save, settings)
    print(f"{written.path}: {written.num_files} files, {written.num_bytes:,} bytes")
    for notice in written.notices:
        print(f"note: {notice}")


def _size(text: str) -> int:
    if (size := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {size}")
    return size


def _count(text: str) -> int:
    if (count := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {count}")
    return count


if __name__ == "__main__":
    try:
        main()
    except MegatronError as error:
        sys.exit(f"error: {error}")
