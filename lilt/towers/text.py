"""Text towers from transformers, open_clip, or your own module, each with its own tokenizer."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel

from lilt.towers.base import Inputs, Tokens, Tower, text_towers
from lilt.towers.loading import fixed_seed, load_weights, open_clip_model, py_factory, quiet
from lilt.towers.spec import TowerSpec
from lilt.towers.tokenizer import FixedTokenizer, HfTokenizer, fixed_tokenizer


class _NothingHidden(TorchFunctionMode):
    """Answers yes where the library asks a tensor without values whether a mask shows all tokens."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


class HfText(Tower):
    """A transformers text encoder, or a decoder read at its last token."""

    default_pool = "cls"

    def run(self, inputs: Inputs) -> Any:
        assert isinstance(inputs, dict)
        with _NothingHidden() if inputs["input_ids"].is_meta else nullcontext():
            return self.body(**inputs).last_hidden_state

    def read(self, raw: Tensor, inputs: Inputs) -> Tokens:
        assert isinstance(inputs, dict)
        return Tokens(raw, inputs["attention_mask"].bool())


class OpenClipText(Tower):
    """The text side of an open_clip model; `own` keeps its projection, the other pools leave it out."""

    def run(self, inputs: Inputs) -> Any:
        assert isinstance(inputs, dict)
        if self.pool == "own":
            return self.body(inputs["input_ids"])
        hidden, attention_mask = self.body._embeds(inputs["input_ids"])
        return self.body.ln_final(self.body.transformer(hidden, attn_mask=attention_mask))

    def read(self, raw: Tensor, inputs: Inputs) -> Tokens:
        assert isinstance(inputs, dict)
        return Tokens(raw, inputs["attention_mask"].bool())

    def own(self, raw: Tensor, inputs: Inputs) -> Tensor:
        return raw


class OwnText(Tower):
    """Somebody's own module: called with the token tensors by name, or with the ids alone; (B, W) or (B, L, W)."""

    takes_ids_only = False

    def run(self, inputs: Inputs) -> Any:
        assert isinstance(inputs, dict)
        raw = self.body(inputs["input_ids"]) if self.takes_ids_only else self.body(**inputs)
        return getattr(raw, "last_hidden_state", raw)

    def read(self, raw: Tensor, inputs: Inputs) -> Tokens:
        assert isinstance(inputs, dict)
        return Tokens(raw, inputs["attention_mask"].bool())

    def own(self, raw: Tensor, inputs: Inputs) -> Tensor:
        if raw.ndim == 2:
            return raw
        tokens = self.read(raw, inputs)
        weight = tokens.mask.to(raw.dtype).unsqueeze(-1) if tokens.mask is not None else torch.ones_like(raw[..., :1])
        return (raw * weight).sum(1) / weight.sum(1)


