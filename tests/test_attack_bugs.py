"""The attack tests have teeth: each bug of attack_bugs.py, planted in a copy of src, makes the
tests that it names fail; on an unchanged copy they pass.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from attack_bugs import BUGS
from conftest import ROOT, SRC

from utils.run import alone

pytestmark = [pytest.mark.planted, pytest.mark.slow]
WHOLE = "no bug"


def plant(bug, folder):
    """Copy src into `folder` with `bug` as the only change. -> its path"""
    shutil.copytree(SRC, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if bug is not None:
        text = (folder / bug.file).read_text()
        (folder / bug.file).write_text(text.replace(bug.old, bug.new))
    return str(folder)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, testrun_uid):
    """Name of a bug -> exit status and output of its tests; WHOLE -> of all tests, without a bug.

    One process of pytest-xdist runs them, the others wait.
    """
    path = tmp_path_factory.getbasetemp().parent / f"planted_{testrun_uid}.json"
    with alone(path):
        if not path.exists():
            path.write_text(json.dumps(found_out(tmp_path_factory)))
    return json.loads(path.read_text())


def found_out(tmp_path_factory):
    top, tests = tmp_path_factory.mktemp("planted"), [t for bug in BUGS for t in bug.tests]
    jobs = [(plant(None, top / "whole"), sorted(set(tests)), str(top / "whole.log"))]
    jobs += [(plant(bug, top / str(i)), bug.tests, str(top / f"{i}.log"))
             for i, bug in enumerate(BUGS)]
    done = subprocess.run([sys.executable, ROOT / "tests" / "attack_bugs.py"], cwd=ROOT, text=True,
                          input=json.dumps(jobs), env=os.environ | {"OMP_NUM_THREADS": "1"},
                          stdout=subprocess.PIPE, timeout=1200, check=True)
    said = [Path(log).read_text() for _, _, log in jobs]
    return dict(zip([WHOLE, *(bug.name for bug in BUGS)],
                    zip(json.loads(done.stdout), said, strict=True), strict=True))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_planted_bug_is_caught(bug, outcomes):
    assert (SRC / bug.file).read_text().count(bug.old) == 1, f"{bug.old!r} moved: mend the list"
    status, said = outcomes[bug.name]
    assert status == 1, said  # test failures; 2 or 4 mean that tests were not found
    assert not [word for word in ("ImportError", "SyntaxError", "NameError") if word in said], said


def test_the_same_tests_pass_on_a_copy_without_a_bug(outcomes):
    status, said = outcomes[WHOLE]
    assert status == 0, said


def test_bugs_differ_in_name_and_text():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 95
    assert len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)
