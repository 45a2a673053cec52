"""Flat folders of images: where their labels come from, and what is measured without them."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from scipy.io import savemat

from utils.data import open_images, wnids
from utils.errors import UserError
from utils.imagenet import class_index
from utils.run import save_pth

# The devkit has its own order: its first classes are dogs, the first wnid is a fish.
DEVKIT = {1: "n02119789", 2: "n02100735", 3: "n01440764", 4: "n15075141", 5: "n01443537"}
TRUTH = [3, 1, 5, 5, 4, 2]  # ids of the validation images 1 to 6
INDICES = [0, 278, 1, 1, 999, 212]  # of n01440764, n02119789, ..., in the order of the wnids


def val_name(i):
    return f"ILSVRC2012_val_{i:08d}"


def devkit(folder, synsets=DEVKIT, year="ILSVRC2012_ID", truth=TRUTH):
    """Write the two files of the devkit; groups follow the 1000 classes, as in the real one."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*synsets.items(), (1001, "n00001740")]
    kinds = [(year, object), ("WNID", object), ("words", object), ("num_children", object)]
    made = np.zeros(len(rows), dtype=kinds)
    for row, (i, wnid) in zip(made, rows, strict=True):
        row[year], row["WNID"], row["words"] = float(i), wnid, f"class {i}, or {wnid}"
        row["num_children"] = 3.0 if i > 1000 else 0.0
    savemat(folder / "meta.mat", {"synsets": made.reshape(-1, 1)})
    path = folder / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("".join(f"{i}\n" for i in truth))
    return path


def lines(pairs):
    return "".join(f"{name} {label}\n" for name, label in pairs)


@pytest.fixture
def flat(tmp_path, picture):
    """Six validation images in tmp_path/val, as the tar unpacks them."""
    for i in range(1, 7):
        picture(tmp_path / "val" / f"{val_name(i)}.JPEG", seed=i)
    return tmp_path / "val"


def write_val_txt(path):
    path.write_text(lines((f"{val_name(i)}.JPEG", label)
                          for i, label in reversed(list(enumerate(INDICES, 1)))))


def write_synset_labels(path):
    path.write_text("".join(f"{DEVKIT[i]}\n" for i in TRUTH))


def write_kaggle(path):
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for i in (4, 2, 6, 1, 5, 3):
            wnid = DEVKIT[TRUTH[i - 1]]
            rows.writerow([val_name(i), f"{wnid} 85 1 499 272 {wnid} 3 4 5 6 "])


FORMS = {"val.txt": write_val_txt, "LOC_val_solution.csv": write_kaggle,
         "ILSVRC2012_validation_ground_truth.txt": lambda path: devkit(path.parent),
         "imagenet_2012_validation_synset_labels.txt": write_synset_labels}


# ------------------------------------------------------------------------- ground truth

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["val", "."])
def test_every_form_of_the_ground_truth_gives_the_true_indices(flat, tmp_path, form, where):
    FORMS[form](tmp_path / where / form)
    for data_dir in (flat, tmp_path):
        images = open_images(data_dir, split="test")
        assert (images.kind, images.has_labels, images.labelled) == ("imagenet", True, True)
        assert images.labels.tolist() == INDICES
        assert images.names == tuple(f"{val_name(i)}.JPEG" for i in range(1, 7))
        assert images.classes[images.labels[0]] == "tench"
    trained = open_images(flat, split="train")
    assert trained.labels.tolist() == INDICES and trained.root == flat


@pytest.mark.parametrize("form", FORMS)
def test_the_labels_may_be_anywhere_if_their_path_is_given(flat, tmp_path, form):
    (tmp_path / "elsewhere").mkdir()
    FORMS[form](tmp_path / "elsewhere" / form)
    assert not open_images(flat, split="test").has_labels
    for given in (tmp_path / "elsewhere" / form, tmp_path / "elsewhere"):
        images = open_images(flat, split="test", labels=str(given))
        assert images.labels.tolist() == INDICES and images.kind == "imagenet"


def test_the_devkit_is_found_where_it_unpacks_to_and_kaggles_list_four_folders_above(
        flat, tmp_path):
    kaggle = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(flat, kaggle / "val")
    write_kaggle(tmp_path / "LOC_val_solution.csv")
    assert open_images(kaggle / "val", split="test").labels.tolist() == INDICES
    assert open_images(kaggle, split="test").labels.tolist() == INDICES
    (tmp_path / "LOC_val_solution.csv").unlink()
    devkit(tmp_path / "ILSVRC2012_devkit_t12" / "data")
    assert open_images(flat, split="test").labels.tolist() == INDICES


