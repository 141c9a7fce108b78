"""What a practitioner does: pip install, and fifteen lines with torch and dmr
only; what an import costs.
"""

import configparser
import email
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from hashlib import sha256
from importlib.metadata import distribution, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dmr.text.archive import cache_folder

ROOT = Path(__file__).parents[1]
SCRIPT = """\
import torch, dmr
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
edit, strength = dmr.Projection(rank=4), dmr.OverlapAware(0.5)
router = dmr.MomentRouter(model, optimizer, edit, "decoupled", strength)
for domain in range(3):
    scale = torch.rand(16, generator=torch.Generator().manual_seed(domain))
    for step in range(50):
        x = torch.randn(64, 16) * scale
        error = model(x) - x.sum(1, keepdim=True) * (domain + 1)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    rank = router.consolidate()["layers"]["0.weight"]["rank"]
    print(domain, f"{error.square().mean().item():.3f}", rank, router.last)
"""


def closure(*names):
    "Distributions, and all that they need, with the extras that are asked for."
    found, todo = set(), [*map(Requirement, names)]
    while todo:
        need = todo.pop()
        name = canonicalize_name(need.name)
        for extra in {(name, extra) for extra in ("", *need.extras)} - found:
            found.add(extra)
            todo += [
                more
                for more in map(Requirement, requires(name) or [])
                if not more.marker or more.marker.evaluate({"extra": extra[1]})
            ]
    return {name for name, _ in found}


