"""Scripts written for NeoX save and load through its names."""

import os
import socket

import pytest
import yaml

import megatron.training
from megatron.base.errors import CheckpointError, ConfigError
from megatron.checkpointing import load_checkpoint, save_checkpoint
from megatron.neox_arguments import NeoXArgs
from tests.engine.training_runs import neox_config
from tests.worlds import run_ranks


def set_up(tmp_path, **keys):
    # The launcher's variables, as a script of NeoX's users would find them.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    path = tmp_path / "config.yml"
    keys = {"train_iters": 3, "lr_decay_iters": 20, "checkpoint_factor": 100} | keys
    path.write_text(yaml.safe_dump(neox_config(tmp_path, **keys)))
    arguments = NeoXArgs.from_ymls([str(path)])
    return arguments, *megatron.training.setup_model_and_optimizer(arguments)[:3]


@pytest.mark.distributed
def test_what_is_saved_is_loaded(tmp_path):
    save = tmp_path / "save"

    def first(context):
        arguments, model, optimizer, scheduler = set_up(tmp_path, save=str(save), load=str(save))
        assert load_checkpoint(arguments, model, optimizer, scheduler) == 0  # nothing is there yet
        megatron.training.forward_step(None, model, arguments, is_train=True)
        save_checkpoint(
            neox_args=arguments,
            iteration=1,
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
        )
        return megatron.training.forward_step(None, model, arguments)

    def second(context):
        arguments, model, optimizer, scheduler = set_up(tmp_path)
        arguments.update_value("load", str(save))
        iteration = load_checkpoint(arguments, model, optimizer, scheduler)
        assert (iteration, scheduler.num_iters, model.global_steps) == (1, 1, 1)
        for keys in ({"inference": True}, {"iteration": 1}):
            assert load_checkpoint(arguments, model, optimizer, scheduler, **keys) == 1
        with pytest.raises(CheckpointError, match=r"iteration: 7 .*global_step1"):
            load_checkpoint(arguments, model, optimizer, scheduler, iteration=7)
        with pytest.raises(ConfigError, match="save is not set"):
            save_checkpoint(arguments, 1, model, optimizer, scheduler)
        next(megatron.training._prepared[id(model)].training.train_batches)
        next(megatron.training._prepared[id(model)].training.train_batches)
        return megatron.training.forward_step(None, model, arguments)

    (saved,) = run_ranks(first, 1, tmp_path)
    (loaded,) = run_ranks(second, 1, tmp_path)
    assert loaded == saved
