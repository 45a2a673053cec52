"""Hugging Face's parquet shards: read as the same files would be, a row group at a time."""

import json
import os
import sys

import pytest
import torch

from utils import parquet
from utils.data import batches, imagenet_classes, load, open_images
from utils.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LABELS = [386, 0, 999, 7, 7, 0, 1]


def shard(path, picture, labels, *, names=None, start=0, group=3, columns=("image", "label")):
    """A shard as Hugging Face writes them: image.bytes, image.path, label, names in the metadata.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    images = []
    for i in range(len(labels)):
        file = picture(path.parent / "drawn.png", 50 + i, 40, seed=start + i)
        images.append({"bytes": file.read_bytes(), "path": f"{i}.png"})
        file.unlink()
    table = pa.table({"image": pa.array(images), "label": pa.array(labels, pa.int64())})
    if names:
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table.select(columns), path, row_group_size=group)
    return path


def test_shards_are_read_as_the_same_files_would_be(tmp_path, picture):
    for i, label in enumerate(LABELS):
        picture(tmp_path / "files" / str(label) / f"{i}.png", 50 + i % 4, 40, seed=i)
    shard(tmp_path / "hf" / "data" / "validation-00000-of-00002.parquet", picture, LABELS[:4])
    shard(tmp_path / "hf" / "data" / "validation-00001-of-00002.parquet", picture, LABELS[4:],
          start=4)
    shard(tmp_path / "hf" / "data" / "train-00000-of-00001.parquet", picture, [5], start=9)
    shard(tmp_path / "hf" / "data" / "test-00000-of-00001.parquet", picture, [-1], start=9)
    images = open_images(tmp_path / "hf", split="test")
    assert (images.kind, images.labelled, images.labels.tolist()) == ("imagenet", True, LABELS)
    assert images.names[5] == "validation-00001-of-00002.parquet/1"
    assert open_images(tmp_path / "hf", split="train").labels.tolist() == [5]
    files = open_images(tmp_path / "files", split="test", classes="imagenet")
    for workers in (0, 2):
        read = load(images.prepared(32, None), workers=workers)
        for i, x in enumerate(read.pixels):
            same = files[next(k for k, name in enumerate(files.names)
                              if name.endswith(f"/{i}.png"))]
            assert torch.equal(images[i], same)
            assert torch.equal(x, images.prepared(32, None)[i])


def test_no_more_than_one_row_group_is_in_memory(tmp_path, picture, monkeypatch):
    path = shard(tmp_path / "val.parquet", picture, [0] * 10, group=3)
    read, real = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group",
                        lambda self, i, *args, **more: read.append(i) or real(self, i, *args,
                                                                             **more))
    images = open_images(tmp_path, split="test").prepared(32, None)
    assert read == []  # names and labels only
    found = list(batches(images, 2, workers=0, skipped=[]))
    assert read == [0, 1, 2, 3] and sum(len(x) for _, x in found) == 10
    assert parquet._read_group.cache_info().currsize == 1
    assert len(parquet._read_group(str(path), 3, os.getpid())) == 1


def test_shards_of_other_classes_keep_their_names_unless_they_are_imagenets(tmp_path, picture):
    shard(tmp_path / "train.parquet", picture, [1, 0], names=["beans", "rust"])
    images = open_images(tmp_path, split="test")
    assert (images.kind, images.classes) == ("folder", ("beans", "rust"))
    with pytest.raises(UserError, match="class 0: 'beans' is none of ImageNet's"):
        open_images(tmp_path, split="test", classes="imagenet")


def test_shards_that_name_imagenets_classes_get_imagenets_indices(tmp_path, picture):
    names = ["English springer", "tench", "maillot, tank suit"]
    shard(tmp_path / "train.parquet", picture, [2, 0, 1, -1], names=names)
    images = open_images(tmp_path, split="test", classes="imagenet")
    assert (images.kind, images.labels.tolist()) == ("imagenet", [639, 217, 0, -1])
    assert open_images(tmp_path, split="test").kind == "folder"  # without classes=


def test_a_thousand_names_are_imagenets_only_in_its_order(tmp_path, picture):
    theirs = [name + (", a synonym" if i % 3 else "") for i, name in enumerate(imagenet_classes())]
    theirs[134] = "crane"  # as ImageNet has it, like class 517
    shard(tmp_path / "train.parquet", picture, [134], names=theirs)
    for classes in (None, "imagenet"):
        images = open_images(tmp_path, split="test", classes=classes)
        assert (images.kind, images.labels.tolist()) == ("imagenet", [134])
    shard(tmp_path / "train.parquet", picture, [0], names=imagenet_classes()[::-1])
    assert open_images(tmp_path, split="test").kind == "folder"


def test_shards_of_several_data_sets_or_for_testing_only_are_refused(tmp_path, picture):
    shard(tmp_path / "test-0.parquet", picture, [0, 1], names=["ant", "bee"])
    assert len(open_images(tmp_path, split="test")) == 2
    with pytest.raises(UserError, match="only test shards, such as test-0.parquet"):
        open_images(tmp_path, split="train")
    shard(tmp_path / "test-1.parquet", picture, [0, 1], names=["bee", "cow"])
    with pytest.raises(UserError, match="test-1.parquet: other class names than in test-0"):
        open_images(tmp_path, split="test")


def test_shards_without_labels_are_images_without_labels(tmp_path, picture):
    shard(tmp_path / "test-0.parquet", picture, [-1, -1])
    assert not open_images(tmp_path, split="test").has_labels
    shard(tmp_path / "test-0.parquet", picture, [-1, -1], columns=["image"])
    images = open_images(tmp_path, split="test")
    assert not images.has_labels and len(images) == 2


def test_a_broken_image_in_a_shard_is_skipped_and_named(tmp_path, capsys):
    images = [{"bytes": b"no image", "path": None}, {"bytes": None, "path": "x"}]
    pq.write_table(pa.table({"image": pa.array(images), "label": [0, 1]}), tmp_path / "a.parquet")
    images = open_images(tmp_path, split="test").prepared(32, None)
    with pytest.raises(UserError, match="none of its 2 images"):
        load(images, workers=0)
    assert "a.parquet/0: cannot be decoded" in capsys.readouterr().err


def test_a_truncated_or_foreign_parquet_file_is_refused_by_name(tmp_path, picture):
    path = shard(tmp_path / "a.parquet", picture, [0, 1])
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="a.parquet: truncated, or not a parquet file"):
        open_images(tmp_path, split="test")
    path.write_bytes(whole)
    shard(path, picture, [0, 1000])
    with pytest.raises(UserError, match="label 1000; wanted 0 to 999"):
        open_images(tmp_path, split="test")
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), path)
    with pytest.raises(UserError, match="columns label, text; wanted Hugging Face's image"):
        open_images(tmp_path, split="test")
    pq.write_table(pa.table({"image": ["a.png"], "label": [0]}), path)
    with pytest.raises(UserError, match="wanted Hugging Face's image"):
        open_images(tmp_path, split="test")


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, picture, monkeypatch):
    shard(tmp_path / "a.parquet", picture, [0])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        open_images(tmp_path, split="test")
