"""Train a network by Contrastive Forward-Forward or a method it is compared with: data, the two stages, runs on disk.

    python train.py                                             ten drawn shapes, nothing to download
    python train.py --dataset cifar10 --algo cffm               the paper's ViT[128 4 5], its authors' 600 + 50 epochs
    python train.py --dataset cifar10 --algo cffm --model vit-64-4-4 --limit 10000 --recipe short
    python train.py --dataset mnist --algo ff --recipe mlp      Forward-Forward; also symba, collab, cff, scl, bp
    python train.py --resume --out runs/NAME                    go on where a run stopped

A run is a folder: config.json (every setting), log.csv (a row an epoch), last.pt (what --resume needs), best.pt (the
weights) and result.json (test accuracy). `python eval.py runs/NAME` reads it.
"""
import argparse
import csv
import ctypes
import io
import json
import math
import os
import platform
import re
import sys
import time
import zipfile
from contextlib import contextmanager
from copy import copy
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch.nn.functional import cross_entropy, normalize, one_hot, pad
from torchvision.datasets.folder import default_loader
from torchvision.transforms.v2 import functional as ops

from cff import (Segment, bp_step, cff_step, collab_step, encode, encode_neutral, features, ff_step, gammas, head_step,
                 layer_goodness, predict, scl_step, wrong_labels)
from losses import contrastive_loss, ff_loss, marginal_contrastive_loss, margins, saturated, symba_loss
from vit import build_model

# -------------------------------------------------------------------------------------------------------------- settings

# flag: (default, meaning). Defaults are the paper's or, where it is silent, those of its authors' code.
SETTINGS = {
    "dataset": ("shapes", "shapes, mnist, cifar10, cifar100 or tinyimagenet"),
    "data_dir": ("data", "folder of the data sets; what is missing there is downloaded"),
    "limit": (0, "number of training images to use, and a ninth of it for validation; 0 is all"),
    "missing": (0.0, "fraction of training and validation images to leave out (Table 4)"),
    "label_noise": (0.0, "fraction of training and validation labels to make wrong (Table 4)"),
    "augment": ("crop", "none, flip, crop (and flip) or crop+randaug (Table 3); MNIST is never flipped"),
    "padding": (4, "pixels put around an image before its crop"),
    "fill": ("zeros", "what these pixels are: zeros, or edge, those of the image's edge again"),
    "algo": ("cffm", "cff (contrastive loss, Eq. 3), cffm (with margins, Eq. 15), ff, symba, collab, scl or bp"),
    "model": ("vit-128-4-5", '"ViT[E H L]" or "MLP[E L]", also written vit-E-H-L, mlp-E-L'),
    "patch_size": (4, "side of a patch in pixels"),
    "pool": ("mean", "what a layer's loss sees: mean over patches (Eq. 13) or class token (Table 5)"),
    "position_std": (1.0, "standard deviation of the position embedding at the start"),
    "views": (2, "augmented views of a batch; 1 is the one-forward variant (Table 6)"),
    "epochs": (600, "epochs of stage 1, the encoder"),
    "head_epochs": (50, "epochs of stage 2, the linear head"),
    "batch_size": (512, "images in a batch, B"),
    "lr": (0.004, "learning rate of stage 1"),
    "head_lr": (0.0005, "learning rate of stage 2"),
    "weight_decay": (0.01, "weight decay of AdamW"),
    "warmup": (0, "updates in which the learning rate of stage 1 rises to --lr"),
    "schedule": ("constant", "learning rate of both stages: constant, or cosine, down to 0 at the stage's end"),
    "temperature": (0.15, "tau of Eqs. 3 and 15"),
    "m0": (0.4, "margin of the first layer (Sec. 4.1)"),
    "mL": (0.1, "margin of the last layer"),
    "decay": ("linear", "margins between them: linear, parabolic, cosine or exponential"),
    "threshold": (2.0, "theta of Eq. 2 (ff, collab)"),
    "alpha": (1.0, "alpha of Eq. 7 (symba)"),
    "head": (False, "ff, symba, collab: train a head in stage 2 and predict with it, in one pass (Table 2)"),
    "skip_first": (False, "ff, symba, collab: predict without the first layer's goodness"),
    "seed": (0, "of the validation split, the weights and every draw"),
    "device": ("auto", "cpu, cuda, or auto: cuda if there is one"),
    "pipeline": (False, "train the layers in several processes at once, started by torchrun (Sec. 5.1)"),
    "out": ("", "folder of the run; if not given, runs/ and a name made of what is typed"),
}
DEFAULTS = {name: default for name, (default, _) in SETTINGS.items()}
CHOICES = {
    "dataset": ("shapes", "mnist", "cifar10", "cifar100", "tinyimagenet"),
    "algo": ("cff", "cffm", "ff", "symba", "collab", "scl", "bp"), "augment": ("none", "flip", "crop", "crop+randaug"),
    "pool": ("mean", "token"), "views": (1, 2), "fill": ("zeros", "edge"),
    "schedule": ("constant", "cosine"), "device": ("auto", "cpu", "cuda"),
    "decay": ("linear", "parabolic", "cosine", "exponential"),
}
# What differs from SETTINGS by method, by data set and by --recipe, in this order; what is typed comes last.
BY_ALGO = {"bp": dict(lr=0.0005)}
BY_DATASET = {
    "shapes": dict(model="vit-64-4-3", patch_size=8, head_epochs=4),                    # and --recipe short
    "mnist": dict(model="mlp-500-3", augment="none"),
    "cifar10": dict(padding=12),
    "cifar100": dict(model="vit-192-6-6"),
    "tinyimagenet": dict(model="vit-240-6-7", patch_size=8, padding=6),
}
# Recipes, settings found here (README, "Short runs" and "MLPs"): for all methods, then what one of them has instead.
RECIPES = {
    "short": {"all": dict(epochs=30, head_epochs=10, batch_size=128, temperature=0.25, position_std=0.02, padding=4, warmup=80,
                          schedule="cosine", head_lr=0.005),
              "bp": dict(lr=0.002)},
    "mlp": {"all": dict(epochs=30, head_epochs=10, head_lr=0.005, batch_size=128, warmup=100, schedule="cosine", lr=0.002,
                        temperature=0.07),
            "ff": dict(lr=0.2, weight_decay=0.0, epochs=40), "collab": dict(lr=0.2, weight_decay=0.0, epochs=40),
            "symba": dict(lr=0.1, weight_decay=0.0, epochs=40, alpha=4.0), "bp": dict(lr=0.0005), "scl": dict(lr=0.001)},
}
# Methods whose images carry a label, and how on an MLP (Fig. 2b, 2c).
LABELS = {"ff": "one-hot", "collab": "one-hot", "symba": "random"}
TIED = {"scl": "gradients cross all layers", "bp": "gradients cross all layers",
        "collab": "each layer's loss needs the goodness of all others"}                 # what --pipeline cannot train
