"""What a practitioner does: pip install, and fifteen lines with torch and dmr only."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """\
import torch, dmr
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
router = dmr.MomentRouter(model, optimizer, dmr.Projection(rank=4), "decoupled", dmr.OverlapAware(0.5))
for domain in range(3):
    torch.manual_seed(domain)
    scale = torch.rand(16)
    for step in range(50):
        x = torch.randn(64, 16) * scale
        loss = (model(x) - x.sum(1, keepdim=True) * (domain + 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = router.consolidate()
    print(domain, f"{loss.item():.3f}", report["layers"]["0.weight"]["rank"], router.last)
"""


@pytest.mark.slow
def test_an_empty_environment_needs_torch_numpy_and_einops_only(tmp_path):
    """The wheel is built and installed without dependencies; of this environment's packages the new one sees torch's own alone."""
    assert len(SCRIPT.splitlines()) == 15
    source = tmp_path / "source"
    shutil.copytree(ROOT / "dmr", source / "dmr", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site), str(source)]
    subprocess.run(install, check=True, cwd=tmp_path)
    assert (site / "dmr" / "routing.py").exists() and (site / "dmr" / "py.typed").exists()
    hidden = ("fastcore", "nbdev", "execnb", "IPython", "papermill", "pandas", "matplotlib", "seaborn", "scipy", "tqdm", "yaml", "nbformat")
    blocker = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in hidden)  # an import of these raises
    (site / "elsewhere.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and what torch itself needs
    script = tmp_path / "script.py"
    script.write_text(blocker + SCRIPT + "print(dmr.__file__)\n")
    done = subprocess.run([python, script], capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[2] for line in lines[:3]] == ["4", "8", "8"]  # rank 4 a domain, capped at half of fan_in
    assert Path(lines[3]).is_relative_to(site)  # the installed package, not the working tree
    assert "'alpha'" in lines[2]
