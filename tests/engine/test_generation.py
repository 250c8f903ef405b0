"""generate.py: the same texts at every topology, with and without kept keys, and transformers'."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from megatron.checkpoint.hugging_face.from_neox import ExportSettings, export_model
from megatron.cli.generate import generate_texts
from megatron.config.load import load_config
from megatron.data.tokenizers import build_tokenizer
from megatron.engine.distributed import RankEnvironment
from megatron.engine.sampling import Sampling, sample_generator
from tests.engine.test_topologies import TOPOLOGIES
from tests.engine.training_runs import ORACLE, neox_config, run_training, world_size
from tests.worlds import RankContext, run_ranks

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
PROMPTS = ["The quick brown fox", "def main():", "In the beginning", "x"]
CHECKPOINT = ORACLE / "ckpt_a"


def _config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS))
    return neox_config(
        tmp_path,
        **{
            "load": str(CHECKPOINT),
            "text_gen_type": "input-file",
            "sample_input_file": str(prompts),
            "sample_output_file": str(tmp_path / "samples.txt"),
            "maximum_tokens": 12,
        }
        | changes,
    )


def _generated(tmp_path: Path, **changes: Any) -> list[dict[str, Any]]:
    config = _config(tmp_path, **changes)
    ranks = world_size(config)
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config))
    resolved = load_config([path], {}, local_slots=lambda: ranks)

    def rank_main(context: RankContext) -> None:
        environment = RankEnvironment(
            context.rank, context.rank, context.world_size, context.init_method
        )
        with open(os.devnull, "w") as file, contextlib.redirect_stdout(file):
            generate_texts(resolved, environment)

    run_ranks(rank_main, ranks, tmp_path)
    lines = (tmp_path / "samples.txt").read_text().splitlines()
    return [_without_time(json.loads(line)) for line in lines]


def _without_time(record: dict[str, Any]) -> dict[str, Any]:
    assert record.pop("duration_seconds") >= 0
    return record


def _transformers_texts(checkpoint: Path, tmp_path: Path) -> list[str]:
    hub = export_model(checkpoint, tmp_path / "hub", ExportSettings(hidden_act="gelu_fast")).path
    model = AutoModelForCausalLM.from_pretrained(hub).eval()
    tokenizer = build_tokenizer("HFTokenizer", str(ORACLE.parent / "tokenizer" / "tok.json"))
    texts = []
    for prompt in PROMPTS:
        tokens = tokenizer.tokenize(prompt)
        start = len(tokens)
        for _ in range(12):
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1, : tokenizer.vocab_size]
            token = int(logits.argmax())
            if token == tokenizer.eod:
                break
            tokens.append(token)
        texts.append(tokenizer.detokenize(tokens[start:]))
    return texts


def test_greedy_texts_are_those_of_transformers_at_every_topology(tmp_path: Path):
    expected = _transformers_texts(CHECKPOINT / "global_step10", tmp_path)
    plain = _generated(tmp_path, **TOPOLOGIES["sequential"])
    assert [record["text"] for record in plain] == expected
    assert [record["context"] for record in plain] == PROMPTS
    assert all(record["length"] == 12 and not record["finished"] for record in plain)
    for name in ("TP2 x PP2", "DP2"):
        assert _generated(tmp_path, **TOPOLOGIES[name]) == plain, name
    assert _generated(tmp_path, **TOPOLOGIES["PP2"], recompute=True) == plain


def test_sampled_texts_are_the_same_at_every_topology_and_differ_by_seed(tmp_path: Path):
    drawn = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "text_gen_type": "unconditional"}
    drawn |= {"num_samples": 3}
    one = _generated(tmp_path, **TOPOLOGIES["one process"], **drawn)
    assert len({record["text"] for record in one}) == 3
    assert _generated(tmp_path, **TOPOLOGIES["TP2"], **drawn) == one
    assert _generated(tmp_path, **TOPOLOGIES["one process"], **drawn, seed=99) != one


VARIANTS = {
    "learned": {"pos_emb": "learned", "max_position_embeddings": 64},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "rpe": {"pos_emb": "rpe"},
    "alibi, window": {"pos_emb": "alibi", "sliding_window_width": 3},
    "grouped queries, normed": {"num_kv_heads": 2, "gpt_j_residual": False},
    "normed queries": {"use_qk_layernorm": True},
}


@pytest.mark.parametrize(
    "name",
    [
        "alibi, window",
        *(pytest.param(n, marks=pytest.mark.matrix) for n in VARIANTS if n[0] != "a"),
    ],
)
def test_kept_keys_and_values_change_nothing(name: str, tmp_path: Path):
    changes = VARIANTS[name] | TOPOLOGIES["sequential"]
    save = {"save": str(tmp_path / "save"), "checkpoint_factor": 2, "train_iters": 2}
    # A high rate: two steps have to make a model that says different things.
    rate = {"optimizer": {"type": "Adam", "params": {"lr": 0.05}}, "lr_decay_iters": 2}
    run_training(neox_config(tmp_path, **changes, **save, **rate), tmp_path / "world")
    keys = {"load": str(tmp_path / "save"), "maximum_tokens": 30, "return_logits": True}
    kept = _generated(tmp_path, **changes, **keys)
    again = _generated(tmp_path, **changes, **keys, recompute=True)
    for one, other in zip(kept, again, strict=True):
        assert one.keys() == other.keys()
        assert one["text"] == other["text"]
        for of_kept, of_all in zip(one["logits"], other["logits"], strict=True):
            assert of_kept == pytest.approx(of_all, rel=1e-4, abs=1e-5)


@pytest.mark.matrix
@pytest.mark.launcher
def test_a_conversation_through_a_terminal(tmp_path: Path):
    config = _config(tmp_path, text_gen_type="interactive", **TOPOLOGIES["TP2 x PP2"])
    path = tmp_path / "talk.yml"
    path.write_text(yaml.safe_dump(config))
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "generate.py"), str(path)]
    with subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        os.write(ours, f"{PROMPTS[0]}\n{PROMPTS[1]}\n".encode())
        os.write(ours, b"\x04")  # the end of the input
        said, complaints = process.communicate(timeout=200)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, complaints[-3000:]
    answers = [
        part.split("Context prompt >>>")[0].strip() for part in said.split("Generated Text:")[1:]
    ]
    written = _generated(tmp_path, **TOPOLOGIES["sequential"])
    assert answers == [record["text"].strip() for record in written[:2]]


def test_a_prompt_without_room_is_told_and_the_others_are_written(tmp_path: Path):
    config = {**TOPOLOGIES["sequential"], "prompt_end": "|"}
    prompts = tmp_path / "long.txt"
    prompts.write_text("word " * 500 + "|short|")
    records = _generated(tmp_path, **config, sample_input_file=str(prompts))
    assert records[0]["text"] is None
    assert "the model reads at most 63 (seq_length - 1)" in records[0]["message"]
    assert records[1]["text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": None}, "load is not set"),
        ({"sample_input_file": "/nowhere"}, "sample_input_file can't be read"),
        ({"text_gen_type": "precompute"}, "use unconditional, input-file or interactive"),
        ({"iteration": 11}, "iteration: 11 was asked for"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_written(changes, message, tmp_path: Path):
    with pytest.raises(Exception, match=message.replace("(", r"\(")):
        _generated(tmp_path, **TOPOLOGIES["sequential"], **changes)
    assert not (tmp_path / "samples.txt").exists()


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    counted = {
        name: {sampling.choose(logits, sample_generator(1, number)) for number in range(200)}
        for name, sampling in {
            "all": Sampling(temperature=1.0),
            "two": Sampling(top_k=2),
            "nucleus": Sampling(top_p=0.7),
            "at least one": Sampling(top_p=0.0001),
            "cold": Sampling(temperature=0.01),
            "greedy": Sampling(),
        }.items()
    }
    assert counted == {
        "all": {0, 1, 2, 3},
        "two": {1, 3},
        "nucleus": {1, 3},
        "at least one": {1},
        "cold": {1},
        "greedy": {1},
    }
