"""Released Pythia checkpoints: are they what they should be, and how to go on from one.

Example:
    python tools/pythia.py check step3000 --model pythia-160m-deduped --step 3000
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

from megatron.cli.pythia.main import main

if __name__ == "__main__":
    sys.exit(main())
