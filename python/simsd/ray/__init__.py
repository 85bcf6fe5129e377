"""More than one process, or machine: `batch` for a data set, `simsd.ray.deployment` for a service. Needs the extra
`ray`."""

from __future__ import annotations

from simsd.ray.job import Report, batch

__all__ = ["Report", "batch"]
