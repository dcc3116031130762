"""Weights that stay in the file they were loaded from, each in a mapping of its own.

transformers maps a file of safetensors into memory as a whole, and where nothing is cast the weights are views of it:
as long as one of them lives, every page that was ever read counts as this process's. In a mapping of its own a weight's
pages go when it goes, and one of which single rows are read (an embedding) has only their pages in memory, which the
system may drop and read again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

MAPS, SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")
WORTH_MAPPING = 2**20  # bytes; less is copied: a mapping has whole pages, and the system maps 16 of them at once


class Region(NamedTuple):
    """Addresses of this process that show a file from an offset on."""

    start: int
    end: int
    offset: int
    path: str


def regions() -> list[Region]:
    """Files mapped privately, by address; none where the system does not tell (only Linux does)."""
    try:
        lines = os.fsdecode(MAPS.read_bytes()).splitlines()
    except OSError:
        return []
    found = []
    for fields in (line.split(maxsplit=5) for line in lines):
        if len(fields) == 6 and fields[1].endswith("p") and fields[5].startswith("/"):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            found.append(Region(start, end, int(fields[2], 16), fields[5]))
    return found


@torch.inference_mode(False)
@torch.no_grad()
def separate(weights: Iterable[Tensor]) -> None:
    """Gives each weight that is mapped from a file a mapping of its own, in place, with no page in memory yet.

    The numbers stay the same, bit for bit. A weight that lies in memory, was written to or lost its file stays.
    """
    known = regions()
    places = [(weight, region_of(weight, known)) for weight in {id(weight): weight for weight in weights}.values()]
    for weight, region in places:
        if region is not None:
            small = weight.nbytes < WORTH_MAPPING
            own = weight.data.clone() if small else map_anew(weight.data, region)
            weight.data = weight.data if own is None else own


def region_of(weight: Tensor, known: list[Region]) -> Region | None:
    """The region that holds all of a weight, if there is one."""
    if weight.device.type != "cpu" or weight.layout != torch.strided or not weight.is_contiguous() or not weight.nbytes:
        return None
    at = bisect_right(known, weight.data_ptr(), key=lambda region: region.start) - 1
    inside = at >= 0 and weight.data_ptr() + weight.nbytes <= known[at].end
    return known[at] if inside else None


def map_anew(weight: Tensor, region: Region) -> Tensor | None:
    """The same numbers from the region's file, or None if it is gone or holds others."""
    offset = region.offset + weight.data_ptr() - region.start
    try:
        with open(region.path, "rb") as file:
            mapped = _bytes(file, offset, weight.nbytes)
            if not torch.equal(mapped, weight.reshape(-1).view(torch.uint8)):
                return None
            mapped = _bytes(file, offset, weight.nbytes)  # once more: comparing brought all its pages in
    except (OSError, ValueError):  # ValueError: the file is shorter now
        return None
    return mapped.view(weight.dtype).view(weight.shape)


def _bytes(file: BinaryIO, offset: int, size: int) -> Tensor:
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    # Copied on write: nothing that is done to a weight reaches the file.
    pages = mmap.mmap(file.fileno(), offset - start + size, access=mmap.ACCESS_COPY, offset=start)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)  # else a row may bring 2 MB in
    return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=offset - start)


def resident(weights: Iterable[Tensor]) -> tuple[int, int]:
    """Bytes of weights that are mapped from files, and how many of their regions are in memory now."""
    known = regions()
    found = [
        (weight.nbytes, region_of(weight, known)) for weight in {id(weight): weight for weight in weights}.values()
    ]
    mapped = {region.start for _, region in found if region is not None}
    there, ours = 0, False
    for line in os.fsdecode(SMAPS.read_bytes()).splitlines() if mapped else []:
        head = line.split(maxsplit=2)
        if not head[0].endswith(":"):
            ours = int(head[0].split("-")[0], 16) in mapped
        elif ours and head[0] == "Rss:":
            there += int(head[1]) * 1024
    return sum(size for size, region in found if region is not None), there


def give_back() -> None:
    """Hands memory that was freed back to the system: glibc keeps what lies between pieces still in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
