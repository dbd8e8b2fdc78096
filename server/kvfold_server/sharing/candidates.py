"""Which entries may extend a nested plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold_scheduler.sharing import SharingEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_scheduler.geometry import CacheGeometry


def candidates(geometry: CacheGeometry, entries: Sequence[SharingEntry] = ()) -> list[SharingEntry]:
    """All entries that may follow `entries`, by sharer, then owner.

    Layers of one kind, the owner below; the sharer neither shares yet nor owns for another, and the owner does not
    share, so that no chain arises whose flattening would send a layer to another owner than the one that was tried.
    """
    sharers = {entry.sharer for entry in entries}
    owners = {entry.owner for entry in entries}
    return [
        SharingEntry(sharer, owner)
        for sharer in range(geometry.layer_count)
        if sharer not in sharers and sharer not in owners
        for owner in range(sharer)
        if owner not in sharers and geometry.layers[owner] == geometry.layers[sharer]
    ]


def sources_of(layer_count: int, entries: Sequence[SharingEntry]) -> tuple[int, ...]:
    """For each layer, the layer whose KV it reads when all `entries` hold."""
    sources = list(range(layer_count))
    for entry in entries:
        sources[entry.sharer] = entry.owner
    return tuple(sources)
