"""Train a network by Contrastive Forward-Forward or a method it is compared with (Section 4).

    python train.py                                  ten drawn shapes, nothing to download
    python train.py --dataset cifar10 --algo cffm    the paper's ViT[128 4 5], 600 + 50 epochs
    python train.py --dataset cifar10 --algo cffm --model vit-64-4-4 --limit 10000 --recipe short
    python train.py --dataset mnist --algo ff --recipe mlp
    python train.py --resume --out runs/NAME         go on where a run stopped

A run is a folder: config.json (every setting), log.csv (a row an epoch), best.pt (the weights),
last.pt (where --resume goes on), result.json (test accuracy). `python eval.py runs/NAME` reads it.
"""
import argparse
import json
import math
import os
import platform
import signal
import sys
import time
from functools import partial
from pathlib import Path
from shlex import quote
from timeit import timeit
from types import SimpleNamespace

import torch
import torchvision
from filelock import FileLock, Timeout          # torch itself needs it
from torch.nn.functional import normalize, one_hot, pad
from torchvision.transforms import v2

from cff import (bp_step, cff_step, collab_step, encode, ff_step, head_step, predict, scl_step,
                 wrong_labels)
from losses import ff_loss, margins, saturated, symba_loss
from vit import build_model, plain_name

# ---------------------------------------------------------------------------------------- settings

