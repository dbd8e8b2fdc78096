"""Sharing plans: which layers read another's KV, in one nested order (KVSharer, arXiv:2410.18517, made nested)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfold_scheduler.geometry import CacheGeometry


class InvalidPlanError(ValueError):
    """A plan breaks a rule that sharing depends on; the message says which."""


@dataclass(frozen=True, slots=True)
class SharingEntry:
    """`sharer` stores no KV and reads that of `owner`, a lower layer."""

    sharer: int
    owner: int


@dataclass(frozen=True)
class SharingPlan:
    """A nested order of sharing entries for a model of `layer_count` layers; depth n shares the first n.

    Rules: a layer shares once; an owner lies below its sharer; an owner of any entry is never a sharer, so that
    raising the depth of a running sequence only drops layers. Raises InvalidPlanError.
    """

    layer_count: int
    entries: tuple[SharingEntry, ...] = ()

    def __post_init__(self) -> None:
        sharers = [entry.sharer for entry in self.entries]
        if len(set(sharers)) != len(sharers):
            raise InvalidPlanError("a layer is the sharer of two entries")
        for entry in self.entries:
            if not 0 <= entry.owner < entry.sharer < self.layer_count:
                raise InvalidPlanError(
                    f"layer {entry.sharer} cannot read layer {entry.owner} in a model of {self.layer_count} layers: "
                    "an owner lies below its sharer"
                )
            if entry.owner in sharers:
                raise InvalidPlanError(f"layer {entry.owner} is the owner of layer {entry.sharer} and a sharer itself")

    @property
    def max_depth(self) -> int:
        """The most layers that can be shared."""
        return len(self.entries)

    @cached_property
    def _sources(self) -> tuple[tuple[int, ...], ...]:
        rows = [tuple(range(self.layer_count))]
        for entry in self.entries:
            row = list(rows[-1])
            row[entry.sharer] = entry.owner
            rows.append(tuple(row))
        return tuple(rows)

    def sources(self, depth: int) -> tuple[int, ...]:
        """For each layer, the layer whose KV it reads at `depth` (itself if it is an owner)."""
        return self._sources[depth]

    @cached_property
    def _owners(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(layer for layer, source in enumerate(sources) if layer == source) for sources in self._sources
        )

    def owners(self, depth: int) -> tuple[int, ...]:
        """The layers that store KV at `depth`, ascending."""
        return self._owners[depth]

    @cached_property
    def first_shared_depth(self) -> tuple[int, ...]:
        """For each layer, the smallest depth that shares it; `max_depth + 1` if none does."""
        depths = [self.max_depth + 1] * self.layer_count
        for index, entry in enumerate(self.entries):
            depths[entry.sharer] = index + 1
        return tuple(depths)

    def check_kinds(self, geometry: CacheGeometry) -> None:
        """Raises InvalidPlanError if an entry joins layers of different kinds, or the model is of another height."""
        if geometry.layer_count != self.layer_count:
            raise InvalidPlanError(f"the plan is for {self.layer_count} layers, the model has {geometry.layer_count}")
        for entry in self.entries:
            if geometry.layers[entry.sharer] != geometry.layers[entry.owner]:
                raise InvalidPlanError(
                    f"layers {entry.owner} and {entry.sharer} are of different kinds "
                    f"({geometry.layers[entry.owner]} and {geometry.layers[entry.sharer]})"
                )
