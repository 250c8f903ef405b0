"""The floor of restart.py: a rank that imports what training can't do without, and says when.

It leaves the time in $NEOX_FLOOR_OUT/rankN.
"""

import os
import time
from pathlib import Path

import deepspeed  # noqa: F401
import megatron.core.tensor_parallel  # noqa: F401
import torch  # noqa: F401

if __name__ == "__main__":
    folder = Path(os.environ["NEOX_FLOOR_OUT"])
    new = folder / f"new{os.environ['RANK']}"
    new.write_text(str(time.time()))
    new.rename(folder / f"rank{os.environ['RANK']}")
