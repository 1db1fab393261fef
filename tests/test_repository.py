"""The rules of the repository: short targets, pinned versions, pages that agree with the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from openai.types.image_generate_params import ImageGenerateParamsBase
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from app.jobs.body import ImageBody
from app.main import create_app
from app.settings import Settings
from tests.readme import FILES, TABLES, remade
from tests.test_floors import FLOORS, read

ROOT = Path(__file__).parent.parent
README, TOUR, _, API = PAGES = tuple(file.read_text(encoding="utf-8") for file in FILES)
TARGETS = ("setup", "serve", "test", "test-all", "check", "fix")


def make(*words: str) -> str:
    """What make would run, also when these tests run under make."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "TORCH"))}
    words = ("make", "-n", *words)
    return subprocess.run(words, cwd=ROOT, env=outside, capture_output=True, text=True, timeout=60, check=True).stdout


def project() -> dict[str, list[Requirement]]:
    """The requirements of the project and of its extras, by extra ("" for the project's own)."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": table["dependencies"], **table["optional-dependencies"]}
    return {name: [Requirement(text) for text in texts] for name, texts in groups.items()}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def needed() -> dict[str, list[Requirement]]:
    """Every package that the project needs, directly or not, with what is asked of it."""
    found: dict[str, list[Requirement]] = {}
    todo = [requirement for group in project().values() for requirement in group]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        fresh = name not in found
        found.setdefault(name, []).append(requirement)
        # NOTE: CUDA's packages exist on a machine with that build of torch only, which pins them itself.
        if fresh and name != "torch":
            todo += [one for one in map(Requirement, distribution(name).requires or ()) if wanted(one)]
    return found


def wanted(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def test_targets_have_at_most_three_lines() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipes = re.findall(r"^([^\s#:=]+):(?!=).*\n((?:\t.*\n?)*)", text, re.MULTILINE)
    assert {name for name, _ in recipes} >= set(TARGETS)
    assert [name for name, lines in recipes if lines.count("\n\t") > 2] == []


def test_the_targets_run_what_the_readme_says() -> None:
    assert "instep serve" in make("serve")
    assert all(tool in make("check") for tool in ("ruff check", "ruff format --check", "mypy", "hadolint"))
    assert 'pytest -m "not gpu and not slow"' in make("test") and 'pytest -m "not gpu and slow"' in make("test-all")
    for words, torch in (((), "auto"), (("TORCH=cpu",), "cpu"), (("TORCH=cuda",), "cuda")):
        assert f"TORCH={torch} PYTHON=python3 deploy/setup .venv" in make("setup", "-W", "constraints.txt", *words)


@pytest.mark.parametrize("here", [(), ("curl",), ("chromium", "curl", "npm", "openssl")])
def test_ci_installs_what_tests_lack_and_runs_them_all(tmp_path: Path, here: tuple[str, ...]) -> None:
    """The script as it is, on a machine that has these programs; make and apt-get note down how they are called."""
    bash = shutil.which("bash")
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    for name in ("make", "apt-get", *here):
        (tmp_path / name).write_text(f'#!{bash}\necho "{name} $*, CI=$CI"\n', encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    words = [str(tmp_path / "bash"), str(ROOT / ".ci" / "run")]
    done = subprocess.run(words, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=True)
    *installs, last = done.stdout.splitlines()
    missing = [name for name in ("chromium", "curl", "npm", "openssl") if name not in here]
    wanted = ["-qq update", f"-qq install --yes --no-install-recommends {' '.join(missing)}"] if missing else []
    assert installs == [f"apt-get {words}, CI=true" for words in wanted]
    assert last == "make check test test-all, CI=true" and os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_dependency_is_pinned_inside_its_range() -> None:
    known = pins()
    assert sorted(set(needed()) - set(known)) == []
    for name, requirements in needed().items():
        assert all(one.specifier.contains(known[name], prereleases=True) for one in requirements), name


def test_what_the_app_imports_is_what_the_project_asks_for() -> None:
    owners = packages_distributions()
    tops = {target.split(".")[0] for module in read(ROOT).values() for target, _ in module.imports}
    third = tops - set(sys.stdlib_module_names) - {"app"}
    imported = {canonicalize_name(owners[top][0]) for top in third}
    # Not imported, but bounded: the reader of tokenizer files.
    assert {canonicalize_name(one.name) for one in project()[""]} - imported == {"tokenizers"}
    assert imported - {canonicalize_name(one.name) for one in project()[""]} == set()


def test_what_is_installed_is_what_is_pinned() -> None:
    wrong = {name: str(pin) for name, pin in pins().items() if not is_installed(name, pin)}
    assert wrong == {}


def is_installed(name: str, pin: Version) -> bool:
    try:
        return Version(distribution(name).version).public == pin.public
    except PackageNotFoundError:
        return False


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_made_tables_are_the_codes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert remade(text) == text, "run `make fix`"


def test_each_table_has_its_place() -> None:
    assert sorted(re.findall(r"<!-- made: (\w+) -->", "".join(PAGES))) == sorted(TABLES)


def test_the_tour_has_the_floors_that_are_enforced() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", TOUR, re.MULTILINE)
    floors = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)/?`", names)}
    assert floors == FLOORS
    modules = {
        path.stem for path in (ROOT / "app").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert set(floors) == modules - {"__init__"}


def test_the_tour_has_a_line_for_every_module() -> None:
    rows = re.findall(r"^\| `([\w/]+\.py)` \| \S", TOUR, re.MULTILINE)
    modules = [path.relative_to(ROOT / "app").as_posix() for path in (ROOT / "app").rglob("*.py")]
    assert sorted(rows) == sorted(name for name in modules if not name.endswith("__init__.py"))


def test_paths_that_are_named_exist() -> None:
    named = set(re.findall(r"`((?:app|deploy|docs|models|tests)/[\w./]*)`", "".join(PAGES)))
    named |= {f"app/{path}" for path in re.findall(r"`((?!tests)[a-z]+/\w+\.py)`", TOUR)}
    named |= {f"app/{path}" for path in re.findall(r"^(\w+/\w+\.py|\w+\.py) ", TOUR, re.MULTILINE)}
    assert named and [path for path in sorted(named) if not (ROOT / path).exists()] == []


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_to_pages_and_headings_that_exist(file: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", file.read_text(encoding="utf-8"))
    pages = [((file.parent / path if path else file), anchor) for path, anchor in links]
    assert [str(page) for page, _ in pages if not page.exists()] == []
    assert [anchor for page, anchor in pages if anchor and anchor not in anchors(page)] == []


def test_the_readme_links_to_every_page_that_it_relies_on() -> None:
    assert {"docs/api.md", "deploy/README.md", "models/README.md", "app/README.md", "tests/bench/RESULTS.md"} <= set(
        re.findall(r"\]\(([^):#]+)\)", README)
    )


def test_the_api_page_names_every_route_and_no_other() -> None:
    paths = {re.sub(r"\{\w+\}", "{id}", path) for path in create_app(Settings()).openapi()["paths"]} | {"/docs"}
    named = set(re.findall(r"`(?:[A-Z]+ )?(/[\w/{}]+)(?:\?[^`]*)?`", API))
    named |= {"/v1/models/{id}/unload"} if "/unload" in named else set()
    assert paths - named == set()
    assert {path for path in named if path.startswith("/v1/")} - paths == set()


def test_the_api_page_names_every_field_that_is_not_openais() -> None:
    theirs = set(ImageGenerateParamsBase.__annotations__) | {"stream"}
    ours = {name for name, field in ImageBody.model_fields.items() if "ignored" not in str(field.description)} - theirs
    named = set(re.findall(r"`(\w+)`", API))
    assert {name for name in ours if not {name, f"_{name.rpartition('_')[2]}"} & named} == set() and len(ours) > 10


def test_the_readme_counts_the_alerts() -> None:
    rules = (ROOT / "deploy/prometheus/rules/alerts.yml").read_text(encoding="utf-8")
    assert f"{len(re.findall('- alert:', rules))} alerts" in README


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(number) for number in re.findall(r"^(\d+)\. \*\*", TOUR, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 5


HOMES = ("home", "Users", "root")
NOT_HOMES = (("", "/instep/.cache"), ("app", "/x"), ("docs.example", "/me"))


def machine_paths(text: str) -> list[str]:
    """Paths in a text that exist on one machine only: of this checkout, or of anyone's home."""
    homes = "|".join(HOMES)
    return re.findall(rf"{re.escape(str(ROOT))}\b|(?<![\w.])/(?:{homes})/(?!instep\b)", text)


def test_no_path_of_a_machine_is_in_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=60, check=True).stdout
    files = [
        ROOT / name for name in listed.decode().split("\0") if name and not name.endswith((".safetensors", ".png"))
    ]
    here = Path(__file__)
    assert [
        f"{file}: {path}"
        for file in files
        if file.is_file() and file != here
        for path in machine_paths(file.read_text(encoding="utf-8", errors="replace"))
    ] == []


def test_a_path_of_a_machine_is_seen() -> None:
    for path in (f'"{ROOT}"', f"{ROOT}/app", *(f"cd /{home}/me" for home in HOMES)):
        assert machine_paths(path), path
    for path in ("/tmp/x", *(f"{before}/{home}{after}" for home in HOMES for before, after in NOT_HOMES)):
        assert not machine_paths(path), path