def test_a_part_of_the_validation_images_gets_its_own_labels(flat, tmp_path):
    devkit(tmp_path / "devkit")
    write_val_txt(tmp_path / "val.txt")
    for i in (1, 3, 4):
        (flat / f"{val_name(i)}.JPEG").unlink()
    for labels in (None, tmp_path / "devkit"):
        images = open_images(flat, split="test", labels=labels)
        assert images.labels.tolist() == [INDICES[i - 1] for i in (2, 5, 6)]
    assert torch.equal(open_images(tmp_path, split="test").labels, images.labels)


def test_train_folders_can_stand_beside_a_flat_val(flat, tmp_path, picture):
    picture(tmp_path / "train" / "n01443537" / "n01443537_1.JPEG")
    (tmp_path / "train.txt").write_text("n01443537/n01443537_1.JPEG 1\n")
    devkit(tmp_path)
    assert open_images(tmp_path, split="train").names == ("n01443537/n01443537_1.JPEG",)
    test = open_images(tmp_path, split="test")
    assert test.root == flat and test.labels.tolist() == INDICES


def test_files_named_by_wnid_have_imagenets_classes_if_the_list_agrees(tmp_path, picture):
    names = ["n15075141.JPEG", "n01443537_17.JPEG"]
    for name in names:
        picture(tmp_path / name)
    (tmp_path / "val.txt").write_text(lines(zip(names, (999, 1), strict=True)))
    images = open_images(tmp_path, split="test")
    assert images.kind == "imagenet" and images.labels.tolist() == [1, 999]
    (tmp_path / "val.txt").write_text(lines(zip(names, (1, 0), strict=True)))  # a list of its own
    images = open_images(tmp_path, split="test")
    assert images.kind == "folder" and images.classes == ("0", "1")
    images = open_images(tmp_path, split="test", labels=tmp_path / "val.txt", classes="imagenet")
    assert images.kind == "imagenet" and images.labels.tolist() == [0, 1]


def test_another_picture_beside_the_validation_images_changes_nothing(flat, picture):
    write_val_txt(flat / "val.txt")
    picture(flat / "cover.jpg")
    for split in ("train", "test"):
        images = open_images(flat, split=split)
        assert images.kind == "imagenet" and sorted(images.labels.tolist()) == sorted(INDICES)
        assert "cover.jpg" not in images.names


def test_other_lists_of_validation_images_keep_their_own_classes(flat):
    (flat / "label.txt").write_text(lines((f"{val_name(i)}.JPEG", i % 2) for i in range(1, 7)))
    images = open_images(flat, split="train")
    assert (images.kind, images.classes) == ("folder", ("0", "1"))


# ------------------------------------------------------------------ labels that do not fit

