"""Words for zero-shot classification that come with open_clip: the published prompt templates and class names."""

from __future__ import annotations

import open_clip


def imagenet_templates() -> tuple[str, ...]:
    """Return the 80 templates of OpenAI's ImageNet ensemble, `{}` where the class name goes.

    Source: Radford et al. 2021, github.com/openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb.
    """
    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


def imagenet_classes() -> tuple[str, ...]:
    """Return OpenAI's names of the 1,000 ImageNet classes, in their order."""
    return tuple(open_clip.IMAGENET_CLASSNAMES)
