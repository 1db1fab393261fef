"""`instep models add`: files where they are become a model, which draws what the same weights draw elsewhere."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.cards.files import to_toml
from tests.parts import originals
from tests.parts.commands import Run, one_line
from tests.parts.tiny import write_flux

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture
def store(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of cards in which to add some: tiny-sd3 and tiny-dit."""
    folder = tmp_path / "models"
    for name in ("tiny-sd3", "tiny-dit"):
        shutil.copytree(tiny / name, folder / name)
    monkeypatch.setenv("INSTEP_MODELS", str(folder))
    return folder


@pytest.fixture
def network(tiny: Path, tmp_path: Path) -> Path:
    """tiny-sd3's network and VAE in one file, as its authors would write it; tests in one folder may share it."""
    return originals.write(originals.sd3_file(tiny / "tiny-sd3"), tmp_path / "files" / "My Model.safetensors")


def picture(run: Run, model: str, out: Path) -> np.ndarray:
    """What a model draws of one prompt and seed."""
    drawn = run("generate", "red apple", "--model", model, "--seed", 3, "--steps", 3, "--out", out / f"{model}.png")
    assert drawn.exit_code == 0, drawn.output
    return np.asarray(Image.open(out / f"{model}.png"))


def state_of(run: Run, model: str) -> str:
    lines = run("models", "check").stdout.splitlines()
    return next(line.split()[1] for line in lines if line.split()[0] == model)


def test_the_rest_from_another_card(run: Run, store: Path, network: Path, tmp_path: Path) -> None:
    result = run("models", "add", network, "--rest", "tiny-sd3")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"my-model: {store / 'my-model' / 'card.toml'}, like tiny-sd3; the weights stay")
    assert result.stdout.endswith('next: instep generate "a red apple" --model my-model\n')
    assert list((store / "my-model").rglob("*.safetensors")) == []
    assert np.array_equal(picture(run, "my-model", tmp_path), picture(run, "tiny-sd3", tmp_path))
    assert state_of(run, "my-model") == "ok"
    card = tomllib.loads((store / "my-model" / "card.toml").read_text())
    assert card["files"] == {"transformer": str(network), "vae": str(network)}
    assert card["components"]["text_encoder_3"] == "tiny-sd3/text_encoder_3" and "transformer" not in card["components"]


@pytest.mark.slow
def test_every_part_from_a_place_of_its_own(run: Run, store: Path, network: Path, tiny: Path, tmp_path: Path) -> None:
    """A T5 in a file of its own, a VAE in another, folders for the rest, and no other card."""
    parts = tiny / "tiny-sd3"
    own = {name: value for name, value in originals.read(network.parent).items() if not name.startswith("first_stage")}
    net = originals.write(own, tmp_path / "net.safetensors")
    ae = originals.write(originals.vae(originals.read(parts / "vae")), tmp_path / "ae.safetensors")
    (t5,) = (parts / "text_encoder_3").glob("*.safetensors")
    places = [parts / "text_encoder", parts, t5]
    words = [
        word for part, place in zip(ENCODERS, places, strict=True) for word in (f"--{part.replace('_', '-')}", place)
    ]
    made = run("models", "add", net, "--id", "mine", "--vae", ae, "--tokenizers", parts, *words)
    assert made.exit_code == 0, made.output
    assert np.array_equal(picture(run, "mine", tmp_path), picture(run, "tiny-sd3", tmp_path))
    assert state_of(run, "mine") == "ok"


@pytest.mark.slow
def test_flux_from_the_files_that_its_users_have(run: Run, store: Path, tmp_path: Path) -> None:
    """flux1-dev, ae, clip_l and t5xxl, each in a file of its own."""
    whole = store / "tiny-flux"
    write_flux(whole, dev=True)
    net = originals.write(
        originals.flux(originals.read(whole / "transformer")), tmp_path / "f" / "flux1-dev.safetensors"
    )
    ae = originals.write(originals.vae(originals.read(whole / "vae")), tmp_path / "f" / "ae.safetensors")
    (clip,), (t5,) = ((whole / part).glob("*.safetensors") for part in ("text_encoder", "text_encoder_2"))
    assert run("models", "check", net).stdout.startswith("fits tiny-flux\n")
    words = ["--vae", ae, "--text-encoder", clip, "--text-encoder-2", t5, "--tokenizers", whole]
    made = run("models", "add", net, *words)
    assert made.exit_code == 0, made.output
    assert np.array_equal(picture(run, "flux1-dev", tmp_path), picture(run, "tiny-flux", tmp_path))


