"""The tree: exports in step with the notebooks, clean notebooks, README from
its notebook, no words that must not be there.
"""

import configparser
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TEXT = {
    ".py",
    ".md",
    ".ipynb",
    ".ini",
    ".toml",
    ".yml",
    ".yaml",
    ".txt",
    ".cff",
    ".css",
    ".js",
    ".csv",
}


def project_files():
    "Files that belong to the project: no built, cached or downloaded ones."
    skip = {
        ".git",
        ".venv",
        ".venv-trackers",
        "_docs",
        "_proc",
        "runs",
        "build",
        "dist",
        "__pycache__",
        "node_modules",
        ".hypothesis",
    }
    for path in sorted(ROOT.rglob("*")):
        built = any(
            p in skip or p.endswith((".egg-info", "_cache", "_checkpoints"))
            for p in path.relative_to(ROOT).parts
        )
        if path.is_file() and not built:
            yield path


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    "A copy of the tree on which nbdev cleaned and exported everything anew."
    copy = tmp_path_factory.mktemp("tree") / "project"
    for path in project_files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for module in (copy / "dmr").rglob("*.py"):
        if module.name not in ("__init__.py", "_modidx.py"):
            module.unlink()
    bin_dir = Path(sys.executable).parent
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run(
            [bin_dir / command], cwd=copy, check=True, capture_output=True
        )
    subprocess.run(
        [sys.executable, "-m", "dmr.book.home", str(copy)],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    return copy


def test_dmr_is_what_the_notebooks_export(rebuilt):
    mine, theirs = (
        {
            p.relative_to(root).as_posix(): p.read_text()
            for p in (root / "dmr").rglob("*.py")
            if "__pycache__" not in p.parts
        }
        for root in (ROOT, rebuilt)
    )
    assert sorted(mine) == sorted(theirs), "run `make export` and commit dmr/"
    stale = [name for name in mine if mine[name] != theirs[name]]
    assert not stale, (
        f"{stale} differ from what the notebooks export: run `make export` and"
        " commit dmr/"
    )


def test_notebooks_are_clean(rebuilt):
    books = [
        p.relative_to(ROOT) for p in project_files() if p.suffix == ".ipynb"
    ]
    dirty = [
        str(p)
        for p in books
        if (ROOT / p).read_text() != (rebuilt / p).read_text()
    ]
    assert not dirty, f"run nbdev_clean on {dirty}"


def test_readme_is_its_notebook(rebuilt):
    assert (ROOT / "README.md").read_text() == (
        rebuilt / "README.md"
    ).read_text(), "run `make export` and commit README.md"
    for figure in re.findall(
        r"\]\((nbs/assets/[\w.-]+)\)", (ROOT / "README.md").read_text()
    ):
        assert (ROOT / figure).read_bytes() == (rebuilt / figure).read_bytes()


def test_no_notebook_holds_an_error_or_lacks_its_opening():
    for path in project_files():
        if path.suffix != ".ipynb":
            continue
        cells = json.loads(path.read_text())["cells"]
        errors = [
            o["ename"]
            for c in cells
            if c["cell_type"] == "code"
            for o in c["outputs"]
            if o.get("output_type") == "error"
        ]
        assert not errors, f"{path.name} was committed with {errors}"
        opening = next(
            "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"
        )
        assert opening.startswith("# ") and "\n> " in opening, (
            f"{path.name} must open with a title and a one-line quote"
        )


def test_words_that_must_not_be_there():
    hosts = [
        "py" + "pi.org",
        "python" + "hosted",
        "npm" + "js",
        "deb." + "debian",
    ]
    folders = ["/" + name + "/" for name in ("work", "farm", "root")]
    unfinished = [
        "Not" + "ImplementedError",
        r"\bTO" + r"DO\b",
        r"\bFIX" + r"ME\b",
        "pip install " + "dmr\\b",
        "assert " + "True\\b",
    ]
    pattern = re.compile(
        "|".join([re.escape(w) for w in hosts + folders] + unfinished)
    )
    found = []
    for path in project_files():
        if path.suffix in TEXT and path.relative_to(ROOT).parts[:2] != (
            "nbs",
            "assets",
        ):
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".ipynb":  # outputs may carry base64 figures
                cells = json.loads(text)["cells"]
                outputs = [o for c in cells for o in c.get("outputs", [])]
                for output in outputs:
                    for kind in [*output.get("data", {})]:
                        if kind.startswith("image/"):
                            del output["data"][kind]
                sources = ["".join(c["source"]) for c in cells]
                text = "\n".join([*sources, json.dumps(outputs)])
            found += [
                f"{path.relative_to(ROOT)}: {m.group(0)}"
                for m in pattern.finditer(text)
            ]
    assert not found, found


def test_spelling(tmp_path):
    """codespell over the prose: markdown cells, exported docstrings and
    comments, README, changelog.
    """
    for path in project_files():
        name = path.relative_to(ROOT)
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":
            cells = json.loads(path.read_text())["cells"]
            prose = "\n\n".join(
                "".join(c["source"])
                for c in cells
                if c["cell_type"] == "markdown"
            )
            copy.with_suffix(".md").write_text(prose)
        elif (
            path.suffix == ".md"
            or name.parts[0] == "dmr"
            and path.suffix == ".py"
        ):
            shutil.copy(path, copy)
    done = subprocess.run(
        [Path(sys.executable).parent / "codespell", "-L", "nd,te,ot,bu", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_no_cell_needs_the_environment_on_the_path():
    """`make test` runs `.venv/bin/nbdev_test` without activating `.venv`:
    programs are started by the interpreter's own path.
    """
    started = re.compile(
        r"""(?:subprocess\.\w+|Popen)\(\s*\[\s*["'](?!git\b|sleep\b)\w|^\s*!(?!=)|^%%(?:bash|sh)\b""",
        re.MULTILINE,
    )
    assert started.search(
        'subprocess.run(["dmr", "run"])'
    ) and not started.search('subprocess.run(["git", "log"])')
    found = []
    for path in project_files():
        if path.suffix == ".ipynb":
            sources = [
                "".join(c["source"])
                for c in json.loads(path.read_text())["cells"]
                if c["cell_type"] == "code"
            ]
            found += [
                f"{path.relative_to(ROOT)}: {m.group(0)}"
                for s in sources
                for m in started.finditer(s)
            ]
    assert not found, found


def test_links_between_notebooks_lead_somewhere():
    """`[text](chapter.ipynb#heading)`: the notebook is there, and so is the
    heading, written as the site writes its anchors.
    """
    link, found, seen = (
        re.compile(r"\]\(([\w./-]+\.ipynb)(?:#([^)\s]+))?\)"),
        [],
        0,
    )
    for path in ROOT.glob("nbs/**/*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            for name, anchor in link.findall(
                "".join(cell["source"])
                if cell["cell_type"] == "markdown"
                else ""
            ):
                target, seen = path.parent / name, seen + 1
                if not target.exists():
                    found.append(f"{path.relative_to(ROOT)}: {name}")
                elif anchor:
                    prose = [
                        "".join(c["source"])
                        for c in json.loads(target.read_text())["cells"]
                        if c["cell_type"] == "markdown"
                    ]
                    titles = re.findall(
                        r"^#+ (.*)$", "\n".join(prose), re.MULTILINE
                    )
                    heads = {
                        re.sub(r"[^\w -]", "", t)
                        .strip()
                        .lower()
                        .replace(" ", "-")
                        for t in titles
                    }
                    if anchor not in heads:
                        found.append(
                            f"{path.relative_to(ROOT)}: {name}#{anchor}; it has"
                            f" {sorted(heads)}"
                        )
    assert seen > 20 and not found, found


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def test_the_pinned_environment_satisfies_what_is_declared():
    "But for trackers, which ask for older versions: `all` is without them."
    cfg = settings()
    trackers = {f"{t}_requirements" for t in ("trackio", "mlflow", "wandb")}
    needs = [
        need
        for key in cfg
        if key.endswith("requirements") and key not in trackers
        for need in cfg[key].split()
    ]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pins = {name.lower().replace("_", "-"): pin for name, pin in pins.items()}
    for need in map(Requirement, needs):
        pin = pins.get(need.name.lower().replace("_", "-"))
        assert pin, f"constraints.txt does not pin {need.name}"
        assert need.specifier.contains(pin), (
            f"constraints.txt pins {need.name}=={pin}, settings.ini asks for"
            f" {need.specifier}"
        )
        installed = version(need.name).split("+")[0]
        assert installed == pin, (
            f"{need.name} {installed} is installed, constraints.txt pins {pin}:"
            " run `make setup`"
        )


def test_one_version_everywhere():
    import dmr

    released = settings()["version"]
    assert dmr.__version__ == released
    assert f"## {released}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {released}" in (ROOT / "CITATION.cff").read_text()


def test_make_help_lists_the_targets():
    out = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for target in (
        "run",
        "test",
        "test-slow",
        "test-trackers",
        "lab",
        "docs",
        "preview",
        "export",
    ):
        assert re.search(rf"make {target} ", out), (
            f"make help does not list {target}"
        )


def test_the_core_imports_without_the_extras():
    "With every extra hidden, `import dmr` and a routed step still work."
    code = """
import sys, torch._dynamo  # torch looks for some of them itself
extras = ('papermill pandas seaborn matplotlib scipy tqdm yaml nbformat nbdev '
          'fastcore IPython').split()
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in extras:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch, dmr
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.AdamW(model.parameters())
router = dmr.MomentRouter(model, optimizer, dmr.Projection(rank=1))
for _ in range(3):
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
router.consolidate()
print(router.summary())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "protected    1" in done.stdout


def test_what_users_call_has_an_example():
    """The public names of `dmr`, and those of the rooms that a reader learns
    from: theory, routing, methods. The parts of the router need none: the step
    and the meters are checked, not called by users.
    """
    import dmr
    from dmr.book.chapters import read_book
    from dmr.book.reference import example_of, public_modules, read_usages

    usages = read_usages(read_book(ROOT / "nbs"))
    parts = ("step", "inflation", "router", "conformance")
    wanted = [
        s
        for name, symbols in public_modules(ROOT).items()
        for s in symbols
        if s.kind != "value"
        if name.split(".")[0] in ("theory", "routing", "methods")
        and name.removeprefix("routing.") not in parts
        or dmr._HOME.get(s.name) == name
    ]
    assert len(wanted) > 100
    missing = [s for s in wanted if example_of(s, usages) is None]
    assert not missing, [f"{s.module}.{s.name}" for s in missing]
