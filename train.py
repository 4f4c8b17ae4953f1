"""Train a network by Contrastive Forward-Forward or a method it is compared with (Section 4).

    python train.py                                  drawn images of ten shapes
    python train.py --dataset cifar10 --algo cffm    the paper's ViT[128 4 5], 600 + 50 epochs
    python train.py --dataset mnist --algo ff
    python train.py --resume --out runs/NAME         continue a run that was stopped

A run is a folder. checkpoint.pt holds the weights and everything that --resume needs. For people:
config.json (every setting), log.csv (one row per epoch) and result.json (test accuracy).
`python eval.py runs/NAME` evaluates a run.
"""
import argparse
import io
import json
import math
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from subprocess import list2cmdline     # its quotes work in cmd.exe, and in sh if there is no "$"
from timeit import timeit
from traceback import extract_tb
from types import SimpleNamespace

import torch
import torchvision
from torch.nn.functional import normalize, one_hot, pad
from torchvision.transforms import v2

from cff import (bp_loss, bp_step, cff_losses, cff_step, collab_step, encode, ff_losses, ff_step,
                 head_loss, head_step, predict, scl_loss, scl_step, wrong_labels)
from losses import ff_loss, margins, saturated, symba_loss
from vit import build_model, plain_name

# ---------------------------------------------------------------------------------------- settings

FROM_0, FROM_1 = (0, 10 ** 9), (1, 10 ** 9)
# name: (default, allowed values, meaning). Allowed is a list of choices or the smallest and largest
# number. Defaults come from the paper or, where it gives none, from its authors' code.
SETTINGS = {
    "dataset": ("shapes", ["shapes", "mnist", "cifar10", "cifar100", "tinyimagenet"], "the data"),
    "algo": ("cffm", ["cff", "cffm", "ff", "symba", "collab", "scl", "bp"], "the method"),
    "model": ("vit-128-4-5", None, '"ViT[E H L]" or "MLP[E L]", also written vit-E-H-L, mlp-E-L'),
    "recipe": ("none", ["none", "short", "tenth", "mlp"], "settings for less data, or for MLPs"),
    "data_dir": ("data", None, "folder of the data sets; what is missing there is downloaded"),
    "limit": (0, FROM_0, "training images to use, and a ninth as many for validation; 0: all"),
    "missing": (0.0, (0, 1), "fraction of training and validation images left out (Table 4)"),
    "label_noise": (0.0, (0, 1), "fraction of training and validation labels made wrong (Table 4)"),
    "augment": ("crop", ["none", "flip", "crop", "crop+randaug"], "crops also flip; MNIST never"),
    "padding": (4, FROM_0, "pixels added on each side of an image before its crop"),
    "fill": ("zeros", ["zeros", "edge"], "value of the added pixels: zero, or the nearest pixel"),
    "patch_size": (4, FROM_1, "side of a patch in pixels"),
    "pool": ("mean", ["mean", "token"], "losses see the mean (Eq. 13) or a class token (Table 5)"),
    "position_std": (1.0, FROM_0, "standard deviation of the initial position embedding"),
    "views": (2, [1, 2], "augmented views of each batch; 1 is one-forward (Table 6)"),
    "epochs": (600, FROM_1, "epochs of stage 1, the encoder"),
    "head_epochs": (50, FROM_1, "epochs of stage 2, the linear head"),
    "batch_size": (512, (2, 10 ** 9), "images in a batch, B"),
    "lr": (0.004, FROM_0, "learning rate of stage 1"),
    "head_lr": (0.0005, FROM_0, "learning rate of stage 2"),
    "weight_decay": (0.01, FROM_0, "weight decay of AdamW"),
    "warmup": (0, FROM_0, "updates in which the learning rate of stage 1 rises to --lr"),
    "schedule": ("constant", ["constant", "cosine"], "of the learning rate; cosine falls to 0"),
    "temperature": (0.15, (1e-6, 1e6), "tau of Eqs. 3 and 15"),
    "m0": (0.4, (0, 2), "margin of the first layer (Sec. 4.1)"),
    "mL": (0.1, (0, 2), "margin of the last layer"),
    "decay": ("linear", ["linear", "parabolic", "cosine", "exponential"], "how margins go to mL"),
    "threshold": (2.0, FROM_0, "theta of Eq. 2 (ff, collab)"),
    "alpha": (1.0, (1e-6, 1e6), "alpha of Eq. 7 (symba)"),
    "head": (False, None, "ff, symba, collab: predict by a head, trained in stage 2 (Table 2)"),
    "seed": (0, (0, 2 ** 63 - 1), "seed of the split, the weights and the training"),
    "precision": ("tf32", ["fp32", "tf32", "bf16"], "of matrix products; on a CPU tf32 is fp32"),
    "device": ("auto", ["auto", "cpu", "cuda", "mps"], "auto: cuda if there is one, else cpu"),
    "out": ("", None, "folder of the run; default: runs/ and a name made from the settings"),
}
DEFAULTS = {name: default for name, (default, _, _) in SETTINGS.items()}
# Defaults that differ by data set and by recipe; "RECIPE METHOD" is for one method only
BY_DATASET = {
    "shapes": dict(recipe="short", model="vit-64-4-3", patch_size=8, head_epochs=4),
    "mnist": dict(recipe="mlp", model="mlp-500-3", augment="none", views=1),
    "cifar100": dict(model="vit-192-6-6"),
    "tinyimagenet": dict(model="vit-240-6-7", patch_size=8, padding=6),
}
FF_ON_MLP = dict(lr=0.2, weight_decay=0.0, epochs=40)
RECIPES = {         # for the reasons see experiments/README.md
    "none bp": dict(lr=0.0005),                                     # from the authors' code
    "short": dict(epochs=30, head_epochs=10, batch_size=128, temperature=0.25, warmup=80,
                  position_std=0.02, schedule="cosine", head_lr=0.005),
    "short bp": dict(lr=0.002),
    "tenth": dict(model="vit-64-4-4", limit=5000, epochs=200, batch_size=128),
    "tenth scl": dict(lr=0.001),
    "mlp": dict(model="mlp-800-4", epochs=30, head_epochs=10, batch_size=128, temperature=0.07,
                lr=0.002, warmup=100, schedule="cosine", head_lr=0.005),
    "mlp ff": FF_ON_MLP, "mlp collab": FF_ON_MLP, "mlp symba": dict(FF_ON_MLP, lr=0.1, alpha=4.0),
    "mlp bp": dict(lr=0.0005),
}
METRIC = {"cifar100": "top5", "tinyimagenet": "top10"}      # top1 for all others (Section 4)
WITH_LABELS = ("ff", "symba", "collab")                     # methods whose images carry a label


