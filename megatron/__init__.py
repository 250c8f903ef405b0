"""GPT-NeoX-compatible training. The name `megatron` is shared with megatron-core's wheel."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)


def __getattr__(name: str) -> object:
    # NeoX's users write `from megatron import print_rank_0`; importing lazily keeps
    # `import megatron.config` free of torch.
    if name == "NeoXArgs":
        from megatron.neox_arguments import NeoXArgs

        return NeoXArgs
    if name == "print_rank_0":
        from megatron.base.printing import print_rank_0

        return print_rank_0
    raise AttributeError(f"module 'megatron' has no attribute {name!r}")
