"""XLA flags that make tests compile faster, which is what takes them longest.

Tests check properties that do not depend on how a program is optimised. For the step of
configs/debug.py on 8 devices (2 vCPU Intel Xeon, jax 0.10.2 and 0.11.2), level 0 compiles 3.7 times
faster; plain LLVM IR instead of MLIR's pipeline for each fusion, another 2.4 times. One LLVM module
instead of 32, which only help while a core is idle, takes a sixth less CPU time.
"""

QUICK = (
    "--xla_backend_optimization_level=0"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)

# Compiling for a GPU takes a quarter less time. The program is the same up to its machine code.
QUICK_GPU = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def flags(devices: int) -> str:
    """Returns the XLA_FLAGS of a process that has this many devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK}"
