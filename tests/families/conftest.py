"""Tiny random checkpoints for the tests of families, and the families loaded from them, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from app.cards.card import Card
from app.cards.cards import read_card
from app.families import SD3, DiT
from app.pool.pool import Pool
from app.samplers.schedule import Schedule
from tests.families.plain import build, load
from tests.parts.engine import load_all
from tests.parts.tiny import SD3_PARTS, write_dit, write_flux, write_sd3
from tests.parts.tiny_parts import write_json
from tests.parts.tiny_unets import write_unets


@pytest.fixture(scope="module", autouse=True)
def computing(one_thread: None) -> None:
    """Everywhere in this folder."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd3: as SD3-medium. sd35: QK norm and dual attention. no-t5: patches of 1, no T5. dit: of 1000 classes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_sd3(folder / "sd3")
    write_sd3(
        folder / "sd35", seed=20, qk_norm="rms_norm", dual_attention_layers=(0,), num_layers=3, pos_embed_max_size=10
    )
    write_sd3(folder / "no-t5", leave_out=("text_encoder_3",), patch_size=1, sample_size=4, pos_embed_max_size=16)
    write_dit(folder / "dit", classes=1000)
    return folder


@pytest.fixture(scope="session")
def fluxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """schnell and dev: FLUX.1 without and with embedded guidance and a shift that depends on the size."""
    folder = tmp_path_factory.mktemp("flux")
    for name in ("schnell", "dev"):
        write_flux(folder / name, dev=name == "dev")
    return folder


@pytest.fixture(scope="session")
def unets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five tiny U-Nets: tiny-sd15, tiny-sd2, tiny-sdxl, tiny-sdxl-turbo, tiny-refiner."""
    folder = tmp_path_factory.mktemp("unets")
    write_unets(folder)
    return folder


def _cards(checkpoints: Path) -> Iterator[Card]:
    """The checkpoints under their folders' names, and the same files under cards that are wrong in one thing."""
    for name in ("sd3", "sd35", "no-t5", "dit"):
        yield read_card(checkpoints / name / "card.toml").model_copy(update={"id": name})
    sd3, dit = (read_card(checkpoints / name / "card.toml") for name in ("sd3", "dit"))
    others = {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}
    others |= {second: first for first, second in others.items()}
    swapped = {part: f"sd3/{other}" for part, other in others.items()}
    yield sd3.model_copy(update={"id": "swapped", "components": swapped})
    yield sd3.model_copy(update={"id": "unshifted", "schedule": Schedule(kind="flow", shift=1.0)})
    write_json(checkpoints / "dropped" / "model_index.json", {})
    kept = {part: f"sd3/{part}" for part in SD3_PARTS if not part.endswith("_3")}
    yield sd3.model_copy(update={"id": "dropped", "folder": checkpoints / "dropped", "components": kept})
    yield dit.model_copy(update={"id": "fixed", "schedule": Schedule(kind="diffusion", variance="fixed_small")})


@pytest.fixture(scope="session")
def pool(checkpoints: Path) -> Iterator[Pool]:
    """A real pool with all of `_cards` loaded."""
    loaded = load_all(Pool({card.id: card for card in _cards(checkpoints)}, "cpu", torch.float32))
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def parts(checkpoints: Path) -> dict[str, Any]:
    """The built parts of sd3."""
    return build(read_card(checkpoints / "sd3" / "card.toml"))


@pytest.fixture(scope="session")
def sd3(checkpoints: Path, parts: dict[str, Any]) -> SD3:
    return SD3(read_card(checkpoints / "sd3" / "card.toml"), parts, "cpu", torch.float32)


@pytest.fixture(scope="session")
def dit(checkpoints: Path) -> DiT:
    family = load(checkpoints / "dit")
    assert isinstance(family, DiT)
    return family