# ---------------------------------------------------------------------------------------- training

def train(run):
    """Train the encoder (stage 1) and the head (stage 2) from where the run stopped; then test."""
    images, labels = run.train
    for stage in range(run.stage, stages(run.settings) + 1):
        if stage > run.stage:
            begin_stage(run, stage)
        if run.epoch < run.epochs:
            print_heading(run)
        while run.epoch < run.epochs:
            began, total, n = time.time(), 0, 0
            batches = batches_of(run, labels, shuffled=True)
            for i, rows in enumerate(batches):
                set_learning_rate(run, i)
                losses = train_on(run, images[rows], labels[rows])      # (L,), or a scalar
                total += len(rows) * losses
                n += len(rows)
                if sys.stdout and sys.stdout.isatty():                  # a live count
                    print(f"epoch {run.epoch + 1}, batch {i + 1}", end="\r", flush=True)
            end_epoch(run, total / n, validate(run), began)
        run.model.load_state_dict(run.best)             # the epoch with the lowest validation loss
    return test(run)


def stages(s):
    """2 if a head is trained on the frozen encoder. FF needs no head; BP trains it in stage 1."""
    return 2 if s.algo in ("cff", "cffm", "scl") or s.head else 1


def begin_stage(run, stage):
    """Set the method, epochs, rate and optimizers of stage 1 (encoder) or stage 2 (head)."""
    s, L = run.settings, len(run.model.layers)
    run.stage, run.epoch, run.best_loss = stage, 0, math.inf
    if stage == 1:
        run.method, run.epochs, run.lr, run.warmup = s.algo, s.epochs, s.lr, s.warmup
        run.names = [L] if s.algo in ("scl", "bp") else range(1, L + 1)     # in the log
    else:
        run.method, run.epochs, run.lr, run.warmup = "head", s.head_epochs, s.head_lr, 0
        run.names = ["head"]
    run.optimizers = make_optimizers(run.model, s, stage)


def make_optimizers(model, s, stage=1):
    """One AdamW per layer. SCL and BP have one for everything; stage 2 has one for the head."""
    modules = {"scl": [model.layers], "bp": [model]}.get(s.algo, model.layers)
    if stage == 2:
        modules = [model.head]
    lr = s.lr if stage == 1 else s.head_lr
    return [torch.optim.AdamW(module.parameters(), lr, weight_decay=s.weight_decay, fused=True)
            for module in modules]