@pytest.mark.parametrize(("text", "words"), [
    (lines((f"{val_name(i)}.JPEG", 3) for i in range(1, 6)), "5 labels for 6 images; 1 have none"),
    (lines([*((f"{val_name(i)}.JPEG", 3) for i in range(1, 7)), ("cat.JPEG", 3)]),
     "no image cat.JPEG"),
    (lines((f"{val_name(i)}.JPEG", 999 + i // 6) for i in range(1, 7)), "class 1000; .* 0 to 999"),
    (lines((f"{val_name(i)}.JPEG", "tensh") for i in range(1, 7)), "'tensh'.*did you mean tench"),
    (lines((f"{val_name(i % 6 + 1)}.JPEG", i) for i in range(7)), "has the labels 0 and 6"),
    ("\n", "0 labels, none for"), ("0.5\n", "'0.5'; wanted one of the devkit's ids"),
    (f"{val_name(1)}.JPEG\n" * 6, "wanted")])
def test_labels_that_do_not_fit_the_images_are_refused(flat, tmp_path, text, words):
    path = tmp_path / "labels.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        open_images(flat, split="test", labels=path)


@pytest.mark.parametrize(("change", "words"), [
    ({"truth": TRUTH[:5]}, "5 labels, none for ILSVRC2012_val_00000006"),
    ({"truth": [*TRUTH[:5], 0]}, "id 0 is not in meta.mat"),
    ({"truth": [*TRUTH[:5], 1001]}, "id 1001 is not in meta.mat"),
    ({"year": "ILSVRC2010_ID"}, "not the devkit's mapping of 2012"),
    ({"synsets": {**DEVKIT, 2: "n02121620"}}, "n02121620 is none of the 1000 of 2012")])
def test_a_devkit_that_does_not_fit_or_is_of_another_year_is_refused(flat, tmp_path, change, words):
    devkit(tmp_path, **change)
    with pytest.raises(UserError, match=words):
        open_images(flat, split="test")


def test_the_devkits_ground_truth_without_its_mapping_is_refused(flat, tmp_path, monkeypatch):
    path = devkit(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(UserError, match="scipy, which is not installed"):
        open_images(flat, split="test")
    (tmp_path / "meta.mat").write_bytes((tmp_path / "meta.mat").read_bytes()[:200])
    monkeypatch.undo()
    with pytest.raises(UserError, match="not the devkit's mapping of 2012"):
        open_images(flat, split="test")
    (tmp_path / "meta.mat").unlink()
    with pytest.raises(UserError, match="meta.mat: no such file"):
        open_images(flat, split="test")
    path.unlink()
    assert not open_images(flat, split="test").has_labels


@pytest.mark.parametrize(("name", "head"), [
    ("val.txt", ""), ("LOC_val_solution.csv", "ImageId,PredictionString\n")])
def test_a_list_may_begin_with_a_byte_order_mark(tmp_path, picture, name, head):
    picture(tmp_path / f"{val_name(1)}.JPEG")
    line = f"{val_name(1)},n02504458 1 2 3 4" if head else f"{val_name(1)}.JPEG 386"
    (tmp_path / name).write_text(f"{head}{line}\n", encoding="utf-8-sig")
    assert open_images(tmp_path, split="test").labels.tolist() == [386]


@pytest.mark.parametrize(("text", "words"), [
    ("ImageId,Label\n", "not Kaggle's list"),
    (f"ImageId,PredictionString\n{val_name(1)},dog 1 2 3 4\n", "line 2"),
    (f"ImageId,PredictionString\n{val_name(1)}\n", "line 2")])
def test_another_csv_is_refused(flat, tmp_path, text, words):
    (tmp_path / "LOC_val_solution.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        open_images(flat, split="test")


def test_labels_are_accepted_only_with_a_flat_folder(flat, tmp_path, picture):
    picture(tmp_path / "sorted" / "n01440764" / "x.JPEG")
    write_val_txt(tmp_path / "val.txt")
    for split in ("train", "test"):
        with pytest.raises(UserError, match="has class folders"):
            open_images(tmp_path / "sorted", split=split, labels=tmp_path / "val.txt")
    with pytest.raises(UserError, match="is an image list, which holds its classes"):
        open_images(tmp_path / "val.txt", split="test", labels=tmp_path / "val.txt")
    with pytest.raises(UserError, match="digits has its own labels"):
        open_images("digits", split="test", labels=tmp_path / "val.txt")
    with pytest.raises(UserError, match="no such file.*LOC_val_solution"):
        open_images(flat, split="test", labels=tmp_path / "gone.txt")


@pytest.mark.parametrize(("name", "index"), [
    ("tench", 0), ("Tench, Tinca tinca", 0), ("crane bird", 134), ("maillot, tank suit", 639),
    ("maillot_tank-suit", 639), ("n01440764", 0), ("999", 999), ("crane", None), ("maillot", None),
    ("cran", None), ("1000", None)])
def test_a_class_is_an_index_a_wnid_or_a_name_and_ambiguous_names_are_refused(name, index):
    if index is None:
        with pytest.raises(UserError, match="^here: "):
            class_index(name, "here")
    else:
        assert class_index(name, "here") == index


# ------------------------------------------------------------------------- without labels

def test_images_without_labels_are_chosen_evenly_from_the_sorted_list(flat, tmp_path, picture):
    images = open_images(flat, split="train")
    assert (images.kind, images.has_labels, images.labelled) == ("imagenet", False, False)
    assert images.prepared(32, 3).names == tuple(f"{val_name(i)}.JPEG" for i in (1, 3, 5))
    assert images.known_classes[0] == "tench"
    for name in ("z.png", "a.png"):
        picture(tmp_path / "own" / name)
    images = open_images(tmp_path / "own", split="test")
    assert (images.kind, images.names, images.has_labels) == ("folder", ("a.png", "z.png"), False)
    assert open_images(tmp_path / "own", split="test", classes="imagenet").kind == "imagenet"


RANDOM = ("--model_name", "squeezenet1_1", "--weights", "random", "--image_size", 64)


def test_fooling_ratios_are_measured_without_labels_and_accuracies_are_not(run_here, flat,
                                                                           tmp_path):
    save_pth(tmp_path / "u.pth", torch.rand(3, 64, 64) * 2e-2)
    done = run_here("eval_uap.py", "--uaps", "u.pth", "--data_dir", flat, *RANDOM, "--workers", 0)
    assert done.returncode == 0, done.stderr
    row, = json.loads((tmp_path / "runs/eval/results.json").read_text())["rows"]
    assert row["n"] == 6 and "fooling_ratio" in row and "clean_acc" not in row
    assert done.stdout.count("no labels: fooling ratios are measured, accuracies are not") == 1


def test_sga_trains_on_a_flat_folder_without_labels(run_here, flat, tmp_path):
    done = run_here("train_sga.py", "--data_dir", flat, *RANDOM, "--epochs", 1, "--iter", 1,
                    "--num_images", 3, "--amp", "off", "--layout", "contiguous", "--save", "run")
    assert done.returncode == 0, done.stderr
    listing = (tmp_path / "run" / "images.txt").read_text()
    assert listing.splitlines()[1:] == [f"{val_name(i)}.JPEG" for i in (1, 3, 5)]


@pytest.mark.parametrize(("script", "flags"), [
    ("gcm.py", RANDOM), ("eval_net.py", RANDOM[:4]), ("free_at.py", RANDOM[:2]),
    ("train_gcm.py", RANDOM[:2])])
def test_scripts_that_need_labels_say_so_in_one_line(run_here, refused, flat, script, flags):
    refused(run_here(script, "--data_dir", flat, *flags), "without labels", "--labels FILE")


# ------------------------------------------------------------- the same table as class folders

def test_a_flat_copy_in_another_order_gives_the_same_table_as_class_folders(run_here, tmp_path,
                                                                            picture):
    """Every count, over all images and over the first image of every second class."""
    drawn = {wnid: label for i, (wnid, label) in enumerate(wnids().items()) if i % 77 == 5}
    (tmp_path / "flat" / "images").mkdir(parents=True)
    order = torch.randperm(2 * len(drawn), generator=torch.Generator().manual_seed(0)).view(-1, 2)
    labels = []
    for (wnid, label), numbers in zip(drawn.items(), order.sort().values.tolist(), strict=True):
        for j, number in enumerate(numbers):
            path = picture(tmp_path / "sorted" / wnid / f"{j}.png", seed=number)
            name = f"{val_name(number + 1)}.png"
            shutil.copy(path, tmp_path / "flat" / "images" / name)
            labels.append((name, label))
    (tmp_path / "flat" / "val.txt").write_text(lines(labels))
    save_pth(tmp_path / "u.pth", signs(64))
    for num in ([], ["--num_images", (len(drawn) + 1) // 2]):
        tables = []
        for data_dir in ("sorted", "flat"):
            done = run_here("eval_uap.py", "--uaps", "u.pth", "--data_dir", data_dir, *RANDOM,
                            "--workers", 0, "--batch_size", 5, *num)
            assert done.returncode == 0, done.stderr
            tables.append(json.loads((tmp_path / "runs/eval/results.json").read_text())["rows"])
        assert tables[0] == tables[1]
        assert tables[0][0]["n"] == (num[1] if num else 2 * len(drawn))
        assert "clean_acc_top5" in tables[0][0]


def signs(size):
    """A perturbation of +-10/255."""
    u = torch.rand(3, size, size, generator=torch.Generator().manual_seed(1))
    return (u - 0.5).sign() * 10 / 255


def test_flat_photographs_give_the_same_table_as_their_class_folders(shared, run_here, tmp_path):
    folder, weights = shared / "data" / "imagenet_sample" / "val", shared / "data" / "weights"
    if not folder.is_dir() or not (weights / "squeezenet1_1.pth").is_file():
        pytest.skip("no photographs, or no weights, in ../shared/data")
    (tmp_path / "flat").mkdir()
    paths = sorted(folder.glob("*/*.JPEG"), key=lambda path: path.parent.name[::-1])[:60]
    for i, path in enumerate(paths, 1):
        (tmp_path / "flat" / f"{val_name(i)}.JPEG").symlink_to(path)
        (tmp_path / "sorted" / path.parent.name).mkdir(parents=True)
        (tmp_path / "sorted" / path.parent.name / path.name).symlink_to(path)
    (tmp_path / "flat" / "val.txt").write_text(lines(
        (f"{val_name(i)}.JPEG", wnids()[path.parent.name]) for i, path in enumerate(paths, 1)))
    save_pth(tmp_path / "u.pth", signs(224))
    tables = []
    for data_dir in ("sorted", "flat"):
        done = run_here("eval_uap.py", "--uaps", "u.pth", "--data_dir", data_dir, "--model_name",
                        "squeezenet1_1", "--weights", weights, "--workers", 0)
        assert done.returncode == 0, done.stderr
        tables.append(json.loads((tmp_path / "runs/eval/results.json").read_text())["rows"])
    assert tables[0] == tables[1] and tables[0][0]["clean_acc"]["value"] > 0.5
