"""Fused GPU kernels in Pallas, the table of chips, and tools that compile, check and time kernels.

Which file does what:
    add_norm, qk_rope, flash_attention, head_scores, symmetric: the kernels, each below its
        reference in plain JAX; *_mosaic: their bodies for Hopper
    kernel_choice: chooses a kernel from measurements; tiles: default tile sizes
    bench: measures kernels on the GPU of this machine, against the contestants of contests
    audit: compiles kernels without a GPU and checks registers, shared memory and instructions
    traffic: counts without a GPU the bytes that XLA moves, which shows where a kernel can win
"""

from pallas_kernels.quiet import start_quietly

start_quietly()
