"""What the site shows besides the pages of docs/: the README as its first page, measured tables, the command line.

A hook of mkdocs. Links that lead out of docs/ become links to those pages, else to the file in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from simsd.cli.app import app

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
PICTURES = (".svg", ".gif", ".png")
# Pages of results by what they tell; whatever is not among them is in the last group.
GROUPS = {
    "Decoding": ["tiny_pair", "tiny_pair_t08", "tiny_pair_dynamic", "long_pair", "long_pair_dynamic", "graph_shapes"],
    "Exactness": ["exactness", "audit", "batch_invariance"],
    "Drafts": ["useless_draft", "useless_head", "lookup"],
    "Engine and serving": ["loop", "loop_profile", "long_prompt", "scale", "scale_counted", "serve", "ray_faults"],
    "Kernels": ["attention_cpu", "fused_layers", "cuda_resources", "triton_resources", "cuda_counts"],
}
MORE = "More"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    measured = sorted(path.stem for path in (ROOT / RESULTS).glob("*.md"))
    groups = {title: [name for name in names if name in measured] for title, names in GROUPS.items()}
    groups[MORE] = [name for name in measured if not any(name in names for names in GROUPS.values())]
    (entry,) = (entry for entry in config.nav if "Results" in entry)
    entry["Results"] = ["results/index.md"] + [
        {title: [f"results/{name}.md" for name in names]} for title, names in groups.items() if names
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    def add(page: str, text: str) -> None:
        files.append(File.generated(config, page, content=text))

    add("index.md", (ROOT / "README.md").read_text(encoding="utf-8"))
    add("reference/command-line.md", command_line())
    about = []
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
            add(f"results/{path.name}", f"# {path.stem.replace('_', ' ').capitalize()}\n\n{text}")
            about.append(f"- [{path.stem.replace('_', ' ')}]({path.name}): {text.splitlines()[0]}")
        elif path.suffix in PICTURES:
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    add("results/index.md", "\n".join([RESULTS_PAGE, *about]) + "\n")
    return files


RESULTS_PAGE = """# Results

Every table is written by `python -m benchmarks NAME` and tells the machine, the settings and the day; `make bench`
makes all of them anew. Nothing has been timed on a GPU unless a page here says which.
"""


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    source = page.file.src_uri
    if source == "index.md":
        where = PurePosixPath(".")
    elif source.startswith("results/"):
        where = PurePosixPath(RESULTS)
    else:
        where = PurePosixPath("docs") / PurePosixPath(source).parent
    up = "../" * (len(PurePosixPath(source).parts) - 1)

    def replaced(match: re.Match) -> str:
        picture, label, target, anchor = match.groups()
        path = posixpath.normpath(where / target)
        if not (ROOT / path).exists():
            return match.group()  # a page that is made here, or one that mkdocs reports
        if path == "README.md":
            page_of = "index.md"
        elif path.startswith("docs/"):
            page_of = path.removeprefix("docs/")
        elif path.startswith(f"{RESULTS}/"):
            page_of = f"results/{path.removeprefix(RESULTS + '/')}"
        else:
            return f"{picture}[{label}]({config.repo_url}/blob/HEAD/{path}{anchor or ''})"
        if page_of.endswith((".md", *PICTURES)):
            return f"{picture}[{label}]({up}{page_of}{anchor or ''})"
        return f"{picture}[{label}]({config.repo_url}/blob/HEAD/{path})"

    return re.sub(r"(!?)\[((?:[^\[\]]|\n)*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)", replaced, markdown)


TABLE_OF_OPTIONS = ["| argument or option | meaning | default |", "|---|---|---|"]


def command_line() -> str:
    """All commands with their arguments and options, as `--help` tells them."""
    root = typer.main.get_command(app)
    lines = ["# Command line", "", "Made from the command itself: `simsd COMMAND --help` says the same.", ""]
    for name, command in root.commands.items():
        context = click.Context(command, info_name=f"simsd {name}")
        lines += [f"## simsd {name}", "", *_prose(command.help), "", *TABLE_OF_OPTIONS]
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                lines.append(_row(parameter, context))
        lines.append("")
    return "\n".join(lines)


def _prose(text: str | None) -> list[str]:
    return re.sub(r"\[/?[a-z]+\]", "", (text or "").replace("\b", "")).splitlines()


def _row(parameter: click.Parameter, context: click.Context) -> str:
    names = " ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if isinstance(parameter, click.Argument):
        names = f"`{parameter.make_metavar(context)}`"
    told = " ".join(_prose(getattr(parameter, "help", "")))
    default = parameter.get_default(context)
    shown = "" if default is None or default == () or isinstance(default, bool) else f"`{default}`"
    return f"| {names} | {told.replace('|', '/')} | {shown} |"
