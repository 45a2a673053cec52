"""Where documents, scripts and code meet: flags exist, are read, and the doors open."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SRC

SCRIPTS = [path for path in sorted(SRC.glob("*.py")) if "get_args()" in path.read_text()]
DOORS = sorted([*SRC.glob("*.sh"), *ROOT.glob("tests/*.sh")])


def flags_of(path):
    return {f"--{name}" for name in re.findall(r'add\("--(\w+)"', path.read_text())}


ALL_FLAGS = set().union(*map(flags_of, [*SCRIPTS, *ROOT.glob("benchmarks/*.py")]))


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOORS, *SRC.glob("**/*.py")],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_every_flag_that_is_written_exists(path):
    foreign = {"--system-site-packages", "--quiet", "--version", "--clear", "--always", "--dirty",
               "--no-deps", "--nproc_per_node"}
    written = set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-[\w-]+)?", path.read_text()))
    assert not written - ALL_FLAGS - foreign - {"--help"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_every_flag_is_read_by_its_script(path):
    read = {node.attr for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)}
    read |= set(re.findall(r'"(\w+)"', path.read_text().split("add = parser")[1]
                           .split("parse_args()")[1]))
    assert not {flag[2:] for flag in flags_of(path)} - read


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_every_flag_has_help(path):
    for call in re.findall(r'add\("--\w+".*?(?=\n    add\(|\n    return)', path.read_text(), re.S):
        assert "help=" in call


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_never_import_each_other(path):
    names = {other.stem for other in SCRIPTS} - {"augment"}  # a library that can draw its own grid
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module not in names
        if isinstance(node, ast.Import):
            assert not names & {alias.name for alias in node.names}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_help_needs_neither_data_nor_network(path, tmp_path):
    done = subprocess.run([sys.executable, str(path), "--help"], cwd=tmp_path, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", DOORS, ids=lambda p: p.name)
def test_shell_scripts_are_posix_sh(path):
    assert subprocess.run(["sh", "-n", str(path)], check=False).returncode == 0
    text = path.read_text()
    assert not re.search(r"\[\[|pipefail|\$\{\w+\[|<<<|\bfunction ", text)
    assert path.name == "env.sh" or "set -eu" in text


def door(name, *args, cwd, **environment):
    return subprocess.run(["sh", str(SRC / name), *args], cwd=cwd, capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHON": sys.executable, **environment})


def test_the_quick_start_makes_a_perturbation_and_its_table(tmp_path):
    made = door("train.sh", "--epochs", "1", "--num_images", "50", "--seed", "3", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "fooling_ratio" in made.stdout
    assert (tmp_path / "runs/digits_sga_cnn/sga_cnn.pth").is_file()
    table = door("gen_sga_eval.sh", cwd=tmp_path, MODELS="cnn mlp")
    assert table.returncode == 0, table.stderr
    assert "| sga_cnn |" in table.stdout
    figure = subprocess.run([sys.executable, str(SRC / "figures.py"), "--out", "a.png"],
                            cwd=tmp_path, capture_output=True, text=True, check=False)
    assert figure.returncode == 0, figure.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_relative_paths_mean_those_of_the_caller(tmp_path, picture):
    picture(tmp_path / "photos" / "n01440764" / "a.jpg")
    made = door("train.sh", "--weights", "random", "--image_size", "64", "--epochs", "1",
                "--uaps_save", "mine", cwd=tmp_path, DATA="photos", MODEL="squeezenet1_1")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "mine" / "sga_squeezenet1_1.pth").is_file()


def test_every_path_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\b((?:src|tests|benchmarks|imgs)/[\w./]+\w)", text):
        assert (ROOT / name).exists(), name


def test_no_file_speaks_of_this_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout to list the files of")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split()
    for name in files:
        if Path(name).suffix in {".py", ".sh", ".md", ".toml", ".txt"}:
            text = (ROOT / name).read_text()
            assert not re.search(r"(?<![\w./])/(?:home|root|work|opt)/\w", text), name
