"""docs/tour.ipynb runs from its first cell to its last, and its outputs match its text.

It uses the small networks that other tests have trained, from the session's folder.
"""

import re

import pytest
from conftest import ROOT, SRC

nbformat = pytest.importorskip("nbformat")
TOUR = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
CODE = [cell for cell in TOUR.cells if cell.cell_type == "code"]


has_outputs = pytest.mark.skipif(
    not any(cell.outputs for cell in CODE), reason="docs/tour.ipynb was saved without its outputs; "
    "jupyter execute --inplace docs/tour.ipynb writes them")


def printed(cells):
    return "".join(out.text for cell in cells for out in cell.outputs
                   if out.output_type == "stream").replace("\r\n", "\n")  # of a terminal


def pictures(cells):
    return [out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})]


def figures(text):
    """{attacker: attack_robustness in %}"""
    return {name: float(value) for name, value in re.findall(
        r"PGD-20, (\w+) attacker: attack_robustness ([\d.]+)%", text)}


def says_what_the_text_says(cells):
    text = printed(cells)
    assert "error: " not in text and "| sga_cnn |" in text
    changed, = re.findall(r"class changed: ([\d.]+)% of 355", text)
    assert float(changed) > 40
    found = figures(text)
    assert found["naive"] > 95 and found["adaptive"] < 5
    assert "\ngradient masking\n" in text and "predictions that the defence changes: 0 of" in text
    head, *lines = (row.split(" | ") for row in re.findall(
        r"^\| ((?:training|natural|free4) \| .*) \|$", text, re.M))
    worst = {row[0]: float(row[head.index("worst case")].split(" ")[0]) for row in lines}
    assert worst["free4"] > 1.5 * worst["natural"] > 0
    assert len(pictures(cells)) == 2


@has_outputs
def test_the_committed_outputs_match_the_text():
    says_what_the_text_says(CODE)


@has_outputs
def test_the_committed_outputs_were_run_in_order_without_an_error_and_name_no_machine():
    assert all(out.output_type != "error" for cell in CODE for out in cell.outputs)
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    text = (ROOT / "docs" / "tour.ipynb").read_text()
    assert not re.search(r"(?<![\w./])/(?:home|root|work|opt|tmp)/\w", text)
    assert len(text) < 500_000


def test_the_tour_calls_src_and_copies_nothing_from_it():
    assert "Colab" in TOUR.cells[0].source and "git clone" in TOUR.cells[1].source
    code = "\n".join(cell.source for cell in CODE)
    assert not re.search(r"^\s*(?:def|class) ", code, re.M)
    assert len(re.findall(r"^!\{sys\.executable\} \{SRC\}/\w+\.py ", code, re.M)) == 5


@pytest.mark.slow
def test_the_whole_tour_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    (tmp_path / "src").symlink_to(SRC)
    tour = nbformat.from_dict(TOUR)
    nbclient.NotebookClient(tour, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}}).execute()
    says_what_the_text_says([cell for cell in tour.cells if cell.cell_type == "code"])
