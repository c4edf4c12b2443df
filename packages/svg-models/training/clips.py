"""The little world the embedded model was trained on: scenes, their captions, the words in them.

A scene holds one or two groups of flat shapes that move or turn in front of a background, seen by
a camera that may pan or zoom. Every attribute that a caption names is drawn; nothing else moves.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (0.98, 0.88, 0.10),
    "green": (0.12, 0.75, 0.20),
    "cyan": (0.10, 0.80, 0.90),
    "blue": (0.15, 0.30, 0.95),
    "purple": (0.58, 0.18, 0.85),
    "pink": (1.00, 0.45, 0.75),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
TEXTURES = ("plain", "striped", "dotted", "checkered")
DIRECTIONS: dict[str, tuple[float, float]] = {
    "still": (0.0, 0.0),
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
TURNS = {"": 0.0, "clockwise": 1.0, "counterclockwise": -1.0}
SIZES = {"small": (0.10, 0.12), "": (0.15, 0.18), "large": (0.23, 0.27)}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.05, 0.05, 0.06),
    "grey": (0.42, 0.42, 0.44),
    "white": (0.93, 0.93, 0.91),
    "navy": (0.10, 0.13, 0.21),
    "sand": (0.80, 0.76, 0.69),
}
PATTERNS = ("plain", "tiled", "lined")
CAMERAS: dict[str, tuple[float, float]] = {  # pan per clip in frame widths, log zoom per clip
    "": (0.0, 0.0),
    "pans left": (-0.30, 0.0),
    "pans right": (0.30, 0.0),
    "zooms in": (0.0, 0.5),
    "zooms out": (0.0, -0.5),
}
COUNTS = ("", "a", "two", "three")
SYNONYMS = {
    "circle": ("disc", "ball"),
    "square": ("box",),
    "moving": ("sliding", "flying", "going"),
    "turning": ("spinning", "rotating"),
}
MAX_OBJECTS = 4
CLIP_FRAMES = 49  # a speed is stated per this many frames


@dataclass(frozen=True, kw_only=True)
class Group:
    """Alike shapes that move together."""

    count: int
    size: str
    texture: str
    colour: str
    shape: str
    direction: str
    turn: str = ""

    @property
    def held_out(self) -> bool:
        """Whether this colour, shape and direction never occur together in training (1 in 11)."""
        colour = list(COLOURS).index(self.colour)
        direction = list(DIRECTIONS).index(self.direction)
        return (7 * colour + 3 * SHAPES.index(self.shape) + 5 * direction) % 11 == 0


@dataclass(frozen=True, kw_only=True)
class Body:
    """One drawn shape: where it is at the middle of the clip and how it moves; unit: frame side."""

    group: Group
    x: float
    y: float
    speed_x: float
    speed_y: float
    radius: float
    angle: float
    spin: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one clip shows. Bodies are painted in order, so the last group is in front."""

    groups: tuple[Group, ...]
    bodies: tuple[Body, ...]
    background: str
    pattern: str
    camera: str
    phase: tuple[float, float]
    seed: int


def _pick_group(rng: random.Random, *, count: int, colours: list[str], crowded: bool) -> Group:
    while True:
        shape = rng.choice(SHAPES)
        texture = rng.choice(("plain", "plain", *TEXTURES))
        direction = rng.choice(("left", "right", "up", "down", *DIRECTIONS))
        turns = texture != "plain" or shape not in ("circle", "ring")
        turn = rng.choice(("clockwise", "counterclockwise")) if turns else ""
        if rng.random() < (0.3 if direction == "still" else 0.75):
            turn = ""
        if count == 3:
            size = rng.choice(("small", ""))
        elif crowded or count == 2:
            size = rng.choice(("small", "", ""))
        else:
            size = rng.choice(tuple(SIZES))
        group = Group(
            count=count,
            size=size,
            texture=texture,
            colour=rng.choice(colours),
            shape=shape,
            direction=direction,
            turn=turn,
        )
        if not group.held_out:
            return group


def _pick_groups(rng: random.Random) -> tuple[Group, ...]:
    colours = list(COLOURS)
    if rng.random() < 0.62:
        count = rng.choices((1, 2, 3), weights=(55, 25, 20))[0]
        return (_pick_group(rng, count=count, colours=colours, crowded=False),)
    first = _pick_group(rng, count=rng.choice((1, 1, 1, 2)), colours=colours, crowded=True)
    others = [name for name in colours if name != first.colour]
    return first, _pick_group(rng, count=1, colours=others, crowded=True)


