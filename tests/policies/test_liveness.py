"""Dead policies are refused by name, live ones pass on every family, and the check leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lilt import DualEncoder, ImageContract
from lilt.policies import Plan, apply, check_alive
from lilt.policies.edits import Open
from lilt.policies.liveness import dead_by_nature, find_dead, read_gradients
from lilt.towers import Tower, build_tower
from tests.policies.conformance import TRAINING, planned, run_backward, trained
from tests.towers.families import CONTRACT, FAMILIES, SWIN, VIT, batch, hf_text, tiny, word_tokenizer
from tests.towers.private import LISTED, Listed, Mixer, private, seeded


def with_policy(spec: str, tower: Tower) -> Tower:
    """Apply a policy as a run does, its zeros at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        apply(planned(spec, tower), tower)
    return tower


def own(body: nn.Module, contract: ImageContract = CONTRACT) -> Tower:
    """Wrap a module and train all there is in it, whether anybody reads it or not."""
    tower = build_tower(body, "vision", contract)
    opened = (Open(name, p.numel(), "by_hand", "everything", 1e-3) for name, p in body.named_parameters())
    apply(Plan(tuple(opened)), tower)
    return tower


@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_lives_on_every_family(family: str) -> None:
    specs = [spec for spec, other in TRAINING if other == family]
    assert "full" in specs
    found = {spec: find_dead(with_policy(spec, tiny(family))) for spec in specs}
    assert {spec: names for spec, names in found.items() if names} == {}
    # as its library initialises it, with zero gains
    assert find_dead(with_policy("full", FAMILIES[family]())) == []


@pytest.mark.parametrize("spec", ["lora(targets=all)", "adapter", "ia3", "mlp"])
def test_zeros_that_hide_everything_behind_them_are_seen_through(spec: str) -> None:
    tower = with_policy(spec, FAMILIES["swinv2"]())
    run_backward(tower.eval())
    hidden = read_gradients(trained_parameters(tower)).zero
    assert any(name.startswith("layers.0") for name in hidden)  # behind residual norms of zero
    check_alive(tower)


def trained_parameters(tower: Tower) -> dict[str, nn.Parameter]:
    return {name: p for name, p in tower.body.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["eva02", "beit", "swinv2", "dinov3"])
def test_module_replacing_lora_is_refused_where_the_weight_is_read_functionally(family: str) -> None:
    tower = tiny(family)
    tower.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv", "proj"], r=2), tower.body)
    live, dead = ([n for n in trained(tower) if part in n] for part in (".attn.proj.lora", ".qkv.lora"))
    assert live and dead
    assert find_dead(tower) == dead
    path = dead[0].partition(".lora")[0]
    message = (
        rf"no policy trains {dead[0]}, .*the vision tower .* does not move .*forward of {path} \(Linear\) is never"
    )
    with pytest.raises(ValueError, match=message):
        check_alive(tower)


class Idle(nn.Module):
    """Four linear maps of which the output reads the first, and the second only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.practice, self.spare = (nn.Linear(3, 6) for _ in range(3))
        self.gain = nn.Parameter(torch.zeros(6))

    def forward(self, images: Tensor) -> Tensor:
        x = images.mean((2, 3))
        return self.read(x) * self.gain + (self.practice(x) if self.training else 0)


def test_what_the_output_never_reads_is_refused_by_name_rule_and_reason() -> None:
    tower = own(Idle())
    dead = ["practice.weight", "practice.bias", "spare.weight", "spare.bias"]
    assert find_dead(tower) == dead
    message = (
        r"^by_hand \(everything\) trains practice.weight, practice.bias, spare.weight, spare.bias, and the output of "
        r"the vision tower 'module:Idle' does not move when they change: the forward of practice \(Linear\) is never "
        r"called\. Expected every trained tensor to matter; choose a policy, roles or blocks without them, or a pool"
    )
    with pytest.raises(ValueError, match=message):
        check_alive(tower)


class WeightOnly(nn.Linear):
    """A map that is called and does not read its bias."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight)


