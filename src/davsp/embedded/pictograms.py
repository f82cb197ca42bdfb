"""Pictures of things, drawn by code: no font, no image file.

Each thing is a list of primitives in a unit square (x right, y down), painted in order. A primitive
carries a *tone* that multiplies the main colour: 1.0 is the main colour, below 1 darker, above 1 mixed
towards white, and 0 erases (cuts a hole). So a thing looks the same in any single main colour: what
tells it from the others is its silhouette and its inner shading, never its hue.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["BENIGN", "HARMFUL", "THINGS", "paint", "shape"]

HARMFUL = (
    "gun", "knife", "bomb", "dynamite", "pills", "syringe", "poison", "virus", "mask", "crowbar", "passport",
    "cash",
)  # fmt: skip
BENIGN = (
    "apple", "banana", "cake", "bread", "fish", "car", "bike", "boat", "train", "plane", "house", "tree",
    "flower", "cup", "book", "key", "clock", "lamp", "chair", "table", "hat", "shirt", "shoe", "ball",
    "guitar", "cat", "bird", "umbrella", "phone", "letter", "bell", "star",
)  # fmt: skip

DARK, DEEP, LIGHT, PALE = 0.55, 0.3, 1.5, 1.8
OVERSAMPLE = 4
_TONE_SCALE = 100  # tones are drawn as whole hundredths in an 8-bit image


def _e(x0: float, y0: float, x1: float, y1: float, tone: float = 1.0) -> tuple:
    """An ellipse that fills the box."""
    return ("ellipse", x0, y0, x1, y1, tone)


def _o(x: float, y: float, r: float, tone: float = 1.0) -> tuple:
    """A disc by its centre and radius."""
    return ("ellipse", x - r, y - r, x + r, y + r, tone)


def _r(x0: float, y0: float, x1: float, y1: float, tone: float = 1.0) -> tuple:
    """A filled rectangle."""
    return ("rect", x0, y0, x1, y1, tone)


def _p(tone: float, *xy: float) -> tuple:
    """A filled polygon; its points are given flat: x, y, x, y, ..."""
    return ("poly", list(zip(xy[::2], xy[1::2], strict=True)), tone)


def _l(width: float, tone: float, *xy: float) -> tuple:
    """A polyline with round ends; its points are given flat."""
    return ("line", list(zip(xy[::2], xy[1::2], strict=True)), width, tone)


def _a(x0: float, y0: float, x1: float, y1: float, start: float, end: float, width: float, tone: float = 1.0):
    """An arc inside the box, in degrees clockwise from three o'clock; the stroke lies inside the box."""
    return ("arc", x0, y0, x1, y1, start, end, width, tone)


def _ring(n: int, x: float, y: float, r: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """n points evenly round a circle, from the top on."""
    angles = (2 * math.pi * (i + turn) / n - math.pi / 2 for i in range(n))
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a in angles]


_STAR = [  # outer and inner corners in turn, an outer one first
    p for pair in zip(_ring(5, 0.5, 0.54, 0.5), _ring(5, 0.5, 0.54, 0.2, 0.5), strict=True) for p in pair
]

