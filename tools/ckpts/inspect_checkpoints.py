"""What a checkpoint, or one of its files, holds: without running anything in it.

Example:
    python tools/ckpts/inspect_checkpoints.py runs/pythia/global_step1000
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.cli.checkpoints.inspect import main

if __name__ == "__main__":
    sys.exit(main())
