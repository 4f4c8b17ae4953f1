"""What a run learned, asked as the paper's results section asks it, and what a training step costs.

    python eval.py runs/NAME                            test accuracy: top-1, top-5, top-10, by class, and a probe on each layer
    python eval.py runs/NAME --layers                   Fig. 5, layer by layer, on validation data; layers.png in the run's folder
    python eval.py runs/* [--markdown]                  a row a run, or a group of seeds, from their records (Tables 1, 3-6, Fig. 6)
    python eval.py runs/* --figure curves.png           accuracy against what varies among the runs (Figs. 4b, 7, Table 4)
    python eval.py --margins 0.4 0.1 8                  Fig. 4a
    python eval.py --show-views --dataset cifar10       the views of a few images as the network gets them
    python eval.py runs/NAME --schedule                 Fig. 8 of a run with --pipeline: who worked on which batch when
    python eval.py --speed --model vit-128-4-5          Tables 2 and 6 on this machine: time and memory of training and inference
    torchrun --nproc-per-node 2 eval.py --speed         Sec. 5.1: the pipeline against one process, and against BP in both

A run's folder holds all that is needed; no setting has to be said again. Pictures need matplotlib, t-SNE scikit-learn.
"""
import argparse
import csv
import glob
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, normalize, pad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from cff import encode, encode_neutral, predict, update
from losses import ff_loss, margins, symba_loss
from train import (CHOICES, COLOURS, DEFAULTS, LABELS, METRIC, SHAPES, Probe, Run, connect, defaults, describe_device, gather, hits,
                   keep_memory, load_data, make_augment, make_model, make_optimizers, make_step, mean_and_std, part_of, pyplot, two_stages)

