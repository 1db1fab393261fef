"""Emoji scenes: subjects, colours, captions and 64 x 64 pictures, all made on the fly.

Knows nothing about networks: it yields text and uint8 arrays.
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
VERSION = "16.0.0"
SETS = ("google", "twitter")  # Noto and Twemoji
HERE = Path(__file__).parent
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
SIDES = {"plain": (52, 58, 64), "placed": (42,), "small": (30,)}
"""Pixels: scales 0.8 to 1, less where something is named. Few, and with few places each, because every one is another
picture to learn of each drawing, and these networks have no room for hundreds."""
SKIPPED_GROUPS = {
    "keycap", "alphanum", "arrow", "av-symbol", "zodiac", "transport-sign", "warning", "family", "gender", "currency",
    "math", "punctuation", "religion", "geometric", "other-symbol", "person-gesture", "country-flag",
    "subdivision-flag", "flag", "skin-tone",
}  # fmt: skip
SKIPPED_CODES = {"2640", "2642", "1F468", "1F469", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}  # gender and hair variants
PLAIN_NAMES = {
    "sunny": "sun", "heart": "red heart", "star": "star", "zap": "lightning bolt", "house": "house", "car": "car",
    "phone": "telephone", "scissors": "scissors", "bulb": "light bulb", "recycle": "recycling symbol",
    "smiley": "happy face", "iphone": "mobile phone", "pizza": "slice of pizza", "tophat": "top hat",
    "mens_shoe": "shoe", "gun": "water pistol", "spades": "spade suit", "clubs": "club suit",
    "hearts": "heart suit", "diamonds": "diamond suit", "airplane": "airplane", "soccer": "soccer ball",
    "relaxed": "relaxed smiling face", "eggplant": "eggplant", "eagle": "eagle", "corn": "ear of corn",
    "deciduous_tree": "tree", "computer": "laptop", "tv": "television", "mag": "magnifying glass", "+1": "thumbs up",
    "-1": "thumbs down", "hand": "raised hand", "cop": "police officer", "email": "envelope", "v": "victory hand",
    "facepunch": "fist bump", "knife": "kitchen knife", "hocho": "kitchen knife", "fried_egg": "fried egg",
    "hankey": "pile of poo", "moyai": "stone face statue", "lower_left_ballpoint_pen": "pen", "mouse": "mouse face",
    "black_joker": "joker card", "mostly_sunny": "sun behind small cloud", "thunder_cloud_and_rain": "thunderstorm",
    "white_check_mark": "green check mark", "heavy_check_mark": "check mark", "x": "red cross mark",
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One emoji: its key in the data source, the names captions use, and its two drawings as premultiplied RGBa."""

    key: str
    names: tuple[str, ...]
    drawings: tuple[Image.Image, ...]

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Scene:
    """Everything that fixes one picture, and what its caption may say of it."""

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


def fetch(cache: Path) -> None:
    """Download and unpack both packages into `cache` with `npm pack`, unless they are there."""
    for name in SETS:
        folder = cache / name
        if (folder / "emoji.json").exists():
            continue
        archive = cache / f"emoji-datasource-{name}-{VERSION}.tgz"
        cache.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            subprocess.run(["npm", "pack", f"emoji-datasource-{name}@{VERSION}"], cwd=cache, check=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = Path(member.name).parts[1:]
                if parts == ("emoji.json",) or (parts[:3] == ("img", name, "64") and member.isfile()):
                    member.name = str(Path(*parts))
                    tar.extract(member, folder, filter="data")


def wanted(entry: dict) -> bool:
    """True for what is a subject: both sets draw it, and it is no flag, skin tone, hair or gender variant, or sign."""
    codes = entry["unified"].split("-")
    if entry["subcategory"] in SKIPPED_GROUPS or not (entry["has_img_google"] and entry["has_img_twitter"]):
        return False
    if "200D" in codes and SKIPPED_CODES & set(codes):
        return False
    return "FACING RIGHT" not in entry["name"] and "CLOCK FACE" not in entry["name"]


def clean(text: str) -> str:
    """The plain lower-case form of a data-source name: "WOMAN’S HAT" -> "womans hat"."""
    text = re.sub(r"['’.]", "", text.lower())
    text = re.sub(r"\b(symbol|sign|heavy|black right-pointing)\b", " ", text)
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text).split())


