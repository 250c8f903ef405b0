"""``train.py``, made slow enough to be hit: every step is followed by a pause.

The pause, in seconds, is what the file ``pause`` beside the run's ``save`` says, also meanwhile.
"""

import functools
import runpy
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
_LOOKS_EVERY_S = 0.1


def _train_slowly(train: Any, config: Any, *others: Any, **named: Any) -> Any:
    pause = Path(config.training.save).parent / "pause"
    named["on_loss"] = lambda loss: _rest(pause)
    return train(config, *others, **named)


def _rest(pause: Path) -> None:
    began = time.monotonic()
    while (left := began + float(pause.read_text()) - time.monotonic()) > 0.0:
        time.sleep(min(left, _LOOKS_EVERY_S))


def main() -> None:
    """Run the real train.py with a slower ``train``."""
    import megatron.cli.train as command  # takes seconds, which tests needn't wait for

    command.train = functools.partial(_train_slowly, command.train)
    runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
