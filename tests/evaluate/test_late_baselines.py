"""Off-the-shelf models retrieve token by token: each token goes the way of the one by which the model pools."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from torch import Tensor

import lilt
from lilt.cli import main
from lilt.data import Sample
from lilt.evaluate import evaluate_retrieval
from lilt.evaluate.embed import recalls
from lilt.evaluate.late import Bags, late
from lilt.evaluate.rows import at_rest
from lilt.evaluate.tokens import embed_tokens, token_space, token_vectors
from lilt.model import TwoTower
from lilt.towers.baseline import JointSide
from tests.evaluate.conftest import manifest
from tests.towers.families import SMALL, word_tokenizer
from tests.towers.joint_models import (
    ALL,
    HF,
    OPEN_CLIP,
    READ,
    SAVE,
    SEEN,
    VISION,
    Family,
    pictures,
    save_hf,
    save_open_clip,
)
from tests.towers.joint_models import clip_processor as seen

TEXTS = [
    "a red boat", "two", "the big green house under a blue cat", "blue cat", "a small dog", "the boat",
    "two big dog under the house", "green",
]  # fmt: skip


class Reference(NamedTuple):
    """Tokens (B, L, D) in the joint space, as the library's parts give them; which count (B, L).

    place: of the one that the model pools by; None: of those that count the mean, in front of what is behind it.
    """

    tokens: Tensor
    counted: Tensor
    place: Tensor | None


def at_start(tokens: Tensor, counted: Tensor | None = None) -> Reference:
    every = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return Reference(tokens, every if counted is None else counted, torch.zeros(len(tokens), dtype=torch.long))


def clip_sees(model: Any, pixels: Tensor) -> Reference:
    hidden = model.vision_model(pixel_values=pixels).last_hidden_state
    return at_start(model.visual_projection(model.vision_model.post_layernorm(hidden)))


def clip_reads(model: Any, tokens: Any) -> Reference:
    hidden = model.text_model(**tokens).last_hidden_state
    real = tokens["attention_mask"].bool()
    ends = tokens["input_ids"].argmax(1)  # as in CLIP, no other token has such a number
    assert torch.equal(ends, real.sum(1) - 1)
    return Reference(model.text_projection(hidden), real, ends)


def start_reads(model: Any, tokens: Any) -> Reference:
    hidden = model.text_model(**tokens).last_hidden_state
    return at_start(model.text_projection(hidden), tokens["attention_mask"].bool())


def bert_reads(model: Any, tokens: Any) -> Reference:
    hidden = model.text_model(**tokens).last_hidden_state
    pooler = model.text_model.pooler
    return at_start(model.text_projection(torch.tanh(pooler.dense(hidden))), tokens["attention_mask"].bool())


def registers_see(model: Any, pixels: Tensor) -> Reference:
    tokens = model.visual_projection(model.vision_model(pixel_values=pixels).last_hidden_state)
    counted = torch.ones(tokens.shape[:2], dtype=torch.bool)
    counted[:, 1:5] = False
    return at_start(tokens, counted)


def align_sees(model: Any, pixels: Tensor) -> Reference:
    tokens = model.vision_model(pixel_values=pixels).last_hidden_state.flatten(2).mT
    assert tokens.shape[1] == 9
    return Reference(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), None)


def groups_see(model: Any, pixels: Tensor) -> Reference:
    hidden = model.vision_model(pixel_values=pixels).last_hidden_state
    tokens = torch.stack([model.visual_projection(hidden[:, i]) for i in range(hidden.shape[1])], dim=1)
    return Reference(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), None)


def highest_reads(model: Any, tokens: Any) -> Reference:
    hidden = model.text_model(**tokens).last_hidden_state
    joint = torch.stack([model.text_projection(hidden[:, i]) for i in range(hidden.shape[1])], dim=1)
    return Reference(joint, tokens["attention_mask"].bool(), tokens["input_ids"].argmax(1))


def flava_sees(model: Any, pixels: Tensor) -> Reference:
    return at_start(model.get_image_features(pixel_values=pixels).pooler_output)


def flava_reads(model: Any, tokens: Any) -> Reference:
    return at_start(model.get_text_features(**tokens).pooler_output, tokens["attention_mask"].bool())


def vit_sees(model: Any, pixels: Tensor) -> Reference:
    body = model.visual
    return at_start(body.ln_post(body.transformer(body._embeds(pixels))) @ body.proj)


def patches_see(model: Any, pixels: Tensor) -> Reference:
    tokens, counted, _ = vit_sees(model, pixels)
    counted[:, 0] = False
    return Reference(tokens, counted, None)


def queries_see(model: Any, pixels: Tensor) -> Reference:
    body = model.visual
    return at_start(body.ln_post(body.attn_pool(body.transformer(body._embeds(pixels)))) @ body.proj)


def map_sees(model: Any, pixels: Tensor) -> Reference:
    trunk = model.visual.trunk
    cells = trunk.forward_features(pixels).flatten(2).mT
    assert cells.shape[1] > 1
    norm = trunk.head.norm
    tokens = model.visual.head(F.layer_norm(cells, cells.shape[-1:], norm.weight, norm.bias, norm.eps))
    return Reference(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), None)


def ends_read(model: Any, ids: Tensor) -> Reference:
    body = model.text
    hidden, mask = body._embeds(ids)
    tokens = body.ln_final(body.transformer(hidden, attn_mask=mask)) @ body.text_projection
    return Reference(tokens, ids != 0, ids.argmax(1))


def coca_reads(model: Any, ids: Tensor) -> Reference:
    tokens, real, _ = ends_read(model, ids)
    counted = torch.cat([real, torch.ones(len(ids), 1, dtype=torch.bool)], dim=1)  # the class token is the last
    return Reference(tokens, counted, torch.full((len(ids),), ids.shape[1]))


BERT = ("input_ids", "token_type_ids", "attention_mask")
CLIP = HF["clip"]
dual = partial(hf.VisionTextDualEncoderConfig.from_vision_text_configs, projection_dim=24)
GROUPS = {"depths": [1, 1], "num_group_tokens": [8, 0], "num_output_groups": [8, 4]}
Part = Callable[[Any, Any], Reference]
# transformers' own, and other ways to be a model of images and texts
OF_HF: dict[str, tuple[Family, Part, Part]] = {
    "clip": (replace(CLIP, tokenizer=partial(word_tokenizer, end="near")), clip_sees, clip_reads),
    "altclip": (HF["altclip"], clip_sees, start_reads),
    "flava": (HF["flava"], flava_sees, flava_reads),
    "align": (
        replace(
            HF["align"],
            processor=lambda: hf.EfficientNetImageProcessor(
                size={"height": 96, "width": 96}, crop_size={"height": 96, "width": 96}
            ),
        ),
        align_sees,
        start_reads,
    ),
    # BLIP norms all tokens, and the pooled one once more
    "blip": (
        Family(
            lambda: hf.BlipConfig(
                text_config=SMALL | {"encoder_hidden_size": 32}, vision_config=VISION, projection_dim=24
            ),
            seen,
        ),
        clip_sees,
        bert_reads,
    ),
    "groupvit": (
        Family(
            lambda: hf.GroupViTConfig(text_config=SMALL, vision_config=VISION | GROUPS, projection_dim=24), seen
        ),
        groups_see,
        highest_reads,
    ),
    "dual": (
        Family(
            lambda: dual(hf.Dinov2WithRegistersConfig(**VISION), hf.BertConfig(**SMALL)), seen, inputs=BERT
        ),
        registers_see,
        bert_reads,
    ),
}  # fmt: skip
ONE = OPEN_CLIP["clip"]
CONVNEXT = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp", "image_size": 64}
OF_OPEN_CLIP: dict[str, tuple[dict[str, Any], Part, Part]] = {
    "clip": (ONE, vit_sees, ends_read),
    "coca": (OPEN_CLIP["coca"], queries_see, coca_reads),
    "normed_last": (ONE | {"vision_cfg": SEEN | {"final_ln_after_pool": True}}, vit_sees, ends_read),
    "mean": (ONE | {"vision_cfg": SEEN | {"pool_type": "avg"}}, patches_see, ends_read),
    "convnext": (ONE | {"vision_cfg": CONVNEXT}, map_sees, ends_read),
}
EVERY = [("hf", name) for name in OF_HF] + [("open_clip", name) for name in OF_OPEN_CLIP]
every_model = pytest.mark.parametrize("model", EVERY, ids="-".join, indirect=True)


class Model(NamedTuple):
    core: TwoTower
    image: Reference
    text: Reference


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """Save each model once and return its spec."""
    made: dict[tuple[str, str], str] = {}

    def save(library: str, name: str) -> str:
        if (library, name) not in made:
            folder = tmp_path_factory.mktemp(f"{library}_{name}")
            made[library, name] = (
                save_hf(name, folder, OF_HF[name][0])
                if library == "hf"
                else save_open_clip(name, folder, OF_OPEN_CLIP[name][0])
            )
        return made[library, name]

    return save


@pytest.fixture
def model(request: Any, saved: Callable[[str, str], str]) -> Model:
    """A loaded model, and what its library makes of the pictures and texts."""
    library, name = request.param
    spec = saved(library, name)
    folder = spec.partition(":")[2]
    with torch.no_grad():
        if library == "hf":
            _, sees, reads = OF_HF[name]
            own: Any = hf.AutoModel.from_pretrained(folder).eval()
            pixels = hf.AutoImageProcessor.from_pretrained(folder)(images=pictures(), return_tensors="pt").pixel_values
            given: Any = hf.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
        else:
            _, sees, reads = OF_OPEN_CLIP[name]
            own, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", force_custom_text=True)
            own.eval()
            pixels = torch.stack([preprocess(picture) for picture in pictures()])
            given = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
        return Model(lilt.load(spec).core, sees(own, pixels), reads(own, given))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """The five pictures, with eight captions among them."""
    folder = tmp_path_factory.mktemp("pictures")
    captions = [TEXTS[:2], TEXTS[2:3], TEXTS[3:6], TEXTS[6:7], TEXTS[7:]]
    for number, picture in enumerate(pictures()):
        picture.save(folder / f"{number}.png")
    return [Sample(folder / f"{number}.png", tuple(some), "test") for number, some in enumerate(captions)]


def unit(reference: Reference) -> list[Tensor]:
    """Unit rows of the tokens of each item that count."""
    rows = F.normalize(reference.tokens, dim=-1)
    return [row[counted] for row, counted in zip(rows, reference.counted, strict=True)]


def items(some: Bags) -> list[Tensor]:
    return [some.rows[a : a + n] for a, n in zip(some.starts.tolist(), some.sizes.tolist(), strict=True)]


def slow(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Scores (A, B), a token at a time."""
    return torch.tensor([[sum(max(float(a @ b) for b in t) for a in o) / len(o) for t in theirs] for o in ours])


