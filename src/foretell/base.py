"""What foretell needs from a base model, over any transformers causal language model (design.md decision 1)."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel

from foretell import quantised
from foretell.attention import AttentionMask, is_windowed
from foretell.errors import ForetellError, reason_of
from foretell.grouped_attention import can_group, grouped
from foretell.lean import LeanSteps, make_of
from foretell.mapped import give_back, separate
from foretell.packed import PackedLinear, pack, why_not
from foretell.packed_rows import PackedEmbedding, round_rows_of, rows_of
from foretell.streamed import StreamedWeight

CONFIG_FILE = "foretell.json"  # of a model of ours
LARGE_UNEMBEDDING = 2**24  # bytes, from which it is not there twice: rows take longer to read out of oneDNN's blocks
CACHE_ARGUMENTS = ("cache", "past_key_values")  # what a decoder calls it since transformers 5.24, and before


class Base(nn.Module):
    """A frozen causal language model seen through four doors: embed, latents, unembed, blocks."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm.eval().requires_grad_(False)
        self.embedding = lm.get_input_embeddings()
        self.head = lm.get_output_embeddings()
        if self.embedding is None or self.head is None:
            raise ForetellError(
                f"{type(lm).__name__} has no embedding or no output layer, so foretell can't add masks to it"
            )
        # Llama 4's text model looks for its decoder under a name that only its multimodal one has, and finds itself.
        self.decoder = lm.base_model if lm.base_model is not lm else getattr(lm, "model", lm)
        self.takes = frozenset(inspect.signature(self.decoder.forward).parameters)
        self.cache_argument = next((name for name in CACHE_ARGUMENTS if name in self.takes), None)
        self.text_config = lm.config.get_text_config()
        # What Cohere multiplies its logits with, Granite divides them by, and Gemma bends them to.
        terms = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        self._logit_terms = tuple(getattr(self.text_config, term, None) for term in terms)
        self.vocab_size = int(self.head.weight.shape[0])
        self.d_model = int(self.head.weight.shape[1])
        self.parameter_count = sum(p.numel() for p in lm.parameters())
        self.d_embedding = int(self.embed(torch.zeros(1, dtype=torch.long, device=self.device)).shape[-1])
        self.max_positions = getattr(self.text_config, "max_position_embeddings", None)
        # GPT-Neo's attention has a table of that many columns, which mask rows take up as well.
        self.max_columns = self.max_positions if self.text_config.model_type == "gpt_neo" else None
        # Asked at every step, and a configuration is slow to read.
        self.windowed = is_windowed(self.text_config)
        self.layer_types: list[str] | None = getattr(self.text_config, "layer_types", None)
        self._groups = can_group(lm)
        self._fingerprints: tuple[str, str] | None = None
        self._statistics: tuple[Tensor, float] | None = None
        self._load_again: Callable[[], PreTrainedModel] | None = None  # once its linears are packed
        self._unpacked: PreTrainedModel | None = None
        self.lean: LeanSteps | None = None  # once its linears are packed, if it is of the make
        self._by_modules = False

    @property
    def quantised(self) -> str:
        """int8 or int4 if its linears are of so few bits, else none."""
        bits = {"int8": "is_loaded_in_8bit", "int4": "is_loaded_in_4bit"}
        return next((kind for kind, flag in bits.items() if getattr(self.lm, flag, False)), "none")

    @property
    def packed(self) -> bool:
        """Whether its linears are packed (see `pack`)."""
        return self._load_again is not None

    @property
    def ways(self) -> list[str]:
        """How the weights of its packed linears lie."""
        return sorted({module.product.way for module in self.lm.modules() if isinstance(module, PackedLinear)})

    @torch.inference_mode()
    def pack(self, load_again: Callable[[], PreTrainedModel]) -> None:
        """Lays the weights of its linears out as this CPU multiplies them fastest: several times faster steps, forward
        only.

        Of the unembedding single rows are read, too, and by a tied embedding: out of oneDNN's blocks where that can be,
        else its weight is kept: in the file that it was loaded from, if it has the file's dtype, else in memory.
        `load_again` gives the model as it is now, should anyone ask (`unpacked`).
        Raises ForetellError where there is no oneDNN or it gives other products.
        """
        if reason := why_not(self.device, self.dtype):
            raise ForetellError(f"the linears can't be packed: {reason}; leave out packed")
        self.keep_fingerprints()  # which reads the weights
        self._statistics = self.embedding_statistics()
        probe = torch.arange(4, device=self.device)[None] % self.vocab_size
        before = self.unembed(self.latents(self.embed(probe))).float()
        pack(self.lm, lambda: self.latents(self.embed(probe)), kept=self.head)
        self.head = self.lm.get_output_embeddings()
        self._give_up_unembedding()
        self._load_again = load_again
        error = (self.unembed(self.latents(self.embed(probe))).float() - before).abs().max() / before.abs().max()
        if not error < (1e-4 if self.dtype == torch.float32 else 0.1):
            raise ForetellError(
                f"packed linears changed the logits by {float(error):.1e} of their range; load it with packed=False"
            )
        kept = self.head.kept if isinstance(self.head, PackedLinear) else None
        separate([*self.lm.parameters(), *([] if kept is None else [kept])])  # of what is left, only rows are read
        give_back()
        self.lean = make_of(self)

    def _give_up_unembedding(self) -> None:
        """Drops the weight that the packed unembedding kept, and with it a tied embedding's, where the rows of both can
        be read out of the packed one, or out of a copy of half its size."""
        head, embedding = self.head, self.embedding
        if not isinstance(head, PackedLinear) or head.kept is None or head.kept.nbytes < LARGE_UNEMBEDDING:
            return
        rows: Callable[[Tensor], Tensor] | None = None
        if head.product.way == "blocks":
            rows = rows_of(head.product.tensors[0], head.kept)
        elif head.product.way == "halves":
            rows = round_rows_of(head.kept)
        elif isinstance(head.product.weight, StreamedWeight):
            rows = head.product.weight.rows
        if rows is None:
            return
        tied, head.read = embedding.weight is head.kept, rows
        if tied:
            scale = getattr(embedding, "embed_scale", None)
            self.embedding = PackedEmbedding(head, scale if isinstance(scale, Tensor) else None)
            probe = torch.arange(0, self.vocab_size, max(1, self.vocab_size // 64))
            if not torch.equal(self.embedding(probe), embedding(probe)):  # it does more than look up
                self.embedding, head.read = embedding, None
                return
            self.lm.set_input_embeddings(self.embedding)
        head.kept = None

    def unpacked(self) -> PreTrainedModel:
        """The model as transformers loads it, to compare with: itself, or, if its linears are packed, loaded again."""
        if self._load_again is None:
            return self.lm
        if self._unpacked is None:
            self._unpacked = self._load_again().eval().requires_grad_(False)
        return self._unpacked

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if isinstance(self.head, PackedLinear) else self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.dtype

    @property
    def name(self) -> str:
        return str(self.lm.config._name_or_path)

    def embed(self, ids: Tensor) -> Tensor:
        """(..., ) int64 -> (..., E): the embedding module's output, which already holds any scale of the base's."""
        return self.embedding(ids)

    def latents(
        self,
        embeddings: Tensor,
        positions: Tensor | None = None,
        mask: AttentionMask | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """(B, Q, E) -> z (B, Q, D), after the final norm. Without a mask: causal over what is cached."""
        lean = self.lean_for(embeddings.shape[1], mask)
        if lean is not None and positions is not None and cache is not None:
            return lean.latents(embeddings, positions, mask, cache)
        step = mask is not None or embeddings.shape[1] == 1
        group = self._groups and step and self.text_config._attn_implementation == "sdpa"
        cached = {} if cache is None else {str(self.cache_argument): cache}
        with grouped(self.text_config) if group else nullcontext():
            out = self.decoder(
                inputs_embeds=embeddings,
                position_ids=positions,
                attention_mask=mask,
                use_cache=cache is not None,
                **cached,
            )
        return out.last_hidden_state

    def lean_for(self, rows: int, mask: AttentionMask | None) -> LeanSteps | None:
        """What does a step of so many rows over a cache in place of the decoder's modules, if anything does."""
        lean = None if self._by_modules else self.lean
        return lean if lean is not None and lean.can_run(rows, mask) else None

    @contextmanager
    def by_modules(self) -> Iterator[None]:
        """Within this context latents come from the decoder's own modules, also where lean steps would do."""
        before, self._by_modules = self._by_modules, True
        try:
            yield
        finally:
            self._by_modules = before

    def unembedding_rows(self, ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., D): the rows of the unembedding that score these tokens."""
        return self.head.rows(ids) if isinstance(self.head, PackedLinear) else F.embedding(ids, self.head.weight)

    def unembed(self, latents: Tensor) -> Tensor:
        """(..., D) -> logits (..., V), with the scale or soft cap of those bases that have one."""
        # A product with a slice of more dimensions than two takes the slow way on a CPU in bfloat16: 16 times as long.
        rows = latents.flatten(0, -2) if latents.ndim > 2 else latents
        logits = self.head(rows).view(*latents.shape[:-1], -1)
        multiplied, divided, cap = self._logit_terms
        if multiplied:
            logits = logits * multiplied
        if divided:
            logits = logits / divided
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def bends_logits(self) -> bool:
        """Whether logits are more than a product."""
        return any(self._logit_terms)

    @property
    def blocks(self) -> nn.ModuleList:
        """The stack of transformer blocks: the module list as long as the configuration says."""
        count = self.text_config.num_hidden_layers
        for module in self.decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise ForetellError(f"{type(self.lm).__name__} has no list of {count} blocks, so foretell can't adapt it")

    @torch.no_grad()
    def embedding_statistics(self, sample: int = 4096) -> tuple[Tensor, float]:
        """Mean (E,) and standard deviation of the embedding's outputs, over at most `sample` tokens, fp32.

        Kept once the linears are packed: so many rows would bring the whole embedding in from its file.
        """
        if self._statistics is not None:
            return self._statistics
        step = max(1, self.vocab_size // sample)
        outputs = self.embed(torch.arange(0, self.embedding.weight.shape[0], step, device=self.device)).float()
        return outputs.mean(0), float(outputs.std())

    @torch.no_grad()
    def fingerprint(self) -> str:
        """sha256 over names, shapes and a sample of every floating-point weight.

        Samples are rounded to bfloat16, so that the same weights loaded in another precision keep their fingerprint.
        """
        return self._fingerprints[0] if self._fingerprints else _digest(dict(self.lm.named_parameters()))

    def keep_fingerprints(self) -> None:
        """Remembers both, before the weights are laid out in another way."""
        self._fingerprints = self.fingerprint(), self.unquantised_fingerprint()

    def unquantised_fingerprint(self) -> str:
        """The same over what quantisation leaves alone: embeddings, and vectors outside the blocks.

        By it a quantised base is known as the full one's; a fine-tune of the blocks alone is not told apart.
        """
        if self._fingerprints:
            return self._fingerprints[1]
        inside = {id(p) for p in self.blocks.parameters()}
        own = {name: p for name, p in self.lm.named_parameters() if id(p) not in inside}
        return _digest({name: p for name, p in own.items() if p.ndim == 1 or p is self.embedding.weight})


@torch.no_grad()
def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.is_floating_point() and weight.device.type != "meta":
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)].to(torch.bfloat16)
            digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def is_hub_name(name: str) -> bool:
    """Whether a name can only mean a Hub repository: "owner/model" or "model", not a path."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and bool(name)


def is_adapter(name: str) -> bool:
    """Whether a directory or Hub repository holds a model of ours."""
    if Path(name).is_dir():
        return (Path(name) / CONFIG_FILE).is_file()
    from huggingface_hub import hf_hub_download

    try:
        return bool(hf_hub_download(name, CONFIG_FILE))
    except (OSError, ValueError):  # it is not there, or can't be reached
        return False


def resolve_device(device: str | torch.device | None) -> torch.device:
    """None: a GPU if there is one. Raises ForetellError for a device that torch does not know or does not have."""
    try:
        resolved = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ForetellError(f"there is no device {str(device)!r} ({reason}); give cpu, cuda or cuda:N") from error
    return resolved


def load_base(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    quantise: str = "none",
    **kwargs: Any,
) -> Base:
    """The base called `name`: a directory or a Hub name. Only safetensors are read, never pickles.

    `quantise` int8 or int4 loads its linear layers in so many bits.
    Raises ForetellError with what to do when the model is not there or is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    if not Path(name).is_dir() and (Path(name).exists() or not is_hub_name(name)):
        raise ForetellError(f"there is no base at {name}: give a directory with safetensors or a Hub name")
    quantisation = quantised.load_arguments(quantise, dtype, device)
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, **quantisation, **kwargs
        )
    except (OSError, ValueError, KeyError) as error:
        if is_adapter(name):
            raise ForetellError(
                f"{name} is a trained adapter, not a base; give the base that it was trained for"
            ) from error
        raise ForetellError(
            f"the base {name!r} could not be loaded ({reason_of(error)}); give a directory with safetensors "
            "or a Hub name"
        ) from error
    except Exception as error:  # safetensors raises its own type for damaged files
        if "afetensor" not in type(error).__name__:
            raise
        raise ForetellError(f"the weights of the base {name!r} are damaged ({error}); fetch them again") from error
    if quantisation:
        quantised.one_arithmetic(lm)
        return Base(lm)
    return Base(lm.to(device))
