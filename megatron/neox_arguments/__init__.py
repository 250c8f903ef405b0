"""NeoX's name for the configuration; ours is ``megatron.config``."""

from megatron.neox_arguments.arguments import NeoXArgs

__all__ = ["NeoXArgs"]
