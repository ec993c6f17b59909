"""The tokens of a model in the joint space are what its heads were trained on, one by one, and retrieve as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

from lilt import DualEncoder, ImageContract
from lilt.cli import main
from lilt.data import Sample, eval_transform, open_image, read_manifest, select
from lilt.evaluate import Setting, parse_task
from lilt.evaluate.embed import recalls
from lilt.evaluate.late import Bags, late
from lilt.evaluate.rows import at_rest
from lilt.evaluate.tokens import embed_tokens, token_space, token_vectors
from tests.test_merge import shaken
from tests.towers.families import batch, open_clip_arch, tiny, tokens
from tests.towers.test_space import NONE

POOLS = ("cls", "mean")


@pytest.fixture(scope="module")
def samples(pictures: Path) -> list[Sample]:
    """12 images with 3 captions each, every caption on two images."""
    return select(read_manifest(pictures / "manifest.jsonl"), "train")


def vectors(model: DualEncoder, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of tokens (B, L, D), which count (B, L), and the unit vectors of the whole (B, D)."""
    core = model.core
    tower = getattr(core, side)
    inputs: Any = (
        batch(tower) if side == "vision" else tokens(tower, "a red picture", "it is the boat on paper", "blue")
    )
    with at_rest(core):
        whole = core.encode_image(inputs) if side == "vision" else core.encode_text(inputs)
        found, counted = token_vectors(core, tower, token_space(core, tower), inputs)
    return found, counted, whole


@pytest.mark.parametrize("side", ["vision", "text"])
@pytest.mark.parametrize("head", ["linear(dim=16)", "linear(dim=16,tied=true)", "none", "mlp(dim=16)", "glu(dim=16)"])
def test_the_class_token_is_the_vector_of_the_whole(tiny_vision: str, tiny_text: str, head: str, side: str) -> None:
    model = shaken(vision=f"{tiny_vision}?pool=cls", text=tiny_text, policy="layernorm", projection=head)
    found, counted, whole = vectors(model, side)
    assert counted[:, 0].all()
    torch.testing.assert_close(found[:, 0], whole, rtol=0, atol=1e-5)
    assert (found[:, 1] - whole).abs().max() > 1e-2
    assert counted.sum(1).tolist() == ([17] * 3 if side == "vision" else [5, 8, 3])


@pytest.mark.parametrize("side", ["vision", "text"])
@pytest.mark.parametrize(
    ("head", "pool"), [("linear(dim=16)", "mean"), ("linear(dim=16)", "cls+mean"), ("tokens(dim=16)", "cls")]
)
def test_the_mean_of_the_tokens_is_the_vector_of_the_whole(
    tiny_vision: str, tiny_text: str, head: str, pool: str, side: str, monkeypatch: Any
) -> None:
    # in front of the unit length, which each token has for itself
    model = shaken(
        vision=f"{tiny_vision}?pool={pool}", text=f"{tiny_text}?pool={pool}", policy="layernorm", projection=head
    )
    monkeypatch.setattr("lilt.evaluate.tokens.F.normalize", lambda rows, dim: rows)
    monkeypatch.setattr("lilt.model.core.F.normalize", lambda rows, dim: rows)
    found, counted, whole = vectors(model, side)
    assert counted.sum(1).tolist() == ([16] * 3 if side == "vision" else [5, 8, 3])
    mean = torch.stack([rows[real].mean(0) for rows, real in zip(found, counted, strict=True)])
    torch.testing.assert_close(mean, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["vision", "text"])
@pytest.mark.parametrize("pool", POOLS)
def test_tokens_go_through_a_shared_encoder(tiny_vision: str, tiny_text: str, pool: str, side: str) -> None:
    shared = f"transformer(n=1,heads=2,pool={pool})"
    model = shaken(vision=tiny_vision, text=tiny_text, policy="frozen", shared=shared, projection="none")
    found, counted, whole = vectors(model, side)
    assert counted[:, 0].all() == (side == "text" or pool == "cls")
    if pool == "cls":
        torch.testing.assert_close(found[:, 0], whole, rtol=0, atol=1e-5)
    layers = shaken(vision=tiny_vision, text=tiny_text, policy="frozen", shared="mlp", projection="linear(dim=16)")
    found, _, whole = vectors(layers, side)
    torch.testing.assert_close(found[:, 0], whole, rtol=0, atol=1e-5)


