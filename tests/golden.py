"""Fingerprints of what the scripts compute on digits, to show that a change keeps all bytes.

    python tests/golden.py record before.json      # in the old checkout
    python tests/golden.py compare before.json     # in the new one: exit status 1 if one differs

Every command runs in float32, contiguous, on one thread, with the small networks of this checkout.
The bytes depend on the processor and the version of torch, so nothing of this is committed.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SRC = Path(__file__).resolve().parents[1] / "src"
SGA = ["train_sga.py", "--epochs", "2", "--num_images", "300", "--amp", "off", "--layout",
       "contiguous"]
FREE = ["free_at.py", "--epochs", "4", "--replays", "2", "--num_images", "300", "--amp", "off"]
SHEET = ["fgsm_mnist.py", "--epochs", "2", "--num_images", "300", "--eval_images", "20",
         "--queries", "20"]
STAGE = ["train_gcm.py", "--epochs", "2", "--num_images", "300", "--amp", "off"]
COMMANDS = {  # name of the run's folder: the command
    "sga": SGA, "spgd": [*SGA, "--method", "spgd"], "augment": [*SGA, "--augment"],
    "target": [*SGA, "--target", "3"], "bpda": [*SGA, "--defense", "gcm", "--bpda"],
    "ensemble": [*SGA, "--model_name", "cnn,mlp", "--momentum", "0.9", "--loss", "logit"],
    **{method: [*FREE, "--method", method] for method in ("natural", "free", "pgd", "fast")},
    "free_bn": [*FREE, "--model_name", "cnn_bn", "--guard", "stop", "--schedule", "onecycle"],
    "fgs": [*SHEET, "--train", "fgs"], "noise": [*SHEET, "--train", "noise"],
    "fgs_bn": [*SHEET, "--train", "fgs", "--batch_norm", "--label", "predicted"],
    "stage1": STAGE, "stage2": [*STAGE, "--stage", "2", "--ema", "0.9", "--w_fgsm", "1"],
    "gcm": ["gcm.py", "--num_images", "40", "--model_name", "cnn", "cnn_bn", "--queries", "50",
            "--attacks", "fgsm", "pgd_l1", "pgd_l2", "pgd_linf", "cw_pgd_l2", "pgd_l1_exact",
            "cw_l2", "apgd", "square"],
    "resizepad": ["gcm.py", "--num_images", "30", "--model_name", "cnn", "--defense",
                  "gcm+resizepad", "--draws", "3"],
    "eval_uap": ["eval_uap.py", "--uaps", "sga", "spgd", "augment", "target"],
    "eval_net": ["eval_net.py", "--runs", "natural", "free", "--num_images", "20", "--queries",
                 "20"]}
VARIES = {"seconds", "commit", "device", "torch", "torchvision", "python", "path", "images_per_s",
          "arithmetic"}


def digest(value):
    return hashlib.sha256(value).hexdigest()[:16]


def tensors(value):
    """Names, shapes and bytes of all tensors in a .pth file."""
    if torch.is_tensor(value):
        return f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes()
    return b"".join(name.encode() + tensors(value[name]) for name in sorted(value))


def stripped(value):
    """JSON without the fields that differ between two equal runs."""
    if isinstance(value, dict):
        return {k: stripped(v) for k, v in value.items() if k not in VARIES}
    return [stripped(v) for v in value] if isinstance(value, list) else value


def fingerprints(folder):
    """{file: digest} of the perturbations, networks and tables that the commands write."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(folder / "torch_home")}
    found = {}
    for name, (script, *flags) in COMMANDS.items():
        print(name, flush=True)
        subprocess.run([sys.executable, SRC / script, *flags, "--save", name], cwd=folder, env=env,
                       check=True, stdout=subprocess.DEVNULL)
        for path in sorted((folder / name).rglob("*")):
            key = str(path.relative_to(folder))
            if path.suffix == ".pth" and path.name != "checkpoint.pth":
                found[key] = digest(tensors(torch.load(path, weights_only=True)))
            elif path.name == "results.json":
                found[key] = digest(json.dumps(stripped(json.loads(path.read_text()))).encode())
    return found


def main(action, path):
    with tempfile.TemporaryDirectory() as folder:
        found = fingerprints(Path(folder))
    if action == "record":
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
        return 0
    before = json.loads(Path(path).read_text())
    differ = [key for key in {**before, **found} if before.get(key) != found.get(key)]
    print("\n".join(f"differs: {key}" for key in differ) or f"{len(found)} files are the same")
    return 1 if differ else 0


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "compare"):
        sys.exit("usage: python tests/golden.py record|compare FILE")
    sys.exit(main(*sys.argv[1:]))
