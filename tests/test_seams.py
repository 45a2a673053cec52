"""Where scripts, shell scripts and modules meet: flags exist and are read, layers stay apart."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, SRC

COMMANDS = [path for path in sorted(SRC.glob("*.py")) if "get_args()" in path.read_text()]
BENCHMARKS = [path for path in sorted(ROOT.glob("benchmarks/*.py"))
              if "def get_args()" in path.read_text()]
SHELL = [*sorted(SRC.glob("*.sh")), *ROOT.glob("tests/*.sh"), ROOT / ".ci" / "run",
         *ROOT.glob("docs/results/**/*.sh")]
MODULES = sorted(SRC.glob("utils/**/*.py"))
FOREIGN = {"--system-site-packages", "--quiet", "--version", "--clear", "--always", "--dirty",
           "--no-deps", "--nproc_per_node", "--standalone", "--maxprocesses", "--dist", "--help",
           "--durations"}


@cache
def parser_of(path):
    """The parser that a script makes, without running anything."""
    from utils.cli import Parser
    spec = importlib.util.spec_from_file_location(f"seam_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    real, Parser.parse_args = Parser.parse_args, lambda self: self
    try:
        spec.loader.exec_module(module)
        return module.get_args()
    finally:
        Parser.parse_args = real
        sys.path.remove(str(path.parent))


def flags_of(path):
    return {flag for action in parser_of(path)._actions for flag in action.option_strings}


def imports_of(path):
    """[(module, name)] that a file imports from this repository, anywhere in it."""
    ours = {p.stem for p in SRC.glob("*.py")} | {"utils"}
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ours:
            found += [(node.module, alias.name) for alias in node.names]
        if isinstance(node, ast.Import):
            found += [(a.name, a.name) for a in node.names if a.name.split(".")[0] in ours]
    return found


def ids(path):
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


# ------------------------------------------------------------------------------ flags

SETTINGS = {"args", "s", "self.s", "job.s", "settings", "training.s"}  # names that hold them


@pytest.mark.parametrize("path", [*SHELL, *COMMANDS, *MODULES], ids=ids)
def test_every_flag_that_is_named_exists(path):
    there = set().union(*map(flags_of, [*COMMANDS, *BENCHMARKS]))
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-[\w-]+)?", path.read_text()))
    assert not named - there - FOREIGN


@pytest.mark.parametrize("path", COMMANDS, ids=ids)
def test_every_flag_is_read_by_its_script_or_by_a_module_that_it_imports(path):
    modules = {module for module, _ in imports_of(path)} | {
        f"{module}.{name}" for module, name in imports_of(path)}
    files = [SRC / f"{module.replace('.', '/')}.py" for module in sorted(modules)]
    texts = [re.sub(r"def get_args\(\):.*?parse_args\(\)", "", path.read_text(), flags=re.S)]
    texts += [file.read_text() for file in files if file.is_file() and file.stem != "cli"]
    read = {node.attr for text in texts for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in SETTINGS
            } | set(re.findall(r'"(\w+)"', texts[0]))
    assert not {action.dest for action in parser_of(path)._actions} - read - {"help"}


@pytest.mark.parametrize("path", [*COMMANDS, *BENCHMARKS], ids=ids)
def test_every_flag_has_help_and_the_help_can_be_printed(path):
    parser = parser_of(path)
    assert not [action.dest for action in parser._actions if not action.help]
    assert parser.description in " ".join(parser.format_help().split())


@pytest.mark.parametrize("path", COMMANDS, ids=ids)
def test_the_help_shows_defaults_as_they_are_typed_or_in_words(path):
    parser = parser_of(path)
    words = " ".join(parser.format_help().split())
    assert not [one for one in ("None", "default: [", "default: False") if one in words]
    for action in parser._actions:
        if isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
            assert f"(default: {action.default})" in words


@pytest.mark.slow
def test_help_needs_neither_data_nor_a_download(tmp_path):
    done = subprocess.run([sys.executable, str(COMMANDS[0]), "--help"], cwd=tmp_path, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ layers

@pytest.mark.parametrize("path", COMMANDS, ids=ids)
def test_scripts_import_utils_and_attacks_but_never_each_other(path):
    assert not {module for module, _ in imports_of(path)} & {p.stem for p in COMMANDS}


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_utils_import_no_script(path):
    assert {module.split(".")[0] for module, _ in imports_of(path)} <= {"utils"}


@pytest.mark.parametrize("path", COMMANDS, ids=ids)
def test_a_command_is_short_enough_to_be_read_beside_the_paper(path):
    assert len(path.read_text().splitlines()) <= 300
    assert len(imports_of(path)) <= 25


# ------------------------------------------------------------------------ shell scripts

@pytest.mark.parametrize("path", SHELL, ids=ids)
def test_shell_scripts_are_posix_sh(path):
    assert subprocess.run(["sh", "-n", str(path)], check=False).returncode == 0
    text = path.read_text()
    assert not re.search(r"\[\[|pipefail|\$\{\w+\[|<<<|\bfunction ", text)
    assert path.name == "env.sh" or "set -eu" in text


def shell(name, *args, cwd, **environment):
    return subprocess.run(["sh", str(SRC / name), *args], cwd=cwd, capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHON": sys.executable, **environment})


@pytest.mark.parametrize("name", ["train.sh", "train_free.sh", "train_gcm.sh", "gen_sga_eval.sh",
                                  "gen_gcm_eval.sh"])
def test_all_python_commands_of_a_shell_script_run_in_the_given_processes(name, tmp_path):
    python, record = tmp_path / "python", tmp_path / "record"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$@" >>"$RECORD"\n')
    python.chmod(0o755)
    for processes, start in (("3", "-m torch.distributed.run --standalone --nproc_per_node 3 "),
                             ("1", ""), ("", "")):
        record.write_text("")
        done = shell(name, cwd=tmp_path, PYTHON=str(python), RECORD=str(record),
                     PROCESSES=processes)
        assert done.returncode == 0, done.stderr
        lines = record.read_text().splitlines()
        assert lines and all(line.startswith(f"{start}{SRC}") for line in lines)


@pytest.mark.parametrize("script", ["tests/run.sh", ".ci/run"])
def test_a_relative_python_is_relative_to_the_caller(script, tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$0 $*"\n')
    python.chmod(0o755)
    done = shell(ROOT / script, cwd=tmp_path, PYTHON="bin/python")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{python} -m pytest")


FAKE = """#!/bin/sh
echo "$*" >>"$RECORD"
case $* in
*find_spec*) exit 1 ;;
"-m pip --version") [ "$LACKING" = "" ] ;;
"-m ensurepip") [ "$LACKING" != "pip, ensurepip" ] ;;
"-m venv "*) mkdir -p "${0%/*}/../.venv/bin"; cp "$0" "${0%/*}/../.venv/bin/python" ;;
esac
"""


@pytest.mark.parametrize("lacking", [None, "", "pip", "pip, ensurepip"])
def test_an_existing_environment_is_never_wiped(lacking, tmp_path):
    source, base, venv = tmp_path / "src", tmp_path / "bin" / "base", tmp_path / ".venv"
    for folder in (source, base.parent, venv / "bin"):
        folder.mkdir(parents=True)
    shutil.copy(SRC / "env.sh", source)
    (source / "x.sh").write_text('. "$(dirname "$0")/env.sh"\n')
    (tmp_path / "requirements.txt").write_text("")
    for path in (base, venv / "bin" / "python"):
        path.write_text(FAKE)
        path.chmod(0o755)
    if lacking is None:
        shutil.rmtree(venv)
    else:
        (venv / "pyvenv.cfg").write_text("")
        (venv / "mine").write_text("")
    done = shell(source / "x.sh", cwd=tmp_path, PYTHON=str(base), RECORD=str(tmp_path / "record"),
                 LACKING=lacking or "")
    ran = (tmp_path / "record").read_text()
    assert ("-m venv" in ran) == (lacking is None) and "--clear" not in ran
    if lacking == "pip, ensurepip":
        assert done.returncode == 2 and "/.venv has no pip; " in done.stderr.splitlines()[-1]
    else:
        assert done.returncode == 0 and "-m pip install" in ran, done.stderr
    assert lacking is None or (venv / "mine").is_file()


@pytest.mark.slow
def test_the_quick_start_makes_a_perturbation_and_its_table(tmp_path):
    made = shell("train.sh", "--epochs", "1", "--num_images", "50", "--seed", "3", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "fooling_ratio" in made.stdout
    assert (tmp_path / "runs/digits_sga_cnn/sga_cnn.pth").is_file()
    table = shell("gen_sga_eval.sh", cwd=tmp_path, MODELS="cnn mlp")
    assert table.returncode == 0, table.stderr
    assert "| sga_cnn |" in table.stdout
    figure = subprocess.run([sys.executable, str(SRC / "figures.py"), "--uaps", "runs/eval",
                             "--out", "a.png"], cwd=tmp_path, capture_output=True, text=True,
                            check=False)
    assert figure.returncode == 0, figure.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_relative_paths_are_relative_to_the_caller(tmp_path, picture):
    picture(tmp_path / "photos" / "n01440764" / "a.jpg")
    made = shell("train.sh", "--weights", "random", "--image_size", "64", "--epochs", "1",
                 "--save", "mine", cwd=tmp_path, DATA="photos", MODEL="squeezenet1_1")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "mine" / "sga_squeezenet1_1.pth").is_file()


def test_no_file_names_a_path_on_this_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout to list the files of")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split()
    for name in files:
        if Path(name).suffix in {".py", ".sh", ".md", ".toml", ".txt"} and (ROOT / name).exists():
            text = (ROOT / name).read_text()
            assert not re.search(r"(?<![\w./])/(?:home|root|work|opt)/\w", text), name