def set_learning_rate(run, i):
    """Set the learning rate of batch i of the current epoch by --warmup and --schedule."""
    per_epoch = math.ceil(len(run.train[1]) / run.settings.batch_size)
    update = run.epoch * per_epoch + i
    lr = run.lr * min(1, (update + 1) / (run.warmup + 1))
    if run.settings.schedule == "cosine":
        lr *= (1 + math.cos(math.pi * update / (run.epochs * per_epoch))) / 2
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = lr


def batches_of(run, labels, shuffled):
    """A list of batches, each the row numbers of its images (B,). With one view a contrastive loss
    needs two images of a class: other batches are dropped. Raises ValueError if all are."""
    n = len(labels)
    order = torch.randperm(n, generator=run.generator) if shuffled else torch.arange(n)
    batches = order.to(labels.device).split(run.settings.batch_size)
    if run.method in ("cff", "cffm", "scl") and run.settings.views == 1:
        batches = [rows for rows in batches if len(labels[rows].unique()) < len(rows)]
        if not batches:
            raise ValueError("no batch has two images of a class: use more (--limit)")
    return batches


def train_on(run, x, y):
    """Train on one batch. Returns the loss of each layer (L,), or a scalar for SCL, BP and head."""
    s, model, optimizers, augment = run.settings, run.model, run.optimizers, run.augment
    if run.method in ("cff", "cffm"):
        return cff_step(model, optimizers, x, y, augment, run.margins, s.temperature, s.views)
    if run.method in ("ff", "symba"):
        return ff_step(model, optimizers, x, y, augment, run.goodness_loss, run.generator)
    if run.method == "collab":
        return collab_step(model, optimizers, x, y, augment, s.threshold, run.generator)
    if run.method == "scl":
        return scl_step(model, optimizers[0], x, y, augment, s.temperature, s.views)
    if run.method == "bp":
        return bp_step(model, optimizers[0], x, y, augment)
    return head_step(model, optimizers[0], x, y, augment)


def losses_on(run, x, y):
    """The losses that `train_on` would return, without training; random by val_generator."""
    s, model, augment = run.settings, run.model, run.val_augment
    if run.method in ("cff", "cffm"):
        return cff_losses(model, x, y, augment, run.margins, s.temperature, s.views)
    if run.method in WITH_LABELS:
        return ff_losses(model, x, y, augment, run.goodness_loss, run.val_generator,
                         collab=run.method == "collab")
    if run.method == "scl":
        return scl_loss(model, x, y, augment, s.temperature, s.views)
    if run.method == "bp":
        return bp_loss(model, x, y, augment)
    return head_loss(model, x, y, augment)


@torch.no_grad()
def validate(run):
    """Mean losses on validation images, (L,) or a scalar, with the same random views each time."""
    (images, labels), total, n = run.val, 0, 0
    run.val_generator.manual_seed(run.settings.seed)
    for rows in batches_of(run, labels, shuffled=False):
        total += len(rows) * losses_on(run, images[rows], labels[rows])
        n += len(rows)
    return total / n


