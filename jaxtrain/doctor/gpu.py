"""Checks NVIDIA's driver and GPUs without CUDA, so that a broken driver cannot hang the check."""

import csv
import glob
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxtrain.doctor.check import PROBLEM, WARNING, Check, read_output
from jaxtrain.doctor.versions import INSTALL_DRIVER
from pallas_kernels.quiet import has_gpu

FIELDS: tuple[str, ...] = ("name", "driver_version", "memory.total", "memory.used", "compute_cap")
ANSWER_S = 4.0  # nvidia-smi takes 1 to 3 s if the driver must first initialise the GPUs
VERSION = Path("/proc/driver/nvidia/version")
READ_LOG = "sudo dmesg | grep -i -e nvrm -e xid"


class Gpus(NamedTuple):
    """The GPUs of this machine, as far as the driver reports them.

    Attributes:
        found: whether a GPU has a device file.
        driver: the driver's version; "" if unknown.
        cards: {field: value} of each card, with FIELDS.
        fault: why nvidia-smi reports no GPU; "" if it reports any.
    """

    found: bool
    driver: str
    cards: tuple[dict[str, str], ...]
    fault: str

    @property
    def capability(self) -> tuple[int, ...] | None:
        """The lowest compute capability of the cards; None if unknown."""
        texts = [card["compute_cap"] for card in self.cards]
        known = [text for text in texts if re.fullmatch(r"\d+\.\d+", text)]
        return min((tuple(map(int, text.split("."))) for text in known), default=None)


def find_gpus(seconds: float = ANSWER_S) -> Gpus:
    """Asks the driver for its cards, and waits at most `seconds` for an answer."""
    driver = ""
    if VERSION.exists():
        match = re.search(r"Module\s+(?:for \S+\s+)?(\d+[\d.]+)", VERSION.read_text())
        driver = match[1] if match else ""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return Gpus(has_gpu(), driver, (), "nvidia-smi is not on the PATH")
    query = [smi, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        out = read_output(query, seconds)
    except (OSError, RuntimeError) as error:
        return Gpus(has_gpu(), driver, (), f"nvidia-smi fails: {error}")
    if out is None:
        return Gpus(has_gpu(), driver, (), f"nvidia-smi does not answer within {seconds:g} s")
    rows = csv.reader(out.splitlines(), skipinitialspace=True)
    cards = tuple(dict(zip(FIELDS, row, strict=True)) for row in rows if len(row) == len(FIELDS))
    if not cards:
        return Gpus(has_gpu(), driver, (), "nvidia-smi lists no card")
    return Gpus(True, driver or cards[0]["driver_version"], cards, "")


def count_pci_gpus() -> int:
    """Returns the number of NVIDIA display controllers on the PCI bus, with or without a driver."""
    count = 0
    for folder in glob.glob("/sys/bus/pci/devices/*"):
        try:
            vendor, kind = (Path(folder, name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        count += vendor == "0x10de" and kind.startswith("0x03")
    return count


def check_cards(gpus: Gpus, pci_gpus: int) -> list[Check]:
    """Checks that each GPU in the machine is served by the driver and is free."""
    if gpus.cards:
        counts = Counter(card["name"] for card in gpus.cards)
        text = ", ".join(f"{count} x {name}" for name, count in counts.items())
        return [Check("cards", text), *_check_used_memory(gpus)]
    if gpus.found:
        text = f"the driver shows a GPU, but {gpus.fault}"
        fix = f"{READ_LOG}   # then reboot, or reset the card"
        return [Check("cards", text, PROBLEM, fix)]
    if gpus.driver or "does not answer" in gpus.fault:
        return [Check("cards", f"the driver is loaded, but {gpus.fault}", PROBLEM, READ_LOG)]
    if pci_gpus:
        text = f"NVIDIA GPUs: {pci_gpus}, but no driver: training runs on the CPU"
        return [Check("cards", text, WARNING, INSTALL_DRIVER)]
    return [Check("cards", "no NVIDIA GPU: training runs on the CPU")]


def _check_used_memory(gpus: Gpus) -> Iterator[Check]:
    """Warns if other programs use over 5 % of a card's memory."""
    for i, card in enumerate(gpus.cards):
        try:
            used, total = float(card["memory.used"]), float(card["memory.total"])
        except ValueError:  # [N/A] if the GPU shares the host's memory
            continue
        if used > 0.05 * total:
            text = (
                f"card {i} has {used / 1024:.1f} of {total / 1024:.1f} GiB in use by other programs"
            )
            yield Check("cards", text, WARNING, "nvidia-smi   # lists the processes that use it")
