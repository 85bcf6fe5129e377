"""What `import simsd` gives before anything is decoded."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import simsd
import simsd_kernels


def test_the_version_is_the_installed_one_s():
    assert simsd.__version__ == importlib.metadata.version("simsd-kernels") == simsd_kernels.__version__
    assert "__version__" in dir(simsd)


def test_asking_for_the_version_loads_no_torch():
    """As the command line does, which starts in a fraction of torch's import."""
    code = (
        "import sys; sys.argv = ['simsd']; import simsd; assert simsd.__version__[0].isdigit(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_checkout_that_is_not_installed_has_a_version_too(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert simsd.__version__ == "0+unknown"


@pytest.mark.parametrize("package", [simsd, simsd_kernels], ids=lambda package: package.__name__)
def test_type_checkers_are_told_that_the_packages_are_typed(package):
    assert (Path(package.__file__).parent / "py.typed").read_text() == ""


def test_every_public_name_is_there():
    assert all(hasattr(simsd, name) for name in simsd.__all__)
    with pytest.raises(AttributeError, match="module 'simsd' has no attribute 'genrate'"):
        _ = simsd.genrate
