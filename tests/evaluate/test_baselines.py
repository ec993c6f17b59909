"""Off-the-shelf models go through the same evaluator as runs, and their recalls are those of CLIP_benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

import lilt
from lilt.cli import main
from lilt.data import Sample, read_manifest, select
from lilt.evaluate import Setting, evaluate_retrieval, parse_task
from tests.evaluate.conftest import BY_NAME, manifest
from tests.towers.families import WORDS
from tests.towers.joint_models import ALL, EMBED, SAVE, pictures

COUNT = 17


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 17 pictures with one to three captions each, all of them different."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    said: set[str] = set()
    records = []
    for number, picture in enumerate(pictures(COUNT)):
        picture.save(folder / f"{number}.png")
        captions: list[str] = []
        while len(captions) < 1 + number % 3:
            words = [WORDS[i] for i in torch.randint(len(WORDS), (2 + number % 6,), generator=generator).tolist()]
            if (caption := " ".join(words)) not in said:
                said.add(caption)
                captions.append(caption)
        records.append({"image": f"{number}.png", "captions": captions, "split": "test"})
    manifest(folder / "data.jsonl", records)
    return folder / "data.jsonl"


@pytest.fixture(scope="module")
def samples(data: Path) -> list[Sample]:
    return select(read_manifest(data), "test")


@pytest.fixture
def model(request: Any, tmp_path: Path) -> tuple[str, Path]:
    """The spec of a saved model and its folder."""
    library, family = request.param
    return SAVE[library](family, tmp_path), tmp_path


def recalls(image: Tensor, text: Tensor, owner: list[int]) -> dict[str, float]:
    """Recalls as CLIP_benchmark defines them, one query at a time: is a right answer among the k that score highest?"""
    scores = [[sum(a * b for a, b in zip(t, i, strict=True)) for i in image.tolist()] for t in text.tolist()]
    found = {}
    for k in (1, 5, 10):
        best = [sorted(range(len(image)), key=lambda i, row=row: -row[i])[:k] for row in scores]  # type: ignore[misc]
        found[f"text_to_image/R@{k}"] = 100 * sum(o in top for o, top in zip(owner, best, strict=True)) / len(text)
        hits = 0
        for i in range(len(image)):
            top = sorted(range(len(text)), key=lambda t, i=i: -scores[t][i])[:k]  # type: ignore[misc]
            hits += any(owner[t] == i for t in top)
        found[f"image_to_text/R@{k}"] = 100 * hits / len(image)
    return found


@pytest.mark.parametrize("model", ALL, ids="-".join, indirect=True)
def test_recalls_are_those_of_the_librarys_embeddings(
    model: tuple[str, Path], samples: list[Sample], request: Any
) -> None:
    spec, folder = model
    library, family = request.node.callspec.id.split("-")
    shown: list[Image.Image] = [Image.open(sample.image) for sample in samples]
    texts = [caption for sample in samples for caption in sample.captions]
    owner = [i for i, sample in enumerate(samples) for _ in sample.captions]
    images, rows = EMBED[library](family, folder, shown, texts)
    expected = recalls(images.double(), rows.double(), owner)
    result = evaluate_retrieval(lilt.load(spec).core, samples, batch_size=5)
    for name, value in expected.items():
        side, _, metric = name.partition("/")
        assert result[side][metric] == pytest.approx(value), name
    assert result["mean_recall"] == pytest.approx(sum(expected.values()) / 6)
    assert 0 < result["mean_recall"] < 100
    assert (result["num_images"], result["num_captions"]) == (COUNT, len(texts))
    assert result["num_cut_captions"] == 0


@pytest.mark.parametrize("model", [pair for pair in ALL if pair[0] == "open_clip"], ids="-".join, indirect=True)
def test_recalls_are_those_that_clip_benchmark_prints(model: tuple[str, Path], samples: list[Sample]) -> None:
    reference = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    spec, folder = model
    own, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    shown = [(transform(Image.open(sample.image)), list(sample.captions)) for sample in samples]
    batches = [
        (torch.stack([image for image, _ in part]), [captions for _, captions in part])
        for part in (shown[i : i + 5] for i in range(0, len(shown), 5))
    ]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    expected = reference.evaluate(own.eval(), batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    result = evaluate_retrieval(lilt.load(spec).core, samples, batch_size=4)
    names = {"image_retrieval": "text_to_image", "text_retrieval": "image_to_text"}
    for name, side in names.items():
        for k in (1, 5, 10):
            assert result[side][f"R@{k}"] == pytest.approx(100 * expected[f"{name}_recall@{k}"], abs=1e-4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return SAVE["hf"]("clip", tmp_path_factory.mktemp("clip"))


def test_the_command_takes_a_model_for_a_run(clip: str, samples: list[Sample], data: Path, capsys: Any) -> None:
    expected = evaluate_retrieval(lilt.load(clip).core, samples)
    words = ["evaluate", clip, f"--data={data}", "--workers=0", "--batch_size=5"]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    found = json.loads(printed)
    of = found.pop("of")
    assert found == expected
    total = sum(parameter.numel() for parameter in lilt.load(clip).core.parameters())
    assert of == {
        "model": clip, "policy": None, "trained": 0, "total": total, "adapter_bytes": 0, "data": str(data),
        "split": "test",
    }  # fmt: skip
    assert main(words) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert f"{expected['mean_recall']:.2f}" in table
    assert main([*words, "--json", "--task=retrieval", "--task=moved", "--task=drift(samples=6)"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == clip
    assert found["tasks"]["retrieval"]["mean_recall"] == pytest.approx(expected["mean_recall"])
    moved, drift = found["tasks"]["moved"], found["tasks"]["drift(samples=6)"]
    assert moved == {"num_vision_added": 0, "num_text_added": 0}
    assert all(value == pytest.approx(1) for name, value in drift.items() if not name.startswith("num_"))


def test_the_command_says_what_is_missing(clip: str, data: Path, capsys: Any) -> None:
    for argv, message in (
        ([clip], "does not say which data it was trained on; name a manifest with --data"),
        (["opnclip:RN50", f"--data={data}"], "unknown model 'opnclip:RN50'; expected the folder of a run, or"),
        (["timm:vit_tiny_patch16_224", f"--data={data}"], "has no text side; expected a model of images and texts"),
    ):
        assert main(["evaluate", *argv, "--workers=0"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert message in said
        assert "Traceback" not in said


def test_tasks_on_its_towers_read_its_joint_vectors(clip: str, pictures: Path) -> None:
    loaded = lilt.load(clip)
    setting = Setting(str(pictures / "manifest.jsonl"), str(pictures), batch_size=5)
    kept = dict(parse_task(f"conserve(knn(k=3,{BY_NAME}))")(loaded, setting))
    assert kept["knn/top1/before"] == kept["knn/top1/after"]
    seen = dict(parse_task(f"zeroshot({BY_NAME})")(loaded, setting))
    assert seen["num_classes"] == 6
    assert 0 <= seen["top1"] <= 100


def test_files_are_read_in_data_workers_too(clip: str, samples: list[Sample]) -> None:
    core = lilt.load(clip).core
    assert evaluate_retrieval(core, samples, workers=2) == evaluate_retrieval(core, samples)
