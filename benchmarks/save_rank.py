"""The one process of save.py: DeepSpeed's save and ours of the same engine, in turns."""

import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

import torch

from megatron.checkpoint import hashed_file
from megatron.checkpoint.save_settings import SaveSettings
from megatron.checkpoint.saver import Saver
from megatron.checkpoint.stored import StoredFacts
from megatron.config.batch_geometry import BatchGeometry
from megatron.config.topology import Topology
from megatron.engine.assembly import ModuleSettings, build_module, initialize_engine
from megatron.engine.deepspeed_config import deepspeed_settings
from megatron.engine.distributed import ProcessGroups, RankEnvironment, connect
from megatron.engine.optimizers import build_optimizer
from megatron.engine.seeding import prepare_random_state, tensor_parallel_stream
from megatron.model.facts import ModelFacts
from megatron.model.layer_plan import layer_plan
from megatron.model.loss import cross_entropy_loss
from megatron.model.parallel_layers import TensorParallel
from megatron.model.settings import ModelSettings
from megatron.optim.param_groups import weight_decay_groups
from megatron.optim.schedules import LearningRateScheduler, ScheduleSettings

TOPOLOGY = Topology(1, 1, 1)
HIDDEN, HEADS, SEQ_LENGTH, VOCABULARY = 512, 8, 64, 8192
BYTES_PER_PARAMETER = 16  # weight, master, two moments, in fp32
PAUSE_S = 1.0  # for the disk, after what is left to write is written


def main(directory: Path, megabytes: int, rounds: int) -> None:
    """Measure and print one JSON object."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks
    groups = connect(
        RankEnvironment(0, 0, 1, f"file://{directory}/store"), TOPOLOGY, backend="gloo"
    )
    engine = build_engine(groups, megabytes)
    batch = make_batch()
    step = functools.partial(take_step, engine, batch)
    step()  # the optimizer's state comes into being
    watch = Watch()
    saver = Saver(
        engine,
        SaveSettings(directory / "ours", {}, StoredFacts(ModelFacts(VOCABULARY, 1), 1), {}),
        rank=0,
        world_size=1,
        gather=groups.gather,
    )
    measured: dict[str, Any] = {"deepspeed": [], "writing_unhashed": [], "step": []}
    measured |= {"stall": [], "writing": [], "reread": [], "slowdown": []}
    for number in range(rounds + 1):
        rest()
        theirs = save_with_deepspeed(engine, directory / "deepspeed")
        rest()
        watch.hashes = False
        alone = timed(step)
        unhashed = save_with_ours(saver, number, step, watch, alone)
        shutil.rmtree(directory / "ours")
        rest()
        watch.hashes = True
        ours = save_with_ours(saver, number, step, watch, alone)
        shutil.rmtree(directory / "ours")
        if number == 0:  # memory and code are new to both
            measured["first"] = [unhashed["stall"]]
            measured["bytes"] = saver.snapshot_bytes
            continue
        measured["deepspeed"].append(theirs)
        measured["step"].append(alone)
        measured["writing_unhashed"].append(unhashed["writing"])
        for name, value in ours.items():
            measured[name].append(value)
    print(json.dumps(measured))


def build_engine(groups: ProcessGroups, megabytes: int) -> Any:
    """Return an engine whose checkpoints have about so many megabytes of tensors."""
    prepare_random_state(groups, 1234, partition_activations=False)
    per_layer = 12 * HIDDEN**2
    parameters = megabytes * 1e6 / BYTES_PER_PARAMETER
    num_layers = max(1, round((parameters - 2 * VOCABULARY * HIDDEN) / per_layer))
    settings = ModelSettings(
        num_layers=num_layers,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_kv_heads=HEADS,
        seq_length=SEQ_LENGTH,
        max_position_embeddings=SEQ_LENGTH,
        padded_vocab_size=VOCABULARY,
        tp_bias_multiplicity=1,
        rotary_dims=HIDDEN // HEADS // 4,
        mlp_up_size=4 * HIDDEN,
        mlp_down_size=4 * HIDDEN,
        gpt_j_residual=False,
        tied_embedding=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method="normal",
        output_layer_init_method="scaled_normal",
    )
    tensor_parallel = TensorParallel()
    plan = layer_plan(
        settings,
        tensor_parallel,
        seed=1234,
        dtype=torch.float32,
        dropout_rng=tensor_parallel_stream,
    )
    module = build_module(
        plan, groups, loss_function, ModuleSettings("type:transformer|mlp", checkpoint_interval=0)
    )
    optimizer = build_optimizer(
        weight_decay_groups(module, 0.1),
        optimizer_type="adam",
        params={"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8},
        weight_decay=0.1,
    )
    schedule = ScheduleSettings(
        start_lr=1e-4, min_lr=1e-5, warmup=0.1, decay_iters=1000, decay_style="cosine"
    )
    engine, _ = initialize_engine(
        module,
        groups,
        optimizer,
        LearningRateScheduler(optimizer, schedule),
        deepspeed_settings(
            {},
            geometry=BatchGeometry(1, 1, 1),
            precision="fp32",
            fp16=None,
            bf16=None,
            gradient_clipping=1.0,
            zero_optimization={"stage": 1},
            extra={},
        ),
    )
    return engine


def loss_function(logits: torch.Tensor, labels: Any) -> torch.Tensor:
    """Return the loss of a micro batch."""
    return cross_entropy_loss(logits, *labels, TensorParallel())


def make_batch() -> Any:
    """Return one micro batch of random tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (1, SEQ_LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].contiguous()
    return tokens[:, :-1].contiguous(), (labels, torch.ones(labels.shape))