def test_registers_never_count() -> None:
    model = DualEncoder.build(tiny("dinov2"), tiny("bert"), projection="linear(dim=16)")
    found, counted, whole = vectors(model, "vision")
    assert counted[0].tolist() == [True, *[False] * 4, *[True] * 16]
    torch.testing.assert_close(found[:, 0], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["prompt(n=3)", "lora(r=2)", "adapter+layernorm", "deep_adapter"])
def test_what_a_policy_adds_is_no_token_of_the_input(tiny_vision: str, tiny_text: str, policy: str) -> None:
    model = shaken(vision=tiny_vision, text=tiny_text, policy=policy, projection="linear(dim=16)")
    for side, count in (("vision", [17] * 3), ("text", [5, 8, 3])):
        found, counted, whole = vectors(model, side)
        assert counted.sum(1).tolist() == count
        torch.testing.assert_close(found[:, 0], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_open_clips_tokens_are_those_before_its_projection(pool: str) -> None:
    spec = f"open_clip:{open_clip_arch()}?pretrained=false&pool={pool}"
    model = DualEncoder.build(spec, f"open_clip:{open_clip_arch()}?pretrained=false&pool=mean")
    found, counted, whole = vectors(model, "vision")
    assert counted.sum(1).tolist() == [16 + (pool == "cls")] * 3
    if pool == "cls":
        torch.testing.assert_close(found[:, 0], whole, rtol=0, atol=1e-5)
    assert vectors(model, "text")[1].sum(1).tolist() == [5, 8, 3]


@torch.no_grad()
def test_they_are_the_librarys_tokens_through_the_projection(tiny_vision: str, tiny_text: str) -> None:
    model = shaken(vision=tiny_vision, text=tiny_text, policy="frozen", projection="linear(dim=16)")
    folder = tiny_text.removeprefix("hf:")
    texts = ["a red picture", "it is the boat on paper", "blue"]
    own = hf.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    hidden = hf.AutoModel.from_pretrained(folder).eval()(**own).last_hidden_state
    head = model.core.projection.text
    expected = F.normalize(hidden @ head.weight.T + head.bias, dim=-1)
    found, counted, _ = vectors(model, "text")
    real = own["attention_mask"].bool()
    assert torch.equal(counted, real)
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)


def items(some: Bags) -> list[Tensor]:
    return [some.rows[a : a + n] for a, n in zip(some.starts.tolist(), some.sizes.tolist(), strict=True)]


@pytest.mark.parametrize("options", [{"batch_size": 5}, {"batch_size": 128}, {"workers": 2, "batch_size": 4}], ids=str)
def test_a_split_is_embedded_in_the_order_of_its_samples(
    tiny_vision: str, tiny_text: str, samples: list[Sample], options: dict[str, Any]
) -> None:
    model = shaken(vision=tiny_vision, text=tiny_text, policy="layernorm", projection="linear(dim=16)")
    core = model.core
    embedded = embed_tokens(core, samples, **options)
    assert embedded.owner.tolist() == [i for i in range(12) for _ in range(3)]
    captions = [caption for sample in samples for caption in sample.captions]
    assert (len(embedded.image), len(embedded.text)) == (12, 36)
    assert embedded.text.sizes.tolist() == [len(caption.split()) + 2 for caption in captions]
    assert len(embedded.text.rows) == sum(len(c.split()) + 2 for c in set(captions))  # each caption once
    space = token_space(core, core.text)
    with at_rest(core):
        for caption, rows in zip(captions, items(embedded.text), strict=True):
            alone, _ = token_vectors(core, core.text, space, tokens(core.text, caption))
            torch.testing.assert_close(rows, alone[0], rtol=0, atol=1e-5)
    whole = model.embed(images=[sample.image for sample in samples], texts=captions)
    for side, bags in (("image", embedded.image), ("text", embedded.text)):
        firsts = torch.stack([rows[0] for rows in items(bags)])
        torch.testing.assert_close(firsts, whole[side], rtol=0, atol=1e-5)