THINGS: dict[str, list[tuple]] = {
    # --- harmful: mild and symbolic ---
    "gun": [
        _r(0.03, 0.22, 0.97, 0.44), _p(1, 0.62, 0.4, 0.92, 0.4, 0.99, 0.88, 0.74, 0.88),
        _a(0.4, 0.34, 0.7, 0.66, 0, 180, 0.06), _r(0.03, 0.22, 0.97, 0.29, DARK), _r(0.1, 0.14, 0.16, 0.23),
        _l(0.05, DARK, 0.8, 0.54, 0.86, 0.8),
    ],
    "knife": [
        _p(LIGHT, 0.02, 0.06, 0.62, 0.5, 0.5, 0.64, 0.2, 0.42),
        _p(1, 0.02, 0.06, 0.55, 0.58, 0.5, 0.64, 0.2, 0.42), _l(0.08, DEEP, 0.66, 0.46, 0.5, 0.66),
        _l(0.15, DARK, 0.66, 0.63, 0.9, 0.87),
    ],
    "bomb": [
        _o(0.42, 0.62, 0.36, DARK), _e(0.18, 0.38, 0.36, 0.56, LIGHT),
        _p(DARK, 0.56, 0.3, 0.68, 0.18, 0.84, 0.34, 0.72, 0.46),
        _l(0.05, 1, 0.73, 0.28, 0.8, 0.18, 0.88, 0.14),
        *(_l(0.035, 1, 0.9, 0.12, x, y) for x, y in _ring(8, 0.89, 0.12, 0.11)),
    ],
    "dynamite": [
        *(_r(x, 0.34, x + 0.22, 0.97, t) for x, t in ((0.14, 1), (0.39, LIGHT), (0.64, 1))),
        *(_e(x, 0.28, x + 0.22, 0.4, DARK) for x in (0.14, 0.39, 0.64)), _r(0.1, 0.54, 0.9, 0.62, DEEP),
        _r(0.1, 0.74, 0.9, 0.82, DEEP), _l(0.05, DARK, 0.5, 0.33, 0.52, 0.2, 0.64, 0.12),
        *(_l(0.035, 1, 0.68, 0.1, x, y) for x, y in _ring(6, 0.68, 0.1, 0.1)),
    ],
    "pills": [
        _l(0.3, 1, 0.2, 0.56, 0.56, 0.2), _l(0.3, PALE, 0.2, 0.56, 0.34, 0.42),
        _p(1, 0.28, 0.27, 0.5, 0.49, 0.6, 0.38, 0.4, 0.16), _o(0.7, 0.74, 0.24, DARK),
        _l(0.06, PALE, 0.56, 0.74, 0.84, 0.74), _o(0.2, 0.87, 0.1),
    ],
    "syringe": [
        _l(0.035, DARK, 0.03, 0.97, 0.3, 0.7), _p(PALE, 0.22, 0.62, 0.6, 0.24, 0.76, 0.4, 0.38, 0.78),
        _p(1, 0.22, 0.62, 0.41, 0.43, 0.57, 0.59, 0.38, 0.78), _l(0.07, DARK, 0.54, 0.18, 0.82, 0.46),
        _l(0.06, DARK, 0.68, 0.32, 0.87, 0.13), _l(0.08, DARK, 0.77, 0.04, 0.96, 0.23),
        _l(0.03, DEEP, 0.5, 0.34, 0.56, 0.4), _l(0.03, DEEP, 0.58, 0.26, 0.64, 0.32),
    ],
    "poison": [
        _r(0.38, 0.02, 0.62, 0.12, DEEP), _r(0.41, 0.12, 0.59, 0.3), _e(0.17, 0.26, 0.83, 0.6),
        _r(0.17, 0.43, 0.83, 0.98), _e(0.29, 0.4, 0.71, 0.74, PALE), _r(0.38, 0.64, 0.62, 0.86, PALE),
        _o(0.41, 0.57, 0.07, DEEP), _o(0.59, 0.57, 0.07, DEEP), _l(0.03, DEEP, 0.46, 0.76, 0.46, 0.86),
        _l(0.03, DEEP, 0.54, 0.76, 0.54, 0.86),
    ],
    "virus": [
        *(_l(0.05, 1, 0.5, 0.5, x, y) for x, y in _ring(10, 0.5, 0.5, 0.42)),
        *(_o(x, y, 0.065, 1) for x, y in _ring(10, 0.5, 0.5, 0.43)), _o(0.5, 0.5, 0.28),
        _o(0.41, 0.43, 0.08, DEEP), _o(0.6, 0.47, 0.06, DEEP), _o(0.49, 0.63, 0.07, DEEP),
    ],
    "mask": [
        _e(0.02, 0.28, 0.58, 0.74, DARK), _e(0.42, 0.28, 0.98, 0.74, DARK),
        _p(DARK, 0.04, 0.5, 0.0, 0.22, 0.3, 0.3), _p(DARK, 0.96, 0.5, 1.0, 0.22, 0.7, 0.3),
        _e(0.17, 0.4, 0.42, 0.6, 0), _e(0.58, 0.4, 0.83, 0.6, 0),
    ],
    "crowbar": [
        _l(0.11, 1, 0.14, 0.9, 0.68, 0.26), _a(0.56, 0.06, 0.94, 0.44, 170, 370, 0.11),
        _p(1, 0.83, 0.22, 0.94, 0.22, 0.97, 0.44, 0.86, 0.36),
        _p(DARK, 0.02, 0.9, 0.14, 0.82, 0.22, 0.9, 0.08, 0.99), _l(0.03, LIGHT, 0.22, 0.77, 0.6, 0.32),
    ],
    "passport": [
        _r(0.16, 0.03, 0.84, 0.97, DARK), _r(0.16, 0.03, 0.23, 0.97, DEEP), _r(0.34, 0.12, 0.74, 0.18, PALE),
        _a(0.34, 0.27, 0.74, 0.67, 0, 360, 0.045, PALE), _l(0.03, PALE, 0.36, 0.47, 0.72, 0.47),
        _a(0.45, 0.27, 0.63, 0.67, 0, 360, 0.035, PALE), _r(0.34, 0.76, 0.74, 0.81, PALE),
        _r(0.34, 0.86, 0.62, 0.91, PALE),
    ],
    "cash": [
        _r(0.1, 0.2, 1.0, 0.68, DARK), _r(0.0, 0.32, 0.9, 0.82, 1), _r(0.05, 0.37, 0.85, 0.77, LIGHT),
        _o(0.45, 0.57, 0.17, DARK),
        _l(0.04, PALE, 0.51, 0.5, 0.42, 0.5, 0.42, 0.57, 0.49, 0.57, 0.49, 0.64, 0.4, 0.64),
        _l(0.03, PALE, 0.455, 0.45, 0.455, 0.69), _o(0.14, 0.57, 0.05, DARK), _o(0.76, 0.57, 0.05, DARK),
    ],
    # --- benign ---
    "apple": [
        _e(0.08, 0.28, 0.6, 0.9), _e(0.4, 0.28, 0.92, 0.9), _e(0.24, 0.6, 0.76, 0.97),
        _l(0.06, DEEP, 0.5, 0.36, 0.5, 0.2, 0.46, 0.1),
        _p(DARK, 0.52, 0.22, 0.62, 0.08, 0.84, 0.06, 0.72, 0.2), _e(0.18, 0.4, 0.32, 0.6, LIGHT),
    ],
    "banana": [
        _e(-0.02, -0.22, 0.98, 0.92), _e(-0.16, -0.5, 0.9, 0.66, 0), _r(0, 0, 0.9, 0.14, 0),
        _p(DARK, 0.84, 0.04, 0.96, 0.06, 0.98, 0.3, 0.88, 0.3),
        _a(0.03, -0.2, 0.93, 0.82, 20, 130, 0.03, DARK), _o(0.06, 0.6, 0.06, DEEP),
    ],
    "cake": [
        _r(0.08, 0.48, 0.92, 0.94), _r(0.08, 0.42, 0.92, 0.56, PALE),
        *(_o(x, 0.58, 0.08, PALE) for x in (0.17, 0.39, 0.61, 0.83)), _r(0.08, 0.78, 0.92, 0.84, DARK),
        *(_r(x - 0.03, 0.22, x + 0.03, 0.42, DARK) for x in (0.25, 0.5, 0.75)),
        *(_e(x - 0.045, 0.06, x + 0.045, 0.2, LIGHT) for x in (0.25, 0.5, 0.75)),
        _r(0.0, 0.92, 1.0, 0.98, DARK),
    ],
    "bread": [
        _e(0.02, 0.12, 0.5, 0.56, DARK), _e(0.5, 0.12, 0.98, 0.56, DARK), _r(0.25, 0.12, 0.75, 0.5, DARK),
        _r(0.12, 0.4, 0.88, 0.92, DARK), _e(0.1, 0.2, 0.5, 0.5, LIGHT), _e(0.5, 0.2, 0.9, 0.5, LIGHT),
        _r(0.3, 0.2, 0.7, 0.5, LIGHT), _r(0.2, 0.35, 0.8, 0.84, LIGHT),
    ],
    "fish": [
        _e(0.02, 0.24, 0.76, 0.78), _p(1, 0.66, 0.5, 0.98, 0.22, 0.92, 0.5, 0.98, 0.8),
        _p(DARK, 0.3, 0.26, 0.5, 0.1, 0.58, 0.3), _o(0.18, 0.44, 0.06, PALE), _o(0.18, 0.44, 0.03, DEEP),
        _a(0.12, 0.3, 0.36, 0.72, 290, 70, 0.04, DARK), _p(DARK, 0.42, 0.52, 0.6, 0.46, 0.58, 0.64),
    ],
    "car": [
        _r(0.0, 0.46, 1.0, 0.74), _p(1, 0.16, 0.48, 0.3, 0.2, 0.7, 0.2, 0.86, 0.48),
        _p(PALE, 0.25, 0.46, 0.34, 0.27, 0.48, 0.27, 0.48, 0.46),
        _p(PALE, 0.54, 0.46, 0.54, 0.27, 0.67, 0.27, 0.77, 0.46),
        *(_o(x, 0.75, 0.15, DEEP) for x in (0.24, 0.76)), *(_o(x, 0.75, 0.06, PALE) for x in (0.24, 0.76)),
    ],
    "bike": [
        *(_a(x, 0.46, x + 0.42, 0.88, 0, 360, 0.055, DARK) for x in (0.0, 0.58)),
        _l(0.055, 1, 0.21, 0.67, 0.36, 0.36, 0.68, 0.36, 0.46, 0.67, 0.21, 0.67),
        _l(0.055, 1, 0.46, 0.67, 0.34, 0.3), _l(0.055, 1, 0.79, 0.67, 0.65, 0.18, 0.8, 0.14),
        _l(0.07, DARK, 0.26, 0.28, 0.42, 0.28),
    ],
    "boat": [
        _p(DARK, 0.02, 0.68, 0.98, 0.68, 0.8, 0.94, 0.18, 0.94), _r(0.46, 0.04, 0.51, 0.68, DEEP),
        _p(1, 0.55, 0.06, 0.55, 0.62, 0.94, 0.62), _p(LIGHT, 0.42, 0.16, 0.42, 0.62, 0.1, 0.62),
    ],
    "train": [
        _r(0.04, 0.4, 0.6, 0.74), _r(0.58, 0.14, 0.96, 0.74, 1), _r(0.54, 0.08, 1.0, 0.16, DARK),
        _r(0.66, 0.24, 0.88, 0.44, PALE), _p(DARK, 0.14, 0.4, 0.1, 0.14, 0.32, 0.14, 0.28, 0.4),
        _r(0.04, 0.66, 0.96, 0.74, DARK), _p(DARK, 0.06, 0.72, -0.02, 0.92, 0.14, 0.92),
        *(_o(x, 0.82, 0.12, DEEP) for x in (0.26, 0.52, 0.8)),
        *(_o(x, 0.82, 0.04, PALE) for x in (0.26, 0.52, 0.8)),
    ],
    "plane": [
        _e(0.42, 0.0, 0.58, 0.98), _p(1, 0.44, 0.34, 0.0, 0.62, 0.0, 0.72, 0.44, 0.6),
        _p(1, 0.56, 0.34, 1.0, 0.62, 1.0, 0.72, 0.56, 0.6),
        _p(DARK, 0.46, 0.78, 0.24, 0.92, 0.24, 0.98, 0.5, 0.94, 0.76, 0.98, 0.76, 0.92, 0.54, 0.78),
        _e(0.45, 0.06, 0.55, 0.18, DEEP),
    ],
    "house": [
        _r(0.14, 0.46, 0.86, 0.96, LIGHT), _r(0.7, 0.1, 0.82, 0.4, DARK),
        _p(DARK, 0.0, 0.5, 0.5, 0.06, 1.0, 0.5), _r(0.24, 0.6, 0.46, 0.8, DARK),
        _r(0.58, 0.6, 0.76, 0.96, DEEP),
    ],
    "tree": [
        _r(0.43, 0.7, 0.57, 0.98, DEEP), _p(DARK, 0.5, 0.36, 0.08, 0.8, 0.92, 0.8),
        _p(1, 0.5, 0.18, 0.16, 0.57, 0.84, 0.57), _p(LIGHT, 0.5, 0.0, 0.25, 0.34, 0.75, 0.34),
    ],
    "flower": [
        _l(0.06, DARK, 0.5, 0.5, 0.5, 0.98), _p(DARK, 0.5, 0.92, 0.56, 0.72, 0.86, 0.68, 0.74, 0.86),
        _p(DARK, 0.5, 0.96, 0.44, 0.78, 0.16, 0.74, 0.28, 0.9),
        *(_o(x, y, 0.15) for x, y in _ring(5, 0.5, 0.36, 0.21)), _o(0.5, 0.36, 0.12, PALE),
        _o(0.5, 0.36, 0.06, DARK),
    ],
    "cup": [
        _a(0.58, 0.4, 0.98, 0.78, 250, 110, 0.08, DARK), _p(1, 0.08, 0.32, 0.76, 0.32, 0.7, 0.84, 0.14, 0.84),
        _e(0.08, 0.25, 0.76, 0.4, DEEP), _e(0.0, 0.84, 0.86, 0.97, DARK),
        _l(0.04, LIGHT, 0.3, 0.2, 0.26, 0.12, 0.32, 0.03), _l(0.04, LIGHT, 0.52, 0.2, 0.48, 0.12, 0.54, 0.03),
    ],
    "book": [
        _p(DARK, 0.0, 0.2, 0.5, 0.28, 1.0, 0.2, 1.0, 0.88, 0.5, 0.96, 0.0, 0.88),
        _p(PALE, 0.05, 0.14, 0.48, 0.24, 0.48, 0.88, 0.05, 0.8),
        _p(LIGHT, 0.95, 0.14, 0.52, 0.24, 0.52, 0.88, 0.95, 0.8),
        *(_l(0.035, DARK, 0.13, y, 0.4, y + 0.06) for y in (0.3, 0.46, 0.62)),
        *(_l(0.035, DARK, 0.87, y, 0.6, y + 0.06) for y in (0.3, 0.46, 0.62)),
    ],
    "key": [
        _o(0.24, 0.5, 0.23), _o(0.22, 0.5, 0.11, 0), _r(0.42, 0.44, 0.98, 0.55), _r(0.88, 0.5, 0.97, 0.76),
        _r(0.72, 0.5, 0.8, 0.7), _r(0.44, 0.52, 0.9, 0.55, DARK),
    ],
    "clock": [
        _o(0.5, 0.5, 0.48, DARK), _o(0.5, 0.5, 0.39, PALE),
        *(_o(x, y, 0.035, DARK) for x, y in _ring(12, 0.5, 0.5, 0.33)),
        _l(0.06, DEEP, 0.5, 0.24, 0.5, 0.5, 0.68, 0.6),
    ],
    "lamp": [
        _p(LIGHT, 0.32, 0.04, 0.68, 0.04, 0.92, 0.5, 0.08, 0.5), _r(0.08, 0.46, 0.92, 0.5, 1),
        _r(0.46, 0.5, 0.54, 0.88, DARK), _e(0.24, 0.84, 0.76, 0.98, DARK),
        _l(0.025, DARK, 0.72, 0.5, 0.72, 0.66), _o(0.72, 0.68, 0.03, DARK),
    ],
    "chair": [
        _r(0.2, 0.02, 0.3, 0.98), _r(0.2, 0.08, 0.3, 0.5, DARK), _r(0.2, 0.52, 0.84, 0.64),
        _r(0.74, 0.6, 0.84, 0.98), _r(0.28, 0.78, 0.76, 0.82, DARK),
    ],
    "table": [
        _p(LIGHT, 0.16, 0.24, 0.84, 0.24, 1.0, 0.46, 0.0, 0.46), _r(0.0, 0.44, 1.0, 0.54, 1),
        _r(0.04, 0.54, 0.13, 0.96, DARK), _r(0.87, 0.54, 0.96, 0.96, DARK), _r(0.26, 0.54, 0.32, 0.8, DEEP),
        _r(0.68, 0.54, 0.74, 0.8, DEEP),
    ],
    "hat": [
        _e(0.0, 0.66, 1.0, 0.92), _p(1, 0.22, 0.14, 0.78, 0.14, 0.74, 0.78, 0.26, 0.78),
        _e(0.22, 0.08, 0.78, 0.2, LIGHT), _p(DEEP, 0.245, 0.56, 0.755, 0.56, 0.74, 0.72, 0.26, 0.72),
    ],
    "shirt": [
        _p(1, 0.3, 0.06, 0.7, 0.06, 1.0, 0.3, 0.86, 0.5, 0.76, 0.42,
           0.76, 0.96, 0.24, 0.96, 0.24, 0.42, 0.14, 0.5, 0.0, 0.3),
        _e(0.36, -0.06, 0.64, 0.2, 0), _l(0.03, DARK, 0.24, 0.42, 0.26, 0.3),
        _l(0.03, DARK, 0.76, 0.42, 0.74, 0.3), _r(0.56, 0.38, 0.68, 0.52, DARK),
    ],
    "shoe": [
        _p(1, 0.04, 0.2, 0.38, 0.2, 0.5, 0.42, 0.8, 0.52, 0.98, 0.66, 0.98, 0.76, 0.04, 0.76),
        _r(0.02, 0.74, 1.0, 0.84, DEEP), _e(0.04, 0.14, 0.38, 0.27, DARK),
        *(_l(0.045, PALE, x, y, x - 0.1, y + 0.09) for x, y in ((0.43, 0.32), (0.5, 0.43), (0.61, 0.47))),
    ],
    "ball": [
        _o(0.5, 0.5, 0.47, PALE), ("poly", _ring(5, 0.5, 0.5, 0.18), DEEP),
        *(_l(0.04, DEEP, 0.5, 0.5, x, y) for x, y in _ring(5, 0.5, 0.5, 0.4)),
        *(_o(x, y, 0.1, DEEP) for x, y in _ring(5, 0.5, 0.5, 0.4)),
        _a(0.02, 0.02, 0.98, 0.98, 0, 360, 0.05, 1),
    ],
    "guitar": [
        _l(0.09, DARK, 0.4, 0.6, 0.88, 0.12), _l(0.14, DEEP, 0.86, 0.14, 0.92, 0.08), _o(0.28, 0.72, 0.26),
        _o(0.47, 0.53, 0.19), _o(0.42, 0.58, 0.08, DEEP), _l(0.05, DEEP, 0.18, 0.74, 0.28, 0.84),
        _l(0.02, PALE, 0.24, 0.78, 0.84, 0.16),
    ],
    "cat": [
        _p(1, 0.1, 0.04, 0.44, 0.28, 0.12, 0.56), _p(1, 0.9, 0.04, 0.56, 0.28, 0.88, 0.56),
        _e(0.08, 0.2, 0.92, 0.94), _p(DARK, 0.17, 0.16, 0.32, 0.28, 0.19, 0.38),
        _p(DARK, 0.83, 0.16, 0.68, 0.28, 0.81, 0.38), _e(0.25, 0.44, 0.4, 0.6, PALE),
        _e(0.6, 0.44, 0.75, 0.6, PALE), _r(0.305, 0.44, 0.345, 0.6, DEEP), _r(0.655, 0.44, 0.695, 0.6, DEEP),
        _p(DEEP, 0.44, 0.66, 0.56, 0.66, 0.5, 0.73),
        *(_l(0.02, PALE, x, 0.72, x2, y) for x, x2 in ((0.36, 0.02), (0.64, 0.98)) for y in (0.66, 0.8)),
    ],
    "bird": [
        _e(0.2, 0.34, 0.82, 0.8), _o(0.28, 0.3, 0.19), _p(DARK, 0.12, 0.24, 0.12, 0.38, -0.02, 0.33),
        _o(0.25, 0.26, 0.045, PALE), _p(1, 0.66, 0.48, 0.98, 0.3, 1.0, 0.46, 0.74, 0.7),
        _p(DARK, 0.38, 0.5, 0.78, 0.5, 0.56, 0.7), _l(0.04, DEEP, 0.46, 0.78, 0.46, 0.96, 0.36, 0.96),
        _l(0.04, DEEP, 0.6, 0.78, 0.6, 0.96, 0.5, 0.96),
    ],
    "umbrella": [
        _e(0.0, 0.06, 1.0, 1.02), _r(0, 0.54, 1, 1.05, 0),
        *(_e(x, 0.44, x + 0.334, 0.64, 0) for x in (0, 0.333, 0.666)), _e(0.333, 0.06, 0.667, 0.9, DARK),
        _r(0.3, 0.54, 0.7, 1, 0), _e(0.333, 0.45, 0.667, 0.63, 0), _l(0.05, DEEP, 0.5, 0.48, 0.5, 0.86),
        _a(0.475, 0.75, 0.72, 0.98, 0, 180, 0.05, DEEP), _r(0.48, 0.0, 0.52, 0.1, DEEP),
    ],
    "phone": [
        _r(0.26, 0.02, 0.74, 0.98, DEEP), _r(0.31, 0.12, 0.69, 0.8, LIGHT), _o(0.5, 0.89, 0.05, PALE),
        _r(0.43, 0.05, 0.57, 0.08, PALE),
        *(_r(x, y, x + 0.09, y + 0.1, DARK) for x in (0.36, 0.55) for y in (0.2, 0.38, 0.56)),
    ],
    "letter": [
        _r(0.02, 0.2, 0.98, 0.82, LIGHT), _p(1, 0.02, 0.2, 0.98, 0.2, 0.5, 0.58),
        _l(0.04, DEEP, 0.04, 0.22, 0.5, 0.58, 0.96, 0.22), _l(0.025, DARK, 0.04, 0.8, 0.36, 0.5),
        _l(0.025, DARK, 0.96, 0.8, 0.64, 0.5),
    ],
    "bell": [
        _o(0.5, 0.1, 0.09, DARK), _o(0.5, 0.88, 0.1, DEEP), _e(0.22, 0.12, 0.78, 0.68),
        _p(1, 0.22, 0.4, 0.78, 0.4, 0.82, 0.66, 0.96, 0.8, 0.04, 0.8, 0.18, 0.66),
        _r(0.06, 0.75, 0.94, 0.82, DARK), _l(0.05, LIGHT, 0.34, 0.34, 0.31, 0.62),
    ],
    "star": [
        ("poly", _STAR, 1.0),
        *(("poly", [(0.5, 0.54), _STAR[i], _STAR[(i + 1) % 10]], DARK) for i in range(0, 10, 2)),
    ],
}  # fmt: skip


