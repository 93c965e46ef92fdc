"""Whether the installed versions of JAX's packages and the driver fit each other."""

import shlex

from jaxtrain.doctor.check import OK, PROBLEM, WARNING, Check

# Source: https://docs.jax.dev/en/latest/installation.html (NVIDIA GPU), and NVIDIA's table at
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
LEAST_DRIVER = {12: 525, 13: 580}
LEAST_CAPABILITY = {12: (5, 2), 13: (7, 5)}
TESTED = ((3, 11), (3, 12))
CUDAS = (13, 12)  # the newer is advised where the driver allows it


def requirement(text: str):
    """Parses a requirement; `packaging` may be among the packages that are missing."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    return Requirement(text)


def check_python(version: tuple[int, ...], text: str) -> Check:
    """Python against what the suite runs on."""
    if version[:2] < TESTED[0]:
        return Check("python", f"{text}: 3.11 or newer is needed", PROBLEM, "uv venv --python 3.12")
    if version[:2] not in TESTED:
        return Check("python", f"{text}: tested are 3.11 and 3.12", WARNING)
    return Check("python", text)


def check_packages(requirements, installed, pip: str) -> Check:
    """The packages that jaxtrain needs, against its own bounds.

    Args:
        requirements: of jaxtrain, as in its metadata.
        installed: name -> version or None.
        pip: the command that installs packages.
    """
    wrong, count = {}, 0
    for text in requirements:
        wanted = requirement(text)
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


def check_jax(installed, needs, pip: str) -> Check:
    """jax against jaxlib.

    Args:
        installed: name -> version or None.
        needs: jax's own requirements.
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
    bounds = [requirement(need) for need in needs]
    allowed = [need.specifier for need in bounds if need.name == "jaxlib" and need.marker is None]
    if allowed and allowed[0].contains(jaxlib, prereleases=True):
        return Check("jax", f"{text}: not the same version, which JAX allows", WARNING, fix)
    return Check("jax", f"{text} do not fit each other", PROBLEM, fix)


def plugins_of(installed) -> dict[int, dict[str, str]]:
    """Returns {CUDA's major version: {package: version}} of JAX's plugins that are installed."""
    found = {}
    for cuda in CUDAS:
        names = (f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt")
        have = {name: version for name in names if (version := installed(name))}
        if have:
            found[cuda] = have
    return found


def check_plugin(installed, has_gpu: bool, driver: str, pip: str) -> Check:
    """JAX's CUDA plugin against jax, the driver and the presence of a GPU.

    Args:
        driver: version of NVIDIA's, as 550.54.15; "" where it is not known.
    """
    jax, plugins = installed("jax"), plugins_of(installed)
    advised = advise_cuda(driver)
    install = f'{pip} install "jax[cuda{advised}]=={jax}"'
    if not plugins:
        if not has_gpu:
            return Check("plugin", "none, and no GPU: training runs on the processor")
        return Check("plugin", "none: JAX cannot use this machine's GPU", PROBLEM, install)
    text = ", ".join(f"{n} {v}" for have in plugins.values() for n, v in have.items())
    if len(plugins) > 1:
        extra = min(plugins)
        fix = f"{pip} uninstall -y {' '.join(plugins[extra])}"
        return Check("plugin", f"{text}: only one of them can be loaded", WARNING, fix)
    ((cuda, have),) = plugins.items()
    state = PROBLEM if has_gpu else WARNING
    repair = f'{pip} install "jax[cuda{cuda}]=={jax}"'
    if any(version != jax for version in have.values()):
        return Check("plugin", f"{text}: not of jax {jax}, so JAX leaves it out", state, repair)
    if len(have) == 1:
        return Check("plugin", f"{text}: its other half is missing", state, repair)
    if not has_gpu:
        return Check("plugin", f"{text}; no GPU: for the offline compilers only")
    return Check("plugin", text)


def major(version: str) -> int:
    """The first number of a version; 0 where there is none."""
    first = version.partition(".")[0]
    return int(first) if first.isdigit() else 0


def advise_cuda(driver: str) -> int:
    """The newest CUDA that a driver can run; the newest of all where it is not known."""
    known = major(driver)
    fitting = [cuda for cuda in CUDAS if known >= LEAST_DRIVER[cuda]]
    return fitting[0] if fitting else (CUDAS[-1] if known else CUDAS[0])


def check_driver(driver: str, capability: tuple[int, ...] | None, installed, pip: str) -> Check:
    """NVIDIA's driver and the GPU's architecture against the plugin's CUDA."""
    plugins, jax = plugins_of(installed), installed("jax")
    cuda = max(plugins, default=advise_cuda(driver))
    least, text = LEAST_DRIVER[cuda], f"NVIDIA {driver or 'of unknown version'}"
    if driver and major(driver) < least:
        older = [c for c in CUDAS if c < cuda and major(driver) >= LEAST_DRIVER[c]]
        fix = f'{pip} install "jax[cuda{older[0]}]=={jax}"' if older else NEW_DRIVER
        return Check("driver", f"{text}: CUDA {cuda} needs {least} or newer", PROBLEM, fix)
    if capability and capability < LEAST_CAPABILITY[cuda]:
        needs = ".".join(map(str, LEAST_CAPABILITY[cuda]))
        has = ".".join(map(str, capability))
        older = [c for c in CUDAS if c < cuda and capability >= LEAST_CAPABILITY[c]]
        fix = f'{pip} install "jax[cuda{older[0]}]=={jax}"' if older else ""
        text = f"{text}: CUDA {cuda} needs compute capability {needs}, the GPU has {has}"
        return Check("driver", text, PROBLEM, fix)
    return Check("driver", f"{text}; CUDA {cuda} needs {least}", OK if driver else WARNING)


NEW_DRIVER = "sudo apt-get install -y nvidia-driver-580-server   # or https://nvidia.com/drivers"
