"""The house keeps its shape: who may import whom, small files, documented names, no unsafe loading."""

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Lower rooms first; rooms of one row may not import each other. `kernels` is the package beside `vilg`.
ROWS = (
    ("errors",),
    ("config", "kernels"),
    ("parallel", "tokens"),
    ("data", "model"),
    ("inference",),
    ("checkpoint", "evaluate"),
    ("train",),
    ("tools",),
    ("demo",),
    ("__main__",),
)
ROW = {room: i for i, row in enumerate(ROWS) for room in row}
ONLY_ERRORS = "pictures"  # drawing: imports errors alone, and every room above the tokens may use it
LONGEST_FILE = 500

SOURCES = sorted([*(ROOT / "vilg").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
FILES = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def expect_nothing(paths: Sequence[Path], rule: Callable[[Path], Any]) -> None:
    """Fail with all that a rule finds, file by file."""
    found = {str(path.relative_to(ROOT)): offence for path in paths if (offence := rule(path))}
    assert not found, "\n".join(f"{path}: {offence}" for path, offence in found.items())


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room_of(module: str) -> str | None:
    """`vilg.data.loader` -> data, `kernels.patterns` -> kernels; None outside the project and for `vilg` itself."""
    parts = module.split(".")
    if parts[0] == "kernels":
        return "kernels"
    return parts[1] if parts[0] == "vilg" and len(parts) > 1 else None


def imported_modules(path: Path) -> Iterator[str]:
    """All modules a file imports, those inside functions too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield module
            if module in ("vilg", "kernels"):
                yield from (f"{module}.{alias.name}" for alias in node.names if alias.name != "__version__")


def broken_imports(room: str, imported: set[str]) -> set[str]:
    """The rooms among `imported` that `room` may not import."""
    if room == ONLY_ERRORS:
        return imported - {room, "errors"}
    if room == "kernels":
        return imported - {room}
    allowed = {other for other, row in ROW.items() if row < ROW[room]} | {room, ONLY_ERRORS}
    return imported - allowed


def imports_that_point_up(path: Path) -> set[str]:
    """The rooms that a file imports and may not."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    room = room_of(module.removesuffix(".__init__"))
    imported = {r for name in imported_modules(path) if (r := room_of(name))}
    if room is None:  # vilg/__init__.py
        return imported
    return broken_imports(room, imported) if room in ROW or room == ONLY_ERRORS else {f"{room} is no room"}


def test_imports_point_down_only():
    expect_nothing(SOURCES, imports_that_point_up)


def test_rule_for_imports_catches_an_upward_and_a_sideways_arrow():
    assert broken_imports("model", {"train", "kernels", "data"}) == {"train", "data"}
    assert broken_imports("kernels", {"errors"}) == {"errors"}
    assert broken_imports("pictures", {"errors", "tokens"}) == {"tokens"}


def test_files_are_short():
    def lines(path: Path) -> int:
        return len(path.read_text(encoding="utf-8").splitlines())

    expect_nothing(FILES, lambda path: lines(path) > LONGEST_FILE and lines(path))


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and classes without a docstring, and public methods that need one.

    A method needs none if it is a property, has one statement, or is promised elsewhere: its class has a base, whose
    docstring (for a torch module's `forward`: that of the class) describes it, or a Protocol documents its name.
    """
    found = [] if ast.get_docstring(tree) or not tree.body else ["(module)"]
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, definitions) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            found.append(node.name)
        if isinstance(node, ast.ClassDef) and not node.bases:
            methods = [m for m in node.body if isinstance(m, definitions) and not m.name.startswith("_")]
            found += [
                f"{node.name}.{method.name}"
                for method in methods
                if not ast.get_docstring(method) and len(method.body) > 1 and not _is_property(method)
                and method.name not in _promised()
            ]
    return found


@cache
def _promised() -> frozenset[str]:
    """Names of the documented methods of all Protocols."""
    classes = [node for path in SOURCES for node in _tree(path).body if isinstance(node, ast.ClassDef)]
    protocols = [node for node in classes if any("Protocol" in ast.unparse(base) for base in node.bases)]
    methods = [m for node in protocols for m in node.body if isinstance(m, ast.FunctionDef)]
    return frozenset(m.name for m in methods if ast.get_docstring(m))


def _is_property(method: ast.AST) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in method.decorator_list)


def test_public_names_are_documented():
    expect_nothing(SOURCES, lambda path: undocumented(_tree(path)))


def unsafe_loads(tree: ast.Module) -> list[str]:
    """Calls that could run code hidden in a file: torch.load, np.load, pickle, yaml.load, eval and their like."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe = (
            (name == "torch.load" and given.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False")
            or name in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system")
            or given.get("shell") == "True"
        )
        if unsafe:
            found.append(f"line {node.lineno}: {name}")
    return found


def test_nothing_is_loaded_that_could_run_code():
    expect_nothing(SOURCES, lambda path: unsafe_loads(_tree(path)))


def test_rule_for_loading_catches_the_unsafe_forms():
    code = "torch.load(f)\ntorch.load(f, weights_only=True)\nnp.load(f)\nsubprocess.run(x, shell=True)\nmodel.eval()"
    assert unsafe_loads(ast.parse(code)) == ["line 1: torch.load", "line 3: np.load", "line 4: subprocess.run"]


def swallowed(source: str) -> list[int]:
    """Lines that catch every exception and do nothing, without a comment that says why this is right."""
    lines = source.splitlines()
    return [
        handler.lineno
        for handler in ast.walk(ast.parse(source))
        if isinstance(handler, ast.ExceptHandler)
        and (handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException"))
        and all(isinstance(statement, ast.Pass) for statement in handler.body)
        and "#" not in lines[handler.lineno - 1]
    ]


def test_no_exception_is_swallowed_without_a_reason():
    expect_nothing(SOURCES, lambda path: swallowed(path.read_text(encoding="utf-8")))


def test_no_loose_ends():
    words = ("TO" + "DO", "FIX" + "ME")

    def loose_ends(path: Path) -> list[str]:
        text = path.read_text(encoding="utf-8")
        return [word for word in words if word in text]

    expect_nothing(FILES, loose_ends)
