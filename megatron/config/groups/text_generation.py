"""Keys of generate.py and eval.py."""

from dataclasses import dataclass

from megatron.config.declare import key, no_effect, refused

__all__ = ["Textgen"]

_GENERATION = no_effect("only generate.py reads it, not training")
_EVALUATION = no_effect("only eval.py reads it, not training")


@dataclass(frozen=True, kw_only=True)
class Textgen:
    """How text is generated, and which tasks are evaluated."""

    text_gen_type: str | None = key(None, outcome=_GENERATION)
    """``unconditional``, ``input-file``, ``interactive`` or ``precompute``. Unset: from the input
    file if there is one, else unconditional."""

    precompute_model_name: str | None = key(None, tier=3, outcome=_GENERATION)
    """Name under which precomputed log-probabilities are stored."""

    temperature: float | None = key(0.0, tier=2, minimum=0, outcome=_GENERATION)
    """Sampling temperature. 0, with ``top_k`` and ``top_p`` 0, picks the likeliest token."""

    top_p: float | None = key(0.0, tier=2, minimum=0, maximum=1, outcome=_GENERATION)
    """Sample among the likeliest tokens that have this probability together; 0 is off."""

    top_k: int | None = key(0, tier=2, unit="tokens", minimum=0, outcome=_GENERATION)
    """Sample among so many likeliest tokens; 0 is off."""

    return_logits: bool | None = key(False, tier=2, outcome=_GENERATION)
    """Write logits beside the text."""

    maximum_tokens: int | None = key(64, tier=2, unit="tokens", minimum=1, outcome=_GENERATION)
    """New tokens at most."""

    prompt_end: str | None = key("\n", tier=2, outcome=_GENERATION)
    """What separates prompts."""

    sample_input_file: str | None = key(None, tier=2, outcome=_GENERATION)
    """File with prompts."""

    sample_output_file: str | None = key("samples.txt", tier=2, outcome=_GENERATION)
    """File for generated text, one JSON object per line."""

    num_samples: int | None = key(1, tier=2, minimum=1, outcome=_GENERATION)
    """Texts to generate without a prompt."""

    recompute: bool | None = key(False, tier=2, outcome=_GENERATION)
    """Run the whole text again for every token instead of keeping keys and values."""

    eval_results_prefix: str | None = key("", tier=2, outcome=_EVALUATION)
    """Start of the result file's name."""

    eval_tasks: list[str] | None = key(None, tier=2, outcome=refused("leave it out when training"))
    """Tasks of lm-eval."""