def test_an_unread_tensor_of_a_module_that_is_called_is_refused_too() -> None:
    body = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), WeightOnly(48, 6))
    message = r"by_hand \(everything\) trains 2.bias, .*: in eval mode, with pool=own, nothing depends on 2.bias. Exp"
    with pytest.raises(ValueError, match=message):
        check_alive(own(body))


def test_many_names_are_cut_short() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(3, 6)
            self.spare = nn.ParameterList(torch.ones(1) for _ in range(9))

        def forward(self, images: Tensor) -> Tensor:
            return self.used(images.mean((2, 3)))

    with pytest.raises(ValueError, match=r"spare.0, .*spare.5 and 3 more, and the output"):
        check_alive(own(Many()))


class Asleep(nn.Module):
    """A branch behind a ReLU that never fires: no gradient reaches it, and yet it can wake."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.direct = nn.Linear(48, 6), nn.Linear(48, 6)
        self.branch.bias.data.fill_(-9.0)

    def forward(self, images: Tensor) -> Tensor:
        x = images[:, :, ::8, ::8].flatten(1)
        return self.direct(x) + F.relu(self.branch(x))


def test_a_tensor_without_a_gradient_is_judged_by_a_real_change() -> None:
    tower = own(Asleep())
    run_backward(tower)
    assert read_gradients(trained_parameters(tower)).zero == {"branch.weight", "branch.bias"}
    check_alive(tower)


def test_a_tower_that_gives_no_numbers_is_refused() -> None:
    tower = own(Idle())
    tower.body.gain.data.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"'module:Idle' gives values that are not finite for two images of noise; exp"
    ):
        check_alive(tower)


def test_nothing_trained_is_nothing_to_judge() -> None:
    check_alive(with_policy("frozen", tiny("vit")))


def test_images_go_through_a_transform_of_the_users() -> None:
    def transform(picture: Image.Image) -> Tensor:
        seen.append(picture.getextrema())
        return torch.rand(3, 8, 8) * (picture.size == (64, 64))

    seen: list[Any] = []
    body = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 6))
    tower = own(body, ImageContract(0, transform=transform))
    before = torch.get_rng_state()
    check_alive(tower)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(low < high for low, high in seen[-1])  # noise, not one grey


class Noisy(nn.Module):
    """Draws numbers even in eval mode, normalises by its batch, and starts with a gain of minus zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.map = nn.Linear(3, 6)
        self.spare = nn.Linear(3, 6)
        self.gain = nn.Parameter(torch.full((6,), -0.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.map(F.dropout(self.norm(images), 0.1).mean((2, 3))) * self.gain


def state(tower: Tower) -> dict[str, Tensor]:
    """Return every bit of a tower: values (a zero has a sign), gradients, flags."""
    tensors = {name: t.detach() for name, t in [*tower.named_parameters(), *tower.named_buffers()]}
    bits = {n: t.view(torch.int32) if t.dtype == torch.float32 else t for n, t in tensors.items()}
    bits |= {f"{n}.grad": p.grad for n, p in tower.named_parameters() if p.grad is not None}
    flags = [m.training for m in tower.modules()] + [p.requires_grad for p in tower.parameters()]
    return {n: t.clone() for n, t in bits.items()} | {"flags": torch.tensor(flags), "random": torch.get_rng_state()}


@pytest.mark.parametrize(
    ("make", "dead"),
    [
        (lambda: with_policy("full", tiny("resnet")), False),
        (lambda: with_policy("lora(targets=all)+layernorm", FAMILIES["swinv2"]()), False),
        (lambda: with_policy("lilt", tiny("bert")), False),
        (lambda: own(Noisy()), True),
    ],
    ids=["resnet", "swinv2", "bert", "dead"],
)
def test_the_check_leaves_no_trace(make: Callable[[], Tower], dead: bool) -> None:
    tower = make()
    run_backward(tower.train())  # dropout and batch statistics are on, and there are gradients
    next(tower.body.children()).eval()
    gradients = [p.grad for p in tower.parameters()]
    before = state(tower)
    if dead:
        with pytest.raises(ValueError, match=r"by_hand \(everything\) trains spare.weight, spare.bias, and"):
            check_alive(tower)
    else:
        check_alive(tower)
    after = state(tower)
    assert before.keys() == after.keys()
    assert [name for name, t in before.items() if not torch.equal(t, after[name])] == []
    assert all(now.grad is then for now, then in zip(tower.parameters(), gradients, strict=True))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_one_forward_judges_all_living_tensors_wherever_it_is_called(mode: Callable[[], Any]) -> None:
    tower = with_policy("lora(targets=all)+layernorm", tiny("bert"))
    calls: list[bool] = []
    tower.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with mode():
        check_alive(tower)
    assert calls == [True]


def test_every_call_comes_to_the_same_result() -> None:
    """Ranks start from other random states."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(find_dead(own(Noisy())))
    assert found[0] == found[1] == ["spare.weight", "spare.bias"]


def qk_norm() -> Tower:
    options: dict[str, Any] = {**VIT, "qk_norm": True}
    return build_tower(timm.create_model("vit_tiny_patch16_224", **options), "vision")


def swin_cr() -> Tower:
    """A Swin whose relative positions come from an MLP that adds to the logits."""
    options: dict[str, Any] = {**SWIN, "patch_size": 2, "depths": (1, 1)}
    return build_tower(timm.create_model("swinv2_cr_tiny_224", **options), "vision")


class KeyNormed(Mixer):
    """An attention under a name of its own, with a norm on its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.k_norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.wq_a, self.wk_a, self.wv_a))
        return self.wo_a(F.scaled_dot_product_attention(q, self.k_norm(k), v).transpose(1, 2).flatten(2))


