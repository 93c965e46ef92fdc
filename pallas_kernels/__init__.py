"""Fused GPU kernels in Pallas, their chips, and what the compiler says of them with no GPU."""

from pallas_kernels.quiet import start_quietly

start_quietly()
