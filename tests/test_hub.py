"""What is named by its Hub name: bases, adapters and data sets, fetched, cached for offline, pushed, or not there.

The Hub is a stand-in on the loopback (`hub.py`); two sessions, one with it and one offline, do what the tests look at.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from foretell import checkpoint
from foretell.config import TrainConfig
from foretell.training import preview

from .hub import USER, Results, serving, session
from .hub_files import Repository
from .models import reference
from .saved import save_model

PROMPT, TOKENS = "hello", 16
ROWS = {
    "plain": [{"text": f"text number {n}"} for n in range(12)],
    "first": [{"question": f"{n} of the first?", "answer": "yes"} for n in range(10)],
    "second": [{"question": f"{n} of the second?", "answer": "no"} for n in range(9)],
}
CARD = """---
configs:
- {config_name: first, data_files: first/*.parquet}
- {config_name: second, data_files: second/*.parquet}
---
"""
GENERATE = ["generate", "--prompt", PROMPT, "--max-new-tokens", str(TOKENS), "--device", "cpu", "--json", "--model"]
SIZES = [
    "--masks=2",
    "--rank=2",
    "--steps=2",
    "--batch-size=2",
    "--seq-len=64",
    "--anchors=2",
    "--device=cpu",
    "--json",
]
BASE = ["--base", "owner/base"]
SHOW = ["data", "show", *BASE, "--json"]
TRAIN = ["train", *SIZES, "--data", "owner/plain:2", "owner/several:first:1"]
DISTILL = ["distill", "--device", "cpu", "--max-new-tokens", "4", "--prompts"]
STEPS = {
    "adapter": [*GENERATE, "owner/adapter"],
    "plain": [*SHOW, "owner/plain"],
    "second": [*SHOW, "owner/several:second"],
    "train": [*TRAIN, *BASE, "--output", "OUT"],
    "trained": [*GENERATE, "OUT"],
    "distill": [*DISTILL, "owner/several:second", *BASE, "--output", "OUT.jsonl"],
    "inside": ["inside_generate", "owner/base", "owner/adapter", PROMPT, str(TOKENS)],
}
PUSHES = {
    "push": ["push", "online", "owner/pushed"],
    "pushed": [*GENERATE, "owner/pushed"],
    "push without owner": ["push", "made/adapter", "of-a-directory"],
    "push refused": ["push", "online", "owner/not allowed"],
}
MISSING = {
    "adapter": ([*GENERATE, "owner/nothing"], "no model at owner/nothing, here or on the Hub (401", "Not Found"),
    "adapter's base": ([*GENERATE, "owner/adapter", "--base", "owner/nothing"], "the base 'owner/nothing' could not"),
    "base": ([*TRAIN, "--base", "owner/nothing", "--output", "x"], "the base 'owner/nothing' could not be loaded"),
    "tokenizer": (["data", "show", "--base", "owner/nothing", "owner/plain"], "owner/nothing is not there or has no"),
    "data": ([*SHOW, "owner/nothing"], "owner/nothing is neither a file nor a Hub data set", "doesn't exist"),
    "data's configuration": ([*SHOW, "owner/several:third"], "'third' not found", "first", "second"),
    "no configuration": ([*SHOW, "owner/several"], "owner/name:configuration", "'first', 'second'"),
    "prompts": ([*DISTILL, "owner/nothing", *BASE, "--output", "y"], "owner/nothing is neither a file nor a Hub"),
    "a base for an adapter": ([*GENERATE, "owner/base"], "it is not a foretell model"),
    "an adapter for a base": ([*TRAIN, "--base", "owner/adapter", "--output", "x"], "is a trained adapter, not a base"),
}
OFFLINE = {
    "adapter": ([*GENERATE, "owner/never"], "no model at owner/never, here or on the Hub", "HF_HUB_OFFLINE"),
    "base": ([*TRAIN, "--base", "owner/never", "--output", "x"], "the base 'owner/never' could not be loaded"),
    "data": ([*SHOW, "owner/never"], "owner/never is neither a file nor a Hub data set", "Couldn't reach"),
    "no configuration": ([*SHOW, "owner/several"], "owner/name:configuration", "first, second"),
}


class Seen(NamedTuple):
    place: Path
    online: Results
    offline: Results
    asked: list[str]  # of the Hub


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    import pyarrow
    from pyarrow import parquet

    place = tmp_path_factory.mktemp("hub")
    root, adapter = place / "hub", save_model(place / "made")
    shutil.copytree(place / "made" / "base", root / "models" / "owner" / "base")
    shutil.copytree(adapter, root / "models" / "owner" / "adapter")
    path = root / "models" / "owner" / "adapter" / checkpoint.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": "owner/base"}))
    for name, folder in (("plain", "data"), ("first", "first"), ("second", "second")):
        data = root / "datasets" / "owner" / ("plain" if name == "plain" else "several") / folder
        data.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(ROWS[name]), data / "train-00000-of-00001.parquet")
    (root / "datasets" / "owner" / "several" / "README.md").write_text(CARD)

    def steps(output: str, missing: dict[str, tuple[Any, ...]]) -> dict[str, list[str]]:
        made = {name: [word.replace("OUT", output) for word in words] for name, words in STEPS.items()}
        return made | {f"missing {name}": words for name, (words, *_) in missing.items()}

    with serving(root) as hub:
        online = session(place, hub.address, steps("online", MISSING) | PUSHES, offline=False)
    yield Seen(place, online, session(place, hub.address, steps("offline", OFFLINE), offline=True), hub.asked)


@pytest.fixture(scope="module", params=["online", "offline"])
def results(seen: Seen, request: pytest.FixtureRequest) -> Results:
    """Of either session: offline, everything comes from the cache and is the same."""
    return getattr(seen, request.param)


def answer(result: dict[str, Any]) -> Any:
    assert result["code"] == 0, result["err"]
    return json.loads(result["out"])


@pytest.fixture(scope="module")
def expected(seen: Seen) -> list[int]:
    base = seen.place / "made" / "base"
    ids = AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt").input_ids
    return reference(AutoModelForCausalLM.from_pretrained(base), ids, TOKENS)


def test_an_adapter_and_its_base(seen: Seen, results: Results, expected: list[int]) -> None:
    found = answer(results["adapter"])
    assert (found["token_ids"], found["masks"], found["model"]) == (expected, 4, "owner/adapter")
    inside = answer(results["inside"])
    assert inside["token_ids"] == expected and inside["attached"]
    fetched = Repository(seen.place / "hub", "models", "owner/adapter").file(checkpoint.WEIGHTS_FILE)
    assert seen.asked.count(f"GET /large/{fetched.etag}") == 1, "once, and then from the cache"


@pytest.mark.parametrize(("step", "place"), [("plain", "plain/data"), ("second", "several/second")])
def test_a_data_set_is_what_its_files_are(seen: Seen, results: Results, step: str, place: str) -> None:
    shown = answer(results[step])
    files = seen.place / "hub" / "datasets" / "owner" / place
    same = preview(files, str(seen.place / "made" / "base"), TrainConfig()).to_dict()
    assert shown["fingerprint"] == same["fingerprint"] and shown["sequences"] == same["sequences"]
    assert shown["report"]["records"] == shown["report"]["examples"] == len(ROWS[step])


def test_training_on_data_sets(seen: Seen, results: Results, expected: list[int]) -> None:
    trained, output = answer(results["train"]), seen.place / answer(results["train"])["output"]
    assert trained["data"] == "owner/plain:2 owner/several:first:1" and trained["trained_steps"] == 2
    assert json.loads((output / checkpoint.CONFIG_FILE).read_text())["base"] == "owner/base"
    weights = [(folder / checkpoint.WEIGHTS_FILE).read_bytes() for folder in (output, seen.place / "online")]
    assert weights[0] == weights[1]
    found = answer(results["trained"])
    assert (found["token_ids"], found["masks"]) == (expected, 2)


def test_prompts_of_a_configuration(seen: Seen, results: Results) -> None:
    assert results["distill"]["code"] == 0, results["distill"]["err"]
    name = "online" if results is seen.online else "offline"
    records = [json.loads(line) for line in (seen.place / f"{name}.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == [row["question"] for row in ROWS["second"]]


def test_what_is_pushed_is_what_is_saved(seen: Seen, expected: list[int]) -> None:
    assert seen.online["push"]["code"] == 0, seen.online["push"]["err"]
    assert seen.online["push"]["out"].strip().endswith("/owner/pushed")
    found = answer(seen.online["pushed"])
    assert (found["token_ids"], found["model"]) == (expected, "owner/pushed")
    pushed = Repository(seen.place / "hub", "models", "owner/pushed")
    folder = seen.place / "made" / "adapter"
    assert {file.path for file in pushed.files} == {f.path for f in Repository(folder.parent, ".", "adapter").files}
    weights = (seen.place / "online" / checkpoint.WEIGHTS_FILE).read_bytes()
    assert pushed.file(checkpoint.WEIGHTS_FILE).content == weights
    assert b"\nbase_model: owner/base\n" in pushed.file(checkpoint.CARD_FILE).content


def test_an_adapter_of_a_base_on_disk_is_pushed_to_its_owner(seen: Seen) -> None:
    """The Hub refuses cards that name a path as their base, and asks for the owner that it told."""
    assert seen.online["push without owner"]["code"] == 0, seen.online["push without owner"]["err"]
    pushed = Repository(seen.place / "hub", "models", f"{USER}/of-a-directory")
    assert b"base_model" not in pushed.file(checkpoint.CARD_FILE).content
    refused = seen.online["push refused"]
    assert refused["code"] == 1 and "ForetellError: owner/not allowed could not be uploaded (" in refused["err"]


@pytest.mark.parametrize(("when", "name"), [("online", n) for n in MISSING] + [("offline", n) for n in OFFLINE])
def test_what_is_not_there_is_one_sentence(seen: Seen, when: str, name: str) -> None:
    _, *parts = (MISSING if when == "online" else OFFLINE)[name]
    result = getattr(seen, when)[f"missing {name}"]
    err = result["err"]
    assert result["code"] == 2 and err.startswith("foretell: ") and err.count("\n") == 1, err
    assert all(part in err for part in parts), err