def key_normed() -> Tower:
    """A private tower of which a role map alone says where its attention is."""
    body = seeded(Listed)
    for stage in body.stages:
        stage.mix = seeded(KeyNormed)
    return build_tower(body.eval(), "vision", CONTRACT, roles=LISTED)


@pytest.mark.parametrize(
    ("make", "names", "other"),
    [
        (
            lambda: hf_text("bert"),
            "encoder.layer.{}.attention.self.key.bias",
            "encoder.layer.0.attention.self.value.bias",
        ),
        (lambda: hf_text("distilbert"), "transformer.layer.{}.attention.k_lin.bias", "embeddings.LayerNorm.bias"),
        (qk_norm, "blocks.{}.attn.k_norm.bias", "blocks.0.attn.q_norm.bias"),
        (swin_cr, "stages.{}.blocks.0.attn.meta_mlp.fc2.bias", "stages.0.blocks.0.attn.meta_mlp.fc1.bias"),
        (key_normed, "stages.{}.mix.k_norm.bias", "stages.0.mix.wv_a.bias"),
        (lambda: private(Listed, LISTED), "stages.{}.mix.wk_a.bias", "stages.0.mix.wv_a.bias"),
    ],
    ids=["bert", "distilbert", "qk_norm", "swin_cr", "mapped norm", "mapped key"],
)
def test_what_is_dead_by_nature_is_found_by_role_and_is_dead(make: Callable[[], Tower], names: str, other: str) -> None:
    check_shifts(make().eval(), [names.format(0), names.format(1)], other)


def check_shifts(tower: Tower, names: list[str], other: str) -> None:
    """Check that biases are taken for dead by nature and that the output does not see them, but sees the other one."""
    assert set(names) <= dead_by_nature(tower)
    inputs, chance = batch(tower), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gain in tower.body.parameters():  # norms that start at zero close their branches
            gain.add_(float(not gain.any()))
        before = tower(inputs)
        for name in [*names, other]:
            bias = tower.body.get_parameter(name)
            bias.add_(torch.randn(bias.shape, generator=chance), alpha=1 if name != other else 30)
            assert torch.allclose(tower(inputs), before, rtol=1e-4, atol=1e-4) == (name != other)


