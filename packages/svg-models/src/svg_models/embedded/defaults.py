"""What the embedded model was trained to make, and prompts that show it."""

from __future__ import annotations

__all__ = ["FRAMES", "GUIDANCE", "SHEET_PROMPTS", "SIDE", "STEPS"]

STEPS = 20
GUIDANCE = 4.0
FRAMES = 49
SIDE = 128
SHEET_PROMPTS = (
    "a large red star moving right on a plain navy background",
    "a blue circle moving up on a tiled sand background",
    "two small yellow squares moving left on a plain black background",
    "three green triangles moving down on a lined grey background",
    "a large striped purple heart standing still on a plain white background",
    "an orange cross turning clockwise on a tiled navy background",
    "a pink ring moving left and a cyan star moving right on a plain black background",
    "a large checkered green square moving right and turning counterclockwise on a plain sand"
    " background",
    "a yellow circle moving down and a red heart moving up on a lined navy background",
    "a large dotted cyan circle moving left on a tiled grey background",
    "a red square standing still on a tiled white background, the camera zooms in",
    "a purple star moving up on a lined black background, the camera pans right",
)
