"""How much memory is left, to choose between storing costs and recomputing them."""

from __future__ import annotations

import os

import torch

__all__ = ["free_bytes"]

# Taken where the system does not say.
UNKNOWN = 8 << 30


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free now on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        # What the kernel can hand out without swapping, caches included.
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN
