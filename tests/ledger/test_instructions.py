"""One-time instructions: the same command again continues, another one is obeyed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.ledger.instructions import InstructedAttempt, Instruction, decide

SAVE = Path("/runs/a")
TO_100 = Instruction(kind="iteration", iteration=100, load="/runs/a")
TO_200 = Instruction(kind="iteration", iteration=200, load="/runs/a")
START = Instruction(kind="start")


class Launches:
    """Launches of one run; each obeys or continues as decided, then commits some checkpoints."""

    def __init__(self):
        self.attempts = []

    def launch(self, instruction, *committed):
        """Return whether the launch obeyed."""
        obeys = decide(instruction, self.attempts).obeys
        self.attempts.append(
            InstructedAttempt(
                number=len(self.attempts) + 1,
                instruction=instruction,
                obeyed=obeys,
                committed_steps=committed,
            )
        )
        return obeys


@pytest.mark.parametrize(
    ("load", "iteration", "finetune", "expected"),
    [
        (None, None, False, START),
        ("/runs/a", None, False, None),
        ("/runs/x/../a", None, False, None),
        ("/runs/a", 100, False, TO_100),
        ("/runs/b", None, False, Instruction(kind="load", load="/runs/b")),
        ("/runs/b", 5, False, Instruction(kind="iteration", iteration=5, load="/runs/b")),
        ("/runs/b", None, True, Instruction(kind="finetune", load="/runs/b")),
        ("/runs/b", 5, True, Instruction(kind="finetune", iteration=5, load="/runs/b")),
    ],
)
def test_keys_ask_for(load, iteration, finetune, expected):
    path = None if load is None else Path(load)
    asked = Instruction.of(load=path, save=SAVE, iteration=iteration, finetune=finetune)
    assert asked == expected


def test_a_roll_back_is_done_once_and_its_requeues_continue():
    run = Launches()
    run.launch(START, 100, 200)
    assert run.launch(TO_100, 150)
    assert not run.launch(TO_100)
    assert not run.launch(TO_100, 200)
    assert not run.launch(TO_100)


def test_a_roll_back_that_saved_nothing_is_done_again():
    run = Launches()
    run.launch(START, 100, 200)
    assert run.launch(TO_100)
    assert run.launch(TO_100)
    assert run.launch(TO_100, 150)
    assert not run.launch(TO_100)


def test_100_200_100_rolls_back_three_times():
    run = Launches()
    run.launch(START, 100, 200)
    assert [run.launch(one, 250) for one in (TO_100, TO_200, TO_100)] == [True, True, True]


def test_a_launch_without_the_key_allows_the_same_again():
    run = Launches()
    run.launch(START, 100, 200)
    assert run.launch(TO_100, 150)
    assert not run.launch(None, 300)
    assert run.launch(TO_100, 150)


def test_a_run_without_load_starts_once():
    run = Launches()
    assert run.launch(START)
    assert run.launch(START, 100)
    assert not run.launch(START, 200)


def test_another_load_is_another_instruction():
    run = Launches()
    assert run.launch(Instruction(kind="load", load="/runs/b"), 100)
    assert not run.launch(Instruction(kind="load", load="/runs/b"), 100)
    assert run.launch(Instruction(kind="load", load="/runs/c"), 100)


def test_the_plan_is_told_why():
    run = Launches()
    run.launch(TO_100, 150, 160)
    decision = decide(TO_100, run.attempts)
    assert decision.reason == (
        "load iteration: 100 of /runs/a: done by attempt 1, which has saved since "
        "(newest: step 160); the run continues from there"
    )
    assert decide(None, run.attempts).reason == "nothing else is asked for: the run continues"


@given(
    st.lists(st.tuples(st.sampled_from([None, TO_100, TO_200, START]), st.booleans()), max_size=12)
)
def test_a_launch_obeys_unless_it_repeats_one_that_has_saved_since(launches):
    run = Launches()
    previous, has_saved = None, False  # told as a story: what the last command was, and its saves
    for instruction, saves in launches:
        if instruction is None:
            expected = False
        elif instruction == previous:
            expected = not has_saved
        else:
            expected, has_saved = True, False
        assert run.launch(instruction, *([100] if saves else [])) == expected
        previous, has_saved = instruction, has_saved or saves
