"""README and docs are claims: what they show must be what the repository holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.headline import with_headline
from simsd.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))
PAGES = ["README.md", *DOCS]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def examples_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


def test_the_readme_is_short_and_its_rows_are_the_measured_ones():
    assert len(README.splitlines()) <= 120
    assert with_headline(README) == README and README.count("| 100.0% |") >= 3


@pytest.mark.parametrize("page", PAGES)
def test_a_results_table_is_the_measured_one(page):
    for path, shown in re.findall(r"<!-- begin (\S+\.md) -->\n(.*?)<!-- end \1 -->", text_of(page), re.DOTALL):
        assert shown.strip() == text_of(path).strip()


def test_the_count_of_exact_comparisons_is_the_measured_one():
    measured = text_of("benchmarks/results/exactness.md")
    (count,) = re.findall(r"^> ([\d,]+ comparisons under .*)$", README, re.MULTILINE)
    assert f"\n- {count}\n" in measured


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "examples/tiny_pair/README.md"])
def test_links_lead_somewhere(page):
    made = {"command-line.md"}  # by docs/site.py
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(page)):
        if not target.startswith("http") and Path(target).name not in made:
            assert ((ROOT / page).parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w/-]+\.md)\s*$", text_of("mkdocs.yml"), re.MULTILINE))
    assert listed - {"index.md", "reference/command-line.md"} == {page.removeprefix("docs/") for page in DOCS}


def test_every_command_that_is_shown_exists():
    known = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    for page in PAGES:
        shown = set(re.findall(r"^ *(?:\.venv/bin/)?simsd ([a-z][a-z-]*)", text_of(page), re.MULTILINE))
        assert shown <= known, page


def test_every_environment_variable_is_in_the_table():
    sources = [
        ROOT / "setup.py",
        *ROOT.glob("simsd_kernels/**/*.py"),
        *ROOT.glob("python/**/*.py"),
        *ROOT.glob("csrc/**/*"),
    ]
    used = set()
    for path in sources:
        if path.is_file() and path.suffix in (".py", ".cpp", ".h"):
            used |= set(re.findall(r"\"(SIMSD_[A-Z_]+)\"", path.read_text(encoding="utf-8")))
    table = text_of("docs/reference/environment.md")
    assert used == set(re.findall(r"^\| `(SIMSD_[A-Z_]+)`", table, re.MULTILINE))


@pytest.mark.parametrize("page", [page for page in PAGES if examples_of(page)])
def test_the_python_examples_run(page):
    for example in examples_of(page):
        exec(compile(example, page, "exec"), {})  # noqa: S102
