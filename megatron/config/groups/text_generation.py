"""Keys of generate.py and eval.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.declare import WORKS, Outcome, key, no_effect, part_of

__all__ = ["Textgen"]


def _generation(value: Any, keys: Mapping[str, Any]) -> Outcome:
    """no effect on training; generate.py reads it."""
    if Path(keys["user_script"] or "").name == "generate.py":
        return WORKS
    return no_effect("only generate.py reads it, not training")


def _evaluation(value: Any, keys: Mapping[str, Any]) -> Outcome:
    """no effect on training; eval.py reads it."""
    if Path(keys["user_script"] or "").name == "eval.py":
        return WORKS
    return no_effect("only eval.py reads it, not training")


@dataclass(frozen=True, kw_only=True)
class Textgen:
    """How text is generated, and which tasks are evaluated."""

    text_gen_type: str | None = key(None, outcome=_generation)
    """``unconditional``, ``input-file`` or ``interactive``; ``precompute`` isn't there yet. Unset:
    from the input file if there is one, else unconditional."""

    precompute_model_name: str | None = key(
        None, tier=3, outcome=part_of("text_gen_type: precompute")
    )
    """Name under which precomputed log-probabilities are stored."""

    temperature: float | None = key(0.0, tier=2, minimum=0, outcome=_generation)
    """Sampling temperature. 0, with ``top_k`` and ``top_p`` 0, picks the likeliest token."""

    top_p: float | None = key(0.0, tier=2, minimum=0, maximum=1, outcome=_generation)
    """Sample among the likeliest tokens that have this probability together; 0 is off."""

    top_k: int | None = key(0, tier=2, unit="tokens", minimum=0, outcome=_generation)
    """Sample among so many likeliest tokens; 0 is off."""

    return_logits: bool | None = key(False, tier=2, outcome=_generation)
    """Write logits beside the text."""

    maximum_tokens: int | None = key(64, tier=2, unit="tokens", minimum=1, outcome=_generation)
    """New tokens at most."""

    prompt_end: str | None = key("\n", tier=2, outcome=_generation)
    """What separates prompts."""

    sample_input_file: str | None = key(None, tier=2, outcome=_generation)
    """File with prompts."""

    sample_output_file: str | None = key("samples.txt", tier=2, outcome=_generation)
    """File for generated text, one JSON object per line."""

    num_samples: int | None = key(1, tier=2, minimum=1, outcome=_generation)
    """Texts to generate without a prompt."""

    recompute: bool | None = key(False, tier=2, outcome=_generation)
    """Run the whole text again for every token instead of keeping keys and values."""

    eval_results_prefix: str | None = key("", tier=2, outcome=_evaluation)
    """Start of the result file's name."""

    eval_tasks: list[str] | None = key(None, tier=2, outcome=_evaluation)
    """Tasks of lm-eval, by name or by the path of a task's YAML file."""
