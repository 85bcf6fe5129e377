"""README and docs are claims: what they show must be what the repository holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
INCLUDED = re.findall(r"<!-- begin (\S+) -->\n(.*?)<!-- end \1 -->", README, re.DOTALL)


@pytest.mark.parametrize("path, shown", INCLUDED, ids=[path for path, _ in INCLUDED])
def test_a_results_table_is_the_measured_one(path, shown):
    assert shown.strip() == (ROOT / path).read_text(encoding="utf-8").strip()


def test_the_count_of_exact_comparisons_is_the_measured_one():
    measured = (ROOT / "benchmarks/results/exactness.md").read_text(encoding="utf-8")
    (count,) = re.findall(r"^> ([\d,]+ comparisons under .*)$", README, re.MULTILINE)
    assert f"\n- {count}\n" in measured


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "examples/tiny_pair/README.md", *DOCS])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), target


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
    assert used == set(re.findall(r"^\| `(SIMSD_[A-Z_]+)`", README, re.MULTILINE))


def test_the_python_examples_run():
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 2
    for document in DOCS:
        examples += re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})  # noqa: S102
