"""`instep models pull`: what a server needs and no more, the token in the requests and nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli.pull import wanted
from tests.cli.conftest import Run
from tests.cli.hub import Hub

TOKEN = "hf_secretsecretsecret"
SPARE = (
    *(
        "sd3.safetensors",
        ".gitattributes",
        "README.md",
        "text_encoders/clip.safetensors",
        "text_encoder/pytorch_model.bin",
    ),
    *("text_encoder/model.fp16.safetensors", "text_encoder_3/model.fp16-00001-of-00002.safetensors", "vae/run.py"),
)
"""What repositories of SD3 have besides, some of it larger than what is needed."""


@pytest.fixture
def models(tiny: Path, tmp_path: Path) -> Path:
    """The tiny models: tiny-sd3 is on the Hub, tiny-sd3-turbo takes its components from there."""
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


def pull(models: Path, hub: Hub, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the Hub library reads its environment when it is imported."""
    home = models.parent / "home"
    told = {"INSTEP_MODELS": str(models), "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    words = (sys.executable, "-c", "from app.cli import main; main()", "models", "pull")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(words, env={**clean, **told, **env}, capture_output=True, text=True, timeout=60)


def test_what_was_pulled_is_whole_without_the_hub(models: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub(models.parent / "hub", gated=("lab/tiny",), token=TOKEN) as hub:
        done = pull(models, hub, HF_TOKEN=TOKEN)
    assert (done.returncode, "failed" in done.stdout) == (0, False), done.stderr
    assert "tiny-sd3-turbo: beside its card\n" in done.stdout
    asked = {file for file, _ in hub.asked}
    assert {"model_index.json", "tree", "vae/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt"} <= asked
    assert asked & set(SPARE) == set() and {key for _, key in hub.asked} == {f"Bearer {TOKEN}"}
    files = [file for file in models.parent.rglob("*") if file.is_file()]
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == []
    assert TOKEN not in done.stdout + done.stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(models.parent / "home" / "hub"))
    result = run("models", "check", "--models", models)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("card", "env", "said"),
    [
        ("lab/tiny", {"HF_TOKEN": "hf_wrongwrongwrong"}, "lab/tiny: accept its licence on the Hub, then set HF_TOKEN"),
        ("lab/nothing", {"HF_TOKEN": TOKEN}, "lab/nothing: not there, or not for this HF_TOKEN"),
        (
            "lab/tiny",
            {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"},
            "lab/tiny: the Hub does not answer, or HF_HUB_OFFLINE is set",
        ),
    ],
    ids=["a wrong token", "no repository", "offline"],
)
def test_what_cannot_be_pulled_is_one_line(models: Path, card: str, env: dict[str, str], said: str) -> None:
    file = models / "tiny-sd3" / "card.toml"
    file.write_text(file.read_text().replace("lab/tiny", card))
    with Hub(models.parent / "hub", gated=("lab/tiny",), token=TOKEN) as hub:
        done = pull(models, hub, **env)
    assert done.returncode == 1 and "tiny-sd3: failed\n" in done.stdout
    assert done.stderr.count("\n") == 1 and "1 of 6 models were not pulled: tiny-sd3: " in done.stderr
    assert said in done.stderr
    assert [secret for secret in env.values() if len(secret) > 9 and secret in done.stdout + done.stderr] == []


def test_variants_and_other_folders_are_not_wanted() -> None:
    weights = ("vae/model.safetensors", "vae/diffusion_pytorch_model-00001-of-00002.safetensors")
    files = [*weights, "vae/config.json", "vae/merges.txt", "vae/a/config.json", "unet/config.json", "config.json"]
    assert wanted([*files, *SPARE], {"vae"}) == sorted(files[:4])
