"""Text while it is decided: transformers' streamers and pieces of text."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer, TextStreamer

from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.loop import Step
from foretell.errors import ForetellError

from .models import random_prompt, tiny_model
from .saved import character_tokenizer


class Recorder:
    """A streamer that keeps what it is told; `full` makes it raise at the n-th put."""

    def __init__(self, full: int | None = None) -> None:
        self.calls: list[object] = []
        self.full = full

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu" and value.dtype == torch.long
        if len(self.calls) == self.full:
            raise KeyboardInterrupt
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


def speaking_model() -> MTPForCausalLM:
    model = tiny_model()
    model.tokenizer = character_tokenizer()
    return model


def test_a_streamer_gets_the_prompt_every_token_and_the_end() -> None:
    prompt, streamer = random_prompt(5), Recorder()
    out = tiny_model().generate(input_ids=prompt, max_new_tokens=9, streamer=streamer)
    assert streamer.calls == [prompt.tolist(), *([token] for token in out.token_ids), "end"]


@pytest.mark.parametrize("full", [0, 3])
def test_the_stream_ends_when_decoding_is_interrupted(full: int) -> None:
    streamer = Recorder(full)
    with pytest.raises(KeyboardInterrupt):
        tiny_model().generate(input_ids=random_prompt(5), max_new_tokens=9, streamer=streamer)
    assert len(streamer.calls) == full + 1 and streamer.calls[-1] == "end"


def test_the_stream_ends_when_settings_are_refused() -> None:
    streamer = Recorder()
    with pytest.raises(ForetellError):
        tiny_model().generate(input_ids=random_prompt(5), masks=77, streamer=streamer)
    assert streamer.calls == ["end"]


def test_streamers_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    model = speaking_model()
    out = model.generate("ab c", max_new_tokens=20, streamer=TextStreamer(model.tokenizer))
    assert capsys.readouterr().out == f"ab c{out.text}\n"
    iterator = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, args=("ab c",), kwargs={"max_new_tokens": 20, "streamer": iterator})
    thread.start()
    assert "".join(iterator) == out.text
    thread.join()


def test_pieces_of_text_as_they_are_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    model = speaking_model()
    text = model.generate("ab c", max_new_tokens=20, stop=["never"]).text
    pieces = model.stream("ab c", max_new_tokens=20, stop=["never"])
    steps: list[Step] = []
    decide = model.step
    monkeypatch.setattr(model, "step", lambda *args: steps.append(None) or decide(*args))
    first = next(pieces)
    assert first and len(steps) == 1
    assert first + "".join(pieces) == text and len(steps) > 3


def test_pieces_need_a_tokenizer_and_good_settings_at_once() -> None:
    with pytest.raises(ForetellError, match=r"no tokenizer to stream text with; use steps\(\)"):
        tiny_model().stream(input_ids=random_prompt(3))
    with pytest.raises(ForetellError, match="at most 4"):
        speaking_model().stream("a", masks=5)
