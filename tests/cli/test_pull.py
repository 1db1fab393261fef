"""`instep models pull`: what a server needs and no more, resumed where it was cut, and used without the Hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.cards.cards import read_card
from app.checkpoints.hub import Repo
from app.errors import CheckpointError
from tests.cli.pulls import NETWORK, SPARE, TOKEN, VAE, cached, partials
from tests.parts import originals
from tests.parts.commands import Run, one_line
from tests.parts.hub import COMMIT, Hub
from tests.parts.servers import INSTEP, Process


def test_what_was_pulled_is_whole_without_the_hub(models: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command as it is typed, in a process of its own; then a picture where nobody answers any more."""
    home, clean = models.parent / "home", {name: value for name, value in os.environ.items() if name[:3] != "HF_"}
    with Hub(models.parent / "hub", gated=("lab/tiny",), token=TOKEN) as hub:
        told = {"INSTEP_MODELS": str(models), "HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        words = (sys.executable, "-c", "from app.cli import main; main()", "models", "pull", "tiny-sd3")
        done = subprocess.run(words, env={**clean, **told}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"tiny-sd3: here, lab/tiny at {COMMIT}\n" in done.stdout
    assert f'source.revision = "{COMMIT}"' in done.stdout and " free in " in done.stdout
    asked = {file for file, _, _ in hub.asked}
    assert {"model_index.json", "tree", VAE, "tokenizer/merges.txt", "tokenizer_3/tokenizer.json"} <= asked
    assert asked & set(SPARE) == set() and {key for _, key, _ in hub.asked} == {f"Bearer {TOKEN}"}
    assert len(hub.stored) == 5 and {key for _, key, _ in hub.stored} == {""}  # another host gets no token
    files = [file for file in models.parent.rglob("*") if file.is_file()]
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == []
    assert TOKEN not in done.stdout + done.stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("INSTEP_MODELS", str(models))
    drawn = run("generate", "red", "--model", "tiny-sd3-turbo", "--out", models / "a.png")
    assert (drawn.exit_code, (models / "a.png").is_file()) == (0, True), drawn.output
    offline = "tiny-sd3: HF_HUB_OFFLINE is set: nothing can be downloaded"
    assert one_line(run("models", "pull", "tiny-sd3")) == offline


def test_a_terminal_shows_the_download_of_a_file_and_its_check(models: Path) -> None:
    home, size = str(models.parent / "home"), {"TQDM_NCOLS": "80", "TQDM_NROWS": "24"}
    with Hub(models.parent / "hub") as hub:
        facts = {"INSTEP_MODELS": str(models), "HF_HOME": home, "HF_ENDPOINT": hub.url, **size}
        with Process((*INSTEP, "models", "pull", "tiny-sd3"), terminal=True, **facts) as pull:
            assert pull.ended()[0] == 0
    assert "  downloading: " in pull.words and "  checking: " in pull.words


def test_a_card_brings_the_parts_that_it_takes_from_others(models: Path, hub: Hub, pull: Run) -> None:
    result = pull("tiny-sd3-no-t5")
    assert result.exit_code == 0, result.output
    asked = {file for file, _, _ in hub.asked}
    assert VAE in asked and not [file for file in asked if "_3/" in file]


def test_which_models_must_be_said(hub: Hub, pull: Run) -> None:
    said = "which models? Name them, or set INSTEP_PRELOAD, or --all. On the Hub: tiny-sd3"
    assert one_line(pull()) == said
    assert 'There is no model "tiny-sd"; did you mean "tiny-sd3"' in one_line(pull("tiny-sd"))
    assert hub.asked == []


def test_without_ids_what_the_server_preloads(hub: Hub, pull: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTEP_PRELOAD", "tiny-dit, tiny-sd3")
    result = pull()
    assert result.exit_code == 0, result.output
    assert "tiny-dit: beside its card, nothing to pull\n" in result.stdout and "tiny-sd3: here" in result.stdout
    assert "tiny-sd3: here" in pull("--all").stdout


def test_a_cut_download_goes_on_with_what_is_missing(models: Path, hub: Hub, pull: Run) -> None:
    """Cut for as long as it is asked; then the next command asks for that file alone."""
    hub.cut[NETWORK] = 100
    said = one_line(pull("tiny-sd3"))
    assert said.startswith(f"tiny-sd3: lab/tiny: the connection to the Hub ({hub.url}) failed (RemoteProtocolError)")
    assert partials(models) == [] and not cached(models, "model_index.json").exists()
    assert len({path for path, _, _ in hub.stored}) == 5
    hub.stored.clear()
    hub.cut.clear()
    assert pull("tiny-sd3").exit_code == 0
    assert [path for path, _, _ in hub.stored] == [NETWORK]
    assert cached(models, NETWORK).read_bytes() == (hub.root / "lab" / "tiny" / NETWORK).read_bytes()


@pytest.mark.parametrize("whole", [False, True], ids=["ranges", "no ranges"])
def test_a_cut_or_two_are_made_good_at_once(
    models: Path, hub: Hub, pull: Run, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut[VAE] = 2
    hub.whole |= {VAE} if whole else set()
    assert pull("tiny-sd3").exit_code == 0
    assert [bool(range_) for path, _, range_ in hub.stored if path == VAE] == [False, True, True]
    assert cached(models, VAE).read_bytes() == (hub.root / "lab" / "tiny" / VAE).read_bytes()


def test_files_of_ones_own_bring_only_what_they_lack(
    models: Path, hub: Hub, pull: Run, run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network and VAE in the authors' layout; the card of the Hub ships its configs and gives the encoders."""
    for config in ("model_index.json", *(f"{part}/config.json" for part in ("transformer", "vae", "text_encoder"))):
        (models / "tiny-sd3" / config).parent.mkdir(exist_ok=True)
        shutil.copyfile(tiny / "tiny-sd3" / config, models / "tiny-sd3" / config)
    file = originals.write(originals.sd3_file(tiny / "tiny-sd3"), models.parent / "net.safetensors")
    made = run("models", "add", file, "--id", "mine", "--rest", "tiny-sd3", "--models", models)
    assert (made.exit_code, made.stdout.splitlines()[-1]) == (0, "next: instep models pull mine"), made.output
    monkeypatch.setenv("INSTEP_MODELS", str(models))
    assert "not here: instep models pull mine" in run("models", "show", "mine").stdout
    assert pull("mine").exit_code == 0
    assert sorted(path.split("/")[0] for path, _, _ in hub.stored) == [
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    ]
    monkeypatch.setenv("INSTEP_MODELS", str(models))
    drawn = run("generate", "red", "--model", "mine", "--steps", 2, "--out", models / "a.png")
    assert (drawn.exit_code, (models / "a.png").is_file()) == (0, True), drawn.output


def test_a_dit_of_torch_files_is_brought_to_be_converted(
    models: Path, hub: Hub, pull: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As facebook/DiT-XL-2-256 is."""
    repo = hub.root / "lab" / "dit"
    shutil.copytree(models / "tiny-dit", repo)
    for file in repo.rglob("*.safetensors"):
        torch.save(originals.read(file.parent), file.with_suffix(".bin"))
        file.unlink()
    card = (repo / "card.toml").rename(models / "tiny-dit" / "card.toml")
    card.write_text(card.read_text().replace('path = "."', 'repo = "lab/dit"') + 'license = "kept"\n')
    for file in (models / "tiny-dit").rglob("*.safetensors"):
        file.unlink()
    result = pull("tiny-dit")
    snapshot = models.parent / "home" / "hub" / "models--lab--dit" / "snapshots" / COMMIT
    words = ["models", "convert", str(snapshot), str(models / "tiny-dit"), "--replace"]
    assert (result.exit_code, result.stdout.splitlines()[-1].partition("next: ")[2]) == (0, f"instep {' '.join(words)}")
    monkeypatch.setenv("INSTEP_MODELS", str(models))
    converted = run(*words)
    assert converted.exit_code == 0, converted.output
    assert read_card(card).license == "kept" and read_card(card).source.path == "."
    drawn = run("generate", "--class-label", 3, "--model", "tiny-dit", "--steps", 2, "--out", models / "a.png")
    assert (drawn.exit_code, (models / "a.png").is_file()) == (0, True), drawn.output


def test_one_format_without_variants_is_wanted() -> None:
    shards = [f"vae/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = "vae/diffusion_pytorch_model.safetensors.index.json"
    settings = ["vae/config.json", "vae/merges.txt"]
    others = ["vae/model.safetensors", VAE, "vae/a/config.json", "unet/config.json", "config.json", *SPARE]

    def repo(*paths: str) -> Repo:
        return Repo("lab/tiny", None, COMMIT, dict.fromkeys(paths))  # type: ignore[arg-type]

    assert repo(*shards, index, *settings, *others).wanted({"vae"}) == sorted([*shards, index, *settings])
    assert repo(*settings, *others).wanted({"vae"}) == sorted([*settings, VAE])
    assert repo(*settings, *others).wanted({"vae"}, bare={"vae"}) == settings
    with pytest.raises(CheckpointError, match=r"lab/tiny: unet has no safetensors there, only model.bin"):
        repo("unet/model.bin", "unet/config.json").wanted({"unet"})
