"""Draw a scene with Pillow: drawn large and averaged down, on a background that no two scenes share."""

import math
import random

from PIL import Image, ImageChops, ImageDraw

from lilt.demo.scenes import IMAGE_PX, RADIUS_PX, Scene, Thing

SUPERSAMPLING = 4
CANVAS_PX = IMAGE_PX * SUPERSAMPLING

# colour -> its RGB and the RGB of its stripes and dots
RGB: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((214, 38, 38), (255, 176, 170)),
    "green": ((40, 160, 62), (178, 240, 180)),
    "blue": ((42, 84, 214), (172, 200, 255)),
    "yellow": ((244, 214, 42), (150, 116, 0)),
    "purple": ((138, 46, 176), (226, 176, 246)),
    "orange": ((245, 132, 24), (138, 62, 0)),
    "white": ((246, 246, 242), (120, 120, 128)),
    "black": ((22, 22, 26), (150, 150, 158)),
}


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of IMAGE_PX square; the same scene gives the same pixels."""
    rng = random.Random(scene.seed)
    canvas = _background(rng)
    # the largest first: what is inside must lie on top
    for thing in sorted(scene.things, key=lambda thing: -RADIUS_PX[thing.size]):
        _draw(canvas, thing, rng)
    return canvas.reduce(SUPERSAMPLING)


def _background(rng: random.Random) -> Image.Image:
    """Soft grey clouds with a slight tint: mid-greys, so that black and white things both stand out."""
    base, spread = rng.randint(105, 165), rng.randint(6, 22)
    clouds = Image.frombytes("L", (5, 5), rng.randbytes(25)).resize((CANVAS_PX, CANVAS_PX), Image.Resampling.BICUBIC)
    tints = [base + rng.randint(-12, 12) for _ in range(3)]
    ramps = [[round(tint + spread * (level / 127.5 - 1)) for level in range(256)] for tint in tints]
    return Image.merge("RGB", [clouds.point(ramp) for ramp in ramps])


def _draw(canvas: Image.Image, thing: Thing, rng: random.Random) -> None:
    radius = RADIUS_PX[thing.size] * rng.uniform(0.94, 1.06) * SUPERSAMPLING
    tilt = math.radians(rng.uniform(-8, 8))
    half = round(radius * 1.25)  # no outline reaches further
    mask = Image.new("L", (2 * half, 2 * half))
    if thing.shape == "circle":
        ImageDraw.Draw(mask).ellipse([round(half - radius)] * 2 + [round(half + radius)] * 2, 255)
    else:
        corners = [(math.cos(turn + tilt) * far, math.sin(turn + tilt) * far) for turn, far in _outline(thing.shape)]
        ImageDraw.Draw(mask).polygon(
            [(round(half + radius * dx), round(half + radius * dy)) for dx, dy in corners], 255
        )
    body, marks = (_jitter(rgb, rng) for rgb in RGB[thing.colour])
    corner = (round(thing.x * SUPERSAMPLING) - half, round(thing.y * SUPERSAMPLING) - half)
    canvas.paste(body, corner, mask)
    if thing.texture != "solid":
        canvas.paste(marks, corner, ImageChops.darker(mask, _marks(thing.texture, 2 * half, rng)))


def _outline(shape: str) -> list[tuple[float, float]]:
    """The corners as (angle in radians clockwise from the right, distance as a share of the radius)."""
    up = -math.pi / 2
    if shape == "square":
        return [(up + math.pi * (k / 2 + 1 / 4), 1.1) for k in range(4)]
    if shape == "triangle":
        return [(up + math.tau * k / 3, 1.15) for k in range(3)]
    if shape == "diamond":
        return [(up + math.tau * k / 4, (1.2, 0.75)[k % 2]) for k in range(4)]
    if shape == "star":
        return [(up + math.tau * k / 10, (1.2, 0.5)[k % 2]) for k in range(10)]
    half, arm = 0.36, 1.05  # a cross: twelve corners, given by half the width and the length of its arms
    quarter = [(arm, -half), (arm, half), (half, half)]
    return [(math.atan2(dy, dx) + math.pi / 2 * turn, math.hypot(dx, dy)) for turn in range(4) for dx, dy in quarter]


def _marks(texture: str, side: int, rng: random.Random) -> Image.Image:
    """Stripes or dots over a square of `side` px, from a random offset."""
    marks = Image.new("L", (side, side))
    draw = ImageDraw.Draw(marks)
    step = round(5.5 * SUPERSAMPLING)
    offset = rng.randrange(step)
    if texture == "striped":
        for start in range(offset - side, side, step):
            draw.line([(start, 0), (start + side, side)], 255, round(1.7 * SUPERSAMPLING))
        return marks
    dot = round(1.35 * SUPERSAMPLING)
    for row, y in enumerate(range(offset, side + step, step)):
        for x in range(offset - step + row % 2 * step // 2, side + step, step):
            draw.ellipse([x - dot, y - dot, x + dot, y + dot], 255)
    return marks


def _jitter(rgb: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, level + rng.randint(-10, 10))) for level in rgb)
    return red, green, blue
