"""Keys and values from one map: pyramid transformers, attention pools, and one key head that many queries share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilt.policies import check_alive, merge, parse_policy
from lilt.policies.edits import Attach
from lilt.policies.liveness import dead_by_nature
from lilt.towers import ImageContract, Tower, build_tower
from tests.policies import factors, updates
from tests.policies.conformance import planned, trained, tuned
from tests.policies.updates import KINDS
from tests.towers.families import CONTRACT, Patches, batch, tiny
from tests.towers.private import Wide


class SharedAttention(nn.Module):
    """Four heads of queries that share one of keys and one of values; x -> x."""

    head_dim = 8

    def __init__(self, keys: str = "kv", shared: int = 16):
        super().__init__()
        self.keys = keys
        self.query, self.proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.add_module(keys, nn.Linear(32, shared))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
        both = getattr(self, self.keys)(x)
        k, v = both.chunk(2, -1) if both.shape[-1] == 16 else (both, both)
        return self.proj(F.scaled_dot_product_attention(q, k[:, None], v[:, None]).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            nn.LayerNorm(32),
            SharedAttention(**options),
            nn.LayerNorm(32),
            Wide(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def shared(**options: Any) -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(Patches(), nn.Sequential(Block(**options), Block(**options)))
        return build_tower(body.eval(), "vision", CONTRACT)


def pyramid() -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
        return build_tower(timm.create_model("pvt_v2_b0", **sizes).eval(), "vision", ImageContract(64))


TOWERS: dict[str, Callable[[], Tower]] = {"pyramid": pyramid, "pool": lambda: tiny("siglip"), "shared": shared}
every_tower = pytest.mark.parametrize("name", TOWERS)


def held(tower: Tower) -> dict[str, Any]:
    """Return the modules that make keys and values, by path."""
    return {leaf.path: leaf.module for leaf in tower.anatomy.leaves if (leaf.role, leaf.part) == ("attention", "kv")}


def test_the_map_is_found_in_blocks_and_in_pools() -> None:
    assert list(held(pyramid())) == [f"stages.{i}.blocks.0.attn.kv" for i in range(4)]
    assert list(held(tiny("siglip"))) == ["attn_pool.kv"]
    assert list(held(shared())) == ["1.0.attn.kv", "1.1.attn.kv"]
    for keys in ("to_kv", "kv_proj", "key_value"):
        assert list(held(shared(keys=keys))) == [f"1.{i}.attn.{keys}" for i in (0, 1)]


@every_tower
@torch.no_grad()
def test_the_slices_are_what_they_are_called(name: str) -> None:
    """A softmax does not see the same shift of all keys, and a shift of the values goes through."""
    for part, same in (("k", True), ("v", False)):
        tower = TOWERS[name]()
        before = tower(batch(tower))
        for edit in planned(f"lora(targets={part})", tower).edits:
            assert isinstance(edit, Attach)
            if edit.path in held(tower):
                child: Any = edit.make()
                shift = torch.randn(child.rows, generator=torch.Generator().manual_seed(2))
                tower.body.get_submodule(edit.path).bias[child.start : child.start + child.rows] += shift
        assert torch.allclose(tower(batch(tower)), before, atol=1e-5) == same


@KINDS
@pytest.mark.parametrize("targets", ["qkv", "v", "k|v"])
@every_tower
def test_lora_is_the_dense_update_and_merges(name: str, targets: str, dora: str) -> None:
    spec = f"lora(r=3,alpha=6,targets={targets},dora={dora})"
    tower, dense, base = updates.alive(spec, TOWERS[name]()), TOWERS[name](), TOWERS[name]()
    children = updates.children(tower)
    images = batch(tower)
    with torch.no_grad():
        for edit in updates.edits_of(tower):
            updates.update(dense, edit, children[edit.path, edit.name], 2.0)
        changed = [n for n, p in dense.body.named_parameters() if not torch.equal(p, base.body.get_parameter(n))]
        assert any(n.endswith(".kv.weight") for n in changed)
        torch.testing.assert_close(tower(images), dense(images), rtol=2e-5, atol=2e-5)
        plain = merge.merged(tower, parse_policy(spec, "vision"))
        torch.testing.assert_close(plain(images), dense(images), rtol=2e-5, atol=2e-5)


def test_a_fused_kv_has_one_a_and_its_slices_one_each() -> None:
    counts = {"qkv": [2 * 64, 2 * (32 + 16)], "k|v": [2 * (32 + 8)] * 2, "q|v": [2 * 64, 2 * (32 + 8)]}
    for targets, expected in counts.items():
        assert [e.count for e in planned(f"lora(r=2,targets={targets},blocks=0)", shared()).edits] == expected


@every_tower
def test_ia3_multiplies_keys_values_and_their_biases(name: str) -> None:
    tower, dense = factors.alive("ia3", TOWERS[name]()), TOWERS[name]()
    gains = factors.gains(tower)
    assert {path for path, _ in gains} >= set(held(tower)) != set()
    images = batch(tower)
    with torch.no_grad():
        for (path, tensor), child in gains.items():
            module: Any = dense.body.get_submodule(path)
            weight = getattr(module, tensor)
            before, rows, after = child.pad[0], len(child.l), child.pad[1]
            if child.axis:
                weight.mul_(child.l)
                continue
            assert before + rows + after == len(weight)
            weight[before : before + rows] *= child.l[:, None]
            module.bias[before : before + rows] *= child.l
            if path in held(tower):
                assert rows == len(weight)
        torch.testing.assert_close(tower(images), dense(images), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("spec", ["lora", "lora(targets=k|v)", "ia3", "bitfit", "attention", "adapter(place=parallel)"])
@every_tower
def test_it_lives(name: str, spec: str) -> None:
    tower = tuned(spec, TOWERS[name](), alive=False)
    check_alive(tower)
    if spec == "bitfit":
        assert {f"{path}.bias" for path in held(tower)} <= set(trained(tower))
        assert not {f"{path}.bias" for path in held(tower)} & dead_by_nature(tower)  # half of it is the values'


@pytest.mark.parametrize("options", [{"keys": "key_value"}, {"shared": 8}], ids=["head by head", "keys are values"])
def test_a_layout_that_is_not_known_is_refused_in_slices_and_taken_whole(options: dict[str, Any]) -> None:
    tower = shared(**options)
    with pytest.raises(ValueError, match=r"holds k and v in one weight of \d+ rows that are not a half each .*=qkv"):
        planned("lora(targets=v)", tower)
    check_alive(tuned("lora", shared(**options), alive=False))
    check_alive(tuned("ia3", shared(**options), alive=False))
