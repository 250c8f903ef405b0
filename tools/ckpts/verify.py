"""Is a checkpoint good? NeoX's or ours, offline, without running anything in it.

Example:
    python tools/ckpts/verify.py runs/pythia
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.cli.checkpoints.verify import main

if __name__ == "__main__":
    sys.exit(main())
