"""Compiled programs: how many a process makes, how many it finds, and where they are kept for the next one."""

from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

_COMPILED = "/jax/core/compile/backend_compile_duration"  # of those from the cache, the time that reading takes
_FOUND = "/jax/compilation_cache/cache_hits"


def keep(directory: Path, platform: str) -> Path | None:
    """Where compiled programs are kept: as JAX is set (JAX_COMPILATION_CACHE_DIR), or else `directory`.

    On a CPU only as JAX is set: its programs are of one processor model, and another one that shared the directory
    could stumble over them.

    Args:
        directory: where a process that is started again would look.
        platform: of the devices.
    """
    known = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if known is not None or platform == "cpu":
        return None if known is None else Path(known)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    compilation_cache.reset_cache()  # it looks at the setting once, at the first program
    return directory


class Tally:
    """Counts this process's programs from now on."""

    def __init__(self) -> None:
        """Begin to listen."""
        self.programs, self.cached, self.seconds = 0, 0, 0.0
        monitoring.register_event_listener(self._event)
        monitoring.register_event_duration_secs_listener(self._duration)

    def _event(self, event: str, **more: Any) -> None:
        self.cached += event == _FOUND

    def _duration(self, event: str, duration_secs: float, **more: str | int) -> None:
        if event == _COMPILED:
            self.programs, self.seconds = self.programs + 1, self.seconds + duration_secs

    def close(self) -> None:
        """Stop listening."""
        monitoring.unregister_event_listener(self._event)
        monitoring.unregister_event_duration_listener(self._duration)
