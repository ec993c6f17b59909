"""The offline default: a generated image-caption set and two tiny towers, each pretrained on one modality only."""

from pathlib import Path

from lilt.demo.ceiling import bag_of_words_ceiling
from lilt.demo.generate import manifest
from lilt.demo.render import render
from lilt.demo.scenes import Scene, sample

__all__ = ["TEXT", "VISION", "Scene", "bag_of_words_ceiling", "manifest", "render", "sample"]

VISION = Path(__file__).parent / "towers" / "vision"
TEXT = Path(__file__).parent / "towers" / "text"
