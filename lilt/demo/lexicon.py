"""The words of the demo set: every concept with its synonyms, and the way back from a word to its concept."""

# every word belongs to one concept only, so that reading a caption back needs no grammar
SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "disk"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge", "pyramid"),
    "diamond": ("diamond", "rhombus", "lozenge"),
    "star": ("star", "pentagram", "asterisk"),
    "cross": ("cross", "plus", "crosslet"),
}
COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald", "verdant"),
    "blue": ("blue", "azure", "navy"),
    "yellow": ("yellow", "golden", "lemon"),
    "purple": ("purple", "violet", "lilac"),
    "orange": ("orange", "tangerine", "amber"),
    "white": ("white", "ivory", "snowy"),
    "black": ("black", "ebony", "inky"),
}
SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "sizeable"),
    "huge": ("huge", "giant", "enormous"),
}
TEXTURES: dict[str, tuple[str, ...]] = {
    "solid": ("solid", "plain", "uniform"),
    "striped": ("striped", "stripy", "banded"),
    "dotted": ("dotted", "spotted", "speckled"),
}

# relation -> (how it is said before a thing, how it is said of "it")
RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "left of": (("left of", "to the left of", "on the left of"), ("to its left", "on its left")),
    "right of": (("right of", "to the right of", "on the right of"), ("to its right", "on its right")),
    "above": (("above", "over", "higher than"), ("above it", "over it")),
    "below": (("below", "under", "beneath"), ("below it", "beneath it")),
    "inside": (("inside", "within"), ("inside it", "within it")),
    "around": (("around", "enclosing", "surrounding"), ("around it", "surrounding it")),
}
INVERSE: dict[str, str] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "inside": "around",
    "around": "inside",
}

ATTRIBUTE_OF: dict[str, str] = {
    word: concept
    for table in (SHAPES, COLOURS, SIZES, TEXTURES)
    for concept, synonyms in table.items()
    for word in synonyms
}
RELATION_OF: dict[str, str] = {
    "left": "left of",
    "right": "right of",
    "above": "above",
    "over": "above",
    "higher": "above",
    "below": "below",
    "under": "below",
    "beneath": "below",
    "inside": "inside",
    "within": "inside",
    "around": "around",
    "enclosing": "around",
    "surrounding": "around",
}


def words(caption: str) -> list[str]:
    """The lower-case words of a caption without punctuation, in order."""
    return "".join(letter if letter.isalnum() else " " for letter in caption.lower()).split()
