"""NeoX's name for the tokenizers; ours is `megatron.data.tokenizers`."""

from typing import Any

from megatron.base.printing import print_rank_0
from megatron.data import tokenizers

__all__ = ["build_tokenizer"]


def build_tokenizer(args: Any) -> tokenizers.Tokenizer:
    """Return the tokenizer of ``args`` and set ``args.padded_vocab_size``, as NeoX's function does.

    Args:
        args: any object with NeoX's keys tokenizer_type, vocab_file, merge_file,
            make_vocab_size_divisible_by and model_parallel_size as attributes.
    """
    tokenizer = tokenizers.build_tokenizer(args.tokenizer_type, args.vocab_file, args.merge_file)
    args.padded_vocab_size = tokenizers.padded_vocab_size(
        tokenizer.vocab_size, args.make_vocab_size_divisible_by, args.model_parallel_size
    )
    print_rank_0(
        f"> {args.tokenizer_type}: {tokenizer.vocab_size} tokens, "
        f"padded to {args.padded_vocab_size}"
    )
    return tokenizer
