"""A DiT whose weights are torch `.bin` files, as its Hub repositories have it, to one that the server loads."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.cards.cards import read_card
from app.cards.files import BIN
from app.checkpoints.convert import convert_dit
from app.errors import CheckpointError
from app.families import DiT
from tests.families.plain import load
from tests.parts.tiny import write_dit
from tests.parts.tiny_parts import Payload, read_state

STEM = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As facebook/DiT-XL-2-256, without its card: an index, configs, and a `.bin` of each part."""
    here = tmp_path / "DiT"
    write_dit(here, classes=10, num_layers=3)
    (here / "card.toml").unlink()
    for part in ("transformer", "vae"):
        torch.save(load_file(here / part / STEM), here / part / BIN)
        (here / part / STEM).rename(here / f"{part}.safetensors")
    return here


def convert(folder: Path, vae: Path | None = None, **options: object) -> Path:
    to = folder.parent / "my-dit"
    convert_dit(folder, to, vae, lambda line: None, dtype=torch.float32, **options)  # type: ignore[arg-type]
    return to


def test_it_has_the_same_tensors_and_the_originals_arithmetic(folder: Path) -> None:
    made = convert(folder, labels=tuple(f"class {i}" for i in range(10)))
    for part in ("transformer", "vae"):
        ours, theirs = read_state(made / part), load_file(folder / f"{part}.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    card, family = read_card(made / "card.toml"), load(made)
    assert isinstance(family, DiT) and card.labels == tuple(f"class {i}" for i in range(10))
    assert (card.guided_channels, card.time_freq_shift, card.norm_eps) == (3, 0, 1e-6)
    positions = family.network.get_buffer("pos_embed.pos_embed")
    assert card.parameters == positions.numel() + sum(p.numel() for p in family.network.parameters())


def test_another_vae_may_be_given(folder: Path) -> None:
    other = folder.parent / "other"
    write_dit(other, seed=7)
    made = convert(folder, other / "vae")
    assert all(torch.equal(read_state(made / "vae")[key], value) for key, value in read_state(other / "vae").items())


def test_a_part_in_safetensors_will_do(folder: Path) -> None:
    (folder / "vae.safetensors").rename(folder / "vae" / STEM)
    (folder / "vae" / BIN).unlink()
    assert load(convert(folder)).card.id == "my-dit"


def test_what_is_not_such_a_folder_is_refused_and_nothing_is_left(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    whole, content = config.read_text(), json.loads(config.read_text())
    wrong = {"num_layers": 4, "sample_size": None, "in_channels": "4", "patch_size": 0, "num_embeds_ada_norm": 11}
    for field, value in wrong.items():
        config.write_text(json.dumps({**content, field: value}))
        with pytest.raises(CheckpointError):
            convert(folder)
    config.write_text(whole)
    network = folder / "transformer" / BIN
    torch.save({**torch.load(network, weights_only=True), "more": torch.zeros(1)}, network)
    with pytest.raises(CheckpointError, match="unexpected weights: more"):
        convert(folder)
    state = torch.load(network, weights_only=True)
    del state["more"]
    state["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    torch.save(state, network)
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.2.* is not equal to transformer_blocks\.0"):
        convert(folder)
    network.unlink()
    with pytest.raises(CheckpointError, match=r"transformer.*missing"):
        convert(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["DiT"]


def test_a_bomb_and_a_payload_are_refused(folder: Path) -> None:
    network = folder / "transformer" / BIN
    with zipfile.ZipFile(network) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(network, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="compressed"):
        convert(folder)

    torch.save({"a": Payload(folder / "ran")}, network)
    with pytest.raises(CheckpointError):
        convert(folder)
    assert not (folder / "ran").exists()


def test_the_folders_own_schedule_is_kept(folder: Path) -> None:
    """Its betas and prediction; and the grid that it does not name is the authors'."""
    file = folder / "scheduler" / "scheduler_config.json"
    facts = {"beta_schedule": "scaled_linear", "beta_end": 0.012, "prediction_type": "v_prediction"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))
    made = convert(folder)
    schedule = read_card(made / "card.toml").schedule
    assert (schedule.betas, schedule.beta_end, schedule.prediction) == ("scaled_linear", 0.012, "v")
    assert (schedule.spacing, schedule.variance) == ("respaced", "learned_range")
    assert json.loads((made / "scheduler" / "scheduler_config.json").read_text()) == json.loads(file.read_text())


def test_a_schedule_that_no_card_holds_is_refused(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rescale_betas_zero_snr": True}))
    with pytest.raises(CheckpointError, match="rescale_betas_zero_snr is true, which no schedule here has"):
        convert(folder)
    assert not (folder.parent / "my-dit").exists()
