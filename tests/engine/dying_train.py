"""train.py for ranks that kill themselves: in the step after the one $DIES_AFTER names."""

import os
import signal
from pathlib import Path

from megatron.cli.train import train
from megatron.config.transport import load_transported
from megatron.engine.distributed import rank_environment
from tests.engine.interrupted_runs import last_recorded_step


def main() -> None:
    """Train until the step is recorded, then SIGKILL."""
    config = load_transported()
    save = Path(str(config.training.save))

    def die(loss: float) -> None:
        if last_recorded_step(save) >= int(os.environ["DIES_AFTER"]):
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, rank_environment(), on_loss=die)


if __name__ == "__main__":
    main()
