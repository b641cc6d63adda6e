"""What README and docs/ point at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
WRITTEN_BY_THE_USER = {"launch/env.sh"}
ROOMS = "vilg|kernels|launch|ds_configs|tests|benchmarks|docs"
NAMED = re.compile(rf"(?<![\w/.])(?:{ROOMS})/[\w./-]*\.(?:py|md|yaml|json|sh|sbatch|example|png)\b")
LINKED = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = {ROOT / name for name in set(NAMED.findall(text)) - WRITTEN_BY_THE_USER} | {page.parent / name for name in LINKED.findall(text)}
    assert sorted(str(path) for path in named if not path.exists()) == []
