"""Keys of the tokenizer; its files are keys of the training group, as in NeoX."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.declare import WORKS, key, no_effect

__all__ = ["Tokenizer"]


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Which tokenizer the data was made with."""

    tokenizer_type: (
        Literal[
            "GPT2BPETokenizer",
            "HFTokenizer",
            "HFGPT2Tokenizer",
            "SPMTokenizer",
            "CharLevelTokenizer",
            "TiktokenTokenizer",
        ]
        | None
    ) = key("GPT2BPETokenizer", outcome=WORKS)
    """Kind of tokenizer. ``vocab_file`` (and ``merge_file`` for GPT-2's) say which one."""

    padded_vocab_size: int | None = key(
        None,
        unit="tokens",
        minimum=1,
        outcome=no_effect("it follows from the tokenizer, or stands in the checkpoint"),
    )
    """Rows of the embedding; not for configuration files. The tokenizer's size rounded up to a
    multiple of ``make_vocab_size_divisible_by`` x ``model_parallel_size`` when a run begins, and
    what its first checkpoint says ever after."""
