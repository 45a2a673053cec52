"""Bad data given to the commands: exit status 2 and one line, before the slow part starts."""

import pytest

NET = ("--model_name", "squeezenet1_1", "--weights", "random", "--attacks", "none")


@pytest.fixture
def bad(tmp_path, picture):
    """A flat folder of three validation images, and label files that do not fit."""
    for i in range(1, 4):
        picture(tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", seed=i)
    for name, labels in (("few", "1 2"), ("high", "1 2 1000"), ("unknown", "1 2 tensh")):
        (tmp_path / f"{name}.txt").write_text("".join(
            f"ILSVRC2012_val_{i:08d}.JPEG {label}\n" for i, label in enumerate(labels.split(), 1)))
    (tmp_path / "other.txt").write_text("cat.JPEG 1\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n")
    (tmp_path / "kit" / "meta.mat").write_bytes(b"MATLAB 5.0 MAT-file, of another year")
    for folder in ("1000", "5"):
        picture(tmp_path / "indices" / folder / "x.png")
    return tmp_path


@pytest.mark.parametrize(("flags", "words"), [
    (("val", "--labels", "few.txt"), ["2 labels for 3 images", "wanted one for each"]),
    (("val", "--labels", "high.txt"), ["class 1000", "0 to 999"]),
    (("val", "--labels", "unknown.txt"), ["'tensh'", "did you mean tench"]),
    (("val", "--labels", "other.txt"), ["no image cat.JPEG"]),
    (("val", "--labels", "binary.txt"), ["not text"]),
    (("val", "--labels", "gone.txt"), ["gone.txt: no such file", "meta.mat"]),
    (("val", "--labels", "kit"), ["meta.mat: not the devkit's mapping of 2012"]),
    (("val",), ["without labels", "--labels FILE"]),
    (("indices", "--classes", "imagenet"), ["class 1000"]),
    (("digits", "--labels", "few.txt"), ["digits has its own labels"])])
def test_unusable_labels_give_one_line(run_here, refused, bad, flags, words):
    refused(run_here("eval_net.py", *NET, "--data_dir", *flags), *words)


def test_a_truncated_shard_gives_one_line(run_here, refused, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "val.parquet"
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": "x"}] * 50, "label": [0] * 50}), path)
    path.write_bytes(path.read_bytes()[:-40])
    refused(run_here("eval_net.py", *NET, "--data_dir", tmp_path), "val.parquet: truncated")