def test_an_unreadable_image_leaves_with_its_captions(
    tiny_vision: str, tiny_text: str, samples: list[Sample], tmp_path: Path
) -> None:
    core = DualEncoder.build(tiny_vision, tiny_text, projection="linear(dim=16)").core
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    bad = Sample(tmp_path / "bad.png", ("a red boat", "paint"), "train")
    result = recalls(embed_tokens(core, [*samples[:3], bad, *samples[3:]], batch_size=2), late)
    clean = recalls(embed_tokens(core, samples), late)
    assert (result.pop("num_unreadable"), clean.pop("num_unreadable")) == (1, 0)
    assert result == clean
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        recalls(embed_tokens(core, [bad]), late)


@pytest.mark.parametrize("family", NONE)
def test_a_tower_without_tokens_of_its_space_is_refused(family: str, samples: list[Sample]) -> None:
    tower = tiny(family)
    other = "bert" if isinstance(tower.contract, ImageContract) else "vit"
    sides = (tower, tiny(other)) if other == "bert" else (tiny(other), tower)
    core = DualEncoder.build(*sides, "frozen", projection="linear(dim=16)").core
    with pytest.raises(
        ValueError, match=r"takes no single token; expected .*; train with \?pool=cls or \?pool=mean, or"
    ):
        embed_tokens(core, samples)


@pytest.fixture(scope="module")
def tuned(tiny_vision: str, tiny_text: str) -> DualEncoder:
    return shaken(vision=tiny_vision, text=tiny_text, policy="layernorm", projection="linear(dim=16)")


def slow(model: DualEncoder, samples: list[Sample]) -> dict[str, list[list[float]]]:
    """Scores both ways of images and captions, a pair at a time."""
    core = model.core
    seen, read = [], []
    with at_rest(core):
        for sample in samples:
            picture = model.core.vision.contract
            assert isinstance(picture, ImageContract)
            image = eval_transform(picture)(open_image(sample.image)).unsqueeze(0)
            seen.append(token_vectors(core, core.vision, token_space(core, core.vision), image)[0][0])
            for caption in sample.captions:
                inputs = tokens(core.text, caption)
                read.append(token_vectors(core, core.text, token_space(core, core.text), inputs)[0][0])
    return {
        "text_to_image": [[float((t @ i.T).max(1).values.mean()) for i in seen] for t in read],
        "image_to_text": [[float((i @ t.T).max(1).values.mean()) for t in read] for i in seen],
    }


def test_the_task_finds_what_slow_scores_find(tuned: DualEncoder, pictures: Path) -> None:
    setting = Setting(str(pictures / "manifest.jsonl"), str(pictures), batch_size=5)
    found = dict(parse_task("retrieval(score=late)")(tuned, setting))
    samples = select(read_manifest(pictures / "manifest.jsonl"), "test")
    scores = slow(tuned, samples)
    owner = [i for i, sample in enumerate(samples) for _ in sample.captions]
    ranks = {
        "text_to_image": [
            1 + sum(s >= row[o] - 1e-6 for j, s in enumerate(row) if j != o)
            for row, o in zip(scores["text_to_image"], owner, strict=True)
        ],
        "image_to_text": [
            1 + sum(s >= max(r for r, o in zip(row, owner, strict=True) if o == i) - 1e-6
                    for s, o in zip(row, owner, strict=True) if o != i)
            for i, row in enumerate(scores["image_to_text"])
        ],
    }  # fmt: skip
    for side, some in ranks.items():
        for k in (1, 5, 10):
            assert found[f"{side}/R@{k}"] == pytest.approx(100 * sum(r <= k for r in some) / len(some))
    assert found["num_images"] == 6
    assert found != dict(parse_task("retrieval")(tuned, setting))
    assert dict(parse_task("retrieval(score=cosine)")(tuned, setting)) == dict(parse_task("retrieval")(tuned, setting))
    with pytest.raises(ValueError, match=r"retrieval: unknown score 'lat'; known: cosine, late. Did you mean 'late'\?"):
        dict(parse_task("retrieval(score=lat)")(tuned, setting))


def test_the_command_line_takes_the_score(tuned: DualEncoder, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    run = str(tuned.save(tmp_path / "x"))
    words = ["evaluate", run, f"--data={pictures / 'manifest.jsonl'}", "--workers=0", "--json"]
    assert main([*words, "--task=retrieval(score=late)", "--task=retrieval"]) == 0
    values = json.loads(capsys.readouterr().out)["tasks"]
    assert values["retrieval(score=late)"].keys() == values["retrieval"].keys()
    assert values["retrieval(score=late)"] != values["retrieval"]