METRIC = {"mnist": "top1", "shapes": "top1", "cifar10": "top1", "cifar100": "top5", "tinyimagenet": "top10"}
# Ranges that catch typing errors; vit.py and losses.py check the rest.
LIMITS = {
    "limit": (0, math.inf), "missing": (0, 0.999), "label_noise": (0, 1), "padding": (0, math.inf), "epochs": (1, math.inf),
    "head_epochs": (1, math.inf), "batch_size": (2, math.inf), "lr": (0, math.inf), "head_lr": (0, math.inf),
    "weight_decay": (0, math.inf), "warmup": (0, math.inf), "m0": (0, 2), "mL": (0, 2), "temperature": (1e-6, math.inf),
    "alpha": (1e-6, math.inf), "threshold": (0, math.inf),
}


def flag(name):
    return "--" + name.replace("_", "-")


def meant_by(recipe, algo):
    """The settings that a recipe stands for with a method; none for no recipe."""
    return {**RECIPES.get(recipe, {}).get("all", {}), **RECIPES.get(recipe, {}).get(algo, {})}


def defaults(dataset, algo):
    """The settings of a method on a data set before any recipe, and before anything is typed."""
    short = meant_by("short" if dataset == "shapes" else "", algo)
    return {**DEFAULTS, **BY_ALGO.get(algo, {}), **short, **BY_DATASET[dataset], "dataset": dataset, "algo": algo}


def two_stages(settings):
    """Whether a run has a stage 2; without one, FF, SymBa and Collab need no head and BP has trained it."""
    return settings["head"] or settings["algo"] in ("cff", "cffm", "scl")


def parse(argv=None):
    """The settings of a command line: (dict, whether to resume). A line that makes no sense ends with exit status 2."""
    parser = argparse.ArgumentParser("train.py", usage="train.py [--FLAG VALUE ...]; --help lists the flags", description=__doc__,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, meaning) in SETTINGS.items():
        own = [f"{dataset}: {value}" for dataset in BY_DATASET if name != "dataset"
               and (value := defaults(dataset, DEFAULTS["algo"])[name]) != default]
        own += [f"{algo}: {changes[name]}" for algo, changes in BY_ALGO.items() if name in changes]
        own += [f"{algo} on shapes: {changes[name]}" for algo, changes in RECIPES["short"].items() if algo != "all" and name in changes]
        value = dict(action="store_true") if default is False else dict(type=type(default), choices=CHOICES.get(name),
                                                                        metavar=name.upper())
        parser.add_argument(flag(name), **value, help=f"{meaning} [{', '.join([str(default), *own])}]")
    spell = lambda changes: " ".join(f"{flag(name)} {value}" for name, value in changes.items())
    parser.add_argument("--recipe", choices=RECIPES, help="settings for short runs (those of shapes) or for MLPs: " + "; ".join(
        f"{name}{'' if algo == 'all' else f' with {algo}'}: {spell(changes)}"
        for name, by_algo in RECIPES.items() for algo, changes in by_algo.items()))
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, by its own settings")
    typed = vars(parser.parse_args(argv))
    if "model" in typed:                                            # one spelling of each: "ViT[128 4 5]" is vit-128-4-5
        typed["model"] = re.sub(r"\[(.+)\]$", lambda sizes: "-" + sizes[1].replace(" ", "-"), typed["model"].lower())
    resume = typed.pop("resume", False)
    recipe = typed.pop("recipe", "")
    dataset, algo = (typed.get(name, DEFAULTS[name]) for name in ("dataset", "algo"))
    settings = {**defaults(dataset, algo), **meant_by(recipe, algo), **typed}
    if not settings["out"]:
        others = [name.replace("_", "") + str(typed[name]).removesuffix("True") for name in SETTINGS if name in typed
                  and name not in ("dataset", "algo", "model", "seed", "data_dir", "device", "pipeline", "out")]
        settings["out"] = "runs/" + "-".join(filter(None, [settings["dataset"], settings["algo"], settings["model"], recipe, *others,
                                                           f"s{settings['seed']}"]))
    for name, (lowest, highest) in LIMITS.items():
        if not lowest <= settings[name] <= highest:
            parser.error(f"{flag(name)} must lie in {lowest}..{highest}; got {settings[name]}")
    if settings["pipeline"] != ("WORLD_SIZE" in os.environ):
        parser.error("--pipeline goes with torchrun, and torchrun with --pipeline: torchrun --nproc-per-node 2 train.py --pipeline")
    config = Path(settings["out"]) / "config.json"
    if config.exists() and not resume:
        parser.error(f"{config.parent} holds a run already: go on with it (--resume), or name another folder (--out)")
    if resume and not config.exists():
        parser.error(f"there is no run in {config.parent} to resume")
    if resume:
        settings = {**DEFAULTS, **json.loads(config.read_text())["settings"], "out": str(config.parent),
                    "pipeline": settings["pipeline"]}
        settings |= {name: typed[name] for name in ("data_dir", "device") if name in typed}         # the machine may be another
        for name, value in {**meant_by(recipe, settings["algo"]), **typed}.items():
            if settings[name] != value and name != "out":           # runs/NAME/ is runs/NAME
                parser.error(f"the run in {config.parent} has {flag(name)} {settings[name]}, not {value}; --resume keeps "
                             "its settings")
    if (settings["head"] or settings["skip_first"]) and settings["algo"] not in LABELS:
        parser.error("--head and --skip-first are for ff, symba and collab")
    if settings["pipeline"] and settings["algo"] in TIED:
        parser.error(f"--pipeline trains layers that need nothing of later ones; with {settings['algo']} {TIED[settings['algo']]}")
    return settings, resume


# ------------------------------------------------------------------------------------------------------------- data sets

def load_data(dataset, folder):
    """(train images, train labels, test images, test labels): uint8 (N, C, H, W) and int64 (N,), as shipped.

    Missing files are downloaded into `folder` and checked. Raises OSError, in one line that says where to put which
    file, if that fails.
    """
    if dataset == "shapes":
        return *draw_shapes(10000, seed=1), *draw_shapes(2000, seed=2)
    place = {"mnist": "the four files train-images-idx3-ubyte.gz, ... into {}/MNIST/raw",
             "cifar10": "cifar-10-python.tar.gz into {}", "cifar100": "cifar-100-python.tar.gz into {}",
             "tinyimagenet": "tiny-imagenet-200.zip into {}"}[dataset].format(folder)
    try:
        if dataset == "tinyimagenet":
            return load_tiny_imagenet(Path(folder))
        kind = {"mnist": torchvision.datasets.MNIST, "cifar10": torchvision.datasets.CIFAR10,
                "cifar100": torchvision.datasets.CIFAR100}[dataset]
        parts = []
        for part in (kind(folder, train=True, download=True), kind(folder, train=False, download=True)):
            images = torch.as_tensor(part.data)                                         # (N, H, W) or (N, H, W, 3)
            parts.append(images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous())
            parts.append(torch.as_tensor(part.targets))
        return parts
    except Exception as reason:         # no network, a torn file, another layout: all mean that the data are not there
        reason = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
        raise OSError(f"{dataset} could not be loaded ({reason}): put {place} and remove what is broken there, or use "
                      "--dataset shapes, which needs no files")


