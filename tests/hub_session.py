"""A session with the Hub in a process of its own: steps from stdin as JSON, what came of each to stdout.

A step is the words of a foretell command, or the name of a function below and its arguments. Only the loopback is
reached: the name of any other host is not found.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import sys
import traceback
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost")


def only_loopback() -> None:
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **named: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in LOOPBACK:
            raise socket.gaierror(socket.EAI_NONAME, f"{name} is not of this test")
        return real(host, *arguments, **named)

    socket.getaddrinfo = getaddrinfo


def push(source: str, repository: str) -> int:
    import foretell

    print(foretell.load(source).push_to_hub(repository))
    return 0


def inside_generate(base: str, adapter: str, prompt: str, tokens: str) -> int:
    """Prints the new ids of transformers' own `generate()` with the adapter's `custom_generate` folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(base)
    ids = AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt").input_ids
    out = lm.generate(ids, max_new_tokens=int(tokens), do_sample=False, custom_generate=adapter, trust_remote_code=True)
    print(json.dumps({"token_ids": out[0, ids.shape[1] :].tolist(), "attached": bool(vars(lm)["_foretell_adapters"])}))
    return 0


def run(step: list[str]) -> dict[str, Any]:
    from foretell.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            ours = {"push": push, "inside_generate": inside_generate}.get(step[0])
            code = ours(*step[1:]) if ours else main(step)
        except Exception:
            traceback.print_exc()
            code = 1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    only_loopback()
    print(json.dumps({name: run(step) for name, step in json.load(sys.stdin).items()}))
