"""Training keys of objectives other than language modelling: preferences and RL."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.declare import key, only, part_of, refused

__all__ = ["TrainingPreferences"]

_PAIRS = refused("train a language model: use train_data_paths")
_REWARDS = refused("train a language model: leave out the reward data")
_TUNES_DPO = part_of("train_impl: dpo")
_TUNES_KTO = part_of("train_impl: kto")
_TUNES_REINFORCE = part_of("train_impl: reinforce")


@dataclass(frozen=True, kw_only=True)
class TrainingPreferences:
    """Direct preference optimisation, KTO, reward models, REINFORCE."""

    train_reward_data_paths: list[str] | None = key(None, tier=3, outcome=_REWARDS)
    """Reward datasets, one per training dataset."""

    test_reward_data_paths: list[str] | None = key(None, tier=3, outcome=_REWARDS)
    """Reward datasets, one per test dataset."""

    valid_reward_data_paths: list[str] | None = key(None, tier=3, outcome=_REWARDS)
    """Reward datasets, one per validation dataset."""

    pos_train_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Preferred answers for training."""

    neg_train_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Rejected answers for training."""

    pos_train_label_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Labels of the preferred answers for training."""

    neg_train_label_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Labels of the rejected answers for training."""

    pos_valid_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Preferred answers for validation."""

    neg_valid_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Rejected answers for validation."""

    pos_valid_label_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Labels of the preferred answers for validation."""

    neg_valid_label_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Labels of the rejected answers for validation."""

    pos_test_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Preferred answers for test."""

    neg_test_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Rejected answers for test."""

    pos_test_label_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Labels of the preferred answers for test."""

    neg_test_label_data_paths: list[str] | None = key(None, tier=3, outcome=_PAIRS)
    """Labels of the rejected answers for test."""

    dataset_impl: Literal["gpt2", "pairwise", "online"] | None = key(
        "gpt2", tier=3, outcome=only("gpt2", advice="use gpt2")
    )
    """Kind of dataset: text, pairs of answers, or samples from a server."""

    train_impl: Literal["normal", "dpo", "rm", "kto", "reinforce"] | None = key(
        "normal", tier=3, outcome=only("normal", advice="use normal")
    )
    """Objective: language modelling, or one of the preference methods."""

    dpo_fp32: bool | None = key(True, tier=3, outcome=_TUNES_DPO)
    """DPO: compute log-probabilities in fp32."""

    dpo_reference_free: bool | None = key(False, tier=3, outcome=_TUNES_DPO)
    """DPO: do without a reference model."""

    dpo_beta: float | None = key(0.1, tier=3, outcome=_TUNES_DPO)
    """DPO: strength of the pull towards the reference."""

    kto_fp32: bool | None = key(True, tier=3, outcome=_TUNES_KTO)
    """KTO: compute log-probabilities in fp32."""

    kto_desirable_weight: float | None = key(1.0, tier=3, outcome=_TUNES_KTO)
    """KTO: weight of desirable answers."""

    kto_undesirable_weight: float | None = key(1.0, tier=3, outcome=_TUNES_KTO)
    """KTO: weight of undesirable answers."""

    z_loss: float | None = key(0.0, tier=3, outcome=part_of("train_impl: rm"))
    """Reward model: penalty on the size of rewards."""

    kto_beta: float | None = key(0.1, tier=3, outcome=_TUNES_KTO)
    """KTO: strength of the pull towards the reference."""

    fp32_reinforce: bool | None = key(True, tier=3, outcome=_TUNES_REINFORCE)
    """REINFORCE: compute log-probabilities in fp32."""

    kl_impl: Literal["abs", "mse", "kl", "full"] | None = key(
        "mse", tier=3, outcome=_TUNES_REINFORCE
    )
    """REINFORCE: estimate of the divergence from the reference."""

    kl_div_beta: float | None = key(0.1, tier=3, outcome=_TUNES_REINFORCE)
    """REINFORCE: weight of that divergence."""

    reinforce_leave_one_out: bool | None = key(False, tier=3, outcome=_TUNES_REINFORCE)
    """REINFORCE: the other answers' mean reward is the baseline."""