def test_a_folder_of_diffusers(run: Run, store: Path, tiny: Path) -> None:
    result = run("models", "add", tiny / "tiny-dit", "--id", "second", "--like", "tiny-dit")
    assert result.exit_code == 0 and result.stdout.endswith("next: instep serve\n")
    assert tomllib.loads((store / "second" / "card.toml").read_text())["source"] == {"path": str(tiny / "tiny-dit")}
    assert state_of(run, "second") == "ok"
    assert [file.name for file in (store / "second").iterdir()] == ["card.toml"]


def test_one_file_by_diffusers_names(run: Run, store: Path, tiny: Path, tmp_path: Path) -> None:
    (net,) = (tiny / "tiny-sd3" / "transformer").glob("*.safetensors")
    (vae,) = (tiny / "tiny-sd3" / "vae").glob("*.safetensors")
    assert "--like tiny-sd3 --rest tiny-sd3" in run("models", "check", net).stdout
    assert run("models", "add", net, "--id", "plain", "--vae", vae, "--rest", "tiny-sd3").exit_code == 0
    assert (store / "plain" / "vae" / "model.safetensors").resolve() == vae.resolve()
    assert np.array_equal(picture(run, "plain", tmp_path), picture(run, "tiny-sd3", tmp_path))


def test_nothing_is_overwritten(run: Run, store: Path, network: Path) -> None:
    before = (store / "tiny-sd3" / "card.toml").read_text()
    said = one_line(run("models", "add", network, "--id", "tiny-sd3", "--rest", "tiny-sd3"))
    assert said == f"{store / 'tiny-sd3'}: there is a model of this name already; give another with --id"
    assert (store / "tiny-sd3" / "card.toml").read_text() == before


def test_what_is_missing_is_one_line_and_leaves_nothing(run: Run, store: Path, network: Path, tiny: Path) -> None:
    alone = {name: value for name, value in originals.read(network.parent).items() if "first_stage" not in name}
    net = originals.write(alone, network.parent / "net.safetensors")
    assert one_line(run("models", "add", net)) == (
        f"{net}: vae missing: give --vae PATH, or --rest tiny-sd3 to take what is missing from that card"
    )
    encoder = tiny / "tiny-sd3" / "text_encoder"
    said = one_line(run("models", "add", network, "--text-encoder", encoder))
    assert "tokenizer missing: give --tokenizers FOLDER, or --rest tiny-sd3" in said
    said = one_line(run("models", "add", network, "--vae", encoder))
    assert said == f"{encoder}: is not the vae of tiny-sd3"
    assert "it is no sd3, as tiny-sd3 is" in one_line(run("models", "add", network, "--rest", "tiny-dit"))
    assert "is not like tiny-dit; it fits tiny-sd3" in one_line(run("models", "add", network, "--like", "tiny-dit"))
    vae = originals.write(originals.vae(originals.read(tiny / "tiny-sd3" / "vae")), network.parent / "ae.safetensors")
    assert "the network is not in it" in one_line(run("models", "add", vae))
    assert "is a whole model" in one_line(run("models", "add", tiny / "tiny-sd3", "--vae", vae, "--id", "x"))
    assert '"../x" cannot be the id of a model' in one_line(run("models", "add", tiny / "tiny-sd3", "--id", "../x"))
    shutil.copytree(tiny / "tiny-sd3", network.parent / "deep")
    config = network.parent / "deep" / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 99999999'))
    assert "num_layers = 99999999, but the weights hold" in one_line(run("models", "add", network.parent / "deep"))
    assert sorted(folder.name for folder in store.iterdir()) == ["tiny-dit", "tiny-sd3"]


def test_two_cards_of_the_same_shapes(run: Run, store: Path, network: Path) -> None:
    shutil.copytree(store / "tiny-sd3", store / "twin")
    card = store / "twin" / "card.toml"
    card.write_text(card.read_text().replace('id = "tiny-sd3"', 'id = "twin"'))
    said = one_line(run("models", "add", network, "--rest", "twin"))
    assert said == f"{network}: fits tiny-sd3, twin, and the files cannot tell which: say it with --like"
    assert run("models", "add", network, "--rest", "twin", "--like", "twin").exit_code == 0
    assert tomllib.loads((store / "my-model" / "card.toml").read_text())["components"]["tokenizer"] == "twin/tokenizer"


def test_toml_is_read_as_it_was_written() -> None:
    value = {"a": 1, "b": [1.5, 'x "y" \\ é\n'], "c": {"d": True, "e-f": [], "g": {"h": 1e-6}}}
    assert tomllib.loads(f"v = {to_toml(value)}")["v"] == value
