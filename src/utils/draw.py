"""Pictures as PNG bytes: perturbations, curves, heat maps, examples. Draws what it is given.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

import io

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def _figure(width, height):
    from matplotlib.figure import Figure  # half a second, needed only when something is drawn

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def encode_delta(delta):
    """A perturbation (C, H, W) on the [0, 1] scale as an 8-bit PNG that can be read back.

    Grey level 128 is zero; one step of 1/255 is `delta_gain` levels, as the file's text says, so
    that the picture can be seen by eye and loses nothing but the rounding to 8 bits.
    """
    steps = (delta * 255).round()
    gain = max(1, int(127 // max(1, steps.abs().max().item())))
    array = (steps * gain + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    text = PngInfo()
    text.add_text("delta_gain", str(gain))
    buffer = io.BytesIO()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(
        buffer, "png", pnginfo=text)
    return buffer.getvalue()


def decode_delta(path):
    """The PNG of encode_delta -> (delta (C, H, W), True), or of any other 8-bit image, (.., False).

    Without `delta_gain` in the file one grey level is taken as 1/255.
    """
    with Image.open(path) as image:
        gain = image.text.get("delta_gain") if hasattr(image, "text") else None
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        array = torch.from_numpy(np.array(image))
    array = array[None] if array.ndim == 2 else array.permute(2, 0, 1)
    return (array.float() - 128) / (255 * int(gain or 1)), gain is not None


def curves(rows, title):
    """Loss and fooling ratio over the epochs, from the rows of log.csv."""
    figure = _figure(6, 3.4)
    left = figure.add_subplot()
    right = left.twinx()
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["loss"] for row in rows], color=BLUE, marker="o", ms=3)
    left.set(xlabel="epoch", title=title)
    left.set_ylabel("loss (ascended)", color=BLUE)
    right.plot(epochs, [100 * row["fooling_ratio"] for row in rows], color=ORANGE, marker="s", ms=3)
    right.set_ylabel("fooling ratio, % of watched training images", color=ORANGE)
    right.set_ylim(0, 100)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    return _png(figure)
