"""NeoX's name for training, for scripts written for it; the work is in ``megatron.cli.train``."""

from typing import Any

from megatron.cli.train import train
from megatron.config.transport import encode_payloads, load_transported
from megatron.engine.distributed import rank_environment
from megatron.engine.loop import StopReason
from megatron.neox_arguments import NeoXArgs

__all__ = ["collect_loss_for_unit_test", "pretrain"]


def pretrain(neox_args: NeoXArgs) -> StopReason:
    """Train as ``neox_args`` says, from building the model to the last evaluation."""
    config = load_transported(encode_payloads(neox_args.all_config))
    return train(config, rank_environment(), on_loss=lambda loss: collect_loss_for_unit_test(loss))


def collect_loss_for_unit_test(lm_loss: Any) -> None:
    """Do nothing. Called with every step's loss; NeoX's users' tests patch it."""
