"""A checkpoint with one malicious file: whoever reads it refuses it by name, and nothing runs."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from megatron.base.errors import CheckpointError
from megatron.checkpoint.stored import read_model_facts
from megatron.cli.checkpoints.inspect import main as inspect
from megatron.cli.checkpoints.verify import main as verify
from megatron.cli.ledger.main import main as ledger
from megatron.config.topology import Topology
from tests.checkpoint.malicious_files import ATTACKS
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import run_ranks

DATA = Path(__file__).parents[1] / "data"
ORACLE = DATA / "oracle"
TP2_PP2 = ORACLE / "ckpt_b" / "global_step10"
FILES = {
    "metadata": "mp_rank_00_model_states.pt",
    "layer": "layer_00-model_00-model_states.pt",
    "ZeRO": "zero_pp_rank_0_mp_rank_00_optim_states.pt",
}
REPRESENTATIVES = (
    "os.system",
    "os.system in an old file",
    "builtins.eval",
    "code in a state of an allowed class",
    "a persistent identity that is a call",
    "pickle.loads",
    "two pickles of one name",
    "a tensor that claims more than it has",
    "a name that is ten megabytes long",
)


def attacked(target, file, attack, canary):
    shutil.copytree(TP2_PP2, target, copy_function=shutil.copyfile)
    ATTACKS[attack].write(target / file, canary)
    (target.parent / "latest").write_text(target.name)
    return target


@pytest.mark.distributed
def test_a_load_refuses_every_kind_of_file_on_all_ranks_and_runs_nothing(tmp_path):
    cases = [(kind, attack) for kind in FILES for attack in REPRESENTATIVES]
    for number, (kind, attack) in enumerate(cases):
        target = tmp_path / str(number) / "global_step10"
        attacked(target, FILES[kind], attack, tmp_path / "canary")

    def worker(context):
        run = TinyRun(
            context, TinySettings(Topology(2, 1, 2), padded_vocab_size=384, bias_multiplicity=2)
        )
        messages = []
        for number in range(len(cases)):
            with pytest.raises(CheckpointError) as error:
                run.load(tmp_path / str(number) / "global_step10")
            messages.append(str(error.value))
        return messages

    results = run_ranks(worker, 4, tmp_path)
    assert all(messages == results[0] for messages in results)
    for (kind, attack), message in zip(cases, results[0], strict=True):
        assert FILES[kind] in message
        with pytest.raises(CheckpointError, match=ATTACKS[attack].message):
            raise CheckpointError(message)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("attack", REPRESENTATIVES)
@pytest.mark.parametrize("kind", FILES)
def test_the_tools_refuse_it_and_run_nothing(kind, attack, tmp_path, capsys):
    canary = tmp_path / "canary"
    target = attacked(tmp_path / "save/global_step10", FILES[kind], attack, canary)
    assert verify([str(tmp_path / "save"), "--deep"]) == 1
    printed = capsys.readouterr().out
    assert FILES[kind] in printed
    with pytest.raises(CheckpointError, match=ATTACKS[attack].message):
        raise CheckpointError(printed)
    assert inspect([str(target / FILES[kind])]) == 2
    with pytest.raises(CheckpointError, match=ATTACKS[attack].message):
        raise CheckpointError(capsys.readouterr().err)
    assert not canary.exists()


def config(tmp_path, load):
    """Write the configuration of the recorded NeoX run ``b``, going on from ``load``."""
    for suffix in ("bin", "idx"):
        shutil.copy(DATA / "stream/oracle" / f"corpus_a_text_document.{suffix}", tmp_path)
    shutil.copy(DATA / "tokenizer/tok.json", tmp_path)
    keys = yaml.safe_load((ORACLE / "ckpt_b/global_step10/configs/b.yml").read_text())
    keys |= {
        "data_path": str(tmp_path / "corpus_a_text_document"),
        "vocab_file": str(tmp_path / "tok.json"),
        "num_gpus": 4,
        "save": str(tmp_path / "new"),
        "load": str(load),
    }
    path = tmp_path / "my.yml"
    path.write_text(yaml.safe_dump(keys))
    return path


@pytest.mark.parametrize("attack", REPRESENTATIVES)
def test_explain_refuses_it_and_runs_nothing(attack, tmp_path, capsys):
    canary = tmp_path / "canary"
    attacked(tmp_path / "save/global_step10", FILES["metadata"], attack, canary)
    assert ledger(["explain", str(config(tmp_path, tmp_path / "save"))]) == 1
    with pytest.raises(CheckpointError, match=ATTACKS[attack].message):
        raise CheckpointError(capsys.readouterr().err)
    assert not canary.exists()


@pytest.mark.parametrize("attack", REPRESENTATIVES)
def test_the_models_facts_are_not_read_from_it(attack, tmp_path):
    canary = tmp_path / "canary"
    target = attacked(tmp_path / "global_step10", FILES["metadata"], attack, canary)
    with pytest.raises(CheckpointError, match=ATTACKS[attack].message):
        read_model_facts(target, gpt_j_residual=True)
    assert not canary.exists()


def test_a_stored_configuration_that_names_python_objects_runs_nothing(tmp_path, capsys):
    canary = tmp_path / "canary"
    target = tmp_path / "save/global_step10"
    shutil.copytree(TP2_PP2, target, copy_function=shutil.copyfile)
    (target.parent / "latest").write_text(target.name)
    stored = target / "configs" / "b.yml"
    stored.write_text(f"evil: !!python/object/apply:os.system ['touch {canary}']\n")
    ledger(["explain", str(config(tmp_path, tmp_path / "save"))])
    assert verify([str(target)]) == 0  # nothing reads it there
    capsys.readouterr()
    assert not canary.exists()


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("a FIFO", "configs/b.yml: neither a file nor a directory"),
        ("a device named in it", "its data "),  # something had to be assumed
    ],
)
def test_a_stored_configuration_that_never_ends_is_not_waited_for(what, told, tmp_path, capsys):
    target = tmp_path / "save/global_step10"
    shutil.copytree(TP2_PP2, target, copy_function=shutil.copyfile)
    (target.parent / "latest").write_text(target.name)
    stored = target / "configs" / "b.yml"
    if what == "a FIFO":
        stored.unlink()
        os.mkfifo(stored)
    else:
        keys = yaml.safe_load(stored.read_text())
        stored.write_text(yaml.safe_dump({**keys, "vocab_file": "/dev/zero"}))
    signal.alarm(30)  # ends the process instead of a test that hangs
    ledger(["explain", str(config(tmp_path, tmp_path / "save"))])
    signal.alarm(0)
    printed = capsys.readouterr()
    assert told in printed.out + printed.err