def load_tiny_imagenet(folder):
    """Tiny ImageNet as `load_data`; its 10,000 labelled validation images are the test set, as its own has no labels."""
    root = folder / "tiny-imagenet-200"
    if not root.exists():
        torchvision.datasets.utils.download_url("http://cs231n.stanford.edu/tiny-imagenet-200.zip", folder,
                                                md5="90528d7ca1a48142e341f4ef8d21d0de")
        with zipfile.ZipFile(folder / "tiny-imagenet-200.zip") as archive:
            archive.extractall(folder / "unpacking")        # names with .. or a leading / stay inside that folder
        (folder / "unpacking" / "tiny-imagenet-200").rename(root)       # whole, or not there
    classes = sorted((root / "wnids.txt").read_text().split())
    train = [(path, label) for label, name in enumerate(classes)
             for path in sorted((root / "train" / name / "images").glob("*.JPEG"))]
    val = [line.split("\t")[:2] for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
    test = [(root / "val" / "images" / file, classes.index(name)) for file, name in val]
    data = []
    for part in (train, test):
        if {label for _, label in part} != set(range(len(classes))):
            raise ValueError(f"some of the {len(classes)} classes have no images in {root}")
        data.append(torch.stack([ops.pil_to_tensor(default_loader(path)) for path, _ in part]))     # RGB, the grey ones too
        data.append(torch.tensor([label for _, label in part]))
    return data


def bar(x, y, width, height):
    """Signed distance to a rectangle of 2 width x 2 height around the origin."""
    return torch.maximum(x.abs() - width, y.abs() - height)


# class: signed distance to its outline, negative inside, in units of the object's radius
SHAPES = {
    "disc": lambda x, y: torch.hypot(x, y) - 0.85,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.2,
    "square": lambda x, y: bar(x, y, 0.72, 0.72),
    "triangle": lambda x, y: torch.maximum(0.866 * x.abs() + 0.5 * y, -y) - 0.45,
    "plus": lambda x, y: torch.minimum(bar(x, y, 0.25, 0.95), bar(x, y, 0.95, 0.25)),
    "star": lambda x, y: 0.6 * (torch.hypot(x, y) - 0.62 - 0.33 * torch.cos(5 * torch.atan2(y, x))),
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.95, 0.75 - torch.hypot(x - 0.45, y)),
    "half": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.95, -0.2 - y),
    "tee": lambda x, y: torch.minimum(bar(x, y - 0.55, 0.85, 0.25), bar(x, y, 0.25, 0.8)),
    "bars": lambda x, y: bar(x, y.abs() - 0.5, 0.85, 0.2),
}


def draw_shapes(n, seed):
    """n drawn images uint8 (n, 3, 32, 32) and their labels (n,), 0..9 in the order of SHAPES; the same for the same seed.

    Place, size, turn, colours, stripes and clutter are drawn for each image, so that only the outline tells the class.
    """
    generator = torch.Generator().manual_seed(seed)
    images = [_draw_some(min(1000, n - start), generator) for start in range(0, n, 1000)]
    return torch.cat(images), torch.arange(n) % len(SHAPES)


def _draw_some(n, generator):
    """n images of `draw_shapes`, the classes in turn; distances and places as in SHAPES."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")

    def rand(low, high, *channels):                 # a random number for each image, or for each of its channels
        return low + (high - low) * torch.rand(n, *channels, 1, 1, generator=generator)

    def place(low, high, reach=1):                  # the pixels in the coordinates of an object of random place, turn, size
        radius, turn = rand(low, high), rand(0, 2 * math.pi)
        room = reach * (15.5 - 0.8 * radius)
        x, y = (columns - 15.5 - room * rand(-1, 1)) / radius, (rows - 15.5 - room * rand(-1, 1)) / radius
        return x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin(), radius

    def cover(distance, radius):                    # signed distance to an outline -> the share of a pixel inside it
        return (0.5 - distance * radius).clamp(0, 1)[:, None]

    def paint(colour):                              # a colour with stripes
        x, _, _ = place(1, 1)
        return colour + (x * rand(0.2, 1.2)).sin()[:, None] * rand(-0.12, 0.12, 3)

    back = rand(0, 0.5, 3)
    image = paint(back)
    for _ in range(2):                              # clutter under the shape
        x, y, radius = place(1.5, 4)
        image = image.lerp(rand(0, 1, 3).expand_as(image), cover(bar(x, y, 1, rand(0.2, 1)), radius))
    x, y, radius = place(8, 13, reach=0.5)
    distance = torch.empty_like(x)
    for label, outline in enumerate(SHAPES.values()):
        distance[label::10] = outline(x[label::10], y[label::10])
    colour = back + rand(0.3, 0.7, 3)               # brighter than the background in every channel
    image = image.lerp(paint(colour), cover(distance, radius))
    image = image + 0.03 * torch.randn(n, 3, 32, 32, generator=generator)
    return (image.clamp(0, 1) * 255).to(torch.uint8)


def split(images, labels, settings, num_classes):
    """Training and validation data, ((images, labels), (images, labels)): 90 % and 10 % at random by the seed.

    --limit and --missing leave images out, --label-noise gives an exact fraction of labels a wrong class, uniformly.
    """
    g = torch.Generator().manual_seed(settings["seed"])
    order = torch.randperm(len(labels), generator=g)
    rows = [order[len(order) // 10:], order[:len(order) // 10]]
    if settings["limit"] > len(rows[0]):
        raise ValueError(f"--limit {settings['limit']}: there are {len(rows[0])} training images")
    if settings["limit"]:
        rows = [rows[0][:settings["limit"]], rows[1][:max(1, settings["limit"] // 9)]]
    parts = []
    for part in rows:
        part = part[:max(1, round(len(part) * (1 - settings["missing"])))]
        y = labels[part]
        wrong = torch.randperm(len(y), generator=g)[:round(len(y) * settings["label_noise"])]
        y[wrong] = wrong_labels(y[wrong], num_classes, g)
        parts.append((images[part], y))
    return parts


def mean_and_std(images):
    """Mean and standard deviation of each channel of uint8 images (N, C, H, W), as lists of C floats in 0..1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    share = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    share = share / share.sum(dim=1, keepdim=True)                                      # (C, 256)
    mean = share @ values
    return mean.tolist(), (share @ values ** 2 - mean ** 2).sqrt().tolist()


# ---------------------------------------------------------------------------------------------------------- augmentation

