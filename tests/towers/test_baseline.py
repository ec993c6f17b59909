"""A model with both sides gives in lilt what it gives in its own library, from the picture and the text on."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import lilt
from lilt import ImageContract
from tests.towers.families import SMALL, open_clip_arch
from tests.towers.joint_models import ALL, EMBED, HF, SAVE, TEXTS, VISION, pictures

every_model = pytest.mark.parametrize("model", ALL, ids="-".join, indirect=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Save each model once: (library, family) -> spec and folder."""
    made: dict[tuple[str, str], tuple[str, Path]] = {}

    def save(library: str, family: str) -> tuple[str, Path]:
        if (library, family) not in made:
            folder = tmp_path_factory.mktemp(f"{library}_{family}")
            made[library, family] = SAVE[library](family, folder), folder
        return made[library, family]

    return save


@pytest.fixture
def model(request: Any, saved: Any) -> tuple[lilt.DualEncoder, Tensor, Tensor]:
    """A loaded model, and unit rows of the pictures and of the texts as its library gives them."""
    library, family = request.param
    spec, folder = saved(library, family)
    return lilt.load(spec), *EMBED[library](family, folder, pictures(), TEXTS)


@every_model
def test_embeddings_are_those_of_the_library(model: tuple[lilt.DualEncoder, Tensor, Tensor]) -> None:
    loaded, images, texts = model
    found = loaded.embed(images=pictures(), texts=TEXTS)
    for rows, expected in ((found["image"], images), (found["text"], texts)):
        torch.testing.assert_close(rows, expected, rtol=0, atol=2e-6)
        between = (expected @ expected.T).fill_diagonal_(0)
        assert between.max() < 0.999, "the inputs look alike to this model, so equality would prove little"


@every_model
def test_what_a_text_is_batched_with_changes_nothing(model: tuple[lilt.DualEncoder, Tensor, Tensor]) -> None:
    loaded, _, texts = model
    alone = torch.cat([loaded.embed(texts=[text])["text"] for text in TEXTS])
    torch.testing.assert_close(alone, texts, rtol=0, atol=2e-6)


@every_model
def test_a_text_that_is_longer_than_the_context_is_counted(model: tuple[lilt.DualEncoder, Tensor, Tensor]) -> None:
    tokenizer: Any = model[0].core.text.contract
    assert tokenizer.encode(TEXTS)[1] == 1
    texts = [" ".join(["boat"] * count) for count in range(1, 30)]
    whole = getattr(tokenizer, "call", tokenizer)  # open_clip's tokenizers, or around a transformers one
    lengths = (
        [len(ids) for ids in whole.tokenizer(texts)["input_ids"]]
        if hasattr(whole, "tokenizer")
        else [2 + len(whole.encode(text)) for text in texts]
    )
    cut = [length > tokenizer.context_tokens for length in lengths]
    assert 0 < sum(cut) < len(texts)
    assert [tokenizer.encode([text])[1] for text in texts] == cut


@every_model
def test_each_side_is_its_own_part_of_the_model_and_is_frozen(
    model: tuple[lilt.DualEncoder, Tensor, Tensor], request: Any
) -> None:
    core = model[0].core
    depth = {"hf-align": 7, "open_clip-siglip": 6}.get(request.node.callspec.id, 2)
    weights = [{id(p) for p in tower.parameters()} for tower in (core.vision, core.text)]
    assert not weights[0] & weights[1]
    assert min(map(len, weights)) > 10
    assert not core.trained()
    assert (len(core.vision.blocks), len(core.text.blocks)) == (depth, 2)
    contract = core.vision.contract
    assert isinstance(contract, ImageContract)
    twin = pickle.loads(pickle.dumps(contract.transform))  # data workers of some systems get it this way
    assert torch.equal(twin(pictures(1)[0]), contract.transform(pictures(1)[0]))  # type: ignore[misc]


@every_model
def test_scale_and_bias_are_those_of_the_model(
    model: tuple[lilt.DualEncoder, Tensor, Tensor], request: Any, saved: Any
) -> None:
    core = model[0].core
    library, family = request.node.callspec.id.split("-")
    folder = saved(library, family)[1]
    own: Any = (
        hf.AutoModel.from_pretrained(folder) if library == "hf" else open_clip.create_model(f"local-dir:{folder}")
    )
    scale = 1 / own.temperature if family == "align" else own.logit_scale.exp()
    assert core.scale().item() == pytest.approx(scale.item())
    bias = getattr(own, "logit_bias", None)
    assert (core.bias is None) == (bias is None)
    assert model[0].config.loss == ("softmax" if bias is None else "sigmoid")
    if core.bias is not None and bias is not None:
        assert core.bias.item() == pytest.approx(bias.item())


