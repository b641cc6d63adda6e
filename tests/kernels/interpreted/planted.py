"""Copies of a kernel's module with a bug planted into the source."""

import importlib.util
from pathlib import Path
from types import ModuleType


def plant(module: ModuleType, right: str, wrong: str, folder: Path) -> ModuleType:
    """`module` anew, with the one occurrence of `right` in its source replaced by `wrong`."""
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1, "the line to break has changed"
    path = folder / "broken.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("broken", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    return broken
