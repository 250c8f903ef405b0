"""``generate.py``: text from a trained model (spec/cli.md §7)."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import ConfigError
from megatron.base.printing import print_rank_0
from megatron.cli.inference_model import InferenceModel, open_model
from megatron.config.run_config import RunConfig
from megatron.config.transport import load_transported
from megatron.engine.agreement import together
from megatron.engine.distributed import ProcessGroups, RankEnvironment, connect, rank_environment
from megatron.engine.generation import GenerationLimits, generate
from megatron.engine.sampling import Sampling, sample_generator

__all__ = ["generate_texts", "main"]

_PROMPT = "Context prompt >>> "
_NOTHING = "WARNING: text generation did not start; try different batching or adjust parameters"


def main(
    input_args: Sequence[str] | None = None, overwrite_values: Mapping[str, Any] | None = None
) -> None:
    """Generate text as the transported configuration says; NeoX's entry point.

    Args:
        input_args: command line, ``sys.argv[1:]`` if None: what ``deepy.py`` passes to ranks.
        overwrite_values: keys that win over the configuration.
    """
    generate_texts(load_transported(input_args, overwrite_values), rank_environment())


def generate_texts(config: RunConfig, environment: RankEnvironment) -> None:
    """Generate on this rank, together with all others of ``environment``.

    Raises:
        ConfigError: the kind of generation isn't known, or a prompt file can't be read.
        CheckpointError: there is no good checkpoint.
    """
    groups = connect(environment, config.topology, backend=config.other.distributed_backend)
    kind = config.text_generation.text_gen_type
    prompts = together(groups, lambda: _prompts(config, kind))
    model = open_model(config, groups)
    writer = _Writer(config, groups, model)
    if prompts is None:
        writer.converse()
    else:
        writer.write(prompts)


def _prompts(config: RunConfig, kind: str | None) -> list[str] | None:
    """Return the texts to go on with; an empty one means: from nothing. None: ask for them."""
    keys = config.text_generation
    if kind == "interactive":
        return None
    if kind == "unconditional":
        return [""] * keys.num_samples
    if kind == "input-file":
        if not keys.sample_input_file:
            raise ConfigError("text_gen_type is input-file, but sample_input_file is not set (-i)")
        try:
            text = Path(keys.sample_input_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"sample_input_file can't be read: {error}") from error
        prompts = [part.strip() for part in text.split(keys.prompt_end)]
        if not any(prompts):
            raise ConfigError(f"sample_input_file {keys.sample_input_file} holds no prompt")
        return [prompt for prompt in prompts if prompt]
    raise ConfigError(
        f"text_gen_type={kind!r} is not supported; use unconditional, input-file or interactive"
    )


class _Writer:
    """Goes on with prompts, and says or writes what came."""

    def __init__(self, config: RunConfig, groups: ProcessGroups, model: InferenceModel) -> None:
        keys = config.text_generation
        self._keys = keys
        self._groups = groups
        self._model = model
        self._seed = config.other.seed
        self._sampling = Sampling(keys.temperature, keys.top_k, keys.top_p)
        self._limits = GenerationLimits(
            maximum_tokens=keys.maximum_tokens,
            seq_length=config.model.seq_length,
            eod=model.tokenizer.eod,
            vocab_size=min(model.tokenizer.vocab_size, model.settings.padded_vocab_size),
            recompute=bool(keys.recompute),
        )

    def write(self, prompts: Sequence[str]) -> None:
        """Write one JSON object per prompt; data-parallel ranks share the prompts."""
        records: list[dict[str, Any]] = []
        ranks = self._groups.topology.data_parallel_size
        for first in range(0, len(prompts), ranks):
            round_ = prompts[first : first + ranks]
            own = self._groups.place.data_parallel_rank
            record = self._record(round_[own], first + own) if own < len(round_) else None
            records += self._of_all_copies(record)[: len(round_)]
        path = Path(self._keys.sample_output_file)
        together(self._groups, lambda: self._groups.rank == 0 and _write(path, records))
        print_rank_0(f"wrote {len(records)} texts to {path}")

    def converse(self) -> None:
        """Ask for a prompt, answer, ask again, until the input ends."""
        number = 0
        while True:
            prompt = self._groups.from_rank_0(
                _ask(self._keys.prompt_end) if self._groups.rank == 0 else None
            )
            if prompt is None:
                return
            if prompt:
                record = self._of_all_copies(self._record(prompt, number))[0]
                answer = record["text"] if record["text"] is not None else record["message"]
                print_rank_0(f"Generated Text: {answer}")
                number += 1

    def _record(self, prompt: str, number: int) -> dict[str, Any]:
        tokenizer = self._model.tokenizer
        tokens = tokenizer.tokenize(prompt) if prompt else [self._start()]
        record: dict[str, Any] = {
            "context": prompt,
            "text": None,
            "length": 0,
            "finished": False,
            "message": None,
            "duration_seconds": 0.0,
        }
        room = self._limits.seq_length - 1
        if not 1 <= len(tokens) <= room:
            return record | {
                "message": f"WARNING: the prompt has {len(tokens)} tokens; the model reads at most "
                f"{room} (seq_length - 1)"
            }
        generated = generate(
            self._model.forward,
            tokens,
            self._limits,
            self._sampling,
            sample_generator(self._seed, number),
            keeps_logits=bool(self._keys.return_logits),
        )
        record |= {
            "length": len(generated.tokens),
            "finished": generated.is_finished,
            "duration_seconds": generated.seconds,
        }
        if generated.tokens:
            record["text"] = tokenizer.detokenize(generated.tokens)
        else:
            record["message"] = _NOTHING
        if self._keys.return_logits:
            record["logits"] = generated.logits
        return record

    def _start(self) -> int:
        if self._model.tokenizer.eod is None:
            raise ConfigError(
                "the tokenizer has no end-of-document token to begin a text with; use input-file"
            )
        return self._model.tokenizer.eod

    def _of_all_copies(self, record: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Return every copy's record, by data-parallel rank: the last stage knows the logits."""
        topology = self._groups.topology
        place = self._groups.place
        is_teller = self._model.forward.is_last and place.tensor_parallel_rank == 0
        told = self._groups.gather(
            (place.data_parallel_rank, record) if is_teller and record is not None else None
        )
        found = dict(one for one in told if one is not None)
        return [found[rank] for rank in range(topology.data_parallel_size) if rank in found]


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_atomically(path, "".join(lines).encode())


def _ask(prompt_end: str) -> str | None:
    """Return the next prompt from standard input; None at its end."""
    print(_PROMPT, end="", flush=True)  # noqa: T201 - a conversation
    lines: list[str] = []
    for line in _lines():
        lines.append(line)
        text = "".join(lines)
        if text.endswith(prompt_end):
            return text.removesuffix(prompt_end).strip()
    rest = "".join(lines).strip()
    return rest or None


def _lines() -> Iterator[str]:
    read: Callable[[], str] = sys.stdin.readline
    return iter(read, "")
