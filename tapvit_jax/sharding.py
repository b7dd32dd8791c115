"""Spreading rows of data over the local devices, and copying parameters to all of them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from tapvit_jax.errors import InputError

AXIS = "data"

T = TypeVar("T")
_More = TypeVar("_More")


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a one-axis mesh ("data") over `devices`, by default all devices of this process.

    Raises:
      InputError: an empty list of devices.

    Source: ours.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    if not devices:
        raise InputError("devices: an empty list, expected at least one device")
    # Not jax.make_mesh: its default kind of axis has changed between versions of JAX.
    return Mesh(np.asarray(devices, dtype=object), (AXIS,))


def accelerator_mesh() -> Mesh | None:
    """Make a mesh over the accelerators of this process; None where there is one, or only a CPU.

    Source: ours.
    """
    # The fake devices that a CPU can be split into share its cores: nothing is gained there.
    several = jax.local_device_count() > 1 and jax.default_backend() != "cpu"
    return data_mesh() if several else None


def shard_rows(
    array: Shaped[Array, "n ..."] | Shaped[np.ndarray, "n ..."], mesh: Mesh
) -> tuple[Shaped[Array, "m ..."], int]:
    """Pad axis 0 with zeros to a multiple of the mesh size and spread it over "data".

    Returns the sharded array and n, so that the caller can cut the padding off its results.

    Raises:
      InputError: an array without rows to spread (zero-dimensional), or a mesh without "data".

    Source: ours.
    """
    if AXIS not in mesh.axis_names:
        raise InputError(f"mesh: has the axes {mesh.axis_names}, expected an axis {AXIS!r}")
    if np.ndim(array) == 0:
        raise InputError("array: is a scalar, expected at least one axis")
    rows = array.shape[0]
    padding = -rows % mesh.shape[AXIS]
    if padding:
        pad = jnp.pad if isinstance(array, jax.Array) else np.pad
        array = pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(AXIS))), rows


def replicate(tree: T, mesh: Mesh) -> T:
    """Place a whole copy of every array of the pytree on every device of the mesh.

    Source: ours.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


class Backlog:
    """Keeps the batches of steps that the devices have not done yet few in memory.

    Steps are sent ahead of the computation, up to some thirty, and their batches wait as long.
    After so many bytes of batches the host waits for the steps instead.

    Source: ours.
    """

    def __init__(self, most: int = 2**28):
        self._most, self._waiting = most, 0

    def sent(self, batch: Any, result: Any) -> None:
        """Note the batch of a step that was sent, and wait for its result if it is time to."""
        self._waiting += sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
        if self._waiting > self._most:
            jax.block_until_ready(result)
            self._waiting = 0


def fetch_ahead(
    steps: Iterable[tuple[Shaped[Array, "..."], _More]],
) -> Iterator[tuple[Shaped[np.ndarray, "..."], _More]]:
    """Bring the array of every step to the host, in order, with what stands beside it.

    It is waited for once the next step has been sent to the devices, which hold two at most.

    Source: ours.
    """
    waiting: tuple[Array, _More] | None = None
    for step in steps:
        if waiting is not None:
            yield np.asarray(waiting[0]), waiting[1]
        waiting = step
    if waiting is not None:
        yield np.asarray(waiting[0]), waiting[1]
