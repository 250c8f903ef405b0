"""A training run that remembers every sample: what resumes are compared with.

It knows nothing of segments, orders or cursors. The next sample of a dataset is the how-manieth it
is in what was consumed so far; a step that is undone is cut off the end of the list.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from megatron.ledger.planning.inputs import Wanted
from tests.ledger.planning.slow_world import NOTES, new_order


@dataclass(frozen=True)
class Config:
    """What a user may change between two launches."""

    datasets: tuple = ("aaaa",)
    weights: tuple = (1.0,)
    batch_size: int = 4
    train_iters: int = 12
    seq_length: int = 4
    seed: int = 1234
    accepts: frozenset = frozenset()

    @property
    def shares(self):
        total = sum(self.weights)
        return tuple(weight / total for weight in self.weights)

    def order(self):
        return new_order(
            self.datasets,
            self.weights,
            self.train_iters * self.batch_size,
            seq_length=self.seq_length,
            seed=self.seed,
        )

    def wanted(self, **others):
        return Wanted(
            **{
                "orders": {"train": self.order()},
                "datasets": {dataset: NOTES[dataset] for dataset in self.datasets},
                "train_batch_size": self.batch_size,
                "gradient_accumulation_steps": 1,
                "train_iters": self.train_iters,
                "eval_interval": None,
                "eval_iters": 0,
                "accept_data_change": self.accepts,
                **others,
            }
        )


@dataclass
class _Memory:
    """What the samples of a step depend on, besides the samples before it."""

    era: int = 0  # counts the data changes that were accepted
    config: Config | None = None
    heads: dict = field(default_factory=dict)  # (era, dataset) -> epochs, from its first launch on
    taken: Counter = field(default_factory=Counter)  # (era, dataset) -> samples
    draws: list = field(default_factory=list)  # datasets, since the blend began

    def copy(self) -> "_Memory":
        return replace(self, heads=dict(self.heads), taken=self.taken.copy(), draws=[*self.draws])


class SlowRun:
    """The lineage as a list of steps, each a list of (era, dataset, index)."""

    def __init__(self, config: Config) -> None:
        self.steps: list = []
        self._after = [self._new_era(_Memory(), config, 0)]  # step N is done -> what it left
        self._now = self._after[0]

    def resume(self, after_step: int, config: Config) -> None:
        """Undo what came after a step, and go on as configured from there."""
        del self.steps[after_step:]
        del self._after[after_step + 1 :]
        memory = self._after[-1].copy()
        before = memory.config
        if (before.seed, before.seq_length) != (config.seed, config.seq_length):
            tokens = sum(
                len(step) * memory.config.seq_length
                for step, memory in zip(self.steps, self._after[1:], strict=True)
            )
            memory.era += 1
            memory = self._new_era(memory, config, tokens // config.seq_length)
        elif (before.datasets, before.shares) != (config.datasets, config.shares):
            memory.draws = []
            # A dataset that was planned and dropped before its first step was never there.
            drawn = [one.config.datasets for one in self._after[1:] if one.era == memory.era]
            known = {dataset for datasets in (*drawn, before.datasets) for dataset in datasets}
            for dataset in config.datasets:
                if dataset not in known or (memory.era, dataset) not in memory.heads:
                    memory.heads[memory.era, dataset] = None
        memory.config = config
        self._now = memory

    def take_step(self) -> list:
        """Consume one batch and return it."""
        memory = self._now.copy()
        batch = []
        for _ in range(memory.config.batch_size):
            dataset = _next_draw(memory)
            batch.append((memory.era, dataset, memory.taken[memory.era, dataset]))
            memory.taken[memory.era, dataset] += 1
        self.steps.append(batch)
        self._after.append(memory)
        self._now = memory
        return batch

    def head(self, dataset: str):
        """Return the epochs of the head with which a dataset's samples began."""
        return self._now.heads[self._now.era, dataset]

    def _new_era(self, memory: _Memory, config: Config, entered_at: int) -> _Memory:
        memory.config = config
        memory.draws = []
        for one in config.order().components:
            memory.heads[memory.era, one.dataset] = one.head_epochs
        for _ in range(entered_at):  # passed over, as good as consumed
            memory.taken[memory.era, _next_draw(memory)] += 1
        return memory


def _next_draw(memory: _Memory) -> str:
    """Draw the dataset that lags furthest behind its share of the draws so far."""
    datasets, shares = memory.config.datasets, memory.config.shares
    total = sum(shares)  # the draw divides once more, which may change the last bit and a tie
    shares = [share / total for share in shares]
    number = max(len(memory.draws), 1.0)
    lags = [
        share * number - memory.draws.count(dataset)
        for dataset, share in zip(datasets, shares, strict=True)
    ]
    memory.draws.append(datasets[lags.index(max(lags))])
    return memory.draws[-1]
