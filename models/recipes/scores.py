"""Scores of drawn pictures: what is right in each, their sums, and how these are shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data import COLOURS, SIZE, Scene, Subject, render, trained
from nearest import Match, Nearest
from PIL import Image, ImageOps

VALUES = np.array(list(COLOURS.values()), dtype=np.float32)
BAR = 11 / 128
"""Part of the side off the middle from which a place counts as named: along the edge they stay within 8 / 128, off it
over 15 / 128."""


@dataclass(frozen=True)
class Asked:
    """One picture: the scene that its caption names, the caption, its seed."""

    scene: Scene
    text: str
    seed: int


@dataclass(frozen=True)
class Score:
    """What is right in one picture; None where nothing was asked.

    distance: to the nearest drawing, 0 to 255. sharpness: how its edges agree with those of that drawing, up to 1.
    """

    known: bool
    subject: bool
    among_five: bool
    background: bool
    spot: bool | None
    style: bool | None
    distance: float
    sharpness: float


def background(picture: np.ndarray) -> str:
    """The colour of the ten that is nearest to the median of the border."""
    border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    median = np.median(border.astype(np.float32), axis=0)
    return list(COLOURS)[int(np.square(VALUES - median).sum(axis=1).argmin())]


def spot_is_right(scene: Scene, match: Match, size: int = SIZE) -> bool | None:
    """Whether the nearest drawing has the size and the place that the caption names; None when it names neither.

    Measured on the square of the drawing, not on the ink's bounding box: thin drawings have narrow boxes that need not
    be in the middle, and ink of the background's colour is in no mask.
    """
    if not (scene.small or scene.place):
        return None
    if scene.small != (match.side <= 0.55 * size) or (scene.place and match.side > 0.75 * size):
        return False
    right, down = ((at + match.side / 2) / size - 0.5 for at in (match.x, match.y))
    off = {"left": (-right, down), "right": (right, down), "top": (-down, right), "bottom": (down, right)}
    return scene.place is None or (off[scene.place][0] > BAR and abs(off[scene.place][1]) < BAR)


def edges(picture: np.ndarray) -> np.ndarray:
    """The differences of all neighbouring pixels across and down, as one row of length 1."""
    values = picture.astype(np.float32)
    found = np.concatenate([np.diff(values, axis=axis).ravel() for axis in (0, 1)])
    return found / max(float(np.linalg.norm(found)), 1e-3)


def sharpness(subjects: list[Subject], asked: Asked, picture: np.ndarray, match: Match) -> float:
    """Cosine of the edges of a picture and of its nearest drawing: 1 is the drawing; soft and grainy ones have less."""
    spot = (match.side, match.x, match.y)
    scene = Scene(match.subject, asked.scene.colour, True, False, None, match.drawing, match.mirrored, *spot)
    return float(edges(picture) @ edges(render(scene, subjects[match.subject], len(picture))))


def score(subjects: list[Subject], same: set[int], asked: Asked, picture: np.ndarray, matches: list[Match]) -> Score:
    """same: the subjects that count as the asked one, itself among them."""
    scene = asked.scene
    near = [match.subject in same for match in matches]
    return Score(
        trained(subjects[scene.subject], scene.colour),
        near[0],
        any(near[:5]),
        background(picture) == scene.colour,
        spot_is_right(scene, matches[0], len(picture)),
        matches[0].drawing == scene.drawing if scene.style_named else None,
        matches[0].error,
        sharpness(subjects, asked, picture, matches[0]),
    )


def judge(nearest: Nearest, same: list[set[int]], asked: list[Asked], pictures: np.ndarray) -> list[Score]:
    """Scores of pictures, uint8 [n, side, side, 3]. same: what `twins` says of all subjects."""
    found = nearest.find(pictures, [each.scene.colour for each in asked])
    rows = zip(asked, pictures, found, strict=True)
    return [score(nearest.subjects, same[each.scene.subject], each, *its) for each, *its in rows]


def against(scores: list[Score], before: list[Score]) -> str:
    """What changed between two runs that were asked the same, picture by picture."""
    rows = list(zip(scores, before, strict=True))
    gained = sum(one.subject and not two.subject for one, two in rows)
    lost = sum(two.subject and not one.subject for one, two in rows)
    both = [(one, two) for one, two in rows if one.subject and two.subject]
    sharper = sum(one.sharpness > two.sharpness for one, two in both)
    counts = f"{gained} subjects right that were wrong, {lost} wrong that were right"
    return f"{counts}; of {len(both)} right in both {sharper} sharper"


def share(values: Iterable[bool | None]) -> tuple[int, int]:
    """(how many are right, of how many that were asked)"""
    said = [value for value in values if value is not None]
    return sum(said), len(said)


def summary(name: str, scores: list[Score], seconds: float | None, classes: bool) -> dict[str, object]:
    """One line of the table: right and asked of each kind."""
    known, new = [s for s in scores if s.known], [s for s in scores if not s.known]
    return {
        "run": name,
        "subject": share(s.subject for s in known),
        "subject_new": share(s.subject for s in new),
        "among_five": share(s.among_five for s in scores),
        "background": (0, 0) if classes else share(s.background for s in known),
        "background_new": share(s.background for s in new),
        "size_and_place": (0, 0) if classes else share(s.spot for s in scores),
        "style": share(s.style for s in scores),
        "distance": round(float(np.mean([s.distance for s in scores])), 2),
        "sharpness": round(float(np.mean([s.sharpness for s in scores])), 3),
        "seconds": seconds and round(seconds, 3),
    }


def table(lines: list[dict[str, object]]) -> str:
    """Markdown; "new" are the (subject, colour) pairs that were never trained."""
    heads = (
        "run",
        "subject",
        "subject, new",
        "among 5 nearest",
        "background",
        "background, new",
        "size and place",
        "style",
    )
    rows = [(*heads, "distance", "sharpness", "s an image"), ("---",) * 11]
    for line in lines:
        rows.append(tuple(cell(value) for value in line.values()))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(value: object) -> str:
    if isinstance(value, tuple):
        return f"{100 * value[0] / value[1]:.1f} % of {value[1]}" if value[1] else "-"
    return "-" if value is None else str(value)


def save_grid(path: Path, pictures: np.ndarray, scores: list[Score], columns: int = 16) -> None:
    """All pictures, those whose subject is wrong in a red frame."""
    height, side = -(-len(pictures) // columns), pictures.shape[1] + 4
    sheet = Image.new("RGB", (columns * side, height * side), "white")
    for at, (picture, each) in enumerate(zip(pictures, scores, strict=True)):
        tile = ImageOps.expand(Image.fromarray(picture), 2, "white" if each.subject else "red")
        sheet.paste(tile, (at % columns * side, at // columns * side))
    sheet.save(path)
