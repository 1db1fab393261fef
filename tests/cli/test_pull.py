"""`instep models pull`: what a server needs and no more, resumed, checked; every trouble one line without a token."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from app.cli.needs import wanted
from app.errors import CheckpointError
from tests.cli import originals
from tests.cli.conftest import Run, one_line
from tests.cli.hub import COMMIT, Hub

TOKEN = "hf_secretsecretsecret"
SPARE = (
    *("sd3.safetensors", ".gitattributes", "README.md", "text_encoders/clip.safetensors", "vae/run.py"),
    *("text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors"),
    *("text_encoder_3/model.fp16-00001-of-00002.safetensors", "text_encoder_3/model.safetensors.index.fp16.json"),
)
"""What repositories of SD3 have besides, some of it larger than what is needed."""

VAE = "vae/diffusion_pytorch_model.safetensors"
NETWORK = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def models(tiny: Path, tmp_path: Path) -> Path:
    """The tiny models: tiny-sd3 is on the Hub as lab/tiny, tiny-sd3-turbo takes its components from there."""
    folder, repo = tmp_path / "models", tmp_path / "hub" / "lab" / "tiny"
    shutil.copytree(tiny, folder)
    shutil.copytree(tiny / "tiny-sd3", repo)
    for file in SPARE:
        (repo / file).parent.mkdir(exist_ok=True)
        (repo / file).write_bytes(b"spare")
    card = (repo / "card.toml").rename(tmp_path / "card.toml").read_text()
    shutil.rmtree(folder / "tiny-sd3")
    (folder / "tiny-sd3").mkdir()
    (folder / "tiny-sd3" / "card.toml").write_text(card.replace('path = "."', 'repo = "lab/tiny"'))
    return folder


@pytest.fixture
def hub(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that this process asks, with an empty cache; nothing is gated, and no token is there."""
    with Hub(models.parent / "hub", token=TOKEN) as server:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(models.parent / "home" / "hub"))
        monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(models.parent / "home" / "token"))
        monkeypatch.setattr("app.cli.download.PAUSES", (0.0, 0.0, 0.0))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture
def pull(models: Path, run: Run) -> Callable[..., object]:
    return lambda *words: run("models", "pull", *words, "--models", models)


def cached(models: Path, path: str) -> Path:
    return models.parent / "home" / "hub" / "models--lab--tiny" / "snapshots" / COMMIT / path


def partials(models: Path) -> list[int]:
    """Bytes of what came of files that were cut off."""
    return [file.stat().st_size for file in (models.parent / "home").rglob("*.incomplete")]


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


def test_a_cut_download_goes_on_where_it_stopped(models: Path, hub: Hub, pull: Run) -> None:
    """Cut for as long as it is asked; then the next command asks for the rest of the bytes alone."""
    size = (hub.root / "lab" / "tiny" / NETWORK).stat().st_size
    hub.cut[NETWORK] = 100
    said = one_line(pull("tiny-sd3"))
    (have,) = partials(models)
    assert 0 < have < size and not cached(models, "model_index.json").exists()
    assert said.startswith(f"tiny-sd3: lab/tiny: {NETWORK}: broke off at {have} of {size} bytes (RemoteProtocolError)")
    hub.stored.clear()
    hub.cut.clear()
    assert pull("tiny-sd3").exit_code == 0
    assert hub.stored == [(NETWORK, "", f"bytes={have}-")]
    assert cached(models, NETWORK).read_bytes() == (hub.root / "lab" / "tiny" / NETWORK).read_bytes()
    assert partials(models) == []


def test_a_cut_or_two_are_made_good_at_once(models: Path, hub: Hub, pull: Run) -> None:
    hub.cut[VAE] = 2
    assert pull("tiny-sd3").exit_code == 0
    assert [path for path, _, _ in hub.stored].count(VAE) == 3
    assert cached(models, VAE).read_bytes() == (hub.root / "lab" / "tiny" / VAE).read_bytes()


def test_a_host_without_ranges_begins_again(models: Path, hub: Hub, pull: Run) -> None:
    hub.cut[VAE] = 1
    hub.whole.add(VAE)
    assert pull("tiny-sd3").exit_code == 0
    assert cached(models, VAE).read_bytes() == (hub.root / "lab" / "tiny" / VAE).read_bytes()
    assert [bool(range_) for path, _, range_ in hub.stored if path == VAE] == [False, True]


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
    card.write_text(card.read_text().replace('path = "."', 'repo = "lab/dit"'))
    result = pull("tiny-dit")
    snapshot = models.parent / "home" / "hub" / "models--lab--dit" / "snapshots" / COMMIT
    words = ["models", "convert", str(snapshot), str(models / "my-tiny-dit")]
    assert (result.exit_code, result.stdout.splitlines()[-1].partition("next: ")[2]) == (0, f"instep {' '.join(words)}")
    monkeypatch.setenv("INSTEP_MODELS", str(models))
    converted = run(*words)
    assert converted.exit_code == 0, converted.output
    drawn = run("generate", "--class-label", 3, "--model", "my-tiny-dit", "--steps", 2, "--out", models / "a.png")
    assert (drawn.exit_code, (models / "a.png").is_file()) == (0, True), drawn.output


@pytest.mark.parametrize("path", [NETWORK, "vae/config.json"], ids=["sha256", "git"])
def test_what_is_not_what_the_hub_lists_is_thrown_away(models: Path, hub: Hub, pull: Run, path: str) -> None:
    hub.flipped.add(path)
    said = one_line(pull("tiny-sd3"))
    assert said.startswith(f"tiny-sd3: lab/tiny: {path}: what came is not what the Hub lists")
    assert partials(models) == [] and not cached(models, path).exists()
    hub.flipped.clear()
    assert pull("tiny-sd3").exit_code == 0


