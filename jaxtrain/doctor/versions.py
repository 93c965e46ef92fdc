"""Checks that the installed versions of Python, JAX's packages and the driver fit together."""

import shlex
from collections.abc import Iterable
from typing import Any

from jaxtrain.doctor.check import OK, PROBLEM, WARNING, Check, InstalledVersion

# Source: https://docs.jax.dev/en/latest/installation.html (NVIDIA GPU), and NVIDIA's table at
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
MIN_DRIVER = {12: 525, 13: 580}
MIN_CAPABILITY = {12: (5, 2), 13: (7, 5)}
TESTED_PYTHONS = ((3, 11), (3, 12))
CUDAS = (13, 12)  # in order of preference
INSTALL_DRIVER = (
    "sudo apt-get install -y nvidia-driver-580-server   # or https://nvidia.com/drivers"
)


def parse_requirement(text: str) -> Any:
    """Parses a requirement such as `jax>=0.10.2,<0.12` into a Requirement of `packaging`.

    It uses pip's copy of `packaging` if that package is missing.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    return Requirement(text)


def check_python(version: tuple[int, ...], text: str) -> Check:
    """Checks that jaxtrain is tested on this version of Python."""
    if version[:2] < TESTED_PYTHONS[0]:
        return Check("python", f"{text}: 3.11 or newer is needed", PROBLEM, "uv venv --python 3.12")
    if version[:2] not in TESTED_PYTHONS:
        return Check("python", f"{text}: only 3.11 and 3.12 are tested", WARNING)
    return Check("python", text)


def check_packages(requirements: Iterable[str], installed: InstalledVersion, pip: str) -> Check:
    """Checks that the packages that jaxtrain requires are installed, in allowed versions.

    Args:
        requirements: those in jaxtrain's metadata.
        installed: returns the installed version of a package, or None.
        pip: the command that installs packages.
    """
    wrong, count = {}, 0
    for text in requirements:
        wanted = parse_requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        count += 1
        found = installed(wanted.name)
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            wrong[f"{wanted.name}{wanted.specifier}"] = f"{wanted.name} {found or 'is missing'}"
    if not wrong:
        return Check("packages", f"all {count} that jaxtrain needs, in tested versions")
    fix = f"{pip} install {shlex.join(wrong)}"
    return Check("packages", f"{', '.join(wrong.values())}", PROBLEM, fix)


def check_jax(installed: InstalledVersion, requirements: Iterable[str], pip: str) -> Check:
    """Checks that jax and jaxlib fit together.

    Args:
        installed: returns the installed version of a package, or None.
        requirements: those in jax's metadata.
        pip: the command that installs packages.
    """
    jax, jaxlib = installed("jax"), installed("jaxlib")
    if jax is None or jaxlib is None:
        missing = "jax" if jax is None else "jaxlib"
        fix = f'{pip} install "jax>=0.10.2,<0.12,!=0.11.0,!=0.11.1"'
        return Check("jax", f"{missing} is not installed", PROBLEM, fix)
    text = f"{jax}, jaxlib {jaxlib}"
    if jax == jaxlib:
        return Check("jax", text)
    fix = f'{pip} install "jaxlib=={jax}"'
    parsed = [parse_requirement(text) for text in requirements]
    allowed = [need.specifier for need in parsed if need.name == "jaxlib" and need.marker is None]
    if allowed and allowed[0].contains(jaxlib, prereleases=True):
        return Check("jax", f"{text}: they differ, which JAX allows", WARNING, fix)
    return Check("jax", f"{text}: they are incompatible", PROBLEM, fix)


def find_plugins(installed: InstalledVersion) -> dict[int, dict[str, str]]:
    """Returns {CUDA's major version: {package: version}} of JAX's plugins that are installed.

    A plugin consists of two packages, `plugin` and `pjrt`.
    """
    plugins = {}
    for cuda in CUDAS:
        names = (f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt")
        versions = {name: version for name in names if (version := installed(name))}
        if versions:
            plugins[cuda] = versions
    return plugins


def check_plugin(installed: InstalledVersion, has_gpu: bool, driver: str, pip: str) -> Check:
    """Checks that JAX's CUDA plugin is installed if there is a GPU, and matches jax.

    Args:
        installed: returns the installed version of a package, or None.
        driver: the version of NVIDIA's driver, such as 550.54.15; "" if unknown.
        pip: the command that installs packages.
    """
    jax, plugins = installed("jax"), find_plugins(installed)
    if not plugins:
        if not has_gpu:
            return Check("plugin", "none, and no GPU: training runs on the CPU")
        fix = f'{pip} install "jax[cuda{recommend_cuda(driver)}]=={jax}"'
        return Check("plugin", "none: JAX cannot use this machine's GPU", PROBLEM, fix)
    text = ", ".join(f"{n} {v}" for versions in plugins.values() for n, v in versions.items())
    if len(plugins) > 1:
        extra = min(plugins)
        fix = f"{pip} uninstall -y {' '.join(plugins[extra])}"
        return Check("plugin", f"{text}: only one of them can be loaded", WARNING, fix)
    [(cuda, versions)] = plugins.items()
    state = PROBLEM if has_gpu else WARNING
    repair = f'{pip} install "jax[cuda{cuda}]=={jax}"'
    if any(version != jax for version in versions.values()):
        return Check(
            "plugin", f"{text}: does not match jax {jax}, so JAX ignores it", state, repair
        )
    if len(versions) == 1:
        return Check("plugin", f"{text}: its other package is missing", state, repair)
    if not has_gpu:
        return Check("plugin", f"{text}; no GPU: only the offline compilers use it")
    return Check("plugin", text)


def major(version: str) -> int:
    """Returns the first number of a version; 0 if there is none."""
    first = version.partition(".")[0]
    return int(first) if first.isdigit() else 0


def recommend_cuda(driver: str) -> int:
    """Returns the newest CUDA that a driver supports; the newest of all for an unknown driver."""
    if not major(driver):
        return CUDAS[0]
    return next((cuda for cuda in CUDAS if major(driver) >= MIN_DRIVER[cuda]), CUDAS[-1])


def check_driver(
    driver: str, capability: tuple[int, ...] | None, installed: InstalledVersion, pip: str
) -> Check:
    """Checks that the driver and the GPU are new enough for the plugin's CUDA version."""
    plugins, jax = find_plugins(installed), installed("jax")
    cuda = max(plugins, default=recommend_cuda(driver))
    minimum, text = MIN_DRIVER[cuda], f"NVIDIA {driver or 'of unknown version'}"
    if driver and major(driver) < minimum:
        older = [c for c in CUDAS if c < cuda and major(driver) >= MIN_DRIVER[c]]
        fix = f'{pip} install "jax[cuda{older[0]}]=={jax}"' if older else INSTALL_DRIVER
        return Check("driver", f"{text}: CUDA {cuda} needs {minimum} or newer", PROBLEM, fix)
    if capability and capability < MIN_CAPABILITY[cuda]:
        needed = ".".join(map(str, MIN_CAPABILITY[cuda]))
        actual = ".".join(map(str, capability))
        older = [c for c in CUDAS if c < cuda and capability >= MIN_CAPABILITY[c]]
        fix = f'{pip} install "jax[cuda{older[0]}]=={jax}"' if older else ""
        text = f"{text}: CUDA {cuda} needs compute capability {needed}, the GPU has {actual}"
        return Check("driver", text, PROBLEM, fix)
    return Check("driver", f"{text}; CUDA {cuda} needs {minimum}", OK if driver else WARNING)
