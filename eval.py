"""``eval.py`` of GPT-NeoX: known, not there yet."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.base.errors import ConfigError
from megatron.cli.exit_status import end_rank, run_command


def main(
    input_args: Sequence[str] | None = None, overwrite_values: Mapping[str, Any] | None = None
) -> None:
    """Refuse: this command comes with a later release.

    Raises:
        ConfigError: always.
    """
    raise ConfigError("eval.py is known to NeoX, not supported here yet; train.py is")


if __name__ == "__main__":
    end_rank(run_command(main))