def test_more_or_less_than_the_hub_lists_is_not_taken(models: Path, hub: Hub, pull: Run) -> None:
    hub.sizes[NETWORK] = 100
    assert "what came is not what the Hub lists" in one_line(pull("tiny-sd3"))
    hub.sizes[NETWORK] = 10**6
    assert "of 1000000 bytes (" in one_line(pull("tiny-sd3"))
    assert sum(partials(models)) < 10**6


def test_no_room_is_told_before_anything_comes(models: Path, hub: Hub, pull: Run) -> None:
    hub.sizes[NETWORK] = 10**18
    said = one_line(pull("tiny-sd3"))
    assert said.startswith("no room: 1.0 EB to come, ") and "B free in " in said
    assert hub.stored == []


def test_a_disk_that_takes_no_more_is_one_line(models: Path, hub: Hub, pull: Run) -> None:
    """The system refuses to make a file any longer, as it does when a disk is full; then there is room again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))
    try:
        said = one_line(pull("tiny-sd3"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said == f"tiny-sd3: lab/tiny: {models.parent / 'home' / 'hub'}: File too large"
    assert sum(partials(models)) > 0 and pull("tiny-sd3").exit_code == 0


def test_two_downloads_of_one_file_do_not_mix(models: Path, hub: Hub, pull: Run) -> None:
    hub.cut[VAE] = 100
    assert "broke off" in one_line(pull("tiny-sd3"))
    (partial,) = (models.parent / "home").rglob("*.incomplete")
    with partial.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert one_line(pull("tiny-sd3")).endswith(f"{VAE}: another download of it is under way")


@pytest.mark.parametrize(
    ("token", "change", "said"),
    [
        ("", {"gated": ("lab/tiny",)}, "lab/tiny is gated: accept its licence at {url}/lab/tiny and set HF_TOKEN to a"),
        (
            TOKEN,
            {"gated": ("lab/tiny",), "accepted": False},
            "lab/tiny is gated: accept its licence at {url}/lab/tiny with the account of this HF_TOKEN",
        ),
        ("hf_wrongwrongwrong", {}, "the Hub does not know this HF_TOKEN (401): make another at {url}/settings/tokens"),
        ("hf_two\x01lines", {}, "HF_TOKEN is not a token: it has characters that no token has"),
        ("", {"repo": "lab/nothing"}, "lab/nothing: there is no such repository, or this HF_TOKEN may not see it"),
        (TOKEN, {"repo": "lab/nothing"}, "lab/nothing: there is no such repository"),
        ("", {"repo": "a b/c"}, "a b/c: Repo id must"),
        ("", {"revision": "v9"}, 'lab/tiny: there is no revision "v9"'),
        ("", {"gone": True}, "lab/tiny: the Hub ({url}) cannot be reached ("),
        ("", {"bin": True}, "lab/tiny: transformer has no safetensors there, only diffusion_pytorch_model.bin"),
    ],
)
def test_what_cannot_be_pulled_is_one_line(
    models: Path,
    hub: Hub,
    pull: Run,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    change: dict[str, object],
    said: str,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    break_it(models, hub, dict(change), monkeypatch)
    line = one_line(pull("tiny-sd3"))
    assert line.startswith("tiny-sd3: " + said.format(url=hub.url)) and "hf_" not in line
    assert not cached(models, VAE).exists()


def break_it(models: Path, hub: Hub, change: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """gone: nobody listens there. bin: a repository from before safetensors. Else a field of the Hub or the source."""
    file = models / "tiny-sd3" / "card.toml"
    source = {"repo": "lab/tiny", **{name: change.pop(name) for name in ("repo", "revision") if name in change}}
    told = ", ".join(f'{name} = "{value}"' for name, value in source.items())
    file.write_text(file.read_text().replace('repo = "lab/tiny"', told))
    if change.pop("gone", False):
        hub.server_close()
    if change.pop("bin", False):
        weights = hub.root / "lab" / "tiny" / NETWORK
        weights.rename(weights.with_suffix(".bin"))
    for name, value in change.items():
        monkeypatch.setattr(hub, name, value)


def test_of_several_models_the_others_are_pulled(models: Path, hub: Hub, pull: Run) -> None:
    shutil.copytree(models / "tiny-dit", models / "other")
    card = models / "other" / "card.toml"
    card.write_text(card.read_text().replace("tiny-dit", "other").replace('path = "."', 'repo = "lab/nothing"'))
    result = pull("--all")
    assert result.exit_code == 1 and "tiny-sd3: here" in result.stdout
    assert result.stderr.startswith("instep: 1 of 2 models were not pulled: other: lab/nothing: there is no such")


def test_names_that_would_leave_the_cache_are_refused(models: Path, hub: Hub, pull: Run) -> None:
    index = hub.root / "lab" / "tiny" / "model_index.json"
    index.write_text('{"..": ["diffusers", "AutoencoderKL"]}')
    assert '".." is not the name of a part' in one_line(pull("tiny-sd3"))


def test_one_format_without_variants_is_wanted() -> None:
    shards = [f"vae/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = "vae/diffusion_pytorch_model.safetensors.index.json"
    settings = ["vae/config.json", "vae/merges.txt"]
    others = ["vae/model.safetensors", VAE, "vae/a/config.json", "unet/config.json", "config.json", *SPARE]
    assert wanted([*shards, index, *settings, *others], {"vae"}) == sorted([*shards, index, *settings])
    assert wanted([*settings, *others], {"vae"}) == sorted([*settings, VAE])
    assert wanted([*settings, *others], {"vae"}, bare={"vae"}) == settings
    with pytest.raises(CheckpointError, match=r"unet has no safetensors there, only model.bin"):
        wanted(["unet/model.bin", "unet/config.json"], {"unet"})
