"""What all checkpoints of a run have in common, and the small files rank 0 adds to each."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.stored import StoredFacts
from megatron.ledger.ledger_file import LEDGER_FILE, ModelPart

__all__ = ["SaveSettings", "model_part", "own_texts"]


@dataclass(frozen=True)
class SaveSettings:
    """What every checkpoint of a run has in common."""

    directory: Path  # NeoX's `save`
    model_arguments: Mapping[str, Any]  # the eight values NeoX compares on load, its `args`
    facts: StoredFacts
    config_files: Mapping[str, str]  # name -> text, kept in configs/
    keep_last_n: int | None = None
    saves_rng: bool = True
    s3_path: str | None = None  # where committed checkpoints are copied to
    s3_chunk_size: int = 104_857_600  # bytes


def model_part(facts: StoredFacts) -> ModelPart:
    """Return the part ``model`` of a ledger: what the first checkpoint of a run pins."""
    return ModelPart(
        padded_vocab_size=facts.model.padded_vocab_size,
        tp_bias_multiplicity=facts.model.tp_bias_multiplicity,
        tensor_parallel_size=facts.tensor_parallel_size,
    )


def own_texts(settings: SaveSettings, *, has_ledger: bool) -> dict[str, str]:
    """Return rank 0's files of a checkpoint, by name; a whole ``ledger.json`` is the commit's."""
    texts = {f"configs/{Path(name).name}": text for name, text in settings.config_files.items()}
    if not has_ledger:
        facts = {"model": asdict(model_part(settings.facts))}
        texts[LEDGER_FILE] = json.dumps(facts, indent=2) + "\n"
    return texts
