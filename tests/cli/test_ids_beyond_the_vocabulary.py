"""Token ids without a row in the embedding: an error where they are read, at any topology."""

from pathlib import Path

import numpy as np
import pytest

from megatron.cli.train import train
from megatron.config.load import load_config
from megatron.data.vocabulary_check import VocabularyCheck
from megatron.engine.distributed import RankEnvironment
from tests.cli.bad_runs import CONFIG, write_dataset
from tests.worlds import RankContext, run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_the_reading_rank_stops_before_such_a_step(tmp_path: Path, tensor_ranks: int):
    write_dataset(tmp_path / "text")
    tokens = np.memmap(tmp_path / "text.bin", dtype=np.uint16, mode="r+")
    tokens[:] = 700  # the character vocabulary has 512
    tokens.flush()
    keys = {"num_gpus": tensor_ranks, "model_parallel_size": tensor_ranks}
    config = load_config(
        [], CONFIG | {"data_path": str(tmp_path / "text")} | keys, local_slots=lambda: 1
    )

    def rank(context: RankContext) -> str:
        me = RankEnvironment(context.rank, context.rank, tensor_ranks, context.init_method)
        with pytest.raises(Exception) as raised:  # noqa: PT011 - the others lose their peer
            train(config, me)
        return str(raised.value)

    message = run_ranks(rank, tensor_ranks, tmp_path)[0]
    assert "holds token id 700, in the sample at position 0 of its stream" in message
    assert "but the vocabulary has 512 rows (padded)" in message
    assert "step 1" in message


class Rows:
    """A stream of fixed rows."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def read(self, positions: np.ndarray, /) -> np.ndarray:
        return self.rows[positions]


def test_the_last_row_is_fine_and_a_negative_id_is_not():
    fine = VocabularyCheck(Rows(np.array([[0, 511]], dtype=np.uint16)), 512, source="x")
    assert fine.read(np.array([0])).tolist() == [[0, 511]]
    negative = VocabularyCheck(Rows(np.array([[0, 1], [0, -9]], dtype=np.int32)), 512, source="x")
    with pytest.raises(Exception, match="x holds token id -9, in the sample at position 1 of"):
        negative.read(np.array([0, 1]))
