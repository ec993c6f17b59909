"""Adapt an encoder that no library knows: a vision transformer written by hand, with a role map for its odd parts.

Command:   python recipes/private_encoder.py        (options of `lilt train` may follow: --epochs 5 --overwrite)
Hardware:  45 s of one CPU core; no accelerator
Expected:  mean recall on the demo's held-out split 1.7 % before, 15 % after one epoch of 2,304 norm values a tower
"""

import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import lilt
from lilt.cli import main as run_lilt
from lilt.demo import VISION

WIDTH, HEADS, PATCH_PX, IMAGE_PX = 128, 4, 8, 64


class Centre(nn.Module):
    """A normalisation whose class does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight + self.bias


class Mixer(nn.Module):
    """An attention whose class does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 3 * WIDTH)
        self.back = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.back(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Stage(nn.Module):
    """One repeated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.before_mix, self.mix = Centre(), Mixer()
        self.before_wide, self.wide, self.narrow = Centre(), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.before_mix(x))
        return x + self.narrow(F.gelu(self.wide(self.before_wide(x))))


class Eye(nn.Module):
    """Images (B, 3, 64, 64) -> class token (B, 128); its units are attributes, not a list."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH_PX, PATCH_PX)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Parameter(torch.zeros(1, 1 + (IMAGE_PX // PATCH_PX) ** 2, WIDTH))
        self.stage0, self.stage1, self.stage2, self.stage3 = (Stage() for _ in range(4))
        self.last = Centre()

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        for stage in (self.stage0, self.stage1, self.stage2, self.stage3):
            x = stage(x)
        return self.last(x)[:, 0]


# How it wants its images. Any callable from a PIL image to a tensor would do as well; then --augment none.
PREPROCESS = lilt.ImageContract(IMAGE_PX, mean=(0.5,) * 3, std=(0.25,) * 3)
# What is what, by the paths of named_modules(); what no line names is still found by type (here the MLP, the patches).
ROLES = {
    "stage*": "block",
    "**.before_*": "norm",
    "last": "norm",
    "**.mix": "attention",  # and all in it; `back`, its last linear layer, is then recognised as the output
    "**.mix.into": "attention.qkv",
}
# Your weights come from your own file. Here they are the demo's (a ViT of timm, pretrained on pictures alone) under the
# names above: random ones would leave nothing to adapt.
NAMES = {
    "blocks.": "stage", "norm1": "before_mix", "attn.qkv": "mix.into", "attn.proj": "mix.back", "norm2": "before_wide",
    "mlp.fc1": "wide", "mlp.fc2": "narrow", "cls_token": "token", "pos_embed": "places", "patch_embed.proj": "patches",
    "norm.": "last.",
}  # fmt: skip


def eye() -> tuple[nn.Module, lilt.ImageContract, dict[str, str]]:
    """Return what `py:private_encoder:eye` stands for: the module, its preprocess and its role map."""
    state = load_file(VISION / "model.safetensors")
    for theirs, ours in NAMES.items():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    module = Eye()
    module.load_state_dict(state)
    return module, PREPROCESS, ROLES


def show(model: lilt.DualEncoder) -> None:
    """Print what is trained, by rule: `report` knows it of every parameter."""
    table = Table("tower", "rule", "why", "tensors", "values", title="what is trained")
    rows = [(r.name.partition(".")[0], r.rule, r.why, r.values) for r in model.report() if r.trained]
    for key in dict.fromkeys(row[:3] for row in rows):
        values = [row[3] for row in rows if row[:3] == key]
        table.add_row(*key, f"{len(values)}", f"{sum(values):,}")
    Console().print(table)


def main(argv: Sequence[str], policy: str = "layernorm", output: str = "runs/private_encoder") -> int:
    """Build in Python, train by the command, load what came out."""
    module, preprocess, roles = eye()
    try:
        lilt.DualEncoder.build(module, "demo", policy, preprocess=preprocess)
    except ValueError as error:
        Console().print(f"without a role map: {error}\n", highlight=False, markup=False)
    show(lilt.DualEncoder.build(module, "demo", policy, preprocess=preprocess, vision_roles=roles))

    # the same tower by name: a run folder finds it again wherever this file can be imported
    towers = ["--vision", "py:private_encoder:eye", "--text", "demo", "--policy", policy, "--output", output]
    if status := run_lilt(["train", *towers, "--batch_size", "32", "--epochs", "1", *argv]):
        return status
    show(lilt.load(output))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
