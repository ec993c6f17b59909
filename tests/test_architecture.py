"""The plan of the house, read from the code: who imports whom, what happens at import, how files look."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lilt"
FILES = sorted(PACKAGE.rglob("*.py"))
# each module may import those below it
LAYERS = [
    {"__main__"}, {"cli"}, {"report"}, {"cost", "advise"}, {"run"}, {"train", "evaluate"}, {"dual"}, {"checkpoint"},
    {"build", "budgets"}, {"model", "losses"}, {"data", "policies"}, {"towers"}, {"demo"},
    {"config", "registry", "distributed", "memory"},
]  # fmt: skip
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
SEES_CONFIG = {"cli", "cost", "run", "train", "dual", "checkpoint", "build"}
LIBRARIES = {"timm", "transformers", "open_clip", "peft"}
# peft changes towers, so policies may know it, in the two files of the policy that passes it through
KNOWS_PEFT = {PACKAGE / "policies" / name for name in ("injection.py", "peft_config.py")}
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


def part(file: Path) -> str:
    """Return the component a file belongs to: its folder, or its own name at the top."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(file: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write absolute imports"
            assert node.module is not None
            yield node.module
            if node.module == "lilt":
                yield from (f"lilt.{alias.name}" for alias in node.names)


def own(file: Path) -> set[str]:
    """Return the components of lilt that a file imports."""
    return {name.split(".")[1] for name in imports(file) if name.startswith("lilt.")} - {part(file)}


def foreign(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)} - {"lilt"}


def test_every_component_has_its_place() -> None:
    assert {part(file) for file in FILES} - {"__init__"} == set(DEPTH)


@every_file
def test_imports_go_strictly_downward(file: Path) -> None:
    if part(file) == "__init__":
        return  # the public face re-exports
    upward = {name for name in own(file) if DEPTH[name] <= DEPTH[part(file)]}
    assert not upward, f"{part(file)} imports {upward}"


@every_file
def test_components_never_see_config(file: Path) -> None:
    if part(file) not in SEES_CONFIG | {"__init__"}:
        assert "config" not in own(file)


@every_file
def test_only_towers_know_the_model_libraries(file: Path) -> None:
    if part(file) != "towers":
        assert not (LIBRARIES - {"peft"} if file in KNOWS_PEFT else LIBRARIES) & foreign(file)


def test_losses_import_torch_alone() -> None:
    for file in FILES:
        if part(file) == "losses":
            assert foreign(file) - sys.stdlib_module_names <= {"torch"}
            # the catalogue names the losses for the command line, and names have one grammar
            assert own(file) <= ({"registry"} if file.name == "catalogue.py" else set())


def test_only_distributed_touches_collectives() -> None:
    for file in FILES:
        if part(file) != "distributed":
            assert not [name for name in imports(file) if name.startswith("torch.distributed")], file


def calls(file: Path, *names: str) -> list[int]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
    return [node.lineno for node in found if isinstance(node.func, ast.Name) and node.func.id in names]


@every_file
def test_only_the_command_line_prints(file: Path) -> None:
    if part(file) != "cli":
        assert not calls(file, "print")


@every_file
def test_torch_load_is_safe(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node)
        assert not (isinstance(node, ast.Import) and "pickle" in {alias.name for alias in node.names})


@every_file
def test_a_module_is_nothing_but_definitions(file: Path) -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        platform = isinstance(node, ast.If) and ast.unparse(node.test).startswith("sys.platform")
        filing = isinstance(node, ast.For) and all(".register(" in ast.unparse(line) for line in node.body)
        fine = docstring or guard or platform or filing or isinstance(node, allowed)
        assert fine, f"line {node.lineno}: {ast.unparse(node)}"


def test_importing_opens_no_connection_and_writes_no_file(tmp_path: Path) -> None:
    names = [".".join(("lilt", *f.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__") for f in FILES]
    code = f"""
import importlib, socket, sys
def refuse(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa+")
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen") or writes:
        raise AssertionError(f"{{event}} {{args}}")
# the libraries first: what they do at their import is theirs
import accelerate, jsonargparse, open_clip, peft, rich, timm, torchvision, transformers, yaml
sys.dont_write_bytecode = True
sys.addaudithook(refuse)
for name in {[name for name in names if not name.endswith("__main__")]!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_line_checks_its_arguments_before_it_imports_torch() -> None:
    for file in (PACKAGE / "cli").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
        ours = {name for name in top if name.startswith("lilt") and not name.startswith("lilt.cli.")}
        assert ours <= {"lilt.config", "lilt.registry"}, file


@every_file
def test_files_have_telling_names_and_a_readable_length(file: Path) -> None:
    assert file.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 250


def public(body: list[ast.stmt], where: str, inherits: bool = False) -> Iterator[tuple[str, ast.AST]]:
    """Yield the public classes and functions of a module, and the public methods that are not overrides."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            if not (inherits and isinstance(node, ast.FunctionDef)):
                yield f"{where}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.", bool(node.bases))


@every_file
def test_everything_public_has_a_docstring(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    nodes = public(tree.body, "")
    bare = [name for name, node in nodes if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert not bare