def end_epoch(run, train_losses, val_losses, began):
    """Log and print the epoch, keep the weights if they are the best so far, and save the run."""
    train_losses, val_losses = train_losses.reshape(-1).tolist(), val_losses.reshape(-1).tolist()
    loss = choosing_loss(run.settings.algo, val_losses)
    run.epoch += 1
    row = {"stage": run.stage, "epoch": run.epoch}
    for part, losses in (("train", train_losses), ("val", val_losses)):
        row |= {f"{part}_loss_{name}": round(x, 6) for name, x in zip(run.names, losses)}
    if run.stage == 1:
        row |= measure(run)
    row["seconds"] = round(time.time() - began, 2)
    run.log.append(row)
    minutes = row["seconds"] * (run.epochs - run.epoch) / 60
    print_row([f"{run.epoch}/{run.epochs}", *(f"{x:.3f}" for x in train_losses), f"{loss:.3f}",
               row.get("probe", "-"), row["seconds"],
               f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"])
    if not all(map(math.isfinite, train_losses + val_losses)):
        raise SystemExit("train.py: a loss is not finite: try a smaller --lr, with a new --out")
    if loss < run.best_loss:
        run.best_loss = loss
        run.best = {name: weight.clone() for name, weight in run.model.state_dict().items()}
        if run.stage == 1:
            run.best_epoch = run.epoch
    save(run)


def choosing_loss(algo, val_losses):
    """The validation loss that selects the weights, from the loss of each layer: the last layer's
    or, for FF, SymBa and FF Collab, the sum over all layers except the first."""
    return sum(val_losses[1:] or val_losses) if algo in WITH_LABELS else val_losses[-1]


def print_heading(run):
    """Print the headings of the rows that `end_epoch` prints."""
    print_row(["epoch", *(f"loss {name}" for name in run.names),
               "val loss", "probe %", "seconds", "left"])


def print_row(cells):
    """Print one row with aligned columns."""
    print("".join(f"{cell:>10}" for cell in cells), flush=True)


# ------------------------------------------------------------------ what a network has learned

def measure(run, most=3000):
    """Columns of the log, from up to `most` images each of training and validation, not augmented:
    validation accuracy of a linear probe in % and, for CFF+M, each layer's |R|/|P| (Fig. 5)."""
    row, last = {}, {}
    for part, (images, y) in (("train", run.train), ("val", run.val)):
        f, y = [normalize(f_l) for f_l in layer_features(run, images[:most])], y[:most]
        last[part] = f[-1], y
        if run.settings.algo == "cffm":
            pairs = max(1, (y[:, None] == y).sum().item() - len(y))         # the sum of |P(i)|
            for l, (f_l, m) in enumerate(zip(f, run.margins), start=1):
                row[f"{part}_saturated_{l}"] = round(saturated(f_l, y, m).sum().item() / pairs, 6)
    return row | {"probe": round(probe(*last["train"], *last["val"], run.model.num_classes), 2)}


@torch.no_grad()
def layer_features(run, images):
    """Each layer's pooled output for n uint8 images, not augmented: L tensors (n, E)."""
    parts = [encode(run.model, run.normalise(part)) for part in images.split(500)]
    return [torch.cat(layer) for layer in zip(*parts)]


def probe(f, y, test_f, test_y, num_classes):
    """Fit a linear classifier to f (n, E), y by ridge regression; its accuracy in % on test_f."""
    f, y, test_f, test_y = (t.cpu() for t in (f, y, test_f, test_y))    # MPS has no float64
    X, test_X = (pad(f, (0, 1), value=1).double() for f in (f, test_f))         # (n, E + 1)
    ridge = 1e-6 * X.square().sum() * torch.eye(X.shape[1], dtype=X.dtype)
    W = torch.linalg.solve(X.T @ X + ridge, X.T @ one_hot(y, num_classes).double())
    return 100 * ((test_X @ W).argmax(dim=1) == test_y).double().mean().item()


def accuracy(model, images, y, normalise, s):
    """Top-k accuracy in % on uint8 images, {1: ..., 5: ..., 10: ...}, for each k that is at most
    the number of classes."""
    scores = [predict(model, normalise(x), s.algo, s.head) for x in images.split(500)]
    tops = [k for k in (1, 5, 10) if k <= model.num_classes]
    right = torch.cat(scores).topk(tops[-1]).indices == y[:, None]          # (n, k), best first
    return {k: round(100 * right[:, :k].any(dim=1).float().mean().item(), 2) for k in tops}


# ---------------------------------------------------------------------------------------- the data

def load_data(dataset, folder):
    """(train images, train labels, test images, test labels): uint8 (n, C, H, W) and int64 (n,).
    Downloads absent files into `folder`. Raises OSError with one line if that fails."""
    if dataset == "shapes":
        return *draw_shapes(10000, seed=1), *draw_shapes(2000, seed=2)
    try:
        if dataset == "tinyimagenet":
            return load_tiny_imagenet(Path(folder))
        kind, data = getattr(torchvision.datasets, dataset.upper()), []
        for part in (kind(folder, train=True, download=True), kind(folder, train=False)):
            images = torch.as_tensor(part.data)                 # (n, H, W) or (n, H, W, 3)
            images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
            data += [images.contiguous(), torch.as_tensor(part.targets)]
        return data
    except Exception as reason:         # no network, a damaged file, another layout, ...
        reason = (str(reason) or type(reason).__name__).splitlines()[0]
        raise OSError(f"{dataset} could not be loaded from --data-dir {folder} ({reason}); "
                      "README.md says what belongs there; --dataset shapes needs nothing")


def load_tiny_imagenet(folder):
    """Tiny ImageNet as in `load_data`; its labelled validation images are the test set."""
    root, data = folder / "tiny-imagenet-200", []
    if not root.exists():
        url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
        torchvision.datasets.utils.download_and_extract_archive(
            url, folder, md5="90528d7ca1a48142e341f4ef8d21d0de")
    training = torchvision.datasets.ImageFolder(root / "train")
    lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
    test = [(root / "val" / "images" / file, training.class_to_idx[name])
            for file, name in (line.split("\t")[:2] for line in lines)]
    for files in (training.samples, test):
        images = [v2.functional.pil_to_tensor(training.loader(path)) for path, _ in files]  # RGB
        data += [torch.stack(images), torch.tensor([label for _, label in files])]
    return data


def bar(x, y, width, height):       # signed distance to a rectangle of 2 width x 2 height
    return torch.maximum(x.abs() - width, y.abs() - height)


SHAPES = {          # class: signed distance to its outline in radii, negative inside
    "disc": lambda x, y: torch.hypot(x, y) - 0.85,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.2,
    "square": lambda x, y: bar(x, y, 0.72, 0.72),
    "triangle": lambda x, y: torch.maximum(0.866 * x.abs() + 0.5 * y, -y) - 0.45,
    "plus": lambda x, y: torch.minimum(bar(x, y, 0.25, 0.95), bar(x, y, 0.95, 0.25)),
    "star": lambda x, y: 0.6 * (torch.hypot(x, y) - 0.62 - 0.33 * (5 * torch.atan2(y, x)).cos()),
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.95, 0.75 - (x - 0.45).hypot(y)),
    "half": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.95, -0.2 - y),
    "tee": lambda x, y: torch.minimum(bar(x, y - 0.55, 0.85, 0.25), bar(x, y, 0.25, 0.8)),
    "bars": lambda x, y: bar(x, y.abs() - 0.5, 0.85, 0.2),
}