@every_model
def test_tokens_are_the_librarys_brought_to_the_joint_space(model: Model, samples: list[Sample]) -> None:
    found = embed_tokens(model.core, samples, batch_size=3)
    for bags, reference in ((found.image, model.image), (found.text, model.text)):
        for rows, expected in zip(items(bags), unit(reference), strict=True):
            torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)
            assert len(rows) == 1 or (rows[0] - rows[1]).abs().max() > 1e-2


@every_model
def test_scores_are_those_of_a_slow_loop_over_the_librarys_outputs(model: Model, samples: list[Sample]) -> None:
    found = embed_tokens(model.core, samples)
    image, text = unit(model.image), unit(model.text)
    torch.testing.assert_close(late(found.image, found.text), slow(image, text), rtol=0, atol=1e-5)
    torch.testing.assert_close(late(found.text, found.image), slow(text, image), rtol=0, atol=1e-5)


@every_model
def test_the_token_that_it_pools_by_is_the_vector_of_the_whole(
    model: Model, samples: list[Sample], monkeypatch: Any
) -> None:
    # in front of the unit length, which each token has for itself
    core = model.core
    tokenizer: Any = core.text.contract
    transform: Any = core.vision.contract.transform  # type: ignore[union-attr]
    images = torch.stack([transform(Image.open(sample.image)) for sample in samples])
    inputs = {"vision": images, "text": tokenizer.pad(tokenizer.encode(TEXTS)[0])}
    monkeypatch.setattr("lilt.evaluate.tokens.F.normalize", lambda rows, dim: rows)
    with at_rest(core):
        for tower, (_, _, place) in ((core.vision, model.image), (core.text, model.text)):
            found, counted = token_vectors(core, tower, token_space(core, tower), inputs[tower.side])
            whole = tower(inputs[tower.side])
            if place is not None:
                which = torch.arange(len(found)), place
                assert counted[which].all()
                torch.testing.assert_close(found[which], whole, rtol=1e-5, atol=1e-5)
                continue
            tokens = tower.tokens(inputs[tower.side])
            content = tokens.features[:, tokens.prefix :].mean(1)
            torch.testing.assert_close(token_space(core, tower).through(content), whole, rtol=1e-4, atol=1e-5)


