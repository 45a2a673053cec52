#!/bin/sh
# Makes sample/train (400 photographs) and sample/val (300), on which most tables were measured.
#   git clone https://github.com/EliSchwartz/imagenet-sample-images
#   sh docs/results/sample.sh imagenet-sample-images
# One ImageNet photograph for each of 700 classes; sample_train.txt and sample_val.txt name them.
# A photograph whose shorter side exceeds 320 pixels is scaled down to 320 (Pillow, Lanczos); all
# are saved as JPEG of quality 92, in class folders named by wnid. The last line of output says
# whether the files are, byte for byte, those that were measured; with another Pillow or libjpeg
# they may differ by a grey level here and there.
set -eu
OUT=${OUT:-sample}           # folder to make
PYTHON=${PYTHON:-python3}    # any with Pillow

if [ $# -ne 1 ] || [ ! -d "$1" ]; then
    echo "error: wanted the folder of the clone; type sh $0 imagenet-sample-images" >&2
    exit 2
fi
exec "$PYTHON" - "$1" "$OUT" "$(dirname "$0")" <<'END'
import hashlib
import sys
from pathlib import Path

from PIL import Image

clone, out, lists = map(Path, sys.argv[1:])
digest = hashlib.sha256()
for split in ("train", "val"):
    names = (lists / f"sample_{split}.txt").read_text().split()
    for name in names:
        if not (clone / name).is_file():
            sys.exit(f"error: {clone / name} is not there; is {clone} the clone?")
        image = Image.open(clone / name).convert("RGB")
        scale = 320 / min(image.size)
        if scale < 1:
            size = [round(side * scale) for side in image.size]
            image = image.resize(size, Image.Resampling.LANCZOS)
        wnid = name.split("_")[0]
        (out / split / wnid).mkdir(parents=True, exist_ok=True)
        path = out / split / wnid / f"{wnid}.JPEG"
        image.save(path, quality=92)
        digest.update(path.read_bytes())
    print(f"{out / split}: {len(names)} photographs")
wanted = "5c262faebd54e99c3a3fe4bb540380c96d428fbc87bfc4faa2cb0636faf47598"
print("the same bytes as the photographs that were measured" if digest.hexdigest() == wanted else
      "not the same bytes as the photographs that were measured: another Pillow or libjpeg")
END
