"""Where the branches of a block begin and end, in every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilt.policies import check_alive
from lilt.policies.adapter import Bottleneck
from lilt.towers import Tower, build_tower
from tests.policies.conformance import planned, tuned
from tests.towers.families import CONTRACT, Patches, batch, tiny
from tests.towers.private import Bare, Mixer, Wide, seeded


def test_swinv2_norms_after_its_branches_so_the_input_is_that_of_the_attention() -> None:
    paths = [edit.path for edit in planned("adapter(place=input)", tiny("swinv2")).edits]
    assert paths[:2] == ["layers.0.blocks.0.attn", "layers.0.blocks.0.mlp.fc1"]


@pytest.mark.parametrize(
    ("family", "per_block"),
    [("vit", 2), ("swin", 2), ("convnext", 1), ("own_vision", 2), ("open_clip_vision", 2), ("t5", 2), ("gpt2", 2)],
)
@pytest.mark.parametrize("place", ["output", "input"])
def test_every_branch_of_every_block_gets_one(family: str, per_block: int, place: str) -> None:
    tower = tiny(family)
    joint = planned(f"adapter(place={place})", tower)
    assert len(joint.edits) == per_block * len(tower.blocks)


@pytest.mark.parametrize("place", ["output", "input", "parallel"])
@pytest.mark.parametrize(("branches", "only"), [("mlp", ("mlp", "norm2")), ("attention", ("attn", "norm1"))])
def test_one_branch_alone_has_one_adapter_a_block(place: str, branches: str, only: tuple[str, ...]) -> None:
    edits = planned(f"adapter(place={place},branches={branches})", tiny("vit")).edits
    assert len(edits) == 2
    assert all(edit.path.split(".")[2] in only for edit in edits)


def test_a_tower_without_the_branch_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"has no attention branches that end in a linear layer; it has \d+ blocks"):
        planned("adapter(branches=attention)", tiny("convnext"))


class GainNorm(nn.Module):
    """A normalisation over the last axis, or over the first behind the batch, with a gain that says which."""

    def __init__(self, *shape: int):
        super().__init__()
        gain = torch.linspace(0.5, 1.5, 32).view(shape) if shape else torch.tensor(0.7)
        self.weight, self.bias = nn.Parameter(gain), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        axis = 1 if self.weight.ndim == 4 else -1
        return x * torch.rsqrt(x.square().mean(axis, keepdim=True) + 1e-6) * self.weight + self.bias


class ImageNorm(nn.LayerNorm):
    """A LayerNorm of images (B, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Convolved(nn.Module):
    """An MLP of convolutions (B, D, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(32, 48, 1), nn.Conv2d(48, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Turned(Wide):
    """An MLP of linear layers for (B, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Unit(nn.Module):
    """A block; without an attention it works on images."""

    def __init__(self, norm: Callable[[], nn.Module], mlp: Callable[[], nn.Module], mixes: bool):
        super().__init__()
        if mixes:
            self.norm1, self.mix = norm(), Mixer()
        self.norm2, self.ff = norm(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "mix"):
            x = x + self.mix(self.norm1(x), None)
        return x + self.ff(self.norm2(x))


class Units(nn.Module):
    def __init__(self, norm: Any, mlp: Any, mixes: bool):
        super().__init__()
        self.embed = Patches() if mixes else nn.Conv2d(3, 32, 8, 8)
        self.units = nn.ModuleList([Unit(norm, mlp, mixes), Unit(norm, mlp, mixes)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for unit in self.units:
            x = unit(x)
        return x if x.ndim == 3 else x.mean((2, 3))


def units(norm: Callable[[], nn.Module], mlp: Callable[[], nn.Module], mixes: bool = True) -> Tower:
    roles = {"**.ff": "mlp"} | ({"**.mix": "attention"} if mixes else {})
    return build_tower(seeded(Units, norm, mlp, mixes).eval(), "vision", CONTRACT, roles=roles)


def of_tokens() -> nn.Module:
    return GainNorm(1, 1, 32)


def of_one_factor() -> nn.Module:
    return GainNorm()


def of_channels() -> nn.Module:
    return GainNorm(1, 32, 1, 1)


def plain() -> nn.Module:
    return nn.LayerNorm(32)


@pytest.mark.parametrize("norm", [of_tokens, of_one_factor])
@pytest.mark.parametrize("place", ["output", "input", "parallel"])
def test_the_shape_of_a_gain_does_not_hide_the_width(place: str, norm: Callable[[], nn.Module]) -> None:
    spec = f"adapter(place={place})+layernorm"
    edits = planned(spec, units(norm, Wide)).edits
    assert [edit.count for edit in edits if edit.rule == "adapter"] == [2 * 32 * 8 + 8 + 32] * 4
    assert sum(edit.rule == "layernorm" for edit in edits) == 2 * 4
    check_alive(tuned(spec, units(norm, Wide)))


@pytest.mark.parametrize("norm", [of_channels, lambda: ImageNorm(32)], ids=["gain", "layernorm"])
@pytest.mark.parametrize(("place", "bounds"), [("output", "end in a linear"), ("input", "begin with a norm or linear")])
def test_an_mlp_of_convolutions_has_no_last_axis_to_stand_on(norm: Any, place: str, bounds: str) -> None:
    message = rf"adapter: the vision tower 'module:Units' has no mlp branches that {bounds} layer.*mlp \(4 Conv2d\)"
    with pytest.raises(ValueError, match=message):
        planned(f"adapter(place={place},branches=mlp)", units(norm, Convolved, mixes=False))


def test_before_a_norm_of_channels_there_is_no_last_axis_either() -> None:
    with pytest.raises(
        ValueError, match=r"no attention or mlp branches that begin with a norm or linear layer over the"
    ):
        planned("adapter(place=input)", units(of_channels, Turned, mixes=False))
    for place in ("output", "parallel"):
        check_alive(tuned(f"adapter(place={place})", units(of_channels, Turned, mixes=False)))


def test_values_with_their_channels_elsewhere_are_refused_when_they_come() -> None:
    tower = tuned("adapter(place=input)", units(lambda: ImageNormed(32), Turned, mixes=False))
    with pytest.raises(
        ValueError, match=r"adapter of width 32 stands among values of shape \(3, 32, 4, 4\); expected one"
    ):
        tower(batch(tower))


class ImageNormed(ImageNorm):
    """The same under a name that says norm, whose gain does not say of which axis."""


class Across(nn.Module):
    """An MLP of convolutions for tokens (B, L, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(32, 48, 1), nn.Conv1d(48, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.mT))).mT


@pytest.mark.parametrize(
    ("place", "bounds"), [("output", "end in"), ("input", "begin with a norm or"), ("parallel", "begin and end with a")]
)
def test_a_branch_is_not_left_out_without_a_word(place: str, bounds: str) -> None:
    message = rf"no mlp branches that {bounds} .*\(branches=attention does without\); it has .*mlp \(4 Conv1d\)"
    with pytest.raises(ValueError, match=message):
        planned(f"adapter(place={place})", units(plain, Across))
    assert len(planned(f"adapter(place={place},branches=attention)", units(plain, Across)).edits) == 2


@pytest.mark.parametrize("norm", [plain, nn.Identity])
@pytest.mark.parametrize("place", ["output", "input", "parallel"])
def test_one_module_that_is_all_of_a_branch_needs_no_linear_layer(place: str, norm: Callable[[], nn.Module]) -> None:
    spec = f"adapter(place={place})"
    edits = planned(spec, units(norm, Bare)).edits
    assert [edit.count for edit in edits] == [2 * 32 * 8 + 8 + 32] * 4
    tower, base = tuned(spec, units(norm, Bare)), units(norm, Bare)
    check_alive(tower)
    with torch.no_grad():
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
        unit, before = tower.body.units[0], base.body.units[0]
        x = x + unit.mix(unit.norm1(x), None)
        read = before.norm2(x)
        start = {
            "output": lambda a: a(before.ff(read)),
            "input": lambda a: before.ff(before.norm2(a(x))),
            "parallel": lambda a: before.ff(read) + a(read) - read,
        }
        holder = unit.norm2 if place == "input" and norm is plain else unit.ff
        adapter = holder.adapter
        alone = Bottleneck(32, 8)
        alone.load_state_dict(adapter.state_dict())
        torch.testing.assert_close(unit.ff(unit.norm2(x)), start[place](alone), rtol=1e-5, atol=1e-5)


class Summary(nn.Module):
    """A block whose MLP reads all tokens and gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)).mean(1, keepdim=True))


def test_an_adapter_beside_a_branch_that_gives_fewer_tokens_is_refused_when_they_come() -> None:
    body = nn.Sequential(Patches(), nn.Sequential(Summary(), Summary()))
    tower = tuned("adapter(place=parallel)", build_tower(body.eval(), "vision", CONTRACT))
    with pytest.raises(ValueError, match=r"values of shape \(3, 1, 32\) and \(3, 16, 32\); expected one shape with 32"):
        tower(batch(tower))
    check_alive(tuned("adapter", build_tower(nn.Sequential(Patches(), nn.Sequential(Summary())), "vision", CONTRACT)))
