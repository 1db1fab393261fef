"""The scenes of the 64-pixel checkpoints that are served: 1,169 emoji, each drawn by Noto and by Twemoji.

The trainings of the next checkpoints use `data.py`. This module has those of its functions that differ.
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from data import COLOURS, PLACES, Scene, Subject, trained
from PIL import Image

SIZE = 64
VERSION = "16.0.0"
SETS = ("google", "twitter")  # Noto and Twemoji
SIDES = {"plain": (52, 58, 64), "placed": (42,), "small": (30,)}
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


def fetch(cache: Path) -> None:
    """Download and unpack both packages into `cache` with `npm pack`, unless they are there."""
    for name in SETS:
        folder, archive = cache / name, cache / f"emoji-datasource-{name}-{VERSION}.tgz"
        if (folder / "emoji.json").exists():
            continue
        cache.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            subprocess.run(["npm", "pack", f"emoji-datasource-{name}@{VERSION}"], cwd=cache, check=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = Path(member.name).parts[1:]
                if parts == ("emoji.json",) or (parts[:3] == ("img", name, "64") and member.isfile()):
                    member.name = str(Path(*parts))
                    tar.extract(member, folder, filter="data")


def wanted(entry: dict[str, Any]) -> bool:
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
    """All subjects in the order of their keys; `count` > 0 takes only the first ones."""
    fetch(cache)
    listed = json.loads((cache / SETS[0] / "emoji.json").read_text())
    entries = {entry["short_name"]: entry for entry in sorted(listed, key=lambda e: e["short_name"]) if wanted(entry)}
    names = {key: PLAIN_NAMES.get(key) or clean(entry["name"]) for key, entry in entries.items()}
    shared = Counter(names.values()) + Counter(clean(key) for key in entries if clean(key) != names[key])
    subjects = []
    for key, entry in list(entries.items())[: count or None]:
        alias = clean(key)
        usable = shared[alias] == 1 and len(alias) > 2 and not alias[-1].isdigit()
        files = (cache / name / "img" / name / "64" / entry["image"] for name in SETS)
        drawings = tuple(Image.open(file).convert("RGBA").convert("RGBa") for file in files)
        said = dict.fromkeys((names[key], alias) if usable else (names[key],))
        subjects.append(Subject(key, tuple(said), drawings))
    return subjects


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


def plain_scene(rng: np.random.Generator, index: int, style: int = 0) -> Scene:
    """A scene that says only its subject: white, about the middle, full size; no caption names a style here."""
    side = int(rng.choice(SIDES["plain"]))
    x, y = position(rng, side, None)
    return Scene(index, "white", False, False, None, int(rng.integers(2)), bool(rng.integers(2)), side, x, y)


def label(subject: Subject, style: int = 0) -> str:
    """The name of a class, which is a subject."""
    return subject.name


def position(rng: np.random.Generator, side: int, place: str | None) -> tuple[int, int]:
    """The upper left corner of a square of `side` pixels: near the named edge, or about the middle."""
    room = SIZE - side
    off = (-2, 2) if side == min(SIDES["plain"]) else (0,)
    x, y = (int(rng.choice([room // 2 + step for step in off])) for _ in range(2))
    near = 2 * int(rng.integers(2))
    if place in ("left", "right"):
        x = near if place == "left" else room - near
    elif place in ("top", "bottom"):
        y = near if place == "top" else room - near
    return x, y


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
        ground = f"{scene.colour} background"
        forms = [f"{what}{where} on a {ground}"] * 2 + [f"{what}{where} on {scene.colour}"]
        forms += [f"on {scene.colour}, {what}{where}", f"{what}{where}, {ground}"]
    text = str(rng.choice(forms))
    if rng.random() < 0.15:
        text = text.capitalize() if rng.random() < 0.7 else text.title()
    return text + "." if rng.random() < 0.05 else text
