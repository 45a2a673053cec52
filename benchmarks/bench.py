"""Shared by the benchmarks: flags of a script, ratios of times, a table in three files."""

import statistics
import sys

from utils.report import markdown
from utils.run import save_csv, save_json, write_atomic


def flags_of(script, *words):
    """The arguments that the parser of `script`, a module, returns for these words."""
    kept, sys.argv = sys.argv, [script.__name__, *map(str, words)]
    try:
        return script.get_args()
    finally:
        sys.argv = kept


def times_as_fast(seconds, other):
    """Median over the turns of other / seconds: above 1 if `seconds` are fewer."""
    return statistics.median(b / a for a, b in zip(seconds, other, strict=True))


def show(head, lines, note, results=None, **content):
    """Prints a table with a note under it. results: JSON file for `content`; the table is saved
    beside it as .md and .csv.
    """
    lines = [list(map(str, line)) for line in lines]
    text = markdown(head, lines) + f"\n*{note}*\n"
    print(text, end="")
    if results:
        results.parent.mkdir(parents=True, exist_ok=True)
        rows = [dict(zip(head, line, strict=True)) for line in lines]
        save_csv(results.with_suffix(".csv"), rows)
        write_atomic(results.with_suffix(".md"), text.encode())
        save_json(results, content)