def draw_shapes(n, seed):
    """n images uint8 (n, 3, 32, 32), n a multiple of 10, and labels (n,), the classes in turn. Two
    rectangles lie behind each shape. Everything is random except the outlines."""
    generator = torch.Generator().manual_seed(seed)
    images = [draw_some(min(1000, n - start), generator) for start in range(0, n, 1000)]
    return torch.cat(images), torch.arange(n) % 10


def draw_some(n, generator):
    """n images of `draw_shapes`."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")

    def rand(low, high, channels=1):        # one number per image, or per image and channel
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)

    def paint(image, sizes, room, colour, outline):
        radius, turn = rand(*sizes), rand(0, 2 * math.pi)
        x, y = ((axis - 15.5 - room * rand(-1, 1)) / radius for axis in (columns, rows))
        x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
        colour, distance = colour(), outline(x, y)  # random numbers in this order
        return image.lerp(colour, (0.5 - distance * radius).clamp(0, 1))  # the covered part

    def by_class(x, y):                     # image i has the class i % 10
        distances = [outline(x[c::10], y[c::10]) for c, outline in enumerate(SHAPES.values())]
        return torch.stack(distances, dim=1).flatten(0, 1)

    back = rand(0, 0.5, 3)
    image = back.expand(n, 3, 32, 32)
    for _ in range(2):
        image = paint(image, (1.5, 4), 13, colour=lambda: rand(0, 1, 3),
                      outline=lambda x, y: bar(x, y, 1, rand(0.2, 1)))
    image = paint(image, (8, 13), 3.5, colour=lambda: back + rand(0.3, 0.7, 3), outline=by_class)
    image = image + 0.03 * torch.randn(n, 3, 32, 32, generator=generator)
    return (image.clamp(0, 1) * 255).to(torch.uint8)


def split(images, labels, s, num_classes):
    """Split at random, by the seed, into 90 % training and 10 % validation: a list of two pairs
    (images, labels). Then apply --limit, --missing and --label-noise to both. Raises ValueError."""
    g = torch.Generator().manual_seed(s.seed)
    order, parts = torch.randperm(len(labels), generator=g), []
    val, train = order[:len(order) // 10], order[len(order) // 10:]
    limit = s.limit or len(train)
    if limit > len(train):
        raise ValueError(f"--limit {limit}: there are {len(train)} training images")
    for part in (train[:limit], val[:limit // 9]):
        part = part[:round(len(part) * (1 - s.missing))]
        if not len(part):
            raise ValueError("no training or no validation images are left: use more (--limit)")
        y = labels[part]
        wrong = torch.randperm(len(y), generator=g)[:round(len(y) * s.label_noise)]
        y[wrong] = wrong_labels(y[wrong], num_classes, g)
        parts.append((images[part], y))
    return parts


# ------------------------------------------------------------------------------------ augmentation

def rand_augment(images, generator, num_ops=3, magnitude=14, groups=28):
    """torchvision's RandAugment [45] of uint8 images (B, C, H, W). torchvision makes one random
    choice per call, for all its images. So for each of the num_ops operations the batch is split
    at random into up to `groups` groups, and each group has its own choice. Fewer are faster."""
    draw, images = v2.RandAugment(1, magnitude), images.clone()
    with torch.random.fork_rng(devices=[]):             # torchvision has no generator of its own
        torch.default_generator.manual_seed(torch.randint(2 ** 31, (), generator=generator).item())
        for _ in range(num_ops):
            order = torch.randperm(len(images)).to(images.device, non_blocking=images.is_cuda)
            images[order] = torch.cat([draw(images[rows]) for rows in order.chunk(groups)])
    return images


def make_augment(kind, padding, mean, std, generator, flip=True, fill="zeros"):
    """A function augment(images): uint8 (B, C, H, W) -> a new random view, normalised. `kind` is
    --augment. Random numbers are drawn on the CPU, so they are the same on every device."""
    mean, std, shifts = torch.tensor(mean), torch.tensor(std), 2 * padding + 1

    def augment(images):
        B, _, H, W = images.shape
        there = dict(device=images.device, non_blocking=images.is_cuda)     # unsafe on MPS
        if "randaug" in kind:
            images = rand_augment(images, generator)
        if "crop" in kind:                                  # a random window of the padded image
            mode = "edge" if fill == "edge" else "constant"
            padded = v2.functional.pad(images, padding, padding_mode=mode)
            windows = padded.unfold(2, H, 1).unfold(3, W, 1)        # (B, C, shifts, shifts, H, W)
            rows, columns = torch.randint(shifts, (2, B), generator=generator).to(**there)
            images = windows[torch.arange(B, device=images.device), :, rows, columns]
        if flip and kind != "none":                         # each with probability 1/2
            mirror = (torch.rand(B, 1, 1, 1, generator=generator) < 0.5).to(**there)
            images = torch.where(mirror, images.flip(3), images)
        shift, scale = (c[:, None, None].to(**there) for c in (mean, std))
        return (images.float() / 255 - shift) / scale

    return augment


# ------------------------------------------------------------------------------------- runs on disk

PROGRESS = ("epoch", "best", "best_loss", "best_epoch", "log")      # what changes by epoch


def make_run(s, saved=None):
    """A run as plain data: settings, images, model, optimizers, random state and progress. With a
    checkpoint it continues from there. Raises OSError or ValueError with one line if the data, a
    size or the device cannot be used."""
    device = find_device(s.device)
    images, labels, *test_set = load_data(s.dataset, s.data_dir)
    classes = int(labels.max()) + 1
    parts = [*split(images, labels, s, classes), test_set]
    channels = [torch.std_mean(c / 255, correction=0) for c in parts[0][0].unbind(1)]
    std, mean = torch.tensor(channels).T.tolist()
    data = {"image_shape": list(images.shape[1:]), "num_classes": classes, "mean": mean,
            "std": std, "images": [len(y) for _, y in parts]}
    if saved and saved["data"]["images"] != data["images"]:
        raise ValueError(f"the run began with {saved['data']['images']} images (training, "
                         f"validation, test), but {s.data_dir} has {data['images']}")
    torch.manual_seed(s.seed)
    model = make_model(s, data).to(device)
    L = len(model.layers)
    run = SimpleNamespace(
        settings=s, folder=Path(s.out), data=data, device=device, model=model,
        margins=margins(s.m0, s.mL, L, s.decay) if s.algo == "cffm" else L * [0.0],
        goodness_loss=(partial(symba_loss, alpha=s.alpha) if s.algo == "symba"
                       else partial(ff_loss, threshold=s.threshold)),
        generator=torch.Generator().manual_seed(s.seed), val_generator=torch.Generator(),
        best=None, best_epoch=0, log=[])
    run.train, run.val, run.test = ([t.to(device) for t in part] for part in parts)
    view = partial(make_augment, s.augment, s.padding, mean, std, fill=s.fill,
                   flip=s.dataset != "mnist")               # mirrored digits are no digits
    run.augment, run.val_augment = view(run.generator), view(run.val_generator)
    run.normalise = make_augment("none", 0, mean, std, None)
    begin_stage(run, saved["stage"] if saved else 1)
    batches_of(run, run.val[1], shuffled=False)             # ValueError if there would be none
    if saved:
        for name in PROGRESS:
            setattr(run, name, saved[name])
        run.generator.set_state(saved["generator"])
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(run.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
    return run


def find_device(name="auto"):
    """The device that --device names; raises ValueError if torch does not find it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.get_device_module(name).is_available():
        raise ValueError(f"--device {name}: torch finds no such device here")
    return torch.device(name)


