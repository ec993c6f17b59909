"""Packing writes whole shards only, the same bytes each time, and goes on where it was stopped."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from lilt.cli import main
from lilt.data import Sample, ShardSet, open_image, pack, read_manifest, select, shard_paths
from lilt.data.shard_index import beside, index_of


@pytest.fixture
def samples(pictures: Path) -> list[Sample]:
    return select(read_manifest(pictures / "manifest.jsonl"), "train")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def images(folder: Path) -> list[tuple[str, bytes]]:
    """Return name and bytes of each image, in order."""
    found = []
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as stream:
            for member in stream:
                if not member.name.endswith(".json"):
                    found.append((member.name, stream.extractfile(member).read()))  # type: ignore[union-attr]
    return found


def test_images_are_copied_byte_for_byte_under_keys_that_stay(samples: list[Sample], tmp_path: Path) -> None:
    done = pack(samples, tmp_path / "shards", per_shard=5)
    assert (done.shards, done.samples, done.bad) == (3, 12, [])
    assert done.pattern == str(tmp_path / "shards" / "{00000..00002}.tar")
    assert done.num_bytes == sum(f.stat().st_size for f in (tmp_path / "shards").glob("*.tar"))
    assert len(ShardSet(shard_paths(done.pattern))) == 12
    found = images(tmp_path / "shards")
    assert [name.partition(".")[0] for name, _ in found] == [f"{n:09d}" for n in range(12)]
    assert [image for _, image in found] == [Path(s.image).read_bytes() for s in samples]
    pack(samples, tmp_path / "other", per_shard=4)
    assert images(tmp_path / "other") == found


def test_the_same_samples_are_the_same_bytes(samples: list[Sample], tmp_path: Path) -> None:
    for name in ("one", "other"):
        pack(samples, tmp_path / name, per_shard=5, image_px=20)
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_image_px_makes_smaller_and_never_larger(tmp_path: Path) -> None:
    sizes = {"wide.png": (90, 60), "tall.jpg": (50, 200), "small.webp": (20, 30), "wide.webp": (64, 48)}
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 30, 40)).save(tmp_path / name)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (160, 80), (9, 99, 200)).save(tmp_path / "turned.jpg", exif=turned)
    names = [*sizes, "turned.jpg"]
    pack([Sample(tmp_path / n, ("a boat",), "train") for n in names], tmp_path / "shards", image_px=40)
    found = [(name, Image.open(io.BytesIO(data))) for name, data in images(tmp_path / "shards")]
    assert [(i.size, i.format) for _, i in found] == [
        ((60, 40), "PNG"), ((40, 160), "JPEG"), ((20, 30), "WEBP"), ((53, 40), "JPEG"), ((40, 80), "JPEG"),
    ]  # fmt: skip
    assert [name.partition(".")[2] for name, _ in found] == ["png", "jpg", "webp", "jpg", "jpg"]
    red, green, blue = open_image(io.BytesIO(images(tmp_path / "shards")[1][1])).getpixel((5, 5))  # type: ignore[misc]
    assert abs(red - 200) + abs(green - 30) + abs(blue - 40) < 12


def test_an_image_that_cannot_be_read_is_left_out_and_listed(samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "html.jpg").write_bytes(b"<html>404</html>")
    bad = [Sample(tmp_path / name, ("a boat",), "train") for name in ("missing.png", "html.jpg")]
    mixed = [*samples[:3], bad[0], *samples[3:6], bad[1], *samples[6:]]
    done = pack(mixed, tmp_path / "shards", per_shard=5)
    assert (done.shards, done.samples) == (3, 12)
    assert [name for name, _ in done.bad] == [str(s.image) for s in bad]
    lines = (tmp_path / "shards" / "bad_images.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"].partition(":")[0] for line in lines] == [
        "FileNotFoundError", "UnidentifiedImageError",
    ]  # fmt: skip
    kept = [i for i in range(14) if i not in (3, 7)]
    assert [name.partition(".")[0] for name, _ in images(tmp_path / "shards")] == [f"{n:09d}" for n in kept]
    assert "2 images could not be read and were left out" in done.report()
    assert pack(mixed, tmp_path / "shards", per_shard=5).bad == done.bad


def test_a_stopped_packing_keeps_whole_shards_and_goes_on(samples: list[Sample], tmp_path: Path) -> None:
    pack(samples, tmp_path / "whole", per_shard=5)

    seen = 0

    def stop(count: int) -> None:
        nonlocal seen
        seen += count
        if seen == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(samples, tmp_path / "parts", per_shard=5, advance=stop)
    assert set(content(tmp_path / "parts")) == {"00000.tar", "00000.tar.index", "shards.json"}
    with pytest.raises(ValueError, match=r"holds 1 .tar of 3; expected all of a set; finish packing"):
        shard_paths(str(tmp_path / "parts"))
    stamp = (tmp_path / "parts" / "00000.tar").stat().st_mtime_ns
    seen = 100
    pack(samples, tmp_path / "parts", per_shard=5, advance=stop)
    assert seen == 112
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert (tmp_path / "parts" / "00000.tar").stat().st_mtime_ns == stamp


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_what_a_killed_packing_leaves_is_whole(samples: list[Sample], tmp_path: Path) -> None:
    manifest, target = tmp_path / "many.jsonl", tmp_path / "shards"
    lines = [json.dumps({"image": f"./{'./' * n}{Path(s.image).name}", "captions": s.captions})
             for n in range(60) for s in samples]  # fmt: skip
    manifest.write_text("\n".join(lines))
    root = Path(samples[0].image).parent
    words = ["shards", f"--data={manifest}", f"--image_root={root}", f"--output={target}", "--per_shard=20"]
    with subprocess.Popen([sys.executable, "-m", "lilt", *words], stderr=subprocess.DEVNULL) as program:
        deadline = time.monotonic() + 200
        while not (target / "00002.tar").exists() and program.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(program.pid, signal.SIGKILL)
    tars = sorted(target.glob("*.tar"))
    assert 3 <= len(tars) < 36
    assert all(len(index_of(tar)) == 20 and not index_of(tar).torn and beside(tar).is_file() for tar in tars)
    assert main(words) == 0
    assert len(ShardSet(shard_paths(str(target)))) == 720
    assert not list(target.glob("*.tmp"))


def test_other_samples_or_settings_are_refused_or_replace_what_is_there(samples: list[Sample], tmp_path: Path) -> None:
    target = tmp_path / "shards"
    pack(samples, target, per_shard=2)
    before = content(target)
    others = {"per_shard": 2}, {"per_shard": 3}, {"per_shard": 2, "image_px": 9}
    for other, options in zip((samples[1:], samples, samples), others, strict=True):
        with pytest.raises(ValueError, match="already holds 6 shards of other samples or settings; nothing"):
            pack(other, target, **options)  # type: ignore[arg-type]
    assert content(target) == before
    pack(samples[1:], target, per_shard=6, overwrite=True)
    assert set(content(target)) == {"00000.tar", "00000.tar.index", "00001.tar", "00001.tar.index", "shards.json"}
    assert len(ShardSet(shard_paths(str(target)))) == 11


@pytest.mark.parametrize("overwrite", [True, False])
def test_tars_of_others_are_never_touched(samples: list[Sample], tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "00000.tar").write_bytes(b"theirs")
    with pytest.raises(ValueError, match=r"holds 1 .tar that lilt shards has not written, such as 00000.tar; expec"):
        pack(samples, tmp_path, overwrite=overwrite)
    assert content(tmp_path) == {"00000.tar": b"theirs"}


def test_tars_beside_the_shards_stay_when_they_are_replaced(samples: list[Sample], tmp_path: Path) -> None:
    pack(samples, tmp_path, per_shard=5)
    (tmp_path / "mine.tar").write_bytes(b"theirs")
    before = content(tmp_path)
    said = "holds 1 .tar that lilt shards has not written, such as mine.tar; expected none .* nothing was changed: move"
    with pytest.raises(ValueError, match=said):
        pack(samples, tmp_path, per_shard=6, overwrite=True)
    assert content(tmp_path) == before
    (tmp_path / "mine.tar").unlink()
    assert pack(samples, tmp_path, per_shard=6, overwrite=True).shards == 2


def test_shards_of_another_size_are_not_gone_on_with(samples: list[Sample], tmp_path: Path) -> None:
    pack(samples, tmp_path, per_shard=5)
    (tmp_path / "00002.tar").unlink()
    before = content(tmp_path)
    with pytest.raises(ValueError, match="already holds 2 shards of other samples or settings; nothing"):
        pack(samples, tmp_path, per_shard=4)  # as many shards; a third with two samples fewer would have fit
    assert content(tmp_path) == before


def test_the_samples_that_were_written_are_counted(samples: list[Sample], tmp_path: Path) -> None:
    bad = Sample(tmp_path / "missing.png", ("a boat",), "train")
    for _ in range(2):
        done = pack([*samples, bad, bad], tmp_path / "shards", per_shard=5)  # one image, of two samples
        assert (done.samples, len(done.bad)) == (12, 1)


@pytest.mark.parametrize("options", [{"per_shard": 0}, {"image_px": -1}])
def test_sizes_must_be_positive(samples: list[Sample], tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected more than 0; give a positive number"):
        pack(samples, tmp_path, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "shards"
    words = ["shards", f"--data={pictures / 'manifest.jsonl'}", f"--output={target}", "--per_shard=5"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "12 samples in 3 shards (0.0 MiB) are in" in said
    assert f"  lilt train --data '{target}/{{00000..00002}}.tar'" in said
    assert main([*words, "--split=val|test"]) == 2
    assert "already holds 3 shards of other samples" in " ".join(capsys.readouterr().err.split())
    assert main([*words, "--split=val|test", "--image_px=16", "--overwrite"]) == 0
    assert "12 samples in 3 shards" in capsys.readouterr().out
    assert main([*words, "--splt=val"]) == 2
    assert "unknown option 'splt'" in capsys.readouterr().err
    assert main(["shards", f"--data={target}", f"--output={tmp_path / 'again'}"]) == 2
    assert "is a set of shards, which is one split to train on" in " ".join(capsys.readouterr().err.split())