FROM_0, FROM_1 = (0, math.inf), (1, math.inf)
# name: (default, what it may be, meaning); a list holds the choices, a pair the least and the most.
# Defaults are the paper's or, where it is silent, those of its authors' code.
SETTINGS = {
    "dataset": ("shapes", ["shapes", "mnist", "cifar10", "cifar100", "tinyimagenet"], "the data"),
    "algo": ("cffm", ["cff", "cffm", "ff", "symba", "collab", "scl", "bp"], "the method"),
    "model": ("vit-128-4-5", None, '"ViT[E H L]" or "MLP[E L]", also written vit-E-H-L, mlp-E-L'),
    "recipe": ("none", ["none", "short", "tenth", "mlp"], "settings for less data, or for MLPs"),
    "data_dir": ("data", None, "folder of the data sets; what is missing there is downloaded"),
    "limit": (0, FROM_0, "training images to use, and a ninth of it for validation; 0 is all"),
    "missing": (0.0, (0, 1), "fraction of training and validation images left out (Table 4)"),
    "label_noise": (0.0, (0, 1), "fraction of training and validation labels made wrong (Table 4)"),
    "augment": ("crop", ["none", "flip", "crop", "crop+randaug"], "crop flips too; MNIST never"),
    "padding": (4, FROM_0, "pixels put around an image before its crop"),
    "fill": ("zeros", ["zeros", "edge"], "what these pixels are: zeros, or the image's edge again"),
    "patch_size": (4, FROM_1, "side of a patch in pixels"),
    "pool": ("mean", ["mean", "token"], "what a loss sees: mean (Eq. 13) or class token (Table 5)"),
    "position_std": (1.0, FROM_0, "standard deviation of the position embedding at the start"),
    "views": (2, [1, 2], "augmented views of a batch; 1 is one-forward (Table 6)"),
    "epochs": (600, FROM_1, "epochs of stage 1, the encoder"),
    "head_epochs": (50, FROM_1, "epochs of stage 2, the linear head"),
    "batch_size": (512, (2, math.inf), "images in a batch, B"),
    "lr": (0.004, FROM_0, "learning rate of stage 1"),
    "head_lr": (0.0005, FROM_0, "learning rate of stage 2"),
    "weight_decay": (0.01, FROM_0, "weight decay of AdamW"),
    "warmup": (0, FROM_0, "updates in which the learning rate of stage 1 rises to --lr"),
    "schedule": ("constant", ["constant", "cosine"], "learning rate; cosine falls to 0"),
    "temperature": (0.15, (1e-6, math.inf), "tau of Eqs. 3 and 15"),
    "m0": (0.4, (0, 2), "margin of the first layer (Sec. 4.1)"),
    "mL": (0.1, (0, 2), "margin of the last layer"),
    "decay": ("linear", ["linear", "parabolic", "cosine", "exponential"], "margins between them"),
    "threshold": (2.0, FROM_0, "theta of Eq. 2 (ff, collab)"),
    "alpha": (1.0, (1e-6, math.inf), "alpha of Eq. 7 (symba)"),
    "head": (False, None, "ff, symba, collab: predict by a head, trained in stage 2 (Table 2)"),
    "plain": (False, None, "no short cut through a layer's work (vit.LocalLossLayer)"),
    "seed": (0, None, "of the validation split, the weights and every draw"),
    "precision": ("tf32", ["fp32", "tf32", "bf16"], "tf32: all products on a GPU; bf16: layers'"),
    "device": ("auto", ["auto", "cpu", "cuda", "mps"], "auto: a GPU if there is one; mps: untried"),
    "out": ("", None, "folder of the run; if not given, runs/ and a name made of the settings"),
}
DEFAULTS = {name: default for name, (default, _, _) in SETTINGS.items()}
# What differs by recipe, then by data set; what is typed comes last.
BY_DATASET = {
    "shapes": dict(recipe="short", model="vit-64-4-3", patch_size=8, head_epochs=4),
    "mnist": dict(model="mlp-500-3", augment="none"),
    "cifar100": dict(model="vit-192-6-6"),
    "tinyimagenet": dict(model="vit-240-6-7", patch_size=8, padding=6),
}
FF_ON_MLP = dict(lr=0.2, weight_decay=0.0, epochs=40)
RECIPES = {         # found here (experiments/README.md); "RECIPE METHOD": what it has instead
    "none bp": dict(lr=0.0005),                                     # the authors' code's
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
METRIC = {"cifar100": "top5", "tinyimagenet": "top10"}      # of the others top1 (Section 4)
WITH_LABELS = ("ff", "symba", "collab")                     # methods whose images carry a label


# ---------------------------------------------------------------------------------------- training

def train(run):
    """Stage 1, the encoder, and stage 2, the head, from where `run` stands; then the test."""
    s, state = run.settings, run.state
    while state["stage"] <= stages(s):
        step = make_step(s, run.model, run.optimizers, run.augment, run.generator, state["stage"])
        while state["epoch"] < s["epochs" if state["stage"] == 1 else "head_epochs"]:
            start, total, n = time.time(), 0, 0
            for x, y in batches(run):
                losses = step(x, y)                     # (L,); SCL's, BP's and the head's a scalar
                total += len(y) * losses
                n += len(y)
            end_epoch(run, total / n, validate(run), start)
        run.end_stage()
    return run.test_model()


def stages(s):
    """2 where a head is trained on the frozen encoder; FF needs none, and BP has trained it."""
    return 2 if s["algo"] in ("cff", "cffm", "scl") or s["head"] else 1


def make_step(s, model, optimizers, augment, generator, stage=1):
    """step(x, y): trains on one batch by the settings s; returns the losses, (L,) or a scalar."""
    ff = partial(ff_step, model, optimizers, augment=augment, generator=generator)
    of_views = dict(augment=augment, temperature=s["temperature"], views=s["views"])
    cff = partial(cff_step, model, optimizers, margins=layer_margins(s, model), **of_views)
    steps = {
        "cff": cff, "cffm": cff,
        "ff": partial(ff, loss=partial(ff_loss, threshold=s["threshold"])),
        "symba": partial(ff, loss=partial(symba_loss, alpha=s["alpha"])),
        "collab": partial(collab_step, model, optimizers, augment=augment,
                          threshold=s["threshold"], generator=generator),
        "scl": partial(scl_step, model, optimizers[0], **of_views),
        "bp": partial(bp_step, model, optimizers[0], augment=augment),
        "head": partial(head_step, model, optimizers[0], augment=augment),
    }
    return steps[s["algo"] if stage == 1 else "head"]


def layer_margins(s, model):
    """The margin of each layer, 0 but with cffm."""
    L = len(model.layers)
    return margins(s["m0"], s["mL"], L, s["decay"]) if s["algo"] == "cffm" else L * [0.0]


def make_optimizers(model, s, stage=1):
    """An AdamW for each layer; SCL and BP have one for all they train, stage 2 one for the head."""
    modules = {"scl": [model.layers], "bp": [model]}.get(s["algo"], model.layers)
    return [torch.optim.AdamW(module.parameters(), weight_decay=s["weight_decay"], fused=True)
            for module in ([model.head] if stage == 2 else modules)]    # batches() sets the rate


def batches(run):
    """The training batches (x, y) of the next epoch, the learning rate set for each."""
    images, y = run.train
    for rate, rows in plan(run):
        for optimizer in run.optimizers:
            optimizer.param_groups[0]["lr"] = rate
        yield images[rows], y[rows]


def plan(run):
    """The updates of the next epoch, in a new random order: (learning rate, rows) of each batch."""
    s, y, stage, parts, updates = run.settings, run.train[1], run.state["stage"], [], []
    epochs, base, warmup = ((s["epochs"], s["lr"], s["warmup"]) if stage == 1
                            else (s["head_epochs"], s["head_lr"], 0))
    while not parts:                                    # another order, if no batch has a pair
        order = torch.randperm(len(y), generator=run.generator)
        parts = cut(order.to(y.device), y, s, stage)
    per_epoch = math.ceil(len(y) / s["batch_size"])
    for i, rows in enumerate(parts):
        t = run.state["epoch"] * per_epoch + i          # this update's number, from 0
        rate = base * min(1, (t + 1) / (warmup + 1))
        if s["schedule"] == "cosine":
            rate *= (1 + math.cos(math.pi * t / (epochs * per_epoch))) / 2
        updates.append((rate, rows))
    return updates


def cut(order, y, s, stage=1):
    """Rows `order` in batches; a contrastive loss of one view leaves out those without a pair."""
    parts = order.split(s["batch_size"])
    if stage == 1 and s["views"] == 1 and s["algo"] in ("cff", "cffm", "scl"):
        parts = [rows for rows in parts if len(y[rows].unique()) < len(rows)]
    return parts


def validate(run):
    """The mean losses, (L,) or a scalar, on validation data: of training steps whose optimizers do
    nothing, so that no loss needs a second function; the next training step's zero_grad drops the
    gradients. The same draws every epoch."""
    s, stage, (images, y), total = run.settings, run.state["stage"], run.val, 0
    here = run.generator.get_state()
    run.generator.manual_seed(s["seed"])
    frozen = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
    step = make_step(s, run.model, len(run.model.layers) * [frozen], run.augment, run.generator,
                     stage)
    parts = cut(torch.arange(len(y), device=y.device), y, s, stage)
    for rows in parts:
        total += len(rows) * step(images[rows], y[rows])
    run.generator.set_state(here)
    return total / sum(map(len, parts))


def end_epoch(run, train_loss, val_loss, start):
    """Write the epoch's row of the log, keep the weights if they are the best so far, and save."""
    state, L = run.state, len(run.model.layers)
    fit, val = train_loss.reshape(-1).tolist(), val_loss.reshape(-1).tolist()
    layers = range(L + 1 - len(val), L + 1) if state["stage"] == 1 else ["head"]   # SCL, BP: L
    state["epoch"] += 1
    row = {"stage": state["stage"], "epoch": state["epoch"]}
    for name, losses in (("train_loss", fit), ("val_loss", val)):
        row |= {f"{name}_{l}": round(loss, 6) for l, loss in zip(layers, losses)}
    text = "head" if state["stage"] == 2 else ""
    text += f"{row['epoch']:4d} " + "".join(f" {loss:6.3f}" for loss in fit) + f" | {val[-1]:6.3f}"
    if state["stage"] == 1:
        row |= measure(run)
        text += f" | {row['probe']:5.1f} %"
    row["seconds"] = round(time.time() - start, 2)
    print(f"{text}  {row['seconds']:6.1f} s", flush=True)
    if not all(map(math.isfinite, fit + val)):
        raise SystemExit("train.py: a loss is not a number; try a smaller --lr, with another --out")
    loss = choosing_loss(run.settings["algo"], val)
    best = loss < state["best"]
    if best:
        state["best"] = loss
        if state["stage"] == 1:
            state["best_epoch"] = state["epoch"]
    state["log"].append(row)
    run.save(best)


def choosing_loss(algo, val):
    """What is least in the epoch whose weights are kept, of its validation losses by layer: that of
    the last layer; of FF, SymBa and FF Collab the sum over the layers but the first."""
    return sum(val[1:] or val) if algo in WITH_LABELS else val[-1]


def warn_if_crowded(run):
    """Say what to type where all threads together are slower than one: other work has some of
    their cores, and at the end of every operation they wait for each other."""
    threads, matrix = torch.get_num_threads(), torch.ones(512, 512)

    def seconds(n):
        torch.set_num_threads(n)
        return timeit(lambda: matrix @ matrix, number=50)
    if run.device.type == "cpu" and threads > 1 and seconds(threads) > 1.2 * seconds(1):
        print(f"one thread is faster than {threads} here, as beside other work on the same cores: "
              f"stop, and type OMP_NUM_THREADS=1 {run.go_on}")
    torch.set_num_threads(threads)


def measure(run, most=3000):
    """Columns of the log, by a pass over up to `most` training and validation images as shipped:
    validation accuracy of a linear probe in %; with margins each layer's |R|/|P| (Fig. 5)."""
    m, row, seen = layer_margins(run.settings, run.model), {}, []
    for part, (images, y) in (("train", run.train), ("val", run.val)):
        f, y = [normalize(f_l) for f_l in layer_features(run, images[:most])], y[:most]
        seen += [f[-1], y]
        if any(m):
            P = max(1, (y[:, None] == y).sum().item() - len(y))
            row |= {f"{part}_saturated_{l}": round(saturated(f_l, y, m_l).sum().item() / P, 6)
                    for l, (f_l, m_l) in enumerate(zip(f, m), start=1)}
    return row | {"probe": round(probe(*seen, run.model.num_classes), 2)}


@torch.no_grad()
def layer_features(run, images):
    """Each layer's pooled output for uint8 images, not augmented: L tensors (n, E)."""
    parts = [encode(run.model, run.normalise(part)) for part in images.split(500)]
    return [torch.cat(layer) for layer in zip(*parts)]


def probe(f, y, test_f, test_y, num_classes):
    """Accuracy in % on test_f of a linear classifier of f (n, E), y: least squares with ridge."""
    f, y, test_f, test_y = (t.cpu() for t in (f, y, test_f, test_y))    # MPS has no float64
    X, test_X = (pad(f, (0, 1), value=1).double() for f in (f, test_f))         # (n, E + 1)
    ridge = 1e-6 * X.square().sum() * torch.eye(X.shape[1], dtype=X.dtype)
    W = torch.linalg.solve(X.T @ X + ridge, X.T @ one_hot(y, num_classes).double())
    return 100 * ((test_X @ W).argmax(dim=1) == test_y).double().mean().item()


def accuracy(model, images, y, normalise, s):
    """Top-1, top-5 and top-10 accuracy in % on uint8 images: {1: ..., 5: ..., 10: ...}."""
    scores = [predict(model, normalise(x), s["algo"], s["head"]) for x in images.split(500)]
    right = torch.cat(scores).topk(10).indices == y[:, None]                # (n, 10), best first
    return {k: round(100 * right[:, :k].any(dim=1).float().mean().item(), 2) for k in (1, 5, 10)}


# ---------------------------------------------------------------------------------------- the data

def load_data(dataset, folder):
    """(train images, train labels, test images, test labels): uint8 (n, C, H, W) and int64 (n,).
    Missing files are downloaded into `folder`. Raises OSError, in one line, if that fails."""
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
    except Exception as reason:         # no network, a torn file, another layout: no data there
        reason = (str(reason) or type(reason).__name__).splitlines()[0]
        raise OSError(f"{dataset} could not be loaded from --data-dir {folder} ({reason}); "
                      "README.md says what belongs there; --dataset shapes needs nothing")


def load_tiny_imagenet(folder):
    """Tiny ImageNet as `load_data`; its labelled validation images are the test set."""
    root, data = folder / "tiny-imagenet-200", []
    if not root.exists():
        url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
        torchvision.datasets.utils.download_and_extract_archive(
            url, folder, md5="90528d7ca1a48142e341f4ef8d21d0de")
    training = torchvision.datasets.ImageFolder(root / "train")

    def pixels(path):
        try:
            return v2.functional.pil_to_tensor(training.loader(path))           # RGB
        except OSError as reason:
            raise OSError(f"{path}: {reason}")

    lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
    test = [(root / "val" / "images" / file, training.class_to_idx[name])
            for file, name in (line.split("\t")[:2] for line in lines)]
    for files in (training.samples, test):
        data += [torch.stack([pixels(path) for path, _ in files]),
                 torch.tensor([label for _, label in files])]
    return data


def bar(x, y, width, height):       # signed distance to a rectangle of 2 width x 2 height
    return torch.maximum(x.abs() - width, y.abs() - height)


SHAPES = {          # class: signed distance to its outline, negative inside, in units of its radius
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
    """n drawn images uint8 (n, 3, 32, 32) and labels (n,), 0..9 in the order of SHAPES."""
    generator = torch.Generator().manual_seed(seed)
    chunk = 100 * len(SHAPES)
    images = [draw_some(min(chunk, n - start), generator) for start in range(0, n, chunk)]
    return torch.cat(images), torch.arange(n) % len(SHAPES)


def draw_some(n, generator):
    """n images of `draw_shapes`, the classes in turn; all but the outline is random."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")

    def rand(low, high, channels=1):        # a number for each image, or for each of its channels
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)

    def place(low, high, room):             # pixels in coordinates of an object of random place
        radius, turn = rand(low, high), rand(0, 2 * math.pi)
        x, y = ((axis - 15.5 - room * rand(-1, 1)) / radius for axis in (columns, rows))
        return x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin(), radius

    def paint(image, colour, distance, radius):         # signed distance -> share of a pixel
        return image.lerp(colour, (0.5 - distance * radius).clamp(0, 1))

    back = rand(0, 0.5, 3)
    image = back.expand(n, 3, 32, 32)
    for _ in range(2):                      # clutter under the shape
        x, y, radius = place(1.5, 4, room=13)
        image = paint(image, rand(0, 1, 3), bar(x, y, 1, rand(0.2, 1)), radius)
    x, y, radius = place(8, 13, room=3.5)
    distance = torch.empty_like(x)
    for label, outline in enumerate(SHAPES.values()):
        own = slice(label, None, len(SHAPES))
        distance[own] = outline(x[own], y[own])
    image = paint(image, back + rand(0.3, 0.7, 3), distance, radius)    # brighter than behind it
    image = image + 0.03 * torch.randn(n, 3, 32, 32, generator=generator)
    return (image.clamp(0, 1) * 255).to(torch.uint8)


def split(images, labels, s, num_classes):
    """[(images, labels), (images, labels)]: 90 % training, 10 % validation, at random by the seed;
    then --limit, --missing and --label-noise act. Raises ValueError for too large a --limit."""
    g = torch.Generator().manual_seed(s["seed"])
    order, parts = torch.randperm(len(labels), generator=g), []
    val, train = order[:len(order) // 10], order[len(order) // 10:]
    limit = s["limit"] or len(train)
    if limit > len(train):
        raise ValueError(f"--limit {limit}: there are {len(train)} training images")
    for part in (train[:limit], val[:limit // 9]):
        part = part[:round(len(part) * (1 - s["missing"]))]
        y = labels[part]
        wrong = torch.randperm(len(y), generator=g)[:round(len(y) * s["label_noise"])]
        y[wrong] = wrong_labels(y[wrong], num_classes, g)
        parts.append((images[part], y))
    return parts


# ------------------------------------------------------------------------------------ augmentation

def rand_augment(images, generator, num_ops=3, magnitude=14, groups=28):
    """RandAugment [45] of uint8 images (B, C, H, W): torchvision draws each of the num_ops
    operations for a group of images at once, and who is in which group is drawn anew for each.
    groups: at most so many; fewer are faster, more leave fewer images with the same draws."""
    draw, images = v2.RandAugment(1, magnitude), images.clone()
    with torch.random.fork_rng(devices=[]):             # torchvision has no generator of its own
        torch.default_generator.manual_seed(torch.randint(2 ** 31, (), generator=generator).item())
        for _ in range(num_ops):
            order = torch.randperm(len(images)).to(images.device, non_blocking=True)
            images[order] = torch.cat([draw(images[rows]) for rows in order.chunk(groups)])
    return images


def make_augment(kind, padding, mean, std, generator, flip=True, fill="zeros"):
    """augment(images): uint8 (B, C, H, W) -> a freshly drawn view, normalised. kind: --augment.
    What is random is drawn on the CPU, so it is the same on every device."""
    mean, std, size = torch.tensor(mean), torch.tensor(std), 2 * padding + 1

    def augment(images):
        (B, C, H, W), there = images.shape, dict(device=images.device, non_blocking=True)
        if "randaug" in kind:
            images = rand_augment(images, generator)
        if "crop" in kind:                                  # a random window of the padded image
            mode = "edge" if fill == "edge" else "constant"
            padded = v2.functional.pad(images, padding, padding_mode=mode)
            windows = padded.unfold(2, H, 1).unfold(3, W, 1)            # (B, C, size, size, H, W)
            rows, columns = torch.randint(size, (2, B), generator=generator).to(**there)
            images = windows[torch.arange(B, device=images.device), :, rows, columns]
        if flip and kind != "none":                         # each with probability 1/2
            mirror = (torch.rand(B, 1, 1, 1, generator=generator) < 0.5).to(**there)
            images = torch.where(mirror, images.flip(3), images)
        shift, scale = (c[:, None, None].to(**there) for c in (mean, std))
        return (images.float() / 255 - shift) / scale

    return augment


# ------------------------------------------------------------------------------------- runs on disk

class Run:
    """A training run: settings, data, model, optimizers, random state, progress and folder.
    Raises OSError or ValueError, in one line, for data, sizes or a device that cannot be."""

    def __init__(self, s):
        self.settings, self.folder = s, Path(s["out"])
        self.go_on = "python train.py --resume --out " + quote(s["out"])
        self.device = find_device(s["device"])
        if self.device.type != "cpu":
            torch.set_float32_matmul_precision("high" if s["precision"] == "tf32" else "highest")
        images, y, *test = load_data(s["dataset"], s["data_dir"])
        classes = int(y.max()) + 1
        parts = [*split(images, y, s, classes), test]
        for _, labels in parts[:2]:                         # what would be a fault later
            if len(labels.unique()) < 2 or not cut(torch.arange(len(labels)), labels, s):
                raise ValueError("too few images: training and validation need two classes, and "
                                 "with --views 1 two images of a class in a batch")
        self.train, self.val, self.test = (
            tuple(t.to(self.device) for t in part) for part in parts)
        channels = [torch.std_mean(c / 255, correction=0) for c in parts[0][0].unbind(1)]
        std, mean = torch.tensor(channels).T.tolist()
        self.facts = {"image_shape": list(images.shape[1:]), "num_classes": classes, "mean": mean,
                      "std": std, "images": [len(labels) for _, labels in parts]}
        torch.manual_seed(s["seed"])
        self.model = make_model(s, self.facts).to(self.device)
        layer_margins(s, self.model)                        # ValueError for impossible margins
        self.optimizers = make_optimizers(self.model, s)
        self.generator = torch.Generator().manual_seed(s["seed"])
        self.augment, self.normalise = (
            make_augment(kind, s["padding"], mean, std, self.generator, fill=s["fill"],
                         flip=s["dataset"] != "mnist")      # a mirrored digit is another sign
            for kind in (s["augment"], "none"))
        self.state = {"stage": 1, "epoch": 0, "best": math.inf, "best_epoch": 0, "log": []}

    def held(self):
        """`with run.held():` keeps the folder for this process, OSError if another one has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(self.folder / ".lock").acquire(timeout=0)    # ends with the process
        except Timeout:
            raise OSError(f"{self.folder}: another process is training this run")

    def start(self):
        """Write down every setting, the data, versions and device."""
        write(self.folder / "config.json", json.dumps({
            "command": " ".join(["python", *map(quote, sys.argv)]), "settings": self.settings,
            "data": self.facts, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else
            platform.machine(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__}}, indent=1) + "\n")

    def save(self, best):
        """Write best.pt, if this epoch was the best, log.csv and last.pt, each in one step."""
        weights, log = self.model.state_dict(), self.state["log"]
        if best:
            write(self.folder / "best.pt", {"model": weights, "settings": self.settings})
        columns = list(dict.fromkeys(column for row in log for column in row))
        rows = [columns, *([str(row.get(column, "")) for column in columns] for row in log)]
        write(self.folder / "log.csv", "".join(",".join(row) + "\n" for row in rows))
        write(self.folder / "last.pt", {
            **self.state, "model": weights, "generator": self.generator.get_state(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]})

    def load(self):
        """Take up the last finished epoch, if any; OSError or ValueError if that cannot be."""
        if "OMP_NUM_THREADS" not in os.environ:             # as before, for the same rounding
            config = json.loads((self.folder / "config.json").read_text())
            torch.set_num_threads(min(config.get("threads", 1), os.cpu_count()))
        if not any((self.folder / name).exists() for name in ("last.pt", "result.json")):
            return                                          # stopped before its first epoch
        read(self.folder / "best.pt", "model")              # will be needed later
        weights, generator, optimizers, *progress = read(
            self.folder / "last.pt", "model", "generator", "optimizers", *self.state)
        self.model.load_state_dict(weights)
        self.generator.set_state(generator)
        self.state = dict(zip(self.state, progress))
        self.optimizers = make_optimizers(self.model, self.settings, self.state["stage"])
        for optimizer, state in zip(self.optimizers, optimizers):
            optimizer.load_state_dict(state)

    def end_stage(self):
        """Take the weights with the lowest validation loss, and go on to the next stage."""
        [weights] = read(self.folder / "best.pt", "model")
        self.model.load_state_dict(weights)
        self.state |= {"stage": self.state["stage"] + 1, "epoch": 0, "best": math.inf}
        self.optimizers = make_optimizers(self.model, self.settings, stage=2)
        if self.state["stage"] <= stages(self.settings):
            self.save(best=False)

    def test_model(self):
        """Accuracy of the weights on test and validation data: result.json, printed, returned."""
        s, state, result = self.settings, self.state, {}
        for part, (images, y) in (("test", self.test), ("val", self.val)):
            found = accuracy(self.model, images, y, self.normalise, s)
            result |= {f"{part}_top{k}": value for k, value in found.items()}
        result |= {"metric": METRIC.get(s["dataset"], "top1"), "best_epoch": state["best_epoch"],
                   "seconds": round(sum(row["seconds"] for row in state["log"]), 1)}
        write(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        print("test accuracy {test_top1} % (top-5 {test_top5} %, top-10 {test_top10} %); test it "
              "again: python eval.py".format(**result), quote(s["out"]))
        return result


def find_device(name="auto"):
    """The device of --device; ValueError if it is not there."""
    there = torch.accelerator.is_available()
    found = torch.accelerator.current_accelerator().type if there else "cpu"
    if name not in ("auto", "cpu", found):
        raise ValueError(f"--device {name}: torch finds no such device here")
    return torch.device(name if name != "auto" else "cpu" if found == "mps" else found)


def make_model(s, facts):
    """The untrained model of a run's settings and the facts of its data."""
    vit, labels, options = s["model"].startswith("vit"), None, {}
    if s["algo"] in WITH_LABELS:
        labels = "patch" if vit else "random" if s["algo"] == "symba" else "one-hot"
    if vit:
        options = {name: s[name] for name in ("patch_size", "pool", "position_std")}
        options["local_loss"] = not s["plain"] and s["algo"] not in ("scl", "bp")
    model = build_model(s["model"], facts["image_shape"], facts["num_classes"], labels, **options)
    if s["precision"] == "bf16":
        for layer in model.layers:
            layer.forward = partial(in_bf16, layer.forward)
    return model


def in_bf16(forward, x):
    """A layer's forward with products in bfloat16; weights, its output and losses are float32."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return forward(x).float()           # a ViT's is float32: the same tensor, with .pooled


def read(path, *names):
    """A list of what torch has saved by these names; OSError, in one line, if that cannot be."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return [saved[name] for name in names]
    except Exception as reason:                 # none, torn, another's: torch has many errors
        raise OSError(f"{path} cannot be read ({type(reason).__name__})")


def write(path, content):
    """Write text, or what torch can save, to a file and put it in the place of `path` at once."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content)
        else:
            torch.save(content, temporary)
        try:
            temporary.replace(path)
        except PermissionError:                         # Windows, while another program reads it
            time.sleep(1)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)               # what a full disk has cut off


# ------------------------------------------------------------------------------------ command line

def defaults(dataset, algo, recipe=None):
    """The settings where nothing else is typed; without a recipe, by the data set's."""
    s, own = dict(DEFAULTS), BY_DATASET.get(dataset, {})
    recipe = recipe or own.get("recipe", "none")
    for name in (f"none {algo}", recipe, f"{recipe} {algo}"):       # the later ones win
        s |= RECIPES.get(name, {})
    return s | own | {"dataset": dataset, "algo": algo, "recipe": recipe}


def parse(argv=None):
    """The settings of a command line: (dict, whether to resume); nonsense ends with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [--FLAG VALUE ...]; --help lists the flags",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, epilog="\n".join(
            f"instead of [default], {name}: {own}" for name, own in (BY_DATASET | RECIPES).items()))
    types = {"model": plain_name, "out": os.path.expanduser, "data_dir": os.path.expanduser}
    for name, (default, allowed, meaning) in SETTINGS.items():
        kind = dict(action="store_true") if default is False else dict(
            type=types.get(name, type(default)), choices=allowed if type(allowed) is list else None)
        parser.add_argument("--" + name.replace("_", "-"), help=f"{meaning} [{default}]", **kind)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    typed = vars(parser.parse_args(argv))
    resume = typed.pop("resume", False)
    s = DEFAULTS | typed
    s = defaults(s["dataset"], s["algo"], typed.get("recipe")) | typed
    for name, (_, allowed, _) in SETTINGS.items():
        if isinstance(allowed, tuple) and not allowed[0] <= s[name] <= allowed[1]:
            parser.error(f"{name} must lie in {allowed[0]}..{allowed[1]}; got {s[name]}")
    if s["recipe"] == "mlp" and not s["model"].startswith("mlp"):
        parser.error(f"--recipe mlp is not for {s['model']}: add --model mlp-800-4, or another MLP")
    if not s["out"]:
        known = ("dataset", "algo", "model", "seed", "data_dir", "device", "out")
        others = [name.replace("_", "") + str(typed[name]) for name in typed if name not in known]
        s["out"] = "runs/" + "-".join([*(s[name] for name in known[:3]), *others, f"s{s['seed']}"])
    folder = Path(s["out"])
    if resume:
        try:
            s = DEFAULTS | json.loads((folder / "config.json").read_text())["settings"]
        except (OSError, ValueError, LookupError, TypeError):
            parser.error(f"no run to resume: {folder / 'config.json'} is not there, or not a run's")
        changed = {name for name in typed if s[name] != typed[name]} - {"out", "data_dir", "device"}
        if changed:
            parser.error(f"--resume keeps the run's settings: {', '.join(changed)} cannot change")
        s |= typed
    elif (folder / "config.json").exists():
        parser.error(f"{folder} holds a run: go on with it (--resume), or name another (--out)")
    if s["head"] and s["algo"] not in WITH_LABELS:
        parser.error(f"--head is for ff, symba and collab, not {s['algo']}")
    return s | {"out": str(folder)}, resume


def main(argv=None):
    settings, resume = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # a queue's stop is a Ctrl-C
    begun = False
    try:
        run = Run(settings)
        with run.held():
            run.load() if resume else run.start()
            begun = True
            print("{algo} with {model} on {dataset}, seed {seed}, in {out}".format(**settings)
                  + f"; threads: {torch.get_num_threads()}")
            warn_if_crowded(run)
            train(run)
    except (KeyboardInterrupt, OSError, ValueError, RuntimeError) as reason:
        said = (str(reason) or "stopped").splitlines()[0]
        if isinstance(reason, BrokenPipeError):                     # nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if begun:
            raise SystemExit(f"{said}; go on with: {run.go_on}")
        print(f"train.py: error: {said}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")            # a terminal may lack a letter of --out
    main()
