"""One training however it is cut: several processes, accumulated gradients, checkpointed activations, other resumes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foretell.config import MTPConfig, TrainConfig
from foretell.errors import ForetellError
from foretell.training.batches import Batches
from foretell.training.data import Example
from foretell.training.loop import train

from .saved import save_base

MTP = MTPConfig(masks=3, rank=4, alpha=8.0)
SETTINGS: dict[str, Any] = {
    "steps": 6, "batch_size": 4, "seq_len": 24, "anchors": 4, "log_every": 1, "checkpoint_every": 3, "lr": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, data of texts of different lengths, and `whole`: one process, batches of four."""
    path = tmp_path_factory.mktemp("processes")
    save_base(path / "base")
    texts = [f"number {n} of many"[: 10 + n % 9] for n in range(30)]
    (path / "d.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    run(path, "whole")
    return path


def run(place: Path, name: str, mtp: MTPConfig = MTP, *, resume: bool = False, **changed: Any) -> None:
    config = TrainConfig(**{**SETTINGS, **changed})
    train(str(place / "base"), place / "d.jsonl", place / name, mtp, config, device="cpu", resume=resume)


def launch(place: Path, name: str, processes: int, *more: str, **changed: Any) -> subprocess.CompletedProcess[str]:
    """The command line under `accelerate launch`, as a user gives it."""
    values = {**SETTINGS, **{n: getattr(MTP, n) for n in ("masks", "rank", "alpha")}, **changed}
    places = {"base": place / "base", "data": place / "d.jsonl", "output": place / name, "device": "cpu"}
    options = [word for n, v in {**values, **places}.items() for word in ("--" + n.replace("_", "-"), str(v))]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
        "--main_process_port", "0", "-m", "foretell", "train", *options, *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def losses(place: Path, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (place / name / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(place: Path, name: str) -> None:
    assert losses(place, name) == pytest.approx(losses(place, "whole"), abs=1e-4)
    weights, expected = (load_file(place / n / "foretell.safetensors") for n in (name, "whole"))
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, atol=2e-3, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


def test_rows_do_not_depend_on_how_they_are_shared_out() -> None:
    examples = [Example(torch.arange(12 + n % 7), torch.ones(12 + n % 7, dtype=torch.bool)) for n in range(9)]
    batches = Batches(examples, 4, 3, seed=5)
    whole = batches.batch(11)
    for processes, size in ((1, 1), (2, 2), (2, 1), (4, 1)):
        for process in range(processes):
            parts = batches.micro_batches(11, size, process, processes)
            rows = [(part, row) for part in parts for row in range(len(part.ids))]
            for (part, row), number in zip(rows, range(process, 4, processes), strict=True):
                length = int(part.real[row].sum())
                assert torch.equal(part.ids[row, :length], whole.ids[number, :length])
                assert int(whole.real[number].sum()) == length
                chosen = [b.anchors[r][b.anchor_valid[r]].tolist() for b, r in ((part, row), (whole, number))]
                assert chosen[0] == chosen[1] and chosen[0]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(place: Path, batch_size: int) -> None:
    run(place, f"by_{batch_size}", batch_size=batch_size, accumulation=4 // batch_size)
    assert_same_training(place, f"by_{batch_size}")


def test_two_processes_from_the_command_line(place: Path) -> None:
    done = launch(place, "two", 2, batch_size=2)
    assert done.returncode == 0, done.stderr
    assert_same_training(place, "two")
    assert done.stdout.count("The adapter is in") == 1 and done.stderr.count("step 6/6") == 1, "one process speaks"
    assert '"2 x cpu' in (place / "two" / "foretell.json").read_text()


def test_a_training_goes_on_with_another_number_of_processes(place: Path) -> None:
    run(place, "moved", steps=3, schedule="flat", warmup=1)
    run(place, "stayed", schedule="flat", warmup=1)
    done = launch(place, "moved", 2, "--resume", batch_size=1, accumulation=2, schedule="flat", warmup=1)
    assert done.returncode == 0, done.stderr
    assert losses(place, "moved") == pytest.approx(losses(place, "stayed"), abs=1e-4)
    with pytest.raises(ForetellError, match=r"sequences per step .* \(was 4, now 2\)"):
        run(place, "moved", resume=True, batch_size=2, schedule="flat", warmup=1)
    refused = launch(place, "moved", 2, "--resume", batch_size=4, schedule="flat", warmup=1)
    assert refused.returncode and refused.stderr.count("(was 4, now 8)") == 1, "one process speaks"


@pytest.mark.parametrize(
    "changed",
    [
        {"offset_weights": "acceptance"},
        {"anchor_choice": "uncertain"},
        {"adapter": "standard"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_parts_add_up_with_every_objective(place: Path, changed: dict[str, Any]) -> None:
    name = "_".join(map(str, changed.values()))
    mtp = MTPConfig(**{**MTP.to_dict(), **{k: v for k, v in changed.items() if k == "adapter"}})
    changed = {k: v for k, v in changed.items() if k != "adapter"} | {"steps": 3}
    run(place, name, mtp, **changed)
    run(place, name + "_parts", mtp, **changed, batch_size=1, accumulation=4)
    tolerance = 1e-4 if "dtype" not in changed else 2e-2
    assert losses(place, name + "_parts") == pytest.approx(losses(place, name), abs=tolerance)


def test_fewer_masks_at_once_change_no_loss(place: Path) -> None:
    run(place, "few_at_once", masks_at_once=4)
    assert losses(place, "few_at_once") == pytest.approx(losses(place, "whole"), abs=1e-5)


def test_a_sharded_base_trains_alike(place: Path) -> None:
    done = launch(place, "sharded", 2, "--shard-base", "--masks-at-once", "8", batch_size=2)
    assert done.returncode == 0, done.stderr
    assert_same_training(place, "sharded")
    description = [json.loads((place / n / "foretell.json").read_text()) for n in ("sharded", "whole")]
    assert description[0]["base_fingerprint"] == description[1]["base_fingerprint"]
    with pytest.raises(ForetellError, match="shard_base needs several processes"):
        run(place, "alone", shard_base=True)


KILLED = """
import json, os, random, signal, sys
from pathlib import Path
from foretell import checkpoint
from foretell.config import MTPConfig, TrainConfig
from foretell.training import state
from foretell.training.loop import train

place, output, mtp, config, kills = json.loads(sys.argv[1])
real = checkpoint._replace

def run(resume, die):
    "In a child, so that the libraries are loaded once for all lives."
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0
    def counted(path, write):
        nonlocal calls
        calls += 1
        if die == ("file", calls):  # half written, then killed
            real(path.with_name(path.name + ".part"), write)
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, write)
    checkpoint._replace = counted
    def on_step(line):
        if die == ("step", line["step"]):
            os.kill(os.getpid(), signal.SIGKILL)
    train(place + "/base", place + "/d.jsonl", output, MTPConfig(**mtp), TrainConfig(**config), device="cpu",
          resume=resume, on_step=on_step)
    os._exit(0)

codes = [run((Path(output) / "checkpoint").exists(), tuple(kill)) for kill in kills]
codes.append(run(True, None))
print(json.dumps(codes))
"""


def test_a_training_killed_again_and_again_ends_in_the_same_bits(place: Path) -> None:
    """SIGKILL at five random steps and within five random files being written, each time taken up again."""
    draw = random.Random(0)
    kills = [("step", step) for step in sorted(draw.sample(range(2, 24), 5))]
    kills = [kill for step in kills for kill in (step, ("file", draw.randint(1, 9)))]
    settings = {**SETTINGS, "steps": 24, "checkpoint_every": 1, "evaluate_every": 5}
    run(place, "unbroken", **{k: v for k, v in settings.items() if k != "checkpoint_every"}, checkpoint_every=4)
    arguments = json.dumps([str(place), str(place / "killed"), MTP.to_dict(), settings, kills])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes.count(-9) >= 8 and codes[-1] == 0, "most lives must have ended by a kill"
    for name in ("foretell.safetensors", "checkpoint/foretell.safetensors", "checkpoint/optimizer.safetensors"):
        assert (place / "killed" / name).read_bytes() == (place / "unbroken" / name).read_bytes()
    kept = [
        [{k: v for k, v in json.loads(line).items() if k not in ("elapsed", "tokens_per_second")} for line in lines]
        for lines in ((place / n / "metrics.jsonl").read_text().splitlines() for n in ("killed", "unbroken"))
    ]
    assert kept[0] == kept[1]
