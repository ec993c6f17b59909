"""How far a reader gets who sees the words of a caption but not their order."""

from collections import Counter
from collections.abc import Iterator, Sequence

from lilt.demo.lexicon import ATTRIBUTE_OF, RELATION_OF, words

# a relation may be told from either side ("a left of b" = "b right of a"), so its direction word tells the axis only
AXIS_OF = {
    "left of": "beside",
    "right of": "beside",
    "above": "stacked",
    "below": "stacked",
    "inside": "nested",
    "around": "nested",
}


def bag(caption: str) -> Counter[str]:
    """The concepts a caption names, with synonyms resolved and counted; the axis of a relation counts once."""
    said = words(caption)
    attributes = Counter(ATTRIBUTE_OF[word] for word in said if word in ATTRIBUTE_OF)
    axes = {AXIS_OF[RELATION_OF[word]] for word in said if word in RELATION_OF}
    return attributes + Counter(axes)


def bag_of_words_ceiling(captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """The R@1 in percent that an ideal reader of bags of concepts reaches in expectation, in both directions.

    captions holds the captions of every image of a split. The reader knows all that the captions of an image say of
    it (per concept the largest count among them) and takes an image for possible when it holds the caption's bag;
    among k possible images every one is as likely. So text->image scores 1/k per caption. Image->text ranks first
    a caption that speaks for the image most clearly, that is with the smallest k, and scores 1/k of that one.
    Returns "text_to_image" and "image_to_text".
    Raises ValueError when a caption holds no word of the demo's lexicon.
    """
    counted = [[_known(caption) for caption in of_image] for of_image in captions]
    # as sets of (concept, how often), in which "holds" is a plain subset and a hundred times faster
    images = [frozenset(_each(_union(of_image))) for of_image in counted]
    bags = [[frozenset(_each(one)) for one in of_image] for of_image in counted]
    possible = [[[held for held, facts in enumerate(images) if one <= facts] for one in of_image] for of_image in bags]
    text_to_image = [1 / len(ks) for of_image in possible for ks in of_image]
    clearest = [0.0] * len(images)
    for of_image in possible:
        for ks in of_image:
            for held in ks:
                clearest[held] = max(clearest[held], 1 / len(ks))
    return {
        "text_to_image": 100 * sum(text_to_image) / len(text_to_image),
        "image_to_text": 100 * sum(clearest) / len(clearest),
    }


def _known(caption: str) -> Counter[str]:
    found = bag(caption)
    if not found:
        raise ValueError(
            f"the caption {caption!r} has no word of the demo's lexicon; the bag-of-words ceiling is defined for "
            "captions of the demo set only: leave it out for other manifests"
        )
    return found


def _each(bag: Counter[str]) -> Iterator[tuple[str, int]]:
    return ((concept, k) for concept, count in bag.items() for k in range(count))


def _union(bags: Sequence[Counter[str]]) -> Counter[str]:
    facts: Counter[str] = Counter()
    for one in bags:
        facts |= one
    return facts
