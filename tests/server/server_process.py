"""A server in a process of its own, for tests that press Ctrl-C.

`python -m tests.server.server_process serves|slow|fails PORT`
"""

import sys
import time
from typing import Any, cast

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.errors import CheckpointError, OsmiumError
from osmium.server.app import BackgroundLoader, serve
from tests.server.scripted import Scripted


def load(progress: Progress) -> Engine:
    """What the first argument says: a model that is there, is slow to come, or fails."""
    print("loading", flush=True)
    if sys.argv[1] == "fails":
        raise CheckpointError("model-00002 is missing")
    if sys.argv[1] == "slow":
        progress("packing", 1, 2)
        time.sleep(60)
    return cast(Engine, Said("the end " * 2000, context=10**6, pace_s=0.005))


class Said(Scripted):
    """Tells when it is closed."""

    def close(self) -> None:
        super().close()
        print("closed", flush=True)

    def cancel(self, request: Any) -> None:
        super().cancel(request)
        print("cancelled", flush=True)


if __name__ == "__main__":
    try:
        serve(BackgroundLoader(load), port=int(sys.argv[2]))
    except OsmiumError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
