"""From positions of an order to the samples of each of its components.

A blend draws every component's samples one after the other. So what a range of the order's
positions consumes is one range per component, whatever the order in which they are mixed; comparing
two orders never needs the draws themselves.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron.stream.blending import Blend
from megatron.stream.order_description import ComponentDescription, OrderDescription

__all__ = ["ComponentRange", "component_ranges", "cursors_at", "order_of_component"]


@dataclass(frozen=True)
class ComponentRange:
    """Consecutive samples of one component, in the component's own order."""

    component: ComponentDescription
    order: OrderDescription  # of the component alone, from its start; equal: the same samples
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def component_ranges(order: OrderDescription, start: int, stop: int) -> list[ComponentRange]:
    """Return what the positions from ``start`` to before ``stop`` of an order consume.

    Components from which nothing is drawn are left out.
    """
    before, after = cursors_at(order, start), cursors_at(order, stop)
    return [
        ComponentRange(
            component,
            order_of_component(order, component),
            before[component.key],
            after[component.key],
        )
        for component in order.components
        if after[component.key] > before[component.key]
    ]


def cursors_at(order: OrderDescription, position: int) -> dict[str, int]:
    """Return each component's next position when the order's first ``position`` are consumed."""
    counts = [position]
    if len(order.components) > 1 and order.weights is not None:
        counts = _blend(order.weights).counts(position).tolist()
    return {
        component.key: component.start + count
        for component, count in zip(order.components, counts, strict=True)
    }


def order_of_component(
    order: OrderDescription, component: ComponentDescription
) -> OrderDescription:
    """Return the order of one component alone, whatever was drawn of it before.

    Equal orders give equal samples and, as good as always, unequal ones others.
    """
    alone = replace(component, start=0, occurrence=0)
    return replace(order, components=(alone,), weights=None)


@lru_cache(maxsize=16)
def _blend(weights: tuple[float, ...]) -> Blend:
    """Keep the counts of earlier draws; they depend on nothing but the weights."""
    return Blend(weights)
