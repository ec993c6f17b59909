"""Policies inside torch's own nn.TransformerEncoder, which in eval mode would pack captions and skip its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lilt.policies import check_alive, merge, parse_policy
from lilt.towers import Tower, build_tower
from lilt.towers.meta import without_weights
from tests.policies.conformance import planned, trained, tuned
from tests.towers.families import VOCABULARY, batch, tokens, word_tokenizer

PAD = 1
SPECS = [
    "full", "layernorm", "bitfit", "lora(targets=all)", "lora(targets=q|v,blocks=last:1)",
    "lora(targets=all,dora=true)", "ia3", "adapter", "adapter(place=input)", "adapter(place=parallel)", "deep_adapter",
    "prompt", "prompt(2,deep)",
]  # fmt: skip


class Torch(nn.Module):
    """Somebody's own text encoder of torch's parts, which makes its padding mask from the ids."""

    def __init__(self, pooled: bool):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 48, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.pooled = pooled

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        hidden = self.encoder(self.words(input_ids), src_key_padding_mask=input_ids == PAD)
        return hidden.mean(1) if self.pooled else hidden


def torch_text(pooled: bool = False) -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = build_tower(Torch(pooled).eval(), "text", word_tokenizer())
        for tensor in tower.parameters():
            if tensor.ndim == 1:  # the layers of an nn.TransformerEncoder are copies with biases of zero
                tensor.data.normal_(1.0 if tensor.data.any() else 0.0, 0.3)
    return tower


def shaken(spec: str, pooled: bool = False) -> Tower:
    """Apply a policy and move all that it trains away from where it starts."""
    tower = tuned(spec, torch_text(pooled))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for tensor in trained(tower).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return tower


@contextmanager
def slow() -> Iterator[None]:
    """Keep torch from its fused kernel, whose conditions look at nothing of ours."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_anatomy_is_that_of_the_layers_and_torch_keeps_its_fast_path() -> None:
    tower = torch_text()
    assert tower.anatomy.blocks == ("encoder.layers.0", "encoder.layers.1") and tower.anatomy.token_width == 32
    inside = [(leaf.path.rpartition("layers.1.")[2], leaf.part) for leaf in tower.anatomy.leaves if leaf.block == 1]
    assert inside == [
        ("self_attn", "qkv"), ("self_attn.out_proj", "out"), ("linear1", "in"), ("linear2", "out"), ("norm1", ""),
        ("norm2", ""),
    ]  # fmt: skip
    assert [leaf.path for leaf in tower.anatomy.leaves if leaf.order is None] == [
        f"encoder.layers.{i}.self_attn.out_proj" for i in (0, 1)
    ]
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_it_gives_for_real_tokens_is_what_the_module_gives() -> None:
    module = Torch(pooled=False).eval()
    tower = build_tower(module, "text", word_tokenizer())
    module.encoder.use_nested_tensor = True
    inputs = batch(tower)
    with torch.no_grad():
        packed, real, _ = tower.tokens(inputs)
        assert real is not None and (packed[~real] == 0).all()  # torch has packed them
        module.encoder.use_nested_tensor = False
        torch.testing.assert_close(tower.tokens(inputs).features[real], packed[real])


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_tuned_embeddings_are_the_same_with_gradients_and_without_and_on_the_slow_path(spec: str, pooled: bool) -> None:
    tower = shaken(spec, pooled)
    inputs = batch(tower)
    with_gradients = tower(inputs).detach()
    with torch.no_grad():
        embedded, base = tower(inputs), torch_text(pooled)(inputs)
    with torch.inference_mode():
        torch.testing.assert_close(tower(inputs), with_gradients, rtol=1e-5, atol=1e-5)
    with slow(), torch.no_grad():
        torch.testing.assert_close(tower(inputs), with_gradients, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedded, with_gradients, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(embedded, base, atol=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_all_of_it_lives_and_padding_leaks_nowhere(spec: str) -> None:
    check_alive(tuned(spec, torch_text(), alive=False))
    tower = shaken(spec)
    with torch.no_grad():
        alone = [tower(tokens(tower, caption)) for caption in ("a red boat", "two small dog near the boat")]
        together = tower(tokens(tower, "a red boat", "two small dog near the boat"))
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_it_merges_and_is_disabled_bit_for_bit(spec: str) -> None:
    tower, base = shaken(spec), torch_text()
    inputs = batch(tower)
    with torch.no_grad():
        expected, pure = tower(inputs), base(inputs)
        with merge.disabled(tower, base.body):
            assert torch.equal(tower(inputs), pure)
        parts = parse_policy(spec, "text")
        if all(part.mergeable for part in parts):
            plain = merge.merged(tower, parts)
            torch.testing.assert_close(plain(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_planned_and_run_without_weights(spec: str) -> None:
    tower = without_weights(torch_text())
    inputs = {key: value.to("meta") for key, value in batch(tower).items()}
    assert planned(spec, tower).trained == planned(spec, torch_text()).trained
    with torch.device("meta"):
        tuned(spec, tower, alive=False)
    with torch.no_grad():
        assert tower(inputs).shape == (3, 32)
