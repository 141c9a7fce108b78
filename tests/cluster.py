"""A dask cluster of a few processes, whose links can be cut."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from tiny import wait_for


class Link:
    "A port that hands on to another one; it can be cut, or hang."

    def __init__(self, target: str):
        self.target = target.removeprefix("tcp://").rsplit(":", 1)
        self.ends: list[socket.socket] = []
        self.lock, self.flows = threading.Lock(), threading.Event()
        self.flows.set()
        self.refuses = self.closed = False
        self.port = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.port.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.closed:
            try:
                near, _ = self.port.accept()
                if self.refuses:
                    near.close()
                    continue
                host, port = self.target
                far = socket.create_connection((host, int(port)), 5)
                far.settimeout(None)
            except OSError:
                continue
            with self.lock:
                self.ends += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(
                    target=self._hand_on, args=pair, daemon=True
                ).start()

    def _hand_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.flows.wait()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        "End what is open, and let nothing new through."
        self.refuses = True
        with self.lock:
            ends, self.ends = self.ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def mend(self) -> None:
        self.refuses = False
        self.flows.set()

    def close(self) -> None:
        self.closed = True
        self.cut()
        self.flows.set()
        with contextlib.suppress(OSError):
            self.port.shutdown(socket.SHUT_RDWR)
        self.port.close()


class Cluster:
    "A scheduler, two workers, and the links to the scheduler."

    def __init__(self, folder: Path, env: dict[str, str]):
        self.folder, self.env = folder, {**os.environ, **env}
        folder.mkdir(parents=True)
        self.parts: list[subprocess.Popen] = []
        self.links: list[Link] = []
        file = folder / "scheduler.json"
        where = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        self.scheduler = self._start(
            "dask_scheduler", *where, "--scheduler-file", str(file)
        )
        wait_for(lambda: file.exists() and file.stat().st_size)
        self.tcp = json.loads(file.read_text())["address"]
        self.driver_link = self._link()
        self.worker_links = [self._link() for _ in range(2)]
        plain = ("--nthreads", "1", "--no-nanny", "--no-dashboard")
        self.workers = [
            self._start(
                "dask_worker",
                link.address,
                *plain,
                *("--local-directory", str(folder / f"worker{i}")),
            )
            for i, link in enumerate(self.worker_links)
        ]

    def _link(self) -> Link:
        self.links.append(made := Link(self.tcp))
        return made

    def _start(self, name: str, *argv: str) -> subprocess.Popen:
        with open(self.folder / f"{name}{len(self.parts)}.log", "wb") as log:
            made = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{name}", *argv],
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.parts.append(made)
        return made

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_) -> None:
        for part in self.parts:
            part.kill()
            part.wait()
        for link in self.links:
            link.close()
