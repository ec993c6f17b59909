"""FLOPs and saved bytes of a step: hand formulas, torch's own counter, and a real step."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lilt.budgets import meta_batch, step_cost
from lilt.budgets.cost import fused_kernels
from lilt.budgets.counter import Counter
from lilt.model import Scale, TwoTower, build_projection
from lilt.policies import apply, parse_policy, plan
from lilt.towers import ImageContract, build_tower
from tests.budgets.pairs import cost, family, heads, product, reader, saved_on_cpu, tuned
from tests.towers.families import TEXT, VISION, tiny
from tests.towers.test_meta import ROTARY, ROTATES

B = 3
ATEN = torch.ops.aten
ON_CPU = {
    ATEN._scaled_dot_product_flash_attention: ATEN._scaled_dot_product_flash_attention_for_cpu,
    ATEN._scaled_dot_product_flash_attention_backward: ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
}


def test_a_stack_of_linear_layers_costs_what_the_formula_says() -> None:
    vision, text = family("own_mlp"), reader()  # Linear 192 -> 48, GELU, Linear 48 -> 32
    first, second = product(B, 192, 48), product(B, 48, 32)
    frozen = first + second + heads(vision, text, B)
    assert cost(vision, text, "frozen").flops == frozen
    # the picture needs no gradient, what lies between the layers does
    whole = 2 * first + 3 * second + heads(vision, text, B, (True, False))
    assert cost(vision, text, "full").flops == whole
    # a bias needs the gradient of its layer's output, and no product of its own
    assert cost(vision, text, "bitfit").flops == first + 2 * second + heads(vision, text, B, (True, False))
    # a text tower without products costs its head's gradient
    assert cost(vision, text, "full", "full").flops == whole + product(B, 6, 16)


def vit_costs() -> tuple[int, int, int]:
    """Width 32, depth 2, 17 tokens: forward of a block's products, of its attention, and of the patches."""
    rows, width = B * 17, 32
    return 12 * product(rows, width, width), 2 * product(rows, width, 17), product(B * 16, 3 * 64, width)


def test_backward_runs_to_the_shallowest_trained_tensor() -> None:
    vision, text = family("vit"), reader()
    maps, attention, patches = vit_costs()
    forward = 2 * (maps + attention) + patches
    through = maps + attention * 5 // 2  # a fused kernel computes the scores again
    tuned_heads = heads(vision, text, B, (True, False))
    assert cost(vision, text, "frozen").flops == forward + heads(vision, text, B)
    last, first = cost(vision, text, "layernorm(blocks=-1)"), cost(vision, text, "layernorm(blocks=0)")
    assert last.flops == forward + through + tuned_heads
    assert first.flops == forward + 2 * through + tuned_heads
    assert cost(vision, text, "full").flops == forward + 2 * (through + maps) + patches + tuned_heads
    assert last.saved_bytes < first.saved_bytes < cost(vision, text, "full").saved_bytes


def test_an_adapter_costs_its_products_three_times() -> None:
    vision, text = family("vit"), reader()
    one = product(B * 17, 32, 8)
    without = cost(vision, text, "layernorm(blocks=-1)").flops
    # two in the last block, on the outputs of its branches: down and up, forward, dW and dX. Backward ends at the first
    # one's down, whose input needs no gradient, so qkv, attention and its output map are left out
    attention_branch = 4 * product(B * 17, 32, 32) + vit_costs()[1] * 5 // 2
    found = cost(vision, text, "adapter(reduction=4,blocks=-1)").flops
    assert found == without - attention_branch + 2 * 6 * one - one


def test_a_parametrized_weight_pays_for_its_full_gradient_and_a_side_branch_does_not() -> None:
    text = reader()
    rank_one = {}
    for name in ("vit", "own_vision"):  # the qkv of timm is called, torch's in_proj is read functionally
        tower = family(name)
        rank_one[name] = cost(tower, text, "lora(r=1)").flops - cost(tower, text, "layernorm").flops
    full_size = 2 * product(B * 17, 32, 3 * 32)  # dW of both blocks
    assert rank_one["vit"] < full_size / 4
    assert rank_one["own_vision"] >= 2 * product(B * 16, 32, 3 * 32)


def by_torch(core: TwoTower, images: torch.Tensor, tokens: dict[str, torch.Tensor]) -> int:
    core.train()
    more: dict[Any, Any] = {}
    for kernel, on_cpu in ON_CPU.items():
        if on_cpu not in flop_registry:  # torch 2.9; the formula is that of any other kernel
            more[on_cpu] = functools.partial(flop_registry[kernel])
            more[on_cpu]._get_raw = True
    with fused_kernels(), FlopCounterMode(display=False, custom_mapping=more) as counter:
        out = core(images, tokens)
        logits = out.scale * out.image @ out.text.T
        rows = torch.arange(len(logits), device="meta")
        (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [*VISION, *TEXT])
