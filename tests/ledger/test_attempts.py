"""Lines of attempts: they say what was recorded, whatever the numbers are."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import RunDirectoryError
from megatron.ledger.attempts import (
    AttemptLog,
    EvaluationRecord,
    StepRecord,
    attempt_files,
    decode_line,
    encode_record,
    next_attempt_number,
    read_attempt,
    read_lines,
)
from megatron.ledger.chain import chained_line, next_chain, split_line
from megatron.ledger.line_search import find_step, lines_since, read_end

counts = st.integers(min_value=0, max_value=2**50)
digests = st.integers(min_value=0, max_value=2**64 - 1).map(lambda number: f"{number:016x}")
finite = st.floats(allow_nan=False, allow_infinity=False)
steps = st.builds(
    StepRecord,
    step=counts,
    position=counts,
    samples=counts,
    loss=st.floats(),
    lr=finite,
    grad_norm=st.none() | finite,
    seconds=finite,
    digest=st.none() | digests,
)
evaluations = st.builds(
    EvaluationRecord,
    stream=st.sampled_from(["valid", "test"]),
    after_step=counts,
    position=counts,
    samples=counts,
    digest=digests,
    loss=st.floats(),
)
STEP = StepRecord(3, 8, 4, 2.5, 1e-3, 0.5, False, 0.25, "00000000000000ff")
EVALUATION = EvaluationRecord("valid", 3, 0, 8, "0123456789abcdef", 2.25)


def comparable(record):
    """Return a record that equals itself: what isn't finite is NaN, and NaN is written out."""
    return replace(record, loss=str(record.loss) if math.isfinite(record.loss) else "nan")


@given(steps | evaluations, digests)
def test_a_line_gives_its_record_back(record, previous):
    text, chain = chained_line(previous, encode_record(record))
    line = decode_line(text, 7)
    assert comparable(line.record) == comparable(record)
    assert (line.number, line.body, line.chain) == (7, encode_record(record), chain)
    assert list(json.loads(text))[-1] == "chain"


def test_members_of_a_step_stand_in_the_documented_order():
    text, chain = chained_line("run", encode_record(STEP))
    assert text == (
        b'{"step": 3, "position": 8, "samples": 4, "digest": "00000000000000ff", "loss": 2.5, '
        b'"lr": 0.001, "grad_norm": 0.5, "skipped": false, "seconds": 0.25, "chain": "'
        + chain.encode()
        + b'"}'
    )


def test_members_of_an_evaluation_stand_in_the_documented_order():
    assert encode_record(EVALUATION) == (
        b'{"stream": "valid", "after_step": 3, "position": 0, "samples": 8, '
        b'"digest": "0123456789abcdef", "loss": 2.25, "at_end": false}'
    )


def test_chain_is_the_start_of_a_sha256():
    # printf 'run{"a": 1}' | sha256sum
    assert next_chain("run", b'{"a": 1}') == "8fc1ad3a9f2461b6"


@given(st.binary())
def test_bytes_without_a_chain_member_have_no_chain(text):
    body, chain = split_line(text)
    assert chain is None
    assert body == text


@pytest.mark.parametrize(
    "change",
    [{"step": "3"}, {"step": 3.0}, {"step": -1}, {"step": True}, {"digest": "xyz"}, {"more": 1}],
)
def test_what_is_no_record_is_not_decoded(change):
    values = json.loads(encode_record(STEP)) | change
    with pytest.raises((TypeError, ValueError)):
        decode_line(json.dumps(values).encode())


def write(save, *records):
    log = AttemptLog(save)
    log.append_chained(records, "run")
    log.close()
    return log.path


def test_steps_are_read_without_the_evaluations_between(tmp_path):
    later = replace(STEP, step=4, position=12)
    path = write(tmp_path, STEP, EVALUATION, later)
    assert list(read_attempt(path)) == [STEP, later]
    assert [line.record for line in read_lines(path)] == [STEP, EVALUATION, later]


def test_lines_of_a_release_without_digests_are_read(tmp_path):
    log = AttemptLog(tmp_path)
    log.append(replace(STEP, digest=None))
    log.close()
    assert "digest" not in json.loads(log.path.read_text())
    assert [line.chain for line in read_lines(log.path)] == [None]
    assert list(read_attempt(log.path)) == [replace(STEP, digest=None)]


def test_numbers_go_on_behind_lines_and_facts(tmp_path):
    assert next_attempt_number(tmp_path) == 1
    write(tmp_path, STEP)
    assert [path.name for path in attempt_files(tmp_path)] == ["0001.jsonl"]
    (tmp_path / "attempts" / "0007.json").write_text("")
    assert next_attempt_number(tmp_path) == 8


def test_a_torn_last_line_is_left_out_and_one_in_the_middle_is_named(tmp_path):
    path = write(tmp_path, STEP, EVALUATION)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert len(list(read_lines(path))) <= 2
    path.write_bytes(b'{"step": 1, "posi\n' + whole)
    with pytest.raises(RunDirectoryError, match=r"0001\.jsonl:1: not a record"):
        list(read_lines(path))


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing_behind(tmp_path):
    log = AttemptLog(tmp_path)
    head = log.append_chained([STEP], "run")

    class FullDisk:
        """The file, which takes a few bytes more and then fails."""

        def __init__(self, file):
            self.file, self.room = file, 10

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if self.room == 0:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

    file, log._file = log._file, FullDisk(log._file)
    told = r"attempts/0001\.jsonl cannot be written: No space left .*; make room there and start"
    with pytest.raises(RunDirectoryError, match=told):
        log.append_chained([EVALUATION], head)
    log._file = file
    log.append_chained([EVALUATION], head)
    log.close()
    assert [line.record for line in read_lines(log.path)] == [STEP, EVALUATION]


@given(
    st.integers(min_value=1, max_value=12),
    st.integers(min_value=0, max_value=12),
    st.integers(min_value=1, max_value=4),
    st.integers(min_value=0, max_value=25),
    st.booleans(),
)
def test_searching_a_file_finds_what_reading_all_of_it_finds(
    tmp_path_factory, first, count, interval, step, is_torn
):
    records = [replace(EVALUATION, after_step=first - 1)]
    for number in range(first, first + count):
        records.append(replace(STEP, step=number))
        if number % interval == 0:
            records.append(replace(EVALUATION, after_step=number, position=number))
    records.append(replace(EVALUATION, after_step=first + count - 1, position=99, at_end=True))
    path = write(tmp_path_factory.mktemp("run"), *records)
    if is_torn:
        path.write_bytes(path.read_bytes() + b'{"stream": "valid", "aft')
    steps = [record for record in records if isinstance(record, StepRecord)]
    evaluations = [
        record for record in records if isinstance(record, EvaluationRecord) and not record.at_end
    ]
    assert find_step(path, step) == next((one for one in steps if one.step == step), None)
    assert [line.record for line in lines_since(path, step)] == [
        record
        for record in records
        if (record.step if isinstance(record, StepRecord) else record.after_step) >= step
    ]
    end = read_end(path)
    assert end.step == (steps[-1] if steps else None)
    assert end.evaluations == {"valid": evaluations[-1]}
    assert end.chain == list(read_lines(path))[-1].chain
