"""Fine-tuning: it learns, by any policy, on a copy, the same each time; nothing is chosen on the test split."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilt import DualEncoder, ImageContract
from lilt.cli import main
from lilt.evaluate import Setting, Subject, parse_task
from lilt.evaluate.examples import Collate, Encoded, Pictures
from lilt.evaluate.free_copy import free_copy
from lilt.evaluate.parts import Part
from lilt.evaluate.texts import join_pair
from lilt.evaluate.tuning import Recipe, Tuned, own_stream, tune
from lilt.towers import build_tower
from tests.conftest import word_tokenizer
from tests.evaluate.conftest import BY_NAME, manifest
from tests.evaluate.test_text_probe import folder, pairs, sentences
from tests.test_merge import shaken

POLICIES = [
    "layernorm", "lora(r=2)", "lilt", "adapter(reduction=4)+lora(r=2)", "prompt(n=2)", "deep_adapter", "ia3", "full",
]  # fmt: skip
VISION = f"finetune({BY_NAME},epochs=2,batch_size=4,policy="


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return folder(tmp_path / "texts", train=sentences(40, 1), val=sentences(20, 2), test=sentences(30, 3))


def state(model: DualEncoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def images(tower: Any) -> Tensor:
    return torch.randn(2, *tower.example().shape[1:], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_model_is_not_changed_bit_for_bit(
    policy: str, setting: Setting, texts: str, tiny_vision: str, tiny_text: str
) -> None:
    """And any policy works on a run of any, of the same too."""
    model = shaken(vision=tiny_vision, text=tiny_text, policy=policy, projection="linear(dim=16)")
    model.train()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    modes, stream = [m.training for m in model.modules()], torch.get_rng_state()
    again = "layernorm" if policy.startswith("prompt") else policy
    for spec in (f"{VISION}{again})", f"finetune(side=text,data={texts},policy={again},epochs=1)"):
        found = dict(parse_task(spec)(model, setting))
        assert found["num_trained"] > 0
    after = state(model)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("own", POLICIES)
def test_it_starts_from_the_tower_as_it_is(own: str, tiny_vision: str, tiny_text: str) -> None:
    model = shaken(vision=tiny_vision, text=tiny_text, policy=own, projection="linear(dim=16)")
    subject = Subject(model)
    given: dict[str, Any] = {"vision": images(model.core.vision), "text": model.core.text.example()}
    for side, inputs in given.items():
        tower = getattr(model.core, side)
        with torch.no_grad():
            expected = tower(inputs)
            for policy in {"layernorm", own.replace("prompt(n=2)", "full")}:
                found = free_copy(subject, side, policy).eval()(inputs)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with subject.at_base() as base, torch.no_grad():
            as_base = free_copy(base, side, "layernorm").eval()(inputs)
            torch.testing.assert_close(as_base, tower(inputs), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(as_base, expected, atol=1e-3)


def test_colours_are_learned_and_the_numbers_add_up(tuned: DualEncoder, setting: Setting) -> None:
    found = dict(parse_task(f"finetune({BY_NAME},policy=full,epochs=12,batch_size=4,lr=1e-3)")(tuned, setting))
    assert found["top1"] >= 50  # chance is 16.7
    assert 1 <= found["best_epoch"] <= 12
    assert (found["num_train"], found["num_validation"], found["num_test"], found["num_classes"]) == (12, 6, 6, 6)
    trained = sum(p.numel() for p in tuned.core.vision.parameters())
    assert found["num_trained"] == trained
    assert {"top1", "top5", "mean_per_class", "matthews", "num_unreadable"} <= found.keys()


def test_a_pair_read_as_one_sequence_is_learned(tuned: DualEncoder, tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs", train=24, val=8, test=12)
    spec = f"finetune(side=text,data={data},epochs=2,batch_size=8,policy=full,lr=1e-3"
    apart, joint = (dict(parse_task(f"{spec},joint={said})")(tuned, Setting())) for said in ("false", "true"))
    assert apart["num_test"] == joint["num_test"] == 12
    assert apart["num_cut_texts"] == joint["num_cut_texts"] == 0
    classed = parse_task(f"{spec},joint=true)").classed(Subject(tuned, Setting()))  # type: ignore[attr-defined]
    examples = Encoded(classed.learned.train, tuned.core.text.contract, None)  # type: ignore[arg-type]
    (one,), _ = examples[0, 3]
    ((first, second),) = classed.learned.train.items[3]
    assert one == dict(tuned.core.text.contract.tokenizer(first, second))  # type: ignore[union-attr]


def test_the_same_seed_ends_in_the_same_bits(tuned: DualEncoder, setting: Setting, texts: str) -> None:
    """Whatever the batches of evaluation and the workers; another seed learns otherwise."""
    specs = (f"{VISION}lora(r=2),augment=crop(0.4,1)+hflip)", f"finetune(side=text,data={texts},policy=lora(r=2))")
    for spec in specs:
        first = dict(parse_task(spec)(tuned, setting))
        torch.manual_seed(7)
        assert dict(parse_task(spec)(tuned, setting)) == first
        other = Setting(setting.data, setting.image_root, batch_size=3, workers=1)
        assert dict(parse_task(spec)(tuned, other)) == first
    weights = []
    for seed in (0, 0, 1):
        with own_stream(seed, torch.device("cpu")):
            model = Tuned(free_copy(Subject(tuned), "text", "adapter(reduction=4)"), 2, 1)
        weights.append(model.head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_one_step_is_that_of_torchs_own_adamw(tuned: DualEncoder) -> None:
    """Two texts, one step at the full rate: the update of every tensor, written out from the formula."""
    part = Part([("a red boat", "the photo"), ("paper", "a blue boat")], torch.tensor([1, 0]))
    tokenizer: Any = tuned.core.text.contract
    with own_stream(3, torch.device("cpu")):
        model = Tuned(free_copy(Subject(tuned), "text", "layernorm"), 2, 2)
    model.tower.still |= {name for name, _ in model.tower.body.named_modules()}  # without dropout
    witness = copy.deepcopy(model, {id(tokenizer): tokenizer}).eval()
    tune(model, Encoded(part, tokenizer, None), Collate(tokenizer.pad), Recipe(1, None, 0.01, 0.1, 2, 0), lambda: 1.0)
    u, v = (witness.tower(tokenizer.pad(tokenizer.encode([item[side] for item in part.items])[0])) for side in (0, 1))
    rows = torch.cat([u, v, (u - v).abs(), u * v], dim=1)
    assert torch.equal(rows, join_pair(u, v))
    F.cross_entropy(rows @ witness.head.weight.T + witness.head.bias, part.labels).backward()
    trained = witness.trained()
    norm = torch.stack([p.grad.norm() for p in trained.values() if p.grad is not None]).norm()
    rates = {edit.lr for edit in (model.tower.fates or {}).values()}
    assert rates == {0.005}
    for name, parameter in trained.items():
        assert parameter.grad is not None
        gradient = parameter.grad * min(1.0, float(1 / (norm + 1e-6)))
        rate, decay = (0.01, 0.1 * (parameter.ndim > 1)) if name.startswith("head") else (0.005, 0.0)
        expected = parameter * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)
        # where a gradient is as small as AdamW's epsilon, rounding decides its sign
        firm = gradient.abs() > 1e-6
        assert firm.any(), name
        torch.testing.assert_close(model.trained()[name][firm], expected[firm], rtol=0, atol=2e-5, msg=name)


def test_the_best_epoch_is_kept_the_earlier_of_equals(tuned: DualEncoder) -> None:
    part = Part([("a red boat",), ("paper",), ("the photo",), ("a blue boat",)], torch.tensor([1, 0, 0, 1]))
    tokenizer: Any = tuned.core.text.contract
    with own_stream(0, torch.device("cpu")):
        model = Tuned(free_copy(Subject(tuned), "text", "layernorm"), 2, 1)
        seen: list[dict[str, Tensor]] = []
        scores = iter([0.5, 0.75, 0.75, 0.25])

        def score() -> float:
            assert not model.training
            seen.append({name: p.detach().clone() for name, p in model.trained().items()})
            return next(scores)

        recipe = Recipe(4, None, 0.01, 0.0, 2, 0)
        assert tune(model, Encoded(part, tokenizer, None), Collate(tokenizer.pad), recipe, score) == 2
    for name, parameter in model.trained().items():
        assert torch.equal(parameter, seen[1][name])
        assert not torch.equal(seen[1][name], seen[2][name])


def test_the_test_split_chooses_nothing(tuned: DualEncoder, pictures: Path, tmp_path: Path) -> None:
    epochs = []
    for turn in range(2):
        records: list[dict[str, Any]] = []
        for f in sorted(pictures.glob("*[0123].*")):
            split = {"0": "train", "1": "train", "2": "val", "3": "test"}[f.stem[-1]]
            colour = "red" if split == "test" and turn else f.stem[:-1]
            records.append({"image": str(f), "label": colour, "split": split})
        data = manifest(tmp_path / f"{turn}.jsonl", records)
        epochs.append(dict(parse_task(f"finetune(data={data},epochs=4,batch_size=4)")(tuned))["best_epoch"])
    assert epochs[0] == epochs[1]


def test_a_prompt_beside_a_prompt_is_refused_with_the_reason(
    setting: Setting, tiny_vision: str, tiny_text: str
) -> None:
    model = shaken(vision=tiny_vision, text=tiny_text, policy="prompt(n=2)", projection="linear(dim=16)")
    with pytest.raises(ValueError, match=r"The prompt of the run is still in the tower, .*; try layernorm, bitfit or"):
        dict(parse_task(f"{VISION}prompt(n=2))")(model, setting))


def test_unreadable_pictures_are_left_out_of_batches(tuned: DualEncoder, pictures: Path, tmp_path: Path) -> None:
    files = [*sorted(pictures.glob("*0.png")), tmp_path / "gone.png"]
    part = Part([str(f) for f in files], torch.tensor([0, 1, 0, 1, 0, 1, 1]))
    contract = tuned.core.vision.contract
    assert isinstance(contract, ImageContract)
    examples = Pictures(part, contract, "none", 0)
    batch = Collate()([examples[0, i] for i in range(7)])
    assert isinstance(batch.inputs[0], Tensor)
    assert (batch.inputs[0].shape, batch.labels.tolist()) == ((6, 3, 32, 32), [0, 1, 0, 1, 0, 1])
    assert Collate()([examples[0, 6]]).inputs == []
    with own_stream(0, torch.device("cpu")):
        model = Tuned(free_copy(Subject(tuned), "vision", "layernorm"), 2, 1)
        tune(model, examples, Collate(), Recipe(2, None, 0.01, 0.0, 1, 0), lambda: 1.0)
    assert all(p.isfinite().all() for p in model.parameters())


def test_before_and_after_are_fine_tuned_alike(
    tuned: DualEncoder, setting: Setting, texts: str, tiny_vision: str, tiny_text: str
) -> None:
    specs = {"finetune": f"{VISION}layernorm)"}
    found = dict(parse_task(f"conserve({specs['finetune']})")(tuned, setting))
    base = DualEncoder.build(tiny_vision, tiny_text, "frozen", projection="linear(dim=16)")
    for model, when in ((base, "before"), (tuned, "after")):
        alone = dict(parse_task(specs["finetune"])(model, setting))
        for key in ("top1", "mean_per_class", "best_epoch"):
            assert found[f"finetune/{key}/{when}"] == pytest.approx(alone[key])
    assert "finetune/best_epoch/kept" not in found
    assert found["num_finetune/test"] == 6
    text = dict(parse_task(f"conserve(finetune(side=text,data={texts},epochs=1))")(tuned))
    assert {"finetune/f1/before", "finetune/f1/after"} <= text.keys()


def test_towers_passed_as_modules_bring_their_base(setting: Setting, tiny_vision: str, tiny_text: str) -> None:
    modules = {side: build_tower(spec, side).body for side, spec in (("vision", tiny_vision), ("text", tiny_text))}
    contracts: dict[str, Any] = {"preprocess": ImageContract(32), "tokenizer": word_tokenizer()}
    base: dict[str, Any] = {**copy.deepcopy(modules), **contracts}
    model = shaken(**modules, **contracts, policy="lora(r=2)", projection="linear(dim=16)")
    with pytest.raises(ValueError, match=r"was passed as a module .*expected the module as it was before training"):
        dict(parse_task(f"conserve({VISION}layernorm))")(model, setting))
    given = Setting(setting.data, setting.image_root, batch_size=5, base=base)
    assert dict(parse_task(f"conserve({VISION}layernorm))")(model, given))["num_finetune/test"] == 6


def test_runs_on_the_demo_towers_work_on_the_command_line(
    texts: str, setting: Setting, tmp_path: Path, capsys: Any
) -> None:
    run = str(DualEncoder.build().save(tmp_path / "run"))
    vision = f"finetune({BY_NAME},policy=lora(r=4)+layernorm,epochs=6,batch_size=4)"
    text = f"finetune(side=text,data={texts},epochs=20,batch_size=8)"
    words = ["evaluate", run, f"--data={setting.data}", f"--image_root={setting.image_root}", "--workers=0"]
    assert main([*words, "--json", "--task", vision, "--task", text]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert found[vision]["top1"] > 30
    assert found[text]["top1"] > 60, found
    assert main([*words, "--task", text]) == 0
    table = capsys.readouterr().out
    for row in ("top1", "f1", "matthews", "best_epoch", "trained", "validation"):
        assert row.replace("_", " ") in table


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("policy=layernrom", r"unknown policy 'layernrom'; known: .*Did you mean 'layernorm'"),
        ("side=txt", r"finetune: side=txt; expected vision or text; choose the tower. Did you mean 'text'"),
        ("epochs=0", "finetune: epochs=0; expected more than 0"),
        ("lr=-1", "finetune: lr=-1; expected more than 0"),
        ("expected=7", "labelled images to test on: found 6, expected 7"),
        (
            "lr=1e30,policy=full,epochs=3,batch_size=4",
            "the loss of fine-tuning is (nan|inf); expected a finite one; use a lower lr",
        ),
        ("augment=crop(0.5", "cannot read|unbalanced"),
    ],
)
def test_bad_settings_are_named(tuned: DualEncoder, setting: Setting, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dict(parse_task(f"finetune({BY_NAME},{spec})")(tuned, setting))