def take_step(engine: Any, batch: Any) -> None:
    """Take one training step."""
    engine.train_batch(data_iter=iter([batch]))


def save_with_deepspeed(engine: Any, directory: Path) -> float:
    """Return how long DeepSpeed's own save keeps training."""
    seconds = timed(lambda: engine.save_checkpoint(str(directory), tag="saved"))
    shutil.rmtree(directory)
    return seconds


def save_with_ours(
    saver: Saver, number: int, step: Callable[[], None], watch: "Watch", alone: float
) -> dict[str, float]:
    """Save while training goes on; return what it took."""
    watch.waiting = 0.0
    read_before = bytes_read()
    began = time.perf_counter()
    saver.save(number)
    stall = time.perf_counter() - began
    slowdown = 0.0
    is_over = False
    while not is_over:
        slowdown += timed(step) - alone
        began = time.perf_counter()
        is_over = saver.poll()
        stall += time.perf_counter() - began
    return {
        "stall": stall + watch.waiting,
        "writing": watch.writing,
        "reread": bytes_read() - read_before,
        "slowdown": slowdown - watch.waiting,
    }


class Watch:
    """Times what a save does where nobody sees it, and writes without digests when told to."""

    def __init__(self) -> None:
        self.hashes = True
        self.waiting = 0.0  # of the optimizer, for the copy
        self.writing = 0.0  # processor time of a writer thread
        watch, digest = self, hashed_file.FileDigest
        write, await_copy = Saver._write, Saver._await_copy

        class Digest(digest):  # type: ignore[misc, valid-type]
            def update(self, data: Any) -> None:
                if watch.hashes:
                    super().update(data)
                else:
                    self._size += len(data)

        def timed_write(saver: Saver, *arguments: Any) -> None:
            began = time.thread_time()
            write(saver, *arguments)
            watch.writing = time.thread_time() - began

        def timed_await(saver: Saver, *arguments: Any) -> None:
            watch.waiting += timed(lambda: await_copy(saver, *arguments))

        hashed_file.FileDigest = Digest  # type: ignore[misc]
        Saver._write = timed_write  # type: ignore[method-assign]
        Saver._await_copy = timed_await  # type: ignore[method-assign]


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that ``action`` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def rest() -> None:
    """Let the disk come to rest."""
    os.sync()
    time.sleep(PAUSE_S)


def bytes_read() -> int:
    """Return the bytes this process has read so far, from wherever."""
    text = Path("/proc/self/io").read_text()
    return int(text.splitlines()[0].split()[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