def random_flip(images, generator):
    """Mirror each image (B, C, H, W) with probability 1/2."""
    flip = torch.rand(len(images), device=images.device, generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def random_crop(images, padding, generator, fill="zeros"):
    """A random window of each image (B, C, H, W), of the same size, after padding with zeros or its edge on all sides."""
    B, C, H, W = images.shape
    if fill == "zeros":
        padded = pad(images, [padding] * 4)
    else:                                                               # pad's "replicate" takes no uint8
        at = lambda side: torch.arange(-padding, side + padding, device=images.device).clamp(0, side - 1)
        padded = images[:, :, at(H)][:, :, :, at(W)]
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)                    # (B, C, 2p+1, 2p+1, H, W), a view
    rows, columns = torch.randint(2 * padding + 1, (2, B), device=images.device, generator=generator)
    return windows[torch.arange(B, device=images.device), :, rows, columns]


def rand_augment(images, generator, num_ops=3, magnitude=14):
    """RandAugment [45]: num_ops of torchvision's 14 operations for each image, uint8 (B, C, H, W) -> the same.

    magnitude runs from 0 to 30. An operation is applied at once to all images that drew it with the same sign.
    """
    t, (H, W) = magnitude / 30, images.shape[-2:]
    shear, dx, dy = math.degrees(math.atan(0.3 * t)), int(150 / 331 * W * t), int(150 / 331 * H * t)

    def affine(x, translate=(0, 0), shear=(0.0, 0.0), center=None):
        return ops.affine(x, 0.0, list(translate), 1.0, list(shear), center=center)

    signed = [                                                          # the sign of the magnitude is drawn as well
        lambda x, sign: affine(x, shear=(sign * shear, 0.0), center=[0, 0]),
        lambda x, sign: affine(x, shear=(0.0, sign * shear), center=[0, 0]),
        lambda x, sign: affine(x, translate=(sign * dx, 0)),
        lambda x, sign: affine(x, translate=(0, sign * dy)),
        lambda x, sign: ops.rotate(x, sign * 30 * t),
        lambda x, sign: ops.adjust_brightness(x, 1 + sign * 0.9 * t),
        lambda x, sign: ops.adjust_saturation(x, 1 + sign * 0.9 * t),
        lambda x, sign: ops.adjust_contrast(x, 1 + sign * 0.9 * t),
        lambda x, sign: ops.adjust_sharpness(x, 1 + sign * 0.9 * t),
    ]
    unsigned = [
        lambda x: x,
        lambda x: ops.posterize(x, 8 - round(4 * t)),
        lambda x: ops.solarize(x, 255 * (1 - t)),
        ops.autocontrast,
        ops.equalize,
    ]
    # a signed operation has two numbers, an unsigned one appears twice: each of the 14 is drawn as often as the others
    table = [lambda x, op=op, sign=sign: op(x, sign) for op in signed for sign in (-1, 1)] + unsigned
    numbers = torch.tensor([*range(23), *range(18, 23)], device=images.device)
    images = images.clone()
    for _ in range(num_ops):
        drawn = numbers[torch.randint(28, (len(images),), device=images.device, generator=generator)]
        for number, operation in enumerate(table):
            rows = (drawn == number).nonzero()[:, 0]
            if len(rows):
                images[rows] = operation(images[rows])
    return images


def make_augment(kind, padding, mean, std, generator, flip=True, fill="zeros"):
    """augment(images): uint8 (B, C, H, W) -> a freshly drawn view, normalised float (B, C, H, W). kind as --augment."""
    mean, std = (torch.tensor(c, device=generator.device)[:, None, None] for c in (mean, std))

    def augment(images):
        if "randaug" in kind:
            images = rand_augment(images, generator)
        if "crop" in kind:
            images = random_crop(images, padding, generator, fill)
        if flip and kind != "none":
            images = random_flip(images, generator)
        return (images.float() / 255 - mean) / std

    return augment


# ------------------------------------------------------------------------------------------------- what an epoch measures

