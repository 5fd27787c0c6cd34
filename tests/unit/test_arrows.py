"""Imports of the package go one way, from wing to wing and from file to file, inside functions too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import umt_hf

PACKAGE = Path(umt_hf.__file__).parent
# From top to bottom: a wing imports from those after it alone. Wings of one line know nothing of each other.
ORDER = [
    {"cli"},
    {"demo", "moving_shapes"},
    {"finetuning"},
    {"training"},
    {"evaluation"},
    {"hub_cards"},
    {"inference"},
    {"plots"},
    {"data"},
    {"runs"},
    {"teachers"},
    {"processing", "modeling"},
    {"diagnostics", "version", "zoo", "recipes"},
]
RANKS = {wing: rank for rank, wings in enumerate(ORDER) for wing in wings}
# The package's own file names what is public, and these start quickly: they import inside functions.
LAZY = {"umt_hf", "umt_hf.diagnostics", *(f"umt_hf.cli{file}" for file in ("", ".launching", ".scripts"))}


def name_module(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(["umt_hf", *(part for part in parts if part != "__init__")])


def list_imports(path: Path, package: Path) -> Iterator[tuple[str, bool]]:
    """Modules of the package that a file imports, and whether it does so inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = name_module(path, package)
    base = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "umt_hf":
                    yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            if source.split(".")[0] != "umt_hf":
                continue
            for alias in node.names:
                full = f"{source}.{alias.name}"
                place = package.joinpath(*full.split(".")[1:])
                is_module = place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
                yield full if is_module else source, id(node) in inside


def find_faults(package: Path) -> list[str]:
    """Arrows up, imports of the package's own top, imports inside functions, and circles, in words."""
    faults, graph = [], {}
    for path in sorted(package.rglob("*.py")):
        module = name_module(path, package)
        wing = module.split(".")[1] if "." in module else "umt_hf"
        for target, is_inside in list_imports(path, package):
            graph.setdefault(module, set()).add(target)
            if is_inside and module not in LAZY:
                faults.append(f"{module} imports {target} inside a function")
            if wing == "umt_hf" or (is_inside and module in LAZY):
                continue
            target_wing = target.split(".")[1] if "." in target else "umt_hf"
            if wing not in RANKS:
                faults.append(f"{module}: the wing {wing} has no place in the order")
            elif target_wing == "umt_hf":
                if wing != "cli":
                    faults.append(f"{module} imports the package's top")
            elif target_wing != wing and RANKS[target_wing] <= RANKS[wing]:
                faults.append(f"{module} imports {target}, which stands above it or beside it")
    return faults + [f"circle: {' > '.join(circle)}" for circle in find_circles(graph)]


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    circles, done = [], set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            circles.append([*trail[trail.index(module) :], module])
            return
        if module in done:
            return
        for target in sorted(graph.get(module, ())):
            visit(target, [*trail, module])
        done.add(module)

    for module in sorted(graph):
        if module not in LAZY:
            visit(module, [])
    return circles


def test_imports_go_one_way():
    assert find_faults(PACKAGE) == []


@pytest.fixture
def planted(tmp_path):
    def plant(files: dict[str, str]) -> list[str]:
        package = tmp_path / "umt_hf"
        for name, text in {"__init__.py": "", **files}.items():
            path = package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return find_faults(package)

    return plant


def test_a_planted_arrow_up_is_found(planted):
    (fault,) = planted({"data/sources.py": "from ..training.trainer import train\n", "training/trainer.py": ""})
    assert fault == "umt_hf.data.sources imports umt_hf.training.trainer, which stands above it or beside it"
    faults = planted({"data/sources.py": "def load():\n    from ..training import trainer\n"})
    assert faults[0] == "umt_hf.data.sources imports umt_hf.training.trainer inside a function"
    assert len(faults) == 2


def test_planted_neighbours_circles_and_tops_are_found(planted):
    (fault,) = planted({"modeling/a.py": "from umt_hf.processing import decoding\n", "processing/decoding.py": ""})
    assert "umt_hf.modeling.a imports umt_hf.processing.decoding" in fault
    (fault,) = planted({"modeling/a.py": "from .b import x\n", "modeling/b.py": "from .a import y\n"})
    assert fault == "circle: umt_hf.modeling.a > umt_hf.modeling.b > umt_hf.modeling.a"
    faults = planted({"modeling/a.py": "import umt_hf\n", "modeling/b.py": "", "attic/c.py": "from ..zoo import z\n"})
    assert faults == [
        "umt_hf.attic.c: the wing attic has no place in the order",
        "umt_hf.modeling.a imports the package's top",
    ]


def test_no_folder_is_overfull():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= 15, folder
