"""Prompt tokens: what a tower computes with them, who reads them, and which towers have no room."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lilt.policies import parse_policy
from lilt.towers import Tower
from tests.policies.conformance import planned, run_backward, trained, tuned
from tests.towers.families import (
    CAPTIONS,
    batch,
    tiny,
    tokens,
)

N = 3
FAR = torch.finfo(torch.float32).min


def prompted(family: str, deep: bool = False) -> tuple[Tower, Any, list[Tensor], Any]:
    """Return a tower with prompts, the plain network, the prompts of each block as (B, N, D), and a batch."""
    tower = tuned(f"prompt({N},{'deep' if deep else 'shallow'})", tiny(family))
    found = [p.unsqueeze(0).expand(3, -1, -1) for p in trained(tower).values()]
    return tower, tiny(family).body, found, batch(tower)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def through(blocks: Any, x: Tensor, prompts: list[Tensor], at: int, **more: Any) -> Tensor:
    """Run blocks one by one by hand: one set of prompts stays in, several take turns; they are gone at the end."""
    for i, block in enumerate(blocks):
        if i == 0 or len(prompts) > 1:
            rest = x[:, at:] if i == 0 else x[:, at + N :]
            x = torch.cat([x[:, :at], prompts[i], rest], dim=1)
        out = block(x, **more)
        x = out if isinstance(out, Tensor) else out[0]
    return torch.cat([x[:, :at], x[:, at + N :]], dim=1)


@pytest.mark.parametrize("deep", [False, True])
def test_a_plain_vit_is_that_of_the_paper(deep: bool) -> None:
    tower, plain, prompts, images = prompted("vit", deep)
    x = plain._pos_embed(plain.patch_embed(images))
    same(tower(images), plain.norm(through(plain.blocks, x, prompts, 1))[:, 0])


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_stand_behind_class_and_registers_and_leave_the_tokens_as_many(deep: bool) -> None:
    tower, plain, prompts, images = prompted("dinov2", deep)
    x = plain._pos_embed(plain.patch_embed(images))
    found = tower.tokens(images)
    assert found.prefix == 5
    same(found.features, plain.norm(through(plain.blocks, x, prompts, 5)))


@pytest.mark.parametrize("family", ["eva02", "dinov3"])
def test_a_rotary_tower_does_not_rotate_them(family: str) -> None:
    tower, plain, prompts, images = prompted(family)
    x, rope = plain._pos_embed(plain.patch_embed(images))[:2]
    for block in plain.blocks:
        block.attn.num_prefix_tokens += N  # the library's own way for tokens without a place
    prefix = tower.tokens(images).prefix
    same(tower.run(images), plain.norm(through(plain.blocks, x, prompts, prefix, rope=rope)))


@pytest.mark.parametrize("deep", [False, True])
def test_bert_reads_them_in_front_of_the_caption_and_no_padding(deep: bool) -> None:
    tower, plain, prompts, captions = prompted("bert", deep)
    mask = captions.pop("attention_mask")
    keep = torch.cat([torch.ones(3, N), mask], dim=1).bool()
    x = plain.embeddings(**captions)
    expected = through(plain.encoder.layer, x, prompts, 0, attention_mask=keep[:, None, None, :])
    same(tower(captions | {"attention_mask": mask}), expected[:, 0])


@pytest.mark.parametrize("deep", [False, True])
def test_in_a_causal_tower_they_come_first(deep: bool) -> None:
    tower, plain, prompts, captions = prompted("gpt2", deep)
    mask = captions["attention_mask"]
    length = mask.shape[1] + N
    keep = torch.cat([torch.ones(3, N), mask], dim=1).bool()[:, None, None, :]
    causal = torch.zeros(3, 1, length, length).masked_fill(~(keep & torch.ones(length, length).tril().bool()), FAR)
    x = plain.wte(captions["input_ids"]) + plain.wpe(torch.arange(mask.shape[1]))
    hidden = plain.ln_f(through(plain.h, x, prompts, 0, attention_mask=causal))
    same(tower(captions), hidden[torch.arange(3), mask.sum(1) - 1])


@pytest.mark.parametrize(("family", "positions"), [("t5", False), ("llama", True)])
def test_a_tower_without_absolute_positions_takes_them_as_it_takes_embeddings(family: str, positions: bool) -> None:
    tower, plain, (prompts,), captions = prompted(family)
    embedded = plain.get_input_embeddings()(captions["input_ids"])
    mask = torch.cat([torch.ones(3, N, dtype=torch.long), captions["attention_mask"]], dim=1)
    # where the first caption token stands nothing is rotated
    places = {"position_ids": torch.cat([torch.zeros(N), torch.arange(embedded.shape[1])]).long()[None]}
    inputs = torch.cat([prompts, embedded], dim=1)
    expected = plain(inputs_embeds=inputs, attention_mask=mask, **(places if positions else {})).last_hidden_state
    real = captions["attention_mask"].bool()
    same(tower.tokens(captions).features[real], expected[:, N:][real])


@pytest.mark.parametrize("deep", [False, True])
def test_the_stored_mask_of_open_clip_grows(deep: bool) -> None:
    tower, plain, prompts, captions = prompted("open_clip_text", deep)
    x = plain.token_embedding(captions["input_ids"]) + plain.positional_embedding
    causal = torch.full((16 + N, 16 + N), float("-inf")).triu(1)
    hidden = plain.ln_final(through(plain.transformer.resblocks, x, prompts, 0, attn_mask=causal))
    last = captions["input_ids"].argmax(-1)
    same(tower(captions), hidden[torch.arange(3), last] @ plain.text_projection)


@pytest.mark.parametrize(("spec", "count"), [("prompt", 8 * 32), ("prompt(3)", 3 * 32), ("prompt(3,deep)", 2 * 3 * 32)])
@pytest.mark.parametrize("family", ["vit", "bert"])
def test_the_count_is_n_d_or_n_d_times_the_blocks(spec: str, count: int, family: str) -> None:
    assert planned(spec, tiny(family)).trained == count


@pytest.mark.parametrize("spec", ["prompt(3)", "prompt(3,deep)"])
@pytest.mark.parametrize("family", ["vit", "own_vision", "t5", "open_clip_text"])
def test_every_prompt_of_every_block_gets_a_gradient(spec: str, family: str) -> None:
    tower = tuned(spec, tiny(family))
    run_backward(tower)
    for tensor in trained(tower).values():
        assert tensor.grad is not None and (tensor.grad.abs().amax(1) > 1e-7).all()


@pytest.mark.parametrize("spec", ["prompt(3)", "prompt(3,deep)"])
@pytest.mark.parametrize(
    "family", ["vit", "eva02", "own_vision", "bert", "mpnet", "t5", "gpt2", "open_clip_text", "own_text"]
)
def test_switched_off_it_is_the_base_bit_for_bit(spec: str, family: str) -> None:
    tower, base = tuned(spec, tiny(family)), tuned("frozen", tiny(family))
    inputs = batch(tower)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # torch leaves it wherever a hook hangs, idle or not
        with torch.no_grad():
            assert not torch.allclose(tower(inputs), base(inputs), rtol=0, atol=1e-5)
            for edit in set((tower.fates or {}).values()):
                edit.switch(tower.body, on=False)
            assert torch.equal(tower(inputs), base(inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.parametrize("depth", ["shallow", "deep"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "own_text"])
def test_a_layer_on_top_reads_prompts_and_no_padding_in_either_order(depth: str, family: str) -> None:
    outputs = []
    for spec in (f"prompt(3,{depth})+deep_adapter", f"deep_adapter+prompt(3,{depth})"):
        tower = tuned(spec, tiny(family))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            for _, tensor in sorted(trained(tower).items()):
                nn.init.normal_(tensor, std=0.1)
        for pool in ("own", "mean"):
            tower.pool = "token" if pool == "own" and family == "gpt2" else pool.replace("own", "cls")
            alone = [tower(tokens(tower, caption)) for caption in CAPTIONS]
            torch.testing.assert_close(tower(batch(tower)), torch.cat(alone), rtol=0, atol=1e-5)
        outputs.append(tower(batch(tower)))
    same(outputs[0], outputs[1])


def test_it_does_not_start_as_the_base_and_has_no_part_way_back() -> None:
    (policy,) = parse_policy("prompt", "text")
    assert not policy.identity_at_start and not policy.mergeable
    tower = tuned("prompt", tiny("bert"))
    (edit,) = set((tower.fates or {}).values())
    edit.check_scalable(1.0)
    with pytest.raises(ValueError, match=r"prompt: scale=0\.5; .*; expected scale=1; leave the scale out"):
        edit.check_scalable(0.5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prompt(0)", "n=0; expected at least 1 token"),
        ("prompt(depth=deeep)", r"unknown depth 'deeep'; known: shallow, deep\. Did you mean 'deep'\?"),
    ],
)
def test_options_are_checked(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy(spec, "vision")
