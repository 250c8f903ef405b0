"""A loaded model as lm-eval's: likelihoods and texts, over all ranks.

Every rank runs lm-eval on the same tasks and so asks for the same things in the same order.
Data-parallel copies share the requests, and every rank gets all answers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron.base.errors import ConfigError
from megatron.cli.inference_model import InferenceModel
from megatron.engine.distributed import ProcessGroups
from megatron.engine.generation import GenerationLimits, generate
from megatron.engine.sampling import Sampling, sample_generator

__all__ = ["NeoXModel"]

_MAX_NEW_TOKENS = 256  # where a task doesn't say; lm-eval's own default for its models
_TOGETHER = 64  # requests between two exchanges of answers


class NeoXModel(TemplateLM):
    """What lm-eval asks of a model.

    Args:
        model: the loaded model.
        groups: of this rank.
        seed: of sampled texts.
    """

    def __init__(self, model: InferenceModel, groups: ProcessGroups, *, seed: int) -> None:
        super().__init__()
        self._model = model
        self._groups = groups
        self._seed = seed
        self._seq_length = model.settings.seq_length

    @property
    def eot_token_id(self) -> int:
        """The token that stands before a text without context.

        Raises:
            ConfigError: the tokenizer has none.
        """
        if self._model.tokenizer.eod is None:
            raise ConfigError(
                "the tokenizer has no end-of-document token, which lm-eval puts before texts "
                "without context; use one that has"
            )
        return self._model.tokenizer.eod

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the tokens of a text; special ones are never added."""
        return self._model.tokenizer.tokenize(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._shared(requests, lambda number, request: self._score(request[1], request[2]))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of ``seq_length`` tokens."""

        def score(number: int, request: Instance) -> float:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._seq_length,
                context_len=1,
            )
            return sum(self._score(*make_disjoint_window(window))[0] for window in windows)

        return self._shared(requests, score)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return texts that end before the first of a request's stop strings."""
        return self._shared(requests, self._text)

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Return the continuation's log-likelihood, and whether it is what greedy choice gives.

        Only the last stage knows; the other ranks return anything.
        """
        tokens = (context + continuation)[-(self._seq_length + 1) :]
        wanted = torch.tensor(continuation[-(len(tokens) - 1) :], device=self._groups.device)
        inputs = torch.tensor([tokens[:-1]], device=self._groups.device)
        logits = self._model.forward.logits(inputs)
        if logits is None:
            return 0.0, False
        of_continuation = logits[0, -len(wanted) :].log_softmax(dim=-1)
        likelihood = of_continuation.gather(1, wanted[:, None]).sum()
        return float(likelihood), bool((of_continuation.argmax(dim=-1) == wanted).all())

    def _text(self, number: int, request: Instance) -> str:
        context, options = request.args
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        tokenizer = self._model.tokenizer
        new_tokens = min(options.get("max_gen_toks", _MAX_NEW_TOKENS), self._seq_length - 1)
        prompt = self.tok_encode(context)[-(self._seq_length - new_tokens) :]
        draws = options.get("do_sample", False)

        def is_over(tokens: list[int]) -> bool:
            text = tokenizer.detokenize(tokens)
            return any(stop in text for stop in stops)

        generated = generate(
            self._model.forward,
            prompt or [self.eot_token_id],
            GenerationLimits(
                maximum_tokens=new_tokens,
                seq_length=self._seq_length,
                eod=tokenizer.eod,
                vocab_size=min(tokenizer.vocab_size, self._model.settings.padded_vocab_size),
            ),
            Sampling(
                temperature=float(options.get("temperature", 1.0)) if draws else 0.0,
                top_k=int(options.get("top_k", 0)) if draws else 0,
                top_p=float(options.get("top_p", 0.0)) if draws else 0.0,
            ),
            sample_generator(self._seed, number),
            is_over=is_over,
        )
        text = tokenizer.detokenize(generated.tokens)
        ends = [text.find(stop) for stop in stops if stop in text]
        return text[: min(ends)] if ends else text

    def _shared(self, requests: Sequence[Any], answer: Callable[[int, Any], Any]) -> list[Any]:
        """Return the answers to all requests on every rank; each copy of the model gives some."""
        copies = self._groups.topology.data_parallel_size
        place = self._groups.place
        is_teller = self._model.forward.is_last and place.tensor_parallel_rank == 0
        answers: dict[int, Any] = {}
        for first in range(0, len(requests), _TOGETHER * copies):
            numbers = range(first, min(first + _TOGETHER * copies, len(requests)))
            own = {
                number: answer(number, requests[number])
                for number in numbers
                if number % copies == place.data_parallel_rank
            }
            for told in self._groups.gather(own if is_teller else {}):
                answers |= told
        return [answers[number] for number in range(len(requests))]
