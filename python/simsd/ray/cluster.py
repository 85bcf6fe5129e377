"""The Ray cluster that this process works on."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Iterator

from simsd.errors import SimsdError, one_line

# Of Ray Data: errors as they were raised, and workers that die while they load their models replaced some times.
SETTINGS = {
    "enable_progress_bars": False,
    "print_on_execution_start": False,
    "raise_original_map_exception": True,
    "max_consecutive_actor_init_deaths": 3,
}
SECONDS_TO_ANSWER = 10.0  # of a cluster's first node
EXTRA = 'Ray is missing: pip install "simsd-kernels[ray]"'


def connect(library: str) -> None:
    """To the cluster of RAY_ADDRESS, or to one of this machine, started here, that ends with the process; nothing where
    the process has one. No usage statistics are sent, unless RAY_USAGE_STATS_ENABLED asks for them.

    Args:
        library: of Ray, that is used: "ray.data" or "ray.serve". Where the connection is made here, it logs nothing:
            what goes wrong is told by errors.

    Raises:
        SimsdError: Ray is not installed, or there is no cluster at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read at the import
    try:
        import ray

        importlib.import_module(library)
    except ImportError as error:
        raise SimsdError(f"{EXTRA} ({error})") from None
    if ray.is_initialized():
        return
    logging.getLogger(library).setLevel(logging.CRITICAL)
    if address := os.environ.get("RAY_ADDRESS"):
        _check_address(address)
        ray.init(log_to_driver=False, logging_level="warning")
    else:
        ray.init(log_to_driver=False, logging_level="warning", include_dashboard=False)


def _check_address(address: str) -> None:
    """Raises SimsdError where nobody listens at HOST:PORT: Ray would try for minutes. Other forms Ray checks."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
        except (OSError, OverflowError) as error:
            raise SimsdError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({one_line(error)}): start one (ray start --head), or"
                " unset it"
            ) from None


def worker_device(device: str, cpus: int) -> str:
    """The device of a worker: "cpu" or "cuda", what "auto" means on this cluster.

    Raises:
        SimsdError: another device, or no node of the cluster has what a worker needs.
    """
    import ray

    if device not in ("auto", "cpu", "cuda"):
        raise SimsdError(f"device must be auto, cpu or cuda (Ray chooses which GPU), got {device!r}")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
    if device == "cuda" and not gpus:
        raise SimsdError("device='cuda', and no node of the Ray cluster has a GPU: add one, or use device='cpu'")
    own = [int(node.get("CPU", 0)) for node in nodes]
    if cpus > max(own):
        raise SimsdError(
            f"a worker needs {cpus} CPUs, and no node of the Ray cluster has more than {max(own)}: lower cpus"
        )
    return "cuda" if gpus and device != "cpu" else "cpu"


def check_room(processes: int, cpus: int, readers: int = 0) -> None:
    """Raises SimsdError where so many processes of `cpus` CPUs each, and `readers` of one that read a dataset for them,
    have no room on the cluster: Ray would wait forever."""
    import ray

    needed, there = processes * cpus + readers, int(ray.cluster_resources().get("CPU", 0))
    if needed > there:
        beside = " and one for the tasks that read the dataset" if readers else ""
        raise SimsdError(
            f"{processes} processes of {cpus} CPUs each{beside} need {needed} CPUs, and the Ray cluster has {there}:"
            " have fewer of them"
        )


@contextlib.contextmanager
def configured(rows: object) -> Iterator[None]:
    """Ray Data's `SETTINGS`, for a dataset or, where `rows` is none, for new ones."""
    import ray.data

    context = rows.context if isinstance(rows, ray.data.Dataset) else ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in SETTINGS}
    try:
        for name, value in SETTINGS.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
