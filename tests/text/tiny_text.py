"""A package small enough to be made here, the domain inside it, and texts of
one's own.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

import numpy as np

from dmr.text import sources
from dmr.text.sources import Archive, Source


def speech(i: int) -> str:
    words = np.random.default_rng(i).choice(
        ["peace", "trade", "road", "law", "nation", "people", "year", "state"],
        60,
    )
    return f"Speech {i}. " + " ".join(words)


def wheel(folder: Path, name: str = "tiny_text", version: str = "1.0") -> Path:
    info = f"{name}-{version}.dist-info"
    files = {f"{name}/data/{i:03d}.txt": speech(i) for i in range(60)}
    # it must never be
    files[f"{name}/__init__.py"] = "raise SystemExit('imported')"
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion:"
        f" {version}\n"
    )
    files[f"{info}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag:"
        " py3-none-any\n"
    )
    digest = lambda text: (
        base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
        .rstrip(b"=")
        .decode()
    )
    record = "".join(
        f"{path},sha256={digest(text)},{len(text)}\n"
        for path, text in files.items()
    )
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in files.items():
            archive.writestr(zipfile.ZipInfo(member), text)
    return path


def archive_of(path: Path, **changes: object) -> Archive:
    data = path.read_bytes()
    facts = {
        "package": "tiny-text",
        "version": "1.0",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return Archive(**{**facts, **changes})


def source_of(
    archive: Archive, inside: str = r"tiny_text/data/.*\.txt", **changes: object
) -> Source:
    text = "\x1e".join(speech(i) for i in range(60)).encode()
    facts = {
        "name": "tiny",
        "archives": (archive,),
        "inside": inside,
        "extract": sources._files,
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
        "licence": "MIT",
        "text_licence": "none",
        "leak_before": 0.0,
        "leak": 0.0,
    }
    return Source(**{**facts, **changes})


def long_text(seed: int) -> str:
    return "\n".join(speech(1000 * seed + i) for i in range(40))


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            content.encode() if isinstance(content, str) else content
        )
    return folder
