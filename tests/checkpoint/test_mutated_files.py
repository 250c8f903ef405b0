"""Files changed at random are read as data or refused: no reader ends in any other way."""

import random
import zipfile
from pathlib import Path

import pytest

from megatron.base.errors import CheckpointError
from megatron.checkpoint.safe_torch import read_torch_file
from megatron.checkpoint.structure import structural_problems
from megatron.checkpoint.verification import verify_checkpoint

TP2_PP2 = Path(__file__).parents[1] / "data" / "oracle" / "ckpt_b" / "global_step10"
NAMES = sorted(path.name for path in TP2_PP2.glob("*.pt"))
INSTRUCTIONS = b"RbcQhqr}]()ts.u\x85\x86\x87\x8a"


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(data))
        kind = rng.random()
        if kind < 0.4:
            data[place] = rng.randrange(256)
        elif kind < 0.6:
            data[place] = rng.choice(INSTRUCTIONS)
        elif kind < 0.8:
            del data[place : place + rng.randrange(1, 8)]
        else:
            source = rng.randrange(len(data))
            data[place:place] = data[source : source + rng.randrange(1, 40)]
    return bytes(data)


def write_mutated(source, target, rng):
    """Change the pickle, with right checksums, or the archive's directory at the end."""
    if rng.random() < 0.2:
        data = bytearray(source.read_bytes())
        data[-rng.randrange(1, 2000)] ^= 1 << rng.randrange(8)
        target.write_bytes(bytes(data))
        return
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, mutated(data, rng) if name.endswith("/data.pkl") else data)


def link_all_but(name, target):
    target.mkdir()
    for other in NAMES:
        if other != name:
            (target / other).hardlink_to(TP2_PP2 / other)


def check(directory, seed):
    rng = random.Random(seed)
    name = rng.choice(NAMES)
    link_all_but(name, directory)
    write_mutated(TP2_PP2 / name, directory / name, rng)
    refusal = ""
    try:
        read_torch_file(directory / name)
    except CheckpointError as error:
        refusal = str(error)
    structural_problems(directory)
    found = "\n".join(verify_checkpoint(directory).problems)
    assert (name in refusal and name in found) if refusal else "refused" not in found


@pytest.mark.parametrize("seed", range(20))
def test_a_mutated_file_is_data_or_refused(seed, tmp_path):
    check(tmp_path / "global_step10", seed)


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(20, 520))
def test_many_mutated_files_are_data_or_refused(seed, tmp_path):
    check(tmp_path / "global_step10", seed)
