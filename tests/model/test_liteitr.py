"""Two truncated towers under one shared block: the size that was published, and the whole way on tiny stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import lilt
from lilt.budgets import meta_batch
from lilt.build import build_model
from lilt.cli import main
from lilt.config import TrainConfig
from lilt.model import Scale, TwoTower, build_heads
from lilt.run import align
from lilt.towers import meta_tower
from tests.model.pairs import joined
from tests.policies.conformance import REFUSED, SPECS
from tests.test_distributed import ROOT, torchrun
from tests.towers.families import batch, tiny

SHAPE = {"vision": "demo?layers=2", "text": "demo?layers=2", "projection": "none"}
TEXTS = ["a red circle", "two small blue squares"]


def test_the_published_shape_has_the_published_size() -> None:
    vision = meta_tower("timm:vit_base_patch16_224?layers=6&pretrained=false", "vision")
    text = meta_tower("hf:bert-base-uncased?layers=6", "text")
    with torch.device("meta"):
        shared, projection = build_heads("transformer(n=1)", "none", vision, text)
        core = TwoTower(vision, text, projection, Scale(), shared)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in core.named_children()}
    d = 768
    six = 6 * (12 * d**2 + 13 * d)
    assert parts == {
        "vision": 16 * 16 * 3 * d + d + d + 197 * d + six + 2 * d,
        "text": (30522 + 512 + 2) * d + 2 * d + six,
        "projection": 0,
        "scale": 1,
        "shared": 12 * d**2 + 15 * d,
    }
    assert sum(parts.values()) == 116_725_249  # published: about 117 M
    assert shared.blocks[0].attn.num_heads == 12  # type: ignore[index, union-attr]
    images, tokens = meta_batch(vision, text, 2, 64)
    out = core(images, tokens)
    assert out.image.shape == out.text.shape == (2, d)


def run(tmp_path: Path, pictures: Path, **options: Any) -> Any:
    plain = {"data": str(pictures / "manifest.jsonl"), "batch_size": 6, "workers": 0, "max_steps": 2, "log_every": 1}
    config = TrainConfig(
        **{**SHAPE, "shared": "transformer(heads=4)", **plain, "output": str(tmp_path / "run"), **options}
    )
    return align(config, Console(quiet=True))


@pytest.mark.parametrize("policy", ["frozen", "layernorm", "lora", "full"])
def test_it_trains_saves_loads_and_merges_with_every_policy(policy: str, pictures: Path, tmp_path: Path) -> None:
    report = run(tmp_path, pictures, policy=policy)
    model = lilt.load(report.folder)
    assert model.config.shared == "transformer(heads=4)" and model.config.projection == "none"
    core, fresh = model.core, build_model(model.config)
    assert (len(core.vision.blocks), len(core.text.blocks), len(core.shared.blocks)) == (2, 2, 1)
    trained = core.trained()
    assert set(load_file(report.folder / "adapter.safetensors")) == set(trained)
    start = dict(fresh.named_parameters())
    changed = {name for name, p in core.named_parameters() if not torch.equal(p, start[name])}
    assert {name for name, _ in core.shared.named_parameters(prefix="shared")} <= changed <= set(trained)
    assert (changed == {n for n in trained if n.startswith(("shared.", "scale."))}) == (policy == "frozen")
    files = sorted(pictures.glob("*.png"))[:4]
    expected = model.embed(files, TEXTS)
    assert expected["image"].shape == (4, 128)
    assert all(torch.equal(rows, lilt.load(report.folder).embed(files, TEXTS)[side]) for side, rows in expected.items())
    merged = model.merge().model
    assert merged.config.shared == model.config.shared
    for side, rows in merged.embed(files, TEXTS).items():
        torch.testing.assert_close(rows, expected[side], rtol=0, atol=1e-5)
    with torch.no_grad():
        merged.core.shared.blocks[0].ls1.gamma.add_(1)  # a copy: the model it came from stays
    assert all(torch.equal(rows, expected[side]) for side, rows in model.embed(files, TEXTS).items())


@pytest.mark.parametrize("shared", ["mlp(types=true)", "transformer(n=2,types=true,pool=mean)"])
def test_the_other_shared_encoders_train_too_and_in_bf16(shared: str, pictures: Path, tmp_path: Path) -> None:
    report = run(tmp_path, pictures, shared=shared, precision="bf16", projection="tokens(dim=32)")
    assert report.outcome.finished
    saved, start = lilt.load(report.folder).core.shared, build_model(lilt.load(report.folder).config).shared
    for name, parameter in saved.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all()
        assert not torch.equal(parameter, start.get_parameter(name)), name


def test_disabled_and_interpolated_towers_stay_under_the_trained_heads(pictures: Path) -> None:
    model = lilt.DualEncoder.build(**SHAPE, shared="transformer(heads=4)", policy="layernorm")
    with torch.no_grad():
        for p in model.core.trained().values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    files = sorted(pictures.glob("*.png"))[:4]
    base = lilt.DualEncoder.build(**SHAPE, shared="transformer(heads=4)", policy="frozen")
    base.core.shared.load_state_dict(model.core.shared.state_dict())
    pure = base.embed(files, TEXTS)
    with model.disabled():
        assert all(torch.equal(rows, pure[side]) for side, rows in model.embed(files, TEXTS).items())
    for side, rows in model.interpolate(0).embed(files, TEXTS).items():
        torch.testing.assert_close(rows, pure[side], rtol=0, atol=1e-6)
    assert not torch.allclose(model.embed(files, TEXTS)["image"], pure["image"], atol=1e-3)


def test_a_checkpoint_from_before_shared_encoders_is_read(tmp_path: Path) -> None:
    model = lilt.DualEncoder.build(policy="frozen")
    folder = model.save(tmp_path / "x")
    contract = json.loads((folder / "lilt.json").read_text())
    assert set(contract["tensors"]) == {
        "scale.log", *(f"projection.{side}.{kind}" for side in ("vision", "text") for kind in ("weight", "bias")),
    }  # fmt: skip
    del contract["model"]["shared"]
    (folder / "lilt.json").write_text(json.dumps(contract))
    again = lilt.load(folder)
    assert torch.equal(again.embed(texts=TEXTS)["text"], model.embed(texts=TEXTS)["text"])


TOGETHER = [s for s in SPECS if not {"vit", "bert"} & set(REFUSED.get(s, ()))]


@pytest.mark.parametrize("policy", TOGETHER)
def test_every_policy_trains_under_a_shared_block(policy: str) -> None:
    core = joined("transformer", "none", tiny("vit"), tiny("bert"), policy).train()
    out = core(batch(core.vision), batch(core.text))
    (out.scale * out.image @ out.text.T)[:, 0].sum().backward()
    trained = core.trained()
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert {name for name, _ in core.shared.named_parameters(prefix="shared")} <= set(trained)


def test_two_processes_train_the_shared_block_as_one_does(
    tiny_vision: str, tiny_text: str, pictures: Path, tmp_path: Path
) -> None:
    # locked towers are in eval mode: no dropout, whose stream belongs to a rank
    options = {
        "vision": tiny_vision, "text": tiny_text, "policy": "frozen", "projection": "none", "max_steps": 3,
        "shared": "transformer(heads=4,types=true)", "data": pictures / "manifest.jsonl", "batch_size": 6,
        "log_every": 1, "workers": 0, "val_split": "none", "test_split": "none",
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in options.items()]
    assert main(["train", *words, f"--output={tmp_path / '1'}"]) == 0
    torchrun(2, ROOT / "recipes" / "train.py", *words, f"--output={tmp_path / '2'}")
    one, two = (load_file(tmp_path / n / "adapter.safetensors") for n in ("1", "2"))
    assert one.keys() == two.keys() and any(name.startswith("shared.blocks.0.attn") for name in one)
    for name, expected in one.items():
        # a softmax does not see a shift of its keys: the gradient of their bias is rounding, which AdamW makes large
        content = torch.arange(len(expected)) // 32 != 1 if name.endswith("qkv.bias") else ...
        torch.testing.assert_close(two[name][content], expected[content], rtol=0, atol=1e-4)
