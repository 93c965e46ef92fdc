"""What all calls of kernels share: they have no derivative, and need a GPU."""

from collections.abc import Callable

import jax


def needs_gpu(name: str, device: str, wanted: str = "a GPU") -> ValueError:
    """Returns the error for a kernel that is not interpreted and has no GPU that it supports."""
    return ValueError(
        f"the kernel {name} needs {wanted}; got {device}. Pass interpret=True (slow, for tests), "
        "or call the function of the same module whose name ends in _reference."
    )


def without_derivative(kernel: Callable, name: str) -> Callable:
    """Returns the function; its derivative raises ValueError with the reason.

    The gradients of a public function are kernels too, so its second derivative ends here.
    """

    @jax.custom_jvp
    def call(*arrays):
        try:
            return kernel(*arrays)
        except ValueError as error:  # of a call outside of jax.jit, which compiles later
            if "Only interpret mode is supported" not in str(error):
                raise
            raise needs_gpu(name, jax.default_backend()) from None

    @call.defjvp
    def refuse(primals, tangents):
        del primals, tangents
        raise ValueError(
            "derivatives of a kernel must be of first order and in reverse mode (jax.grad, jax.vjp)"
            f"; got a derivative of the kernel {name} itself, as in a gradient of a gradient. Use "
            "the reference implementation."
        )

    return call
