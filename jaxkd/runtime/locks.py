"""File locks between the processes of a host; the kernel releases them however a process ends."""

import errno
import fcntl
import os
import sys
from typing import Any

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre mounted without flock, NFS without lock server


def acquire(file: Any, path: os.PathLike | str, wait: bool = False) -> bool:
    """Lock an open file (or descriptor) exclusively until it is closed; `path` is its name for messages.

    False when another process holds the lock and `wait` is false. True on a file system without locks, with a warning.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            error.filename = error.filename or os.fspath(path)
            raise
        warning = f"jaxkd: {path} is on a file system without locks: make sure that no other command writes there"
        print(warning, file=sys.stderr, flush=True)
    return True
