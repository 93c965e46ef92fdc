"""Fused GPU kernels in Pallas, the table of chips, and tools that compile, check and time kernels.

Which file does what:
    add_norm, gelu, qk_rope, flash_attention, head_scores, symmetric: the kernels, each below its
        reference in plain JAX. A kernel has a body (an implementation) in Pallas' Triton backend;
        *_mosaic and *_ampere are bodies in Pallas' Mosaic GPU backend, for Hopper and for Ampere
    gelu_xla: the GELU that models on GPUs use where no kernel is faster
    validation: refuses arguments and derivatives that the kernels do not support
    kernel_choice: chooses a kernel from measurements; tiles: default tile sizes
    bench: times the kernels on this machine's GPU against the implementations in contests
    audit: compiles kernels without a GPU and checks registers, shared memory and instructions
    traffic: counts, without a GPU, the bytes that XLA moves, to show where a kernel can be faster
"""

from pallas_kernels.quiet import start_quietly

start_quietly()