def _place(group: Group, rng: random.Random, *, lane: float | None) -> list[Body]:
    """Put a group on its way; a lane fixes where it runs across its own direction."""
    low, high = SIZES[group.size]
    radius = rng.uniform(low, high)
    if group.count == 3:
        radius = min(radius, 0.135)
    ahead_x, ahead_y = DIRECTIONS[group.direction]
    travel = rng.uniform(0.45, 0.65)
    across = (lane if lane is not None else 0.5) + rng.uniform(-0.06, 0.06)
    along = 0.5 + rng.uniform(-0.06, 0.06)
    spacing = max(2.35 * radius, 0.27)
    spin = TURNS[group.turn] * rng.uniform(0.4, 0.6)
    angle = rng.uniform(-0.02, 0.02)
    bodies = []
    for i in range(group.count):
        offset = (i - (group.count - 1) / 2) * spacing
        stagger = rng.uniform(-0.05, 0.05) if group.count > 1 else 0.0
        if ahead_x:
            x, y = along + stagger, across + offset
        else:
            x, y = across + offset, along + stagger
        if lane is not None and group.direction == "still":
            y = rng.uniform(0.3, 0.7)
        bodies.append(
            Body(
                group=group,
                x=x,
                y=y,
                speed_x=ahead_x * travel,
                speed_y=ahead_y * travel,
                radius=radius,
                angle=angle,
                spin=spin,
            )
        )
    return bodies


def scene_of(
    groups: tuple[Group, ...],
    *,
    background: str = "grey",
    pattern: str = "plain",
    camera: str = "",
    seed: int = 0,
) -> Scene:
    """Place `groups` in a scene; what a caption leaves open is drawn from `seed`.

    Raises:
        ValueError: if there are more than `MAX_OBJECTS` shapes in all.
    """
    total = sum(group.count for group in groups)
    if not 1 <= total <= MAX_OBJECTS:
        raise ValueError(f"a scene holds 1 to {MAX_OBJECTS} shapes, got {total}; drop a group")
    rng = random.Random(f"place-{seed}")
    lanes: list[float | None] = [None]
    if len(groups) == 2:  # two lanes, or one lane where they pass in front of each other
        gap = 0.0 if max(group.count for group in groups) == 1 and rng.random() < 0.3 else 0.22
        lanes = [0.5 - gap, 0.5 + gap] if rng.random() < 0.5 else [0.5 + gap, 0.5 - gap]
    bodies = [
        body
        for group, lane in zip(groups, lanes, strict=True)
        for body in _place(group, rng, lane=lane)
    ]
    return Scene(
        groups=groups,
        bodies=tuple(bodies),
        background=background,
        pattern=pattern,
        camera=camera,
        phase=(rng.random(), rng.random()),
        seed=seed,
    )


def sample_scene(seed: int) -> Scene:
    """Draw a training scene; equal seeds give equal scenes. Held-out combinations never come."""
    rng = random.Random(f"scene-{seed}")
    groups = _pick_groups(rng)
    pattern = rng.choice(PATTERNS)
    camera = "" if pattern == "plain" or rng.random() < 0.6 else rng.choice(list(CAMERAS)[1:])
    background = rng.choice(list(BACKGROUNDS))
    return scene_of(groups, background=background, pattern=pattern, camera=camera, seed=seed)


def _describe(group: Group, say: random.Random | None) -> str:
    def word(name: str) -> str:
        if say is None or name not in SYNONYMS or say.random() < 0.7:
            return name
        return say.choice(SYNONYMS[name])

    shape = word(group.shape)
    if group.count > 1:
        shape += "es" if shape.endswith(("s", "x")) else "s"
    texture = "" if group.texture == "plain" else group.texture
    noun = " ".join(filter(None, (COUNTS[group.count], group.size, texture, group.colour, shape)))
    noun = noun.replace("a orange", "an orange")
    if say is not None and say.random() < 0.05:
        return noun
    turning = f"{word('turning')} {group.turn}" if group.turn else ""
    if group.direction != "still":
        moving = f"{word('moving')} {group.direction}"
        return f"{noun} {moving} and {turning}" if turning else f"{noun} {moving}"
    return f"{noun} {turning or 'standing still'}"


def caption(scene: Scene, *, say: random.Random | None = None) -> str:
    """Say what a scene shows, e.g. `two striped red stars moving left on a tiled navy background`.

    Args:
        scene: what to describe.
        say: where the wording comes from (synonyms, now and then an omitted part); None gives the
            one canonical sentence.
    """
    text = " and ".join(_describe(group, say) for group in scene.groups)
    if say is None or say.random() < 0.85:
        text += f" on a {scene.pattern} {scene.background} background"
    if scene.camera:
        text += f", the camera {scene.camera}"
    return text


def vocabulary() -> list[str]:
    """List every word that a caption can hold, in a fixed order."""
    shapes = [*SHAPES, *SYNONYMS["circle"], *SYNONYMS["square"]]
    plurals = [name + ("es" if name.endswith(("s", "x")) else "s") for name in shapes]
    verbs = ["moving", *SYNONYMS["moving"], "turning", *SYNONYMS["turning"], "standing"]
    words = [
        *("a", "an", "one", "two", "three", "and", "on", "the", "camera", "background"),
        *("small", "large", "medium"),
        *COLOURS,
        *shapes,
        *plurals,
        *TEXTURES,
        *verbs,
        *DIRECTIONS,
        *("clockwise", "counterclockwise"),
        *BACKGROUNDS,
        *PATTERNS,
        *("A", "An", "One", "Two", "Three", "The"),
        *("pans", "zooms", "in", "out", "of", "is", "front", "to", "with"),
        ",",
    ]
    return list(dict.fromkeys(words))
