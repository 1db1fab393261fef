"""`instep models`: cards as tables, and checkpoints that lie are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.parts.commands import Run, one_line


@pytest.fixture
def copy(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny models to break."""
    folder = tmp_path / "models"
    shutil.copytree(tiny, folder)
    monkeypatch.setenv("INSTEP_MODELS", str(folder))
    return folder


def states(output: str) -> dict[str, str]:
    return dict(line.split()[:2] for line in output.splitlines()[1:])


def test_list_has_a_line_for_each_card(run: Run) -> None:
    lines = run("models", "list").stdout.splitlines()
    names = ["tiny-dit", "tiny-dit-sample", "tiny-dit-v", "tiny-sd3", "tiny-sd3-no-t5", "tiny-sd3-turbo"]
    assert [line.split()[0] for line in lines[1:]] == names
    assert lines[1].split() == ["tiny-dit", "dit", "-", "-", "here", "10", "classes", "32x32", "8", "4"]


def test_show_tells_what_a_request_may_ask(run: Run) -> None:
    told = run("models", "show", "tiny-sd3-turbo").stdout
    for part in (
        "flow_euler, flow_heun, flow_dpmpp_2m, flow_dpmpp_2m_sd3",
        "karras, exponential, sgm_uniform with flow_euler, flow_heun, flow_dpmpp_2m_sd3",
        "tiny-sd3/vae",
        "flow_euler, 4 steps, guidance 0",
        "32x32",
    ):
        assert part in told
    assert 'did you mean "tiny-sd3"' in one_line(run("models", "show", "tiny-sd"))


@pytest.mark.parametrize(("words", "missing"), [(("show",), "model"), (("add",), "path"), (("convert", "x"), "folder")])
def test_a_missing_argument_is_one_line(run: Run, words: tuple[str, ...], missing: str) -> None:
    assert f"Missing argument '{missing}'" in one_line(run("models", *words))


def test_the_shipped_cards_fit_in_100_columns(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what is not downloaded says how to get it, square brackets and all."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("INSTEP_MODELS", str(Path(__file__).parent.parent.parent / "models"))
    lines = [line.rstrip() for line in run("models", "list").stdout.splitlines()]
    assert max(map(len, lines)) <= 100 and len(lines) > 9
    (large,) = [line for line in lines if line.startswith("sd3.5-large ")]
    assert large.split()[:7] == ["sd3.5-large", "sd3", "8.06", "B", "27.6", "GB", "gated"]
    told = run("models", "show", "flux.1-dev").stdout
    for part in ("FLUX.1 [dev]", "accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-dev, and set"):
        assert part in told
    assert "11,901,408,320" in told and "not here: instep models pull flux.1-dev" in told


def test_check_of_good_models(run: Run) -> None:
    result = run("models", "check")
    assert (result.exit_code, set(states(result.stdout).values())) == (0, {"ok"})


def test_check_names_what_is_wrong_with_each(run: Run, copy: Path) -> None:
    weights = next((copy / "tiny-dit").glob("transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    scheduler = copy / "tiny-sd3-turbo" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "thresholding": True}))
    shutil.rmtree(copy / "tiny-sd3" / "tokenizer_3")
    card = copy / "tiny-sd3-no-t5" / "card.toml"
    card.write_text(card.read_text().replace('path = "."', 'repo = "nobody/nothing"'))
    result = run("models", "check")
    assert result.exit_code == 1
    broken = ["tiny-dit", "tiny-dit-sample", "tiny-dit-v", "tiny-sd3", "tiny-sd3-turbo"]
    assert states(result.stdout) == {**dict.fromkeys(broken, "broken"), "tiny-sd3-no-t5": "absent"}
    for said in (f"{weights}: not a whole safetensors file", "thresholding is true", "tokenizer.json: missing"):
        assert said in result.stdout
    assert "instep models pull tiny-sd3-no-t5" in result.stdout
    assert result.stderr == f"instep: 5 of 6 models are broken: {', '.join(broken)}\n"


def test_check_finds_what_only_the_whole_model_shows(run: Run, copy: Path) -> None:
    """Every part is fine by itself: sizes over the network's positions, a size that is not the network's."""
    wide, fixed = copy / "tiny-sd3-turbo" / "card.toml", copy / "tiny-dit" / "card.toml"
    wide.write_text(wide.read_text().replace("max = 64", "max = 1024"))
    fixed.write_text(fixed.read_text().replace("32", "64"))
    result = run("models", "check")
    assert result.exit_code == 1
    assert [name for name, state in states(result.stdout).items() if state != "ok"] == ["tiny-dit", "tiny-sd3-turbo"]
    assert f"{wide}: limits.sizes.max" in result.stdout and f"{fixed}: limits.sizes: " in result.stdout


def test_check_goes_on_past_an_invalid_card(run: Run, copy: Path) -> None:
    card = copy / "tiny-sd3-turbo" / "card.toml"
    card.write_text(card.read_text().replace('family = "sd3"', 'family = "gan"'))
    result = run("models", "check")
    assert result.exit_code == 1 and states(result.stdout)["tiny-sd3-turbo"] == "broken"
    assert f"{card}: family: " in result.stdout
    assert states(result.stdout)["tiny-sd3"] == "ok"
    assert result.stderr == "instep: 1 of 6 models are broken: tiny-sd3-turbo\n"


def test_list_names_what_it_leaves_out(run: Run, copy: Path) -> None:
    """And `show` and `generate` say why a model is not there."""
    card = copy / "tiny-sd3-turbo" / "card.toml"
    card.write_text(card.read_text().replace('family = "sd3"', 'family = "gan"'))
    shutil.copytree(copy / "tiny-sd3", copy / "twin")
    result = run("models", "list")
    assert result.exit_code == 0 and "tiny-sd3 " in result.stdout and "tiny-sd3-turbo " not in result.stdout
    first, second = result.stderr.splitlines()
    assert first.startswith(f"skipped: {card}: family: ")
    assert second == f"skipped: {copy / 'twin' / 'card.toml'}: the name tiny-sd3 is already used by " + str(
        copy / "tiny-sd3" / "card.toml"
    )
    for words in (("models", "show", "tiny-sd3-turbo"), ("generate", "red", "--model", "tiny-sd3-turbo")):
        assert f"{card}: family: " in one_line(run(*words))


def test_check_of_two_cards_with_one_name(run: Run, copy: Path) -> None:
    card = copy / "tiny-dit" / "card.toml"
    card.write_text('aliases = ["tiny-sd3"]\n' + card.read_text())
    result = run("models", "check")
    assert result.exit_code == 1 and "the name tiny-sd3 is already used" in result.stdout
    assert states(result.stdout)["tiny-dit"] == "broken" and states(result.stdout)["tiny-sd3"] == "ok"


def test_a_default_sampler_of_another_prediction(run: Run, copy: Path) -> None:
    card = copy / "tiny-dit" / "card.toml"
    card.write_text(card.read_text().replace('"ddim"', '"flow_euler"'))
    assert states(run("models", "check").stdout)["tiny-dit"] == "broken"


def test_an_empty_folder_is_one_line(run: Run, tmp_path: Path) -> None:
    assert "no cards in" in one_line(run("models", "check", "--models", tmp_path))
    assert "no cards in" in one_line(run("models", "list", "--models", tmp_path))