@contextmanager
def watch(model):
    """Yield L lists that collect the pooled output (B, E) of each layer at each forward pass made within."""
    seen = [[] for _ in model.layers]
    hooks = [layer.register_forward_hook(lambda _, x, h, outputs=outputs: outputs.append(model.pool(h.detach())))
             for layer, outputs in zip(model.layers, seen)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Probe:
    """A linear classifier in closed form, least squares from features (B, E) to one-hot labels, collected batch by batch."""

    def __init__(self, num_classes):
        self.num_classes, self.XX, self.XY = num_classes, 0, 0

    def add(self, f, y):
        X = torch.cat([f, f.new_ones(len(f), 1)], dim=1).double()
        self.XX, self.XY = self.XX + X.T @ X, self.XY + X.T @ one_hot(y, self.num_classes).double()

    def correct(self, f, y):
        """How many of the features (B, E) it gives their label."""
        ridge = 1e-6 * self.XX.diagonal().sum() * torch.eye(len(self.XX), dtype=self.XX.dtype, device=f.device)
        W = torch.linalg.solve(self.XX + ridge, self.XY)
        return ((f.double() @ W[:-1] + W[-1]).argmax(dim=1) == y).sum()


def saturated_share(f, y, margin):
    """sum_i |R(i)| and sum_i |P(i)| of a batch, a tensor (2,): row 3 of Fig. 5."""
    positives = (y[:, None] == y).sum() - len(y)
    return torch.stack([saturated(f, y, margin).sum(), positives])


def count_saturated(run, f, y):
    """`saturated_share` of each layer's f with its margin, (L, 2); 0 for methods without margins."""
    return torch.stack([saturated_share(f_l, y, m) for f_l, m in zip(f, run.margins)]) if run.margins else 0


def batches(order, y, settings):
    """Cut rows `order` into batches, leaving out those in which no image has a positive: with one view, a small last one."""
    for rows in order.split(settings["batch_size"]):
        if not needs_pairs(settings) or len(y[rows].unique()) < len(rows):
            yield rows


def needs_pairs(settings):
    """Whether the loss needs two images of a class in a batch: a contrastive one of a single view."""
    return settings["views"] == 1 and settings["algo"] in ("cff", "cffm", "scl")


@torch.no_grad()
def hits(model, images, y, normalise, settings):
    """Whether an image's label is among the first k guesses, (N, 10) bool, k = 1 ... 10; images as they are, not augmented."""
    classes = 1 if model.labels is None else len(model.labels) - 1                      # passes for an image
    found = []
    for rows in torch.arange(len(y), device=y.device).split(max(1, 1000 // classes)):
        scores = predict(model, normalise(images[rows]), settings["algo"], settings["head"], settings["skip_first"])
        found.append((scores.topk(10).indices == y[rows, None]).cumsum(dim=1).bool())
    return torch.cat(found)


def accuracy(model, images, y, normalise, settings):
    """Top-1, top-5 and top-10 accuracy in %: {1: ..., 5: ..., 10: ...}."""
    found = hits(model, images, y, normalise, settings)
    return {k: round(100 * found[:, k - 1].double().mean().item(), 2) for k in (1, 5, 10)}


# ------------------------------------------------------------------------------------------------------------- runs on disk

class Run:
    """One training run: settings, data, model, random state, how far it is, and its folder on disk."""

    def __init__(self, settings, facts=None):
        """facts: of the data; given to the later processes of a pipeline, which have none themselves."""
        self.settings, self.folder = settings, Path(settings["out"])
        best = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(best if settings["device"] == "auto" else settings["device"])
        if self.device.type == "cuda" and best == "cpu":
            raise ValueError("--device cuda: torch finds no CUDA device here")
        self.facts = facts or self.read_data()
        self.classes = self.facts["num_classes"]

        torch.manual_seed(settings["seed"])
        self.model = make_model(settings, self.facts).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(settings["seed"])
        self.val_generator = torch.Generator(self.device)
        flip = settings["dataset"] != "mnist"                       # a mirrored digit is another sign
        make = lambda kind, generator: make_augment(kind, settings["padding"], self.facts["mean"], self.facts["std"], generator,
                                                    flip, settings["fill"])
        self.augment = make(settings["augment"], self.generator)
        self.val_augment = make(settings["augment"], self.val_generator)
        self.normalise = make("none", self.generator)
        L, self.margins = len(self.model.layers), None
        if settings["algo"] == "cff":
            self.margins = L * [0.0]
        elif settings["algo"] == "cffm":
            self.margins = margins(settings["m0"], settings["mL"], L, settings["decay"])
        self.loss = partial(symba_loss, alpha=settings["alpha"]) if settings["algo"] == "symba" else \
            partial(ff_loss, threshold=settings["threshold"])       # of ff, symba and collab
        self.part, self.later_states = None, []                     # of a pipeline
        self.state = {"stage": 1, "epoch": 0, "best": math.inf, "best_epoch": 0, "encoder_epoch": 0, "log": []}

    def read_data(self):
        """Put training, validation and test data on the device; returns their shape, classes, mean, deviation and numbers."""
        settings = self.settings
        train_x, train_y, test_x, test_y = load_data(settings["dataset"], settings["data_dir"])
        classes = int(train_y.max()) + 1
        parts = split(train_x, train_y, settings, classes)
        if any(next(batches(torch.arange(len(y)), y, settings), None) is None for _, y in parts):
            raise ValueError("with --views 1, training and validation data need two images of a class in a batch")
        if settings["padding"] > train_x.shape[-1]:
            raise ValueError(f"--padding {settings['padding']} is more than the image's side, {train_x.shape[-1]}")
        self.train, self.val, self.test = (tuple(t.to(self.device) for t in part) for part in [*parts, (test_x, test_y)])
        mean, std = mean_and_std(parts[0][0])
        return {"image_shape": list(train_x.shape[1:]), "num_classes": classes, "mean": mean, "std": std,
                "images": [len(part[1]) for part in (self.train, self.val, self.test)]}

    def start(self):
        """Make the folder and write down every setting, the data, versions and machine."""
        self.folder.mkdir(parents=True, exist_ok=True)
        launch = f"torchrun --nproc-per-node {dist.get_world_size()}" if self.settings["pipeline"] else "python"
        config = {"command": f"{launch} " + " ".join(sys.argv), "settings": self.settings, "data": self.facts,
                  "device": describe_device(self.device),
                  "versions": {"python": platform.python_version(), "torch": torch.__version__,
                               "torchvision": torchvision.__version__}}
        write(self.folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))

    def save(self, optimizers, best):
        """Write best.pt, if this epoch was the best, then last.pt and log.csv, each replaced in one step."""
        if best:
            content = {"model": self.model.state_dict(), "settings": self.settings, "data": self.facts}
            write(self.folder / "best.pt", lambda path: torch.save(content, path))
        checkpoint = {**self.state, "model": self.model.state_dict(), "generator": self.generator.get_state(),
                      "optimizers": [optimizer.state_dict() for optimizer in optimizers] + self.later_states,
                      "device": self.device.type}
        write(self.folder / "last.pt", lambda path: torch.save(checkpoint, path))
        self.later_states = []
        write(self.folder / "log.csv", self.write_log)

    def write_log(self, path):
        columns = list(dict.fromkeys(column for row in self.state["log"] for column in row))
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(self.state["log"])

    def load(self):
        """Take up the last finished epoch; returns the states of the optimizers, none if no epoch was finished.

        Raises OSError if the checkpoint is missing though epochs were finished, or damaged; ValueError on another device.
        """
        path = self.folder / "last.pt"
        if not path.exists() and not (self.folder / "log.csv").exists():
            return []
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as reason:
            raise OSError(f"{path}, which --resume needs, cannot be read ({type(reason).__name__})")
        if checkpoint["device"] != self.device.type:
            raise ValueError(f"this run's random state is of {checkpoint['device']}: go on with --device {checkpoint['device']}")
        self.model.load_state_dict(checkpoint["model"])
        self.generator.set_state(checkpoint["generator"])
        self.state = {key: checkpoint[key] for key in self.state}
        write(self.folder / "log.csv", self.write_log)              # a stop may have come between last.pt and log.csv
        return checkpoint["optimizers"]


def make_model(settings, facts):
    """The untrained model of a run's settings and the facts of its data."""
    return build_model(settings["model"], facts["image_shape"], facts["num_classes"], settings["patch_size"],
                       settings["pool"], settings["position_std"], LABELS.get(settings["algo"]))


def describe_device(device):
    """The GPU's or the processor's name, and how many threads are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else [platform.processor()]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def keep_memory():
    """Let glibc (Linux) keep the memory that a step has freed: to fetch it anew for the next one costs time."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                              # M_MMAP_MAX: large blocks come from the heap as well
        mallopt(-1, -1)                                             # M_TRIM_THRESHOLD: the heap never shrinks


def peak_memory(device):
    """The most memory this process has held, in MB: on a GPU that of tensors, else resident memory; None where unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    try:
        import resource                                             # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024                  # of ru_maxrss: bytes on macOS, kB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def write(path, fill):
    """Let fill(temporary) write a file, then put it in the place of `path` in one step."""
    temporary = path.with_name(path.name + ".tmp")
    fill(temporary)
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------ the stages

def learning_rate(step, steps, settings, base, warmup):
    """The learning rate of update `step` of `steps`, counted from 0: a linear rise over `warmup`, then --schedule."""
    rise = min(1, (step + 1) / (warmup + 1))
    fall = (1 + math.cos(math.pi * step / steps)) / 2 if settings["schedule"] == "cosine" else 1
    return base * rise * fall


def by_layer(name, values, L):
    """{"name_1": ..., "name_L": ...}: a log's columns from a tensor (L,); from a scalar, the last layer's alone."""
    values = values.reshape(-1).tolist()
    return {f"{name}_{l}": round(value, 6) for l, value in enumerate(values, start=L + 1 - len(values))}


def make_optimizers(model, settings, stage=1):
    """Stage 1: an optimizer for each layer, or one for all that is trained end to end; 2: one for the head. No rates yet."""
    modules = [model.head] if stage == 2 else {"scl": [model.layers], "bp": [model]}.get(settings["algo"], model.layers)
    return [torch.optim.AdamW(module.parameters(), weight_decay=settings["weight_decay"], fused=True) for module in modules]


def make_step(run, optimizers):
    """step(x, y): stage 1's training step of --algo on one batch, returning its losses, (L,) or a scalar."""
    s, model, augment = run.settings, run.model, run.augment
    if s["algo"] in ("cff", "cffm"):
        return lambda x, y: cff_step(model, optimizers, x, y, augment, run.margins, s["temperature"], s["views"])
    if s["algo"] in ("ff", "symba"):
        return lambda x, y: ff_step(model, optimizers, x, y, augment, run.loss, run.generator)
    if s["algo"] == "collab":
        return lambda x, y: collab_step(model, optimizers, x, y, augment, s["threshold"], run.generator)
    if s["algo"] == "scl":
        return lambda x, y: scl_step(model, optimizers[0], x, y, augment, s["temperature"], s["views"])
    return lambda x, y: bp_step(model, optimizers[0], x, y, augment)


def train_layers(run, optimizers, updates):
    """Stage 1, training: a step on every batch of `updates`. Sums over the images seen: {"n": their number, "loss": (L,) or a
    scalar, "saturated": (L, 2) or 0, "probe": of the last layer}."""
    loss, share, n, probe, step = 0, 0, 0, Probe(run.classes), make_step(run, optimizers)
    with watch(run.model) as seen:
        for x, y in updates:
            loss += len(y) * step(x, y)
            n += len(y)
            if run.model.labels is None:
                pooled = [torch.cat(outputs) for outputs in seen]
            else:                                                                       # what was seen knows the label
                with torch.no_grad():
                    pooled = encode_neutral(run.model, run.normalise(x))
            for outputs in seen:
                outputs.clear()
            f, labels = [normalize(f_l) for f_l in pooled], y.repeat(len(pooled[0]) // len(y))
            share += count_saturated(run, f, labels)
            probe.add(f[-1], labels)
    return {"n": n, "loss": loss, "saturated": share, "probe": probe}


def encoder_epoch(run, optimizers, updates):
    """Stage 1: a training step on every batch of `updates`, then validation; (columns of the log, validation loss)."""
    sums = train_layers(run, optimizers, updates) if run.part is None else piped_epoch(run, optimizers, updates)
    run.val_generator.manual_seed(run.settings["seed"])                                 # the same views every epoch
    val_loss, val_share, probe_accuracy = validate_encoder(run, sums["probe"])
    L, share = len(run.model.layers), sums["saturated"]
    row = {**by_layer("train_loss", sums["loss"] / sums["n"], L), **by_layer("val_loss", val_loss, L)}
    if run.margins:
        row |= {**by_layer("train_saturated", share[:, 0] / share[:, 1], L),
                **by_layer("val_saturated", val_share[:, 0] / val_share[:, 1], L)}
    # the epoch is chosen by the last layer's loss; FF's by the sum over the layers but the first
    chosen_by = val_loss[1:] if run.model.labels is not None and L > 1 else val_loss[-1:]
    return row | {"probe": round(probe_accuracy, 2)}, chosen_by.sum().item()


@torch.no_grad()
def validate_encoder(run, probe):
    """Stage 1 on validation data: each layer's mean loss (L,) or (1,), its saturated pairs, and the probe's accuracy in %."""
    loss, share, correct, labels_seen, n, (images, y) = 0, 0, 0, 0, 0, run.val
    for rows in batches(torch.arange(len(y), device=y.device), y, run.settings):
        losses, f = validation_step(run, images[rows], y[rows])
        labels = y[rows].repeat(len(f[-1]) // len(rows))
        loss += len(rows) * losses
        share += count_saturated(run, f, labels)
        correct += probe.correct(f[-1], labels)
        labels_seen += len(labels)
        n += len(rows)
    return loss / n, share, 100 * correct.item() / labels_seen


def validation_step(run, x, y):
    """A training step's losses, (L,) or (1,), on validation data and without training; each layer's f for the probe."""
    settings, model, augment = run.settings, run.model, run.val_augment
    if model.labels is not None:
        x1 = augment(x)
        G = [layer_goodness(model, x1, labels) for labels in (y, wrong_labels(y, run.classes, run.val_generator))]   # (L, B) each
        if settings["algo"] == "collab":
            G = [G_l + gammas(G_l) for G_l in G]
        return torch.stack([run.loss(g_pos, g_neg) for g_pos, g_neg in zip(*G)]), \
            [normalize(f) for f in encode_neutral(model, run.normalise(x))]             # as in `train_layers`
    views = 1 if settings["algo"] == "bp" else settings["views"]
    pooled = [torch.cat(outputs) for outputs in zip(*[encode(model, augment(x)) for _ in range(views)])]   # L x (2B, E)
    f, labels = [normalize(f_l) for f_l in pooled], y.repeat(views)
    if settings["algo"] == "bp":
        return cross_entropy(model.head(pooled[-1]), y)[None], f
    if settings["algo"] == "scl":
        return contrastive_loss(f[-1], labels, settings["temperature"])[None], f
    return torch.stack([marginal_contrastive_loss(f_l, labels, m, settings["temperature"]) for f_l, m in zip(f, run.margins)]), f


def head_epoch(run, optimizers, updates):
    """Stage 2: cross-entropy of the head on every batch of `updates`, then validation; (columns, validation loss)."""
    loss, n, val_loss = 0, 0, 0
    for x, y in updates:
        loss += len(y) * head_step(run.model, optimizers[0], x, y, run.augment)
        n += len(y)
    images, y = run.val
    run.val_generator.manual_seed(run.settings["seed"])
    for rows in torch.arange(len(y), device=run.device).split(run.settings["batch_size"]):
        with torch.no_grad():
            scores = run.model.head(features(run.model, run.val_augment(images[rows])))
        val_loss += cross_entropy(scores, y[rows], reduction="sum")
    row = {"train_loss_head": round((loss / n).item(), 6), "val_loss_head": round((val_loss / len(y)).item(), 6)}
    return row, row["val_loss_head"]


def set_rate(optimizers, rate):
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate


def train_stage(run, stage, optimizers, one_epoch, epochs, base_rate, warmup=0):
    """All epochs of a stage that are still to do, each with its row in the log and its checkpoint."""
    state, (images, y), settings = run.state, run.train, run.settings
    show_start(run, stage)
    steps = math.ceil(len(y) / settings["batch_size"])

    def plan():                                             # the updates of one epoch: learning rate, rows of the images
        order = torch.randperm(len(y), device=run.device, generator=run.generator)
        parts = batches(order, y, settings) if stage == 1 else order.split(settings["batch_size"])
        return [(learning_rate(state["epoch"] * steps + i, epochs * steps, settings, base_rate, warmup), rows)
                for i, rows in enumerate(parts)]

    def updates(planned):                                   # the batches of one epoch
        for i, (rate, rows) in enumerate(planned):
            set_rate(optimizers, rate)
            yield images[rows], y[rows]
            show_progress(run, stage, i + 1, steps, epochs, time.time() - start)

    while state["epoch"] < epochs:
        start, planned = time.time(), plan()
        if run.part:
            run.part.planned = broadcast([(rate, y[rows]) for rate, rows in planned], run.device)
        columns, val_loss = one_epoch(run, optimizers, updates(planned))
        state["epoch"] += 1
        row = {"stage": stage, "epoch": state["epoch"], **columns, "seconds": round(time.time() - start, 2)}
        best = val_loss < state["best"]
        if best:
            state["best"], state["best_epoch"] = val_loss, state["epoch"]
        state["log"].append(row)
        show_row(row, epochs)
        check_losses(run, row)
        run.save(optimizers, best)


def train(run, optimizer_states=()):
    """Both stages and the test, from the start or from where `run` stands; writes and returns the result."""
    settings, state, model = run.settings, run.state, run.model

    def take_up(optimizers):                                # where an interrupted run left them
        for optimizer, old in zip(optimizers, optimizer_states):
            optimizer.load_state_dict(old)
        return optimizers

    def take_best():                                        # the weights with the lowest validation loss
        model.load_state_dict(torch.load(run.folder / "best.pt", map_location=run.device, weights_only=True)["model"])

    if state["stage"] == 1:
        optimizers = take_up(make_optimizers((run.part or run).model, settings))
        train_stage(run, 1, optimizers, encoder_epoch, settings["epochs"], settings["lr"], settings["warmup"])
        if run.part:
            run.part = dismiss(run)
        take_best()
        state["encoder_epoch"] = state["best_epoch"]
        if two_stages(settings):
            state.update(stage=2, epoch=0, best=math.inf, best_epoch=0)
            optimizer_states = []
    if two_stages(settings):
        optimizers = take_up(make_optimizers(model, settings, stage=2))
        if state["epoch"] == 0:
            run.save(optimizers, best=False)                # the start of stage 2, should it stop before its first epoch
        train_stage(run, 2, optimizers, head_epoch, settings["head_epochs"], settings["head_lr"])
        take_best()
    seconds = sum(row["seconds"] for row in state["log"])
    result = {**{f"{part}_top{k}": value for part, data in (("test", run.test), ("val", run.val))
                 for k, value in accuracy(model, *data, run.normalise, settings).items()}, "metric": METRIC[settings["dataset"]],
              "best_epoch": state["encoder_epoch"], "best_head_epoch": state["best_epoch"] if two_stages(settings) else None,
              "seconds": round(seconds, 1), "peak_memory_mb": peak_memory(run.device)}
    write(run.folder / "result.json", lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    try:
        draw_curves(run)
    except ImportError:                                     # matplotlib is optional
        pass
    return result


# ------------------------------------------------------------------------------- the pipeline of layers (Sec. 5.1, Fig. 8)

def connect():
    """Join the processes that torchrun started; each has a GPU of its own if there are any."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # a process waits for the others as long as data are loaded or validated; torchrun ends the run if one dies
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=1))


def pack(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpack(data, device):
    return torch.load(io.BytesIO(data), map_location=device, weights_only=False)        # from our own processes alone


def broadcast(value, device):
    """In every process the first one's value, its tensors on `device`."""
    box = [pack(value)] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return unpack(box[0], device)


def gather(value, device):
    """In the first process a list of every process's value, tensors on `device`; None in the others."""
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(pack(value), values)
    return values and [unpack(data, device) for data in values]


def part_of(run):
    """A copy of `run` for the layers of this process: its model is a cff.Segment. A later process drops all other layers."""
    model, part = run.model, copy(run)
    if run.device.type == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        raise ValueError(f"{os.environ['LOCAL_WORLD_SIZE']} processes for {torch.cuda.device_count()} GPUs: start fewer, or use --device cpu")
    image, label = torch.zeros(1, *run.facts["image_shape"]), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        h = model.layers[0](model.patches(image.to(run.device), None if model.labels is None else label.to(run.device)))
    # FF, SymBa: true label, wrong label, and the neutral one for the probe
    part.model = segment = Segment(model, h.shape[1:], messages=run.settings["views"] if model.labels is None else 3)
    part.margins = run.margins and run.margins[segment.first:segment.end]
    if segment.rank > 0:
        part.augment = part.normalise = lambda y: y                 # where there are no images, their labels stand for them
    return part


def split_layers(run, optimizer_states):
    """In the first process: give each process its layers; returns the states of this one's optimizers."""
    run.part = part_of(run)
    broadcast((run.settings, run.facts, run.model.state_dict(), optimizer_states), run.device)
    return optimizer_states[:run.part.model.end]


def dismiss(run):
    """In the first process: let the later ones end, as stage 1 is over."""
    broadcast(None, run.device)
    dist.destroy_process_group()


def assist():
    """What a later process does: train its layers, epoch by epoch, as the first one says; it reads and writes no files."""
    connect()
    start = broadcast(None, "cpu")
    if start is not None:                                           # else stage 1 is over
        settings, facts, weights, states = start
        run = Run(settings, facts)
        run.model.load_state_dict(weights)
        part = part_of(run)
        optimizers = make_optimizers(part.model, settings)
        for optimizer, state in zip(optimizers, states[part.model.first:]):
            optimizer.load_state_dict(state)
        del start, run, weights, states

        def updates():
            for rate, y in part.planned:
                set_rate(optimizers, rate)
                yield y, y

        while planned := broadcast(None, part.device):
            part.planned = planned
            train_part(part, optimizers, updates())
    dist.destroy_process_group()


def train_part(part, optimizers, updates):
    """An epoch of `train_layers` in this process; in the first one, what all of them return."""
    segment = part.model
    with segment.epoch([len(y) for _, y in part.planned]):
        sums = train_layers(part, optimizers, segment.steps(updates))
    return gather(sums | {"layers": [layer.state_dict() for layer in segment.layers], "trace": segment.trace,
                          "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, part.device)


def piped_epoch(run, optimizers, updates):
    """In the first process: `train_layers` by all processes; takes up their weights and writes trace.csv (`Segment.trace`)."""
    parts = train_part(run.part, optimizers, updates)
    for layer, weights in zip(run.model.layers, (weights for part in parts for weights in part["layers"])):
        layer.load_state_dict(weights)
    run.later_states = [state for part in parts[1:] for state in part["optimizers"]]
    first = min(row[4] for part in parts for row in part["trace"])
    lines = [f"{process},{batch},{event},{waited_for},{start - first:.6f},{end - first:.6f}\n"
             for part in parts for process, batch, event, waited_for, start, end in part["trace"]]
    write(run.folder / "trace.csv", lambda path: path.write_text("process,batch,event,waited_for,start,end\n" + "".join(lines)))
    return {"n": parts[0]["n"], "probe": parts[-1]["probe"], "loss": torch.cat([part["loss"] for part in parts]),
            "saturated": torch.cat([part["saturated"] for part in parts]) if run.margins else 0}


# ------------------------------------------------------------------------------------------------------ what a run says

def collapse_value(n, settings, num_classes):
    """The loss of a layer that gives every image the same output, for n images in batches.

    Contrastive losses: mean of ln(rows - 1). SymBa: ln 2. FF, Collab: ln 2 as well, the least that equal goodness for true and
    wrong labels can have, at theta. BP: ln C.
    """
    if settings["algo"] in LABELS or settings["algo"] == "bp":
        return math.log(num_classes if settings["algo"] == "bp" else 2)
    sizes = [len(rows) for rows in torch.arange(n).split(settings["batch_size"])]
    return sum(size * math.log(max(1, settings["views"] * size - 1)) for size in sizes) / n


def check_losses(run, row):
    """End the run if a loss of this epoch's row is not a number; say so if after three epochs a layer has learned nothing."""
    bad = [column for column, value in row.items() if "loss" in column and not math.isfinite(value)]
    if bad:
        raise SystemExit(f"train.py: {', '.join(bad)} is not a number in epoch {row['epoch']}; a smaller --lr, with another "
                         "--out, may help")
    if row["stage"] == 1 and row["epoch"] == 3:
        value = collapse_value(len(run.train[1]), run.settings, run.classes)
        for column in (column for column in row if column.startswith("train_loss")):
            if abs(row[column] - value) < 0.01:
                print(f"Layer {column.split('_')[-1]} has collapsed: its loss {row[column]:.3f} is that of equal outputs for all "
                      f"images, {value:.3f}. Another --lr, a smaller --position-std, or a --warmup, may help.")


def show_start(run, stage):
    """What the run is, and what the columns of this stage's rows mean."""
    s, (train_n, val_n, test_n) = run.settings, run.facts["images"]
    if stage == 1:
        print(f"{s['algo']} with {s['model']} on {s['dataset']}: {train_n} training, {val_n} validation, {test_n} test images, "
              f"seed {s['seed']}, {run.device}; run folder {run.folder}\n"
              f"Stage 1: training loss of {'the last' if s['algo'] in ('scl', 'bp') else 'each'} layer | "
              + ("share of saturated pairs |R|/|P| in the first and the last layer | " if run.margins else "")
              + "validation loss of the last layer | validation accuracy of a linear probe on it"
              + (" (neutral label)" if s["algo"] in LABELS else ""))
    else:
        print("Stage 2, the linear head: training cross-entropy | validation cross-entropy")


def show_row(row, epochs):
    """One line an epoch."""
    train_losses = [value for column, value in row.items() if column.startswith("train_loss")]
    text = f"{row['epoch']:4d}/{epochs}  " + " ".join(f"{value:6.3f}" for value in train_losses)
    shares = [value for column, value in row.items() if column.startswith("train_saturated")]
    if shares:
        text += f" | {shares[0]:5.1%} {shares[-1]:5.1%}"
    text += f" | {[value for column, value in row.items() if column.startswith('val_loss')][-1]:6.3f}"
    if row["stage"] == 1:
        text += f" | {row['probe']:5.1f} %"
    clear = "\r\x1b[K" if sys.stdout.isatty() else ""
    print(f"{clear}{text}  {row['seconds']:6.1f} s", flush=True)


def show_progress(run, stage, step, steps, epochs, seconds):
    """A live line on a terminal; once, early in a run that will take long on a CPU, what it will take and what to do."""
    settings = run.settings
    left = seconds / step * (steps * (epochs - run.state["epoch"]) - step)
    if stage == 1 and run.state["epoch"] == 0 and step == min(3, steps) and run.device.type == "cpu":
        # an update of stage 2 is one forward pass, one of CFF a forward and a backward pass (twice the work) of each view
        total = left + two_stages(settings) * seconds / step * steps * settings["head_epochs"] / (3 * settings["views"])
        if total > 1800:
            smaller = "" if settings["model"].startswith("mlp") else "--model vit-64-4-4 --recipe short "
            print(f"This run will take about {total / 3600:.1f} hours on this CPU. A shorter one: the same command with {smaller}"
                  f"--limit {min(10000, len(run.train[1]))} --epochs 30 --head-epochs 10 --out runs/short")
    if sys.stdout.isatty():
        minutes, seconds = divmod(round(left), 60)
        print(f"\rstage {stage}, epoch {run.state['epoch'] + 1}/{epochs}, batch {step}/{steps}, "
              f"{minutes}:{seconds:02} left in this stage ", end="", flush=True)


# the palette of Okabe and Ito: told apart in print and with any colour vision
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def pyplot():
    """matplotlib's pyplot, drawing into files; ImportError that says what to install if it is not there."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def draw_curves(run):
    """curves.png in the run's folder: losses and the probe's accuracy by epoch of stage 1."""
    plt, log = pyplot(), [row for row in run.state["log"] if row["stage"] == 1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    epochs, dot = [row["epoch"] for row in log], "." * (len(log) == 1)          # of a single epoch there is no line to see
    names = [column.removeprefix("train_loss_") for column in log[0] if column.startswith("train_loss")]
    for number, l in enumerate(names):
        look = {"color": COLOURS[number % len(COLOURS)], "alpha": 1 / (1 + number // len(COLOURS)), "marker": dot}
        left.plot(epochs, [row[f"train_loss_{l}"] for row in log], label=f"layer {l}", **look)
        left.plot(epochs, [row[f"val_loss_{l}"] for row in log], "--", **look)
    left.set(xlabel="epoch", ylabel="loss (solid: training, dashed: validation)")
    left.legend(fontsize=8)
    right.plot(epochs, [row["probe"] for row in log], color="black", marker=dot)
    right.set(xlabel="epoch", ylabel="validation accuracy of the probe, %")
    right.grid(alpha=0.3)
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(run.folder.name, fontsize=10)
    figure.savefig(run.folder / "curves.png", dpi=100)
    plt.close(figure)


def main(argv=None):
    keep_memory()
    if int(os.environ.get("RANK", 0)) > 0 and not {"-h", "--help"} & set(sys.argv):
        return assist()
    try:
        settings, resume = parse(argv)
        if settings["pipeline"]:
            connect()
        run = Run(settings)
        optimizer_states = run.load() if resume else []
        if settings["pipeline"] and run.state["stage"] == 1:
            optimizer_states = split_layers(run, optimizer_states)
        elif settings["pipeline"]:
            dismiss(run)                                        # nothing is left to the later processes
        if not resume:
            run.start()
    except (OSError, ValueError, RuntimeError) as reason:       # data, model, folder or device that cannot be
        print(f"train.py: error: {str(reason).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        raise SystemExit("\nstopped before the first update")
    try:
        result = train(run, optimizer_states)
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped; go on with: python train.py --resume --out {run.folder}")
    print(f"test accuracy {result['test_top1']} % (top-5 {result['test_top5']} %, top-10 {result['test_top10']} %); "
          f"test it again: python eval.py {run.folder}")


if __name__ == "__main__":
    main()
