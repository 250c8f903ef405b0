"""configs/pythia against the numbers that pythia.md gives: sizes, rates, positions."""

import math
from pathlib import Path

import pytest

from megatron.base.errors import ConfigError
from megatron.checkpoint.hugging_face.names import whole_shapes
from megatron.cli.pythia.models import model_of_name_and_files
from megatron.config.load import load_config
from megatron.config.outcomes import check_launch
from megatron.data.tokenizers import padded_vocab_size
from megatron.model.facts import ModelFacts
from megatron.model.settings import ModelSettings
from megatron.optim.schedules import ScheduleSettings
from megatron.stream.segments import Segment, SegmentTable

CONFIGS = Path(__file__).parents[2] / "configs" / "pythia"
TOKENIZER_SIZE = 50277

# size: layers, width, heads, learning rate, tensor ranks, released GPUs, vocabulary, parameters
TABLE = {
    "14M": (6, 128, 4, 1e-3, 1, 32, 50304, 14_067_712),
    "31M": (6, 256, 8, 1e-3, 1, 32, 50304, 30_494_720),
    "70M": (6, 512, 8, 1e-3, 1, 32, 50304, 70_426_624),
    "160M": (12, 768, 12, 6e-4, 1, 32, 50304, 162_322_944),
    "410M": (24, 1024, 16, 3e-4, 1, 32, 50304, 405_334_016),
    "1B": (16, 2048, 8, 2.5e-4, 1, 64, 50304, 1_011_781_632),
    "1-4B": (24, 2048, 16, 2e-4, 1, 64, 50304, 1_414_647_808),
    "2-8B": (32, 2560, 32, 1.6e-4, 1, 64, 50304, 2_775_208_960),
    "6-9B": (32, 4096, 32, 1.2e-4, 2, 128, 50432, 6_857_302_016),
    "12B": (36, 5120, 40, 1.2e-4, 4, 256, 50688, 11_846_072_320),
}
DEDUPED = [size for size in TABLE if size not in ("14M", "31M")]
# What the files of a model may disagree in: the data set alone.
DATA = {"train_data_paths", "valid_data_paths", "test_data_paths"}

SUITE = [*TABLE, *(f"{size}-deduped" for size in DEDUPED)]
V0 = [f"v0/{size}{suffix}" for size in DEDUPED for suffix in ("", "-deduped")]
ABLATIONS = {  # steps, samples of a step
    "batch_size/70M-0-25M": (1_144_000, 128),
    "batch_size/160M-0-5M": (572_000, 256),
    "batch_size/410M-0-5M": (572_000, 256),
    "batch_size/1B-0-5M": (572_000, 256),
    "batch_size/1-4B-1M": (286_000, 512),
}
SEEDS = {
    **{f"seed{n}": n for n in range(1, 10)},
    **{f"data-seed{n}": n for n in range(1, 4)},
    **{f"weight-seed{n}": 1234 for n in range(1, 4)},
}


def load(*names, gpus=16):
    files = [CONFIGS / f"{name}.yml" for name in names]
    return load_config(files, {"num_gpus": gpus}, local_slots=lambda: gpus, environ={})


def size_of(name):
    return name.rpartition("/")[2].removesuffix("-deduped")


def schedule(config):
    return ScheduleSettings.from_config(
        config.lr_scheduler,
        config.optimizer,
        config.training,
        neox_version=config.ledger.neox_version,
    ).schedule()


def closed_formula(count, peak, *, decay, floor):
    """The rate after ``count`` updates as pythia.md §5.1 writes it."""
    warmup = 0.01 * decay
    if count <= warmup:
        return peak * min(count, decay - warmup) / warmup
    angle = math.pi * (min(count, decay - warmup) - warmup) / decay
    return max(floor, peak / 2 * (math.cos(angle) + 1))


def test_these_are_all_the_files_there_are():
    named = {*SUITE, *V0, *ABLATIONS, *SEEDS}
    there = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.*")}
    assert there == named


@pytest.mark.parametrize("name", SUITE)
def test_a_model_is_the_one_of_the_table(name):
    layers, width, heads, peak, tensor_ranks, gpus, vocabulary, parameters = TABLE[size_of(name)]
    config = load(name, gpus=gpus)
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (
        layers,
        width,
        heads,
    )
    assert config.optimizer.lr == peak
    assert config.lr_scheduler.min_lr == pytest.approx(peak / 10, rel=1e-12)
    assert config.topology.tensor_parallel_size == tensor_ranks
    assert config.geometry.global_batch_size == 1024
    rows = padded_vocab_size(TOKENIZER_SIZE, model.make_vocab_size_divisible_by, tensor_ranks)
    assert rows == vocabulary
    settings = ModelSettings.from_config(
        model, config.training, ModelFacts(rows, tensor_ranks), neox_version="v1.0"
    )
    assert settings.activation == "gelu_tanh"
    assert sum(map(math.prod, whole_shapes(settings).values())) == parameters