NAMES = {"cff": "CFF", "cffm": "CFF+M", "ff": "FF", "symba": "SymBa", "collab": "FF Collab", "scl": "SCL", "bp": "BP+CE"}
CLASSES = {"shapes": list(SHAPES), "mnist": list("0123456789"),
           "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split()}
# What the paper reports in %, Tables 1-6, by data set, model, augmentation, what else is set, and method; where Tables 1-3 differ: Table 1's.
PAPER = {
    ("mnist", "mlp-500-3", "none"): dict(ff=97.12, symba=97.82, collab=97.70, cff=96.33, cffm=97.69, bp=98.00),
    ("mnist", "mlp-800-4", "none"): dict(bp=98.13, cffm=97.62),
    ("cifar10", "mlp-800-4", "crop"): dict(ff=50.35, symba=56.80, collab=54.33, cff=54.32, cffm=57.33),
    ("cifar10", "mlp-800-4", "flip"): dict(bp=54.20, cffm=54.55),
    ("cifar10", "vit-128-4-5", "crop"): dict(ff=76.21, symba=69.13, collab=70.66, cff=78.70, cffm=80.42, bp=76.92),
    ("cifar10", "vit-128-4-5", "crop+randaug"): dict(bp=86.33, cffm=81.73),
    ("cifar10", "vit-192-6-6", "crop"): dict(bp=76.68, cffm=79.74),
    ("cifar10", "vit-192-6-6", "crop+randaug"): dict(bp=86.95, cffm=85.17),
    ("cifar10", "vit-240-6-7", "crop"): dict(bp=77.04, cffm=79.96),
    ("cifar10", "vit-240-6-7", "crop+randaug"): dict(bp=87.62, cffm=85.37),
    ("cifar100", "vit-192-6-6", "crop"): dict(ff=72.15, symba=68.78, collab=71.79, cff=79.23, cffm=80.39, bp=78.12),
    ("cifar100", "vit-192-6-6", "crop+randaug"): dict(bp=84.13, cffm=84.28),
    ("cifar100", "vit-240-6-7", "crop"): dict(bp=77.75, cffm=78.44),
    ("cifar100", "vit-240-6-7", "crop+randaug"): dict(bp=82.88, cffm=84.29),
    ("tinyimagenet", "vit-240-6-7", "crop"): dict(ff=62.11, cff=72.43, cffm=73.23, bp=74.01),
    ("tinyimagenet", "vit-240-6-7", "crop+randaug"): dict(bp=78.95, cffm=76.06),
    ("cifar10", "vit-128-4-5", "crop", "head True"): dict(ff=65.33, symba=60.15),
    ("cifar100", "vit-192-6-6", "crop", "head True"): dict(ff=62.77),
    ("cifar10", "vit-192-6-6", "crop+randaug", "missing 0.5"): dict(bp=78.27, cffm=80.58),
    ("cifar10", "vit-192-6-6", "crop+randaug", "missing 0.8"): dict(bp=69.19, cffm=73.26),
    ("cifar10", "vit-192-6-6", "crop+randaug", "label_noise 0.2"): dict(bp=78.10, cffm=78.33),
    ("cifar10", "vit-192-6-6", "crop+randaug", "label_noise 0.4"): dict(bp=70.36, cffm=71.20),
    ("cifar10", "vit-128-4-5", "crop+randaug", "pool token"): dict(cffm=76.63),
    ("cifar100", "vit-192-6-6", "crop+randaug", "pool token"): dict(cffm=79.00),
    ("cifar10", "vit-128-4-5", "crop", "views 1"): dict(cffm=80.42 - 1.42),             # Table 6 has the differences
    ("cifar10", "vit-192-6-6", "crop", "views 1"): dict(cffm=79.74 - 0.04),
    ("cifar10", "vit-192-6-6", "crop+randaug", "views 1"): dict(cffm=85.17 - 1.92),
    ("cifar100", "vit-192-6-6", "crop+randaug", "views 1"): dict(cffm=84.28 - 1.65),
    ("cifar100", "vit-240-6-7", "crop", "views 1"): dict(cffm=78.44 - 1.08),
    ("tinyimagenet", "vit-240-6-7", "crop+randaug", "views 1"): dict(cffm=76.06 - 2.20),
}


# ------------------------------------------------------------------------------------------------------------ reading runs

def open_run(folder, data_dir=None):
    """The run in `folder` with its best weights so far, as a `train.Run`: model in evaluation mode, data, settings.

    Raises OSError, in one line, if there are no weights or they cannot be read.
    """
    path = Path(folder) / "best.pt"
    if not path.exists():
        raise FileNotFoundError(f"{folder}: no weights of a run here (best.pt)")
    try:
        best = torch.load(path, map_location="cpu", weights_only=True)
        settings, weights = {**DEFAULTS, **best["settings"]}, best["model"]
    except Exception as reason:                                     # torn, or another's file: torch has many errors for that
        raise OSError(f"{path} cannot be read ({type(reason).__name__})")
    run = Run(settings | {"out": str(folder), "device": "auto", "data_dir": data_dir or settings["data_dir"]})
    run.model.load_state_dict(weights)
    run.model.eval()
    return run


def read_log(folder, stage="1"):
    """The rows of a stage in a run's log.csv: a list of {column: float}."""
    with open(Path(folder) / "log.csv") as file:
        return [{column: float(value) for column, value in row.items() if value} for row in csv.DictReader(file)
                if row["stage"] == stage]


class Record(NamedTuple):
    """What is on disk of a finished run beside its weights: `log` the rows of stage 1, `images` the numbers for each part."""
    name: str
    settings: dict
    result: dict
    log: list
    images: list


def read_record(folder):
    """The `Record` of a finished run; OSError, in one line, if the folder holds none, or a damaged one."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise OSError(f"{folder}: no run (config.json is missing)")
    if not (folder / "result.json").exists():
        raise OSError(f"{folder}: not finished; go on with: python train.py --resume --out {folder}")
    try:
        config, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
        record = Record(folder.name, {**DEFAULTS, **config["settings"]}, result, read_log(folder), config["data"]["images"])
        record.result["test_" + record.result["metric"]], record.log[0]["seconds"]
    except (OSError, ValueError, LookupError, TypeError) as reason:
        raise OSError(f"{folder}: config.json, result.json or log.csv cannot be read ({type(reason).__name__})")
    return record


def read_groups(folders):
    """The records of finished runs, those that differ in the seed alone together: a list of lists.

    What is no finished run is named on stderr and left out; raises OSError if nothing remains.
    """
    groups = {}
    for folder in folders:
        try:
            record = read_record(folder)
        except OSError as reason:
            print(f"eval.py: {reason}", file=sys.stderr)
            continue
        groups.setdefault(json.dumps(essential(record.settings)), []).append(record)
    if not groups:
        raise OSError("none of these folders holds a finished run")
    return list(groups.values())


def essential(settings):
    """The settings without those that say only where and with which seed."""
    return {name: value for name, value in settings.items() if name not in ("seed", "out", "data_dir", "device", "pipeline")}


def choosing_losses(settings, log):
    """Each epoch's validation loss that chooses the weights: the last layer's; FF's, SymBa's, Collab's over all but the first."""
    losses = [[value for column, value in row.items() if column.startswith("val_loss")] for row in log]
    return [sum(row[1:] or row) if settings["algo"] in LABELS else row[-1] for row in losses]


def epochs_to_convergence(settings, log):
    """Fig. 6: the first epoch at which the validation loss has made 99 % of its total fall, from the first epoch to its least."""
    v = choosing_losses(settings, log)
    return next(epoch for epoch, value in enumerate(v, start=1) if v[0] - value >= 0.99 * (v[0] - min(v)))


# ------------------------------------------------------------------------------------------------------ accuracy of a run

@torch.no_grad()
def layer_features(run, images):
    """Each layer's pooled output for uint8 images (N, C, H, W): L tensors (N, E); FF's are of the neutral label."""
    parts = [encode_neutral(run.model, run.normalise(part)) for part in images.split(500)]
    return [torch.cat(layer) for layer in zip(*parts)]


def probe_layers(run, most=10000):
    """Test accuracy in % of a linear classifier on each layer, fitted in closed form to `most` training images: L floats."""
    (images, y), (test_images, test_y), result = run.train, run.test, []
    for f, test_f in zip(layer_features(run, images[:most]), layer_features(run, test_images)):
        probe = Probe(run.classes)
        probe.add(normalize(f), y[:most])
        result.append(100 * probe.correct(normalize(test_f), test_y).item() / len(test_y))
    return result


def evaluate(folder, data_dir=None):
    """Print the accuracy of the run in `folder` on its test set; returns {1: top-1, 5: top-5, 10: top-10} in %.

    A run that is not finished is said to be so; {} while its head is untrained and only the probes mean something.
    """
    run = open_run(folder, data_dir)
    settings, (images, y), top = run.settings, run.test, {}
    print(f"{folder}: {settings['algo']} with {settings['model']} on {settings['dataset']}, {len(y)} test images")
    if not (run.folder / "result.json").exists():
        print("not finished: these are its best weights so far")
    if two_stages(settings) and not read_log(folder, stage="2"):
        print("its head is not trained yet")
    else:
        found = hits(run.model, images, y, run.normalise, settings)
        top = {k: round(100 * found[:, k - 1].double().mean().item(), 2) for k in (1, 5, 10)}
        print("  ".join(f"top-{k} {value:.2f} %" for k, value in top.items()))
        print(f"the metric for {settings['dataset']} is {METRIC[settings['dataset']].replace('top', 'top-')}")
        names = CLASSES.get(settings["dataset"], range(run.classes))
        by_class = [(100 * found[y == label, 0].double().mean().item(), names[label]) for label in range(run.classes)]
        few = run.classes <= 20
        print(f"top-1 of {'each class' if few else 'the best five classes, then the worst five'}: " + ", ".join(
            f"{name} {value:.1f}" for value, name in (by_class if few else sorted(by_class)[:-6:-1] + sorted(by_class)[:5])))
    print("linear probe on each layer: " + ", ".join(f"{value:.1f} %" for value in probe_layers(run)))
    return top


# ------------------------------------------------------------------------------------------ layer by layer (Sec. 4.2, Fig. 5)

def fisher_criterion(f, y, averaged=False):
    """Tr(S_w^-1 S_b), Eqs. 19-22, of pooled outputs f (N, E) with labels y (N,): a float, larger for classes further apart.

    averaged: S_w as the mean over the C classes where Eq. 19 has the sum; the criterion is then C times as large. A singular
    S_w (a unit that is always off) is inverted on the rest of the space. With fewer than some 10 E rows it says little: few
    points in many dimensions lie apart by chance. Computed in float64.
    """
    f, classes = f.double(), y.unique()
    m, S_w, S_b = f.mean(dim=0), 0, 0
    for c in classes:
        f_c = f[y == c]
        m_c = f_c.mean(dim=0)                                                           # m_c of Eq. 20
        S_w = S_w + (f_c - m_c).T @ (f_c - m_c) / len(f_c)                              # Eqs. 19, 21: S_w = sum_c S_c
        S_b = S_b + len(f_c) / len(f) * torch.outer(m_c - m, m_c - m)                   # Eq. 19: 1/N sum_c N_c (m_c - m)(m_c - m)^T
    if averaged:
        S_w = S_w / len(classes)
    return (torch.linalg.pinv(S_w, hermitian=True) @ S_b).trace().item()                # Eq. 22


def three_images(f, y):
    """Rows of an anchor, a positive and a negative, (3,): the first image that has both, and those of median cosine.

    f: (N, E), normalised. Raises ValueError if no image has both.
    """
    same = y[:, None] == y
    anchors = ((same.sum(dim=1) > 1) & ~same.all(dim=1)).nonzero()[:, 0]
    if not len(anchors):
        raise ValueError("no validation image has both a positive and a negative")
    i = anchors[0].item()
    s, others = f @ f[i], torch.arange(len(y), device=y.device) != i
    sets = [(mask & others).nonzero()[:, 0] for mask in (same[i], ~same[i])]            # P(i), N(i)
    return [i] + [rows[s[rows].argsort()[len(rows) // 2]].item() for rows in sets]


FIG5_COLUMNS = {"Train loss": "train_loss", "Val loss": "val_loss", "Train |R|/|P|": "train_saturated",
                "Val |R|/|P|": "val_saturated"}


def show_layers(folder, data_dir=None):
    """Print Fig. 5's numbers for the run in `folder` and draw it, layers.png in that folder; returns the rows, a dict a layer."""
    run, log = open_run(folder, data_dir), read_log(folder)
    images, y = run.val
    features, losses = layer_features(run, images), choosing_losses(run.settings, log)
    best, three, rows = log[losses.index(min(losses))], three_images(normalize(features[0]), y), []
    for l, f in enumerate(features, start=1):
        s = normalize(f[three]) @ normalize(f[three[0]], dim=0)
        rows.append({"Layer": l, "Fisher": fisher_criterion(f, y), "Fisher, averaged S_w": fisher_criterion(f, y, averaged=True),
                     **{name: best.get(f"{column}_{l}") for name, column in FIG5_COLUMNS.items()},
                     "Cosine to the positive": s[1].item(), "to the negative": s[2].item()})
    print(f"{folder}: {len(y)} validation images; weights, losses and |R|/|P| of epoch {best['epoch']:.0f}")
    print_table([list(rows[0])] + [[f"{x:.3f}" if isinstance(x, float) else "-" if x is None else x for x in row.values()]
                                   for row in rows])
    if len(y) < 10 * features[0].shape[1]:
        print(f"the Fisher criterion says little here: {len(y)} images in {features[0].shape[1]} dimensions")
    try:
        draw_layers(run, features, log, rows, images[three].cpu(), run.folder / "layers.png")
    except ImportError as reason:                                   # the numbers stand without it
        print(reason)
    return rows


def save(figure, path):
    """Write a picture and say where it is."""
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
    print(f"picture: {path}")


def show_image(draw, image, **look):
    """Hand an image (C, H, W), colour or grey, to a function of matplotlib that draws one."""
    return draw(image.permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.permute(1, 2, 0), cmap="gray", **look)


def draw_layers(run, features, log, rows, three, path):
    """Fig. 5: a column a layer; Fisher criterion, t-SNE, losses and shares by epoch, and `three` images at their angles."""
    plt, L = pyplot(), len(features)
    figure, axes = plt.subplots(3, L, figsize=(max(7, 2.6 * L), 8.5), squeeze=False, layout="constrained")
    figure.suptitle(f"{run.folder.name}: layer by layer, on {len(run.val[1])} validation images (Fig. 5)")
    for l, (top, _, _) in enumerate(zip(*axes)):
        top.set_title(f"Layer {l + 1}\nFisher {rows[l]['Fisher']:.2f}, averaged {rows[l]['Fisher, averaged S_w']:.1f}", fontsize=10)
    draw_tsne(axes[0], features, run.val[1].cpu(), CLASSES.get(run.settings["dataset"]))
    draw_epochs(axes[1], log)
    for l, axis in enumerate(axes[2]):
        draw_angles(axis, three, rows[l]["Cosine to the positive"], rows[l]["to the negative"])
    save(figure, path)


def draw_tsne(axes, features, y, names):
    """Row 2 of Fig. 5: the first 1,000 rows of each layer's features in two dimensions, a colour and a mark a class."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        print("t-SNE needs scikit-learn: pip install scikit-learn")
        for axis in axes:
            axis.axis("off")
        return
    y, few = y[:1000], len(y.unique()) <= 10
    for axis, f in zip(axes, features):
        place = TSNE(perplexity=min(30, len(y) // 4), init="pca", random_state=0).fit_transform(f[:1000].cpu().numpy())
        axis.set(xticks=[], yticks=[])
        if not few:
            axis.scatter(*place.T, c=y, cmap="turbo", s=5)
        for number, c in enumerate(y.unique().tolist() if few else []):
            look = {"color": f"C{number}", "marker": "osD^vP*<>X"[number], "label": names[c] if names else c}
            axis.scatter(*place[(y == c).numpy()].T, s=11, lw=0, **look)
    axes[0].set_ylabel("t-SNE")
    if few:
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=2, fontsize=9)


def draw_epochs(axes, log):
    """Row 3 of Fig. 5: training and validation loss by epoch (right), share of saturated pairs |R|/|P| in % (left)."""
    epochs, twins = [row["epoch"] for row in log], [axis.twinx() for axis in axes]
    look = {"lw": 1.3, "marker": "." * (len(log) == 1)}             # of a single epoch there is no line to see
    for l, (left, right) in enumerate(zip(axes, twins), start=1):
        for axis, first, column, colour, scale in ((left, axes[0], "saturated", COLOURS[1], 100),
                                                   (right, twins[0], "loss", COLOURS[0], 1)):
            for part, style in (("train", "-"), ("val", "--")):
                if f"{part}_{column}_{l}" in log[0]:
                    axis.plot(epochs, [scale * row[f"{part}_{column}_{l}"] for row in log], style, color=colour, **look)
            axis.tick_params(axis="y", colors=colour)
            if l > 1:
                axis.sharey(first)                                  # one scale for all layers, its numbers at one end
        left.tick_params(labelleft=l == 1)
        right.tick_params(labelright=l == len(axes))
        left.xaxis.get_major_locator().set_params(integer=True)
        left.set_xlabel("epoch")
        if "train_saturated_1" not in log[0]:
            left.set_yticks([])
    axes[0].set_ylabel("|R|/|P|, %" if "train_saturated_1" in log[0] else "", color=COLOURS[1])
    twins[-1].set_ylabel("loss", color=COLOURS[0])
    axes[0].set_title("— training   - - validation", fontsize=8, loc="left")


def draw_angles(axis, three, positive, negative):
    """Row 4 of Fig. 5: anchor, positive (up) and negative (down) as unit vectors, each at its angle to the anchor."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage
    for image, cosine, sign, colour in zip(three, (1, positive, negative), (0, 1, -1), ("black", COLOURS[0], COLOURS[1])):
        cosine = max(-1.0, min(1.0, cosine))
        x, y = cosine, sign * (1 - cosine ** 2) ** 0.5
        axis.plot([0, x], [0, y], color=colour, lw=2)
        place = 1.35 * x + 0.1 * (sign == 0), sign * max(0.9, 1.35 * abs(y))            # never over the anchor
        axis.add_artist(AnnotationBbox(show_image(OffsetImage, image, zoom=28 / image.shape[-1]), place, pad=0.15,
                                       bboxprops={"edgecolor": colour}))
    axis.set(xlim=(-1.9, 1.9), ylim=(-1.9, 1.9), xticks=[], yticks=[], aspect="equal")
    axis.set_title(f"cosine: positive {positive:.2f},\nnegative {negative:.2f}", fontsize=9)


# ------------------------------------------------------------------------------------------------------------ tables of runs

def spread(values, digits=1):
    """"53.2", or over several seeds their mean and standard deviation, "53.2 ± 0.4"; "-" if one is unknown."""
    if None in values:
        return "-"
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def print_table(rows, markdown=False):
    """Print rows of cells, the first the heading, in aligned columns."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for number, row in enumerate(rows):
        cells = [str(cell).ljust(width) for cell, width in zip(row, widths)]
        print("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
        if markdown and number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def paper_says(settings):
    """The paper's accuracy with the same data, model, augmentation, method and `PAPER`'s other settings, "-" where it has none."""
    names = ["limit", "missing", "label_noise", "pool", "head", "m0", "mL", "decay", "skip_first"]
    if settings["algo"] in ("cff", "cffm") and settings["dataset"] != "mnist":          # without a crop two views are equal
        names.append("views")
    others = [f"{name} {settings[name]}" for name in names if settings[name] != DEFAULTS[name]]
    value = PAPER.get((settings["dataset"], settings["model"], settings["augment"], *others), {}).get(settings["algo"])
    return "-" if value is None else f"{value:.2f}"


def show_table(folders, markdown=False):
    """Print a row for each finished run; runs that differ in the seed alone share one. A table for each data set, --limit and
    kind of model; equal columns are said once, above."""
    tables = {}
    for runs in read_groups(folders):
        names, all_settings, results, logs, images = zip(*runs)
        s, seeds = all_settings[0], [settings["seed"] for settings in all_settings]
        metric, kind = results[0]["metric"], s["model"][:3]
        tables.setdefault((s["dataset"], s["limit"], kind), []).append({
            "Run": names[0].removesuffix(f"-s{seeds[0]}") if len(runs) > 1 else names[0],
            "Method": NAMES[s["algo"]] + " + head" * s["head"] + " without layer 1" * s["skip_first"], "Model": s["model"], "Data": s["dataset"],
            "Images": images[0][0], "Augment": s["augment"], "Views": 1 if s["algo"] in LABELS or s["algo"] == "bp" else s["views"],
            "Pool": s["pool"] if kind == "vit" else "-", "Missing": s["missing"], "Wrong": s["label_noise"],
            "Epochs": f"{s['epochs']}" + (f" + {s['head_epochs']}" if two_stages(s) else ""),
            "Seeds": ", ".join(map(str, sorted(seeds))), "Metric": metric.replace("top", "top-"),
            "Validation %": spread([result.get("val_" + metric) for result in results]),
            "Test %": spread([result["test_" + metric] for result in results]),
            "Paper %": paper_says(s), "Converged": spread([epochs_to_convergence(s, log) for log in logs], 0),
            "s/epoch": spread([statistics.median(row["seconds"] for row in log) for log in logs]),
            "MB": spread([result.get("peak_memory_mb") for result in results], 0)})
    for number, rows in enumerate(tables.values()):
        same = [column for column in ("Model", "Data", "Images", "Augment", "Views", "Pool", "Missing", "Wrong", "Metric", "Paper %")
                if len({row[column] for row in rows}) == 1]
        columns = [column for column in rows[0] if column not in same]
        print("\n" * (number > 0) + "In all rows: " + ", ".join(f"{column.lower()} {rows[0][column]}" for column in same
                                                                if rows[0][column] != "-") + "\n")
        print_table([columns] + [[row[column] for column in columns] for row in rows], markdown)


# ------------------------------------------------------------------------------------------------------------ figures of runs

def what_varies(groups):
    """The setting in which runs of one method differ, "" if none.

    Raises ValueError if they differ in several, or if runs of different methods differ in data, model or augmentation.
    """
    all_settings = [essential(group[0].settings) for group in groups]
    differ = lambda name, settings: len({str(s[name]) for s in settings}) > 1
    varied = {name for name in all_settings[0] for algo in NAMES
              if differ(name, [s for s in all_settings if s["algo"] == algo])}
    if len(varied) <= 1:
        varied |= {name for name in ("dataset", "limit", "missing", "label_noise", "augment", "padding", "model", "patch_size")
                   if differ(name, all_settings)}
    if len(varied) > 1:
        raise ValueError(f"these runs cannot be compared in one figure: they differ in {', '.join(sorted(varied))}")
    return varied.pop() if varied else ""


def in_order(value):
    """What values of a setting are sorted by: numbers as they are, names by the numbers in them, then by letters."""
    return ([int(n) for n in re.findall(r"\d+", value)], value) if isinstance(value, str) else value


def series(groups, varied):
    """{method: [(value of the varied setting, mean accuracy in %, standard deviation), ...]}, in the order of the values.

    Accuracy is that on validation data, as in Figs. 4b and 7; for Table 4's settings, which change those, on the test data.
    """
    part = "test_" if varied in ("missing", "label_noise") else "val_"
    lines = {}
    for algo in NAMES:
        points = []
        for runs in (group for group in groups if group[0].settings["algo"] == algo):
            accuracies = [run.result[part + run.result["metric"]] for run in runs]
            value = runs[0].images[0] if varied == "limit" else runs[0].settings[varied]
            points.append((value, statistics.mean(accuracies), statistics.stdev(accuracies) if len(runs) > 1 else 0))
        if points:
            lines[algo] = sorted(points, key=lambda point: in_order(point[0]))
    return lines


def draw_by_setting(axis, groups, varied):
    """Accuracy against the setting that varies (Figs. 4b, 7, Table 4), a line a method; what has no margins, level."""
    lines = series(groups, varied)
    values = sorted({value for points in lines.values() for value, _, _ in points}, key=in_order)
    if isinstance(values[0], str):
        axis.xaxis.update_units(values)                             # places on the axis in this order, whichever method has them
    for number, (algo, points) in enumerate(lines.items()):
        values, means, deviations = zip(*points)
        look = {"color": COLOURS[number], "label": NAMES[algo]}
        if varied in ("m0", "mL", "decay") and algo != "cffm":
            axis.axhline(means[0], ls="--", **look)
            axis.axhspan(means[0] - deviations[0], means[0] + deviations[0], color=COLOURS[number], alpha=0.15)
        else:
            axis.errorbar(values, means, yerr=deviations, marker="osD^vPX"[number], capsize=3, **look)
    axis.set(xlabel=varied if varied != "limit" else "training images",
             ylabel=f"{'test' if varied in ('missing', 'label_noise') else 'validation'} accuracy, %")


def draw_by_epoch(axis, groups):
    """The probe's validation accuracy by epoch, a line a method: the mean over the seeds, and from the least to the most."""
    for number, runs in enumerate(groups):
        by_epoch = list(zip(*[[row["probe"] for row in run.log] for run in runs]))
        epochs, look, algo = range(1, len(by_epoch) + 1), {"color": COLOURS[number]}, runs[0].settings["algo"]
        axis.plot(epochs, [statistics.mean(values) for values in by_epoch], marker="osD^vPX"[number], ms=5, **look,
                  markevery=max(1, len(by_epoch) // 10), label=NAMES[algo] + (" (neutral label)" if algo in LABELS else ""))
        axis.fill_between(epochs, [min(values) for values in by_epoch], [max(values) for values in by_epoch], alpha=0.15, **look)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epoch", ylabel="validation accuracy of the probe, %")


def draw_runs(folders, path):
    """A picture of the accuracies of runs: by the one setting that varies, or if only the method does by epoch.

    Raises ValueError as `what_varies`.
    """
    groups = read_groups(folders)
    varied, record = what_varies(groups), groups[0][0]
    figure, axis = pyplot().subplots(figsize=(8.5, 4.5), layout="constrained")
    if varied:
        draw_by_setting(axis, groups, varied)
    else:
        draw_by_epoch(axis, groups)
    seeds = sorted({run.settings["seed"] for group in groups for run in group})
    about = {"dataset": record.settings["dataset"], "model": record.settings["model"], "limit": f"{record.images[0]} images",
             "augment": f"augment {record.settings['augment']}"}
    fixed = [text for name, text in about.items() if name != varied and not (name == "limit" and varied == "missing")]
    axis.set_title(f"{', '.join(fixed)}; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}", fontsize=10)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    save(figure, path)


def draw_margins(m0, mL, L, path):
    """Fig. 4a: the margins of L layers from m0 down to mL, by each --decay."""
    lines = {decay: margins(m0, mL, L, decay) for decay in CHOICES["decay"] if m0 > 0 or decay != "exponential"}
    for decay, m in lines.items():
        print(f"{decay:12s}" + " ".join(f"{value:.3f}" for value in m))
    figure, axis = pyplot().subplots(figsize=(6, 4), layout="constrained")
    for (decay, m), colour, marker in zip(lines.items(), COLOURS, "osD^"):
        axis.plot(range(1, L + 1), m, color=colour, marker=marker, label=decay)
    axis.set(xlabel="layer", ylabel="margin m", xticks=range(1, L + 1), title=f"Fig. 4a: margins from {m0} to {mL} in {L} layers")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def draw_views(settings, path, n=8):
    """Two views of n training images under each --augment, as the network gets them, in the data's own colours."""
    images, y, _, _ = load_data(settings["dataset"], settings["data_dir"])
    (mean, std), rows = mean_and_std(images), torch.randperm(len(y), generator=torch.Generator().manual_seed(settings["seed"]))[:n]
    images, back = images[rows], lambda x: x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    shown = {"as shipped": images / 255}
    for kind in CHOICES["augment"][1:]:
        augment = make_augment(kind, settings["padding"], mean, std, torch.Generator().manual_seed(settings["seed"]),
                               settings["dataset"] != "mnist", settings["fill"])
        shown |= {f"{kind}, view {view}": back(augment(images)) for view in (1, 2)}
    figure, axes = pyplot().subplots(len(shown), 1, figsize=(n + 2.5, len(shown)), layout="constrained")
    for axis, (name, x) in zip(axes, shown.items()):
        strip = torch.cat(list(pad(x, [1, 1, 1, 1], value=1)), dim=2).clamp(0, 1)       # (C, H + 2, n (W + 2))
        show_image(axis.imshow, strip)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"{settings['dataset']}, --padding {settings['padding']}, --fill {settings['fill']}")
    save(figure, path)


# ------------------------------------------------------------------------------------- cost of a step (Tables 2 and 6)

METHODS = {"BP": ("bp", 1), "CFF+M, 1 view": ("cffm", 1), "CFF+M, 2 views": ("cffm", 2), "FF": ("ff", 1), "SymBa": ("symba", 1),
           "FF Collab": ("collab", 1)}
KINDS = {"shapes": ((3, 32, 32), 10), "mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10), "cifar100": ((3, 32, 32), 100),
         "tinyimagenet": ((3, 64, 64), 200)}            # shape of an image, number of classes


def random_run(method, name, dataset, batch_size, device, **changes):
    """What `train.make_step` needs to train the model `name` by one of METHODS on images of random pixels, and such a batch (x, y).

    changes: settings other than the method's own on this data set.
    """
    torch.manual_seed(0)
    algo, views = METHODS[method]
    shape, classes = KINDS[dataset]
    settings = defaults(dataset, algo) | {"model": name, "views": views} | changes
    model = make_model(settings, {"image_shape": shape, "num_classes": classes}).to(device)
    generator = torch.Generator(device)
    augment = make_augment(settings["augment"], settings["padding"], shape[0] * [0.5], shape[0] * [0.25], generator)
    run = SimpleNamespace(settings=settings, model=model, augment=augment, generator=generator, device=device,
                          facts={"image_shape": shape},
                          margins=margins(settings["m0"], settings["mL"], len(model.layers)),
                          loss=symba_loss if algo == "symba" else ff_loss)
    x = torch.randint(256, (batch_size, *shape), dtype=torch.uint8, device=device)
    return run, x, torch.randint(classes, (batch_size,), device=device)


def random_step(*case):
    """A function that makes one training step, for the arguments of `random_run`."""
    run, x, y = random_run(*case)
    step = make_step(run, make_optimizers(run.model, run.settings))
    return lambda: step(x, y)


def peak_of(work, device):
    """What `work`, a function, needs at its peak beyond what is there before, in MB; None where that cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        read = {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}
    elif Path("/proc/self/clear_refs").exists():        # Linux: resident memory now and at its peak, in kB; 5 forgets the peak
        Path("/proc/self/clear_refs").write_text("5")
        lines = lambda: dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        read = {key: lambda key=key: 1024 * int(lines()[key].split()[0]) for key in ("VmRSS", "VmHWM")}
    else:
        return None
    before = read["VmRSS"]()
    work()
    return (read["VmHWM"]() - before) / 1e6


def step_memory(arguments):
    """`peak_of` two training steps: activations, gradients and the optimizers' moments."""
    *case, batch_size, device = arguments
    random_step(*case, 8, device)()                     # a small step first: libraries are loaded, whatever the method
    step = random_step(*case, batch_size, device)
    return peak_of(lambda: (step(), step()), device)


def measure_memory(cases):
    """`step_memory` of each case (method, name, dataset, batch_size, device), in a fresh process each: {(method, name): MB}.

    There large blocks go back to the system when they are freed: what is left is what the method holds, without what the
    C library's allocator keeps in reserve. {} where memory cannot be measured.
    """
    if cases[0][-1].type != "cuda" and not Path("/proc/self/clear_refs").exists():
        return {}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"                # read by the new processes' glibc
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {case[:2]: value for case, value in zip(cases, pool.map(step_memory, cases, chunksize=1))}


def make_inference(name, dataset, n, device):
    """Functions that classify n images of random pixels: CFF+M in one pass; FF with a head, and in one pass for each class."""
    cffm, ff = (random_run(method, name, dataset, n, device) for method in ("CFF+M, 1 view", "FF"))
    images = cffm[0].augment(cffm[1])
    return {"CFF+M, one pass": lambda: predict(cffm[0].model, images, "cffm"),
            "FF, with head": lambda: predict(ff[0].model, images, "ff", head=True),
            "FF, a pass for each class": lambda: predict(ff[0].model, images, "ff")}


def timed(functions, rounds):
    """Seconds of each of {name: function}, called in turn `rounds` times after a warm-up: {name: list}.

    In turn, so that a machine whose speed drifts hurts all alike; ratios are taken within a round.
    """
    seconds = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function().sum().item()                                 # waits for a GPU to finish
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def one_by_one(transform, images):
    return torch.stack([transform(image) for image in images])


def augment_speed(dataset, batch_size, rounds, device, n=20):
    """Time n batches augmented at once, and image by image by torchvision's transforms in a DataLoader with two processes.

    Returns {kind: {"seconds": of our batch, "images": a second, "loader": images a second, "ratio": of the two}}.
    """
    record = {}
    for kind in ("crop", "crop+randaug"):
        run, x, _ = random_run("CFF+M, 1 view", "vit-8-2-1", dataset, batch_size, device, augment=kind)
        rand_augment = [transforms.RandAugment(3, 14)] if "randaug" in kind else []
        transform = transforms.Compose([*rand_augment, transforms.RandomCrop(x.shape[-2:], run.settings["padding"]),
                                        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(0.5, 0.25)])
        loader = DataLoader(n * [to_pil_image(image) for image in x.cpu()], batch_size, num_workers=2, persistent_workers=True,
                            collate_fn=partial(one_by_one, transform))
        times = timed({"ours": repeat(n, lambda: run.augment(x)), "loader": lambda: list(loader)[-1]}, rounds)
        ours, loaders = (statistics.median(seconds) for seconds in times.values())
        record[kind] = {"seconds": ours / n, "images": n * batch_size / ours, "loader": n * batch_size / loaders,
                        "ratio": statistics.median(b / a for a, b in zip(times["ours"], times["loader"]))}
    return record


def repeat(n, step):
    """A function that makes n steps and returns what the last one does."""
    def steps():
        for _ in range(n):
            result = step()
        return result
    return steps


def summary(times, base):
    """Median, least and most of `times`, and the median of their ratios to those of `base`."""
    return {"seconds": statistics.median(times), "min": min(times), "max": max(times),
            "ratio": statistics.median(t / b for t, b in zip(times, base))}


def speed(name, batch_size, rounds, dataset="cifar10", depths=(2, 4, 8, 12), n=100):
    """Measure training steps, inference and memory; returns the record that `show_speed` prints.

    The machine's own rate is that of a product of two square matrices, timed between the steps.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if device.type == "cuda" else 2048
    augment = augment_speed(dataset, batch_size, rounds, device)    # first: processes that fork make what memory is held slow to write
    matrix, flops = torch.randn(size, size, device=device), {}
    steps = {method: random_step(method, name, dataset, batch_size, device) for method in METHODS}
    for method, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        flops[method] = counter.get_total_flops()
    times = timed({**steps, "matrix": lambda: matrix @ matrix}, rounds)
    rate = 2 * size ** 3 / statistics.median(times["matrix"])                           # FLOP/s
    inference = timed(make_inference(name, dataset, n, device), rounds)
    deep = {L: re.sub(r"\d+(\]?)$", rf"{L}\1", name) for L in depths}
    compared = list(METHODS)[:2]
    memory = measure_memory([(method, name, dataset, batch_size, device) for method in METHODS]
                            + [(method, model, dataset, batch_size, device) for method in compared for model in deep.values()])
    table = {method: {**summary(times[method], times["BP"]), "gigaflop": flops[method] / 1e9,
                      "share": flops[method] / rate / statistics.median(times[method]),
                      "megabytes": memory.get((method, name))} for method in METHODS}
    return {"command": "python " + " ".join(sys.argv), "device": describe_device(device), "torch": torch.__version__,
            "model": name, "dataset": dataset, "batch_size": batch_size, "rounds": rounds, "gigaflops": rate / 1e9,
            "methods": table, "augment": augment,
            "images": n, "inference": {way: summary(t, inference["CFF+M, one pass"]) for way, t in inference.items()},
            "megabytes_by_depth": {method: {L: memory.get((method, model)) for L, model in deep.items()} for method in compared}}


def show_speed(record):
    """Print a record of `speed` as Markdown tables."""
    print("A training step of {model} on {dataset}'s sizes, batch {batch_size}, on {device}, torch {torch}; medians of {rounds} rounds. "
          "Matrix products alone reach {gigaflops:.0f} GFLOP/s:\n".format(**record))
    rows = [["Method", "Seconds (least-most)", "/ BP", "GFLOP", "Share of that rate", "Peak memory, MB", "/ BP"]]
    base = record["methods"]["BP"]["megabytes"]
    for method, row in record["methods"].items():
        rows.append([method, f"{row['seconds']:.2f} ({row['min']:.2f}-{row['max']:.2f})", f"{row['ratio']:.2f}",
                     f"{row['gigaflop']:.0f}", f"{row['share']:.0%}",
                     *([f"{row['megabytes']:.0f}", f"{row['megabytes'] / base:.2f}"] if base else "--")])
    print_table(rows, markdown=True)
    print("\nAugmenting a batch, and the same image by image in a DataLoader with two processes:\n")
    rows = [["Augmentation", "ms a batch", "Share of a step of 2 views", "Images/s", "Image by image, images/s", "Ratio"]]
    for kind, row in record["augment"].items():
        rows.append([kind, f"{1000 * row['seconds']:.1f}", f"{2 * row['seconds'] / record['methods']['CFF+M, 2 views']['seconds']:.1%}",
                     f"{row['images']:.0f}", f"{row['loader']:.0f}", f"{row['ratio']:.0f}"])
    print_table(rows, markdown=True)
    print(f"\nInference, {record['images']} images at once:\n")
    rows = [["Way", "ms an image (least-most)", "/ CFF+M"]]
    for way, row in record["inference"].items():
        ms = [1000 * row[key] / record["images"] for key in ("seconds", "min", "max")]
        rows.append([way, f"{ms[0]:.2f} ({ms[1]:.2f}-{ms[2]:.2f})", f"{row['ratio']:.1f}"])
    print_table(rows, markdown=True)
    print("\nPeak memory of a step by the number of layers, MB:\n")
    rows = [["Method", *record["megabytes_by_depth"]["BP"]]]
    rows += [[method, *("-" if value is None else f"{value:.0f}" for value in by_depth.values())]
             for method, by_depth in record["megabytes_by_depth"].items()]
    print_table(rows, markdown=True)


# --------------------------------------------------------------------------------------------- the pipeline (Sec. 5.1, Fig. 8)

def read_trace(folder):
    """trace.csv of a run with --pipeline, a dict a row: process, batch, event, waited_for (None if nothing), start, end.

    Raises OSError if there is none.
    """
    path = Path(folder) / "trace.csv"
    if not path.exists():
        raise FileNotFoundError(f"{folder}: no trace of a pipeline here (trace.csv; train.py --pipeline writes it)")
    with open(path, newline="") as file:
        return [{"process": int(row["process"]), "batch": int(row["batch"]), "event": row["event"],
                 "waited_for": int(row["waited_for"]) if row["waited_for"] else None,
                 "start": float(row["start"]), "end": float(row["end"])} for row in csv.DictReader(file)]


def longest_chain(trace):
    """The most local steps of a trace that had to wait for each other: n + N - 1 for N batches on n processes (Sec. 5.1).

    A process's step on a batch comes after its step before; after the step that it received its input from; and, if it waited
    until an older message had left, after the step that the receiver had made before that message's own, at the latest.
    """
    after = {(row["process"], row["batch"]): [(row["process"], row["batch"] - 1)] for row in trace if row["event"] == "step"}
    for row in trace:
        if row["event"] == "receive":
            after[row["process"], row["batch"]].append((row["process"] - 1, row["waited_for"]))
        if row["event"] == "send" and row["waited_for"] is not None:
            after[row["process"], row["batch"]].append((row["process"] + 1, row["waited_for"] - 1))
    length = {}
    for step in sorted(after, key=lambda step: (step[1], step[0])):                     # by batch, then by process
        length[step] = 1 + max(length.get(earlier, 0) for earlier in after[step])
    return max(length.values())


def show_schedule(folder, batches=8):
    """Print what the processes of a pipeline did in the run's last epoch; draw its first batches, schedule.png in the folder."""
    trace = read_trace(folder)
    steps = [row for row in trace if row["event"] == "step"]
    n, N, total = 1 + max(row["process"] for row in steps), 1 + max(row["batch"] for row in steps), max(row["end"] for row in steps)
    print(f"{folder}: {N} batches on {n} processes: the longest chain of dependent steps has {longest_chain(trace)}; one process alone "
          f"makes {n * N}")
    rows = [["Process", "worked", "waited for its input", "waited to send", "idle before and after"]]
    for process in range(n):
        spent = {event: sum(row["end"] - row["start"] for row in trace if row["process"] == process and row["event"] == event)
                 for event in ("step", "receive", "send")}
        rows.append([process + 1, *(f"{seconds / total:.1%}" for seconds in (spent["step"] - spent["receive"] - spent["send"],
                                                                           spent["receive"], spent["send"], total - spent["step"]))])
    print_table(rows)
    try:
        draw_schedule(trace, n, min(batches, N), Path(folder) / "schedule.png")
    except ImportError as reason:                                   # the numbers stand without it
        print(reason)
    return rows


def draw_schedule(trace, n, batches, path):
    """Fig. 8: a line for each of n processes, a bar for each step on the first `batches`, hatched where it waits."""
    figure, axis = pyplot().subplots(figsize=(9, 1.5 + 0.5 * n), layout="constrained")
    received = {}                                                   # when the last of a step's messages had come
    for row in trace:
        if row["batch"] < batches:
            place = dict(y=row["process"], left=row["start"], width=row["end"] - row["start"], height=0.8)
            if row["event"] == "step":
                axis.barh(**place, color=COLOURS[row["batch"] % 6], edgecolor="white")
                middle = (received.get(row["process"], row["start"]) + row["end"]) / 2
                axis.text(middle, row["process"], row["batch"] + 1, ha="center", va="center", zorder=3)
            else:                                                   # a wait within a step, and noted before it
                if row["event"] == "receive":
                    received[row["process"]] = row["end"]
                axis.barh(**place, color="white", edgecolor="grey", hatch="////", linewidth=0, zorder=2)
    axis.set(xlabel="seconds", yticks=range(n), yticklabels=[f"process {process + 1}" for process in range(n)],
             title=f"{path.parent.name}: the steps on batches 1 to {batches} (hatched: waiting)")
    axis.invert_yaxis()
    save(figure, path)


def piped_steps(method, N, *case):
    """A function that trains on the same random batch N times, by all processes, each its layers."""
    run, x, y = random_run(method, *case)
    part = part_of(run)
    step, segment = make_step(part, make_optimizers(part.model, part.settings)), part.model

    def epoch():
        with segment.epoch([len(y)] * N):
            for _ in segment.steps(range(N)):
                step(x if segment.rank == 0 else y, y)
        return y
    return epoch


def data_parallel_steps(N, *case):
    """A function that trains N times by BP, each process on its share of the batch (DistributedDataParallel)."""
    run, x, y = random_run("BP", *case)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = run.model

        def forward(self, images):
            return self.model.head(encode(self.model, images)[-1])

    rows = torch.arange(len(y), device=y.device).tensor_split(dist.get_world_size())[dist.get_rank()]
    whole, (optimizer,) = DistributedDataParallel(Whole()), make_optimizers(run.model, run.settings)

    def epoch():
        for _ in range(N):
            update(optimizer, cross_entropy(whole(run.augment(x[rows])), y[rows]))
        return y
    return epoch


def pipeline_speed(name, batch_size, rounds, N, dataset="cifar10"):
    """Time N batches in the first process alone and in all of them: by the pipeline and, for BP, by DistributedDataParallel.

    Returns the record that `show_pipeline_speed` prints; None in all processes but the first. Matrix products, the same number in
    each process, tell what more processes can gain on this machine.
    """
    device, n = torch.device("cuda" if torch.cuda.is_available() else "cpu"), dist.get_world_size()
    size, case = 8192 if device.type == "cuda" else 2048, (name, dataset, batch_size, device)
    piped_steps("CFF+M, 1 view", 1, f"vit-8-2-{n}", dataset, 8, device)()               # a small step first, as in step_memory
    memory = gather(peak_of(lambda: piped_steps("CFF+M, 1 view", 2, *case)(), device), device)
    matrix = torch.randn(size, size, device=device)

    def together(steps):                                            # from one moment at which all are ready to another
        def run():
            dist.barrier()
            result = steps()
            dist.barrier()
            return result
        return run

    def alone(steps):
        return together(steps if dist.get_rank() == 0 else lambda: matrix[0, 0])

    product = repeat(10, lambda: matrix @ matrix)
    steps = {"Matrix products": (product, product)}
    for method in ("CFF+M, 1 view", "CFF+M, 2 views"):
        steps[method] = (repeat(N, random_step(method, *case)), piped_steps(method, N, *case))
    steps["BP"] = (repeat(N, random_step("BP", *case)), data_parallel_steps(N, *case))
    times = timed({(what, way): together(s) if way else alone(s) for what, both in steps.items() for way, s in enumerate(both)}, rounds)
    if memory is None:
        return None
    work = {what: n if what == "Matrix products" else 1 for what in steps}              # of all processes to that of one alone
    return {"command": f"torchrun --nproc-per-node {n} " + " ".join(sys.argv), "device": describe_device(device),
            "torch": torch.__version__, "model": name, "dataset": dataset, "batch_size": batch_size, "rounds": rounds, "batches": N,
            "processes": n, "megabytes": memory,
            "methods": {what: {"alone": statistics.median(times[what, 0]), "together": statistics.median(times[what, 1]),
                               "gain": [work[what] * a / b for a, b in zip(times[what, 0], times[what, 1])],
                               "to_bp": [b / a for a, b in zip(times[what, 1], times["BP", 1])]} for what in steps}}


def show_pipeline_speed(record):
    """Print a record of `pipeline_speed` as a Markdown table."""
    print("{batches} batches of {batch_size} random images of {dataset}'s sizes, {model}, {processes} processes, {device}, torch {torch}; "
          "medians of {rounds} rounds (least-most):\n".format(**record))
    rows = [["What", "One process, s", f"{record['processes']} processes, s", "Gain", "Gain / matrix products'", "Speed / BP's"]]
    most = record["methods"]["Matrix products"]["gain"]
    for what, row in record["methods"].items():
        share = [gain / product for gain, product in zip(row["gain"], most)]
        rows.append([what, f"{row['alone']:.1f}", f"{row['together']:.1f}", ranged(row["gain"]), ranged(share),
                     "-" if what == "Matrix products" else ranged(row["to_bp"])])
    print_table(rows, markdown=True)
    if None not in record["megabytes"]:
        print("\nPeak memory of the processes, one view, {model}, batch {batch_size}: ".format(**record)
              + " + ".join(f"{mb:.0f}" for mb in record["megabytes"]) + " MB")


def ranged(values):
    """Median of values, their least and most: "1.80 (1.75-1.84)"."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


# ---------------------------------------------------------------------------------------------------------- command line

ERRORS = (OSError, ValueError, RuntimeError, ImportError)           # no run, a damaged one, no data, senseless sizes, no matplotlib


def main():
    """The command line; what cannot be shown ends with one line and exit status 2."""
    parser = argparse.ArgumentParser("eval.py", usage="eval.py RUN [RUN ...] | --margins M0 ML L | --show-views | --speed; --help",
                                     description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs: one to test it, several for a table")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--layers", action="store_true", help="Fig. 5 of each run, layer by layer; layers.png in its folder")
    pictures.add_argument("--schedule", action="store_true", help="Fig. 8 of each run with --pipeline; schedule.png in its folder")
    pictures.add_argument("--figure", metavar="FILE", help="draw the runs' accuracies; with --margins or --show-views: the picture's name")
    parser.add_argument("--data-dir", help="where the data sets are, if not where the run found them")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown, also that of one run")
    parser.add_argument("--margins", nargs=3, metavar=("M0", "ML", "L"), help="Fig. 4a; margins.png")
    parser.add_argument("--show-views", action="store_true", help="augmented views of images; views.png")
    parser.add_argument("--dataset", choices=CHOICES["dataset"], help="for --show-views [shapes], and --speed [cifar10]")
    parser.add_argument("--speed", action="store_true", help="measure training, inference and memory on this machine")
    parser.add_argument("--model", default="vit-128-4-5", help="for --speed [vit-128-4-5]")
    parser.add_argument("--batch-size", type=int, default=512, help="for --speed [512]")
    parser.add_argument("--rounds", type=int, default=5, help="for --speed: measured rounds, after one to warm up [5]")
    parser.add_argument("--batches", type=int, default=20, help="for --speed with torchrun: batches of each measurement [20]")
    parser.add_argument("--json", metavar="FILE", help="for --speed: write the numbers there too")
    args = parser.parse_args()
    keep_memory()
    if bool(args.runs) + args.speed + bool(args.margins) + args.show_views != 1 or min(args.rounds, args.batches) < 1:
        parser.error("name the folders of runs, or say one of --margins, --show-views, --speed (with --rounds 1 or more)")
    if args.runs and (args.dataset or args.json):
        parser.error("--dataset and --json are for --speed, --dataset also for --show-views; a run has its own data")
    folders = [folder for name in args.runs for folder in sorted(glob.glob(name)) or [name]]       # some shells leave * to us
    try:
        if args.speed:
            case, piped = (args.model, args.batch_size, args.rounds), "WORLD_SIZE" in os.environ        # started by torchrun
            if piped:
                connect()
                record = pipeline_speed(*case, args.batches, args.dataset or "cifar10")
                dist.destroy_process_group()
            else:
                record = speed(*case, args.dataset or "cifar10")
            if record:                                              # only the first process has it
                show_pipeline_speed(record) if piped else show_speed(record)
            if record and args.json:
                Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
        elif args.margins:
            m0, mL, L = args.margins
            draw_margins(float(m0), float(mL), int(L), args.figure or "margins.png")
        elif args.show_views:
            settings = defaults(args.dataset or "shapes", "cffm")
            draw_views(settings | {"data_dir": args.data_dir or settings["data_dir"]}, args.figure or "views.png")
        elif args.layers or args.schedule:
            shown = 0
            for folder in folders:                                  # one that fails does not keep the others from being shown
                try:
                    shown += bool(show_layers(folder, args.data_dir) if args.layers else show_schedule(folder))
                except ERRORS as reason:
                    print(f"eval.py: {str(reason).splitlines()[0]}", file=sys.stderr)
            if not shown:
                raise SystemExit(2)
        elif len(folders) > 1 or args.markdown or args.figure:
            show_table(folders, args.markdown)
            if args.figure:
                draw_runs(folders, args.figure)
        else:
            evaluate(folders[0], args.data_dir)
    except ERRORS as reason:
        parser.error(str(reason).splitlines()[0])


if __name__ == "__main__":
    main()
