"""JAX's persistent compilation cache: where it is, and how many programs were compiled or read from it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # for a program from the cache, the time to read it
_HIT_EVENT = "/jax/compilation_cache/cache_hits"


def configure(directory: Path, platform: str) -> Path | None:
    """Cache compiled programs in `directory`, unless JAX_COMPILATION_CACHE_DIR is set; returns the directory in use.

    On a CPU only where that variable is set: CPU programs are specific to a processor model, and another machine that
    shares the directory could crash on them.
    """
    configured = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if configured is not None or platform == "cpu":
        return None if configured is None else Path(configured)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    compilation_cache.reset_cache()  # it reads the setting only once, at the first program
    return directory


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Programs are neither stored nor read: XLA stores one for devices that are not attached, and cannot read it."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


class CompileCounter:
    """Counts this process's compiled programs, those that came from the cache, and the seconds of both."""

    def __init__(self) -> None:
        self.programs, self.cached, self.seconds = 0, 0, 0.0
        monitoring.register_event_listener(self._event)
        monitoring.register_event_duration_secs_listener(self._duration)

    def _event(self, event: str, **more: Any) -> None:
        self.cached += event == _HIT_EVENT

    def _duration(self, event: str, duration_secs: float, **more: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.programs, self.seconds = self.programs + 1, self.seconds + duration_secs

    def close(self) -> None:
        monitoring.unregister_event_listener(self._event)
        monitoring.unregister_event_duration_listener(self._duration)
