"""A server in a separate process, for tests that send Ctrl-C.

`python -m tests.server.server_process serves|serves_tls|slow|fails|stuck|few_files PORT`
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any, cast

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.errors import CheckpointError, OsmiumError
from osmium.server.app import BackgroundLoader, serve
from osmium.server.tls import tls_context
from tests.server.scripted import ScriptedEngine

CERTIFICATES = Path(__file__).resolve().parent / "certificates"


def load(progress: Progress) -> Engine:
    """By the first argument: a model that loads, loads slowly, or fails to load."""
    print("loading", flush=True)
    if sys.argv[1] == "fails":
        raise CheckpointError("model-00002 is missing")
    if sys.argv[1] == "slow":
        progress("packing", 1, 2)
        time.sleep(60)
    if sys.argv[1] == "stuck":
        return cast(Engine, StuckEngine("the end " * 2000, context=10**6, pace_s=0.005))
    return cast(Engine, ReportingEngine("the end " * 2000, context=10**6, pace_s=0.005))


class ReportingEngine(ScriptedEngine):
    """Prints when it is closed and when a request is cancelled."""

    def close(self) -> None:
        super().close()
        print("closed", flush=True)

    def cancel(self, request: Any) -> None:
        super().cancel(request)
        print("cancelled", flush=True)


class StuckEngine(ScriptedEngine):
    """Is in a step that lasts a minute when it is closed."""

    def close(self) -> None:
        print("closing", flush=True)
        time.sleep(60)


if __name__ == "__main__":
    if sys.argv[1] == "few_files":
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    try:
        tls = None
        if sys.argv[1] == "serves_tls":
            tls = tls_context(str(CERTIFICATES / "server.pem"), str(CERTIFICATES / "server.key"))
        serve(BackgroundLoader(load), port=int(sys.argv[2]), tls=tls)
    except OsmiumError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
