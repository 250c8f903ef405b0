"""What a rank leaves out when it imports megatron-core, and that nothing of it is lost."""

import subprocess
import sys

import pytest
import torch

from megatron.model.light_import import compiled_when_called, light_import


@pytest.fixture
def compilations(monkeypatch):
    """Count what is given to torch.compile instead of compiling it, which takes minutes."""
    given = []

    def compile_now(function, **options):
        given.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile_now)
    return given


def test_functions_are_compiled_by_their_first_call(compilations):
    def double(value):
        return 2 * value

    def triple(value):
        return 3 * value

    with compiled_when_called():
        plain = torch.compile(double)
        decorated = torch.compile(dynamic=True)(triple)
    assert compilations == []
    assert [plain(1), plain(2), decorated(1)] == [2, 4, 3]
    assert compilations == [(double, {}), (triple, {"dynamic": True})]
    assert plain.__name__ == "double"


def test_modules_are_compiled_at_once_and_so_is_everything_afterwards(compilations):
    module = torch.nn.Linear(1, 1)
    with compiled_when_called():
        assert torch.compile(module) is module
    torch.compile(abs)
    assert [given for given, _ in compilations] == [module, abs]


def test_what_was_left_out_can_be_imported_later():
    program = (
        "import sys; from megatron.model.light_import import light_import\n"
        "with light_import():\n"
        "    try: import wandb\n"
        "    except ImportError: print('left out')\n"
        "import wandb, torch.utils.tensorboard\n"
        "with light_import(): import wandb as again\n"  # loaded before: it stays
        "print(again is wandb)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["left out", "True"]


def test_an_error_inside_leaves_torch_as_it_was():
    compile_now = torch.compile
    with pytest.raises(KeyError), light_import():
        raise KeyError("x")
    assert torch.compile is compile_now
    assert sys.modules.get("wandb", 1) is not None


def test_training_imports_no_compiler_tracker_or_hub():
    program = "import sys, megatron.cli.train; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "megatron.core.tensor_parallel.layers" in loaded
    heavy = {"torch._dynamo", "wandb", "tensorboard", "rich", "transformers", "tokenizers"}
    assert not loaded & {*heavy, "huggingface_hub", "datasets", "boto3", "pandas", "matplotlib"}
