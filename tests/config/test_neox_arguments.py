"""NeoXArgs as NeoX's users and its own tests know it."""

import copy
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron import NeoXArgs
from megatron.base.errors import ConfigError
from megatron.config.registry import keys
from tests.config.configurations import DATA, MODEL

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
LOCAL = [CONFIGS / name for name in ("125M.yml", "local_setup.yml", "cpu_mock_config.yml")]
MODELS = ["19M", "49M", "125M", "160M", "350M", "760M", "1-3B", "2-7B", "6-7B", "13B", "small"]
LEAST = {**MODEL, "global_num_gpus": 1, "train_micro_batch_size_per_gpu": 1}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("MASTER_ADDR", "DLTS_HOSTFILE", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("more", [[], ["text_generation.yml"]], ids=["train", "generate"])
def test_flat_attributes_equal_the_values_of_the_files(model, more):
    names = [f"{model}.yml", "local_setup.yml", "cpu_mock_config.yml", *more]
    paths = [CONFIGS / name for name in names]
    ranks = {"global_num_gpus": 8}  # the larger models are divided over several
    loaded = NeoXArgs.from_ymls(paths, ranks)
    written = {}
    for path in paths:
        written |= yaml.load(path.read_text(), Loader=yaml.FullLoader)  # as NeoX reads
    for key, value in written.items():
        if key not in ranks:
            assert getattr(loaded, key.replace("-", "_")) == value, key


def test_every_key_of_neox_is_a_field():
    assert set(NeoXArgs.__dataclass_fields__) == set(keys())
    assert NeoXArgs.validate_keys()


def test_a_file_without_a_model_is_refused():
    with pytest.raises(ConfigError, match="num_layers is missing"):
        NeoXArgs.from_ymls([CONFIGS / "local_setup.yml"])
    with pytest.raises(ConfigError, match="num_layers is missing"):
        NeoXArgs.from_ymls([])


def test_deepy_s_command_line_gives_what_its_files_give(monkeypatch):
    argv = [
        "deepy.py",
        "train.py",
        "-d",
        str(CONFIGS),
        "125M",
        "local_setup",
        "cpu_mock_config.yml",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    from_command_line = NeoXArgs.consume_deepy_args()
    from_files = NeoXArgs.from_ymls(LOCAL)
    assert from_command_line != from_files
    from_files.update_value("user_script", "train.py")
    assert from_command_line == from_files


def test_the_hostfile_option_wins():
    argv = ["train.py", *map(str, LOCAL), "--hostfile=/other_path"]
    assert NeoXArgs.consume_deepy_args(argv).hostfile == "/other_path"


def test_ranks_get_what_the_launcher_had(monkeypatch):
    baseline = NeoXArgs.from_ymls(LOCAL)
    baseline.update_value("user_script", str(ROOT / "train.py"))
    monkeypatch.setattr(sys, "argv", baseline.get_deepspeed_main_args())
    loaded = NeoXArgs.consume_neox_args()
    assert loaded.megatron_config == baseline.megatron_config
    assert loaded == baseline


def test_evaluation_overwrites_on_the_rank():
    loaded = NeoXArgs.consume_neox_args(
        {"optimizer": None, "zero_optimization": None, "no_load_optim": True},
        NeoXArgs.from_ymls(LOCAL).get_deepspeed_main_args(),
    )
    assert (loaded.optimizer, loaded.zero_stage, loaded.no_load_optim) == (None, 0, True)


def test_the_launcher_s_arguments_are_neox_s(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    neox = NeoXArgs.from_ymls(LOCAL, {"user_script": "train.py"})
    arguments = neox.get_deepspeed_main_args()
    assert arguments[:6] == [
        "--hostfile",
        "/mock_path",
        "--master_addr",
        "127.0.0.1",
        "train.py",
        "--deepspeed_config",
    ]
    assert arguments[7] == "--megatron_config"


def test_launcher_options_follow_neox_s_rules(monkeypatch, caplog):
    monkeypatch.setenv("DLTS_HOSTFILE", "/hosts")
    neox = NeoXArgs(
        **LEAST,
        deepspeed_slurm=True,
        num_gpus=2,
        include="a@b",
        no_ssh_check=True,
        comment="why",
        master_port=1,
    )
    assert neox.get_deepspeed_main_args()[:-5] == [
        *("--hostfile", "/hosts", "--include", "a@b", "--master_port", "1"),
        *("--force_multi", "--no_ssh_check", "--comment", "why"),
    ]
    assert "num_gpus=2 is left out" in caplog.text


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 0, 1)),
        ({"LOCAL_RANK": "1", "RANK": "5", "WORLD_SIZE": "8"}, (1, 5, 8)),
    ],
)
def test_ranks_come_from_the_environment(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    neox = NeoXArgs(**LEAST)
    neox.configure_distributed_args()
    assert (neox.local_rank, neox.rank, neox.world_size) == expected


def test_under_slurm_ranks_come_from_its_variables(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # restored after the test
        monkeypatch.setenv(name, "0")
    slurm = {"LOCALID": "1", "PROCID": "3", "NNODES": "2", "NTASKS_PER_NODE": "4"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    neox = NeoXArgs(**LEAST, deepspeed_slurm=True)
    neox.configure_distributed_args()
    assert (neox.local_rank, neox.rank, neox.world_size) == (1, 3, 8)
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(ConfigError, match="SLURM_PROCID is not in the environment"):
        neox.configure_distributed_args()


def test_an_unknown_key_is_a_type_error_with_a_suggestion():
    with pytest.raises(TypeError, match=r"'num_layer' \(did you mean 'num_layers'\?\)"):
        NeoXArgs.from_dict({**LEAST, "num_layer": 3})
    with pytest.raises(ValueError, match="no key 'sed'"):
        NeoXArgs(**LEAST).update_value("sed", 3)


def test_gas_reads_and_writes_the_long_name():
    neox = NeoXArgs(**LEAST, gas=2)
    assert (neox.gas, neox.gradient_accumulation_steps, neox.train_batch_size) == (2, 2, 2)
    neox.gas = 4
    assert neox.gradient_accumulation_steps == 4


def test_values_can_be_written_and_copies_are_equal():
    neox = NeoXArgs(**LEAST)
    neox.update_values({"seed": 1, "train_iters": 10})
    for other in (copy.deepcopy(neox), pickle.loads(pickle.dumps(neox))):
        assert other == neox
    assert (neox.tensorboard_writer, neox.adlr_autoresume_object, neox.tokenizer) == (None,) * 3


def test_written_values_reach_our_own_configuration():
    neox = NeoXArgs(**LEAST, train_iters=5)
    neox.train_iters = 7
    config = neox.to_run_config()
    assert config.training.train_iters == 7
    assert config.geometry.global_batch_size == 1


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp16", torch.half), ("bfloat16", torch.bfloat16), (None, torch.float)],
)
def test_params_dtype_follows_precision(precision, dtype):
    assert NeoXArgs(**LEAST, precision=precision).params_dtype is dtype


def test_the_dumps_divide_the_keys():
    neox = NeoXArgs(**LEAST, gradient_clipping=0.5, deepspeed_extra_args={"comms": 1}, num_nodes=2)
    assert neox.deepspeed_config["gradient_clipping"] == 0.5
    assert neox.deepspeed_config["comms"] == 1
    assert neox.deepspeed_runner["num_nodes"] == 2
    assert "train_batch_size" not in neox.megatron_config
    assert neox.megatron_config["num_layers"] == 2
    assert set(neox.megatron_config) | set(neox.deepspeed_runner) < set(neox.all_config)
    assert dict(neox.defaults())["log_interval"] == 100


def test_the_tokenizer_gives_the_padded_vocabulary():
    neox = NeoXArgs(**LEAST, tokenizer_type="CharLevelTokenizer", make_vocab_size_divisible_by=100)
    neox.build_tokenizer()
    assert neox.tokenizer.vocab_size == 512
    assert neox.padded_vocab_size == 600


def test_printing_shows_every_key_on_rank_0_only(capsys):
    neox = NeoXArgs(**LEAST)
    neox.print()
    printed = capsys.readouterr().out
    assert all(name in printed for name in keys())
    neox.rank = 1
    neox.print()
    assert capsys.readouterr().out == ""


def test_a_v1_0_configuration_is_taken_as_it_is():
    neox = NeoXArgs.from_ymls([DATA / "pythia" / "tiny.yml"], {"global_num_gpus": 4})
    assert neox.precision == "fp16"
    assert neox.config_files.keys() == {"tiny.yml"}


def test_attributes_read_off_args_anywhere_are_keys():
    # NeoX has a test like this one: whatever stands behind `args.` must be declared
    pattern = re.compile(r"\b(?:neox_|kw)?args\.([A-Za-z_]\w*)")
    sources = [p for p in (ROOT / "megatron").rglob("*.py") if p.name != "train_tokenizer.py"]
    strangers = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources
        for name in pattern.findall(path.read_text())
        if not hasattr(NeoXArgs, name) and name not in keys()
    }
    assert strangers == set()
