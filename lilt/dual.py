"""The facade: a dual encoder to build, use, save and load."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from lilt import checkpoint
from lilt.build import build_baseline, build_model, settled
from lilt.config import ModelConfig
from lilt.data import eval_transform, open_image
from lilt.model import TwoTower
from lilt.policies import Fate, check_alive, fates, merge, parse_policy
from lilt.towers import ImageContract, names_model

Images = Tensor | Sequence[Image.Image | str | Path]


class Merged(NamedTuple):
    """The two bodies as their libraries know them, tuned, and `model`: the same two under the trained heads."""

    vision: nn.Module
    text: nn.Module
    model: DualEncoder


class DualEncoder(nn.Module):
    """A vision and a text tower in one joint space. `core` is the model, `config` how it was built."""

    def __init__(self, core: TwoTower, config: ModelConfig):
        super().__init__()
        self.core = core
        self.config = config
        self._off = False  # inside disabled()
        self.train(core.training)  # a fresh module says it trains, and embed restores what it says

    @classmethod
    def build(
        cls,
        vision: str | nn.Module = "demo",
        text: str | nn.Module = "demo",
        policy: str = "layernorm",
        *,
        preprocess: Any = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> DualEncoder:
        """Build from specs or modules; settings are the fields of `lilt.ModelConfig`.

        preprocess (a callable PIL image -> tensor, or `lilt.ImageContract`) and tokenizer go with modules of your own;
        so do vision_roles and text_roles, where the parts of a module are not recognised (`lilt.towers.roles`).
        """
        specs = {"vision": vision, "text": text}
        modules = {side: what for side, what in specs.items() if isinstance(what, nn.Module)}
        names = {side: f"module:{type(m).__name__}" if isinstance(m, nn.Module) else m for side, m in specs.items()}
        config = settled(ModelConfig(**names, policy=policy, **settings))  # type: ignore[arg-type]
        return cls(build_model(config, **modules, preprocess=preprocess, tokenizer=tokenizer).eval(), config)

    def encode_image(self, images: Images) -> Tensor:
        """Embed images as unit rows (B, D): a tensor (B, 3, H, W) as preprocessed, PIL images and paths from the start.

        Differentiable, and the mode stays as it is.
        """
        if not isinstance(images, Tensor):
            contract = self.core.vision.contract
            assert isinstance(contract, ImageContract)
            transform = eval_transform(contract)
            pictures = (i.convert("RGB") if isinstance(i, Image.Image) else open_image(i) for i in _several(images))
            images = torch.stack([transform(picture) for picture in pictures])
        return self.core.encode_image(images.to(self._device()))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed captions as unit rows (B, D). Differentiable, and the mode stays as it is."""
        tokenizer = self.core.text.contract
        assert not isinstance(tokenizer, ImageContract)
        encodings, _ = tokenizer.encode(_several(texts), self.config.eval_tokens)
        return self.core.encode_text({k: v.to(self._device()) for k, v in tokenizer.pad(encodings).items()})

    @torch.no_grad()
    def embed(
        self, images: Images | None = None, texts: Sequence[str] | None = None, batch_size: int = 64
    ) -> dict[str, Tensor]:
        """Embed in eval mode, without gradients and in batches: {"image": (N, D), "text": (M, D)} on the CPU."""
        training = self.training
        self.eval()
        try:
            out = {}
            for name, items, encode in (("image", images, self.encode_image), ("text", texts, self.encode_text)):
                if items is not None:
                    several: Any = items if isinstance(items, Tensor) else _several(items)
                    starts = range(0, len(several), batch_size)
                    parts = [encode(several[i : i + batch_size]).cpu() for i in starts]
                    out[name] = torch.cat(parts) if parts else torch.zeros(0, self.core.projection.dim)
            return out
        finally:
            self.train(training)

    def report(self) -> list[Fate]:
        """Return what became of every parameter of both towers, and by which rule; names start with vision or text."""
        sides = (("vision", self.core.vision), ("text", self.core.text))
        return [row._replace(name=f"{side}.{row.name}") for side, tower in sides for row in fates(tower)]

    def check(self) -> None:
        """Raise ValueError naming the trained tensors that do not move their tower's output; nothing is changed.

        To be called before training of your own, as `lilt train` does. `build` and `load` do not: it costs a forward
        and backward of two images and three captions.
        """
        self._refuse_while_off("check")
        check_alive(self.core.vision)
        check_alive(self.core.text)

    def merge(self) -> Merged:
        """Fold what the policies added into the weights, in fp32 or wider, and return plain modules.

        They are copies, frozen and in eval mode, with the classes and state_dict keys of their libraries; this model
        stays as it is. `Merged.model` embeds like this one. Raises ValueError for policies that do not merge.
        """
        self._refuse_while_off("merge")
        config = self.config
        policies = {side: parse_policy(spec, side) for side, spec in config.policies.items()}
        vision, text = (merge.merged(tower, policies[tower.side]) for tower in (self.core.vision, self.core.text))
        projection, scale, shared = map(copy.deepcopy, (self.core.projection, self.core.scale, self.core.shared))
        bias = None if self.core.bias is None else self.core.bias.item()
        core = TwoTower(vision, text, projection, scale, shared, bias)
        plain = {"vision": vision.spec, "text": text.spec, "policy": "frozen"}
        config = replace(config, **plain, vision_policy=None, text_policy=None)  # type: ignore[arg-type]
        return Merged(vision.body, text.body, DualEncoder(core.eval(), config))

    @contextmanager
    def disabled(self, **base: Any) -> Iterator[None]:
        """Give the outputs of the base towers for a while: `with model.disabled(): …`; to look, not to train or save.

        The heads stay as trained, since the base has none. Where a policy changed weights, the base is built
        anew from its spec; for towers that were passed as modules, pass them as they were: vision, text, preprocess,
        tokenizer as `lilt.load` takes them.
        """
        if self._off:
            yield
            return
        vision, text = self._bases(**base)
        with merge.disabled(self.core.vision, vision), merge.disabled(self.core.text, text):
            self._off = True
            try:
                yield
            finally:
                self._off = False

    def interpolate(self, scale: float, **base: Any) -> DualEncoder:
        """Return a copy whose towers stand at base + scale * (tuned - base), 0 <= scale <= 1.

        The heads stay as trained; what a policy added is scaled by scale. base: as in `disabled`.
        Source: Wortsman et al. 2022, arXiv 2109.01903.
        """
        self._refuse_while_off("interpolate")
        if not 0 <= scale <= 1:
            raise ValueError(f"scale={scale:g} is outside the way from base to tuned; expected 0 to 1; give 0.5, say")
        vision, text = self._bases(**base)
        twin = copy.deepcopy(self, {id(t.contract): t.contract for t in (self.core.vision, self.core.text)})
        merge.interpolate(twin.core.vision, vision, scale)
        merge.interpolate(twin.core.text, text, scale)
        return twin

    def _bases(self, vision: Any = None, text: Any = None, preprocess: Any = None, tokenizer: Any = None) -> list[Any]:
        image = merge.base_of(self.core.vision, vision, preprocess, self.config.image_px)
        return [image, merge.base_of(self.core.text, text, tokenizer)]

    def _refuse_while_off(self, what: str) -> None:
        if self._off:
            raise ValueError(f"{what} inside disabled() would take the base for the tuned model; leave the block first")

    def save(self, folder: str | Path, metrics: dict[str, Any] | None = None, overwrite: bool = False) -> Path:
        """Write the trained tensors and their contract; a folder that holds a checkpoint is refused unless asked."""
        self._refuse_while_off("save")
        if not self.core.trained():
            raise ValueError(
                f"nothing is trained in this model of {self.config.vision!r}, and a checkpoint holds what is trained; "
                "expected a trained policy or heads; build or load it by its name again"
            )
        if checkpoint.holds_run(folder) and not overwrite:
            raise ValueError(
                f"{folder} already holds a checkpoint; nothing was written: pass overwrite=True or another folder"
            )
        return checkpoint.save(self.core, self.config, folder, metrics)

    def _device(self) -> torch.device:
        return self.core.scale.log.device


