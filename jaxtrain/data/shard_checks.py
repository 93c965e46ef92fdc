"""Checks all shards of a corpus and reports what is wrong with them in one list."""

from collections.abc import Sequence
from pathlib import Path

from jaxtrain.data.encoding.formats import printable_path
from jaxtrain.data.shard_checksums import ShardChecksum, checksum_shards
from jaxtrain.data.shards import Shard, probe


def check_shards(
    paths: Sequence[Path], entries: dict[Path, dict], shard_format: str, vocab_size: int
) -> tuple[list[Shard], list[ShardChecksum]]:
    """Returns the shards and their checksums.

    Args:
        entries: what meta.json states about the shards that it lists.
        shard_format: data.shard_format.
        vocab_size: every token must be below it.

    Raises:
        ValueError: one or more shards cannot be used; lists each as file, expected, found.
    """
    problems, shards = [], []
    for path in paths:
        try:
            shards.append(probe(path, shard_format))
        except ValueError as error:
            problems.append(str(error))
    checksums = checksum_shards(shards)
    for shard, checksum in zip(shards, checksums, strict=True):
        problem = _find_problem(shard, checksum, vocab_size, entries.get(Path(shard.path), {}))
        if problem:
            problems.append(f"{printable_path(shard.path)}: {problem}.")
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise ValueError(f"{len(problems)} of {len(paths)} shards cannot be used:\n  {listed}")
    return shards, checksums


def _find_problem(shard: Shard, checksum: ShardChecksum, vocab_size: int, entry: dict) -> str:
    """Returns what is wrong with a shard's tokens, or ""; `entry` is the shard's in meta.json."""
    if shard.format == "nanogpt" and checksum.odd_zero and checksum.largest:
        return "expected uint16 tokens; found every second token 0, as in a file of uint32"
    if checksum.smallest < 0:
        return f"expected tokens of at least 0; found {checksum.smallest}"
    declared = entry.get("fingerprint", checksum.fingerprint)
    if declared != checksum.fingerprint:
        return f"expected fingerprint {declared} by meta.json; found {checksum.fingerprint}"
    if checksum.largest >= vocab_size:
        found = checksum.largest
        return f"expected tokens below model.V={vocab_size}; found {found}. Set --model.V"
    return ""


def describe_duplicates(shards: list[Shard], checksums: list[ShardChecksum]) -> list[str]:
    """Returns a warning if shards contain the same tokens, which training then reads repeatedly."""
    first: dict[tuple[str, str], Shard] = {}
    repeated = []
    for shard, checksum in zip(shards, checksums, strict=True):
        original = first.setdefault((shard.dtype, checksum.fingerprint), shard)
        if original is not shard:
            repeated.append(
                f"{printable_path(shard.path)} those of {printable_path(original.path)}"
            )
    if not repeated:
        return []
    more = f" and {len(repeated) - 4} more" if len(repeated) > 4 else ""
    return [f"warning: shards repeat tokens: {'; '.join(repeated[:4])}{more}"]
