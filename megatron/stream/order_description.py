"""What an endless order is, as a value: enough to compute any of its samples, and its name.

Two descriptions are equal exactly if they give the same samples for ever. Paths, sharding and the
length of the run are no part of them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from megatron.base.errors import DatasetError

__all__ = ["ALGORITHM_VERSION", "ComponentDescription", "OrderDescription"]

ALGORITHM_VERSION = 1
"""Raised whenever the same description would give other samples."""


@dataclass(frozen=True, kw_only=True)
class ComponentDescription:
    """Some documents of one dataset, in an order of their own."""

    dataset: str  # identity of the dataset's content
    first_document: int
    stop_document: int
    occurrence: int = 0  # counts equal (dataset, documents) within one order
    head_epochs: int | None = None  # of NeoX's maps of packed samples; 1 for sequential data
    head_samples: int | None = None  # of NeoX's maps of the other packings; both None: no head,
    # it begins with tail block 1
    start: int = 0  # the component's position that its first draw gives

    @property
    def key(self) -> str:
        """Name what a cursor belongs to: the same documents, whatever was drawn of them before."""
        return f"{self.dataset}:{self.first_document}-{self.stop_document}#{self.occurrence}"

    @property
    def documents(self) -> range:
        """The documents of the dataset that it is made of."""
        return range(self.first_document, self.stop_document)

    def continued(self, earlier: Self, cursor: int) -> Self:
        """Return this component as it goes on: with the head it began with, from ``cursor``."""
        return replace(
            self,
            head_epochs=earlier.head_epochs,
            head_samples=earlier.head_samples,
            start=cursor,
        )

    def without_head(self) -> Self:
        """Return this component beginning with tail block 1, as one added later does."""
        return replace(self, head_epochs=None, head_samples=None, start=0)


@dataclass(frozen=True, kw_only=True)
class OrderDescription:
    """One order: a single component, or a blend of several."""

    components: tuple[ComponentDescription, ...]
    weights: tuple[float, ...] | None  # normalised; None: one component, not blended
    seq_length: int  # tokens a sample consumes
    seed: int
    packing: str = "packed"  # NeoX's pack_impl, or "sequential"
    allow_chopped: bool = True
    algorithm: int = ALGORITHM_VERSION

    @property
    def order_id(self) -> str:
        """Return 32 hexadecimal digits that name the order by its content."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; weights as hexadecimal floats, so that nothing is rounded."""
        values = asdict(self)
        values["components"] = [asdict(component) for component in self.components]
        if self.weights is not None:
            values["weights"] = [weight.hex() for weight in self.weights]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the description that :meth:`to_json` gave.

        Raises:
            DatasetError: it was made by a newer version, whose samples we can't compute.
        """
        if values["algorithm"] > ALGORITHM_VERSION:
            raise DatasetError(
                f"an order of algorithm version {values['algorithm']} was made by a newer release; "
                f"this one knows versions up to {ALGORITHM_VERSION}"
            )
        weights = values["weights"]
        components = tuple(ComponentDescription(**one) for one in values["components"])
        return cls(
            **{key: value for key, value in values.items() if key not in ("components", "weights")},
            components=components,
            weights=None if weights is None else tuple(float.fromhex(text) for text in weights),
        )