SELF = "encoder.layer.{block}.attention.self."


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("bitfit+peft(LORA(target_modules=key|value))", SELF + "{part}.base_layer.bias"),
        ("peft(LORA(target_modules=key|value,lora_bias=true))", SELF + "{part}.lora_B.default.bias"),
        ("peft(BEFT(target_modules=key|value))", SELF + "{part}.beft_bias.default"),
        ("peft(LORA(target_modules=dense,modules_to_save=self))", SELF + "modules_to_save.default.{part}.bias"),
    ],
)
def test_what_peft_wraps_stays_dead_by_nature(spec: str, name: str) -> None:
    tower = with_policy(spec, hf_text("bert")).eval()
    check_shifts(tower, [name.format(block=i, part="key") for i in (0, 1)], name.format(block=0, part="value"))


def test_a_key_norm_that_peft_tunes_stays_dead_by_nature() -> None:
    tower = with_policy("peft(LN_TUNING(target_modules=k_norm))", qk_norm()).eval()
    names = [f"blocks.{i}.attn.k_norm.ln_tuning_layers.default.bias" for i in (0, 1)]
    check_shifts(tower, names, "blocks.0.attn.qkv.bias")


@pytest.mark.parametrize(
    "spec", ["bitfit+peft(LORA(target_modules=key|query))", "peft(LORA(target_modules=key,bias=all))"]
)
def test_bias_tuning_beside_peft_is_let_off_for_the_keys_alone(spec: str) -> None:
    tower = with_policy(spec, tiny("bert"))
    found = {name for name in dead_by_nature(tower) if tower.body.get_parameter(name).requires_grad}
    assert found == {SELF.format(block=i) + "key.base_layer.bias" for i in (0, 1)}
    check_alive(tower)


def test_other_biases_are_judged() -> None:
    assert dead_by_nature(tiny("bert")) == {f"encoder.layer.{i}.attention.self.key.bias" for i in (0, 1)}
    assert "blocks.0.attn.qkv.bias" in dict(tiny("vit").body.named_parameters())
    assert dead_by_nature(tiny("vit")) == set()


class LoneAttention(nn.Module):
    """An attention to one token, in which no key matters; the bias of the keys is read, or not even that."""

    def __init__(self, reads: bool):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 3) for _ in range(3))
        self.reads = reads

    def forward(self, images: Tensor) -> Tensor:
        x = images.mean((2, 3))[:, None]
        query, keys = self.query(x), F.linear(x, self.key.weight, self.key.bias if self.reads else None)
        weights = (query @ keys.transpose(1, 2)).softmax(-1)
        return (query + weights @ self.value(x))[:, 0]


@pytest.mark.parametrize("reads", [True, False])
def test_a_key_bias_is_let_off_for_its_softmax_alone(reads: bool) -> None:
    tower = own(nn.Sequential(nn.Identity(), LoneAttention(reads)))
    assert dead_by_nature(tower) == {"1.key.bias"}
    assert find_dead(tower) == (["1.key.weight"] if reads else ["1.key.weight", "1.key.bias"])


def test_a_model_checks_both_of_its_towers() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.silenced = nn.Embedding(18, 6), nn.Linear(6, 6)

        def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
            words = self.words(input_ids)
            return words + 0 * self.silenced(words)

    def build(text_policy: str) -> DualEncoder:
        eye = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 6))
        contracts: dict[str, Any] = {"preprocess": CONTRACT, "tokenizer": word_tokenizer()}
        return DualEncoder.build(eye, Reader(), "full", text_policy=text_policy, **contracts)

    build("except(mlp)").check()
    with pytest.raises(ValueError, match=r"^full \(parameters\) trains silenced.weight, silenced.bias, .* text tower"):
        build("full").check()
