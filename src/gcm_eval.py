"""What networks that train_gcm.py trained are worth: every augmentation, and runs side by side.

    evaluate   NAME.pth on the test images as they are and under each operation of augment.py
    compare    finished runs in one table, with attack_robustness where gcm.py left it in RUN/gcm
"""

import csv

import torch
from tqdm import tqdm

from augment import OPS
from utils import draw
from utils.data import batches, to_float, unseen
from utils.defenses import defend, describe
from utils.metrics import interval, markdown, percent, share
from utils.models import describe_weights, load_model
from utils.run import (
    UserError,
    finished_run,
    load_json,
    make_generator,
    provenance,
    save_csv,
    save_json,
    write_atomic,
)

EVAL_BATCH = 100


def test_images(data_dir, data_root, eval_images, share_held, num_images, classes):
    """The test images; where there are none, those that the training held out.

    -> images, whether they chose the best epoch. UserError: too few, or of other classes.
    """
    images, chosen_by = unseen(data_dir, data_root, share_held, num_images)
    if list(images.classes) != classes[:len(images.classes)]:
        raise UserError(f"--data_dir {data_dir}: the test images have other classes than "
                        f"the network ({len(images.classes)}, {len(classes)}); wanted the same")
    if eval_images and eval_images > len(images):
        raise UserError(f"--eval_images {eval_images}: {data_dir} has {len(images)}; type "
                        f"--eval_images {len(images)}, or leave it out")
    return images, chosen_by


@torch.no_grad()
def accuracies(model, images, device, *, generator, workers):
    """{operation, "clean" first: how many of how many are right}; every operation on every image.
    """
    right, n = dict.fromkeys(("clean", *OPS), 0), 0
    with tqdm(total=len(images), desc="every augmentation", unit="img", leave=False,
              disable=None) as bar:
        for index, x in batches(images, EVAL_BATCH, workers=workers, skipped=[]):
            x, y = to_float(x.to(device)), images.labels[index].to(device)
            for name in right:
                z = x if name == "clean" else OPS[name](x, generator=generator)
                right[name] += int((model(z).argmax(1) == y).sum())
            n += len(y)
            bar.update(len(y))
    return {name: share(k, n) for name, k in right.items()}


def evaluate(path, folder, *, device, data_dir, data_root, eval_images, seed, workers):
    """The network of NAME.pth behind the defence of its NAME.json; tables into the folder."""
    facts = load_json(path.with_suffix(".json")) if path.with_suffix(".json").is_file() else {}
    if not isinstance(facts, dict) or not {"kind", "head", "classes", "hold_out"} <= set(facts):
        raise UserError(f"--evaluate {path}: no {path.stem}.json beside it that says how it was "
                        "trained; wanted what train_gcm.py writes")
    data_dir = data_dir or facts["data_dir"]
    images, chosen_by = test_images(data_dir, data_root, eval_images, facts["hold_out"],
                                    facts["given_images"], facts["classes"])
    images = images.prepared(facts["image_size"], eval_images)
    generator = make_generator(seed)
    model = defend(load_model(facts["model_name"], weights=str(path), kind=facts["kind"],
                              device=device).to(memory_format=torch.channels_last),
                   facts["defense"], size=facts["image_size"], low=facts["low"],
                   generator=make_generator(seed)).eval()
    found = accuracies(model, images, device, generator=generator, workers=workers)
    settings = {"data": str(data_dir), "n": found["clean"]["n"], "seed": seed,
                "images_sha256": images.sha256(), "chose_the_epoch": chosen_by,
                "network": describe_weights(facts["model_name"], str(path), facts["kind"]),
                **provenance(device)}
    save_json(folder / "results.json", {"settings": settings, "accuracy": found})
    save_csv(folder / "results.csv", [{"corruption": name, "adv_acc": s["value"], "n": s["n"],
                                       "low": s["low"], "high": s["high"]}
                                      for name, s in found.items()])
    text = report(facts, settings, found)
    write_atomic(folder / "results.md", text.encode())
    print(text + f"saved {folder.path}/results.json (.csv, .md)", flush=True)