def load(
    folder: str | Path,
    vision: nn.Module | None = None,
    text: nn.Module | None = None,
    preprocess: Any = None,
    tokenizer: Any = None,
    **settings: Any,
) -> DualEncoder:
    """Load a checkpoint in eval mode; modules stand in for towers that were passed as modules, settings override.

    Or an off-the-shelf model of images and texts as it is, by its spec: `open_clip:ARCH@TAG`, `hf:NAME_OR_FOLDER`.
    Raises ValueError when the base weights, the tokenizer or the set of trained tensors are not the saved ones.
    """
    if names_model(str(folder)):
        given = {"vision": vision, "text": text, "preprocess": preprocess, "tokenizer": tokenizer, **settings}
        if changes := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{changes[0]} came with the model {str(folder)!r}, which is taken as it is; expected the folder of a "
                f"run to change settings of; leave {changes[0]} out"
            )
        core, config = build_baseline(str(folder))
        return DualEncoder(core.eval(), config)
    config = replace(checkpoint.settings_of(checkpoint.read_contract(folder)), **settings)
    for side, module in (("vision", vision), ("text", text)):
        if getattr(config, side).startswith("module:") and module is None:
            raise ValueError(
                f"{folder} was trained on your own {side} module ({getattr(config, side)}); pass it: "
                f"lilt.load({str(folder)!r}, {side}=module, …)"
            )
    core = build_model(config, vision=vision, text=text, preprocess=preprocess, tokenizer=tokenizer)
    checkpoint.restore(core, folder)
    return DualEncoder(core.eval(), config)


def _several(items: Any) -> list[Any]:
    return [items] if isinstance(items, (str, Path, Image.Image)) else list(items)
