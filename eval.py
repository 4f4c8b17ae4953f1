"""What a run learned, asked as the paper's results section asks it, and what a training step costs.

    python eval.py runs/NAME                            test accuracy: top-1, top-5, top-10, by class, and a probe on each layer
    python eval.py runs/NAME --layers                   Fig. 5, layer by layer, on validation data; layers.png in the run's folder
    python eval.py runs/* [--markdown]                  a row a run, or a group of seeds, from their records (Tables 1, 3-6, Fig. 6)
    python eval.py runs/* --figure curves.png           accuracy against what varies among the runs (Figs. 4b, 7, Table 4)
    python eval.py --margins 0.4 0.1 8                  Fig. 4a
    python eval.py --show-views --dataset cifar10       the views of a few images as the network gets them
    python eval.py --speed --model vit-128-4-5          Tables 2 and 6 on this machine: time and memory of training and inference

A run's folder holds all that is needed; no setting has to be said again. Pictures need matplotlib, t-SNE scikit-learn.
"""
import argparse
import csv
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from cff import bp_step, collab_step, cff_step, encode_neutral, ff_step, predict
from losses import ff_loss, margins
from train import (CHOICES, COLOURS, DEFAULTS, LABELS, METRIC, SHAPES, Probe, Run, accuracy, describe_device, load_data,
                   make_augment, mean_and_std, parse, pyplot)
from vit import build_model

