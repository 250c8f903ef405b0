"""Which token comes next, given the logits (spec/cli.md §7)."""

import hashlib
from dataclasses import dataclass

import torch

__all__ = ["Sampling", "sample_generator"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. With all three at 0 the likeliest is taken."""

    temperature: float = 0.0  # logits are divided by it, unless it is 0
    top_k: int = 0  # only so many of the likeliest tokens; 0: all
    top_p: float = 0.0  # only the likeliest tokens that have this probability together; 0: all

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0 and self.top_k == 0 and self.top_p == 0

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """Return a token.

        Args:
            logits: float32, one per token of the vocabulary.
            generator: on the CPU.
        """
        if self.is_greedy:
            return int(logits.argmax())
        logits = logits.cpu()
        if self.temperature > 0:
            logits = logits / self.temperature
        if 0 < self.top_k < len(logits):
            smallest = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        if self.top_p > 0:
            logits = _nucleus(logits, self.top_p)
        return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


def sample_generator(seed: int, number: int) -> torch.Generator:
    """Return the generator of text ``number``: the same whichever ranks draw from it."""
    digest = hashlib.sha256(f"{seed}/sample/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the fewest likeliest tokens whose probability is more than ``top_p``; at least one."""
    ordered, places = logits.sort(descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1)
    before[0] = 0.0
    return logits.masked_fill(
        torch.zeros_like(logits, dtype=torch.bool).scatter(0, places, before > top_p),
        float("-inf"),
    )
