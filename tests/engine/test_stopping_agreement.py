"""All ranks stop at the same beat, whoever asks, whenever, and however slowly the store answers."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed

from megatron.engine.stopping import Stop, Stopping

BEATS = 8


class SlowStore:
    """A store whose answers take their time, each rank's another one."""

    def __init__(self, store, seed: int) -> None:
        self._store = store
        self._random = random.Random(seed)

    def _dawdle(self) -> None:
        time.sleep(self._random.choice([0, 0, 0.0005, 0.003]))

    def check(self, keys):
        self._dawdle()
        answer = self._store.check(keys)
        self._dawdle()
        return answer

    def get(self, key):
        self._dawdle()
        return self._store.get(key)

    def compare_set(self, key, expected, desired):
        self._dawdle()
        answer = self._store.compare_set(key, expected, desired)
        self._dawdle()
        return answer


def stops(wishes: dict[int, int], num_ranks: int, seed: int) -> list[tuple[int, str] | None]:
    """Return the beat and the reason at which each rank stops.

    Args:
        wishes: the beat from which on a rank has a reason of its own.
        num_ranks: threads, here.
        seed: of how slow everything is.
    """
    store = torch.distributed.HashStore()
    begun = [threading.Barrier(num_ranks) for _ in range(BEATS + 1)]
    ranks = []
    for rank in range(num_ranks):
        stopping = Stopping(SlowStore(store, seed + rank))
        stopping._key = "stop"  # as if each were the first of its process
        ranks.append(stopping)

    def run(rank: int) -> tuple[int, str] | None:
        chance = random.Random(seed - rank)
        beat = 0
        ranks[rank]._causes.append(
            lambda: Stop(f"rank {rank}") if beat >= wishes.get(rank, BEATS + 1) else None
        )
        try:
            for beat in range(1, BEATS + 1):
                time.sleep(chance.choice([0, 0.001, 0.002]))
                begun[beat].wait(10)  # no rank finishes a unit before every rank has begun it
                time.sleep(chance.choice([0, 0.001, 0.002]))
                stop = ranks[rank].beat()
                if stop is not None:
                    return beat, stop.reason
            return None
        finally:
            ranks[rank].close()

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(run, range(num_ranks)))


@pytest.mark.parametrize("seed", range(12))
def test_all_ranks_stop_two_beats_after_the_first_wish(seed):
    chance = random.Random(seed)
    num_ranks = chance.randint(2, 6)
    wishes = {
        rank: chance.randint(1, 5)
        for rank in chance.sample(range(num_ranks), chance.randint(1, num_ranks))
    }
    answers = set(stops(wishes, num_ranks, 1000 * seed))
    assert len(answers) == 1
    beat, reason = answers.pop()
    assert wishes[int(reason.removeprefix("rank "))] == beat - 2
    assert beat - 2 <= min(wishes.values()) + 1  # whoever saw another's entry had no wish to add


def test_nobody_stops_without_a_reason():
    assert stops({}, 3, 5) == [None, None, None]


def test_a_wish_too_late_to_be_heard_by_all_stops_nobody():
    assert stops({1: BEATS - 1}, 3, 5) == [None, None, None]


def test_a_store_that_is_gone_is_told():
    class Gone:
        def check(self, keys):
            raise RuntimeError("connection to rank 0 is lost")

    stopping = Stopping(Gone())
    assert stopping.beat() is None
    with pytest.raises(RuntimeError, match="connection to rank 0 is lost"):
        stopping.beat()
    stopping.close()
