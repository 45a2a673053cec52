"""Bad input to train_sga.py: exit status 2 and one line that says what to type, no traceback."""

import os

import pytest
import torch
from PIL import Image

from utils.nets import build_small
from utils.run import save_pth

SCRIPT = "train_sga.py"
QUICK = ("--epochs", 1, "--num_images", 20, "--weights", "random", "--amp", "off", "--layout",
         "contiguous")

WRONG = {  # name: (arguments, words of the line)
    "missing folder": (["--data_dir", "nowhere"], ["nowhere", "no such folder", "digits"]),
    "missing path": (["--data_dir", "/no/such/place"], ["/no/such/place"]),
    "a file": (["--data_dir", "file.txt"], ["file.txt"]),
    "empty folder": (["--data_dir", "empty"], ["empty", "no images", "class folders"]),
    "no images": (["--data_dir", "texts"], ["texts", "no images"]),
    "all corrupt": (["--data_dir", "corrupt", "--model_name", "squeezenet1_1"],
                    ["corrupt", "none of its 1 images"]),
    "unknown data": (["--data_dir", "digit"], ["digit", "did you mean digits?"]),
    "unknown model": (["--model_name", "cnn_bnn"], ["cnn_bnn", "did you mean cnn_bn?"]),
    "one unknown": (["--model_name", "cnn,rezet_small"], ["did you mean resnet_small?"]),
    "other kind": (["--model_name", "vgg16"], ["vgg16", "digits", "vgg_small"]),
    "other architecture": (["--model_name", "mlp", "--weights", "cnn.pth"],
                           ["cnn.pth", "not the weights of mlp", "--model_name"]),
    "pickle": (["--weights", "bomb.pth"], ["bomb.pth", "not executed"]),
    "missing weights": (["--weights", "none.pth"], ["none.pth", "no file"]),
    "NaN weights": (["--weights", "nan.pth"], ["not finite"]),
    "no V2": (["--weights", "V2"], ["V2", "cnn"]),
    "no V2 of torchvision's": (["--data_dir", "good", "--model_name", "squeezenet1_1",
                                "--weights", "V2"], ["V2", "squeezenet1_1"]),
    "too many weights": (["--weights", "V1,random"], ["--weights", "2 given for 1"]),
    "sizes differ": (["--data_dir", "good", "--model_name", "vgg16,resnet18", "--weights",
                      "random,ours.pth"], ["[96, 224]", "--image_size"]),
    "other size": (["--image_size", 32], ["--image_size 32", "28"]),
    "eps": (["--eps", 10], ["--eps", "10/255"]),
    "alpha": (["--alpha", 10], ["--alpha", "10/255", "calls alpha is eps"]),
    "eps 0": (["--eps", 0], ["--eps"]),
    "eps below 0": (["--eps=-1/255"], ["--eps"]),
    "eps no number": (["--eps", "ten"], ["--eps", "10/255"]),
    "eps over 0": (["--eps", "1/0"], ["--eps"]),
    "minibatch": (["--minibatch", 11, "--batch_size", 10], ["--minibatch 11", "--batch_size 10"]),
    "minibatch of spgd": (["--method", "spgd", "--minibatch", 10],
                          ["--method spgd --minibatch 10", "leave --minibatch out"]),
    "iter of adam": (["--method", "adam", "--iter", 4],
                     ["--method adam --iter 4", "leave --iter out"]),
    "dm on two networks": (["--method", "dm", "--model_name", "mlp,cnn"],
                           ["--method dm --model_name mlp,cnn", "type one of them"]),
    "dm without labels": (["--method", "dm", "--loss", "cosine"],
                          ["--method dm --loss cosine", "type --loss ce"]),
    "dm towards a class": (["--method", "dm", "--target", 3], ["--method dm --target 3"]),
    "dm against a defence": (["--method", "dm", "--defense", "gcm"],
                             ["--method dm --defense gcm", "type --defense none"]),
    "dm with momentum": (["--method", "dm", "--momentum", 0.9], ["--method dm --momentum 0.9"]),
    "no images wanted": (["--num_images", 0], ["--num_images", "at least 1"]),
    "target": (["--target", 10], ["--target 10", "0 to 9"]),
    "targets": (["--target", "3,10"], ["--target 10", "0 to 9"]),
    "target twice": (["--target", "3,3"], ["--target", "twice"]),
    "surrogate twice": (["--model_name", "mlp", "mlp"], ["--model_name", "mlp twice"]),
    "target below 0": (["--target", -1], ["--target"]),
    "target of a loss without": (["--target", 3, "--preset", "transfer"],
                                 ["--target 3", "--loss feature", "--loss ce"]),
    "layer of the logits": (["--layer", "0", "--loss", "cosine"], ["--layer 0", "--loss feature"]),
    "no such layer": (["--layer", "features", "--loss", "feature"],
                      ["--layer features", "wanted one of 0, 1, 2"]),
    "layers for one": (["--layer", "0,1", "--loss", "feature"], ["--layer 0,1", "2 for 1"]),
    "no feature map": (["--model_name", "mlp", "--loss", "feature"],
                       ["no feature map", "--layer NAME", "--loss cosine"]),
    "no feature map of one": (["--model_name", "cnn,mlp", "--loss", "feature"],
                              ["mlp has no feature map"]),
    "no such layer of one": (["--model_name", "cnn,mlp", "--loss", "feature", "--layer", "0,9"],
                             ["--layer 9", "of mlp"]),
    "preset": (["--preset", "transfers"], ["--preset", "transfer"]),
    "epochs": (["--epochs", 0], ["--epochs"]),
    "iter": (["--iter", "4.5"], ["--iter"]),
    "seed": (["--seed", -1], ["--seed"]),
    "seed too large": (["--seed", 10 ** 20], ["--seed"]),
    "momentum": (["--momentum", "nan"], ["--momentum"]),
    "method": (["--method", "pgd"], ["--method", "spgd"]),
    "not writable": (["--save", "file.txt/run"], ["file.txt/run", "cannot write there"]),
    "a file as folder": (["--uaps_save", "file.txt"], ["file.txt", "cannot write there"]),
    "no such flag": (["--epoch_size", 3], ["--epoch_size"]),
}
BY_PROCESS = ("alpha", "not writable")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def make_files(top):
    """Write the files that the wrong arguments name into this folder."""
    for folder in ("empty", "texts/class", "corrupt/class", "good/class"):
        (top / folder).mkdir(parents=True)
    (top / "file.txt").write_text("")
    (top / "texts" / "class" / "a.txt").write_text("")
    (top / "corrupt" / "class" / "a.jpg").write_text("")
    Image.effect_noise((40, 40), 80).convert("RGB").save(top / "good" / "class" / "a.jpg")
    save_pth(top / "cnn.pth", build_small("cnn", 1, 28).state_dict())
    save_pth(top / "nan.pth", {name: value * float("nan") for name, value in
                               build_small("cnn", 1, 28).state_dict().items()})
    torch.save({"weight": Bomb()}, top / "bomb.pth")
    save_pth(top / "ours.pth", {})
    (top / "ours.json").write_text(  # as after training at that size
        '{"image_size": 96, "head": "own", "classes": ["class"]}')


@pytest.fixture
def here(tmp_path):
    make_files(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_gives_one_clear_line_and_exit_status_2(case, here, run_here, refused):
    args, words = WRONG[case]
    refused(run_here(SCRIPT, *QUICK, *args), *words)
    assert not (here / "ran").exists()
    assert not list(here.rglob("sga_*"))  # and no checkpoint, unless it got as far as the gradients
    assert case == "NaN weights" or not list(here.rglob("checkpoint.pth"))


@pytest.mark.parametrize("case", BY_PROCESS)
def test_bad_input_gives_the_same_line_in_a_separate_process(case, here, run_script, refused):
    args, words = WRONG[case]
    refused(run_script(SCRIPT, *QUICK, *args), *words)


def test_the_arguments_shared_by_all_cases_are_valid(run_here):
    assert run_here(SCRIPT, *QUICK).returncode == 0
