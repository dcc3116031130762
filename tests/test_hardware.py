"""What a machine is called beside its seconds."""

from pathlib import Path

import pytest
import torch

from foretell import hardware


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512_bf16 amx_bf16", "Chip 9000, AMX"),
        ("fpu avx512_bf16", "Chip 9000, AVX-512 bf16"),
        ("fpu avx512f avx2", "Chip 9000, AVX-512"),
        ("fpu avx2", "Chip 9000, AVX2"),
        ("fpu neon", "Chip 9000"),
    ],
)
def test_a_processor_has_its_name_and_what_it_multiplies_with(tmp_path: Path, flags: str, expected: str) -> None:
    (tmp_path / "cpuinfo").write_text(
        f"processor\t: 0\nmodel name\t: Chip 9000\nflags\t\t: {flags}\n\nmodel name : Other\n"
    )
    assert hardware.processor(tmp_path / "cpuinfo") == expected


def test_where_the_system_does_not_tell_there_is_still_a_name(tmp_path: Path) -> None:
    assert hardware.processor(tmp_path / "none")
    assert hardware.device_name(torch.device("cpu")) == hardware.processor(hardware.CPUINFO)
