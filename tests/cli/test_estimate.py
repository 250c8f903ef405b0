"""Every model configuration can be planned, and comes to the size its name says."""

import json
from pathlib import Path

import pytest

from megatron.cli.estimate import estimate, main

CONFIGS = Path(__file__).parents[2] / "configs"
SETUP = str(CONFIGS / "local_setup.yml")
# file, ranks, parameters in billions
SIZES = [
    ("19M", 1, 0.07),
    ("125M", 1, 0.16),
    ("350M", 1, 0.41),
    ("800M", 1, 1.01),
    ("1-3B", 1, 1.4),
    ("2-7B", 4, 2.8),
    ("6-7B", 8, 6.9),
    ("13B", 16, 13.1),
    ("20B", 96, 20.6),
    ("175B", 256, 175.2),
    ("llama/7B", 16, 6.74),
    ("llama/13B", 16, 13.0),
    ("llama/30B", 16, 32.5),
    ("llama/65B", 32, 65.3),
    ("llama2/7B", 16, 6.74),
    ("llama2/13B", 16, 13.0),
    ("llama2/70B", 32, 69.0),
    ("codellama/7B", 16, 6.74),
    ("codellama/34B", 32, 33.7),
    ("mistral/7B", 16, 7.24),
]


@pytest.mark.parametrize(("name", "ranks", "billions"), SIZES)
def test_a_size_is_what_its_name_says(name: str, ranks: int, billions: float):
    # Llama's and its relatives' files name their tokenizer themselves.
    setup = [] if "/" in name else [SETUP]
    data = {} if setup else {"data_path": "nowhere"}
    found = estimate([*setup, str(CONFIGS / name)], ranks, overrides=data)
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.03, abs=0.006)
    ways = found.topology
    assert ways["pipeline"] * ways["data"] * ways["tensor"] == ranks
    # It fits the GPUs that the file's comment speaks of.
    assert found.largest.total < 80 * 2**30


def test_zero_divides_the_optimizer_and_half_precision_keeps_masters():
    def memory(**keys: object):
        return estimate([SETUP, str(CONFIGS / "125M")], 4, overrides=keys).memory_by_stage[0]

    plain = memory(zero_optimization={"stage": 0}, precision="fp32")
    assert plain.optimizer == 2 * plain.parameters == 2 * plain.gradients
    half = memory(zero_optimization={"stage": 0}, precision="bfloat16")
    assert half.parameters * 2 == plain.parameters
    assert half.optimizer == 6 * half.parameters
    divided = memory(zero_optimization={"stage": 1}, precision="bfloat16")
    assert divided.optimizer == -(-half.optimizer // 4)
    assert divided.gradients == half.gradients


def test_a_configuration_that_does_not_fit_the_ranks_is_said(capsys: pytest.CaptureFixture[str]):
    assert main([SETUP, str(CONFIGS / "13B"), "--world-size", "15"]) == 2
    assert "nearest: 12 or 16 ranks" in capsys.readouterr().err


def test_numbers_for_programs_and_the_shards_of_data_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = Path(__file__).parents[1] / "data" / "stream" / "oracle" / "corpus_a_text_document"
    path = tmp_path / "data.yml"
    keys = {"data_path": str(data), "tokenizer_type": "HFTokenizer", "vocab_file": "nowhere"}
    path.write_text(json.dumps(keys))
    assert main([str(CONFIGS / "19M"), str(path), "--world-size", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (dataset,) = found["shards"]
    tokens = Path(f"{data}.bin").stat().st_size / 2
    assert dataset["shards"] == 1
    assert dataset["tokens"] == tokens
    assert dataset["steps_per_shard"] == pytest.approx(tokens / found["tokens_per_step"])
