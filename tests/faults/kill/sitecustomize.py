"""Lets a Python process kill itself just before its n-th write.

The harness puts this folder on PYTHONPATH and says by DMR_TEST_KILL which
processes are meant: JSON with `role` (a word of their command line), `n`,
`under` (the folder whose files count) and `once` (a file that is made when
the process is killed, and then no other is). With n = 0 the writes are
counted: one byte for each in `once`.
"""

import json
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
    "Let this process kill itself before write n to a folder; 0: count them."
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


if asked := os.environ.get("DMR_TEST_KILL"):
    how = json.loads(asked)
    if how.pop("role") in " ".join(sys.orig_argv):
        die_at_write(**how)
