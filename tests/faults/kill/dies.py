"A process that kills itself just before its n-th write."

import os
import signal
import sys

WRITES = os.O_WRONLY | os.O_RDWR


def _is_write(event, args, under: str) -> bool:
    if event == "open":
        if not (args[2] or 0) & WRITES:
            return False
    elif event not in ("os.rename", "os.remove", "os.mkdir"):
        return False
    path = args[0]
    path = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
    return path.startswith(under)


def die_at_write(n: int, under: str, once: str) -> None:
    """Let this process kill itself before write n to files under a folder;
    the file `once` is made then, and where it is there already nothing
    happens. With n = 0 the writes are counted: a byte for each in `once`.
    """
    seen = 0

    def watch(event, args):
        nonlocal seen
        if not _is_write(event, args, under):
            return
        seen += 1
        if n == 0:
            fd = os.open(once, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, b".")
            os.close(fd)
        elif seen == n:
            try:
                os.close(os.open(once, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
