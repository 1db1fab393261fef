"""Emoji scenes: subjects, styles, colours, captions and 128 x 128 pictures, all made on the fly.

It yields text and uint8 arrays.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import resvg_py
from PIL import Image

SIZE = 128
DRAWN = 256  # pixels of a drawing's side, before it is laid into a scene
STYLES = ("3d", "flat")
PACKAGES = {"3d": ("@lobehub/fluent-emoji-3d", "1.1.0"), "flat": ("@svgmoji/noto", "3.2.0")}
SUBJECTS = Path(__file__).parent / "emoji.txt"
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 211, 77),
    "green": (46, 160, 67),
    "blue": (37, 99, 235),
    "purple": (126, 34, 206),
    "pink": (244, 143, 177),
    "gray": (128, 128, 128),
}
PLACES = ("left", "right", "top", "bottom")
SIDES = {"plain": (88, 96, 104), "placed": (80,), "small": (56,)}
STEP = 8
"""Pixels of a latent pixel's side. Drawings have few sides and lie on this grid, so that a drawing in another place has
the same latents in another place: a small network has no room for thousands of different ones."""
REACH, LEVEL = 20, 8
"""Pixels off the middle that a drawing may lie across and down; along an edge that its caption names."""
SHOWN_SEED = 2502557892  # drawn before the first training, and never again: which prompts the grid shows


@dataclass(frozen=True)
class Subject:
    """One emoji: its code points, the names captions use, and a drawing of each style as premultiplied RGBa."""

    key: str
    names: tuple[str, ...]
    drawings: tuple[Image.Image, ...]

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Scene:
    """Everything that fixes one picture, and what its caption may say of it. `drawing` is the style's place in STYLES.

    The training mirrors nothing; a picture may still be compared with a mirrored drawing.
    """

    subject: int
    colour: str
    colour_named: bool
    small: bool
    place: str | None
    drawing: int
    mirrored: bool
    side: int
    x: int
    y: int
    style_named: bool = False


def code(text: str) -> str:
    """The name of a drawing without letter case and variation selectors: "2764-FE0F" -> "2764"."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def names() -> dict[str, tuple[str, ...]]:
    """The names of every subject by its code points, in the order of `emoji.txt`, whose lines are "🍎 apple, ..."."""
    lines = (line.partition(" ") for line in SUBJECTS.read_text(encoding="utf-8").splitlines())
    return {code("-".join(f"{ord(c):x}" for c in emoji)): tuple(said.split(", ")) for emoji, _, said in lines}


def pack(cache: Path, style: str) -> Path:
    """The archive of a style's npm package, downloaded by `npm pack` unless it is there."""
    package, version = PACKAGES[style]
    archive = cache / f"{package.strip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", f"{package}@{version}"], cwd=cache, check=True)
    return archive


def unpack(archive: Path, style: str, wanted: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """The wanted drawings of an archive: webp files named by code points, or one SVG that has an SVG for each."""
    with tarfile.open(archive) as tar:
        if style == "3d":
            for member in tar:
                if member.name.endswith(".webp") and code(Path(member.name).stem) in wanted:
                    yield code(Path(member.name).stem), Image.open(io.BytesIO(tar.extractfile(member).read()))
            return
        ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
        for element in ElementTree.parse(tar.extractfile("package/sprites/all.svg")).getroot():
            if code(element.get("id", "")) in wanted:
                yield code(element.get("id", "")), rasterise(ElementTree.tostring(element, encoding="unicode"))


def rasterise(svg: str) -> Image.Image:
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg, width=DRAWN, height=DRAWN, skip_system_fonts=True)))


def fetch(cache: Path) -> None:
    """Put the subjects' drawings into `cache`, a PNG each in a folder for each style, unless they are there."""
    wanted = set(names())
    for style in STYLES:
        folder = cache / style
        if wanted <= {file.stem for file in folder.glob("*.png")}:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for key, image in unpack(pack(cache, style), style, wanted):
            image.convert("RGBA").resize((DRAWN, DRAWN)).save(folder / f"{key}.png")


def load_subjects(cache: Path, count: int = 0) -> list[Subject]:
    """All subjects in the order of `emoji.txt`; `count` > 0 takes only the first ones."""
    fetch(cache)
    chosen = list(names().items())[: count or None]
    return [
        Subject(key, said, tuple(Image.open(cache / style / f"{key}.png").convert("RGBa") for style in STYLES))
        for key, said in chosen
    ]


def trained(subject: Subject, colour: str) -> bool:
    """False for the one (subject, colour) pair in ten that training never shows; white is always trained."""
    return colour == "white" or zlib.crc32(f"{subject.key}/{colour}".encode()) % 9 != 0


def draw_scene(rng: np.random.Generator, subjects: list[Subject], every_pair: bool = False) -> Scene:
    """A random scene; without `every_pair` it never is one of the pairs that are kept from training."""
    index = int(rng.integers(len(subjects)))
    colours = [c for c in COLOURS if every_pair or trained(subjects[index], c)]
    named = rng.random() < 0.75
    colour = str(rng.choice(colours)) if named else "white"
    small = rng.random() < 0.2
    place = str(rng.choice(PLACES)) if rng.random() < (0.6 if small else 0.12) else None
    side, x, y = spot(rng, "small" if small else "placed" if place else "plain", place)
    style = int(rng.random() < 0.4)
    style_named = style > 0 or rng.random() < 0.25  # who names no style is shown the first
    return Scene(index, colour, named, small, place, style, False, side, x, y, style_named)