def make_model(s, data):
    """The untrained model for these settings; `data` has its `image_shape` and `num_classes`."""
    torch.set_float32_matmul_precision("high" if s.precision == "tf32" else "highest")
    vit, labels, options = plain_name(s.model).startswith("vit"), None, {}
    if s.algo in WITH_LABELS:
        labels = "patch" if vit else "random" if s.algo == "symba" else "one-hot"
    if vit:
        options = dict(patch_size=s.patch_size, pool=s.pool, position_std=s.position_std)
    model = build_model(s.model, data["image_shape"], data["num_classes"], labels, **options)
    if s.precision == "bf16":
        for layer in model.layers:
            layer.forward = partial(in_bf16, layer.forward)
    return model


def in_bf16(forward, x):
    """A layer's forward with products in bfloat16; weights, output and losses stay float32."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return forward(x).float()


def start(run):
    """Take a new or empty folder, so that no other run can use it. Write config.json: settings,
    data, versions, device. Raises OSError for a folder with files."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if any(run.folder.iterdir()):
        raise FileExistsError(f"{run.folder} holds files: use --resume, or another --out")
    chip = torch.cuda.get_device_name() if run.device.type == "cuda" else platform.machine()
    config = {"command": list2cmdline(["python", *sys.argv]), "settings": vars(run.settings),
              "data": run.data, "threads": torch.get_num_threads(), "device": chip,
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "torchvision": torchvision.__version__}}
    with open(run.folder / "config.json", "x") as file:             # fails if there is one
        file.write(json.dumps(config, indent=1) + "\n")
    save(run)


