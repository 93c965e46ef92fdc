"""Compiles for a GPU that is not present, down to machine code, on a machine with only a CPU.

This needs the extra `offline` (JAX's CUDA plugin with its compiler). JAX_PLATFORMS=cpu must be set
before jax is imported, because the plugin would otherwise look for a driver.
"""

import json
import math
import os
import re
import sys
import tempfile
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from jax.experimental import serialize_executable, topologies
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels import mosaic
from pallas_kernels.arguments import Parser
from pallas_kernels.chip import Chip, find_chip
from pallas_kernels.cubin import Resources, find_cubins, read_resources

REGISTERS_PER_SM = 65_536
REGISTER_GRANULE = 256  # allocated per warp, on sm_80 to sm_90 (CUDA's occupancy calculator)
RESERVED_SHARED_BYTES = 1_024  # per block, for the system, since sm_80
CUDA_VERSION = "12.9.0"


class KernelReport(NamedTuple):
    """The resources and launch sizes of one compiled kernel."""

    name: str
    resources: Resources
    threads: int  # per block
    blocks: int  # in the grid
    shared_bytes: int  # per block, static and dynamic

    def blocks_per_sm(self, chip: Chip) -> int:
        """Returns how many blocks fit, by registers, shared memory and threads."""
        warps = -(-self.threads // 32)
        warp_registers = -(-self.resources.registers * 32 // REGISTER_GRANULE) * REGISTER_GRANULE
        by_registers = REGISTERS_PER_SM // (warp_registers * warps)
        shared = self.shared_bytes + RESERVED_SHARED_BYTES
        return min(
            by_registers, chip.shared_bytes_per_sm // shared, chip.threads_per_sm // self.threads
        )


def target_config(chip: Chip) -> str:
    """Returns XLA's target description of a chip, in protobuf's text format."""
    major, minor = chip.compute_capability
    feature = "ACCELERATED_FEATURES" if major == 9 else "NONE"
    versions = "\n".join(
        f'  {name}: "{CUDA_VERSION}"'
        for name in ("runtime_version", "driver_version", "compile_time_toolkit_version")
    )
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {chip.shared_bytes_per_sm}
  threads_per_core_limit: {chip.threads_per_sm}
  core_count: {chip.sms}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.hbm_bytes_per_s)}
  l2_cache_size: {chip.l2_bytes}
  clock_rate_ghz: {chip.clock_ghz}
  device_memory_size: {chip.hbm_bytes}
  shared_memory_per_block_optin: {chip.shared_bytes_per_block}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  registers_per_core_limit: {REGISTERS_PER_SM}
  registers_per_block_limit: {REGISTERS_PER_SM}
  dnn_version: "9.8.0"
{versions}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{chip.kind}"
"""


def devices_of(chip: Chip, count: int = 1, hosts: int = 1) -> list[Any]:
    """Returns devices to compile for, `count` on each of `hosts`; each host has one process.

    Raises:
        RuntimeError: the compiler for GPUs is not installed, or JAX_PLATFORMS is not cpu.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        raise RuntimeError(
            "to compile without a GPU, JAX_PLATFORMS must be cpu before jax is imported; got "
            f"{os.environ.get('JAX_PLATFORMS')!r}. Start as JAX_PLATFORMS=cpu python -m ..."
        )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(chip), topology=f"1x{hosts}x{count}"
        )
    except Exception as error:  # the type depends on JAX's version and on what is missing
        raise RuntimeError(
            f"the compiler for {chip.name} must be installed; got {error}. Run pip install "
            '"jaxtrain[offline]".'
        ) from error
    return list(topology.devices)


@contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """Makes a device from devices_of the default one, and turns JAX's compile cache off.

    JAX writes programs for absent devices into its cache but cannot read them again.
    """
    uses_cache = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else JAX does not read the option a second time
    try:
        with jax.default_device(device):
            yield
    finally:
        jax.config.update("jax_enable_compilation_cache", uses_cache)
        compilation_cache.reset_cache()


def compile_for(
    chip: Chip, function: Callable, *abstract: Any, **options: Any
) -> tuple[jax.stages.Compiled, dict[str, KernelReport]]:
    """Compiles a function for one device. Returns (compiled, {kernel's name: KernelReport}).

    Args:
        abstract: a jax.ShapeDtypeStruct for each argument.
        options: XLA's flags.

    Raises:
        jax.errors.JaxRuntimeError: a kernel spills, or needs more shared memory than the chip has.
        RuntimeError: as devices_of.
    """
    device = devices_of(chip)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract
    )
    with tempfile.TemporaryDirectory() as dump, compiling_for(device):
        flags = {
            "xla_gpu_fail_ptx_compilation_on_register_spilling": True,
            "xla_dump_to": dump,
            "xla_dump_hlo_as_text": True,
        }
        lowered = jax.jit(function).lower(*abstract)
        compiled = lowered.compile(compiler_options=flags | options)
        thunks = "".join(path.read_text() for path in Path(dump).glob("*thunk_sequence.txt"))
    payload = serialize_executable.serialize(compiled)[0]
    resources = {}
    for cubin in find_cubins(payload):
        resources |= read_resources(cubin)
    sizes = _launch_sizes(thunks) | mosaic.launch_sizes(lowered)
    reports = [
        KernelReport(name.removesuffix(mosaic.SUFFIX), used, *sizes.get(name, (0, 0, 0)))
        for name, used in resources.items()
    ]
    return compiled, {report.name: report for report in reports}


def check_chips(
    parser: Parser,
    argv: list[str] | None,
    check: Callable[[Chip, Namespace], list[str]],
    passed: str,
    chips: Iterable[str] | None = None,
) -> NoReturn:
    """Runs a check for each --chip and exits, with status 1 and the list if there are faults.

    Args:
        check: (chip, parsed arguments) -> a sentence for each fault.
        passed: the text that is printed if there are no faults.
        chips: the names that --chip accepts, by default all.
    """
    parser.add_argument(
        "--chip",
        action="append",
        choices=chips,
        help="the GPU to compile for; may be repeated; default: a40 and h100",
    )
    args, faults = parser.parse_args(argv), []
    args.chip = args.chip or ["a40", "h100"]
    for name in args.chip:
        faults += _check_in_child(check, name, args)
    print("\n".join(faults or [passed]))
    sys.exit(bool(faults))


def _check_in_child(check, name: str, args: Namespace) -> list[str]:
    """Returns check(chip, args), called in a child process, in which JAX has compiled nothing.

    A process whose first Mosaic kernel was for sm_86 cannot compile one for sm_90: ptxas refuses
    it with "SM version specified by .target is higher than default" (jax 0.11.2).
    """
    sys.stdout.flush()
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # JAX's, against forks of its threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(sender, "w") as pipe:
                json.dump(check(find_chip(name), args), pipe)
            status = 0
        except (RuntimeError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(sender)
    with open(receiver) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(status if status > 0 else f"error: the check of {name} ended by signal {-status}")
    return json.loads(text)


LAUNCH = re.compile(
    r"(\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]\s+"
    r"shared_memory: (\d+) bytes"
)


def _launch_sizes(text) -> dict[str, tuple[int, int, int]]:
    """Reads {kernel's name: (threads, blocks, shared bytes)} from XLA's dump of its thunks."""
    sizes = {}
    for name, *numbers in LAUNCH.findall(text):
        grid, threads, shared = numbers[:3], numbers[3:6], int(numbers[6])
        sizes[name] = math.prod(map(int, threads)), math.prod(map(int, grid)), shared
    return sizes