NAMES = {"cff": "CFF", "cffm": "CFF+M", "ff": "FF", "symba": "SymBa", "collab": "FF Collab", "scl": "SCL", "bp": "BP+CE"}
CLASSES = {"shapes": list(SHAPES), "mnist": list("0123456789"),
           "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split()}


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


def read_log(folder):
    """The rows of stage 1 in a run's log.csv: a list of {column: float}."""
    with open(Path(folder) / "log.csv") as file:
        return [{column: float(value) for column, value in row.items() if value} for row in csv.DictReader(file)
                if row["stage"] == "1"]


def read_record(folder):
    """A finished run's (name, settings, config, result, log of stage 1); OSError, in one line, if it is none, or damaged."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise OSError(f"{folder}: no run (config.json is missing)")
    if not (folder / "result.json").exists():
        raise OSError(f"{folder}: not finished; go on with: python train.py --resume --out {folder}")
    try:
        config, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
        settings, log = {**DEFAULTS, **config["settings"]}, read_log(folder)
        result["test_" + result["metric"]], log[0]["seconds"], config["data"]["images"]
    except (OSError, ValueError, LookupError, TypeError) as reason:
        raise OSError(f"{folder}: config.json, result.json or log.csv cannot be read ({type(reason).__name__})")
    return folder.name, settings, config, result, log


def read_groups(folders):
    """Finished runs, those that differ in the seed alone together: a list of lists of what `read_record` gives.

    What is no finished run is named on stderr and left out; raises OSError if nothing remains.
    """
    groups = {}
    for folder in folders:
        try:
            record = read_record(folder)
        except OSError as reason:
            print(f"eval.py: {reason}", file=sys.stderr)
            continue
        groups.setdefault(json.dumps([essential(record[1]), record[2]["device"]]), []).append(record)
    if not groups:
        raise OSError("none of these folders holds a finished run")
    return list(groups.values())


def essential(settings):
    """The settings without those that say only where and with which seed."""
    return {name: value for name, value in settings.items() if name not in ("seed", "out", "data_dir", "device")}


# ------------------------------------------------------------------------------------------------------ accuracy of a run

@torch.no_grad()
def layer_features(run, images):
    """Each layer's pooled, normalised output f for uint8 images (N, C, H, W): L tensors (N, E); FF's are of the neutral label."""
    parts = [encode_neutral(run.model, run.normalise(part)) for part in images.split(500)]
    return [normalize(torch.cat(layer)) for layer in zip(*parts)]


def probe_layers(run, most=10000):
    """Test accuracy in % of a linear classifier on each layer, fitted in closed form to `most` training images: L floats."""
    (images, y), (test_images, test_y), result = run.train, run.test, []
    for f, test_f in zip(layer_features(run, images[:most]), layer_features(run, test_images)):
        probe = Probe(run.classes)
        probe.add(f, y[:most])
        result.append(100 * probe.correct(test_f, test_y).item() / len(test_y))
    return result


def evaluate(folder, data_dir=None):
    """Print the accuracy of the run in `folder` on its test set; returns {1: top-1, 5: top-5, 10: top-10} in %."""
    run = open_run(folder, data_dir)
    settings, (images, y) = run.settings, run.test
    measure = lambda rows: accuracy(run.model, images[rows], y[rows], run.normalise, settings)
    top, by_class = measure(y >= 0), [(measure(y == label)[1], label) for label in range(run.classes)]
    print(f"{folder}: {settings['algo']} with {settings['model']} on {settings['dataset']}, {len(y)} test images")
    print("  ".join(f"top-{k} {value:.2f} %" for k, value in top.items()))
    k = int(METRIC[settings["dataset"]].removeprefix("top"))
    print(f"The paper's metric for {settings['dataset']} is top-{k}: {top[k]:.2f} %")
    few = run.classes <= 20
    names = CLASSES.get(settings["dataset"], range(run.classes))
    shown = by_class if few else sorted(by_class, reverse=True)[:5] + sorted(by_class)[:5]
    print(f"Top-1 of {'each class' if few else 'the best five and the worst five classes'}: "
          + ", ".join(f"{names[label]} {value:.1f}" for value, label in shown))
    print("Linear probe on each layer: " + ", ".join(f"{value:.1f} %" for value in probe_layers(run)))
    return top


# ------------------------------------------------------------------------------------------ layer by layer (Sec. 4.2, Fig. 5)

def fisher_criterion(f, y, averaged=False):
    """Tr(S_w^-1 S_b), Eqs. 19-22, of representations f (N, E) with labels y (N,): a float, larger for classes further apart.

    averaged: S_w as the mean over the C classes where Eq. 19 has the sum; the criterion is then C times as large. A singular
    S_w (a unit that is always off) is inverted on the rest of the space. Computed in float64.
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
    """Rows of an anchor, a positive and a negative, (3,): the first image, and of its positives and its negatives those whose
    cosine in f (N, E) is the median."""
    s, rows = f @ f[0], [0]
    for mask in (y == y[0], y != y[0]):
        others = mask.nonzero()[:, 0]
        others = others[others > 0]
        rows.append(others[s[others].argsort()[len(others) // 2]].item())
    return rows


def show_layers(folder, data_dir=None):
    """Print Fig. 5's numbers for the run in `folder` and draw it, layers.png in that folder; returns the rows, a dict a layer."""
    run, log = open_run(folder, data_dir), read_log(folder)
    images, y = run.val
    features = layer_features(run, images)
    three, rows = three_images(features[0], y), []
    for l, f in enumerate(features, start=1):
        s = f[three] @ f[three[0]]
        rows.append({"Layer": l, "Fisher": fisher_criterion(f, y), "Fisher, averaged S_w": fisher_criterion(f, y, averaged=True),
                     **{name: log[-1].get(f"{column}_{l}") for name, column in FIG5_COLUMNS.items()},
                     "Cosine to the positive": s[1].item(), "to the negative": s[2].item()})
    print(f"{folder}: {len(y)} validation images; losses and |R|/|P| are those of the last epoch")
    print_table([list(rows[0])] + [[f"{x:.3f}" if isinstance(x, float) else "-" if x is None else x for x in row.values()]
                                   for row in rows])
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


FIG5_COLUMNS = {"Train loss": "train_loss", "Val loss": "val_loss", "Train |R|/|P|": "train_saturated",
                "Val |R|/|P|": "val_saturated"}


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
    """Row 2 of Fig. 5: the first 1,000 rows of each layer's features in two dimensions, a colour and a name a class."""
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
        axis.scatter(*place.T, c=y, cmap="tab10" if few else "turbo", s=5)
        axis.set(xticks=[], yticks=[])
        for c in y.unique() if few else []:
            x_c, y_c = (coordinate[(y == c).numpy()] for coordinate in place.T)
            axis.text(statistics.median(x_c.tolist()), statistics.median(y_c.tolist()), names[c] if names else int(c), fontsize=8,
                      ha="center", va="center", bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75})
    axes[0].set_ylabel("t-SNE")


def draw_epochs(axes, log):
    """Row 3 of Fig. 5: training and validation loss by epoch (right), share of saturated pairs |R|/|P| in % (left)."""
    epochs = [row["epoch"] for row in log]
    twins = [axis.twinx() for axis in axes]
    for l, (left, right) in enumerate(zip(axes, twins), start=1):
        for axis, column, colour, scale in ((left, "saturated", COLOURS[1], 100), (right, "loss", COLOURS[0], 1)):
            for part, style in (("train", "-"), ("val", "--")):
                values = [scale * row[f"{part}_{column}_{l}"] for row in log if f"{part}_{column}_{l}" in row]
                if values:
                    axis.plot(epochs, values, style, color=colour, lw=1.3)
        left.set_xlabel("epoch")
        left.xaxis.get_major_locator().set_params(integer=True)
        left.tick_params(axis="y", colors=COLOURS[1])
        right.tick_params(axis="y", colors=COLOURS[0])
    for row, side in ((axes, 0), (twins, -1)):                      # one scale for all layers, its numbers at one end
        limits = [axis.get_ylim() for axis in row if axis.lines]
        for number, axis in enumerate(row):
            if limits:
                axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
            if number != side % len(row):
                axis.set_yticklabels([])
    axes[0].set_ylabel("|R|/|P|, %", color=COLOURS[1])
    twins[-1].set_ylabel("loss", color=COLOURS[0])
    axes[0].set_title("— training   - - validation", fontsize=8, loc="left")


def draw_angles(axis, three, positive, negative):
    """Row 4 of Fig. 5: anchor, positive (up) and negative (down) as unit vectors, each at its angle to the anchor."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage
    for image, cosine, sign, colour in zip(three, (1, positive, negative), (0, 1, -1), ("black", COLOURS[0], COLOURS[1])):
        cosine = max(-1.0, min(1.0, cosine))
        x, y = cosine, sign * (1 - cosine ** 2) ** 0.5
        axis.plot([0, x], [0, y], color=colour, lw=2)
        picture = OffsetImage(image.permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.permute(1, 2, 0),
                              zoom=28 / image.shape[-1], cmap="gray")
        axis.add_artist(AnnotationBbox(picture, (1.35 * x + 0.1 * (sign == 0), 1.35 * y + 0.42 * sign * (abs(y) < 0.3)), pad=0.15,
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


def epochs_to_convergence(settings, log):
    """Fig. 6: the first epoch at which the validation loss has made 99 % of its total fall, from the first epoch to its least.

    The loss is the one that chooses the epoch: the last layer's, or FF's, SymBa's and Collab's over all layers but the first.
    """
    losses = [[value for column, value in row.items() if column.startswith("val_loss")] for row in log]
    v = [sum(row[1:] or row) if settings["algo"] in LABELS else row[-1] for row in losses]
    return next(epoch for epoch, value in enumerate(v, start=1) if v[0] - value >= 0.99 * (v[0] - min(v)))


def show_table(folders, markdown=False):
    """Print a row for each finished run; runs that differ in the seed alone share one. Equal columns are said once, above."""
    rows = []
    for runs in read_groups(folders):
        names, all_settings, configs, results, logs = zip(*runs)
        s, seeds = all_settings[0], [settings["seed"] for settings in all_settings]
        one_view = s["algo"] in LABELS or s["algo"] == "bp"
        rows.append({
            "Run": names[0].removesuffix(f"-s{seeds[0]}") if len(runs) > 1 else names[0],
            "Method": s["algo"] + (" + head" if s["head"] else ""), "Model": s["model"], "Data": s["dataset"],
            "Images": configs[0]["data"]["images"][0], "Augment": s["augment"], "Views": 1 if one_view else s["views"],
            "Pool": s["pool"] if "vit" in s["model"].lower() else "-", "Missing": s["missing"], "Wrong": s["label_noise"],
            "Epochs": f"{s['epochs']}" + ("" if results[0]["best_head_epoch"] is None else f" + {s['head_epochs']}"),
            "Seeds": ", ".join(map(str, sorted(seeds))), "Validation %": spread([result["val_top1"] for result in results]),
            "Test %": spread([result["test_" + result["metric"]] for result in results]),
            "Converged": spread([epochs_to_convergence(s, log) for log in logs], 0),
            "s/epoch": spread([statistics.median(row["seconds"] for row in log) for log in logs]),
            "MB": spread([result.get("peak_memory_mb") for result in results], 0)})
    same = [column for column in ("Data", "Images", "Augment", "Views", "Pool", "Missing", "Wrong")
            if len({row[column] for row in rows}) == 1]
    print("In all rows: " + ", ".join(f"{column.lower()} {rows[0][column]}" for column in same) + "\n")
    columns = [column for column in rows[0] if column not in same]
    print_table([columns] + [[row[column] for column in columns] for row in rows], markdown)


# ------------------------------------------------------------------------------------------------------------ figures of runs

def what_varies(groups):
    """The setting in which runs of one method differ, "" if none; ValueError if runs of a method differ in several."""
    varied = set()
    for algo in {group[0][1]["algo"] for group in groups}:
        settings = [essential(group[0][1]) for group in groups if group[0][1]["algo"] == algo]
        varied |= {name for name in settings[0] if len({str(s[name]) for s in settings}) > 1}
    if len(varied) > 1:
        raise ValueError(f"these runs cannot be compared in one figure: runs of a method differ in {', '.join(sorted(varied))}")
    return varied.pop() if varied else ""


def size_of(model):
    """The numbers of a model's name, to put models in order: "vit-128-4-5" -> [128, 4, 5]."""
    return [int(number) for number in re.findall(r"\d+", model)]


def draw_runs(folders, path):
    """Accuracy against the setting that varies (Figs. 4b, 7, Table 4), a line a method; a method with one run is a level line.

    If only the method varies: the probe's validation accuracy by epoch. Table 4's settings make validation labels wrong or
    few, so there it is the test accuracy. Raises ValueError if runs of a method differ in several settings.
    """
    groups = read_groups(folders)
    varied, plt = what_varies(groups), pyplot()
    if len({group[0][1]["dataset"] for group in groups}) > 1:
        raise ValueError("these runs cannot be compared in one figure: their data sets differ")
    on_test = varied in ("missing", "label_noise")
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    values = sorted({group[0][1][varied] for group in groups}, key=size_of if varied == "model" else None) if varied else []
    numbers = values and not isinstance(values[0], str)
    methods = [algo for algo in NAMES if any(group[0][1]["algo"] == algo for group in groups)]
    for number, algo in enumerate(methods):
        mine = [group for group in groups if group[0][1]["algo"] == algo]
        look = {"color": COLOURS[number], "marker": "osD^vPX"[number], "label": NAMES[algo]}
        if not varied:
            curves = [[row["probe"] for row in log] for *_, log in mine[0]]
            mean = [statistics.mean(values) for values in zip(*curves)]
            axis.plot(range(1, len(mean) + 1), mean, **look, markevery=max(1, len(mean) // 10), ms=5)
            axis.fill_between(range(1, len(mean) + 1), *zip(*[(min(v), max(v)) for v in zip(*curves)]), color=look["color"], alpha=0.15)
            continue
        points = []
        for group in sorted(mine, key=lambda group: values.index(group[0][1][varied])):
            accuracies = [result["test_" + result["metric"]] if on_test else result["val_top1"] for _, _, _, result, _ in group]
            x = group[0][1][varied] if numbers else values.index(group[0][1][varied])
            points.append((x, statistics.mean(accuracies), statistics.stdev(accuracies) if len(accuracies) > 1 else 0))
        if len(points) == 1:
            axis.axhline(points[0][1], color=look["color"], ls="--", label=f"{NAMES[algo]} ({points[0][1]:.1f})")
        else:
            axis.errorbar(*list(zip(*points))[:2], yerr=[point[2] for point in points], capsize=3, **look)
    if varied and not numbers:
        axis.set_xticks(range(len(values)), values)
    if not varied:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(f"--{varied.replace('_', '-')}" if varied else "epoch")
    axis.set_ylabel("test accuracy, %" if on_test else "validation accuracy, %" if varied else "validation accuracy of the probe, %")
    s, seeds = groups[0][0][1], sorted({record[1]["seed"] for group in groups for record in group})
    fixed = [s["dataset"], *([s["model"]] if varied != "model" else []), f"{groups[0][0][2]['data']['images'][0]} images"]
    axis.set_title(f"{', '.join(fixed)}; seeds {', '.join(map(str, seeds))}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def draw_margins(m0, mL, L, path):
    """Fig. 4a: the margins of L layers from m0 down to mL, by each --decay."""
    lines = {decay: margins(m0, mL, L, decay) for decay in CHOICES["decay"]}
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
    """Two views of n training images under each --augment, as the network gets them, shown in the data's own colours."""
    plt = pyplot()
    images, y, _, _ = load_data(settings["dataset"], settings["data_dir"])
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(settings["seed"]))[:n]
    (mean, std), images = mean_and_std(images), images[rows]
    shown = [("as shipped", images / 255)]
    for kind in CHOICES["augment"][1:]:
        augment = make_augment(kind, settings["padding"], mean, std, torch.Generator().manual_seed(settings["seed"]),
                               flip=settings["dataset"] != "mnist")
        for view in (1, 2):
            x = augment(images) * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
            shown.append((f"{kind}, view {view}", x))
    figure, axes = plt.subplots(len(shown), 1, figsize=(n + 1.5, len(shown)), layout="constrained")
    for axis, (name, x) in zip(axes, shown):
        strip = torch.cat(list(torch.nn.functional.pad(x, [1, 1, 1, 1], value=1)), dim=2).clamp(0, 1)       # (C, H + 2, n (W + 2))
        axis.imshow(strip.permute(1, 2, 0).squeeze(2) if len(strip) == 1 else strip.permute(1, 2, 0), cmap="gray")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"{settings['dataset']}, --padding {settings['padding']}")
    save(figure, path)


# ------------------------------------------------------------------------------------- cost of a step (Tables 2 and 6)

METHODS = ("BP", "CFF+M, 1 view", "CFF+M, 2 views", "FF", "FF Collab")


def make_step(method, name, batch_size, device):
    """A function that trains on one batch of random 32 x 32 images by one of METHODS."""
    torch.manual_seed(0)
    model = build_model(name, (3, 32, 32), 10, labels="one-hot" if "FF" in method and "CFF" not in method else None).to(device)
    x = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    y = torch.randint(10, (batch_size,), device=device)
    augment = make_augment("crop", 12, [0.5] * 3, [0.25] * 3, torch.Generator(device))
    if method == "BP":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0005, fused=True)
        return lambda: bp_step(model, optimizer, x, y, augment)
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.004, fused=True) for layer in model.layers]
    if method == "FF":
        return lambda: ff_step(model, optimizers, x, y, augment, ff_loss)
    if method == "FF Collab":
        return lambda: collab_step(model, optimizers, x, y, augment)
    layer_margins, views = margins(0.4, 0.1, len(model.layers)), {"CFF+M, 1 view": 1, "CFF+M, 2 views": 2}[method]
    return lambda: cff_step(model, optimizers, x, y, augment, layer_margins, 0.15, views)


def peak_memory(arguments):
    """What two steps need at their peak beyond what was there before, in MB; None where it cannot be measured."""
    method, name, batch_size, device = arguments
    make_step(method, name, 8, device)()                # a small step first: libraries are loaded, whatever the method
    step = make_step(method, name, batch_size, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        read = {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}
    elif Path("/proc/self/status").exists():            # Linux: resident memory now and at its peak, in kB
        lines = lambda: dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        read = {key: lambda key=key: 1024 * int(lines()[key].split()[0]) for key in ("VmRSS", "VmHWM")}
    else:
        return None
    before = read["VmRSS"]()
    step(), step()
    return (read["VmHWM"]() - before) / 1e6


def measure_memory(cases):
    """`peak_memory` of each case (method, name, batch_size, device), in a fresh process each; a list.

    There large blocks go back to the system when they are freed: what is left is what the method holds, without what the
    C library's allocator keeps in reserve.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"                # read by the new processes' glibc
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.map(peak_memory, cases, chunksize=1)


def make_inference(name, n, device):
    """Functions that classify n random images: CFF+M in one pass; FF with a head, and in one pass for each of 10 classes."""
    images = torch.randn(n, 3, 32, 32, device=device)
    cffm, ff = (build_model(name, (3, 32, 32), 10, labels=labels).to(device).eval() for labels in (None, "one-hot"))
    return {"CFF+M, one pass": lambda: predict(cffm, images, "cffm"), "FF, with head": lambda: predict(ff, images, "ff", head=True),
            "FF, a pass for each class": lambda: predict(ff, images, "ff")}


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


def summary(times, base):
    """Median, least and most of `times`, and the median of their ratios to those of `base`."""
    return {"seconds": statistics.median(times), "min": min(times), "max": max(times),
            "ratio": statistics.median(t / b for t, b in zip(times, base))}


def speed(name, batch_size, rounds, depths=(2, 4, 8, 12), n=100):
    """Measure training steps, inference and memory; returns the record that `show_speed` prints.

    The machine's own rate is that of a product of two square matrices, timed between the steps.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if device.type == "cuda" else 2048
    matrix, flops = torch.randn(size, size, device=device), {}
    steps = {method: make_step(method, name, batch_size, device) for method in METHODS}
    for method, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        flops[method] = counter.get_total_flops()
    times = timed({**steps, "matrix": lambda: matrix @ matrix}, rounds)
    rate = 2 * size ** 3 / statistics.median(times.pop("matrix"))                       # FLOP/s
    inference = timed(make_inference(name, n, device), rounds)
    deep = [re.sub(r"\d+(\]?)$", rf"{L}\1", name) for L in depths]
    cases = [(method, name) for method in METHODS] + [(method, model) for method in METHODS[:2] for model in deep]
    memory = measure_memory([(*case, batch_size, device) for case in cases])
    table = {}
    for method, megabytes in zip(METHODS, memory):
        table[method] = {**summary(times[method], times["BP"]), "rate": flops[method] / rate}
        table[method]["rate"] /= table[method]["seconds"]
        if memory[0]:
            table[method].update(megabytes=megabytes, memory_ratio=megabytes / memory[0])
    by_depth = {method: memory[len(METHODS):][k * len(depths):(k + 1) * len(depths)] for k, method in enumerate(METHODS[:2])}
    return {"command": "python " + " ".join(sys.argv), "device": describe_device(device), "torch": torch.__version__,
            "model": name, "batch_size": batch_size, "rounds": rounds, "gigaflops": rate / 1e9, "methods": table,
            "images": n, "inference": {way: summary(t, inference["CFF+M, one pass"]) for way, t in inference.items()},
            "depths": list(depths), "megabytes": by_depth if memory[0] else {}}


def show_speed(record):
    """Print a record of `speed` as Markdown tables."""
    print(f"A training step of {record['model']}, batch {record['batch_size']}, on {record['device']}, torch {record['torch']}; "
          f"medians of {record['rounds']} rounds. Matrix products alone reach {record['gigaflops']:.0f} GFLOP/s:\n")
    print("| Method | Seconds (least-most) | / BP | Share of that rate | Peak memory, MB | / BP |\n|---|---|---|---|---|---|")
    for method, row in record["methods"].items():
        memory = f"{row['megabytes']:.0f} | {row['memory_ratio']:.2f}" if "megabytes" in row else "- | -"
        print(f"| {method} | {row['seconds']:.2f} ({row['min']:.2f}-{row['max']:.2f}) | {row['ratio']:.2f} | {row['rate']:.0%} "
              f"| {memory} |")
    print(f"\nInference, {record['images']} images at once:\n\n| Way | ms an image (least-most) | / CFF+M |\n|---|---|---|")
    for way, row in record["inference"].items():
        ms = [1000 * row[key] / record["images"] for key in ("seconds", "min", "max")]
        print(f"| {way} | {ms[0]:.2f} ({ms[1]:.2f}-{ms[2]:.2f}) | {row['ratio']:.1f} |")
    if record["megabytes"]:
        print(f"\nPeak memory of a step by depth, MB:\n\n| Layers | {' | '.join(map(str, record['depths']))} |\n"
              "|---|" + len(record["depths"]) * "---|")
        for method, values in record["megabytes"].items():
            print(f"| {method} | {' | '.join(f'{value:.0f}' for value in values)} |")


# ---------------------------------------------------------------------------------------------------------- command line

ERRORS = (OSError, ValueError, RuntimeError, ImportError)           # no run, a damaged one, no data, senseless sizes, no matplotlib


def main():
    parser = argparse.ArgumentParser("eval.py", usage="eval.py RUN [RUN ...] | --margins M0 ML L | --show-views | --speed; --help",
                                     description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs: one to test it, several for a table")
    parser.add_argument("--layers", action="store_true", help="Fig. 5 of each run, layer by layer")
    parser.add_argument("--data-dir", help="where the data sets are, if not where the run found them")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown, also that of one run")
    parser.add_argument("--figure", metavar="FILE", help="draw the runs' accuracies, or name the picture of the next two")
    parser.add_argument("--margins", nargs=3, metavar=("M0", "ML", "L"), help="Fig. 4a; margins.png")
    parser.add_argument("--show-views", action="store_true", help="augmented views of images of --dataset; views.png")
    parser.add_argument("--dataset", choices=CHOICES["dataset"], default="shapes", help="for --show-views [shapes]")
    parser.add_argument("--speed", action="store_true", help="measure training, inference and memory on this machine")
    parser.add_argument("--model", default="vit-128-4-5", help="for --speed [vit-128-4-5]")
    parser.add_argument("--batch-size", type=int, default=512, help="for --speed [512]")
    parser.add_argument("--rounds", type=int, default=5, help="for --speed: measured steps of each method [5]")
    parser.add_argument("--json", metavar="FILE", help="for --speed: write the numbers there too")
    args = parser.parse_args()
    if bool(args.runs) + args.speed + bool(args.margins) + args.show_views != 1:
        parser.error("name the folders of runs, or say one of --margins, --show-views, --speed")
    try:
        if args.speed:
            record = speed(args.model, args.batch_size, args.rounds)
            show_speed(record)
            if args.json:
                Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
        elif args.margins:
            m0, mL, L = args.margins
            draw_margins(float(m0), float(mL), int(L), args.figure or "margins.png")
        elif args.show_views:
            data_dir = ["--data-dir", args.data_dir] if args.data_dir else []
            draw_views(parse(["--dataset", args.dataset, *data_dir])[0], args.figure or "views.png")
        elif args.layers:
            shown = 0
            for folder in args.runs:                                # one that fails does not keep the others from being shown
                try:
                    shown += bool(show_layers(folder, args.data_dir))
                except ERRORS as reason:
                    print(f"eval.py: {str(reason).splitlines()[0]}", file=sys.stderr)
            if not shown:
                raise SystemExit(2)
        elif len(args.runs) > 1 or args.markdown or args.figure:
            show_table(args.runs, args.markdown)
            if args.figure:
                draw_runs(args.runs, args.figure)
        else:
            evaluate(args.runs[0], args.data_dir)
    except ERRORS as reason:
        parser.error(str(reason).splitlines()[0])


if __name__ == "__main__":
    main()