def save(run):
    """Write checkpoint.pt, all that --resume and eval.open_run need, and log.csv, for people."""
    write(run.folder / "checkpoint.pt", pack({
        **{name: getattr(run, name) for name in PROGRESS}, "stage": run.stage,
        "settings": vars(run.settings), "data": run.data, "threads": torch.get_num_threads(),
        "generator": run.generator.get_state(), "model": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers]}))
    columns = list(dict.fromkeys(column for row in run.log for column in row))
    rows = [columns, *([str(row.get(column, "")) for column in columns] for row in run.log)]
    try:
        write(run.folder / "log.csv", "".join(",".join(row) + "\n" for row in rows).encode())
    except PermissionError:                         # Windows, while another program has it open
        print("log.csv is open in another program; a later epoch can still write it")


def test(run):
    """Measure the accuracy on test and validation images; write it to result.json; return it."""
    s, result = run.settings, {}
    for part, (images, y) in (("test", run.test), ("val", run.val)):
        found = accuracy(run.model, images, y, run.normalise, s)
        result |= {f"{part}_top{k}": value for k, value in found.items()}
    result |= {"metric": METRIC.get(s.dataset, "top1"), "best_epoch": run.best_epoch,
               "seconds": round(sum(row["seconds"] for row in run.log), 1)}
    write(run.folder / "result.json", json.dumps(result, indent=1).encode())
    tops = [f"top-{name[8:]} {value} %" for name, value in result.items() if "test_top" in name]
    print(f"test accuracy: {', '.join(tops)}; more: {list2cmdline(['python', 'eval.py', s.out])}")
    return result


def pack(value):
    """The bytes that torch saves for a value."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def read(path):
    """Read a checkpoint as a dict. Raises OSError with one line if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:             # missing, damaged, no checkpoint: many errors
        raise OSError(f"{path} cannot be read ({type(reason).__name__})")


def write(path, data):
    """Replace the file `path` by bytes in one step, so that it is never half-written. A full disk
    raises OSError, while torch.save to a file would raise others."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)               # incomplete if the disk is full


# ------------------------------------------------------------------------------------ command line

def defaults(dataset, algo, recipe=None):
    """All settings as a dict, as they are without flags. recipe: by default the data set's."""
    s, own = dict(DEFAULTS), BY_DATASET.get(dataset, {})
    recipe = recipe or own.get("recipe", "none")
    for name in (f"none {algo}", recipe, f"{recipe} {algo}"):       # later ones win
        s |= RECIPES.get(name, {})
    return s | own | {"dataset": dataset, "algo": algo, "recipe": recipe}


