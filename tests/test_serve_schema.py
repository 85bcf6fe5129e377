"""Whatever a body is, the server answers as its own schema says, and goes on."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import checks

import simsd
from simsd.serve.app import build_app
from simsd.serve.gate import Settings
from simsd.serve.service import Service

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
# Its URL is where schemathesis asks; the lifespan of the application starts the engine's thread.
SERVICE = Service(simsd.Engine("tiny-target", max_batch=8, max_length=64, max_queue=64))
schema = schemathesis.openapi.from_asgi("/openapi.json", build_app(SERVICE, Settings("tiny-target")))
schema.config.generation.update(modes=list(schemathesis.GenerationMode))

pytestmark = pytest.mark.usefixtures("one_thread")


@schema.parametrize()
@settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
def test_an_answer_is_as_the_schema_says(case):
    case.call_and_validate(checks=CHECKS)
