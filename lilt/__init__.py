"""Turn a vision and a language model you already have into a CLIP-like dual encoder by training few parameters."""

from __future__ import annotations

from lilt.config import ModelConfig, TrainConfig
from lilt.dual import DualEncoder, load
from lilt.towers import ImageContract

__version__ = "0.1.0"
__all__ = ["DualEncoder", "ImageContract", "ModelConfig", "TrainConfig", "__version__", "load"]
