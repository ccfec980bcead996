"""The loading of the model on a thread, while the socket is already open."""

import threading
import time
from collections.abc import Callable

from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.errors import EngineStopped
from osmium.server.compilers import warm_up

__all__ = ["BackgroundLoader"]


class BackgroundLoader:
    """Loads an engine on its own thread and holds it, or the error that stopped the loading."""

    def __init__(self, load: Callable[[Progress], Engine]) -> None:
        self._load = load
        self.engine: Engine | None = None
        self.failure: BaseException | None = None
        self.progress: tuple[str, int, int] = ("starting", 0, 0)
        self.created = int(time.time())
        self.on_done: Callable[[], None] | None = None
        """Called on the loading thread after the model is loaded or has failed to load."""
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the loading thread; a second call does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="osmium-load", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            engine = self._load(self._report)
            if engine.tokenizer is not None:
                engine.tokenizer.max_token_bytes  # noqa: B018 - slow once, so before any request
            self.engine = engine
        except BaseException as error:  # /health reports it; serve() raises it again
            self.failure = error
        if self.on_done is not None:
            self.on_done()
        if self.engine is not None:
            warm_up(self.engine)  # requests are served meanwhile

    def _report(self, stage: str, done: int, total: int) -> None:
        self.progress = (stage, done, total)

    def ready(self) -> Engine:
        """The engine.  Raises: EngineStopped while it loads, if loading failed, or it stopped."""
        if self.failure is not None:
            raise EngineStopped(f"The model could not be loaded: {self.failure}")
        if self.engine is None:
            stage, done, total = self.progress
            percent = f", {100 * done // total} %" if total else ""
            raise EngineStopped(f"The model is still loading ({stage}{percent}); try again soon.")
        if self.engine.stopped is not None:
            raise EngineStopped(str(self.engine.stopped))
        return self.engine

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