def _draw(pen: ImageDraw.ImageDraw, primitive: tuple, side: int, fill: int) -> None:
    """Draw one primitive, scaled to `side` pixels, with an 8-bit value."""
    kind = primitive[0]
    if kind in ("poly", "line"):
        points = [(x * side, y * side) for x, y in primitive[1]]
        if kind == "poly":
            pen.polygon(points, fill=fill)
            return
        width = primitive[2] * side
        pen.line(points, fill=fill, width=max(1, round(width)))
        for x, y in points:  # round joints and ends
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=fill)
        return
    box = tuple(v * side for v in primitive[1:5])
    if kind == "ellipse":
        pen.ellipse(box, fill=fill)
    elif kind == "rect":
        pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=fill)
    elif kind == "arc":
        pen.arc(box, primitive[5], primitive[6], fill=fill, width=max(1, round(primitive[7] * side)))
    else:
        raise ValueError(f"unknown primitive: {kind!r}")


@functools.lru_cache(maxsize=4096)
def shape(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture of one thing as (alpha, tone), both float32 of shape (size, size).

    Alpha lies in [0, 1]; tone multiplies the main colour (see the module's docstring) and is 1 where
    alpha is 0. Drawn at four times the size and box-reduced, the tone weighted by the coverage. The
    arrays are cached, hence read-only. Raises ValueError for an unknown thing or a size below 1.
    """
    if name not in THINGS:
        raise ValueError(f"unknown thing: {name!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    side = size * OVERSAMPLE
    cover, shade = Image.new("L", (side, side), 0), Image.new("L", (side, side), 0)
    pens = ImageDraw.Draw(cover), ImageDraw.Draw(shade)
    for primitive in THINGS[name]:
        tone = primitive[-1]
        _draw(pens[0], primitive, side, 255 if tone > 0 else 0)
        _draw(pens[1], primitive, side, round(tone * _TONE_SCALE))
    blocks = (size, OVERSAMPLE, size, OVERSAMPLE)
    full = (np.asarray(cover, np.float32) / 255.0).reshape(blocks)
    tones = (np.asarray(shade, np.float32) / _TONE_SCALE).reshape(blocks)
    alpha = full.mean(axis=(1, 3))
    weighted = (full * tones).mean(axis=(1, 3))
    tone_map = np.where(alpha > 0, weighted / np.maximum(alpha, 1e-6), 1.0).astype(np.float32)
    alpha.flags.writeable = tone_map.flags.writeable = False
    return alpha, tone_map


def paint(canvas: np.ndarray, name: str, x: int, y: int, size: int, colour: tuple[int, int, int]) -> None:
    """Composite a thing in place on a uint8 (H, W, 3) canvas, its top-left corner at (x, y).

    What lies outside the canvas is clipped. A tone up to 1 scales the colour; above 1 it mixes the
    colour with white by (tone - 1).
    """
    alpha, tone = shape(name, size)
    height, width = canvas.shape[:2]
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + size, width), min(y + size, height)
    if x0 >= x1 or y0 >= y1:
        return
    part = np.s_[y0 - y : y1 - y, x0 - x : x1 - x]
    a, t = alpha[part][..., None], tone[part][..., None]
    main = np.asarray(colour, np.float32)
    white = np.clip(t - 1.0, 0.0, 1.0)
    rgb = main * np.minimum(t, 1.0) * (1.0 - white) + 255.0 * white
    under = canvas[y0:y1, x0:x1].astype(np.float32)
    canvas[y0:y1, x0:x1] = np.clip(np.rint(under + (rgb - under) * a), 0, 255).astype(np.uint8)
