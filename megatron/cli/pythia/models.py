"""Which model a name on the hub means, and the configuration it was trained with."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.base.errors import ConfigError
from megatron.cli.pythia_data import ONE_PROCESS
from megatron.config.load import load_config
from megatron.config.run_config import RunConfig
from megatron.config.yaml_files import read_config_files
from megatron.data.tokenizers import padded_vocab_size
from megatron.model.facts import ModelFacts
from megatron.model.settings import ModelSettings
from megatron.optim.schedules import LearningRateSchedule, ScheduleSettings

__all__ = [
    "NUM_TOKENS",
    "ReleasedModel",
    "find_model",
    "model_of_files",
    "model_of_name_and_files",
    "schedule_of",
]

NUM_TOKENS = 50277
"""Entries of 20B_tokenizer.json, added ones included (pythia.md §1.1)."""

_CONFIGS = Path(__file__).parents[3] / "configs" / "pythia"
_SIZES = {
    "14m": "14M",
    "31m": "31M",
    "70m": "70M",
    "160m": "160M",
    "410m": "410M",
    "1b": "1B",
    "1.4b": "1-4B",
    "2.8b": "2-8B",
    "6.9b": "6-9B",
    "12b": "12B",
}
_STANDARD_ONLY = ("14m", "31m")
_SEEDED = ("14m", "31m", "70m", "160m", "410m")
_ABLATIONS = {
    "pythia-v1.1-70m-0.25mtokbs": "batch_size/70M-0-25M.yml",
    "pythia-v1.1-160m-0.5mtokbs": "batch_size/160M-0-5M.yml",
    "pythia-v1.1-410m-0.5mtokbs": "batch_size/410M-0-5M.yml",
    "pythia-v1.1-1b-0.5mtokbs": "batch_size/1B-0-5M.yml",
    "pythia-v1.1-1.4b-1mtokbs": "batch_size/1-4B-1M.yml",
}
_NAME = re.compile(
    r"pythia-(?P<size>\d+(?:\.\d+)?[mb])(?P<deduped>-deduped)?(?P<v0>-v0)?"
    r"(?:-(?P<overlay>(?:data-|weight-)?seed\d+))?"
)
_V0_STEPS_OF_DOUBLE_BATCHES = 71500


@dataclass(frozen=True)
class ReleasedModel:
    """A model, and how it was trained."""

    name: str
    files: tuple[Path, ...]  # configuration files, to be used together
    config: RunConfig  # on as many ranks as it was divided over
    settings: ModelSettings
    num_tokens: int | None  # entries of its tokenizer, None: not known
    tensor_parallel_size: int  # model_parallel_size of its configuration
    steps_per_iteration: int = 1
    """What its branches count for each iteration: 2 where version 0 took twice the batch."""

    @property
    def training_dtype(self) -> str:
        """Name of the type its weights were computed in: fp16, bf16 or fp32."""
        precision = str(self.config.get("precision"))
        return "bf16" if precision == "bfloat16" else precision

    def iteration(self, step: int) -> int:
        """Return the step of the configuration that a branch called ``step`` holds.

        Raises:
            ConfigError: there was no such step.
        """
        if step < 0:
            raise ConfigError(f"{self.name} has no step {step}: steps count from 0")
        iteration, rest = divmod(step, self.steps_per_iteration)
        if rest:
            raise ConfigError(
                f"{self.name} has no step {step}: its branches count {self.steps_per_iteration} "
                "for every iteration (of twice the batch)"
            )
        last = self.config.training.train_iters
        if last is not None and iteration > last:
            raise ConfigError(f"{self.name} has no step {step}: it was trained for {last:,}")
        return iteration


def find_model(name: str) -> ReleasedModel:
    """Return the model that is called ``name`` on the hub.

    Args:
        name: "pythia-160m-deduped", "EleutherAI/pythia-70m-seed3", "neox-ckpt-pythia-1b-v1" …

    Raises:
        ConfigError: there is none; names those there are.
    """
    plain = name.rpartition("/")[2].lower().removeprefix("neox-ckpt-")
    if plain in _ABLATIONS:
        return model_of_files([_CONFIGS / _ABLATIONS[plain]], name=plain, num_tokens=NUM_TOKENS)
    match = _NAME.fullmatch(plain.removesuffix("-v1"))
    if match is None or match["size"] not in _SIZES:
        raise ConfigError(_unknown(name))
    size, overlay = match["size"], match["overlay"]
    path = _CONFIGS / ("v0" if match["v0"] else "") / f"{_SIZES[size]}{match['deduped'] or ''}.yml"
    files = [path]
    if overlay and overlay != "seed0":
        if size not in _SEEDED or match["deduped"] or match["v0"]:
            raise ConfigError(_unknown(name))
        files.append(_CONFIGS / f"{overlay}.yml")
    if not all(file.is_file() for file in files):
        raise ConfigError(_unknown(name))
    return model_of_files(files, name=plain.removesuffix("-v1"), num_tokens=NUM_TOKENS)


def model_of_files(
    files: Sequence[Path], *, name: str | None = None, num_tokens: int | None = None
) -> ReleasedModel:
    """Return the model that configuration files describe.

    Raises:
        ConfigError: they cannot be used.
    """
    config = _loaded(files)
    tensor_ranks = config.ledger.tp_bias_multiplicity or 1
    if num_tokens is None:
        rows = config.model.make_vocab_size_divisible_by * tensor_ranks
    else:
        rows = padded_vocab_size(
            num_tokens, config.model.make_vocab_size_divisible_by, tensor_ranks
        )
    settings = ModelSettings.from_config(
        config.model,
        config.training,
        ModelFacts(rows, tensor_ranks),
        neox_version=config.ledger.neox_version,
    )
    has_double_batch = config.training.train_iters == _V0_STEPS_OF_DOUBLE_BATCHES
    is_renamed = name is not None and name.endswith("-v0") and has_double_batch
    return ReleasedModel(
        name or ", ".join(path.stem for path in files),
        tuple(files),
        config,
        settings,
        num_tokens,
        _tensor_parallel_size(files),
        steps_per_iteration=2 if is_renamed else 1,
    )


def model_of_name_and_files(name: str, files: Sequence[Path]) -> ReleasedModel:
    """Return the model called ``name``, trained as other ``files`` say, which must be the same.

    Raises:
        ConfigError: the files describe another model, another batch or another schedule.
    """
    released = find_model(name)
    own = model_of_files(files, name=released.name, num_tokens=released.num_tokens)
    pairs = {
        "the model": (own.settings, released.settings),
        "train_batch_size": (
            own.config.geometry.global_batch_size,
            released.config.geometry.global_batch_size,
        ),
        "the learning-rate schedule": (_schedule(own), _schedule(released)),
    }
    different = [what for what, (mine, theirs) in pairs.items() if mine != theirs]
    if different:
        raise ConfigError(
            f"{', '.join(map(str, files))}: {' and '.join(different)} differ from those of "
            f"{', '.join(str(path) for path in released.files)}"
        )
    return own


def _schedule(model: ReleasedModel) -> LearningRateSchedule:
    return schedule_of(model.config).schedule()


def schedule_of(config: RunConfig) -> ScheduleSettings:
    """Return the learning rate that a configuration asks for."""
    return ScheduleSettings.from_config(
        config.lr_scheduler,
        config.optimizer,
        config.training,
        neox_version=config.ledger.neox_version,
    )


def _loaded(files: Sequence[Path]) -> RunConfig:
    """Load as one process: how it is divided acts on no number used here."""
    config = load_config(files, ONE_PROCESS, local_slots=lambda: 1, environ={})
    if "train_batch_size" not in config.written:
        raise ConfigError(
            f"{', '.join(map(str, files))} must say train_batch_size: what a step has consumed "
            "follows from it"
        )
    return config


def _tensor_parallel_size(files: Sequence[Path]) -> int:
    written, _, _ = read_config_files(files)
    size = written.get("model_parallel_size")
    return 1 if size is None else int(size.value)


def _unknown(name: str) -> str:
    return (
        f"no model is called {name!r}; there are pythia-SIZE with {', '.join(_SIZES)}, with "
        f"-deduped (but for {' and '.join(_STANDARD_ONLY)}), -v0, -seed1 to -seed9 (up to 410m), "
        f"-data-seed1 to 3 and -weight-seed1 to 3 (160m), and {', '.join(_ABLATIONS)}. For a model "
        "of your own name its configuration: --config"
    )
