"""The results of bench: which implementation was fastest, the row for training, and the text."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.contest import Contest
from pallas_kernels.kernel_choice import BenchRow, minor_series
from pallas_kernels.result_files import read_object

# Names of our kernel's contestants: bodies at their default tiles, and the op at the tiles of the
# table, and at the best that --tune found.
OURS = ("triton", "mosaic", "stored", "tuned")
# The others that jaxtrain.ops.routes can choose in place of a kernel.
IN_TRAINING = ("xla", "cudnn")


def stored_command(argv: Sequence[str]) -> list[str]:
    """Returns the command to store: of the path of --out, which others do not have, the name."""
    words = ["python", "-m", "pallas_kernels.bench"]
    for word in argv:
        flag, equals, path = word.rpartition("=")
        is_out = flag == "--out" or words[-1] == "--out"
        words.append(f"{flag}{equals}{Path(path).name}" if is_out else word)
    return words


def read_results(path: Path | None, tiny: bool) -> dict[str, Any]:
    """Returns the results that --resume continues; empty ones without a file.

    Raises:
        ValueError: the file has no results of bench; or it is a trial and this call is a
            measurement, or the reverse.
    """
    if path is None or not path.exists():
        return {"contests": {}}
    try:
        results = read_object(path)
        if not all(isinstance(result, dict) for result in results["contests"].values()):
            raise ValueError("its contests must be JSON objects")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"--resume must continue results of bench; got {path}: {type(error).__name__} "
            f"{error}. Set another --out."
        ) from None
    if "device" in results and ("trial" in results) != tiny:
        kinds = ("measurement", "trial") if tiny else ("trial", "measurement")
        text = "--resume: {} is a {}, which a {} cannot continue. Set another --out."
        raise ValueError(text.format(path, *kinds))
    return results


def mark_hung(result: dict[str, Any], limit_s: float, commit: str) -> dict[str, Any]:
    """Returns the result of a contest that used its whole limit, which names it as hung."""
    error = (
        f"hung: killed after all of its {limit_s:g} s, at commit {commit[:7]}. It is run again "
        "only if --only names it"
    )
    return result | {"hung": {"limit_s": limit_s, "commit": commit}, "error": error}


def mark_cut(result: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Returns the result of a contest that the end of --minutes cut, which is no error."""
    text = f"cut after {seconds:.0f} s, when the minutes were up"
    return {key: value for key, value in result.items() if key != "error"} | {"cut": text}


def join_results(before: dict[str, Any], result: dict[str, Any], tune: bool) -> dict[str, Any]:
    """Returns a contest's result together with what was measured before.

    If the tuning of a finished contest did not end, its result stays, with the reason and the tiles
    that were tried.
    """
    if before.get("done") and not result.get("done"):
        new = ("hung", "cut", "tried", "untried")
        ending = {key: result[key] for key in new if key in result}
        error = {"tuning_error": result["error"]} if "error" in result else {}
        if error and (running := result.get("running")):  # it would end each later process, too
            ending["tried"] = ending["tried"] | {running: result["error"]}
            ending["untried"] = [name for name in ending["untried"] if name != running]
        old = ("hung", "cut", "tuning_error")
        return {key: value for key, value in before.items() if key not in old} | ending | error
    if tune:
        result["contestants"] = before.get("contestants", {}) | result.get("contestants", {})
    return result


def best_of(contestants: dict[str, Any], names: Callable[[str], bool]) -> tuple[str, Any]:
    """Returns (name, result) of the fastest faultless contestant among `names`, or ("", None)."""
    timed = {
        name: result
        for name, result in contestants.items()
        if isinstance(result, dict) and not result.get("fault") and names(name)
    }
    name = min(timed, key=lambda name: timed[name]["median_s"], default="")
    return name, timed.get(name)


def as_row(
    contest: Contest, chip: str, contestants: dict[str, Any], jax_version: str, **source: str
) -> BenchRow | None:
    """Returns the row for kernel_choice.py, or None if the kernel or all others failed.

    `source` has the date and the command of the measurement.

    Only the times of what training can run instead count. If tokamax, which it cannot run, made a
    kernel count as slower, training would use an implementation that is slower than the kernel.
    """
    _, kernel = best_of(contestants, lambda name: name in OURS)
    other, result = best_of(contestants, lambda name: name in IN_TRAINING)
    if kernel is None or result is None:
        return None
    return BenchRow(
        contest.op,
        chip,
        "bfloat16",
        contest.shape,
        jax_version,
        kernel["tiles"],
        kernel["median_s"],
        other,
        result["median_s"],
        documents=contest.documents,
        window=contest.window,
        **{"date": "", "command": ""} | source,
    )


