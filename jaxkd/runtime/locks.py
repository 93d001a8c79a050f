"""Locks between the processes of a host, which the kernel frees however a process ends."""

import errno
import fcntl
import os
import sys
from typing import Any

_WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre mounted without flock, NFS without its lock server


def take(file: Any, path: os.PathLike | str, wait: bool = False) -> bool:
    """Lock an open file until it is closed.

    Where a file system has no locks this is said, and the file counts as locked.

    Args:
        file: open, or its descriptor.
        path: its name, for the user.
        wait: until whoever holds it lets it go.

    Returns:
        Whether it is locked: false when another process holds it.

    Raises:
        OSError: it cannot be locked, with its name.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT:
            error.filename = error.filename or os.fspath(path)
            raise
        said = f"jaxkd: {path} is on a file system without locks: see to it that no other command writes there"
        print(said, file=sys.stderr, flush=True)
    return True