def test_the_counter_agrees_with_torchs_own(name: str) -> None:
    if name in ROTARY and not ROTATES:
        pytest.skip("this transformers asks for autocast on meta")
    vision, text = (family(name), family("bert")) if name in VISION else (family("vit"), family(name))
    batch = meta_batch(vision, text, B, 6)
    counter = Counter()
    # torch counts the weight gradient of a convolution in groups as if it were in one; below is one done by hand
    choices = [
        ("layernorm" if name == "convnext" else "full", "full"),
        ("layernorm", "frozen"),
        ("frozen", "layernorm"),
    ]
    for policies in choices:
        try:
            core, again = (tuned(vision, text, *policies) for _ in range(2))
        except ValueError:
            continue  # no norms
        expected = by_torch(core, *batch)
        fresh = step_cost(again, *batch)
        # shapes known from other policies and from an earlier step change nothing
        assert step_cost(tuned(vision, text, *policies), *batch, counter=counter) == fresh
        assert fresh.flops == expected > 0


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, False), (8, False), (1, True), (4, True)])
def test_a_convolution_costs_as_much_for_each_gradient_as_forward(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    first, second = nn.Conv2d(3, 8, 1), kind(8, 16, 3, padding=1, groups=groups)
    vision, text = build_tower(nn.Sequential(first, second, nn.Flatten()), "vision", ImageContract(8)), reader()
    one, two = product(B * 64, 3, 8), product(B * 64, 8 * 9 // groups, 16)
    forward = one + two + heads(vision, text, B)
    assert cost(vision, text, "frozen").flops == forward
    # the picture needs no gradient
    assert cost(vision, text, "full").flops == forward + one + 2 * two + product(B, vision.dim, 16)


def test_saved_bytes_are_those_of_a_hand_count() -> None:
    vision, text = family("own_mlp"), reader()
    base = cost(vision, text, "frozen").saved_bytes
    # full: what each layer and the GELU between them read; the output is kept by the head already
    assert cost(vision, text, "full").saved_bytes - base == 4 * B * (192 + 48 + 48)
    # biases: GELU's input alone
    assert cost(vision, text, "bitfit").saved_bytes - base == 4 * B * 48
    assert cost(vision, text, "full", pairs=2 * B).saved_bytes > 1.9 * cost(vision, text, "full").saved_bytes


@pytest.mark.parametrize("policy", ["frozen", "layernorm", "lora", "adapter", "full", "layernorm(blocks=-1)"])
def test_saved_bytes_are_those_of_a_real_step(policy: str) -> None:
    vision, text = tiny("vit"), reader()
    images, tokens = meta_batch(vision, text, B, 5)
    predicted = step_cost(tuned(vision, text, policy, "layernorm"), images, tokens).saved_bytes
    towers = copy.deepcopy(vision), reader()
    for tower, spec in zip(towers, (policy, "layernorm"), strict=True):
        apply(plan(parse_policy(spec, tower.side), tower), tower)
    core = TwoTower(*towers, build_projection("linear(dim=16)", vision.dim, text.dim), Scale())
    real = {key: torch.ones(value.shape, dtype=torch.long) for key, value in tokens.items()}
    assert predicted == saved_on_cpu(core, torch.randn(images.shape), real)


def test_attention_keeps_no_weights_and_dropout_one_byte_a_value() -> None:
    layer = nn.Sequential(nn.Flatten(), nn.Linear(192, 48), nn.Dropout(0.5), nn.Linear(48, 32))
    vision = build_tower(layer, "vision", ImageContract(8))
    text = reader()
    saved = cost(vision, text, "full").saved_bytes - cost(vision, text, "frozen").saved_bytes
    assert saved == 4 * B * (192 + 48) + B * 48
    # the longer a sequence, the more a kept (L, L) would weigh; here bytes grow with the tokens alone
    vit, bert = family("vit"), family("bert")
    core = tuned(vit, bert, "frozen", "full")
    images, _ = meta_batch(vit, bert, B, 1)
    sizes = []
    for length in (5, 10, 20):
        tokens = meta_batch(vit, bert, B, length)[1]
        sizes.append(step_cost(core, images, tokens).saved_bytes)
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


def test_the_kernels_are_put_back() -> None:
    before = F.scaled_dot_product_attention, F.dropout
    with pytest.raises(RuntimeError, match="stop"), fused_kernels():
        raise RuntimeError("stop")
    assert (F.scaled_dot_product_attention, F.dropout) == before
    q = torch.randn(1, 2, 3, 4)
    with fused_kernels():
        found = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        dropped = F.dropout(torch.ones(1000), 0.5)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert set(dropped.tolist()) == {0.0, 2.0}
