"""Every error a caller may want to handle.

    MegatronError
    ├── ConfigError         the configuration cannot be used (also a ValueError)
    ├── LaunchError         hosts, slots or processes are not as asked for
    ├── DatasetError        a dataset or index map is missing, damaged or not what was declared
    ├── CheckpointError     a checkpoint is missing, damaged or does not fit
    └── RunDirectoryError   the save directory is in use, or does not say what it must

A message says what is wrong, the numbers, where (file, key, step, rank) and what to do next.
A bad argument of a function is an ordinary ValueError.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "LaunchError",
    "MegatronError",
    "RunDirectoryError",
]


class MegatronError(Exception):
    """Root of our errors."""

    teller: int | None = None
    """Of an error that all ranks raise together, the rank that tells the user; None: each its own.
    """
    exit_code: int | None = None
    """Status of a process that ends by it, if it isn't the usual one."""


class ConfigError(MegatronError, ValueError):
    """The configuration cannot be used; ``problems`` holds one message per mistake."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        if len(problems) == 1:
            super().__init__(problems[0])
        else:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            super().__init__(f"{len(problems)} problems in the configuration:\n{lines}")


class LaunchError(MegatronError):
    """Hosts, slots or processes are not as the configuration asks for."""


class DatasetError(MegatronError):
    """A dataset or an index map is missing, damaged, or not what was declared."""


class CheckpointError(MegatronError):
    """A checkpoint is missing, damaged, or does not fit the model or topology."""


class RunDirectoryError(MegatronError):
    """The save directory is in use by another job, or its files contradict each other."""
