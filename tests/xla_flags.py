"""XLA's flags for tests: laws hold however a program is compiled, and compiling takes the longest.

For the step of configs/debug.py on 8 devices (2 vCPU Intel Xeon, jax 0.10.2 and 0.11.2 alike) level
0 is 3.7 times faster, plain LLVM IR in place of MLIR's pipeline for each fusion 2.4 times more, and
one LLVM module in place of 32 parts, which pay where a core is idle, takes a sixth less CPU time.
"""

QUICK = (
    "--xla_backend_optimization_level=0"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)


def flags(devices: int) -> str:
    """XLA_FLAGS of a process that sees so many devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK}"
