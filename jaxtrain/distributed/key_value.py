"""Shares small texts between the processes of a run without their devices, from any thread."""

from typing import Protocol

import jax
from jax._src import distributed  # the public API has no access to the coordination service


class KeyValueStore(Protocol):
    """Texts by key, where a key is a path such as `a/b`."""

    def write(self, key: str, text: str) -> None: ...
    def read(self, folder: str) -> dict[str, str]: ...


class CoordinationStore:
    """Stores texts in JAX's coordination service, which lives as long as the processes do."""

    def __init__(self):
        client = distributed.global_state.client
        assert client is not None, "there is one process"
        self._client = client

    def write(self, key: str, text: str) -> None:
        """Sets a text, replacing an earlier one."""
        self._client.key_value_set(key, text, allow_overwrite=True)

    def read(self, folder: str) -> dict[str, str]:
        """Returns all texts whose key begins with `folder/`."""
        return dict(self._client.key_value_dir_get(folder))


def open_store() -> KeyValueStore | None:
    """Returns the store of this run's processes; None if there is only one."""
    return CoordinationStore() if jax.process_count() > 1 else None
