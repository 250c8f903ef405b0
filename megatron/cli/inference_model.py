"""A trained model, loaded for what needs no training: generating text, evaluation."""

import functools
from dataclasses import dataclass
from pathlib import Path

from megatron.base.errors import CheckpointError, ConfigError
from megatron.base.printing import print_rank_0
from megatron.checkpoint.compatibility import MODEL_ARGUMENTS
from megatron.checkpoint.load import LoadSettings, load_weights
from megatron.checkpoint.stored import read_model_facts
from megatron.checkpoint.verified import verify_together
from megatron.cli.model_of_config import DTYPES, model_settings, tensor_parallel_of
from megatron.config.run_config import RunConfig
from megatron.data.tokenizers import Tokenizer, build_tokenizer
from megatron.engine.agreement import together
from megatron.engine.assembly import ModuleSettings, build_module
from megatron.engine.distributed import ProcessGroups
from megatron.engine.seeding import prepare_random_state
from megatron.engine.stage_forward import StageForward
from megatron.ledger.candidates import Candidate
from megatron.ledger.checkpoint_choice import Search, choose, search_for
from megatron.model.facts import ModelFacts
from megatron.model.layer_plan import layer_plan
from megatron.model.settings import ModelSettings

__all__ = ["InferenceModel", "open_model"]


@dataclass(frozen=True)
class InferenceModel:
    """A model that only looks."""

    forward: StageForward
    settings: ModelSettings
    tokenizer: Tokenizer
    checkpoint: Path


def open_model(config: RunConfig, groups: ProcessGroups) -> InferenceModel:
    """Load the weights that ``load`` and ``iteration`` name, at this launch's topology. Collective.

    Raises:
        ConfigError: ``load`` isn't set, or the model doesn't fit the configuration.
        CheckpointError: there is no good checkpoint.
    """
    checkpoint = _find(config, groups)
    tokenizer = together(
        groups,
        lambda: build_tokenizer(
            config.tokenizer.tokenizer_type, config.training.vocab_file, config.training.merge_file
        ),
    )
    facts: ModelFacts = together(
        groups,
        lambda: (
            read_model_facts(
                checkpoint, gpt_j_residual=config.model.gpt_j_residual, is_verified=True
            ).model
        ),
    )
    settings = together(groups, functools.partial(model_settings, config, facts))
    prepare_random_state(groups, config.other.seed, partition_activations=False)
    dtype = DTYPES[config.model.precision]
    plan = layer_plan(
        settings,
        tensor_parallel_of(groups),
        seed=config.other.seed,
        dtype=dtype,
        device=groups.device,
    )
    module = build_module(
        plan,
        groups,
        _no_loss,
        ModuleSettings(config.parallelism.pipe_partition_method, checkpoint_interval=0),
    )
    arguments = {name: config.get(name) for name in MODEL_ARGUMENTS}
    load_weights(
        module,
        checkpoint,
        LoadSettings(
            model=settings,
            model_arguments=arguments | {"padded_vocab_size": facts.padded_vocab_size},
            topology=config.topology,
            rank=groups.rank,
            is_verified=True,
        ),
        gather=groups.gather,
    )
    print_rank_0(f"loaded {checkpoint}")
    return InferenceModel(
        StageForward(module, groups, settings, dtype), settings, tokenizer, checkpoint
    )


def _find(config: RunConfig, groups: ProcessGroups) -> Path:
    def search_by_rank_0() -> tuple[Search, list[Candidate]] | None:
        load = config.training.load
        if not load:
            raise ConfigError("load is not set: name the directory of the checkpoint to use")
        if groups.rank != 0:
            return None
        search = search_for(Path(load), None, iteration=config.other.iteration, finetune=True)
        if search is None:
            raise CheckpointError(f"{load} holds no checkpoint")
        return search, list(search.candidates())

    search, candidates = groups.from_rank_0(together(groups, search_by_rank_0))

    def check(candidate: Candidate) -> str | None:
        return verify_together(
            search.path_of(candidate.step),
            groups.gather,
            rank=groups.rank,
            world_size=groups.topology.world_size,
            is_numbered=candidate.sequence is not None,
            needs_optimizer=False,
        )

    chosen = choose(search, candidates, check)
    if chosen.reason:
        print_rank_0(f"note: {chosen.checkpoint}: {chosen.reason}")
    return chosen.checkpoint


def _no_loss(*_: object) -> None:
    raise AssertionError("a model that only looks has no loss")
