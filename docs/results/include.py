"""Copies docs/results/NAME/results.md into the pages that show it.

    python docs/results/include.py

A page marks the place with the comments <!-- results/NAME --> and <!-- end -->; tests/test_docs.py
fails if the text between them differs from results.md.
"""

import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
BLOCK = re.compile(r"<!-- results/(\w+) -->\n(.*?)<!-- end -->\n", re.S)


def fill(page):
    """The page's text with every marked place filled in."""
    return BLOCK.sub(lambda block: f"<!-- results/{block[1]} -->\n"
                     + (RESULTS / block[1] / "results.md").read_text() + "<!-- end -->\n", page)


if __name__ == "__main__":
    for path in sorted(RESULTS.parent.glob("*.md")):
        path.write_text(fill(path.read_text()))
