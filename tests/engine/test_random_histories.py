"""Real runs, killed and changed at random, against the slow oracle."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine.interrupted_runs import SEED, SEQ_LENGTH, InterruptedRun
from tests.engine.slow_orders import SlowDataset, SlowStream, requested, write_dataset

pytestmark = [pytest.mark.distributed, pytest.mark.matrix]

LAUNCHES = 5
SAVE_INTERVAL = 3
DIVISIONS = {  # batch -> micro batch and accumulation
    4: [(4, 1), (1, 4), (2, 2)],
    8: [(8, 1), (4, 2), (1, 8)],
    12: [(4, 3), (12, 1)],
}
BLENDS: list[tuple[str, tuple[float, ...]]] = [
    ("ab", (1.0, 1.0)),
    ("ab", (2.0, 1.0)),
    ("ba", (1.0, 2.0)),  # other places, other order
    ("abc", (1.0, 2.0, 3.0)),
    ("c", (1.0,)),
    ("bc", (0.3, 0.7)),
]


@dataclass(frozen=True)
class Settings:
    """What may change from launch to launch and acts on what is read."""

    batch: int
    blend: tuple[str, tuple[float, ...]]
    train_iters: int
    eval_interval: int
    eval_iters: int


class History:
    """What has become of a run so far: whose steps its newest lineage is made of."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.chance = chance
        for number, name in enumerate("abcv"):
            write_dataset(folder / "data" / name, 20 + number, documents=12)
        self.run = InterruptedRun(folder, {}, checkpoint_factor=SAVE_INTERVAL)
        self.settings = Settings(8, BLENDS[0], 10, 4, 1)
        self.steps: list[Settings] = []
        self.newest = 0  # checkpoint; a roll-back that saved nothing changes nothing
        self.saved: dict[int, tuple[list[Settings], Settings]] = {}
        self.first: Settings | None = None
        self.told: list[str] = []

    def launch(self, *, to_the_end: bool) -> None:
        """Change something, perhaps roll back, train, and perhaps be killed."""
        chance, changes = self.chance, {}
        self.settings = self._changed() if self.first else self.settings
        start = self.newest
        if self.saved and chance.random() < 0.25:
            start = chance.choice(sorted(self.saved))
            changes["iteration"] = start
        if self.settings.train_iters < start + 2:
            self.settings = Settings(**vars(self.settings) | {"train_iters": start + 6})
        end = self.settings.train_iters
        kill = None if to_the_end else chance.randrange(start + 1, end)
        self.told.append(f"from {start}: {self.settings}, {changes}, killed after {kill}")
        if kill is None:
            self.run.launch(**self._keys(), **changes)
        else:
            self.run.launch_killed(after=kill, **self._keys(), **changes)
        last = end if kill is None else kill
        before, self.first = self.saved.get(start, ([], self.settings))  # 0: begins anew
        self.steps = before + [self.settings] * (last - start)
        for step in range(start + 1, last + 1):
            if step % SAVE_INTERVAL == 0 or step == end:
                self.saved[step] = self.steps[:step], self.first
                self.newest = step

    def expected(self) -> tuple[dict[int, Any], list[Any]]:
        """Return what the oracle reads: steps, and evaluations of the loop."""
        assert self.first is not None
        folder = self.run.folder / "data"
        names, weights = self.first.blend
        samples = self.first.train_iters * self.first.batch
        evaluated = (
            (self.first.train_iters // self.first.eval_interval + 1)
            * self.first.eval_iters
            * self.first.batch
        )
        slow = {
            name: SlowDataset(
                folder / name, SEQ_LENGTH, SEED, requested(samples, weight / sum(weights))
            )
            for name, weight in zip(names, weights, strict=True)
        }
        valid = SlowStream([SlowDataset(folder / "v", SEQ_LENGTH, SEED, requested(evaluated, 1.0))])
        train = SlowStream([slow[name] for name in names], weights)
        blend, steps, evaluations = self.first.blend, {}, []
        for step, settings in enumerate(self.steps, 1):
            if settings.blend != blend:
                blend = settings.blend
                for name in blend[0]:
                    slow.setdefault(name, SlowDataset(folder / name, SEQ_LENGTH, SEED, None))
                train.change([slow[name] for name in blend[0]], blend[1])
            steps[step] = train.step(settings.batch)
            if step % settings.eval_interval == 0:
                # A checkpoint lies before it, unless it was saved because the run ended there.
                is_due = step % SAVE_INTERVAL == 0 and step < len(self.steps)
                by = self.steps[step] if is_due else settings
                evaluations.append((step, valid.step(by.eval_iters * by.batch)))
        return steps, evaluations

    def _changed(self) -> Settings:
        chance, values = self.chance, dict(vars(self.settings))
        for key in chance.sample(sorted(values), chance.randrange(4)):
            values[key] = {
                "batch": lambda: chance.choice(list(DIVISIONS)),
                "blend": lambda: chance.choice(BLENDS),
                "train_iters": lambda: chance.randrange(4, 24),
                "eval_interval": lambda: chance.choice([2, 3, 4]),
                "eval_iters": lambda: chance.choice([1, 2]),
            }[key]()
        return Settings(**values)

    def _keys(self) -> dict[str, Any]:
        settings = self.settings
        micro_batch, accumulation = self.chance.choice(DIVISIONS[settings.batch])
        ranks = 2 if accumulation % 2 == 0 and self.chance.random() < 0.3 else 1
        folder, (names, weights) = self.run.folder / "data", settings.blend
        return {
            "train_data_paths": [str(folder / name) for name in names],
            "train_data_weights": list(weights),
            "valid_data_paths": [str(folder / "v")],
            "test_data_paths": [str(folder / "v")],
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation // ranks,
            "num_gpus": ranks,
            "train_iters": settings.train_iters,
            "eval_interval": settings.eval_interval,
            "eval_iters": settings.eval_iters,
            "num_workers": self.chance.choice([0, 2]),
        }


@pytest.mark.parametrize("number", range(8))
def test_a_random_history_reads_what_the_oracle_does(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    history = History(tmp_path, random.Random(number))
    for launch in range(LAUNCHES):
        history.launch(to_the_end=launch == LAUNCHES - 1 or history.chance.random() < 0.2)
    told = "\n".join(history.told)
    steps, evaluations = history.expected()
    read = history.run.read()
    assert read.steps == steps, told
    assert read.evaluations == evaluations, told
    status, printed = history.run.verify(capsys)
    assert status == 0, f"{told}\n{printed}"
