"""What eval_uap.py prints and saves: tables of its rows {uap, target, n, metric: share ...}."""

from statistics import mean, stdev

from utils.report import csv_columns, eps_text, interval, markdown, protocol, with_note
from utils.uaps import rounded

SETTINGS = ("epochs", "amp", "method", "model_name", "weights", "defense", "bpda", "eps", "alpha",
            "loss", "layers", "beta", "batch_size", "minibatch", "iter", "momentum", "target",
            "augment", "images_sha256")
OLDER = {"defense": "none", "bpda": False}  # what the facts of older runs leave out


def report(rows, about, uaps, targets):
    """The Markdown text: protocol, fooling ratios, means over seeds, all figures, one audit line
    for each perturbation. about: the facts of the protocol in results.json.
    """
    text = protocol(stated(about))
    for metric, of in (("fooling_ratio", "all images"), ("targeted_success", "images")):
        if all(metric in row for row in rows):
            text += (f"\n{metric}, % of {of} (95 % Wilson interval)\n\n"
                     + metric_table(rows, [uap.name for uap in uaps], targets, metric))
    groups = same_but_seed(uaps)
    if groups:
        text += ("\nfooling_ratio, %, mean ± standard deviation over seeds\n\n"
                 + seed_table(rows, groups, targets))
    text += "\nAll figures, % (95 % Wilson interval)\n\n" + detail_table(rows) + "\n"
    for uap in uaps:
        resized = any(size != uap.delta.shape[-1] for size in about["sizes"])
        text += check_line(uap, [row for row in rows if row["uap"] == uap.name], resized) + "\n"
    return text


def stated(about):
    """{name: value} that every figure depends on, for the line above the tables."""
    return {
        "data": about["data"], "n": with_note(about["n"], about.get("note")),
        "skipped": len(about["skipped"]) or "",
        "list sha256": about["images_sha256"][:16],
        "networks": ", ".join(f"{name} ({weights})" for name, weights in about["targets"].items()),
        "defence": "" if about["defense"] == "none" else about["defense"],
        "geometry": about["geometry"], "perturbed images": about["clamp"],
        "eps at most": eps_text(about["eps"], "linf"), "precision": about["precision"],
        "device": about["device"], "torch": about["torch"]}


def metric_table(rows, uaps, targets, metric="fooling_ratio"):
    """Markdown: a row for each perturbation, a column for each target, '66.0 (60.5-71.1)'."""
    cells = {(row["uap"], row["target"]): row[metric] for row in rows}
    return markdown(["UAP", *targets], [[u, *(interval(cells[u, t]) for t in targets)]
                                        for u in uaps])


def detail_table(rows):
    """Markdown: a row for each perturbation and target, with all the other figures."""
    apart = ("uap", "target", "n", "fooling_ratio", "dominant_class", "fooling_ratio_rounded")
    metrics = [key for key in dict.fromkeys(key for row in rows for key in row)
               if key not in apart]
    head = ["UAP", "target", *metrics, "most frequent wrong class, % of the fooled"]
    return markdown(head, [[row["uap"], row["target"],
                            *(interval(row[m]) if m in row else "-" for m in metrics),
                            dominant(row["dominant_class"])] for row in rows])


def dominant(found):
    """'4, 93.9': the most frequent wrong class and its share; '-' if nothing is fooled."""
    return f"{found['name']}, {100 * found['value']:.1f}" if found else "-"


def same_but_seed(uaps):
    """{label: perturbations} for those whose facts differ only in the seed, two seeds or more."""
    groups = {}  # {settings: {seed: perturbation}}
    for uap in uaps:
        if {"seed", "name"} <= uap.facts.keys():
            made_by = str([{**OLDER, **uap.facts}.get(key) for key in SETTINGS])
            groups.setdefault(made_by, {})[uap.facts["seed"]] = uap
    groups = [list(group.values()) for group in groups.values() if len(group) > 1]
    firsts = [group[0].facts for group in groups]
    return {_label(facts, [other for other in firsts if other["name"] == facts["name"]]): group
            for facts, group in zip(firsts, groups, strict=True)}


def _label(facts, alike):
    """The name, and the settings in which the groups `alike` of this name differ."""
    differ = [key for key in SETTINGS if len({str(other.get(key)) for other in alike}) > 1]
    return " ".join([facts["name"], *(f"{key}={facts.get(key)}" for key in differ)])


def seed_table(rows, groups, targets):
    """Markdown: mean and standard deviation of the fooling ratio over seeds."""
    cell = {(row["uap"], row["target"]): 100 * row["fooling_ratio"]["value"] for row in rows}
    lines = []
    for label, group in groups.items():
        values = [[cell[uap.name, t] for uap in group] for t in targets]
        lines.append([label, len(group), *(f"{mean(v):.1f} ± {stdev(v):.1f}" for v in values)])
    return markdown(["UAP", "seeds", *targets], lines)


def check_line(uap, rows, resized):
    """One line for checking a perturbation: its size, NaN, and what 8-bit rounding changes."""
    if rounded(uap.delta) is None and not resized:
        rounding = "8-bit rounding changes nothing (it is on the grid k/255)"
    else:
        pairs = [f"{100 * row['fooling_ratio']['value']:.1f} -> "
                 f"{100 * row['fooling_ratio_rounded']['value']:.1f} % on {row['target']}"
                 for row in rows
                 if row["fooling_ratio"]["k"] != row["fooling_ratio_rounded"]["k"]]
        rounding = "8-bit rounding " + ("changes fooling_ratio " + ", ".join(pairs) if pairs
                                        else "changes no fooling_ratio (measured)")
    return (f"{uap.name}: largest |delta| {uap.largest:.2f}/255"
            f"{' (before resizing)' if resized else ''}, 0 NaN of {uap.delta.numel()}, {rounding}")


def flat(row):
    """A row of results.csv: each figure with its n and interval."""
    figures = {key: value for key, value in row.items() if key not in ("uap", "target", "n")}
    most = row["dominant_class"]
    return {"uap": row["uap"], "target": row["target"], "n": row["n"], **csv_columns(figures),
            "dominant_class_name": most and most["name"]}
