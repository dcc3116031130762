"""Checkpoints: `foretell.json` + `foretell.safetensors` + a model card in a directory or Hub repository.

A `custom_generate` folder beside them lets transformers' own `generate()` use the adapter from there.
Not the PEFT layout on purpose: `PeftModel.from_pretrained` would apply the adapter to every token and change answers.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import foretell
from foretell.base import CONFIG_FILE, Base, is_hub_name, load_base
from foretell.card import model_card
from foretell.config import MTPConfig
from foretell.errors import ForetellError, reason_of
from foretell.model import MTPModel
from foretell.packed import why_not

WEIGHTS_FILE, CARD_FILE = "foretell.safetensors", "README.md"
PICTURE = "training.png"  # the training's curves, which the card shows where they are
CUSTOM_GENERATE = "custom_generate"  # a folder that transformers knows by this name
FORMAT = 1
M = TypeVar("M", bound=MTPModel)


def save(model: MTPModel, directory: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Writes the adapter, its configuration and a model card; the base itself is only named.

    Files are written beside their final names and moved there, so that a full disk or a kill leaves the old ones whole.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to("cpu", dtype or p.dtype).contiguous() for name, p in model.own_parameters().items()}
    write_safetensors(weights, directory / WEIGHTS_FILE)
    provenance = {"foretell": foretell.__version__, "torch": torch.__version__, **model.provenance}
    description = {
        "format": FORMAT,
        "base": base_reference(model.base.name, directory),
        "base_fingerprint": model.base.fingerprint(),
        "base_unquantised_fingerprint": model.base.unquantised_fingerprint(),
        "base_quantised": model.base.quantised,
        "config": model.config.to_dict(),
        "provenance": provenance,
    }
    write_text(json.dumps(description, indent=2, default=str) + "\n", directory / CONFIG_FILE)
    picture = PICTURE if (directory / PICTURE).exists() else None
    write_text(model_card(description, picture), directory / CARD_FILE)
    (directory / CUSTOM_GENERATE).mkdir(exist_ok=True)
    for file in ("generate.py", "requirements.txt"):
        text = (Path(__file__).parent / "assets" / CUSTOM_GENERATE / file).read_text(encoding="utf-8")
        write_text(text, directory / CUSTOM_GENERATE / file)
    return directory


def load(
    cls: type[M],
    source: str | Path,
    *,
    base: str | Base | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    packed: bool | None = None,
    quantise: str = "none",
    check: bool = True,
) -> M:
    """A trained model from a directory or Hub name; `base` overrides where its base lies.

    `quantise` int8 or int4 loads the base in so many bits, whichever way the adapter was trained: the output is that
    base's own. `packed` lays out the linears of the base for a CPU (see `Base.pack`), None where that can be done; a
    `Base` that is given stays as it is.

    Raises ForetellError for a missing or damaged checkpoint, and for a base other than the one it was trained on.
    """
    directory = local_directory(source)
    description = read_description(directory)
    load_again = None
    if not isinstance(base, Base):
        name = base or resolve_base(description["base"], directory)
        load_again = partial(
            load_base, name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, quantise=quantise
        )
        base = load_again()
    elif packed or quantise != "none":
        raise ForetellError("a base that is given stays as it is; leave out packed and quantise, or do it before")
    if not fits(base, description):
        given = base.name or "this model"
        raise ForetellError(
            f"the adapter in {source} was trained for {description['base']} and does not fit {given}: "
            "their weights differ; give the right base with --base, or train an adapter for this one"
        )
    tokenizer = load_tokenizer(base.name, trust_remote_code)
    if load_again is not None and (packed or (packed is None and fast_when_packed(base))):
        base.pack(lambda: load_again().lm)
    config = MTPConfig.from_dict({"sampler_tokens": 1, **description["config"]})  # 1 before that was a setting
    model = cls(base, config, tokenizer, check=check)
    try:
        load_weights(model, directory / WEIGHTS_FILE)
    except ForetellError:
        model.adapter.remove()  # a base that was given goes on without us
        raise
    model.provenance = description.get("provenance", {})
    return model


def fast_when_packed(base: Base) -> bool:
    return base.quantised == "none" and why_not(base.device, base.dtype) is None


def fits(base: Base, description: dict[str, Any]) -> bool:
    """Whether this is the base of that foretell.json. A quantised one stands for the full one, and the other way round.

    Raises ForetellError if that can't be told because the checkpoint is older than quantised bases.
    """
    if base.fingerprint() == description["base_fingerprint"]:
        return True
    if {base.quantised, description.get("base_quantised", "none")} == {"none"}:
        return False
    known = description.get("base_unquantised_fingerprint")
    if known is None:
        raise ForetellError(
            "the adapter was saved by an earlier foretell, which did not note what a quantised base is known by; load "
            "it once without quantise and save it again"
        )
    return bool(known == base.unquantised_fingerprint())


def load_weights(model: MTPModel, path: Path) -> None:
    """Reads our parameters in place. Raises ForetellError if the file is missing, damaged or of another shape."""
    weights = read_safetensors(path)
    own = model.own_parameters()
    if set(weights) != set(own) or any(weights[name].shape != own[name].shape for name in own):
        raise ForetellError(
            f"{path} does not hold the weights that its {CONFIG_FILE} describes; train or download it again"
        )
    for name, parameter in own.items():
        parameter.data.copy_(weights[name])


def local_directory(source: str | Path, **download: Any) -> Path:
    """The directory itself, or a snapshot of the Hub repository called so; `download` are snapshot_download's."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not is_hub_name(str(source)) or "/" not in str(source):
        raise ForetellError(f"there is no model at {source}: give a directory made by `foretell train` or a Hub name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **download))
    except Exception as error:
        raise ForetellError(f"there is no model at {source}, here or on the Hub ({reason_of(error)})") from error


def read_description(directory: Path) -> dict[str, Any]:
    """foretell.json, checked. Raises ForetellError if missing, damaged or of a later format."""
    path = directory / CONFIG_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        missing = {"format", "base", "base_fingerprint", "config"} - set(description)
    except FileNotFoundError as error:
        raise ForetellError(
            f"{directory} has no {CONFIG_FILE}: it is not a foretell model (a base alone needs `foretell train`)"
        ) from error
    except (ValueError, TypeError) as error:
        raise ForetellError(f"{path} is damaged ({error}); train or download it again") from error
    if missing:
        raise ForetellError(f"{path} lacks {', '.join(sorted(missing))}; train or download it again")
    if description["format"] > FORMAT:
        raise ForetellError(f"{path} was written by a later foretell; upgrade with `pip install -U foretell`")
    return description


def base_reference(name: str, directory: Path) -> str:
    """How a checkpoint names its base: relative when the two lie in one tree, so that the tree can move."""
    path = Path(name)
    if not path.is_dir():
        return name
    path = path.resolve()
    return os.path.relpath(path, directory.resolve()) if path.parent == directory.resolve().parent else str(path)


def resolve_base(reference: str, directory: Path) -> str:
    beside = directory / reference
    return str(beside.resolve()) if reference.startswith("..") and beside.is_dir() else reference


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The base's tokenizer, or None if it has none (token ids can still be given)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return None


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(str(path))
    except FileNotFoundError as error:
        raise ForetellError(f"{path} is missing; train or download it again") from error
    except (SafetensorError, OSError) as error:
        raise ForetellError(f"{path} is damaged ({error}); train or download it again") from error


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Atomic: a full disk leaves the previous file. Raises ForetellError in that case."""
    _replace(path, lambda temporary: save_file(tensors, str(temporary)))


def write_text(text: str, path: Path) -> None:
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(content: bytes, path: Path) -> None:
    _replace(path, lambda temporary: temporary.write_bytes(content))


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors writes files that only their owner may read
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ForetellError(
            f"{path} could not be written ({error}); free some space or give another directory; "
            "what was saved before is whole"
        ) from error


def push_to_hub(model: MTPModel, repository: str, *, private: bool = False) -> str:
    """Uploads what `save` writes; returns the repository's address. Raises ForetellError if the Hub refuses."""
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    with TemporaryDirectory() as folder:
        save(model, folder)
        try:
            api = HfApi()
            # Without an owner the repository is the user's own, and only the answer says whose that is.
            url = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=url.repo_id, folder_path=folder)
        except Exception as error:
            raise ForetellError(
                f"{repository} could not be uploaded ({reason_of(error)}); log in with `hf auth login` and try again"
            ) from error
    return str(url)
