"""ledger.json gives back what was written, and nothing is guessed from a damaged one."""

import json

import pytest
from hypothesis import given

from megatron.base.errors import CheckpointError
from megatron.ledger.ledger_file import (
    LEDGER_FILE,
    AcceptedChange,
    Adoption,
    Amount,
    DatasetNote,
    Span,
    ledger_from_json,
    ledger_to_json,
    read_ledger,
    write_ledger,
)
from tests.ledger.example_ledgers import ledgers, small_ledger


@given(ledgers())
def test_a_ledger_survives_its_file(ledger):
    text = json.dumps(ledger_to_json(ledger), allow_nan=False)
    assert ledger_from_json(json.loads(text)) == ledger


def test_a_checkpoint_gives_back_the_ledger_written_into_it(tmp_path):
    write_ledger(tmp_path, small_ledger(step=7))
    assert read_ledger(tmp_path) == small_ledger(step=7)


def test_the_models_part_can_be_read_alone(tmp_path):
    write_ledger(tmp_path, small_ledger())
    assert json.loads((tmp_path / LEDGER_FILE).read_text())["model"] == {
        "padded_vocab_size": 128,
        "tp_bias_multiplicity": 1,
        "tensor_parallel_size": 1,
    }


def test_an_adoption_of_the_first_release_has_no_geometry(tmp_path):
    adopted = Adoption(source="/neox/global_step10", step=10, assumed=("one thing",))
    values = ledger_to_json(small_ledger(step=12, adopted=adopted))
    assert values["adopted"].pop("geometry") is None
    assert ledger_from_json(values).adopted == adopted


def test_a_checkpoint_of_neox_has_no_ledger(tmp_path):
    assert read_ledger(tmp_path) is None


def test_a_file_with_the_models_part_alone_is_no_ledger(tmp_path):
    values = ledger_to_json(small_ledger())
    (tmp_path / LEDGER_FILE).write_text(json.dumps({"model": values["model"]}))
    assert read_ledger(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a ledger"),
        ('{"format": 1, "mod', "is not a ledger"),
        ("[]", "is not a ledger"),
        ('{"format": 1}', "is not a ledger .*KeyError"),
        ('{"format": 2}', "ledger format 2 is not known; this release reads format 1"),
    ],
)
def test_a_damaged_ledger_is_an_error(tmp_path, text, message):
    (tmp_path / LEDGER_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/ledger.json.*{message}"):
        read_ledger(tmp_path)


def test_an_edited_order_is_an_error(tmp_path):
    values = ledger_to_json(small_ledger())
    next(iter(values["orders"].values()))["seed"] = 5
    (tmp_path / LEDGER_FILE).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="the ledger was edited"):
        read_ledger(tmp_path)


def test_the_next_line_continues_from_the_run_or_from_the_last_span():
    ledger = small_ledger()
    assert ledger.chain == ledger.run_id
    span = Span(
        run_id=ledger.run_id, attempt=1, first_step=1, last_step=5, chain="c" * 16, digest_sum="0"
    )
    assert small_ledger(spans=(span,)).chain == "c" * 16


def test_exactness_says_what_is_known_and_what_was_accepted():
    ledger = small_ledger(
        step=30,
        adopted=Adoption(source="/a/global_step10", step=10, assumed=()),
        accepted=(
            AcceptedChange(
                after_step=20,
                keys=("seed",),
                repeated=Amount(tokens=123),
                skipped=Amount(tokens=45),
                new=Amount(),
                horizon_step=100,
                is_exact=True,
            ),
        ),
        datasets={"d1": DatasetNote(path="/d", level="sampled", num_documents=1, num_tokens=2)},
    )
    assert ledger.exactness == (
        "Steps 1..10 are adopted: computed from the checkpoint, not observed. "
        "Steps 11..30 consumed every position of the training stream once. "
        "After step 20 the data was changed (seed): up to step 100 123 tokens are repeated and "
        "45 skipped. The content of 1 of 1 datasets is known by samples of its bytes."
    )
