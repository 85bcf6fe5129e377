"""Makes a virtual environment and, in it, constraints.txt: what pip may install there.

    python .ci/environment.py VENV [CONSTRAINTS]

Where the interpreter that runs this has torch >= 2.11, of any build, the environment uses that very torch: it sees the
interpreter's packages (also where that interpreter is a virtual environment itself, whose packages
--system-site-packages would not show), and pip is held to its torch and Triton. Else constraints.txt has the versions.
With CONSTRAINTS that file has them, whatever torch is there.
"""

import importlib.metadata
import pathlib
import re
import subprocess
import sys
import sysconfig
import venv

OLDEST_TORCH = (2, 11)
PINNED = pathlib.Path(__file__).parents[1] / "constraints.txt"


def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable(torch):
    """Whether this version of torch is new enough; None is no torch."""
    return torch is not None and tuple(map(int, re.findall(r"\d+", torch)[:2])) >= OLDEST_TORCH


def held_to(torch, triton):
    """The lines of constraints.txt with the torch and the Triton that are there in place of the pinned ones."""
    # A torch has its own Triton and, up to 2.11, needs an older setuptools than the pinned one.
    pinned = [line for line in PINNED.read_text().splitlines() if not re.match(r"(torch|triton|setuptools)==", line)]
    return pinned + [f"torch=={torch}"] + ([f"triton=={triton}"] if triton else [])


def show_packages(environment):
    """Lets the environment see the packages of the interpreter that runs this."""
    folders = [path for path in sys.path if pathlib.Path(path).name in ("site-packages", "dist-packages")]
    purelib = sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)})
    # addsitedir also reads the .pth files there, by which packages installed in place are found. Read last, as the name
    # of this one has it, they come behind the environment's own.
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    (pathlib.Path(purelib) / "zz_packages_of_python.pth").write_text("".join(lines))


def main(environment, constraints=None):
    try:
        venv.create(environment, with_pip=True)
    except subprocess.CalledProcessError as error:
        advice = "install its ensurepip (Debian: python3-venv)"
        raise SystemExit(f"{sys.executable} cannot put pip into {environment}: {advice}") from error
    torch = installed("torch")
    if constraints is not None:
        lines = pathlib.Path(constraints).read_text().splitlines()
    elif usable(torch):
        print(f"torch {torch} of {sys.executable} is used as it is", flush=True)
        show_packages(environment)
        lines = held_to(torch, installed("triton"))
    else:
        if torch is not None:
            print(f"torch {torch} of {sys.executable} is older than 2.11: another one is installed", flush=True)
        lines = PINNED.read_text().splitlines()
    (environment / "constraints.txt").write_text("\n".join(lines) + "\n")


main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
