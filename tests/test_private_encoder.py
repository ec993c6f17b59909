"""Encoders that no library knows: policies live on them, the role map in the checkpoint, the shipped example."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lilt
from lilt import DualEncoder
from lilt.cli import main
from lilt.policies.liveness import check_alive, dead_by_nature
from lilt.towers import ImageContract, Tower, build_tower
from tests.policies.conformance import planned, run_backward, trained, tuned
from tests.towers import private as hand
from tests.towers.families import CONTRACT, batch, open_clip_arch, word_tokenizer
from tests.towers.private import ROLES, WIDTH, Bare, Eye, Reader, private, seeded

RECIPES = Path(__file__).parent.parent / "recipes"
TOWERS: dict[str, Callable[[], Tower]] = {
    "eye": lambda: private(Eye, ROLES),
    "bare": lambda: private(Eye, ROLES | {"**.ff": "mlp"}, Bare),
    "reader": lambda: private(Reader, ROLES, side="text"),
}
LIVE = (
    "layernorm", "lora(r=2)", "lora(targets=q|out)", "attention", "mlp", "adapter", "adapter(place=input)",
    "deep_adapter", "lilt", "layernorm(blocks=last:1)", "last(1)",
)  # fmt: skip


@pytest.mark.parametrize("make", TOWERS)
@pytest.mark.parametrize("spec", LIVE)
def test_policies_are_live_on_what_the_map_names(spec: str, make: str) -> None:
    tower = TOWERS[make]()
    inputs = batch(tower)
    with torch.no_grad():
        base = tower(inputs)
        torch.testing.assert_close(tuned(spec, TOWERS[make](), alive=False)(inputs), base, rtol=0, atol=1e-6)
    tower = tuned(spec, tower)
    check_alive(tower)
    before = {name: tensor.clone() for name, tensor in tower.body.named_parameters()}
    run_backward(tower)
    dead = {n for n, p in trained(tower).items() if p.grad is None or p.grad.abs().max() <= 1e-7}
    assert trained(tower) and dead <= dead_by_nature(tower)
    torch.optim.SGD(tower.parameters(), lr=0.1).step()
    moved = {name for name, tensor in tower.body.named_parameters() if not torch.equal(tensor, before[name])}
    assert set(trained(tower)) - dead <= moved <= set(trained(tower))
    with torch.no_grad():
        assert not torch.allclose(tower(inputs), base)


INPUTS: dict[str, Any] = {"preprocess": CONTRACT, "tokenizer": word_tokenizer()}
EXAMPLES: dict[str, Any] = {"images": torch.randn(3, 3, 32, 32), "texts": ["a red boat", "two small dog"]}


def modules() -> dict[str, Any]:
    return {"vision": seeded(Eye), "text": seeded(Reader)} | INPUTS


def shaken(model: DualEncoder) -> DualEncoder:
    """A model whose trained tensors are no longer those of step 0."""
    with torch.no_grad():
        for parameter in model.core.trained().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def same(one: DualEncoder, other: DualEncoder) -> None:
    """Check that two models embed alike."""
    for side, rows in one.embed(**EXAMPLES).items():
        assert torch.equal(rows, other.embed(**EXAMPLES)[side])


@pytest.mark.parametrize("policy", ["layernorm", "lora(r=2)", "adapter(place=input)+layernorm", "deep_adapter"])
def test_a_checkpoint_carries_its_maps(policy: str, tmp_path: Path) -> None:
    model = shaken(DualEncoder.build(**modules(), policy=policy, vision_roles=ROLES, text_roles=ROLES))
    folder = model.save(tmp_path / "x")
    settings = json.loads((folder / "lilt.json").read_text())["model"]
    assert list(settings["vision_roles"].items()) == list(ROLES.items()) and settings["text_roles"] == ROLES
    again = lilt.load(folder, **modules())
    same(model, again)
    assert again.config == model.config
    assert {row.name for row in again.report() if row.trained} == {row.name for row in model.report() if row.trained}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"last": "other"}, r"has surplus 1 tensors \(first: 'vision.body.last.gain'\)"),
        ({"embed": "norm"}, r"misses 2 tensors \(first: 'vision.body.embed.project.bias'\)"),
    ],
)
def test_a_checkpoint_refuses_a_map_that_trains_other_tensors(
    other: dict[str, str], message: str, tmp_path: Path
) -> None:
    folder = DualEncoder.build(**modules(), vision_roles=ROLES, text_roles=ROLES).save(tmp_path / "x")
    with pytest.raises(
        ValueError, match=rf"x {message}; the model was built with another policy, projection or role map"
    ):
        lilt.load(folder, **modules(), vision_roles=ROLES | other)


def specs(tiny_vision: str, tiny_text: str) -> dict[str, tuple[str, str, str]]:
    """Return for each source a spec, the side, and a line that names one norm of 32 values and a bias."""
    clip = f"open_clip:{open_clip_arch()}?pretrained=false&"
    return {
        "timm": (f"{tiny_vision}?", "vision", "blocks.1.norm2"),
        "demo": ("demo?", "vision", "blocks.1.norm2"),
        "hf": (f"{tiny_text}?", "text", "encoder.layer.1.output.LayerNorm"),
        "open_clip_vision": (clip, "vision", "**.resblocks.1.ln_2"),
        "open_clip_text": (clip, "text", "**.resblocks.1.ln_2"),
        "py": ("py:tests.towers.private:eye?", "vision", "stage_a.r1"),
        "py_text": ("py:tests.towers.private:reader?", "text", "stage_a.r1"),
    }


def write(folder: Path, roles: Any) -> Path:
    """Write a role map as a file."""
    file = folder / "roles.json"
    file.write_text(json.dumps(roles), encoding="utf-8")
    return file


@pytest.mark.parametrize("source", specs("", ""))
def test_a_file_of_roles_works_for_every_source(source: str, tiny_vision: str, tiny_text: str, tmp_path: Path) -> None:
    spec, side, line = specs(tiny_vision, tiny_text)[source]
    roles = {"last": "norm", line: "norm"} if source.startswith("py") else {line: "other"}
    tower = build_tower(f"{spec}roles={write(tmp_path, roles)}", side)
    assert tower.roles == roles and tower.spec.startswith(spec)
    if source.startswith("py"):
        assert planned("layernorm", tower).trained == 2 * WIDTH  # the file counts before what the function returns
    else:
        norm = sum(p.numel() for p in tower.body.get_submodule(line.replace("**", "transformer")).parameters())
        plain = build_tower(spec.rstrip("?"), side)
        assert norm > 0 and planned("layernorm", plain).trained - planned("layernorm", tower).trained == norm


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"roles=.*roles.json: no such file; expected a JSON object \{path pattern: role\}; check the path"),
        ("{", r"roles=.*roles.json is not JSON: .*; expected \{path pattern: role\}; mend the file"),
        ("[1]", r"roles=.*roles.json: got list; expected a mapping"),
        ('{"last": "nrom"}', r"roles=.*roles.json: unknown role 'nrom' for 'last'; known: .* Did you mean 'norm'\?"),
        ('{"lsat": "norm"}', r"roles of the vision tower 'py:.*': 'lsat' names no .* Did you mean 'last'\?"),
    ],
)
def test_a_file_that_is_no_role_map_is_explained(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "roles.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        build_tower(f"py:tests.towers.private:eye?roles={file}", "vision")


def test_a_factory_may_return_its_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = {"vision": "py:tests.towers.private:eye", "text": "py:tests.towers.private:reader"}
    model = shaken(DualEncoder.build(**towers, text_roles=ROLES))
    assert model.core.vision.roles == ROLES and model.config.vision_roles is None
    folder = model.save(tmp_path / "x")
    same(model, lilt.load(folder))
    # the map of the checkpoint counts, whatever the function says by then
    monkeypatch.setattr(hand, "eye", lambda: (seeded(Eye), CONTRACT, {"last": "norm"}))
    same(model, lilt.load(folder))
    assert planned("layernorm", build_tower(towers["vision"], "vision")).trained == WIDTH
    for made in ((seeded(Eye), CONTRACT, ["last"]), (seeded(Eye), CONTRACT, ROLES, 4)):
        monkeypatch.setattr(hand, "eye", lambda made=made: made)
        with pytest.raises(
            ValueError, match=r"returned Eye, ImageContract, .*; expected .*\{path pattern: role\}\); ch"
        ):
            build_tower(towers["vision"], "vision")


def train(folder: Path, pictures: Path, tiny_text: str, *more: str) -> int:
    small = ["--max_steps=2", "--batch_size=4", "--workers=0", "--projection=linear(dim=16)", "--text", tiny_text]
    data = ["--data", str(pictures / "manifest.jsonl"), "--output", str(folder / "run")]
    return main(["train", *small, *data, *more])


def test_a_run_outlives_the_file_of_its_roles(pictures: Path, tiny_text: str, tmp_path: Path, capsys: Any) -> None:
    file = write(tmp_path, {"last": "norm"})
    tower = f"--vision=py:tests.towers.private:eye?roles={file}"
    assert train(tmp_path, pictures, tiny_text, tower) == 0
    assert json.loads((tmp_path / "run" / "lilt.json").read_text())["model"]["vision_roles"] == {"last": "norm"}
    file.unlink()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--workers=0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 6
    assert train(tmp_path, pictures, tiny_text, tower, "--overwrite") == 2
    assert "roles.json: no such file" in " ".join(capsys.readouterr().err.split())


def test_a_recipe_may_hold_the_map(pictures: Path, tiny_text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    roles = {"stage_*": "block", "*.r1": "norm"}
    settings = {"vision": "py:tests.towers.private:eye", "vision_roles": roles, "vision_policy": "layernorm(blocks=0)"}
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert train(tmp_path, pictures, tiny_text, "--config", str(recipe)) == 0
    names = json.loads((tmp_path / "run" / "lilt.json").read_text())["tensors"]
    assert [name for name in names if name.startswith("vision")] == ["vision.body.stage_a.r1.gain"]
    # and the run goes on from its own settings
    assert main(["train", "--config", str(tmp_path / "run" / "config.yaml"), "--resume"]) == 0


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPES))
    import private_encoder

    return private_encoder


def test_the_example_is_the_demos_tower_written_by_hand(example: Any) -> None:
    ours, theirs = build_tower("py:private_encoder:eye", "vision").eval(), build_tower("demo", "vision").eval()
    images = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert isinstance(theirs.contract, ImageContract)
    lists = {"mean": tuple(theirs.contract.mean), "std": tuple(theirs.contract.std)}  # timm's are lists
    assert ours.contract == replace(theirs.contract, **lists)  # type: ignore[arg-type]
    for policy in ("layernorm", "lora", "adapter", "deep_adapter", "attention", "mlp", "last(1)"):
        assert planned(policy, ours).trained == planned(policy, theirs).trained


@pytest.mark.parametrize("policy", ["layernorm", "lora(r=2)"])
def test_the_example_runs_two_steps(example: Any, policy: str, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    data = ["--data", str(pictures / "manifest.jsonl"), "--max_steps=2", "--batch_size=4", "--workers=0"]
    assert example.main(data, policy, str(tmp_path / "run")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "without a role map: " in said and "Where the guess is wrong, say what is what" in said
    assert said.count("what is trained") == 2 and "mean recall" in said
    tower = lilt.load(tmp_path / "run").core.vision
    assert tower.roles == example.ROLES and len(tower.blocks) == 4


def test_the_example_opens_with_its_command() -> None:
    assert "python recipes/private_encoder.py" in (RECIPES / "private_encoder.py").read_text()
