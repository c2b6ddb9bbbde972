"""How the generated scenes are drawn: five background textures, six objects, and the light they share.

Colours are float32 RGB in [0, 1]. An object is drawn in a frame of its own, in which its outline fits the unit circle;
an outline is a signed distance (negative inside), so that its edge is antialiased and its area exact at any size.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Floats = NDArray[np.floating]
Size = tuple[int, int]

LIGHT = np.array([-0.48, -0.60, 0.64], dtype=np.float32)  # towards the lamp: x right, y down, z to the viewer
SHADOW = 0.30  # how much light the middle of a shadow loses


@dataclass(frozen=True, slots=True)
class Frame:
    """A window of the picture as an object sees it.

    `window` are the window's rows and columns; `x`, `y` are the coordinates of its pixels from the object's centre in
    radii, `u`, `v` the same turned by the object's own rotation; `radius` in pixels.
    """

    window: tuple[slice, slice]
    x: Floats
    y: Floats
    u: Floats
    v: Floats
    radius: float


def make_frame(size: Size, y: float, x: float, radius: float, angle: float) -> Frame:
    """The frame of an object at (y, x) with a radius, all in pixels, turned by `angle` radians, cut to the picture."""
    reach = radius * 1.5 + 2
    top, left = max(int(y - reach), 0), max(int(x - reach), 0)
    bottom, right = min(int(y + reach) + 1, size[0]), min(int(x + reach) + 1, size[1])
    rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32)
    dy, dx = (rows + 0.5 - y) / radius, (columns + 0.5 - x) / radius
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    window = (slice(top, bottom), slice(left, right))
    return Frame(window, dx, dy, cos * dx + sin * dy, cos * dy - sin * dx, radius)


def draw_object(
    rng: np.random.Generator, canvas: Floats, kind: str, frame: Frame, *, shadow: bool
) -> NDArray[np.bool_]:
    """Draw an object of a kind of OBJECTS onto `canvas` (h, w, 3), in place; which pixels of its window it covers."""
    distance, colour = OBJECTS[kind](rng, frame)
    coverage = np.clip(0.5 - distance * frame.radius, 0, 1).astype(np.float32)
    patch = canvas[frame.window]
    if shadow:
        patch *= 1 - SHADOW * _shadow(coverage, frame.radius)[..., None]
    brightness = np.float32(rng.uniform(0.88, 1.08))
    patch += coverage[..., None] * (np.clip(colour * brightness, 0, 1) - patch)
    return coverage >= 0.5


def expose(rng: np.random.Generator, canvas: Floats) -> NDArray[np.uint8]:
    """The picture a camera takes of a (h, w, 3) canvas: light falls off to one side, the sensor adds noise."""
    height, width = canvas.shape[:2]
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.02, 0.09)
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    columns = np.linspace(-1, 1, width, dtype=np.float32)[None] * np.float32(np.cos(angle))
    light = 1 + np.float32(strength) * (rows + columns)
    tint = rng.uniform(0.97, 1.03, size=3).astype(np.float32)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(0.008, 0.02))
    return (np.clip(canvas * light[..., None] * tint + noise, 0, 1) * 255 + 0.5).astype(np.uint8)


def _colour(hue: float, saturation: float, value: float) -> Floats:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, min(saturation, 1.0), min(value, 1.0)), dtype=np.float32)


def _mix(first: Floats, second: Floats, weight: Floats) -> Floats:
    """(..., 3) from `first` at weight 0 to `second` at weight 1."""
    share = np.asarray(weight, dtype=np.float32)[..., None]
    return first * (1 - share) + second * share


def _ramp(value: Floats, low: float, high: float) -> Floats:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _noise(rng: np.random.Generator, size: Size, cell: tuple[float, float]) -> Floats:
    """Smooth noise of about unit variance with features of `cell` (height, width) pixels."""
    grid = (int(size[0] / cell[0]) + 3, int(size[1] / cell[1]) + 3)
    image = Image.fromarray(rng.standard_normal(grid, dtype=np.float32))
    box = (0.0, 0.0, min(size[1] / cell[1] + 1, grid[1]), min(size[0] / cell[0] + 1, grid[0]))
    smooth = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))
    return np.asarray(smooth * np.float32(1.6 if min(cell) > 1 else 1.0), dtype=np.float32)


def _shadow(coverage: Floats, radius: float) -> Floats:
    """A soft copy of an outline, moved away from the lamp."""
    grey = Image.fromarray((coverage * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius * 0.10))
    shift = max(round(radius * 0.11), 1)
    moved = np.zeros_like(coverage)
    moved[shift:, shift:] = np.asarray(grey, dtype=np.float32)[:-shift, :-shift] / 255
    return moved


def _grass(rng: np.random.Generator, size: Size) -> Floats:
    patches = _noise(rng, size, (size[0] / 4, size[1] / 4))
    blades = _noise(rng, size, (7, 1.8)) + 0.6 * _noise(rng, size, (12, 3))
    hue = rng.uniform(0.24, 0.32)
    dark, bright = _colour(hue + 0.03, 0.75, 0.22), _colour(hue - 0.03, 0.68, 0.62)
    return _mix(dark, bright, np.clip(0.42 + 0.17 * blades + 0.03 * patches, 0, 1))


def _water(rng: np.random.Generator, size: Size) -> Floats:
    rows = np.arange(size[0], dtype=np.float32)[:, None]
    warp = 1.3 * _noise(rng, size, (14, 36)) + 0.5 * _noise(rng, size, (5, 14))
    wave = np.sin(rows * np.float32(2 * np.pi / rng.uniform(8, 11)) + warp)
    hue = rng.uniform(0.52, 0.58)
    body = _mix(_colour(hue + 0.02, 0.80, 0.34), _colour(hue, 0.62, 0.62), 0.5 + 0.4 * wave)
    return _mix(body, _colour(hue, 0.12, 0.93), 0.6 * _ramp(wave + 0.25 * _noise(rng, size, (3, 9)), 0.85, 1.2))


def _sand(rng: np.random.Generator, size: Size) -> Floats:
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
    turn, period = rng.uniform(-0.5, 0.5), rng.uniform(11, 17)
    phase = (rows * np.cos(turn) + columns * np.sin(turn)) * (2 * np.pi / period)
    ripples = np.sin(phase.astype(np.float32) + 1.1 * _noise(rng, size, (24, 40)))
    grain = rng.standard_normal(size, dtype=np.float32)
    hue = rng.uniform(0.09, 0.12)
    dark, bright = _colour(hue - 0.01, 0.46, 0.56), _colour(hue, 0.30, 0.92)
    return _mix(dark, bright, np.clip(0.55 + 0.10 * ripples + 0.13 * grain, 0, 1))


def _bricks(rng: np.random.Generator, size: Size) -> Floats:
    tall = rng.uniform(11, 14)
    wide = tall * 2.3
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
    rows += np.float32(rng.uniform(0, tall))
    course = np.floor(rows / tall).astype(np.int64)
    columns += (course % 2) * np.float32(wide / 2) + np.float32(rng.uniform(0, wide))
    column = np.floor(columns / wide).astype(np.int64)
    tone = rng.uniform(-1, 1, size=(course.max() + 1, column.max() + 1)).astype(np.float32)[course, column]
    edge = np.minimum(np.minimum(rows % tall, tall - rows % tall), np.minimum(columns % wide, wide - columns % wide))
    rough = _noise(rng, size, (2.5, 2.5))
    hue = rng.uniform(0.015, 0.045)
    dark, bright = _colour(hue, 0.62, 0.36), _colour(hue + 0.01, 0.50, 0.68)
    brick = _mix(dark, bright, np.clip(0.5 + 0.16 * tone + 0.12 * rough, 0, 1))
    mortar = _colour(0.08, 0.16, 0.62) * (1 + 0.05 * rough[..., None])
    return _mix(mortar, brick, _ramp(edge, 0.4, 1.6))


def _sky(rng: np.random.Generator, size: Size) -> Floats:
    down = np.linspace(0, 1, size[0], dtype=np.float32)[:, None] * np.ones((1, size[1]), dtype=np.float32)
    hue = rng.uniform(0.56, 0.61)
    clear = _mix(_colour(hue, 0.58, 0.84), _colour(hue - 0.02, 0.36, 0.93), down)
    shape = sum(_noise(rng, size, (size[0] / n, size[1] / n * 1.8)) * (2.0 / n) for n in (2, 5, 11, 24))
    cover = _ramp(np.asarray(shape, dtype=np.float32), -0.4, 2.6)
    return _mix(clear, _colour(0.6, 0.03, 0.98), 0.55 * cover)


def _lit(normal_x: Floats, normal_y: Floats, normal_z: Floats) -> Floats:
    """Diffuse light in [0.35, 1] on a surface with this normal."""
    facing = normal_x * LIGHT[0] + normal_y * LIGHT[1] + normal_z * LIGHT[2]
    return 0.35 + 0.65 * np.clip(facing, 0, 1)


def _gloss(normal_x: Floats, normal_y: Floats, normal_z: Floats, sharpness: float) -> Floats:
    """Highlight in [0, 1]: how well the normal halves the angle between lamp and viewer."""
    half = (LIGHT + np.array([0, 0, 1], dtype=np.float32)) / np.linalg.norm(LIGHT + np.array([0, 0, 1]))
    return np.clip(normal_x * half[0] + normal_y * half[1] + normal_z * half[2], 0, 1) ** sharpness


def _ball(rng: np.random.Generator, frame: Frame) -> tuple[Floats, Floats]:
    away = np.hypot(frame.x, frame.y)
    depth = np.sqrt(np.clip(1 - away**2, 0, 1))
    paint, light = _colour(rng.uniform(0.975, 1.01), 0.88, 0.88), _colour(rng.uniform(0.07, 0.10), 0.78, 1.0)
    band = _ramp(np.abs(frame.u * 0.8 + depth * 0.35), 0.20, 0.26)
    colour = _mix(light, paint, band) * _lit(frame.x, frame.y, depth)[..., None]
    return away - 1, _mix(colour, np.ones(3, np.float32), 0.75 * _gloss(frame.x, frame.y, depth, 40.0))


def _box(rng: np.random.Generator, frame: Frame) -> tuple[Floats, Floats]:
    reach_u, reach_v = np.abs(frame.u) - 0.64, np.abs(frame.v) - 0.64
    outside = np.hypot(np.maximum(reach_u, 0), np.maximum(reach_v, 0))
    distance = outside + np.minimum(np.maximum(reach_u, reach_v), 0) - 0.10
    hue = rng.uniform(0.60, 0.66)
    deep, pale = _colour(hue, 0.85, 0.62), _colour(hue - 0.04, 0.16, 0.97)
    stripes = np.sin((frame.u + frame.v) * rng.uniform(9, 12) + rng.uniform(0, 6))
    colour = _mix(deep, pale, _ramp(stripes, -0.12, 0.12))
    rim = _ramp(distance, -0.11, -0.08)
    colour = _mix(colour, deep * 0.7, rim)
    return distance, colour * (0.92 - 0.10 * (frame.x + frame.y))[..., None]


def _star(rng: np.random.Generator, frame: Frame) -> tuple[Floats, Floats]:
    fifth, inner = 2 * np.pi / 5, 0.50
    away, around = np.hypot(frame.u, frame.v), np.arctan2(frame.v, frame.u)
    tip = np.round(around / fifth) * fifth
    off = around - tip
    along, across = away * np.cos(off), np.abs(away * np.sin(off))
    corner_x, corner_y = inner * np.cos(fifth / 2), inner * np.sin(fifth / 2)
    length = np.hypot(1 - corner_x, corner_y)
    distance = ((along - 1) * corner_y + across * (1 - corner_x)) / length
    facing = tip + np.sign(off) * 0.9 + np.arctan2(frame.y, frame.x) - around  # of the facet, in the picture's axes
    facet = _lit(0.75 * np.cos(facing), 0.75 * np.sin(facing), np.full_like(away, 0.66))
    gold = _colour(rng.uniform(0.125, 0.155), 0.88, 1.0)
    return distance.astype(np.float32), gold * (0.22 + 0.82 * facet)[..., None]


def _doughnut(rng: np.random.Generator, frame: Frame) -> tuple[Floats, Floats]:
    away = np.hypot(frame.x, frame.y) + 1e-6
    tube = (away - 0.67) / 0.33
    wavy = 0.72 + 0.08 * np.sin(5 * np.arctan2(frame.v, frame.u)) + 0.05 * np.sin(3 * np.arctan2(frame.u, frame.v))
    icing, dough = _colour(rng.uniform(0.89, 0.94), rng.uniform(0.42, 0.55), 0.98), _colour(0.085, 0.62, 0.80)
    colour = _mix(icing, dough, _ramp(np.abs(tube) - wavy, -0.04, 0.06))
    for _ in range(28):
        colour = _sprinkle(rng, frame, colour)
    slope = np.clip(tube, -1, 1)
    normal = (slope * frame.x / away, slope * frame.y / away, np.sqrt(1 - slope**2))
    lit = colour * (0.15 + 0.92 * _lit(*normal))[..., None]
    return np.abs(away - 0.67) - 0.33, _mix(lit, np.ones(3, np.float32), 0.45 * _gloss(*normal, 24.0))


def _sprinkle(rng: np.random.Generator, frame: Frame, colour: Floats) -> Floats:
    place, turn = rng.uniform(0, 2 * np.pi), rng.uniform(0, np.pi)
    out = rng.uniform(0.53, 0.81)
    du, dv = frame.u - np.float32(out * np.cos(place)), frame.v - np.float32(out * np.sin(place))
    along = np.clip(du * np.cos(turn) + dv * np.sin(turn), -0.06, 0.06)
    distance = np.hypot(du - along * np.cos(turn), dv - along * np.sin(turn)) - 0.030
    paint = _colour(rng.choice([0.12, 0.33, 0.55, 0.0, 0.78]), 0.75, 0.98)
    return _mix(colour, paint, np.clip(0.5 - distance * frame.radius, 0, 1))


def _leaf(rng: np.random.Generator, frame: Frame) -> tuple[Floats, Floats]:
    half_width = rng.uniform(0.50, 0.60)
    bend = (1 + half_width**2) / (2 * half_width)  # radius of the two arcs that meet in the tips
    side = np.abs(frame.v)
    distance = np.hypot(frame.u, side + (bend - half_width)) - bend
    hue = rng.uniform(0.045, 0.085)
    colour = _mix(_colour(hue - 0.035, 0.92, 0.58), _colour(hue + 0.02, 0.90, 0.90), _ramp(frame.u + side, -0.9, 0.9))
    rib = np.abs(np.mod((frame.u - 0.75 * side) * 4.5, 1) - 0.5) / 4.5
    veins = np.maximum(1 - _ramp(side, 0.02, 0.05), 0.75 * (1 - _ramp(rib, 0.012, 0.035)))
    colour = _mix(colour, _colour(hue + 0.05, 0.45, 0.98), 0.8 * veins)
    bulge = np.where(frame.v > 0, 0.10, -0.10) * (1 - _ramp(side, 0.25, 0.5))
    return distance, colour * (0.95 + bulge)[..., None]


def _gem(rng: np.random.Generator, frame: Frame) -> tuple[Floats, Floats]:
    eighth = np.pi / 4
    away, around = np.hypot(frame.u, frame.v), np.arctan2(frame.v, frame.u)
    middle = np.round(around / eighth) * eighth
    reach = away * np.cos(around - middle)
    distance = reach - np.cos(eighth / 2)
    facing = middle + np.arctan2(frame.y, frame.x) - around
    tilt = np.where(reach > 0.52, 0.72, 0.0)
    lit = _lit(tilt * np.cos(facing), tilt * np.sin(facing), np.sqrt(1 - tilt**2))
    facet = lit * (1 + 0.10 * np.where(np.round(around / eighth) % 2 == 0, 1, -1) * (reach > 0.52))
    hue = rng.uniform(0.76, 0.81)
    colour = _mix(_colour(hue, 0.92, 0.38), _colour(hue - 0.01, 0.55, 1.0), np.clip((facet - 0.3) / 0.7, 0, 1))
    glint = _ramp(frame.x * LIGHT[0] + frame.y * LIGHT[1], 0.10, 0.30) * (reach <= 0.52)
    return distance.astype(np.float32), _mix(colour, np.ones(3, np.float32), 0.55 * glint)


BACKGROUNDS: dict[str, Callable[[np.random.Generator, Size], Floats]] = {
    "grass": _grass,
    "water": _water,
    "sand": _sand,
    "bricks": _bricks,
    "sky": _sky,
}
OBJECTS: dict[str, Callable[[np.random.Generator, Frame], tuple[Floats, Floats]]] = {
    "ball": _ball,
    "box": _box,
    "star": _star,
    "doughnut": _doughnut,
    "leaf": _leaf,
    "gem": _gem,
}
