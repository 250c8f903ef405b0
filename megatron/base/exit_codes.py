"""The exit statuses of a launch and of its ranks. 128 + N: ended by signal N."""

from typing import Final

__all__ = ["CANNOT_LAUNCH", "FAILED", "FINISHED", "HUNG", "NODE_LOST", "STOPPED"]

FINISHED: Final = 0
FAILED: Final = 1
CANNOT_LAUNCH: Final = 2  # nothing was started: the user has to change something
STOPPED: Final = 75  # told to stop; everything is saved, the same command goes on
HUNG: Final = 76
NODE_LOST: Final = 77