@every_model
def test_what_gives_the_tokens_leaves_the_vectors_alone(model: Model, samples: list[Sample]) -> None:
    core = model.core
    before = evaluate_retrieval(core, samples)
    embed_tokens(core, samples)
    assert evaluate_retrieval(core, samples) == before
    for tower in (core.vision, core.text):
        assert isinstance(tower, JointSide)
        assert not any(module._forward_hooks for module in tower.modules())
        inputs: Any = tower.example()
        with torch.no_grad():
            whole = tower(inputs)
            tower.seam = None
            assert torch.equal(tower(inputs), whole)


def without_mask(**options: Any) -> Any:
    return word_tokenizer(model_input_names=["input_ids"])


ANOTHER_WAY = r"pools its tokens in another way than by one of them or their mean, such as by attention"
NO_TOKENS = "gives one vector for each input and no tokens"
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
REFUSED: dict[str, tuple[Callable[[Path], str], str, str]] = {
    **{f"{lib}-{name}": (partial(SAVE[lib], name), "vision", ANOTHER_WAY) for lib, name in ALL if "siglip" in name},
    "one_cell": (partial(SAVE["hf"], "align"), "vision", NO_TOKENS),
    "resnet": (lambda folder: save_open_clip("x", folder, ONE | {"vision_cfg": RESNET}), "vision", NO_TOKENS),
    "last_place": (
        lambda folder: save_open_clip("x", folder, ONE | {"text_cfg": READ | {"pool_type": "last"}}),
        "text",
        "pools by padding too, which is none of the text",
    ),
    "no_mask": (
        lambda folder: save_hf("x", folder, replace(CLIP, tokenizer=without_mask)),
        "text",
        "has a tokenizer that does not say which tokens are padding",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_way_takes_no_single_token_is_refused(name: str, samples: list[Sample], tmp_path: Path) -> None:
    save, side, why = REFUSED[name]
    core = lilt.load(save(tmp_path)).core
    message = rf"the {side} side of '.*' {why}, so .*; expected a model whose sides pool by .*; give such a model, or"
    with pytest.raises(ValueError, match=message):
        embed_tokens(core, samples)
    assert evaluate_retrieval(core, samples)["num_images"] == 5


@pytest.mark.parametrize("model", [("hf", "clip"), ("open_clip", "clip")], ids="-".join, indirect=True)
@pytest.mark.parametrize("side", ["vision", "text"])
def test_a_way_that_is_not_the_models_own_is_refused(model: Model, samples: list[Sample], side: str) -> None:
    tower = getattr(model.core, side)
    assert tower.seam is not None
    tower.seam = tower.seam._replace(behind=())
    with pytest.raises(ValueError, match=f"the {side} side of '.*' {ANOTHER_WAY}"):
        embed_tokens(model.core, samples)


@pytest.mark.parametrize("model", [("hf", "clip"), ("open_clip", "coca")], ids="-".join, indirect=True)
def test_the_command_takes_the_score(model: Model, samples: list[Sample], tmp_path: Path, capsys: Any) -> None:
    records = [{"image": str(s.image), "captions": list(s.captions), "split": "test"} for s in samples]
    data = manifest(tmp_path / "data.jsonl", records)
    words = ["evaluate", model.core.vision.spec, f"--data={data}", "--workers=0", "--json"]
    assert main([*words, "--task=retrieval(score=late)", "--task=retrieval"]) == 0
    values = json.loads(capsys.readouterr().out)["tasks"]
    assert values["retrieval(score=late)"].keys() == values["retrieval"].keys()
    scores = slow(unit(model.text), unit(model.image))
    owner = torch.tensor([i for i, sample in enumerate(samples) for _ in sample.captions])
    right = 100 * (scores.argmax(1) == owner).double().mean().item()
    assert values["retrieval(score=late)"]["text_to_image/R@1"] == pytest.approx(right)
    assert values["retrieval"]["mean_recall"] == evaluate_retrieval(model.core, samples)["mean_recall"]


def test_a_text_is_worth_the_same_in_any_batch(saved: Callable[[str, str], str], samples: list[Sample]) -> None:
    core = lilt.load(saved("hf", "clip")).core
    one, all_ = (embed_tokens(core, samples, batch_size=size) for size in (1, 128))
    torch.testing.assert_close(one.text.rows, all_.text.rows, rtol=0, atol=1e-5)
    assert recalls(one, late) == recalls(all_, late)