def corrupted(found):
    """Mean accuracy over the operations, with the interval of all images' looks together."""
    shares = [s for name, s in found.items() if name != "clean"]
    return share(sum(s["k"] for s in shares), sum(s["n"] for s in shares))


def report(facts, settings, found):
    front = describe(facts["defense"], size=facts["image_size"], low=facts["low"])
    told = (" (held out of the training images, and the best epoch was chosen on them)"
            if settings["chose_the_epoch"] else "")
    ordered = sorted((name for name in found if name != "clean"),
                     key=lambda name: found[name]["value"])
    return (f"{facts['name']}, {facts['model_name']} with head {facts['head']}, behind {front}; "
            f"tested on n={settings['n']} of {settings['data']}{told}, list sha256 "
            f"{settings['images_sha256'][:16]}, float32, {settings['device']}, torch "
            f"{settings['torch']}\n\nclean_acc {percent(found['clean'])}; mean over "
            f"{len(ordered)} augmentations {100 * corrupted(found)['value']:.1f} %\n\n"
            + markdown(["augmentation", "accuracy, %"],
                       [[name.replace("_", " "), interval(found[name])] for name in ordered]))


# ---------------------------------------------------------------- comparison

def compare(folders, save=None):
    """The table of some runs on the same test images; a folder also gets it, and a picture."""
    runs, lines, columns = [finished(folder) for folder in folders], [], []
    first = runs[0][1]["settings"]
    for folder, (_, results, _) in zip(folders, runs, strict=True):
        for key in ("images_sha256", "n", "seed"):
            if results["settings"][key] != first[key]:
                raise UserError(f"--compare {folder}: {key} {results['settings'][key]}, in "
                                f"{folders[0]} {first[key]}; wanted runs tested on the same images")
    for _, _, table in runs:
        columns += [name for name in table if name not in columns]
    for folder, (facts, results, table) in zip(folders, runs, strict=True):
        found = results["accuracy"]
        lines.append([folder.name, facts["stage"], facts["defense"], " ".join(facts["augment"]),
                      f"{facts['w_fgsm']:g}", f"{facts['seconds'] / 60:.1f}",
                      interval(found["clean"]), f"{100 * corrupted(found)['value']:.1f}",
                      *(table.get(name, "-") for name in columns)])
    facts = runs[0][0]
    text = (f"{first['data']}, {facts['model_name']} with head {facts['head']}, n={first['n']} "
            f"test images; %, with 95 % Wilson intervals; {first['device']}, torch "
            f"{first['torch']}\n\n"
            + markdown(["run", "stage", "in front", "augmented by", "w_fgsm", "minutes",
                        "clean_acc", f"mean of {len(found) - 1} augmentations", *columns], lines))
    if save:
        save.mkdir(parents=True, exist_ok=True)
        write_atomic(save / "comparison.md", text.encode())
        write_atomic(save / "comparison.png", draw.corruptions({
            folder.name: results["accuracy"]
            for folder, (_, results, _) in zip(folders, runs, strict=True)}))
    return text


def finished(folder):
    """(facts, results, {row of gcm.py's table: worst-case attack_robustness}) of a run folder."""
    facts = finished_run(folder, "best_epoch", "results.json", "train_gcm.py")
    table, path = {}, folder / "gcm" / "results.csv"
    if path.is_file():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row["attack"] == "worst case":
                    label = row["row"].partition(", ")[2].partition(" (")[0] or row["row"]
                    table["AR, " + label] = interval({
                        "value": float(row["attack_robustness"]),
                        **{k: float(row[f"attack_robustness_{k}"]) for k in ("low", "high")}})
    return facts, load_json(folder / "results.json"), table
