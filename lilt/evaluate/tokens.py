"""The tokens of a split in the joint space, each by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lilt import distributed
from lilt.data import Sample, TokenTable
from lilt.evaluate.embed import Embedded, distinct, owners
from lilt.evaluate.late import Bags
from lilt.evaluate.rows import Advance, at_rest, image_rows
from lilt.model import TwoTower
from lilt.towers import ImageContract, Inputs, Tower
from lilt.towers.space import Space, find_space


def embed_tokens(
    model: TwoTower,
    samples: Sequence[Sample],
    *,
    batch_size: int = 128,
    max_tokens: int | None = None,
    workers: int = 0,
    advance: Advance = lambda count: None,
    advance_texts: Advance = lambda count: None,
) -> Embedded[Bags]:
    """Embed the tokens of a split: each image and each distinct caption once, on all ranks.

    They are kept in fp32 on the CPU, 4 T D bytes: 1.0 GB for 5,000 images of 197 tokens at D = 256, 0.4 GB for 25,000
    captions of 15. Raises ValueError for a model whose heads, or an off-the-shelf model whose own way into the joint
    space, cannot take a token, with the reason (`lilt.towers.space` runs it to know).
    """
    contract = model.vision.contract
    assert isinstance(contract, ImageContract)
    spaces = {tower.side: token_space(model, tower) for tower in (model.vision, model.text)}

    def see(images: Tensor, _: Tensor) -> Tensor:
        vectors, counted = token_vectors(model, model.vision, spaces["vision"], images)
        return vectors[:, counted[0]]  # no image is padded

    texts = distinct(samples)
    with at_rest(model) as device:
        options = {"batch_size": batch_size, "workers": workers}
        images = image_rows(contract, [str(s.image) for s in samples], see, device, advance=advance, **options)  # type: ignore[arg-type]
        bags, cut = _read(model, texts, spaces["text"], device, batch_size, max_tokens, advance_texts)
    sizes = torch.full((len(images.rows),), images.rows.shape[1])
    owner, which = owners(samples, images.which, texts)
    seen = Bags.of(images.rows.flatten(0, 1), sizes)
    return Embedded(seen, bags[which], owner, len(samples), images.faults, cut)


def token_space(model: TwoTower, tower: Tower) -> Space:
    """Return what the heads behind a tower take its tokens for; of an off-the-shelf model these are its own."""
    if model.projection.reads_tokens:
        return Space("mean")
    if model.shared.reads_tokens:
        return Space(model.shared.pool)
    return find_space(tower)


def token_vectors(model: TwoTower, tower: Tower, space: Space, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return unit vectors (B, L, D) of all tokens, and which of them count (B, L).

    A token goes where pooled features go: through the tower's final norm, the shared encoder and the projection, or
    what an off-the-shelf model has in their place. Of the tokens that lead without content, the class token counts
    where the model pools by it, registers never do.
    """
    encoded = tower.encode(inputs, tokens=True)
    assert encoded.tokens is not None
    behind = model.shared(encoded._replace(tokens=space.bring(encoded.tokens)), tower.side)
    vectors = F.normalize(model.projection.project_tokens(behind, tower.side).float(), dim=-1)
    features, mask, prefix = encoded.tokens
    counted = torch.ones(features.shape[:2], dtype=torch.bool, device=vectors.device) if mask is None else mask.clone()
    counted[:, int(space.how == "cls") : prefix] = False
    return vectors, counted


def _read(
    model: TwoTower,
    texts: Sequence[str],
    space: Space,
    device: torch.device,
    batch_size: int,
    most: int | None,
    advance: Advance,
) -> tuple[Bags, int]:
    """Return the tokens of texts, and how many texts were cut; padding is not kept."""
    tokenizer = model.text.contract
    assert not isinstance(tokenizer, ImageContract)
    table = TokenTable(texts, tokenizer, most)
    order = torch.argsort(table.offsets.diff(), stable=True)[distributed.rank() :: distributed.world_size()]
    pieces: list[tuple[Tensor, Tensor]] = []
    for chunk in order.split(batch_size) if len(order) else ():
        tokens = tokenizer.pad([table[int(i)] for i in chunk])
        vectors, counted = token_vectors(model, model.text, space, {k: v.to(device) for k, v in tokens.items()})
        pieces.append((vectors[counted].cpu(), counted.sum(1).cpu()))
        advance(len(chunk))
    shares = distributed.gather_objects((order, pieces))
    every = [piece for _, share in shares for piece in share]
    numbers = torch.cat([order for order, _ in shares])
    rows, sizes = (torch.cat(column) for column in zip(*every, strict=True))
    return Bags.of(rows, sizes)[numbers.argsort()], table.cut
