"""For free_at.py: the held-out images that validate a run, and what the run saves."""

import torch
import torch.nn.functional as F

from utils import draw, run
from utils.attack.chance import Chance
from utils.data import cached, load, to_float, unseen
from utils.errors import UserError
from utils.sources import beside_runs

MOST, SHARE = 500, 10  # --validate: at most this many images, and a tenth of the training images
BLOCK = 50             # images measured at once, fewer where memory runs out


def validation(s, images, team):
    """The images of --validate, in memory; None: there are none, as the first process prints.

    They are the last ones of each class among the images that training does not see, because
    evaluations on a part of those take the first ones.
    """
    number = min(MOST, len(images) // SHARE) if s.validate is None else s.validate
    if not number:
        return None
    try:
        held, _ = unseen(s.data_dir, s.data_root, s.hold_out, s.num_images,
                         s.labels, s.classes_are)
        if not held.has_labels or held.kind != images.kind or (
                list(held.classes) != s.classes[:len(held.classes)]):
            raise UserError("the test images have no labels, or other classes")
        backwards = held.select(list(range(len(held)))[::-1])
        held = load(cached(backwards.prepared(s.image_size, number), s.cache, workers=s.workers),
                    workers=s.workers, aloud=team.first)
    except UserError as error:
        if team.first:
            print(f"no validation: {error}", flush=True)
        return None
    if team.first:
        print(f"validated after each pass on {len(held)} images that training does not see",
              flush=True)
    return held


def measured(model, images, attack, team, device, halves):
    """Mean loss, accuracy and accuracy under attack(model, x, y) of images in memory.

    attack None: the last is the accuracy again. Every process takes blocks of the images; `halves`
    splits them (utils/halving.py) where memory runs out. The model is in eval mode afterwards.
    """
    def counted(index):
        x, y = to_float(images.pixels[index].to(device)), images.labels[index].to(device)
        x_adv = attack(model, x, y, generator=Chance(0, index)) if attack else None
        with torch.no_grad():
            logits = model(x)
            after = model(x_adv) if attack else logits
        return torch.stack([F.cross_entropy(logits, y, reduction="sum"),
                            (logits.argmax(1) == y).sum(), (after.argmax(1) == y).sum()]).cpu()
    sums = torch.zeros(3, dtype=torch.float64)
    model.eval()
    for index in torch.arange(len(images)).split(BLOCK)[team.rank::team.size]:
        sums += halves(counted, torch.add, index)
    return [value / len(images) for value in team.total(sums.tolist())]


def check_same(chosen, held):
    """UserError unless a resumed run is validated on as many images as before, or on none."""
    before = chosen.get("images")  # None: on none
    if held and before and before != len(held):
        raise UserError(f"--validate {len(held)}: this run chose its best network on {before} "
                        f"images; type --validate {before}, or 0 to keep the best one so far")


def finish(training, folder, name):
    """Saves the network and the best one, with their facts, and the curve."""
    s, images, best, rows = training.s, training.images, training.chosen, training.rows
    kept = training.best.get("pass") if training.stopped else None  # its weights, with --guard stop
    own = {"head": "own", "classes": s.classes} if images.kind in ("cifar100", "folder") else {}
    facts = {"name": name, "kind": images.kind, "data_dir": str(s.data_dir), **own,
             "data_root": str(s.data_root), **run.result_flags(s, "classes", "validate"),
             **_taken(rows[:kept]), "guard_stopped": training.stopped,
             "processes": training.team.size,
             "given_images": s.num_images, "num_images": len(images),
             "images_sha256": images.sha256(),
             **run.provenance(training.device, s.deterministic)}
    _save(folder, training.model[1].state_dict(), facts)
    if best["net"]:
        _save(folder, best["net"], facts | _taken(rows[:best["pass"]]) | {
            "name": f"{name}_best", "best_pass": best["pass"], "validated": best["images"],
            "best_score": best["score"]})
    for suffix in () if best["net"] else (".pth", ".json"):  # of a run that was overwritten
        (folder / f"{name}_best{suffix}").unlink(missing_ok=True)
    run.write_atomic(folder / "curve.png", draw.training_curve(
        rows, name, probe_adv_acc="PGD-10, some training images",
        val_acc="held-out images", val_adv_acc="PGD-10, held-out images"))
    print(f"saved {folder / name}.pth; python eval_net.py --runs {folder.path}"
          f"{beside_runs(s.model_name)} attacks it")


def _taken(rows):
    """What the passes in these rows of log.csv took."""
    return {"passes": len(rows), "weight_steps": rows[-1]["weight_steps"],
            "seconds": round(sum(row["seconds"] for row in rows), 3)}


def _save(folder, weights, facts):
    path = folder / f"{facts['name']}.pth"
    run.save_pth(path, {k: v.cpu() for k, v in weights.items()})
    run.save_json(path.with_suffix(".json"), facts)
