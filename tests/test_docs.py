"""README.md and docs/: every table equals its results file, its script accepts every command.

Commands are run as they stand, in a shell whose `python` only records its arguments; the script's
own parser then reads them. Nothing is trained or measured.
"""

import ast
import csv
import importlib
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SRC

DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
FOLDERS = sorted(path for path in RESULTS.iterdir() if path.is_dir())
SCRIPTS = [path for folder in (SRC, ROOT / "benchmarks") for path in sorted(folder.glob("*.py"))
           if "def get_args(" in path.read_text()]
FOREIGN = {"--nproc_per_node"}
BLOCK = re.compile(r"<!-- results/(\w+) -->\n(.*?)<!-- end -->\n", re.S)
INLINE = r"`(?:PYTHONPATH=src )?(?:python )?((?:src|benchmarks)/)?(\w+\.py) (--[^`]*)`"
RECORDER = """#!/bin/sh
case "${1:-}" in -c) exit 0 ;; esac
{ for word in "$@"; do printf '%s\\t' "$word"; done; echo; } >>"$RECORD"
"""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def tables(text):
    """The Markdown tables of a text, each a list of rows, each a list of cells."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
             for line in table.splitlines()] for table in found]


def numbers(text):
    return re.findall(r"\d+(?:\.\d+)?", text)


def data(folder):
    """The rows of all CSV files of a results folder."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="") as file:
            rows += list(csv.reader(file))
    return rows


def fences(page, language):
    """The code blocks of a page, by their language ("" for commands and their output)."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [block for found, block in blocks if found == language]


def prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


# ------------------------------------------------------------------------ size and links

def test_the_readme_has_at_most_250_lines_and_1500_words():
    text = README.read_text()
    assert len(text.splitlines()) <= 250
    assert len(text.split()) <= 1500


def test_an_output_in_the_readme_has_at_most_eight_lines():
    shown = [block for block in fences(README, "") if block.startswith("$ ")]
    assert len(shown) == 2
    assert all(len(block.splitlines()) - 1 <= 8 for block in shown)


def anchors(page):
    """The anchors that GitHub makes from a page's headings."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            goal = (page.parent / path).resolve() if path else page
            assert goal.exists(), target
            assert not anchor or anchor in anchors(goal), target


@each_page
def test_every_path_that_a_page_names_exists(page):
    text = re.sub(r"https?://\S+", "", page.read_text())
    for name in re.findall(r"(?<![\w./-])((?:src|docs|tests|benchmarks|imgs)/[\w./]*\w)", text):
        assert (ROOT / re.sub(r"/NAME\b.*", "", name)).exists(), name


# ------------------------------------------------------------------------ tables and results

@each_page
def test_every_table_on_a_page_equals_its_results_file(page):
    text = page.read_text()
    assert text.count("<!-- results/") == len(BLOCK.findall(text))
    for name, shown in BLOCK.findall(text):
        assert shown == (RESULTS / name / "results.md").read_text(), (
            f"{page.name} does not show {name}/results.md; python docs/results/include.py mends it")


@each_folder
def test_every_results_folder_is_complete_and_shown_under_its_command(folder):
    assert {"run.sh", "results.md", "results.csv"} <= {path.name for path in folder.iterdir()}
    marker = f"<!-- results/{folder.name} -->"
    homes = [page for page in PAGES if marker in page.read_text()]
    assert len(homes) == 1
    before = homes[0].read_text().split(marker)[0]
    assert f"sh docs/results/{folder.name}/run.sh" in before[-200:]


@each_folder
def test_every_row_of_a_published_table_is_in_its_data(folder):
    rows = data(folder)
    for head, rule, *body in tables((folder / "results.md").read_text()):
        assert set(rule) == {"---"}
        for row in [head, *body]:
            assert row in rows, row


@each_folder
def test_rows_left_out_of_a_table_are_all_zero(folder):
    shown = [row for table in tables((folder / "results.md").read_text()) for row in table]
    for row in data(folder):
        if row not in shown and folder.name != "gcm_w":  # checked below, cell by cell
            shares = [cell for cell in row if "%" in cell]
            assert shares, row
            assert all(cell.startswith("0.0 %") for cell in shares), row


