"""Text to token ids and back: the six tokenizer types NeoX knows, each through its own library.

Libraries are imported when a tokenizer is built, so that `import megatron.data.tokenizers` is
cheap, and none of them needs torch.
"""

import abc
import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from megatron.base.errors import ConfigError

__all__ = ["TOKENIZER_TYPES", "Tokenizer", "build_tokenizer", "padded_vocab_size"]

logger = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"
NUM_BYTES = 256  # what every byte-level vocabulary holds at least


class Tokenizer(abc.ABC):
    """A fixed mapping between text and ids in ``range(vocab_size)``."""

    eod: int | None
    """Id of the token that ends a document; None when the vocabulary has none."""

    vocab_size: int
    """Number of ids, before padding for the embedding."""

    @property
    @abc.abstractmethod
    def vocab(self) -> Mapping[str, int]:
        """Token text to id, in the library's own spelling of tokens."""

    @property
    def inv_vocab(self) -> Mapping[int, str]:
        """Id to token text."""
        return {token_id: token for token, token_id in self.vocab.items()}

    @abc.abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Return the ids of ``text``."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as :meth:`tokenize` would, possibly on several threads."""
        return [self.tokenize(text) for text in texts]

    @abc.abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens spelled out."""


def build_tokenizer(
    tokenizer_type: str, vocab_file: str | None, merge_file: str | None = None
) -> Tokenizer:
    """Return the tokenizer that the three NeoX keys of the same names describe.

    Args:
        tokenizer_type: one of :data:`TOKENIZER_TYPES`, in any case.
        vocab_file: what it means depends on the type: a vocabulary, a `tokenizers` JSON, a
            sentencepiece model, a directory or model name, a tiktoken encoding's name.
        merge_file: BPE merges; only GPT2BPETokenizer has them in a file of their own.

    Raises:
        ConfigError: unknown type; a file is missing or damaged; the library is not installed.
    """
    build = _BUILDERS.get(tokenizer_type.lower())
    if build is None:
        raise ConfigError(
            f"tokenizer_type={tokenizer_type!r} is not known; choose one of "
            + ", ".join(TOKENIZER_TYPES)
        )
    return build(vocab_file, merge_file)


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Return the rows of the embedding: ``vocab_size`` rounded up so that ranks share it evenly.

    Args:
        vocab_size: ids the tokenizer can give.
        divisible_by: NeoX's `make_vocab_size_divisible_by`; every rank's part is a multiple of it.
        tensor_parallel_size: ranks the embedding is split over.

    Example:
        >>> [padded_vocab_size(50277, 128, size) for size in (1, 2, 4)]
        [50304, 50432, 50688]
    """
    if min(vocab_size, divisible_by, tensor_parallel_size) < 1:
        raise ValueError(
            "vocabulary size, make_vocab_size_divisible_by and tensor-parallel size must be "
            f"positive, got {vocab_size}, {divisible_by}, {tensor_parallel_size}"
        )
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


class _JsonTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library, including its own special-token rules."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eod = backend.token_to_id(END_OF_DOCUMENT)

    @property
    def vocab(self) -> Mapping[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    def tokenize(self, text: str) -> list[int]:
        return self._backend.encode(text).ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)


def _build_from_json(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    path = _require_file("HFTokenizer", "vocab_file", vocab_file)
    library = _require_package("tokenizers", "HFTokenizer")
    return _JsonTokenizer(
        _read("HFTokenizer", "vocab_file", path, lambda: library.Tokenizer.from_file(path))
    )


def _build_gpt2_from_files(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    # NeoX uses Hugging Face's slow GPT2Tokenizer. The same algorithm in `tokenizers` gives the
    # same ids (a test compares them), is much faster and does not depend on transformers.
    vocab_path = _require_file("GPT2BPETokenizer", "vocab_file", vocab_file)
    merges_path = _require_file("GPT2BPETokenizer", "merge_file", merge_file)
    library = _require_package("tokenizers", "GPT2BPETokenizer")
    model = _read(
        "GPT2BPETokenizer",
        "vocab_file and merge_file",
        f"{vocab_path}, {merges_path}",
        lambda: library.models.BPE.from_file(vocab_path, merges_path),
    )
    backend = library.Tokenizer(model)
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    if backend.token_to_id(END_OF_DOCUMENT) is not None:
        backend.add_special_tokens([END_OF_DOCUMENT])
    return _JsonTokenizer(backend)


class _TransformersGpt2Tokenizer(Tokenizer):
    """GPT-2's tokenizer as Hugging Face distributes it, with a padding token added as in NeoX."""

    def __init__(self, backend: Any) -> None:
        backend.add_special_tokens({"pad_token": PADDING})
        self._backend = backend
        self.vocab_size = len(backend)
        self.eod = backend.eos_token_id

    @property
    def vocab(self) -> Mapping[str, int]:
        return self._backend.get_vocab()

    def tokenize(self, text: str) -> list[int]:
        return self._backend(text, verbose=False)["input_ids"]

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend(list(texts), verbose=False)["input_ids"]

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), clean_up_tokenization_spaces=False)


