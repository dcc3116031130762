"""What a device is called: seconds mean little without it."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 bf16", "avx512f": "AVX-512", "avx2": "AVX2"}


def device_name(device: torch.device) -> str:
    """A GPU's name, or the processor's with the best that it has to multiply matrices with."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor(CPUINFO)


@cache
def processor(cpuinfo: Path) -> str:
    """From that file (Linux), else what Python knows."""
    facts: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags", "").split()
    units = next((unit for flag, unit in UNITS.items() if flag in flags), None)
    return f"{name}, {units}" if units else name