@pytest.mark.slow
def test_an_empty_environment_needs_the_core_only(tmp_path):
    """`pip install .` without an index; of this environment's packages the new
    one may use torch, numpy, einops, filelock and what these need.

    pip itself and the build backend are lent as well: they are part of no
    running program.
    """
    assert len(SCRIPT.splitlines()) == 15
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "dmr",
        source / "dmr",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in (
        "settings.ini",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")],
        check=True,
    )
    python = tmp_path / "venv" / "bin" / "python"
    ask = [
        python,
        "-c",
        "import sysconfig; print(sysconfig.get_path('purelib'))",
    ]
    site = Path(
        subprocess.run(
            ask, capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    lent = sysconfig.get_path("purelib")
    (site / "elsewhere.pth").write_text(lent + "\n")
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    # resolves what settings.ini declares
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-build-isolation",
        str(source),
    ]
    done = subprocess.run(
        install, capture_output=True, text=True, cwd=tmp_path, env=clean
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (site / "dmr" / "routing" / "router.py").exists() and (
        site / "dmr" / "py.typed"
    ).exists()
    hidden = (
        "fastcore",
        "nbdev",
        "execnb",
        "IPython",
        "papermill",
        "pandas",
        "matplotlib",
        "seaborn",
        "scipy",
        "tqdm",
        "yaml",
        "nbformat",
    )
    # an import of these raises
    blocker = "import sys\n" + "".join(
        f"sys.modules[{name!r}] = None\n" for name in hidden
    )
    script = tmp_path / "script.py"
    loaded = (
        "files = {m: str(getattr(x, '__file__', '')) for m, x in"
        f" sys.modules.items()}}\nlent = {lent!r}\n"
    )
    loaded += (
        "print(*sorted({m.split('.')[0] for m, file in files.items() if"
        " file.startswith(lent)}))\n"
    )
    script.write_text(blocker + SCRIPT + "print(dmr.__file__)\n" + loaded)
    done = subprocess.run(
        [python, script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # rank 4 a domain, capped at half of fan_in
    assert [line.split()[2] for line in lines[:3]] == ["4", "8", "8"]
    # the installed package, not the working tree
    assert Path(lines[3]).is_relative_to(site)
    assert "'alpha'" in lines[2]
    assert "torch" in lines[4].split()
    owners, needed = (
        packages_distributions(),
        # torch takes opt_einsum up where it finds it
        closure("torch", "numpy", "einops", "filelock") | {"opt-einsum"},
    )
    strangers = {
        m
        for m in lines[4].split()
        if not {canonicalize_name(d) for d in owners.get(m, [])} & needed
    }
    assert not strangers, (
        f"the script loaded {strangers}, which dmr does not declare"
    )


def test_importing_dmr_is_quick_and_brings_no_notebook_tooling():
    """Over torch: `import dmr` alone, and with every name that a routed loop
    uses. Processor time, the better of two runs.
    """
    code = (
        "import sys, time, torch\nbefore, start = set(sys.modules),"
        " time.process_time()\nimport dmr\nalone = time.process_time() -"
        " start\ndmr.MomentRouter, dmr.Projection, dmr.ReplayMix, dmr.Fixed,"
        " dmr.OverlapAware, dmr.inflation\nprint(alone, time.process_time() -"
        " start, *sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    # names load when they are asked for
    assert min(float(run[0]) for run in runs) <= 0.05
    assert min(float(run[1]) for run in runs) <= 0.3
    tooling = set(
        "IPython nbdev fastcore execnb papermill nbformat nbclient"
        " jupyter_client ipykernel matplotlib seaborn pandas transformers"
        " yaml".split()
    )
    assert not tooling & set(runs[0][2:])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The folder of the wheel and the source archive, built from this tree."
    folder = tmp_path_factory.mktemp("built")
    keep = shutil.ignore_patterns(
        ".git",
        ".venv*",
        "_docs",
        "_proc",
        "runs",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
    )
    shutil.copytree(ROOT, folder / "source", ignore=keep)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    done = subprocess.run(
        [*command, folder / "dist", folder / "source"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "dist"


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_should(built):
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    modules = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "dmr").rglob("*.py")
        if not {"book", "verdict", "__pycache__"} & set(p.parts)
    }

    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        metadata = email.message_from_bytes(
            z.read(next(n for n in names if n.endswith("METADATA")))
        )
        entries = z.read(
            next(n for n in names if n.endswith("entry_points.txt"))
        ).decode()
    texts = {f"dmr/{name}" for name in general_texts()}
    assert modules | texts | {"dmr/py.typed"} <= names
    outside = {n.split("/")[0] for n in names} - {"dmr"}
    assert all(n.endswith(".dist-info") for n in outside), (
        f"the wheel carries {outside}"
    )
    assert any("LICENSE" in n for n in names) and "dmr" in entries

    assert (
        metadata["Name"] == "moment-routing"
        and metadata["Requires-Python"] == ">=3.10"
    )
    for field in (
        "Version",
        "Summary",
        "License-Expression" if "License-Expression" in metadata else "License",
        "Keywords",
    ):
        assert metadata[field], f"no {field}"
    assert metadata.get_all("Classifier")
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip()[
        :400
    ] in metadata.get_payload(decode=True).decode()
    core = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(r.split(">")[0].split("[")[0].strip() for r in core) == [
        "einops",
        "filelock",
        "numpy",
        "torch",
    ]

    with tarfile.open(archive) as t:
        inside = {n.split("/", 1)[1] for n in t.getnames() if "/" in n}
    assert (
        modules
        | texts
        | {
            "dmr/py.typed",
            "README.md",
            "LICENSE",
            "settings.ini",
            "setup.py",
            "pyproject.toml",
        }
        <= inside
    )


def experiments():
    "Templates and study files, by their path below nbs/: name -> hash."
    folder = ROOT / "nbs" / "experiments"
    templates = [p for p in folder.glob("*.ipynb") if not p.name[0].isdigit()]
    studies = [*folder.glob("studies/*.yaml")]
    assert len(templates) > 3 and len(studies) > 5
    return {
        p.relative_to(ROOT / "nbs").as_posix(): sha256(p.read_bytes()).digest()
        for p in (*templates, *studies)
    }


def general_texts():
    "Texts that a wheel carries, and their licence, below dmr/: name -> hash."
    folder = ROOT / "dmr" / "training" / "general"
    found = [p for p in folder.iterdir() if p.is_file()]
    assert {"factbook.txt", "LICENCE.md"} <= {p.name for p in found}
    return {
        p.relative_to(ROOT / "dmr").as_posix(): sha256(p.read_bytes()).digest()
        for p in found
    }


def test_the_wheel_carries_experiments_and_texts_as_they_are_here(tmp_path):
    "Built as a wheel is, without its archive: the same files, hash by hash."
    where = ("egg_info", "-e", tmp_path, "build", "-b", tmp_path)
    command = [sys.executable, "setup.py", "-q", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    package = tmp_path / "lib" / "dmr"
    inside = {
        p.relative_to(package).as_posix(): sha256(p.read_bytes()).digest()
        for folder in ("experiments", "training/general")
        for p in (package / folder).rglob("*")
        if p.is_file()
    }
    assert inside == experiments() | general_texts()
    assert not (package / "verdict").exists()
    assert not (package / "book").exists()
    assert not (ROOT / "dmr" / "experiments").exists()  # never committed twice


IMPORT_ALL = """
import sys
from importlib import import_module
for module in sys.argv[1:]:
    try:
        import_module(module)
    except ImportError as error:
        print(module, "|", error)
"""
#: What a module needs beyond torch, numpy and einops.
NEEDS = {
    "dmr.frameworks.trainer": "hf",
    "dmr.frameworks.lightning": "lightning",
}


def distributions_of(extra):
    "What an extra installs, with all that it needs; '': the core."
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini")
    key = f"{extra}_requirements" if extra else "requirements"
    needs = cfg["DEFAULT"][key].split()
    return closure(*needs)


def empty_environment(folder, names):
    """An environment that has these distributions and nothing else: links to
    the files of the present one.
    """
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in names:
        found = distribution(name)
        tops = {f.parts[0] for f in found.files or () if f.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            source, link = Path(found.locate_file(top)), site / top
            if source.exists() and not link.exists():
                link.symlink_to(source)
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", ["", "experiments", "cluster", "hf", "lightning"]
)
def test_every_module_of_the_wheel_imports_or_names_its_extra(extra, tmp_path):
    "In an empty environment with the core and one extra."
    leave_out = shutil.ignore_patterns("__pycache__", "book", "verdict")
    shutil.copytree(ROOT / "dmr", tmp_path / "dmr", ignore=leave_out)
    modules = [
        ".".join(p for p in parts if p != "__init__")
        for path in sorted((tmp_path / "dmr").rglob("*.py"))
        if (parts := path.relative_to(tmp_path).with_suffix("").parts)
        if parts[-1] != "_modidx"
    ]
    assert len(modules) > 40
    names = distributions_of("") | (distributions_of(extra) if extra else set())
    python = empty_environment(tmp_path / "venv", names)
    done = subprocess.run(
        [python, "-c", IMPORT_ALL, *modules],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert set(said) == {m for m, need in NEEDS.items() if need != extra}, said
    for module, message in said.items():
        assert f"pip install 'moment-routing[{NEEDS[module]}]'" in message


def installed(built, tmp_path, *extras):
    "An empty folder, and the command `dmr` of the wheel with these extras."
    names = set().union(*map(distributions_of, ["", *extras]))
    python = empty_environment(tmp_path / "venv", names)
    (wheel,) = built.glob("*.whl")
    home = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    # modules are lent by a path; what nbconvert lays beside them, by its own
    home["JUPYTER_PATH"] = str(Path(sys.prefix) / "share/jupyter")
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    command = [*pip, "-q", "--no-index", "--no-deps", wheel]
    subprocess.run(command, check=True, env=home)
    folder = tmp_path / "empty"
    folder.mkdir()

    def dmr(*argv, code=0):
        done = subprocess.run(
            [python.with_name("dmr"), *argv],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**home, "DMR_CACHE": str(cache_folder())},
        )
        said = done.stdout + done.stderr
        assert done.returncode == code and "Traceback" not in said, said
        return said

    return folder, dmr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_model_is_finetuned_after_a_pip_install(built, tmp_path):
    "In an empty folder, with the extras that the guide names."
    from dmr.training.finetune import save_small_llama

    folder, dmr = installed(built, tmp_path, "experiments", "hf")
    save_small_llama(tmp_path / "tiny", width=32)
    (tmp_path / "new.txt").write_text("Rain falls, the sea stays. " * 200)
    numbers = {"length": 48, "windows": 2, "looks": 2, "keep_tokens": 384}
    more = [x for k, v in numbers.items() for x in ("-p", k, str(v))]
    argv = ("../tiny", "../new.txt", "--keep", "self", "--steps", "3")
    said = dmr("finetune", *argv, *more, "-p", "device", "cpu")
    page = folder / "finetuned/finetune.html"
    assert f"open {page.resolve().as_uri()}" in said.splitlines()
    assert "lost on factbook" in said and page.stat().st_size > 10_000
    assert (folder / "finetuned/model/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_empty_folder_after_a_pip_install(built, tmp_path):
    """With the extra `experiments`, the demonstration is made there; every
    command says what there is, and what needs a checkout.
    """
    folder, dmr = installed(built, tmp_path, "experiments")
    listed = dmr("batch", "--list").splitlines()
    assert {line.split()[0] for line in listed} == {
        Path(name).stem for name in experiments() if "studies/" in name
    }
    assert all(" runs " in line for line in listed), listed
    (n,) = (line.split()[1] for line in listed if line.startswith("demo "))
    for command in ("why", "tail", "report"):
        assert "`dmr run` makes the demonstration" in dmr(command)
    assert not [*folder.iterdir()]  # looking writes nothing
    (said,) = dmr("report", "claims", code=2).splitlines()
    assert "needs a checkout" in said

    tiny = ("steps", "3"), ("domains", '["bible", "jargon"]')
    options = [word for pair in tiny for word in ("-p", *pair)]
    dmr("run", *options, "--quiet")
    (report,) = folder.glob("runs/demo*/report/*.html")
    assert report.stat().st_size > 10_000
    (name,) = (p.name for p in (folder / "runs").glob("demo*"))
    for command in ("why", "report"):
        said = dmr(command)
        assert f"{name}: {n} of {n} done" in said
    run = next((folder / "runs").glob("demo*/*/done.json")).parent.name
    assert f"{run}: ok" in dmr("tail", run)

    (folder / "studies").mkdir()
    mine = "template: {}\nseeds: [0]\n"
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    template = site / "dmr" / "experiments" / "continual_lm.ipynb"
    (folder / "studies" / "mine.yaml").write_text(mine.format(template))
    again = dmr("batch", "--list").splitlines()
    assert again[0].split()[0] == "mine" and again[1:] == listed