def parse(argv=None):
    """(settings, None), or with --resume (settings, checkpoint). Bad flags end with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [--FLAG VALUE ...]; --help lists the flags",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)
    for name, (default, allowed, meaning) in SETTINGS.items():
        kind = dict(action="store_true") if default is False else dict(
            type=plain_name if name == "model" else type(default),
            choices=allowed if isinstance(allowed, list) else None)
        parser.add_argument("--" + name.replace("_", "-"), help=meaning + " [%(default)s]", **kind)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    argv = sys.argv[1:] if argv is None else argv
    typed = vars(parser.parse_args([word for word in argv if word not in ("-h", "--help")]))
    if typed.pop("resume", False) and not {"-h", "--help"} & set(argv):
        typed.setdefault("out", ".")                    # without --out: the current folder
        try:
            saved = read(Path(typed["out"]) / "checkpoint.pt")
            s = DEFAULTS | saved["settings"]
        except (OSError, LookupError, TypeError) as reason:         # no checkpoint of this program
            parser.error(f"no run to resume: {reason}")
        changed = {name for name in typed if s[name] != typed[name]} - {"out", "data_dir", "device"}
        if changed:
            parser.error(f"--resume keeps the run's settings: {', '.join(changed)} cannot change")
        return SimpleNamespace(**s | typed), saved
    chosen = [typed.get(name, DEFAULTS[name]) for name in ("dataset", "algo")]
    s = defaults(*chosen, typed.get("recipe")) | typed
    parser.set_defaults(**s)
    parser.parse_args(argv)                             # --help ends here, with these defaults
    for name, (_, allowed, _) in SETTINGS.items():
        if isinstance(allowed, tuple) and not allowed[0] <= s[name] <= allowed[1]:
            parser.error(f"{name} must lie in {allowed[0]}..{allowed[1]}; got {s[name]}")
    if s["recipe"] == "mlp" and not s["model"].startswith("mlp"):
        parser.error(f"recipe mlp is not for {s['model']}: add --model mlp-800-4")
    if s["head"] and s["algo"] not in WITH_LABELS:
        parser.error(f"--head is for ff, symba and collab, not {s['algo']}")
    if not s["out"]:
        known = ("dataset", "algo", "model", "seed", "data_dir", "device", "out")
        others = [name.replace("_", "") + str(typed[name]) for name in typed if name not in known]
        s["out"] = "runs/" + "-".join([*(s[name] for name in known[:3]), *others, f"s{s['seed']}"])
    return SimpleNamespace(**s), None


def set_threads(device, saved):
    """Give a resumed run as many threads as before, so that its results stay the same bit for bit.
    Give a new run one thread if that is faster: on a busy CPU threads wait for each other."""
    threads, matrix = torch.get_num_threads(), torch.ones(512, 512)

    def seconds(n):
        torch.set_num_threads(n)
        return timeit(lambda: matrix @ matrix, number=50)

    if saved and "OMP_NUM_THREADS" not in os.environ:
        threads = min(saved["threads"], os.cpu_count())
    if not saved and device.type == "cpu" and threads > 1 and seconds(threads) > 1.2 * seconds(1):
        print(f"the CPU is busy: using one thread, which is now faster than {threads} threads")
        threads = 1
    torch.set_num_threads(threads)


def main(argv=None):
    """Train as the flags say; returns the result. Wrong settings, missing data and a full disk end
    with one line; in `make_run` and `start` it names a line of code. Other errors: a traceback."""
    s, saved = parse(argv)
    try:
        run = make_run(s, saved)
        set_threads(run.device, saved)
        if not saved:
            start(run)
    except (OSError, ValueError) as reason:     # a bug can raise these too, so name its place
        place = [line for line in extract_tb(reason.__traceback__)
                 if Path(line.filename).parent == Path(__file__).parent][-1]
        raise SystemExit(f"{Path(place.filename).name}, line {place.lineno}: error: {reason}")
    print(f"{s.algo} with {s.model} on {s.dataset}, seed {s.seed}, in {s.out}; "
          f"threads: {torch.get_num_threads()}", flush=True)
    try:
        return train(run)
    except (KeyboardInterrupt, OSError) as reason:      # Ctrl-C has no message
        command = list2cmdline(["python", "train.py", "--resume", "--out", s.out])
        raise SystemExit(f"{str(reason) or 'stopped'}; continue with: {command}")
    except Exception:
        if not run.log:                                 # the folder is free for the next try
            for name in ("config.json", "checkpoint.pt", "log.csv"):
                (run.folder / name).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")            # a terminal may lack a letter of --out
    main()
