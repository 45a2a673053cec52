"""Figures as text, tables as Markdown, the line of facts above a table, AutoAttack's members and
the audit of the attacks below it, columns of results.csv.
"""

from utils.attack.several import flags_of


def percent(s):
    """A share with its interval: '66.0 % (60.5-71.1, n=300)'."""
    return (f"{100 * s['value']:.1f} % ({100 * s['low']:.1f}-{100 * s['high']:.1f}, "
            f"n={s['n']:.6g})")


def interval(s):
    """A share with its interval in a table whose head says %: '66.0 (60.5-71.1)'."""
    return f"{100 * s['value']:.1f} ({100 * s['low']:.1f}-{100 * s['high']:.1f})"


def eps_text(eps, norm):
    """A radius as the papers print it: '8/255' in linf, '8' in the others."""
    return f"{255 * eps:.4g}/255" if norm == "linf" else f"{eps:.4g}"


def markdown(head, rows):
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def protocol(facts):
    """The line above a table, from {name: value}: 'Protocol: data: digits; n: 40; ...'.

    Facts that do not apply, None or '', are left out.
    """
    return "Protocol: " + "; ".join(f"{name}: {value}" for name, value in facts.items()
                                    if value not in (None, "")) + "\n"


def with_note(text, note):
    """'6 (held out of the training images)'; without a note, None or '', the text itself."""
    return f"{text} ({note})" if note else text


def batch_sizes(cells, s):
    """Batch sizes of {key: cell} as text: '50', or '25 and 50' if a run was continued with another.

    Cells that are None are not measured yet, and will have that of the flags s.
    """
    sizes = {s.batch_size if cell is None else cell.get("batch_size") for cell in cells.values()}
    return " and ".join(map(str, sorted(sizes - {None})))


def parts_table(head, cells):
    """The results of AutoAttack's members, and its flags; "" if it was not run.

    cells: [(names, cell)], with a name for each column of `head`.
    """
    lines, flags = [], []
    for names, cell in [one for one in cells if "parts" in one[1]]:
        parts = {name: one for name, one in cell["parts"].items() if isinstance(one, dict)}
        lines += [[*names, name, one["tried"], one["fooled"], one["zero_gradient"],
                   one.get("flat", "-")] for name, one in parts.items()]
        flags += [f"{', '.join(names)}: {line}\n" for line in flags_of(
            parts, cell["parts"]["random"], sum(right > 0 for right in cell["before"]))]
    head = [*head, "attack", "tried", "fooled", "zero gradient", "loss never rose"]
    return ("\nAutoAttack, images\n\n" + markdown(head, lines) + "\n" * bool(flags)
            + "\n".join(flags)) if lines else ""


def audit_line(done):
    """One line for checking what the attacks of these cells returned.

    Older transfers did not count zero gradients.
    """
    largest = max((counts["largest"] / counts["eps"] for counts in done), default=0)
    return (f"\n{len(done)} cells: largest norm {largest:.6f} of its eps, "
            f"{sum(counts['outside'] for counts in done)} images outside the ball or [0, 1], "
            f"{sum(counts.get('zero_gradient', 0) for counts in done)} without any gradient\n")


def csv_columns(figures):
    """{metric: share} -> {metric: value, metric_n: n, metric_low: ..., metric_high: ...}.

    Empty where a share is None.
    """
    return {f"{name}{end}": s and s[key] for name, s in figures.items() for end, key in (
        ("", "value"), ("_n", "n"), ("_low", "low"), ("_high", "high"))}
