"""The perturbations of imgs/uaps: readable without loss, within their eps, with correct facts."""

import json
import re
from pathlib import Path

import pytest

from utils.run import digest
from utils.uaps import find_uaps, read_uap, rounded

ROOT = Path(__file__).resolve().parents[1]
READY = sorted((ROOT / "imgs" / "uaps").glob("*.png"))
FACTS = {"name", "scale", "shape", "kind", "method", "model_name", "eps", "alpha", "loss", "epochs",
         "batch_size", "momentum", "target", "augment", "seed", "weights", "num_images",
         "images_sha256", "on_training_images", "gradients", "amp", "layout", "commit", "torch"}


def test_each_ready_perturbation_has_its_facts():
    assert len(READY) >= 10
    assert {path.with_suffix("") for path in READY} == {
        path.with_suffix("") for path in (ROOT / "imgs" / "uaps").glob("*.json")}


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_ready_perturbation_matches_its_facts(path):
    facts = json.loads(path.with_suffix(".json").read_text())
    uap = read_uap(path, scale="auto", eps=facts["eps"])
    assert facts.keys() >= FACTS and "data_dir" not in facts
    assert list(uap.delta.shape) == facts["shape"] and facts["scale"] == 1
    assert uap.largest == pytest.approx(255 * facts["eps"], abs=1e-3)  # all of eps, and no more
    assert rounded(uap.delta) is None  # on the grid k/255: nothing is lost in a PNG
    assert uap.delta.unique().numel() > 1 and uap.delta.isfinite().all()
    for found in facts["on_training_images"].values():
        assert found["fooling_ratio"]["n"] == facts["num_images"] - len(facts["skipped"])


@pytest.mark.parametrize("kind", ["imagenet", "digits"])
def test_a_folder_stands_for_its_perturbations_of_the_given_kind(kind):
    found = find_uaps([ROOT / "imgs" / "uaps"], kind)
    assert len(found) >= 2
    assert all(json.loads(p.with_suffix(".json").read_text())["kind"] == kind for p in found)


def test_the_page_gives_the_hash_of_each():
    page = (ROOT / "docs" / "uap.md").read_text()
    for path in READY:
        line = re.search(rf"^\| {path.stem} \|.*$", page, re.M)
        assert line, f"docs/uap.md has no row for {path.stem}"
        assert digest(read_uap(path, scale="auto", eps=1).delta) in line[0]
