"""The house rules of app/, read from the source with `ast`: imports point down, one library has one door.

The floors are those of app/README.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    **dict.fromkeys(("request", "report", "settings", "errors"), 0),
    **dict.fromkeys(("imaging", "panel", "logs", "source"), 1),
    "samplers": 2,
    "cards": 3,
    "keys": 4,
    "families": 4,
    "checkpoints": 5,
    "pool": 6,
    "engine": 7,
    "jobs": 8,
    "worker": 9,
    "metrics": 10,
    "api": 11,
    "main": 12,
    "bench": 13,
    "cli": 14,  # the command line starts main and bench, neither of them the command line
}
DOORS: dict[str, str | tuple[str, ...]] = {
    "fastapi": "app.api",
    "fastapi_swagger": "app.api",
    "starlette": "app.api",
    "prometheus_client": "app.metrics",
    "diffusers": "app.families",
    "transformers": "app.families",
    "tokenizers": "app.families",
    "PIL": ("app.imaging", "app.panel", "app.source"),
    "python_multipart": "app.source",
    "isal": "app.imaging",
    "structlog": "app.logs",
    "uvicorn": ("app.main", "app.api.guard"),
    "h11": "app.api.guard",
    "typer": "app.cli",
    "click": "app.cli",
    "rich": "app.cli",
}
FRONT = ("app.main", "app.api", "app.worker.supervisor", "app.metrics", "app.imaging", "app.panel", "app.source")
"""The server's front process: neither these nor what they import may import torch."""

PLAIN = ("app.cards", "app.request", "app.report", "app.settings", "app.keys")
TORCH_FREE = (*FRONT, *PLAIN, "app.samplers", "app.engine.batcher")
SIZE = (15_400, 90, 136)
"""Lines, files and classes (private ones too) that app/ may have, without the capabilities below."""

SHARES = {
    "nothing accepted is lost": (430, 2, 3),  # 200 lines were planned
    "edits": (640, 4, 7),  # 500 lines were planned
    "LoRA": (1_180, 5, 7),  # 450 lines were planned
    "U-Nets and a refiner": (1_100, 5, 7),  # 450 lines were planned
    "the page": (250, 2, 2),
    "compiled packages": (250, 2, 3),
}
"""What each later capability may add to SIZE."""

BUILT: tuple[str, ...] = ("nothing accepted is lost", "edits", "LoRA", "U-Nets and a refiner", "the page")
"""The capabilities that are there."""

DESCRIBED = 0.12
"""The least share of lines that are docstrings."""

VAGUE = re.compile(r"\b(told|said|given|held|whose)\b", re.IGNORECASE)
VAGUE_MOST = 60
"""Words that stood for too many things, and how often app/ may use them."""

PRIVATE = 10
"""How often tests may look at what begins with an underscore in a class or module of ours."""

FOREIGN = {
    *("_exit", "_asdict", "_replace", "_didModify"),
    *("_get_command", "_dynamo", "_compiled_call_impl", "_attn_implementation"),
    *("_pack_latents", "_unpack_latents", "_prepare_latent_image_ids"),
    *("_get_clip_prompt_embeds", "_get_t5_prompt_embeds"),
}
"""Names that begin with an underscore in Python, typer, torch, transformers and diffusers; ours have other names."""

TORCH = ("torch", "diffusers", "transformers", "safetensors.torch")


