"""Text from a model, token by token, on all ranks of one copy of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megatron.engine.sampling import Sampling
from megatron.engine.stage_forward import StageForward
from megatron.model.key_value_cache import KeyValueCache, use_cache

__all__ = ["Generated", "GenerationLimits", "generate"]


@dataclass(frozen=True)
class GenerationLimits:
    """Where a text ends."""

    maximum_tokens: int  # new ones
    seq_length: int  # of prompt and new tokens together
    eod: int | None  # the token that ends a text
    vocab_size: int  # tokens from here on stand for no text: rows that pad the embedding
    recompute: bool = False  # run the whole text again for each token


@dataclass(frozen=True)
class Generated:
    """One text."""

    tokens: list[int]  # without prompt and without the token that ended it
    is_finished: bool  # it came to its end by itself
    seconds: float
    logits: list[list[float]] = field(default_factory=list)  # of each new token, if wanted


def generate(
    forward: StageForward,
    prompt: Sequence[int],
    limits: GenerationLimits,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    keeps_logits: bool = False,
    is_over: Callable[[list[int]], bool] = lambda tokens: False,
) -> Generated:
    """Go on with ``prompt``. All ranks of the model's copy call it alike.

    Args:
        forward: the model.
        prompt: at least one token.
        limits: where to stop.
        sampling: how tokens are chosen.
        generator: drawn from on the last stage's first tensor rank.
        keeps_logits: whether logits are returned, on the last stage.
        is_over: whether the new tokens so far end the text.

    Raises:
        ValueError: the prompt is empty, or leaves no room within ``seq_length``.
    """
    room = limits.seq_length - len(prompt)
    if not prompt or room < 1:
        raise ValueError(
            f"a prompt must have 1 to {limits.seq_length - 1} tokens (seq_length - 1), "
            f"not {len(prompt)}"
        )
    started = time.perf_counter()
    cache = None if limits.recompute else KeyValueCache()
    use_cache(forward.module, cache)
    text, kept, is_finished = list(prompt), [], False
    device = next(forward.module.parameters()).device
    try:
        for _ in range(min(limits.maximum_tokens, room)):
            news = text if cache is None else text[cache.past :]
            logits = forward.logits(torch.tensor([news], device=device), only_last=True)
            if cache is not None:
                cache.advance(len(news))
            chosen = None
            if logits is not None:
                of_tokens = logits[0, -1, : limits.vocab_size]
                chosen = [sampling.choose(of_tokens, generator)]
            (token,) = forward.from_last_stage(chosen, 1)
            if token == limits.eod:
                is_finished = True
                break
            text.append(token)
            if keeps_logits and logits is not None:
                kept.append(logits[0, -1, : limits.vocab_size].tolist())
            if is_over(text[len(prompt) :]):
                break
    finally:
        use_cache(forward.module, None)
    return Generated(text[len(prompt) :], is_finished, time.perf_counter() - started, kept)