def test_siglip_is_padded_to_its_context_and_clip_is_not(saved: Any) -> None:
    padding = {name: vars(lilt.load(saved("hf", name)[0]).core.text.contract)["padding"] for name in HF}
    padded = {name for name, how in padding.items() if how == "max_length"}
    assert padded == {"siglip", "siglip2", "siglip_masked"}


@pytest.mark.parametrize("library", ["hf", "open_clip"])
@pytest.mark.parametrize("pretrained", ["", "&pretrained=false"])
def test_a_file_of_weights_comes_in_place_of_the_models_own(
    library: str, pretrained: str, saved: Any, tmp_path: Path
) -> None:
    spec, folder = saved(library, "clip")
    name = "model.safetensors" if library == "hf" else "open_clip_model.safetensors"
    state = load_file(folder / name)
    save_file({k: v.flip(0).contiguous() if v.ndim > 1 else v for k, v in state.items()}, tmp_path / "w.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    SAVE[library]("clip", other)
    save_file(load_file(tmp_path / "w.safetensors"), other / name, metadata={"format": "pt"})
    images, texts = EMBED[library]("clip", other, pictures(), TEXTS)
    # open_clip's own folders bring their weights; an architecture takes a file
    what = spec if library == "hf" else f"open_clip:{registered(folder)}"
    loaded = lilt.load(f"{what}?weights={tmp_path / 'w.safetensors'}{pretrained}")
    found = loaded.embed(texts=TEXTS)
    torch.testing.assert_close(found["text"], texts, rtol=0, atol=2e-6)
    if library == "hf":
        torch.testing.assert_close(loaded.embed(images=pictures())["image"], images, rtol=0, atol=2e-6)


def registered(folder: Path) -> str:
    """Give open_clip the architecture of a folder under a name of its own."""
    config = open_clip.get_model_config(f"local-dir:{folder}")
    file = folder / "tiny-of-folder.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    return file.stem


TINY = open_clip_arch()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:vit_tiny_patch16_224", r"'timm:vit_tiny_patch16_224' has no text side; expected a model of images and"),
        ("py:a.b:c", r"'py:a.b:c' has no text side; expected .*hf:…, open_clip:….*; give one, or train this tower"),
        ("openclip:ViT-B-32@openai", r"unknown model 'openclip:ViT-B-32@openai'; .* Did you mean 'open_clip'\?"),
        ("open_clip:ViT-B32@openai", r"open_clip has no model 'ViT-B32'; expected .* Did you mean 'ViT-B-32'\?"),
        ("open_clip:ViT-B-32@opnai", r"has no weights 'opnai'; expected open_clip:ViT-B-32@TAG with one of .*openai"),
        (
            "open_clip:ViT-B-32",
            r"names no weights; expected open_clip:ViT-B-32@TAG .* or \?pretrained=false for random",
        ),
        (f"open_clip:{TINY}", r"names no weights; expected .* with one of no tags; give one, or \?weights=FILE"),
        (
            f"open_clip:{TINY}?pretrained=false&pool=cls",
            "pool would make another model of it; expected .*leave pool out",
        ),
        (f"open_clip:{TINY}?pretrained=false&px=3", "has no option 'px'; it takes: weights"),
        (f"open_clip:{TINY}?weights=no.pth", r"weights=no\.pth: no such file; expected a \.safetensors"),
        ("hf:no/such/folder", "transformers could not load the model 'no/such/folder': .*Expected a hub name or a"),
    ],
)
def test_a_wrong_spec_says_what_was_expected(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lilt.load(spec)


def test_a_tower_of_one_side_is_refused(hf_vit: str, bert: str) -> None:
    for spec, kind in ((hf_vit, "vit"), (bert, "bert")):
        message = (
            rf"{re.escape(spec)} \({kind}\) has one side alone; expected a model of images and texts, .*; give one"
        )
        with pytest.raises(ValueError, match=message):
            lilt.load(spec)


def test_a_model_that_sees_and_writes_but_embeds_no_text_is_refused(tmp_path: Path) -> None:
    text = {**SMALL, "num_key_value_heads": 1, "model_type": "llama"}
    config = hf.LlavaConfig(vision_config=VISION | {"model_type": "clip_vision_model"}, text_config=text)
    hf.AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"\(llava\) has no text side that embeds by itself; expected a model of images"
    ):
        lilt.load(f"hf:{tmp_path}")


def test_a_model_as_it_is_takes_no_settings_and_is_not_saved(saved: Any, tmp_path: Path) -> None:
    spec, _ = saved("hf", "clip")
    with pytest.raises(ValueError, match=r"policy came with the model '.*', which is taken as it is; expected"):
        lilt.load(spec, policy="full")
    with pytest.raises(ValueError, match=r"nothing is trained in this model of 'hf:.*; build or load it by its name"):
        lilt.load(spec).save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_whose_name_has_a_colon_is_a_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my:run").mkdir()
    with pytest.raises(ValueError, match=r"my:run holds no lilt checkpoint; expected lilt\.json"):
        lilt.load("my:run")