@text_towers.register("hf")
def hf_text(spec: TowerSpec) -> Tower:
    """Build `hf:NAME_OR_PATH`: an encoder, the encoder half of an encoder-decoder, or a decoder."""
    spec.refuse_extra()
    try:
        config = AutoConfig.from_pretrained(spec.name)
        factory: Any = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
        with fixed_seed(), quiet():
            if spec.pretrained and spec.weights is None:
                body = factory.from_pretrained(spec.name, dtype=torch.float32)
            else:
                body = factory.from_config(config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(spec.name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"transformers could not load the text tower {spec.name!r}: {error}. Expected a hub name or a folder with "
            "config.json, weights and tokenizer files"
        ) from error
    return from_hf_text(body, f"hf:{spec.name}", with_declared_pool(spec), tokenizer)


def from_hf_text(body: Any, label: str, spec: TowerSpec, tokenizer: Any) -> Tower:
    """Wrap a transformers text model: no pooler, decoders without cache and read at the last token."""
    body = getattr(body, "text_model", body)
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    if spec.weights is not None:
        load_weights(body, spec.weights)
    if hasattr(body.config, "use_cache"):
        body.config.use_cache = False
    positions = getattr(body.config, "max_position_embeddings", None) or tokenizer.model_max_length
    # RoBERTa counts positions from pad_token_id + 1, so two of its table's rows are never reached
    context = min(int(positions) - _position_offset(body), int(tokenizer.model_max_length), 8192)
    own = "token" if _is_decoder(body) else "mean" if body.config.model_type == "t5" else "cls"
    pool = own if spec.pool in (None, "own") else spec.pool
    return HfText(body, "text", label, pool, HfTokenizer(tokenizer, context)).finish(spec.layers, spec.roles)


def _position_offset(body: nn.Module) -> int:
    table = next((m for n, m in body.named_modules() if n.endswith("embeddings.position_embeddings")), None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def _is_decoder(body: Any) -> bool:
    causal = any(getattr(m, "is_causal", False) is True for m in body.modules())
    return causal and getattr(body.config, "model_type", "") not in ("bert", "roberta")


def with_declared_pool(spec: TowerSpec) -> TowerSpec:
    """Put into a spec without a pool the one that a sentence-transformers folder declares, if it declares one."""
    file = Path(spec.name) / "1_Pooling" / "config.json"
    if spec.pool not in (None, "own") or not file.is_file():
        return spec
    declared = json.loads(file.read_text())
    kinds = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "token"}
    return replace(spec, pool=next((pool for key, pool in kinds.items() if declared.get(key)), spec.pool))


@text_towers.register("open_clip")
def open_clip_text(spec: TowerSpec) -> Tower:
    """Build the text side of `open_clip:ARCH@TAG`."""
    spec.refuse_extra()
    body = open_clip_model(TowerSpec(**{**spec.__dict__, "image_px": None})).text
    arch = spec.name.partition("@")[0]
    name = f"local-dir:{arch}" if Path(arch).is_dir() else arch
    return from_open_clip_text(body, spec, open_clip.get_tokenizer(name))


def from_open_clip_text(body: Any, spec: TowerSpec, tokenizer: Any) -> Tower:
    """Wrap the text side of an open_clip model; tokenizer is a callable (texts, context_length) -> ids (N, L)."""
    if spec.pool not in (None, "own"):
        if not hasattr(body, "_embeds"):
            raise ValueError(f"open_clip:{spec.name} has a transformers text side; use pool=own, or hf: for that model")
        body.text_projection = None
    context = int(getattr(body, "context_length", 77))
    contract = fixed_tokenizer(tokenizer, context, int(getattr(body, "pad_id", 0)))
    tower = OpenClipText(body, "text", f"open_clip:{spec.name}", spec.pool, contract)
    return tower.finish(spec.layers, spec.roles)


@text_towers.register("py")
def py_text(spec: TowerSpec) -> Tower:
    """Build `py:package.module:function`; the function returns a module, its tokenizer and, if needed, a role map."""
    module, tokenizer, spec = py_factory(spec)
    return wrap_text(module, tokenizer, f"py:{spec.name}", spec)


def wrap_text(module: nn.Module, tokenizer: Any, label: str, spec: TowerSpec) -> Tower:
    """Wrap a finished module; a transformers model finds its own tokenizer, another needs one passed."""
    if isinstance(module, PreTrainedModel):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(module.config.name_or_path)
        return from_hf_text(module, label, spec, tokenizer)
    if tokenizer is None:
        raise ValueError(
            f"the module {type(module).__name__} came without a tokenizer; a text tower needs its own: pass "
            "tokenizer=a transformers tokenizer, or a callable (list of texts -> ids (N, L))"
        )
    if hasattr(tokenizer, "encode") and hasattr(tokenizer, "describe"):
        contract = tokenizer
    elif hasattr(tokenizer, "special_tokens_map"):
        contract = HfTokenizer(tokenizer, int(min(tokenizer.model_max_length, 8192)))
    else:
        contract = FixedTokenizer(tokenizer, int(tokenizer(["a"]).shape[1]))
    if spec.weights is not None:
        load_weights(module, spec.weights)
    tower = OwnText(module, "text", label, spec.pool, contract)
    tower.takes_ids_only = isinstance(contract, FixedTokenizer)
    return tower.finish(spec.layers, spec.roles)