def test_the_table_over_w_shows_the_cells_of_its_sweep():
    (head, _, *body), = tables((RESULTS / "gcm_w" / "results.md").read_text())
    with open(RESULTS / "gcm_w" / "results.csv", newline="") as file:
        cells = {(float(row["w"]), row["model"], row["attacker"]): row
                 for row in csv.DictReader(file)}
    for row in body:
        for name, shown in zip(head[1:], row[1:], strict=True):
            model, attacker = name.removesuffix(" (BPDA)").split(", ")
            cell = cells.pop((float(row[0]), model, attacker))
            value, low, high = (f"{100 * float(cell['attack_robustness' + end]):.1f}"
                                for end in ("", "_low", "_high"))
            assert shown == f"{value} ({low}-{high})"
    assert not cells


def test_every_number_in_the_readmes_findings_is_in_a_table():
    found = README.read_text().split("## What we found")[1].split("\n## ")[0]
    known = {folder.name: {number for row in data(folder) for cell in row
                           for number in numbers(cell)} for folder in FOLDERS}
    for part in found.split("\n**[")[1:]:
        page = (ROOT / re.match(r".*?\]\((docs/\w+\.md)\)", part)[1]).read_text()
        shown = [known[name] for name, _ in BLOCK.findall(page)]
        for row in (row for table in tables(part) for row in table[2:]):
            wanted = {number for cell in row[1:] for number in numbers(cell)}
            assert any(wanted <= of_one for of_one in shown), row


# ------------------------------------------------------------------------ commands

@pytest.fixture
def parse(monkeypatch, capsys):
    """parse(path, args): what the script's own parser prints; a parser error fails the test."""
    def run(path, args):
        monkeypatch.syspath_prepend(str(path.parent))
        monkeypatch.setattr(sys, "argv", [path.name, *args])
        capsys.readouterr()
        try:
            importlib.import_module(path.stem).get_args()
        except SystemExit as stop:
            shown = capsys.readouterr()
            assert not stop.code, f"{path.name} {' '.join(args)}: {shown.err}"
            return shown.out
        return ""
    return run


@pytest.fixture
def called(tmp_path):
    """called(commands): the scripts that these lines of sh start, as (path, arguments)."""
    for name in ("src", "docs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "imagenet-sample-images").mkdir()
    for name in ("python", "python3", "torchrun", "git"):
        (tmp_path / "bin" / name).write_text(RECORDER)
        (tmp_path / "bin" / name).chmod(0o755)
    record = tmp_path / "record"
    environment = {name: value for name, value in os.environ.items()
                   if name in ("HOME", "LANG", "TMPDIR")}

    def run(commands):
        record.write_text("")
        done = subprocess.run(
            ["sh", "-eu"], input=commands, cwd=tmp_path, capture_output=True, text=True,
            check=False, env={**environment, "RECORD": str(record),
                              "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
        assert done.returncode == 0, commands + done.stderr
        for line in record.read_text().splitlines():
            words = line.split("\t")[:-1]
            script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if script is not None and "/results/" not in words[script]:
                parts = words[script].split("/")
                yield ROOT / parts[-2] / parts[-1], words[script + 1:]
    return run


@each_folder
def test_every_command_in_run_sh_is_accepted_by_its_script(folder, called, parse):
    commands = list(called(f"sh docs/results/{folder.name}/run.sh\n"))
    assert commands
    for path, args in commands:
        parse(path, args)


@each_page
def test_every_command_on_a_page_is_accepted_by_its_script(page, called, parse):
    for block in fences(page, ""):
        typed = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
        commands = "\n".join(typed or block.splitlines()) + "\n"
        if not commands.startswith("@"):  # a citation
            for path, args in called(commands):
                parse(path, args)
    for folder, name, args in re.findall(INLINE, prose(page)):
        parse(ROOT / (folder or "src/") / name, args.split())


@each_page
def test_every_flag_that_a_page_names_exists(page, parse):
    known = FOREIGN | {"--help"}
    for path in SCRIPTS:
        known |= set(re.findall(r"--\w+", parse(path, ["--help"])))
    assert set(re.findall(r"(?<![\w-])--[a-z]\w*", page.read_text())) <= known


@each_page
def test_every_python_example_imports_what_exists(page):
    for block in fences(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
