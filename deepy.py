#!/usr/bin/env python
"""Start a script on every rank: ``python deepy.py [options] train.py CONFIG.yml ...``."""

import sys

from megatron.cli.deepy import main

if __name__ == "__main__":
    sys.exit(main())
