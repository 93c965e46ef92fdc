"""NVIDIA's driver and cards, looked at without CUDA, so that nothing here can hang for long."""

import csv
import glob
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from jaxtrain.doctor.check import PROBLEM, WARNING, Check, ask
from pallas_kernels.quiet import has_gpu

FIELDS = ("name", "driver_version", "memory.total", "memory.used", "compute_cap")
ANSWER_S = 4.0  # of nvidia-smi, which wakes sleeping cards first: 1 to 3 s
VERSION = Path("/proc/driver/nvidia/version")


class Gpus(NamedTuple):
    """What the driver says.

    Attributes:
        found: whether device nodes of a GPU are there.
        driver: its version; "" where it is not known.
        cards: {field: value} of each, by FIELDS.
        fault: why nvidia-smi has said nothing; "" where it has.
    """

    found: bool
    driver: str
    cards: tuple[dict, ...]
    fault: str

    @property
    def capability(self) -> tuple[int, ...] | None:
        """The least of the cards."""
        known = [card["compute_cap"] for card in self.cards]
        parts = [
            tuple(map(int, text.split("."))) for text in known if re.fullmatch(r"\d+\.\d+", text)
        ]
        return min(parts, default=None)


def look(seconds: float = ANSWER_S) -> Gpus:
    """Asks the driver for its cards; a driver that does not answer is left alone."""
    driver = ""
    if VERSION.exists():
        found = re.search(r"Module\s+(?:for \S+\s+)?(\d+[\d.]+)", VERSION.read_text())
        driver = found[1] if found else ""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return Gpus(has_gpu(), driver, (), "nvidia-smi is not on the PATH")
    query = [smi, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        out = ask(query, seconds)
    except (OSError, RuntimeError) as error:
        return Gpus(has_gpu(), driver, (), f"nvidia-smi fails: {error}")
    if out is None:
        return Gpus(has_gpu(), driver, (), f"nvidia-smi does not answer within {seconds:g} s")
    rows = [row for row in csv.reader(out.splitlines(), skipinitialspace=True)]
    cards = tuple(dict(zip(FIELDS, row, strict=True)) for row in rows if len(row) == len(FIELDS))
    driver = driver or next((card["driver_version"] for card in cards), "")
    return Gpus(
        bool(cards) or has_gpu(), driver, cards, "" if cards else "nvidia-smi lists no card"
    )


def in_slots() -> int:
    """NVIDIA's display controllers on the PCI bus, whether or not a driver serves them."""
    count = 0
    for folder in glob.glob("/sys/bus/pci/devices/*"):
        try:
            vendor, kind = (Path(folder, name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        count += vendor == "0x10de" and kind.startswith("0x03")
    return count


def check_cards(gpus: Gpus, slots: int) -> list[Check]:
    """The cards, or why there are none."""
    if gpus.cards:
        names = {}
        for card in gpus.cards:
            names[card["name"]] = names.get(card["name"], 0) + 1
        found = [Check("cards", ", ".join(f"{n} x {name}" for name, n in names.items()))]
        return [*found, *_busy(gpus)]
    if gpus.found:
        return [
            Check(
                "cards",
                f"the driver shows a GPU, but {gpus.fault}",
                PROBLEM,
                "sudo dmesg | grep -i -e nvrm -e xid   # then reboot, or reset the card",
            )
        ]
    if gpus.driver or "does not answer" in gpus.fault:
        fix = "sudo dmesg | grep -i -e nvrm -e xid"
        return [Check("cards", f"the driver is loaded, but {gpus.fault}", PROBLEM, fix)]
    if slots:
        return [
            Check(
                "cards",
                f"{slots} NVIDIA in the slots, without a driver: training runs on the processor",
                WARNING,
                "sudo apt-get install -y nvidia-driver-580-server   # or https://nvidia.com/drivers",
            )
        ]
    return [Check("cards", "no NVIDIA GPU: training runs on the processor")]


def _busy(gpus: Gpus):
    """A warning where other programs hold much of a card's memory."""
    for i, card in enumerate(gpus.cards):
        try:
            used, total = float(card["memory.used"]), float(card["memory.total"])
        except ValueError:  # [N/A], where memory is shared with the host
            continue
        if used > 0.05 * total:
            text = f"card {i} has {used / 1024:.1f} of {total / 1024:.1f} GiB in use by others"
            yield Check("cards", text, WARNING, "nvidia-smi   # lists the processes that hold it")
