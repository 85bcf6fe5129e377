"""What tests share. Not all need what a fixture imports: each does so itself."""

from __future__ import annotations

import io
import os
import sys
import zlib
from collections.abc import Iterator

import pytest

ASKED = ("--op", "--backend")


def pytest_addoption(parser):
    parser.addoption(
        "--op",
        metavar="NAME,...",
        help="only the tests of these ops (or, of a file test_gpu_NAME.py that is about none, NAME)",
    )
    parser.addoption("--backend", metavar="NAME,...", help="only the tests on these backends, or on none ('none')")


def pytest_collection_modifyitems(config, items):
    wanted, served = (given.split(",") if (given := config.getoption(name, None)) else None for name in ASKED)
    if not wanted and not served:
        return
    from backends import op_of

    kept, dropped = [], []
    for item in items:
        settings = item.callspec.params if hasattr(item, "callspec") else {}
        is_asked = (not wanted or op_of(item) in wanted) and (not served or settings.get("backend", "none") in served)
        (kept if is_asked else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.fixture(autouse=True)
def schedule(request):
    """Where CUDA kernels run on the CPU (tests/emulation.py): another order of blocks and threads for every test, the
    same whenever it is repeated."""
    if os.environ.get("SIMSD_CUDA_EMULATION"):
        import torch

        import simsd_kernels  # noqa: F401, which loads them

        torch.ops.simsd_emulated.set_schedule(zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="module")
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target():
    """A small model of random weights."""
    from stand_ins import random_sdar

    return random_sdar(0)


@pytest.fixture(scope="module")
def draft():
    """One that often agrees with `target`."""
    from stand_ins import disturbed, random_sdar

    return disturbed(random_sdar(0))


@pytest.fixture(scope="module")
def tiny():
    """The built-in pair."""
    import simsd

    return [simsd.load(name) for name in ("tiny-target", "tiny-draft")]


@pytest.fixture(scope="module")
def jobs(tiny):
    """Requests of it with settings of their own, and what each gives alone."""
    from serving import varied_jobs

    return varied_jobs(tiny[0], per_family=3)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`simsd serve` of the built-in pair, a process."""
    from server_process import serving

    folder = tmp_path_factory.mktemp("server")
    with serving(folder, "--max-batch", "8", "--max-length", "1000", "--top-logprobs", "3") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's, of `server`."""
    return server.client()


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> list[str]:
    """Options that name a target and a draft of bytes."""
    import byte_pair

    folder = tmp_path_factory.mktemp("pair")
    target = byte_pair.write_model(folder / "target")
    draft = byte_pair.write_model(folder / "draft", hidden_size=16)
    return ["--target", str(target), "--draft", str(draft)]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    """A Ray cluster of this machine with two CPUs; its address."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False, logging_level="error"
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*arguments, stdin=...) -> (exit code, stdout, stderr); standard input is a terminal unless given."""
    from simsd.cli import main

    def run_(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        stream = io.StringIO(stdin or "")
        stream.isatty = lambda: stdin is None
        monkeypatch.setattr(sys, "stdin", stream)
        capsys.readouterr()  # what the test's own preparations printed
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run_


@pytest.fixture
def assert_one_line_error():
    """assert_one_line_error(what run gave, *parts of the message)"""

    def check(outcome: tuple[int, str, str], *parts: str) -> None:
        code, out, err = outcome
        assert (code, out) == (2, ""), err
        assert err.startswith("simsd: error: ") and err.count("\n") == 1, err
        for part in parts:
            assert part in err

    return check


@pytest.fixture
def interrupted_at():
    """interrupted_at(function, line, call): calls `call` with a KeyboardInterrupt at the given line of the function, as
    counted from its first; whether it came to that."""

    def run_(function, line: int, call) -> bool:
        code = function.__code__

        def trace(frame, event, _):
            if frame.f_code is not code:
                return None
            if event == "line" and frame.f_lineno == code.co_firstlineno + line:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    return run_


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint with its tokenizer, blocks of 8."""
    from small_checkpoints import write_checkpoint, write_tokenizer

    write_checkpoint(tmp_path / "small", extra={"block_length": 8})
    write_tokenizer(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def tokens():
    """int64 [2, 14], of the small checkpoints' vocabulary."""
    import torch

    from small_checkpoints import VOCABULARY

    return torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(1))