def plain_scene(rng: np.random.Generator, index: int, style: int = 0) -> Scene:
    """A scene that says only its subject: white, about the middle, full size; scale and place vary."""
    return Scene(index, "white", False, False, None, style, False, *spot(rng, "plain", None))


def every_plain_scene(index: int, style: int = 0) -> tuple[list[Scene], list[float]]:
    """All scenes that `plain_scene` can draw of a subject, and how likely it draws each."""
    scenes = [Scene(index, "white", False, False, None, style, False, *each) for each in spots("plain")]
    return scenes, [1 / len(scenes)] * len(scenes)


def spots(kind: str, reach: int = REACH) -> list[tuple[int, int, int]]:
    """Sides and upper left corners in pixels of the drawings of a kind, about the middle."""
    return [(side, x, y) for side in SIDES[kind] for x, y in product(middles(side, reach), repeat=2)]


def middles(side: int, reach: int) -> list[int]:
    """Where a side may begin about the middle."""
    room = SIZE - side
    return [place for place in range(0, room + 1, STEP) if abs(place - room / 2) <= reach]


def spot(rng: np.random.Generator, kind: str, place: str | None) -> tuple[int, int, int]:
    """The side and the upper left corner of a drawing: near the named edge, or about the middle."""
    choices = spots(kind, LEVEL if place else REACH)
    side, x, y = choices[rng.integers(len(choices))]
    near, room = STEP * int(rng.integers(2)), SIZE - side
    if place in ("left", "right"):
        x = near if place == "left" else room - near
    elif place in ("top", "bottom"):
        y = near if place == "top" else room - near
    return side, x, y


def render(scene: Scene, subject: Subject, size: int = SIZE) -> np.ndarray:
    """The picture, uint8 [size, size, 3]; resized with premultiplied alpha, so that edges keep their colour."""
    sprite = subject.drawings[scene.drawing]
    if scene.mirrored:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(sprite.resize((scene.side, scene.side), Image.Resampling.BICUBIC), dtype=np.float32)
    picture = np.empty((size, size, 3), dtype=np.float32)
    picture[:] = COLOURS[scene.colour]
    window = picture[scene.y : scene.y + scene.side, scene.x : scene.x + scene.side]
    window *= 1 - pixels[..., 3:] / 255
    window += pixels[..., :3]
    return picture.clip(0, 255).round().astype(np.uint8)


def article(noun: str) -> str:
    """The noun with "a" or "an", and a plural as it is."""
    if noun.endswith("s") and not noun.endswith(("ss", "us")):
        return noun
    an = noun.startswith(("a", "e", "i", "o", "u", "hour")) and not noun.startswith(("uni", "ufo"))
    return f"{'an' if an else 'a'} {noun}"


def label(subject: Subject, style: int) -> str:
    """The name of a class, which is a subject in a style: "apple", "flat apple"."""
    return f"{STYLES[style]} {subject.name}" if style else subject.name


def described(rng: np.random.Generator, scene: Scene, subject: Subject) -> str:
    """What is in the picture: the subject by one of its names, with size and style where the scene names them."""
    style = STYLES[scene.drawing] if scene.style_named else ""
    noun = str(rng.choice(subject.names))
    if scene.small:
        noun = f"{rng.choice(('small', 'small', 'small', 'tiny', 'little'))} {noun}"
    bare = rng.random() < 0.5
    if not style:
        return noun if bare else article(noun) if rng.random() < 0.8 else f"a picture of {article(noun)}"
    plain = noun if bare else article(noun)
    before = f"{style} {noun}" if bare else article(f"{style} {noun}")
    forms = [before, before, before, f"{plain} in {style}", f"{plain} in {style} style"]
    return str(rng.choice([*forms, f"{style} picture of {article(noun)}", f"a {style} drawing of {article(noun)}"]))


def caption(rng: np.random.Generator, scene: Scene, subject: Subject) -> str:
    """One of several plain ways to say what the scene names, now and then with a capital or a full stop."""
    what = described(rng, scene, subject)
    if scene.place:
        what += str(rng.choice([" at the {0}", " at the {0}", " on the {0}", ", {0}"])).format(scene.place)
    colour = "grey" if scene.colour == "gray" and rng.random() < 0.3 else scene.colour
    ground = article(f"{colour} background")
    forms = ["{0} on {2}", "{0} on {2}", "{0} on {1}", "on {1}, {0}", "{0}, {1} background", "{0} with {2}"]
    text = str(rng.choice(forms)).format(what, colour, ground) if scene.colour_named else what
    if rng.random() < 0.15:
        text = text.capitalize() if rng.random() < 0.7 else text.title()
    return text + "." if rng.random() < 0.05 else text


def shown(subjects: list[Subject], count: int = 64) -> list[tuple[Scene, str]]:
    """Scenes and captions of `count` different subjects, always the same: what a person is shown to name."""
    rng = np.random.default_rng(SHOWN_SEED)
    scenes = []
    for index in rng.choice(len(subjects), size=min(count, len(subjects)), replace=False).tolist():
        scene = draw_scene(rng, [subjects[index]], every_pair=True)
        scenes.append((replace(scene, subject=index), caption(rng, scene, subjects[index])))
    return scenes
