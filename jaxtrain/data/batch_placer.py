"""Lays the sequences that a process reads out on its devices."""

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain.distributed.mesh import batch_sharding, check_batch


class BatchPlacer:
    """Puts this process's sequences on its devices, as global arrays [B,...] over the mesh.

    Raises:
        ValueError: the mesh does not have our axes, or does not divide the batch.
    """

    def __init__(self, batch: int, mesh: Mesh):
        check_batch(batch, 1, mesh)
        self._batch = batch
        self._sharding = batch_sharding(mesh)
        indices = self._sharding.addressable_devices_indices_map((batch, 1)).values()
        ranges = [index[0].indices(batch)[:2] for index in indices if index]
        self.places = np.unique(np.concatenate([np.arange(*span) for span in ranges]))

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Copies arrays of len(self.places) sequences to the devices."""
        # The train loop forbids implicit transfers; this is the one copy that each step needs.
        with jax.transfer_guard("allow"):
            return {name: self._place(array) for name, array in batch.items()}

    def _place(self, array: np.ndarray) -> jax.Array:
        def slice_for_device(index) -> np.ndarray:
            start, stop = index[0].indices(self._batch)[:2]
            first = int(np.searchsorted(self.places, start))
            return array[first : first + stop - start]

        shape = self._batch, *array.shape[1:]
        return jax.make_array_from_callback(shape, self._sharding, slice_for_device)
