"""Fixtures for all tests: scripts run here or in their own process, pictures, ../shared.

The only place that puts src on the path. Small networks are kept in one folder per session, so that
none is trained twice and the user's own cache is left alone.

Markers: `quick` is given to every test that starts no script, trains nothing and needs no
../shared; `planted` to the tests that plant bugs in copies of src.
"""

import gc
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SRC = Path(os.environ.get("SRC_UNDER_TEST", ROOT / "src"))  # test_attack_bugs.py: a copy
sys.path.insert(0, str(SRC))

SLOW = {"run_script", "run_here", "shared"}  # fixtures of tests that are not quick

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers of a session share its folder
    _torch_home = tempfile.TemporaryDirectory(prefix="torch_home_")  # removed when it ends
    os.environ["TORCH_HOME"] = _torch_home.name
os.environ["OMP_NUM_THREADS"] = "1"  # one process per processor; bytes are compared


def pytest_collection_modifyitems(items):
    for item in items:
        if not SLOW & set(item.fixturenames) and not item.get_closest_marker("slow"):
            item.add_marker("quick")


@pytest.fixture
def shared():
    """../shared, which holds photographs and weights that are too large for the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared/data with photographs and weights; the tests on toy networks and "
                    "digits prove the same attacks; docs/results/sample.sh makes the photographs")
    return folder


@pytest.fixture
def run_script(tmp_path):
    """run_script(name, *args): run a script of src/ in its own process, in tmp_path."""
    def run(name, *args, **options):
        return subprocess.run([sys.executable, str(SRC / name), *map(str, args)], cwd=tmp_path,
                              capture_output=True, text=True, timeout=300, check=False, **options)
    return run


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """The same, without the seconds that importing torch costs a new process."""
    from utils.cli import run_script as entry

    def run(name, *args):
        module = importlib.import_module(name.removesuffix(".py"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            entry(module.get_args, module.main)
        except SystemExit as stop:
            code = stop.code or 0
        gc.collect()  # frees the lock on the run's folder, as the end of a process does
        said = capsys.readouterr()
        return subprocess.CompletedProcess([name, *args], code, said.out, said.err)
    return run


@pytest.fixture
def refused():
    """refused(result, *words): exit status 2 and one clear line that contains the words."""
    def check(result, *words):
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        lines = [line for line in result.stderr.splitlines()
                 if line.strip() and not line.startswith("warning:")]
        assert len(lines) == 1, result.stderr
        assert not [word for word in words if str(word) not in lines[0]], lines[0]
        return lines[0]
    return check


@pytest.fixture
def picture():
    """picture(path, width, height, seed): a smooth coloured photograph, as JPEG or PNG."""
    def draw(path, width=40, height=40, seed=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.BICUBIC).save(path, quality=95)
        return path
    return draw
