"""The pages in a real browser, where one is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lilt.cli import main
from lilt.report.page import PARTS
from tests.report.dom import Node, read

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")


def browse(file: Path, profile: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Open a file in a browser without a window, that can reach nothing; what its console says goes to stderr."""
    assert BROWSER is not None
    # a sandbox cannot be had by root, nor in many containers; the page is ours
    plain = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-first-run",
    ]
    shut = ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}"]
    command = [BROWSER, *plain, *shut, *words, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def comparison(run: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pages") / "runs.html"
    assert main(["compare", str(run), str(other), f"--html={file}"]) == 0
    return file


def shape(node: Node) -> list[str]:
    """The elements of a tree in order, without those that a browser puts in by itself."""
    return [child.tag for child in node.walk() if child.tag not in ("tbody", "colgroup")]


@pytest.mark.parametrize("which", ["written", "comparison"])
def test_a_browser_reads_what_was_written(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    file = request.getfixturevalue(which)
    done = browse(file, tmp_path / "profile", "--dump-dom")
    # nothing in the page breaks its own rule to fetch nothing and to run nothing
    assert "CONSOLE" not in done.stderr and "Content Security Policy" not in done.stderr
    seen, meant = read("<!doctype html>\n" + done.stdout.partition(">")[2]), read(file.read_text(encoding="utf-8"))
    assert shape(seen) == shape(meant)
    if which == "written":
        assert [section.attributes["id"] for section in seen.all("section")] == list(PARTS)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (400, False)])
def test_a_browser_shows_it(written: Path, width: int, dark: bool, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    more = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(written, tmp_path / "profile", f"--screenshot={picture}", f"--window-size={width},9000", *more)
    with Image.open(picture) as shot:
        found: Any = shot.convert("RGB").getcolors(2**24)
    colours = {colour: count for count, colour in found}
    paper = max(colours, key=lambda colour: colours[colour])
    assert paper == ((0x14, 0x17, 0x1D) if dark else (0xFF, 0xFF, 0xFF))
    # pictures, charts in their own colours, and the red of a wrong answer
    assert len(colours) > 500
    series = (0x56, 0xA8, 0xE0) if dark else (0x00, 0x72, 0xB2)
    bad = (0xFF, 0x8F, 0x86) if dark else (0xB3, 0x26, 0x1E)
    assert colours.get(series, 0) > 500 and colours.get(bad, 0) > 100
