"""What the steps of a configuration or of a run read, without starting either. No torch."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.base.errors import CheckpointError, ConfigError
from megatron.cli.resume_plan import plan_launch
from megatron.cli.wanted_launch import described_data, requested_counts, stream_settings
from megatron.config.load import load_config
from megatron.config.run_config import RunConfig
from megatron.ledger.planning.continuation import first_segment
from megatron.ledger.planning.inputs import StreamName
from megatron.ledger.queries.required import StreamSteps
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import RunView
from megatron.stream.component_plans import MapName
from megatron.stream.descriptions import map_names, open_order_alone
from megatron.stream.order_description import OrderDescription
from megatron.stream.sample_stream import Stream
from megatron.stream.stream_settings import identify_datasets

__all__ = ["StepData", "data_of_config", "data_of_run", "read_config"]


@dataclass(frozen=True)
class StepData:
    """The streams of a run, and their samples where the data is there."""

    streams: Mapping[StreamName, StreamSteps]
    data: RunData
    names: Mapping[StreamName, Mapping[str, MapName]] = field(default_factory=dict)
    """NeoX's names for index maps, if a configuration tells them."""

    def steps(self, name: StreamName) -> StreamSteps:
        """Return a stream.

        Raises:
            ConfigError: nothing of that name is read.
        """
        if name not in self.streams:
            raise ConfigError(f"no {name} data is read, only {', '.join(self.streams)}")
        return self.streams[name]

    def opened(self, name: StreamName) -> Callable[[OrderDescription], Stream]:
        """Return what opens the orders of a stream; their index files are enough."""
        opened: dict[str, Stream] = {}

        def open_order(order: OrderDescription) -> Stream:
            if order.order_id not in opened:
                opened[order.order_id] = open_order_alone(
                    order, self.data.files, names=self.names.get(name)
                )
            return opened[order.order_id]

        return open_order


def read_config(paths: Sequence[Path], *, world_size: int | None) -> RunConfig:
    """Read configuration files as ``deepy.py`` does.

    Args:
        paths: of the files; ``.yml`` may be left out.
        world_size: ranks of the launch; None: what the configuration or this machine tell.

    Raises:
        ConfigError: with all problems.
    """
    return load_config(
        [path if path.suffix or path.exists() else path.with_suffix(".yml") for path in paths],
        {} if world_size is None else {"global_num_gpus": world_size},
        local_slots=_local_slots,
    )


def data_of_config(
    config: RunConfig, prefixes: Sequence[str] = (), *, on_note: Callable[[str], None]
) -> StepData:
    """Return the data of the run that a launch would go on with, or of a new one.

    Args:
        config: of the launch.
        prefixes: where datasets lie now.
        on_note: told what had to be assumed.

    Raises:
        MegatronError: the configuration or an index file cannot be used.
    """
    streams: dict[StreamName, StreamSteps] = {}
    try:
        plan = plan_launch(config, needs_tokens=False).plan
        datasets = plan.datasets
        for name, stream in plan.streams.items():
            if stream.is_read:
                streams[name] = StreamSteps(stream.state.segments, plan.orders)
    except CheckpointError as error:
        first_line = str(error).splitlines()[0]
        on_note(f"taken for a run from step 1 on: no checkpoint can be read ({first_line})")
        found = described_data(config, needs_tokens=False)
        datasets = found.datasets
        batch = config.geometry.global_batch_size
        for name, order in found.orders.items():
            per_step = batch if name == "train" else batch * config.training.eval_iters
            if order is not None and per_step:
                segments = first_segment(order, batch_size=per_step).state.segments
                streams[name] = StreamSteps(segments, {order.order_id: order})
    settings = stream_settings(config)
    names = map_names(
        settings, requested_counts(config), identify_datasets(settings, records=datasets)
    )
    return StepData(streams, RunData(datasets, prefixes), names)


def data_of_run(view: RunView, prefixes: Sequence[str] = ()) -> StepData:
    """Return the data of a run's newest lineage."""
    names: tuple[StreamName, ...] = ("train", "valid", "test")
    streams = {
        name: StreamSteps(view.ledger.streams[name].segments, view.ledger.orders)
        for name in names
        if name in view.ledger.streams and view.ledger.streams[name].segments.segments
    }
    return StepData(streams, RunData(view.ledger.datasets, prefixes))


def _local_slots() -> int:
    from megatron.engine.launch.devices import local_slots

    return local_slots(os.environ)
