"""What a run is trained on: rows without end, and the batches that a mesh makes of them.

Legend: B rows of a batch, T positions of a row.
"""

import dataclasses
from collections.abc import Iterator

import grain
import jax
import numpy as np

from emu3_jax.mesh import sharders, sharding, shards


@dataclasses.dataclass(frozen=True)
class Positions:
    """Positions low ... high-1 of rows that have `length`."""

    low: int
    high: int
    length: int


class Rows:
    """Opened data: `dataset` has rows without end, each a pure function of its index.

    Steps take `batch` rows each from `origin`, a step and its first row: 0 and 0, or where the
    batch last changed. `positions` are those that the rows hold, if not all.
    """

    def __init__(
        self, dataset: grain.MapDataset, batch: int, state: dict | None = None,
        positions: Positions | None = None,
    ):  # fmt: skip
        self.dataset, self.batch, self.origin = dataset, batch, origin(batch, state)
        self.positions = positions

    def row(self, step: int) -> int:
        """The first row of a step."""
        return row(self.batch, self.origin, step)

    def block(self, first: int, count: int) -> dict[str, np.ndarray]:
        """Rows first ... first + count - 1, stacked."""
        rows = [self.dataset[row] for row in range(first, first + count)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def state(self, step: int) -> dict:
        """JSON values of constant size, the same on every host, with which `Data.open` goes on at
        `step`."""
        return dict(step=step, row=self.row(step), batch=self.batch, origin=list(self.origin))

    def figures(self, step: int) -> dict[str, float]:
        """What the steps before `step` got, for the metrics."""
        return {}


def origin(batch: int, state: dict | None) -> tuple[int, int]:
    """The origin of steps of `batch` rows that go on from a saved state."""
    if not state:
        return 0, 0
    return tuple(state["origin"]) if state["batch"] == batch else (state["step"], state["row"])


def row(batch: int, origin: tuple[int, int], step: int) -> int:
    """The first row of a step."""
    return origin[1] + (step - origin[0]) * batch


class Data:
    """A configuration of data; a dataclass."""

    def rows(self) -> grain.MapDataset:
        """The rows, by any index."""
        raise NotImplementedError

    def open(
        self, batch: int, state: dict | None = None, positions: Positions | None = None
    ) -> Rows:
        """The rows for steps of `batch` of them, from a saved state on.

        Where `positions` are given, the rows may hold no others. Raises ValueError for data that
        cannot be used, or not from this state on.
        """
        return Rows(self.rows(), batch, state)


def positions_here(device_mesh, length: int) -> Positions | None:
    """The positions of rows that the devices of this process hold; None for all."""
    layout = sharding(device_mesh, "BT")
    pieces = layout.addressable_devices_indices_map((*shards("B"), length)).values()
    bounds = [piece[1].indices(length) for piece in pieces]
    low, high = min(b[0] for b in bounds), max(b[1] for b in bounds)
    return None if high - low == length else Positions(low, high, length)


def batches(
    rows: Rows, start: int, stop: int, device_mesh, accumulate: int = 1, readers: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Batches of steps start ... stop-1 on the mesh, read ahead by `readers` threads.

    Each process reads the rows that its devices need, wherever the mesh has them in a batch; of
    rows that are cut over the devices of several processes, each of these takes its part. Raises
    ValueError for a batch that does not split.
    """
    (parts,), batch = shards("B"), rows.batch
    if batch % (parts * accumulate):
        often = f" in {accumulate} parts" if accumulate > 1 else ""
        raise ValueError(
            f"batch {batch} does not split{often} over {sharders('B')} = {parts}; "
            f"take a multiple of {parts * accumulate}"
        )
    size = batch // parts
    pieces = sharding(device_mesh, "B").addressable_devices_indices_map((batch,)).values()
    mine = sorted({piece.indices(batch)[0] // size for (piece,) in pieces})

    def put(name, read):
        shape, low = (batch, *read[mine[0]][name].shape[1:]), 0
        if rows.positions:
            shape, low = (batch, rows.positions.length), rows.positions.low

        def piece(at):
            found = read[at[0].indices(batch)[0] // size][name]
            if found.ndim != 2:
                return found
            begin, end, _ = at[1].indices(shape[1])
            return found[:, begin - low : end - low]

        return jax.make_array_from_callback(
            shape, sharding(device_mesh, letters(len(shape))), piece
        )

    steps = grain.MapDataset.range(start, stop).map(
        lambda step: {part: rows.block(rows.row(step) + part * size, size) for part in mine}
    )
    options = grain.ReadOptions(num_threads=readers, prefetch_buffer_size=2 * readers)
    for read in steps.to_iter_dataset(options):
        yield {name: put(name, read) for name in read[mine[0]]}


def letters(ndim: int) -> str:
    """The letters of a batch's array: rows of ids have positions, images have none to shard."""
    return "BT" if ndim == 2 else "B"
