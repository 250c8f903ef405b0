"""Ask a run what it trained on, and what a launch would do: ``neox-ledger`` without an install.

Example:
    python tools/ledger.py step 1000 --run runs/pythia
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

from megatron.cli.ledger.main import main

if __name__ == "__main__":
    sys.exit(main())
