"""`python -m simsd.evaluate ...`: lm-eval's own command line, with the model `simsd` in it."""

from __future__ import annotations

import os
import sys

from simsd.cli import threads
from simsd.errors import SimsdError, one_line

MISTAKES = (ValueError, TypeError, OSError)  # SimsdErrors are ValueErrors; what lm-eval raises for a mistake


def main() -> int:
    """Runs lm-eval on the process's arguments; returns the exit code.

    What a user can mend is one line and exit code 2, SIMSD_DEBUG=1 shows the traceback.
    """
    threads.start()
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        return _report(f'{one_line(error)}: pip install "simsd-kernels[evaluate]"')
    try:
        import simsd.evaluate.harness  # noqa: F401, registers the model

        cli_evaluate()
    except KeyboardInterrupt:
        return 130
    except MISTAKES as error:
        if os.environ.get("SIMSD_DEBUG", "0") not in ("", "0"):
            raise
        return _report(one_line(error) + ("" if isinstance(error, SimsdError) else " (SIMSD_DEBUG=1 shows where)"))
    return 0


def _report(message: str) -> int:
    print(f"simsd.evaluate: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