@dataclass(frozen=True)
class Module:
    """One source file. imports: (dotted name, line), the names of `from a import b` as a.b; loads: those that run."""

    name: str
    path: Path
    tree: ast.Module
    lines: int
    imports: tuple[tuple[str, int], ...]
    loads: tuple[tuple[str, int], ...]


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def read(root: Path) -> dict[str, Module]:
    """Every module under root/app, by dotted name."""
    modules = {}
    for path in sorted((root / "app").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        modules[name] = Module(name, path, tree, len(text.splitlines()), tuple(imports_of(tree)), tuple(loads_of(tree)))
    return modules


def imports_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """All imports, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def loads_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Imports less those under `if TYPE_CHECKING:`, which only a type checker follows."""
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    lines = {line for node in checked for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    yield from (entry for entry in imports_of(tree) if entry[1] not in lines)


def upward(modules: dict[str, Module]) -> list[str]:
    """Imports that do not point down. A package may import itself; floor 0 is one unit."""
    found = []
    for module in modules.values():
        own = module.name.split(".")[1] if "." in module.name else None
        for target, line in module.imports:
            if not target.startswith("app.") or own is None:
                continue
            other = target.split(".")[1]
            assert own in FLOORS and other in FLOORS, f"{module.path}:{line}: {own} or {other} has no floor"
            if other != own and FLOORS[other] >= FLOORS[own] and FLOORS[own] > 0:
                found.append(f"{module.path}:{line}: {module.name} imports {target}")
            if FLOORS[own] == 0 and FLOORS[other] > 0:
                found.append(f"{module.path}:{line}: {module.name} imports {target}")
    return found


def circle(modules: dict[str, Module]) -> list[str]:
    """Modules that import each other in a circle, in order; imports in functions and under TYPE_CHECKING count too."""
    graph = {}
    for module in modules.values():
        reached = (target if target in modules else target.rpartition(".")[0] for target, _ in module.imports)
        graph[module.name] = {name for name in reached if name in modules} - {module.name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def side_doors(modules: dict[str, Module]) -> list[str]:
    doors = {library: (door,) if isinstance(door, str) else door for library, door in DOORS.items()}
    return [
        f"{module.path}:{line}: {library} belongs to {' and '.join(doors[library])}"
        for module in modules.values()
        for target, line in module.imports
        for library in doors
        if inside(target, library) and not inside(module.name, *doors[library])
    ]


def with_torch(modules: dict[str, Module], starts: tuple[str, ...]) -> list[str]:
    """Chains of imports from `starts` to torch, parents' `__init__` included."""
    chains = {name: name for name in modules if inside(name, *starts)}
    todo, found = list(chains), []
    while todo:
        name = todo.pop()
        for target, _ in modules[name].loads:
            if inside(target, *TORCH):
                found.append(f"{chains[name]} -> {target}")
            parts = target.split(".")
            for reached in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                if reached in modules and reached not in chains:
                    chains[reached] = f"{chains[name]} -> {reached}"
                    todo.append(reached)
    return found


def too_long(modules: dict[str, Module]) -> list[str]:
    found = [f"{m.path}: {m.lines} lines" for m in modules.values() if m.lines > 400]
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 40:
                    found.append(f"{module.path}:{node.lineno}: {node.name} has {lines} lines")
    return found


def totals(modules: dict[str, Module]) -> tuple[int, int, int]:
    """Lines, files and classes."""
    nodes = (node for module in modules.values() for node in ast.walk(module.tree))
    classes = sum(isinstance(node, ast.ClassDef) for node in nodes)
    return sum(module.lines for module in modules.values()), len(modules), classes


def described(modules: dict[str, Module]) -> float:
    """The share of the lines that are docstrings."""
    nodes = (node for module in modules.values() for node in ast.walk(module.tree))
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = [node.body[0] for node in nodes if isinstance(node, kinds) and ast.get_docstring(node) is not None]
    return sum((text.end_lineno or 0) - text.lineno + 1 for text in texts) / totals(modules)[0]


def private(root: Path) -> list[str]:
    """Where tests look at what begins with one underscore in a class or module of ours."""
    found = []
    for path in sorted((root / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [name for name in looked_at(node) if name.startswith("_") and not name.startswith("__")]
            found += [f"{path}:{node.lineno}: {name}" for name in names if name not in FOREIGN]  # type: ignore[attr-defined]
    return found


def looked_at(node: ast.AST) -> list[str]:
    """The names that a node reads, sets, patches or imports, but for those of the object's own."""
    match node:
        case ast.Attribute(value=ast.Name(id="self" | "cls")):
            return []
        case ast.Attribute(attr=name):
            return [name]
        case ast.ImportFrom(names=aliases):
            return [alias.name for alias in aliases]
        case ast.Call(func=ast.Name(id="getattr" | "setattr") | ast.Attribute(attr="setattr"), args=args):
            words = [arg.value for arg in args[:2] if isinstance(arg, ast.Constant)]
            return [word.rpartition(".")[2] for word in words if isinstance(word, str)]
    return []


def undescribed(modules: dict[str, Module]) -> list[str]:
    return [str(m.path) for m in modules.values() if m.tree.body and not ast.get_docstring(m.tree)]


@pytest.fixture(scope="module")
def app() -> dict[str, Module]:
    return read(ROOT)


def test_imports_point_down(app: dict[str, Module]) -> None:
    assert upward(app) == []


def test_no_modules_import_each_other_in_a_circle(app: dict[str, Module]) -> None:
    assert circle(app) == []


def test_one_library_has_one_door(app: dict[str, Module]) -> None:
    assert side_doors(app) == []


def test_the_front_never_imports_torch(app: dict[str, Module]) -> None:
    assert all(any(inside(name, start) for name in app) for start in TORCH_FREE)
    assert with_torch(app, TORCH_FREE) == []


def test_the_front_never_loads_torch() -> None:
    code = "import sys, app.main, app.cli; sys.exit(', '.join({'torch', 'transformers'} & {*sys.modules}) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_and_functions_are_short(app: dict[str, Module]) -> None:
    assert too_long(app) == []


def test_the_whole_stays_small(app: dict[str, Module]) -> None:
    limits = [sum(parts) for parts in zip(SIZE, *(SHARES[name] for name in BUILT), strict=True)]
    assert all(total <= limit for total, limit in zip(totals(app), limits, strict=True)), (totals(app), limits)
    assert described(app) >= DESCRIBED


def test_vague_words_are_rare(app: dict[str, Module]) -> None:
    found = [module.name for module in app.values() for _ in VAGUE.findall(module.path.read_text(encoding="utf-8"))]
    assert len(found) <= VAGUE_MOST, found


def test_every_module_says_what_it_is(app: dict[str, Module]) -> None:
    assert undescribed(app) == []


def test_tests_rarely_look_at_what_is_private() -> None:
    found = private(ROOT)
    assert len(found) <= PRIVATE, "\n".join(found)


def test_a_breach_is_seen(tmp_path: Path) -> None:
    """Each rule above finds a planted breach of it."""
    planted = {
        "__init__": "",
        "settings": '"""Settings."""\nimport app.engine.engine\n\nclass _One:\n    given = 1\n',
        "main": '"""Main."""\nfrom app.worker import supervisor\nfrom fastapi import FastAPI\n',
        "metrics": '"""Metrics."""\nimport h11\nimport uvicorn\n',
        "worker/__init__": "",
        "worker/supervisor": '"""Supervisor."""\n\ndef late():\n    from app.engine import engine\n',
        "worker/child": '"""Child."""\n\ndef late():\n    from app.worker import wire\n',
        "worker/wire": '"""Wire."""\nif TYPE_CHECKING:\n    from app.worker.child import Child\n',
        "engine/__init__": "",
        "../tests/test_engine": (
            "from app.main import _serve\nengine._inbox.get(self._own)\nos._exit(engine.__doc__)\n"
            "patch.setattr('app.pool.pool._do', slow)\npatch.setattr(Pool, '_build', Pool.build)\n"
        ),
        "engine/engine": "import torch\n\ndef long():\n" + "    print()\n" * 40 + "\n" * 400,
    }
    for name, text in planted.items():
        path = tmp_path / "app" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    app = read(tmp_path)
    assert [line.rpartition(": ")[2] for line in upward(app)] == ["app.settings imports app.engine.engine"]
    assert {*circle(app)} == {"app.worker.child", "app.worker.wire"}
    assert [line.rpartition(": ")[2] for line in side_doors(app)] == [
        "fastapi belongs to app.api",
        "h11 belongs to app.api.guard",
        "uvicorn belongs to app.main and app.api.guard",
    ]
    chains = with_torch(app, ("app.main",))
    assert chains == ["app.main -> app.worker.supervisor -> app.engine.engine -> torch"]
    assert [line.rpartition(": ")[2] for line in too_long(app)] == ["443 lines", "long has 41 lines"]
    assert undescribed(app) == [str(tmp_path / "app/engine/engine.py")]
    assert totals(app)[1:] == (10, 1)
    assert sorted(line.rpartition(": ")[2] for line in private(tmp_path)) == ["_build", "_do", "_inbox", "_serve"]
