"""Package metadata, read from settings.ini, its single source; and the
experiments' templates and study files, copied into the wheel.
"""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
package = cfg["lib_path"]
extras = {
    key.removesuffix("_requirements"): cfg[key].split()
    for key in cfg
    if key.endswith("_requirements")
}
# MLflow and trackio ask for older versions of packages that others pin
trackers = {"trackio", "mlflow", "wandb"}
extras["all"] = sorted(
    {need for k, needs in extras.items() if k not in trackers for need in needs}
)
statuses = [
    "1 - Planning",
    "2 - Pre-Alpha",
    "3 - Alpha",
    "4 - Beta",
    "5 - Production/Stable",
]


def experiments(folder=Path("nbs/experiments")):
    "Templates (notebooks without a number, which pages have) and study files."
    templates = (p for p in folder.glob("*.ipynb") if not p.name[0].isdigit())
    return sorted([*templates, *(folder / "studies").glob("*.yaml")])


class BuildWithExperiments(build_py):
    "A wheel carries the experiments; an editable install reads the checkout's."

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return
        for path in experiments():
            target = Path(self.build_lib, package, *path.parts[1:])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    # the verdict and the book are made in a checkout
    packages=find_packages(
        include=[package, f"{package}.*"],
        exclude=[f"{package}.verdict", f"{package}.book"],
    ),
    package_data={package: ["py.typed", "training/general/*"]},
    cmdclass={"build_py": BuildWithExperiments},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{package}={package}._modidx:d"],
    },
    classifiers=[
        f"Development Status :: {statuses[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