def row_key(entry: Contest | BenchRow) -> tuple:
    """Returns the key of a row in a chip's table of one minor series of JAX: op, shape and mask."""
    return entry.op, tuple(entry.shape), entry.documents, entry.window


def known_keys(rows: Sequence[BenchRow], chip: str, jax_version: str) -> set[tuple]:
    """Returns row_key of the rows of a chip that count with a version of JAX."""
    where = chip, minor_series(jax_version)
    return {row_key(row) for row in rows if (row.chip, minor_series(row.jax)) == where}


def merge_rows(
    old: Sequence[dict[str, Any]], contests: Sequence[Contest], results: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns the rows of a chip's table: the old ones, and new ones of finished contests.

    A new row replaces the old ones of the same op, shape, documents and window in the same minor
    series of JAX. A contest in which our kernel failed, or that crashed or hung, removes them. One
    that the end of --minutes cut changes nothing: its fastest body may be one without a time.
    """
    chip, version, command = results["chip"], results["jax"], " ".join(results["command"])
    replaced, new = [], []
    for contest in contests:  # training needs both directions
        result = results["contests"].get(contest.name, {})
        if "forward" in contest.name or not contest.in_table:
            continue
        if not ("error" in result or "done" in result):
            continue
        row, contestants = None, result.get("contestants", {})
        if "done" in result:
            source = {"date": result.get("date", results["date"]), "command": command}
            row = as_row(contest, chip, contestants, version, **source)
            if row is None and best_of(contestants, lambda name: name in OURS)[1]:
                continue  # no other implementation has a time
        new += [row._asdict()] if row else []
        replaced.append((row_key(contest), minor_series(version)))

    def key_of(row):
        shape, mask = tuple(row["shape"]), (row.get("documents", False), row.get("window", 0))
        return (row["op"], shape, *mask), minor_series(row["jax"])

    return [*(row for row in old if key_of(row) not in replaced), *new]


def format_device(device: dict[str, Any]) -> str:
    """Returns the device and its ceilings as a line; of a trial, also what its times mean."""
    trial = f"; {device['trial']}" if "trial" in device else ""
    return (
        f"{device['device']}, jax {device['jax']}: a plain product reaches "
        f"{device['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s, a copy "
        f"{device['copy_bytes_per_s'] / 1e9:.1f} GB/s{trial}"
    )


def format_results(
    contest: Contest, result: dict[str, Any], device: dict[str, Any], tiny: bool
) -> Iterator[str]:
    """Yields a line per contestant: time, speed, share of the ceiling, time over the kernel's."""
    yield f"{contest.name}{': the times mean nothing' if tiny else ''}"
    _, kernel = best_of(result.get("contestants", {}), lambda name: name in OURS)
    for name, timing in result.get("contestants", {}).items():
        if isinstance(timing, str):
            yield f"  {name:14} {timing}"
            continue
        low, median_s, high = (timing[k] for k in ("low_s", "median_s", "high_s"))
        time_text = f"{median_s * 1e6:.1f} us ({low * 1e6:.1f}-{high * 1e6:.1f})"
        flops, moved = (x / median_s for x in (contest.flops, contest.hbm_bytes))
        share = max(flops / device["matmul_flops_per_s"], moved / device["copy_bytes_per_s"])
        ratio = f" {median_s / kernel['median_s']:5.2f}x" if kernel and not tiny else ""
        errors = max(timing.get("distances", [0.0]))
        fault = f"; {timing['fault']}" if timing.get("fault") else ""
        yield (
            f"  {name:14} {time_text:28} {flops / 1e12:7.1f} TFLOP/s {moved / 1e9:7.0f} GB/s "
            f"{share:4.0%} of the ceiling{ratio}"
            + (f"  error {errors:.1e}" if errors else "")
            + fault
        )
    for name, seconds in result.get("tried", {}).items():
        yield f"    {name:40} {seconds if isinstance(seconds, str) else f'{seconds * 1e6:.1f} us'}"
    if untried := result.get("untried"):
        yield f"    not tried yet: {', '.join(untried)}"
    cut = "tuned" if result.get("done") else "finished"
    for key, what in (("error", "finished"), ("tuning_error", "tuned"), ("cut", cut)):
        if key in result:
            yield f"  not {what}: {result[key]}"
