"""`instep models pull` in trouble: every one is one line, without the token, and leaves nothing that is not right."""

from __future__ import annotations

import fcntl
import resource
import shutil
import socket
from pathlib import Path

import pytest

from tests.cli.pulls import NETWORK, TOKEN, VAE, cached, partials
from tests.parts.commands import Run, one_line
from tests.parts.hub import Hub


@pytest.mark.parametrize("path", [NETWORK, "vae/config.json"], ids=["sha256", "git"])
def test_what_is_not_what_the_hub_lists_is_thrown_away(models: Path, hub: Hub, pull: Run, path: str) -> None:
    hub.flipped.add(path)
    said = one_line(pull("tiny-sd3"))
    assert said.startswith(f"tiny-sd3: lab/tiny: {path}: what came is not what the Hub lists")
    assert partials(models) == [] and not cached(models, path).exists()
    hub.flipped.clear()
    assert pull("tiny-sd3").exit_code == 0


def test_more_or_less_than_the_hub_lists_is_not_taken(models: Path, hub: Hub, pull: Run) -> None:
    for size in (100, 10**6):
        hub.sizes[NETWORK] = size
        assert f"the download failed (Consistency check failed: file should be of size {size}" in one_line(
            pull("tiny-sd3")
        )
        assert partials(models) == [] and not cached(models, NETWORK).exists()


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
    assert partials(models) == [] and pull("tiny-sd3").exit_code == 0


def test_two_downloads_of_one_repository_do_not_mix(models: Path, hub: Hub, pull: Run) -> None:
    lock = models.parent / "home" / "hub" / "models--lab--tiny" / "incoming.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert one_line(pull("tiny-sd3")) == "tiny-sd3: lab/tiny: another download of it is under way"


@pytest.mark.parametrize(
    ("token", "change", "said"),
    [
        ("", {"gated": ("lab/tiny",)}, "lab/tiny is gated: accept its licence at {url}/lab/tiny and set HF_TOKEN to a"),
        (
            TOKEN,
            {"gated": ("lab/tiny",), "accepted": False},
            "lab/tiny is gated: accept its licence at {url}/lab/tiny with the account of this HF_TOKEN",
        ),
        (
            "hf_wrongwrongwrong",
            {},
            "lab/tiny: the Hub does not know this HF_TOKEN (401): make another, or see its rights, at {url}/settings/t",
        ),
        ("hf_two\x01lines", {}, "HF_TOKEN is not a token: it has characters that no token has"),
        ("", {"repo": "lab/nothing"}, "lab/nothing: there is no such repository, or this HF_TOKEN may not see it"),
        (TOKEN, {"repo": "lab/nothing"}, "lab/nothing: there is no such repository"),
        ("", {"repo": "a b/c"}, "a b/c: Repo id must"),
        ("", {"revision": "v9"}, 'lab/tiny: there is no revision "v9"'),
        ("", {"gone": True}, "lab/tiny: the connection to the Hub ({url}) failed (ConnectError)"),
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
        hub.shutdown()
        hub.server_close()
        hub.socket = socket.socket()  # it listens to nobody, and nobody else can get the port
        hub.socket.bind(hub.server_address)
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