def _build_gpt2_from_transformers(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    library = _require_package("transformers", "HFGPT2Tokenizer")
    source = vocab_file or "gpt2"
    offered = set(os.listdir(source)) if os.path.isdir(source) else None
    if offered is not None and not (
        "tokenizer.json" in offered or {"vocab.json", "merges.txt"} <= offered
    ):
        raise ConfigError(
            f"HFGPT2Tokenizer: the directory vocab_file={source!r} has neither tokenizer.json nor "
            "vocab.json and merges.txt"
        )
    backend = _read(
        "HFGPT2Tokenizer",
        "vocab_file",
        source,
        lambda: library.GPT2TokenizerFast.from_pretrained(source),
    )
    if len(backend) < NUM_BYTES:
        # transformers 5 answers with an empty tokenizer when it finds no files.
        raise ConfigError(
            f"HFGPT2Tokenizer: no tokenizer found for vocab_file={source!r}: it is no directory "
            "here, and the Hugging Face hub gave no such model (or cannot be reached). Name a "
            "directory with GPT-2's tokenizer.json, or its vocab.json and merges.txt."
        )
    return _TransformersGpt2Tokenizer(backend)


class _SentencePieceTokenizer(Tokenizer):
    def __init__(self, backend: Any, path: str) -> None:
        self._backend = backend
        self.vocab_size = backend.get_piece_size()
        self.eod = backend.piece_to_id(END_OF_DOCUMENT)
        if self.eod == backend.unk_id():
            logger.warning(
                "%s has no piece %s; as in NeoX its unknown-piece id %d ends documents instead",
                path,
                END_OF_DOCUMENT,
                self.eod,
            )

    @property
    def vocab(self) -> Mapping[str, int]:
        return {self._backend.id_to_piece(i): i for i in range(self.vocab_size)}

    def tokenize(self, text: str) -> list[int]:
        return self._backend.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(token_id) for token_id in ids])


def _build_sentencepiece(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    path = _require_file("SPMTokenizer", "vocab_file", vocab_file)
    library = _require_package("sentencepiece", "SPMTokenizer")
    backend = _read(
        "SPMTokenizer",
        "vocab_file",
        path,
        lambda: library.SentencePieceProcessor(model_file=path),
    )
    return _SentencePieceTokenizer(backend, path)


class _CharLevelTokenizer(Tokenizer):
    """UTF-8 bytes as ids, with room for more; needs no files."""

    eod = 0
    vocab_size = 512  # NeoX's fixed number; 256 bytes are used

    @property
    def vocab(self) -> Mapping[str, int]:
        return {chr(token_id): token_id for token_id in range(self.vocab_size)}

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, ids: Sequence[int]) -> str:
        return "".join(chr(max(32, min(int(token_id), self.vocab_size))) for token_id in ids)


def _build_char_level(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    return _CharLevelTokenizer()


class _TiktokenTokenizer(Tokenizer):
    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.vocab_size = backend.n_vocab
        has_end = END_OF_DOCUMENT in backend.special_tokens_set
        self.eod = backend.eot_token if has_end else None

    @property
    def vocab(self) -> Mapping[str, int]:
        raise NotImplementedError(
            "tiktoken's tokens are byte strings, not all of them text; there is no text vocabulary"
        )

    def tokenize(self, text: str) -> list[int]:
        # By default tiktoken refuses text that spells a special token; in a corpus it is text.
        return self._backend.encode(text, disallowed_special=())

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode_batch(list(texts), disallowed_special=())

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids))


def _build_tiktoken(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    library = _require_package("tiktoken", "TiktokenTokenizer")
    if vocab_file is None:
        raise ConfigError(
            "TiktokenTokenizer needs vocab_file: the name of an encoding, one of "
            + ", ".join(library.list_encoding_names())
        )
    if vocab_file not in library.list_encoding_names():
        raise ConfigError(
            f"TiktokenTokenizer: vocab_file={vocab_file!r} names no encoding; choose one of "
            + ", ".join(library.list_encoding_names())
        )
    try:
        backend = library.get_encoding(vocab_file)
    except OSError as error:
        raise ConfigError(
            f"TiktokenTokenizer: the encoding vocab_file={vocab_file!r} is downloaded on first "
            f"use, and the download failed: {error}. Without a network, fill a cache directory "
            "where there is one and name it in TIKTOKEN_CACHE_DIR."
        ) from error
    return _TiktokenTokenizer(backend)


_BY_NAME: dict[str, Callable[[str | None, str | None], Tokenizer]] = {
    "GPT2BPETokenizer": _build_gpt2_from_files,
    "HFTokenizer": _build_from_json,
    "HFGPT2Tokenizer": _build_gpt2_from_transformers,
    "SPMTokenizer": _build_sentencepiece,
    "CharLevelTokenizer": _build_char_level,
    "TiktokenTokenizer": _build_tiktoken,
}
_BUILDERS = {name.lower(): build for name, build in _BY_NAME.items()}

TOKENIZER_TYPES: tuple[str, ...] = tuple(_BY_NAME)


def _require_file(tokenizer_type: str, key: str, path: str | None) -> str:
    if path is None:
        raise ConfigError(f"{tokenizer_type} needs {key}, which is not set")
    if not os.path.isfile(path):
        raise ConfigError(
            f"{tokenizer_type}: {key}={path!r} is not a file (looked in {os.getcwd()})"
        )
    return path


def _require_package(package: str, tokenizer_type: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{tokenizer_type} needs the package {package}: `pip install {package}` ({error})"
        ) from error


def _read(tokenizer_type: str, key: str, source: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        raise ConfigError(
            f"{tokenizer_type} cannot read {key} {source}: {type(error).__name__}: {error}"
        ) from error
