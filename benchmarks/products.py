"""What a linear's product takes on this CPU against its rows, in each way that its weight can lie.

The weights hold numbers of 16 bits, as models are published. Several of each shape are multiplied in turn, so that
those of a large model come from memory. Writes one JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from foretell.hardware import device_name
from foretell.packed import Way, laid_out, multiply, ways

RESULT = Path(__file__).parent / "results" / "products.json"
# (d_out, d_in): gate and up of the embedded model, of a 135M and of a 1B shape, as one product each.
SHAPES = {"embedded": (1408, 256), "135M": (3072, 576), "1B": (16384, 2048)}
ROWS = (1, 2, 3, 5, 7, 9, 17, 45, 256)
BYTES, MOST = 2**27, 32  # of fp32 weights of one shape, and of weights


@torch.inference_mode()
def measure(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> dict[Way, dict[int, float]]:
    """Median milliseconds of a product by its rows, for each way, the ways by turns."""
    count = max(1, min(MOST, BYTES // (4 * shape[0] * shape[1])))
    stored = [(torch.randn(shape) / shape[1] ** 0.5).bfloat16().to(dtype) for _ in range(count)]
    weights = {way: [laid_out([weight], None, way, kept=True) for weight in stored] for way in ways(dtype)}
    found: dict[Way, dict[int, float]] = {way: {} for way in weights}
    for rows in ROWS:
        x = torch.randn(1, rows, shape[1]).to(dtype)
        took: dict[Way, list[float]] = {way: [] for way in weights}
        for number in range(rounds):
            for way, own in weights.items():
                weight = own[number % count]
                assert weight is not None  # bfloat16 numbers can lie in any way
                start = time.perf_counter()
                multiply(x, weight, None, way).to(dtype)
                took[way].append(1000 * (time.perf_counter() - start))
        for way, own_times in took.items():
            found[way][rows] = round(statistics.median(own_times), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="products of each number of rows and way")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    products: list[dict[str, Any]] = []
    table = Table(title="milliseconds of a product by its rows")
    for column in ("weight", *map(str, ROWS)):
        table.add_column(column, no_wrap=True)
    for name in args.shapes:
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            for way, times in measure(SHAPES[name], dtype, args.rounds).items():
                products.append({"shape": name, "size": SHAPES[name], "dtype": kind, "way": way, "ms": times})
                table.add_row(f"{name} {kind} {way}", *(f"{value:.2f}" for value in times.values()))
    machine = {"device_name": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    result = {**machine, "torch": torch.__version__, "rounds": args.rounds, "products": products}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