def load_subjects(cache: Path, count: int = 0) -> list[Subject]:
    """All subjects in a fixed order, those of `popular.txt` first; `count` > 0 takes only the first ones."""
    fetch(cache)
    entries = {e["short_name"]: e for e in json.loads((cache / SETS[0] / "emoji.json").read_text()) if wanted(e)}
    popular = (HERE / "popular.txt").read_text().split()
    unknown = [key for key in popular if key not in entries]
    if unknown:
        raise ValueError(f"popular.txt names no emoji: {unknown}")
    keys = list(dict.fromkeys(popular + sorted(entries)))
    names = {key: PLAIN_NAMES.get(key) or clean(entries[key]["name"]) for key in keys}
    shared = Counter(names.values()) + Counter(clean(key) for key in keys if clean(key) != names[key])
    subjects = []
    for key in keys[: count or None]:
        alias = clean(key)
        usable = shared[alias] == 1 and len(alias) > 2 and not alias[-1].isdigit()
        told = (names[key], alias) if usable else (names[key],)
        image = entries[key]["image"]
        drawn = tuple(Image.open(cache / s / "img" / s / "64" / image).convert("RGBA").convert("RGBa") for s in SETS)
        subjects.append(Subject(key, tuple(dict.fromkeys(told)), drawn))
    return subjects


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
    side = int(rng.choice(SIDES["small" if small else "placed" if place else "plain"]))
    x, y = position(rng, side, place)
    return Scene(index, colour, named, small, place, int(rng.integers(2)), bool(rng.integers(2)), side, x, y)


def plain_scene(rng: np.random.Generator, index: int) -> Scene:
    """A scene that says only its subject: white, middle, full size; drawing, mirroring, scale and place vary."""
    side = int(rng.choice(SIDES["plain"]))
    x, y = position(rng, side, None)
    return Scene(index, "white", False, False, None, int(rng.integers(2)), bool(rng.integers(2)), side, x, y)


def every_plain_scene(index: int) -> tuple[list[Scene], list[float]]:
    """All scenes that `plain_scene` can draw of a subject, and how likely it draws each."""
    scenes, weights = [], []
    for side, drawing, mirrored in product(SIDES["plain"], range(len(SETS)), (False, True)):
        places = list(product(middles(side), repeat=2))
        scenes += [Scene(index, "white", False, False, None, drawing, mirrored, side, x, y) for x, y in places]
        weights += [1 / (len(SIDES["plain"]) * 2 * len(SETS) * len(places))] * len(places)
    return scenes, weights


def middles(side: int) -> list[int]:
    """Where a side may begin about the middle: the least of the plain ones a little off it, others in it."""
    return [(SIZE - side) // 2 + step for step in ((-2, 2) if side == min(SIDES["plain"]) else (0,))]


def position(rng: np.random.Generator, side: int, place: str | None) -> tuple[int, int]:
    """The upper left corner of a square of `side` pixels: near the named edge, or about the middle."""
    room = SIZE - side
    x, y = (int(rng.choice(middles(side))) for _ in range(2))
    near = 2 * int(rng.integers(2))
    if place in ("left", "right"):
        x = near if place == "left" else room - near
    elif place in ("top", "bottom"):
        y = near if place == "top" else room - near
    return x, y


def render(scene: Scene, subject: Subject) -> np.ndarray:
    """The picture, uint8 [64, 64, 3]; resized with premultiplied alpha, so that edges keep their colour."""
    sprite = subject.drawings[scene.drawing]
    if scene.mirrored:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(sprite.resize((scene.side, scene.side), Image.Resampling.BICUBIC), dtype=np.float32)
    picture = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    picture[:] = COLOURS[scene.colour]
    window = picture[scene.y : scene.y + scene.side, scene.x : scene.x + scene.side]
    window *= 1 - pixels[..., 3:] / 255
    window += pixels[..., :3]
    return picture.clip(0, 255).round().astype(np.uint8)


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def caption(rng: np.random.Generator, scene: Scene, subject: Subject) -> str:
    """One of several plain ways to say what the scene names, now and then with a capital or a full stop."""
    noun = subject.names[int(rng.integers(len(subject.names)))]
    noun = f"small {noun}" if scene.small else noun
    bare = rng.random() < 0.5
    what = noun if bare else article(noun)
    where = f" at the {scene.place}" if scene.place else ""
    if scene.place and rng.random() < 0.3:
        where = f", {scene.place}"
    forms = [what + where, what + where, f"a picture of {article(noun)}{where}"]
    if scene.colour_named:
        forms = [
            f"{what}{where} on a {scene.colour} background",
            f"{what}{where} on a {scene.colour} background",
            f"{what}{where} on {scene.colour}",
            f"on {scene.colour}, {what}{where}",
            f"{what}{where}, {scene.colour} background",
        ]
    text = str(rng.choice(forms))
    if rng.random() < 0.15:
        text = text.capitalize() if rng.random() < 0.7 else text.title()
    return text + "." if rng.random() < 0.05 else text
