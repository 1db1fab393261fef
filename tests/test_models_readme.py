"""models/README.md says what the cards and the families say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.cards.card import Card
from app.cards.cards import read_cards
from app.families import FAMILIES
from app.families.base import Family

MODELS = Path(__file__).parent.parent / "models"
README = (MODELS / "README.md").read_text(encoding="utf-8")
PUBLISHED = {name: card for name, card in read_cards(MODELS).items() if card.source.repo}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize("card", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_the_table_has_every_published_card(card: Card) -> None:
    (row,) = (row for row in rows("Cards of published models") if f"`{card.id}`" in row[0])
    _, family, parameters, download, licence, defaults, _ = row
    assert card.parameters and card.bytes and family == card.family
    counted = card.parameters / 1e6, card.parameters / 1e9
    assert (f"{counted[0]:.0f} M" if counted[0] < 1000 else f"{counted[1]:.2f} B") in parameters
    assert download == f"{card.bytes / 1e9:.1f} GB" and card.gated == ("gated" in licence)
    assert f"{card.defaults.num_inference_steps} steps" in defaults
    scale = card.defaults.guidance_scale
    assert defaults.endswith(f" {scale:g}" if scale else "unguided")


def test_a_family_costs_at_most_200_lines() -> None:
    files = {family.__module__: Path(*family.__module__.split(".")).with_suffix(".py") for family in FAMILIES.values()}
    assert len(files) == len(FAMILIES) == 4
    lengths = {name: len((MODELS.parent / file).read_text().splitlines()) for name, file in files.items()}
    assert {name: length for name, length in lengths.items() if length > 200} == {}


def test_the_members_that_a_family_needs_are_listed() -> None:
    listed = {name for row in rows("A new family") for name in re.findall(r"`(\w+)`", row[0])}
    asked = {name for name in {*vars(Family), *Family.__annotations__} if not name.startswith("_")}
    assert listed == asked
    for family in FAMILIES.values():
        assert vars(family).keys() >= {"parts", *Family.__abstractmethods__}


def test_what_it_names_exists() -> None:
    paths = set(re.findall(r"`((?:app|tests)/[\w./]+)`", README))
    assert len(paths) > 5 and [path for path in sorted(paths) if not (MODELS.parent / path).exists()] == []
    for name in ("text.py", "vae.py", "flux.py", "authors.toml", "components.py"):
        assert name in README and (MODELS.parent / "app" / "families" / name).exists()