@pytest.mark.parametrize("name", SUITE)
def test_the_learning_rate_is_that_of_the_closed_formula(name):
    peak = TABLE[size_of(name)][3]
    rates = schedule(load(name))
    for step in (1, 2, 512, 1000, 1430, 1431, 2000, 50_000, 100_000, 115_139, 115_140, 143_000):
        expected = closed_formula(step - 1, peak, decay=143_000, floor=peak / 10)
        assert rates.at(step - 1) == pytest.approx(expected, rel=1e-12), step


def test_the_closed_formula_gives_the_values_that_were_recorded():
    recorded = {
        1000: 6.99301e-4,
        1430: 1e-3,
        2000: 9.99961e-4,
        50_000: 7.41358e-4,
        100_000: 2.19868e-4,
        115_000: 1.00917e-4,
    }
    rates = schedule(load("70M"))
    for count, rate in recorded.items():
        assert rates.at(count) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize("step", [0, 1, 512, 1000, 143_000])
def test_a_step_has_consumed_1024_samples_for_each(step):
    batch = load("160M-deduped").geometry.global_batch_size
    segment = Segment(
        first_step=1, batch_size=batch, first_position=0, order_id="x", first_order_position=0
    )
    assert SegmentTable((segment,)).positions(step + 1).start == step * 1024


@pytest.mark.parametrize("size", DEDUPED)
@pytest.mark.parametrize("folder", ["", "v0/"])
def test_the_deduplicated_set_is_all_that_differs_between_a_models_two_files(size, folder):
    gpus = TABLE[size][5] // 2
    plain = load(folder + size, gpus=gpus).flat()
    deduped = load(f"{folder}{size}-deduped", gpus=gpus).flat()
    different = {key for key in plain if plain[key] != deduped[key]} - {"config_files"}
    assert different == DATA
    assert "pile_20B_tokenizer" in plain["train_data_paths"][0]
    assert "pile_0.87_deduped" in deduped["train_data_paths"][0]


@pytest.mark.parametrize("name", V0)
def test_version_0_took_4_million_tokens_a_step_in_three_sizes(name):
    size = size_of(name)
    config = load(name)
    has_large_batch = size in ("160M", "410M", "1-4B")
    assert config.geometry.global_batch_size == (2048 if has_large_batch else 1024)
    assert config.training.train_iters * config.geometry.global_batch_size == 146_432_000
    decay = 71_250 if has_large_batch else 143_000
    floor = 0.0 if size in ("6-9B", "12B") else TABLE[size][3] / 10
    for count in (0, 500, 30_000, 71_000):
        expected = closed_formula(count, TABLE[size][3], decay=decay, floor=floor)
        assert schedule(config).at(count) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_sees_the_same_samples_in_smaller_steps(name):
    config = load(name, gpus=4)
    assert (config.training.train_iters, config.geometry.global_batch_size) == ABLATIONS[name]
    assert math.prod(ABLATIONS[name]) == 146_432_000


@pytest.mark.parametrize("overlay", SEEDS)
def test_an_overlay_sets_the_seed_and_nothing_else(overlay):
    base, seeded = load("160M"), load("160M", overlay)
    flat = seeded.flat()
    different = {key for key, value in base.flat().items() if flat[key] != value}
    assert seeded.other.seed == SEEDS[overlay]
    assert different - {"config_files", "seed"} == set()


@pytest.mark.parametrize("name", [*SUITE, *V0, *ABLATIONS])
def test_no_key_is_refused_under_the_v1_profile(name):
    config = load(name, gpus=4)
    assert config.ledger.neox_version == "v1.0"
    assert config.other.seed == 1234
    check_launch(config)


@pytest.mark.parametrize("name", SUITE)
def test_a_copy_for_preshuffled_data_is_the_same_model(name, tmp_path):
    """As docs/pythia.md makes it."""
    text = (CONFIGS / f"{name}.yml").read_text()
    for old, new in {
        "pythia_pile_idxmaps/pile_20B_tokenizer_text_document": "pile-standard-pythia-preshuffled",
        "pythia_deduped_pile_idxmaps/pile_0.87_deduped_text_document": (
            "pile-deduped-pythia-preshuffled"
        ),
    }.items():
        text = text.replace(old, f"{new}/document")
    copy = tmp_path / "preshuffled.yml"
    copy.write_text(text + "data_order: sequential\n")
    model = model_of_name_and_files(
        f"pythia-{name.lower().replace('1-4', '1.4')}".replace("2-8", "2.8").replace("6-9", "6.9"),
        [copy],
    )
    assert model.config.ledger.data_order == "sequential"
    assert model.config.training.train_data_paths[0].endswith("-preshuffled/document")


def test_a_copy_with_another_batch_is_refused(tmp_path):
    text = (CONFIGS / "70M.yml").read_text().replace("batch_size: 1024", "batch_size: 512")
    copy = tmp_path / "other.yml"
    copy.write_text(text)
    with pytest.raises(ConfigError, match="train_batch_size differ"):
        model_of_name_and_files("pythia-70m", [copy])
