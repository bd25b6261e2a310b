"""What the system was asked for about memory."""

import mmap
import re
from pathlib import Path


def advised_huge_pages(address):
    """Whether Linux was asked for huge pages behind an address: "hg" among its mapping's flags."""
    address += mmap.PAGESIZE  # an array's first page may hold other things, and is not asked for
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping has this address")
