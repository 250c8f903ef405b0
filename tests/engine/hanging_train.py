"""train.py for ranks of which one gets stuck: $HANGS is its number and the step."""

import os
import time

from megatron.cli.train import train
from megatron.config.transport import load_transported
from megatron.engine.distributed import rank_environment


def get_stuck() -> None:
    """Wait for something that doesn't come."""
    time.sleep(600)


def main() -> None:
    """Train until the step is done."""
    config, environment = load_transported(), rank_environment()
    rank, step = map(int, os.environ["HANGS"].split())
    losses: list[float] = []

    def hang(loss: float) -> None:
        losses.append(loss)
        if (environment.rank, len(losses)) == (rank, step):
            get_stuck()

    train(config, environment, on_loss=hang)


if __name__ == "__main__":
    main()
