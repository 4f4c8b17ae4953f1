"""What a run learned, asked as the paper's results section asks it.

    python eval.py runs/NAME                        test accuracy, by class; a probe on each layer
    python eval.py runs/NAME --layers               Fig. 5, layer by layer; layers.png in its folder
    python eval.py runs/* [--markdown]              a row a run, or a group of seeds
    python eval.py runs/* --figure curves.png       accuracy against what varies (Figs. 4b, 7)
    python eval.py --margins 0.4 0.1 8              Fig. 4a, margins.png
    python eval.py --show-views --dataset cifar10   augmented images, views.png

A run's folder holds all that is needed but the data. Graphs need matplotlib, t-SNE scikit-learn.
"""
import argparse
import csv
import glob
import json
import os
import re
import statistics
import sys
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import torch
from torch.nn.functional import normalize
from torchvision.utils import save_image

from losses import margins
from train import (DEFAULTS, METRIC, SETTINGS, SHAPES, WITH_LABELS, Run, accuracy, choosing_loss,
                   defaults, layer_features, load_data, make_augment, probe, read, stages)

NAMES = {"cff": "CFF", "cffm": "CFF+M", "ff": "FF", "symba": "SymBa", "collab": "FF Collab",
         "scl": "SCL", "bp": "BP+CE"}
CLASSES = {"shapes": list(SHAPES),
           "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split()}
# a colour (of Okabe and Ito, told apart in print and with any colour vision) and a mark a method
COLOURS = dict(zip(NAMES, "#D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()))
MARKS = dict(zip(NAMES, "sD^vPXo"))


# ------------------------------------------------------------------------------------ reading runs

def open_run(folder, data_dir=None):
    """The `train.Run` in `folder` with its best weights so far; OSError, in one line, if none."""
    settings, weights = read(Path(folder) / "best.pt", "settings", "model")
    place = {"out": str(folder), "device": "auto", "data_dir": data_dir or settings["data_dir"]}
    run = Run(DEFAULTS | settings | place)
    run.model.load_state_dict(weights)
    return run


def read_log(folder, stage="1"):
    """The rows of a stage in a run's log.csv: a list of {column: float}."""
    with open(Path(folder) / "log.csv", newline="") as file:
        return [{column: float(value) for column, value in row.items() if value}
                for row in csv.DictReader(file) if row["stage"] == stage]


class Record(NamedTuple):
    """What is on disk of a finished run: the `log` of stage 1, the numbers of `images` by part."""
    name: str
    settings: dict
    result: dict
    log: list
    images: list

    def accuracy(self, part):
        """Its accuracy in % on "val" or "test" data, by the data set's metric."""
        return self.result[f"{part}_{self.result['metric']}"]


def read_record(folder):
    """The `Record` of a finished run; OSError, in one line, if the folder holds none."""
    folder = Path(folder)
    if (folder / "config.json").exists() and not (folder / "result.json").exists():
        raise OSError(f"{folder}: not finished; python train.py --resume --out "
                      + quote(str(folder)))
    try:
        files = ("config.json", "result.json")
        config, result = (json.loads((folder / file).read_text()) for file in files)
        return Record(folder.name, DEFAULTS | config["settings"], result, read_log(folder),
                      config["data"]["images"])
    except (OSError, ValueError, LookupError, TypeError) as reason:
        raise OSError(f"{folder}: no run that can be read ({type(reason).__name__})")


def read_groups(folders):
    """The records of finished runs, in lists of those that differ in the seed alone; what is no
    finished run is named on stderr. Raises OSError if nothing remains."""
    groups = {}
    for folder in folders:
        try:
            record = read_record(folder)
            groups.setdefault(json.dumps(essential(record)), []).append(record)
        except OSError as reason:
            print(f"eval.py: {reason}", file=sys.stderr)
    if not groups:
        raise OSError("none of these folders holds a finished run")
    return list(groups.values())


def essential(record):
    """The settings but for the seed, the places of run and data, device and the recipe's name."""
    where = ("seed", "out", "data_dir", "device", "recipe")
    return {name: record.settings[name] for name in SETTINGS if name not in where}


def choosing_losses(settings, log):
    """Each epoch's validation loss that chooses the weights."""
    return [choosing_loss(settings["algo"], [value for column, value in row.items()
                                             if column.startswith("val_loss")]) for row in log]


def epochs_to_convergence(settings, log):
    """Fig. 6: the first epoch at which the validation loss has made 99 % of its total fall."""
    v = choosing_losses(settings, log)
    return next(epoch for epoch, value in enumerate(v, start=1)
                if v[0] - value >= 0.99 * (v[0] - min(v)))


# ------------------------------------------------------------------------------ accuracy of a run

def evaluate(folder, data_dir=None):
    """Print the test accuracy of a run; returns top-1, -5, -10 in %, {} for an untrained head."""
    run, top = open_run(folder, data_dir), {}
    s, (images, y), (train_images, train_y) = run.settings, run.test, run.train
    print(f"{folder}: {s['algo']} with {s['model']} on {s['dataset']}, {len(y)} test images")
    if not (run.folder / "result.json").exists():
        print("not finished: these are its best weights so far")
    if stages(s) == 2 and not read_log(folder, stage="2"):
        print("its head is not trained yet")
    else:
        top = accuracy(run.model, images, y, run.normalise, s)
        print("  ".join(f"top-{k} {value:.2f} %" for k, value in top.items()))
        names = CLASSES.get(s["dataset"], range(run.model.num_classes))
        print("top-1 by class: " + ", ".join(
            f"{name} {accuracy(run.model, images[y == c], y[y == c], run.normalise, s)[1]:.1f}"
            for c, name in enumerate(names)))
    fit, test = layer_features(run, train_images[:10000]), layer_features(run, images)
    probes = [probe(normalize(f), train_y[:10000], normalize(test_f), y, run.model.num_classes)
              for f, test_f in zip(fit, test)]
    print("linear probe by layer: " + ", ".join(f"{value:.1f} %" for value in probes))
    return top


# --------------------------------------------------------------- layer by layer (Sec. 4.2, Fig. 5)

def fisher_criterion(f, y):
    """Tr(S_w^-1 S_b), Eqs. 19-22, of pooled outputs f (N, E) with labels y (N,): a float.

    A singular S_w, of a unit that is always off, is inverted on the rest of the space.
    """
    f = f.double()
    m, S_w, S_b = f.mean(dim=0), 0, 0                               # m, Eq. 20
    for c in y.unique():
        f_c = f[y == c]
        m_c = f_c.mean(dim=0)                                       # m_c, Eq. 20
        S_c = (f_c - m_c).T @ (f_c - m_c) / len(f_c)                # S_c, Eq. 21
        S_w = S_w + S_c                                             # Eq. 19: S_w = sum_c S_c
        # Eq. 19: S_b = 1/N sum_c N_c (m_c - m)(m_c - m)^T
        S_b = S_b + len(f_c) / len(f) * torch.outer(m_c - m, m_c - m)
    return (torch.linalg.pinv(S_w, hermitian=True) @ S_b).trace().item()        # Eq. 22


def three_images(f, y):
    """Rows of an anchor, the first image, and of a positive and a negative of median cosine to it,
    for f (n, E) normalised, y (n,). Raises ValueError if there is no positive."""
    s, P, N = f @ f[0], (y == y[0]).nonzero()[1:, 0], (y != y[0]).nonzero()[:, 0]
    if not len(P):
        raise ValueError("the first validation image has no positive")
    return [0] + [rows[s[rows].argsort()[len(rows) // 2]].item() for rows in (P, N)]


def show_layers(folder, data_dir=None):
    """Print Fig. 5's numbers for a run and draw it, layers.png in its folder; a dict a layer."""
    run, log = open_run(folder, data_dir), read_log(folder)
    images, y = run.val
    features, losses, rows = layer_features(run, images), choosing_losses(run.settings, log), []
    best = log[losses.index(min(losses))]
    three = three_images(normalize(features[0]), y)
    for l, f in enumerate(features, start=1):
        chosen = normalize(f[three])
        _, to_positive, to_negative = (chosen @ chosen[0]).tolist()
        fisher = fisher_criterion(f, y)
        rows.append({
            "Layer": l, "Fisher": fisher,
            "averaged": fisher * len(y.unique()),       # S_w as the mean over the classes
            "Train loss": best.get(f"train_loss_{l}"), "Val loss": best.get(f"val_loss_{l}"),
            "Train |R|/|P|": best.get(f"train_saturated_{l}"),
            "Val |R|/|P|": best.get(f"val_saturated_{l}"),
            "Cosine to the positive": to_positive, "to the negative": to_negative})
    print(f"{folder}: {len(y)} validation images in {features[0].shape[1]} dimensions; losses and "
          f"|R|/|P| of epoch {best['epoch']:.0f}")
    print_table([list(rows[0])] + [[f"{x:.3f}" if isinstance(x, float) else x or "-"
                                    for x in row.values()] for row in rows])
    try:
        draw_layers(run, features, log, rows, images[three].cpu())
    except ImportError as reason:                                   # the numbers stand without it
        print(reason)
    return rows


def pyplot():
    """matplotlib's pyplot; ImportError that says what to install."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install matplotlib")
    return pyplot


def save(figure, path):
    """Write a picture and say where it is."""
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
    print(f"picture: {path}")


def draw_layers(run, features, log, rows, three):
    """Fig. 5, a column a layer: Fisher criterion and t-SNE; losses and shares; the three images."""
    figure, axes = pyplot().subplots(3, len(features), figsize=(max(7, 2.6 * len(features)), 8),
                                     squeeze=False, layout="constrained")
    figure.suptitle(f"{run.folder.name}: {len(run.val[1])} validation images, by layer")
    draw_tsne(axes[0], features, run.val[1].cpu(), CLASSES.get(run.settings["dataset"]))
    draw_epochs(axes[1], log)
    for row, top, bottom in zip(rows, axes[0], axes[2]):
        top.set_title(f"Layer {row['Layer']}\nFisher {row['Fisher']:.2f}", fontsize=10)
        bottom.imshow(torch.cat(list(three), dim=2).expand(3, -1, -1).permute(1, 2, 0).numpy())
        bottom.set_title(f"cosine to the positive {row['Cosine to the positive']:.2f},\n"
                         f"to the negative {row['to the negative']:.2f}", fontsize=9)
        bottom.set(xticks=[], yticks=[])
    save(figure, run.folder / "layers.png")


def draw_tsne(axes, features, y, names):
    """Fig. 5's row 2: the first 1,000 rows of each layer's features in two dimensions."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        print("t-SNE needs scikit-learn: pip install scikit-learn")
        return
    y = y[:1000]
    for axis, f in zip(axes, features):
        tsne = TSNE(perplexity=min(30, len(y) // 4), init="pca", random_state=0)
        place = tsne.fit_transform(f[:1000].cpu().numpy())
        axis.set(xticks=[], yticks=[])
        for number, c in enumerate(y.unique().tolist()):
            axis.scatter(*place[(y == c).numpy()].T, s=11, lw=0, color=f"C{number % 10}",
                         marker="osD^vP*<>X"[number % 10], label=names[c] if names else c)
    if len(y.unique()) <= 10:
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), ncols=5, fontsize=9,
                              loc="outside lower center", markerscale=2)


def draw_epochs(axes, log):
    """Fig. 5's row 3: by epoch the share of saturated pairs in % (left) and the loss (right)."""
    twins, nan = [axis.twinx() for axis in axes], float("nan")
    for row, column, colour, scale in ((axes, "saturated", "C1", 100), (twins, "loss", "C0", 1)):
        for l, axis in enumerate(row, start=1):
            for part, style in (("train", "-"), ("val", "--")):
                values = [scale * epoch.get(f"{part}_{column}_{l}", nan) for epoch in log]
                axis.plot(range(1, len(log) + 1), values, style, color=colour, marker=".", ms=3)
            axis.tick_params(axis="y", colors=colour)
            axis.set_xlabel("epoch")
    axes[0].set_ylabel("|R|/|P|, %", color="C1")
    twins[-1].set_ylabel("loss (solid: training)", color="C0")


# ------------------------------------------------------------------------------- tables of runs

def spread(values, digits=1):
    """ "53.2", or over several seeds their mean and standard deviation, "53.2 ± 0.4". """
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


def show_table(groups, markdown=False):
    """Print a row for each group of `read_groups`; a table for each data set, --limit and kind of
    model, with equal columns said once, above it."""
    tables = {}
    for runs in groups:
        (name, s, _, _, images), logs = runs[0], [run.log for run in runs]
        tables.setdefault((s["dataset"], s["limit"], s["model"][:3]), []).append({
            "Run": name if len(runs) == 1 else re.sub(r"-?s\d+$", "", name),
            "Method": NAMES[s["algo"]] + " + head" * s["head"], "Model": s["model"],
            "Data": s["dataset"], "Images": images[0], "Augment": s["augment"],
            "Views": 1 if s["algo"] in (*WITH_LABELS, "bp") else s["views"], "Pool": s["pool"],
            "Missing": s["missing"], "Wrong": s["label_noise"],
            "Epochs": f"{s['epochs']}" + (f" + {s['head_epochs']}" if stages(s) == 2 else ""),
            "Seeds": ", ".join(str(run.settings["seed"]) for run in runs),
            "Validation %": spread([run.accuracy("val") for run in runs]),
            "Test %": spread([run.accuracy("test") for run in runs]),
            "Converged": spread([epochs_to_convergence(s, log) for log in logs], 0),
            "s/epoch": spread([statistics.median(row["seconds"] for row in log) for log in logs])})
    for (dataset, _, _), rows in tables.items():
        shared = ("Model", "Data", "Images", "Augment", "Views", "Pool", "Missing", "Wrong")
        same = [column for column in shared if len({row[column] for row in rows}) == 1]
        said = [f"{column.lower()} {rows[0][column]}" for column in same]
        print(f"In all rows: {', '.join(said)}, metric {METRIC.get(dataset, 'top1')}\n")
        columns = [column for column in rows[0] if column not in same]
        print_table([columns] + [[row[column] for column in columns] for row in rows], markdown)
        print()


# ------------------------------------------------------------------------------ figures of runs

def what_varies(groups):
    """The one setting in which runs of a method differ, or any runs if it is of the data or the
    model; "" if none, ValueError if several."""
    everywhere = ("dataset", "limit", "model", "augment", "missing", "label_noise")
    varied = {name for name in everywhere if len({runs[0].settings[name] for runs in groups}) > 1}
    for algo in NAMES:
        mine = [essential(group[0]) for group in groups if group[0].settings["algo"] == algo]
        varied |= {name for s in mine for name in s if s[name] != mine[0][name]}
    if len(varied) > 1:
        raise ValueError(f"no figure: these runs differ in {', '.join(sorted(varied))}")
    return varied.pop() if varied else ""


def draw_by_setting(axis, groups, varied):
    """Accuracy against what varies, mean and deviation of the seeds; what has no margins, level.
    On validation data, as in Figs. 4b, 7; for Table 4's settings, which change those, on test."""
    part = "test" if varied in ("missing", "label_noise") else "val"
    level = set(NAMES) - {"cffm"} if varied in ("m0", "mL", "decay") else set()

    def place(runs):                            # in order: numbers as they are, names by length
        value = runs[0].images[0] if varied == "limit" else runs[0].settings[varied]
        return (len(value), value) if isinstance(value, str) else (0, value)
    ticks = sorted({place(runs) for runs in groups if runs[0].settings["algo"] not in level})
    for algo in NAMES:
        mine = sorted([runs for runs in groups if runs[0].settings["algo"] == algo], key=place)
        seeds = [[run.accuracy(part) for run in runs] for runs in mine]
        means = [statistics.mean(values) for values in seeds]
        look = {"color": COLOURS[algo], "label": NAMES[algo]}
        if mine and algo in level:
            axis.axhline(means[0], ls="--", **look)
        elif mine:
            spreads = [statistics.stdev(values) if len(values) > 1 else 0 for values in seeds]
            axis.errorbar([ticks.index(place(runs)) for runs in mine], means, yerr=spreads,
                          marker=MARKS[algo], capsize=3, **look)
    axis.set_xticks(range(len(ticks)), [value for _, value in ticks])
    axis.set(xlabel=varied, ylabel=("test" if part == "test" else "validation") + " accuracy, %")


def draw_by_epoch(axis, groups):
    """The probe's validation accuracy by epoch, a line a method: mean, least and most of seeds."""
    for runs in groups:
        algo, by_epoch = runs[0].settings["algo"], zip(*(run.log for run in runs))
        probes = [[row["probe"] for row in rows] for rows in by_epoch]
        x, look = range(1, len(probes) + 1), {"color": COLOURS[algo]}
        axis.plot(x, list(map(statistics.mean, probes)), label=NAMES[algo], **look)
        axis.fill_between(x, list(map(min, probes)), list(map(max, probes)), alpha=0.15, **look)
    axis.set(xlabel="epoch", ylabel="validation accuracy of the probe, %")


def draw_runs(groups, path):
    """A picture of runs' accuracies by the one setting that varies; by epoch if only methods do."""
    varied, s = what_varies(groups), groups[0][0].settings
    figure, axis = pyplot().subplots(figsize=(8.5, 4.5), layout="constrained")
    if varied:
        draw_by_setting(axis, groups, varied)
    else:
        draw_by_epoch(axis, groups)
    axis.set_title(", ".join(s[name] for name in ("dataset", "model", "augment") if name != varied))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    save(figure, path)


def draw_margins(m0, mL, L, path):
    """Fig. 4a: the margins of L layers from m0 down to mL, by each --decay."""
    lines = {decay: margins(m0, mL, L, decay) for decay in SETTINGS["decay"][1]
             if m0 != 0 or decay != "exponential"}
    for decay, m in lines.items():
        print(f"{decay:12s}" + " ".join(f"{value:.3f}" for value in m))
    figure, axis = pyplot().subplots(figsize=(6, 4), layout="constrained")
    for decay, m in lines.items():
        axis.plot(range(1, L + 1), m, marker="o", label=decay)
    axis.set(xlabel="layer", ylabel="margin m", title=f"Fig. 4a: margins from {m0} to {mL}")
    axis.legend()
    save(figure, path)


def draw_views(s, path, n=10):
    """n training images, and two views of each under every --augment, in the data's own colours."""
    images, y, _, _ = load_data(s["dataset"], s["data_dir"])
    images = images[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:n]]
    views, names = [images / 255], ["as shipped"]
    for kind in SETTINGS["augment"][1][1:]:
        augment = make_augment(kind, s["padding"], [0.0], [1.0], torch.Generator().manual_seed(0),
                               s["dataset"] != "mnist", s["fill"])
        names.append(f"two of {kind}")
        views += [augment(images), augment(images)]
    save_image(torch.cat(views), path, nrow=n)
    print(f"picture: {path}; its rows: {', '.join(names)}")


# ---------------------------------------------------------------------------------- command line

def main(argv=None):
    """The command line; what cannot be shown ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s RUN [...] | --margins M0 ML L | --show-views; --help",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add, path = parser.add_argument, os.path.expanduser
    add("runs", nargs="*", metavar="RUN", type=path,
        help="folders of runs: one is tested, several a table")
    add("--layers", action="store_true", help="Fig. 5 of each run; layers.png in its folder")
    add("--figure", metavar="FILE", type=path, help="draw the runs' accuracies; or the picture")
    add("--data-dir", type=path, help="where the data sets are, if not where the run found them")
    add("--markdown", action="store_true", help="print the table as Markdown, also that of one run")
    add("--margins", nargs=3, metavar=("M0", "ML", "L"), help="Fig. 4a")
    add("--show-views", action="store_true", help="augmented views of images of --dataset")
    add("--dataset", choices=SETTINGS["dataset"][1], default="shapes", help="for --show-views")
    args = parser.parse_args(argv)
    if bool(args.runs) + bool(args.margins) + args.show_views != 1:
        parser.error("name the folders of runs, or say one of --margins and --show-views")
    if args.layers and (args.figure or args.markdown):
        parser.error("--layers goes without --figure and --markdown: layers.png is in each folder")
    folders = [folder for name in args.runs for folder in sorted(glob.glob(name)) or [name]]
    try:
        if args.margins:
            m0, mL, L = args.margins
            draw_margins(float(m0), float(mL), int(L), args.figure or "margins.png")
        elif args.show_views:
            s = defaults(args.dataset, "cffm")
            draw_views(s | {"data_dir": args.data_dir or s["data_dir"]}, args.figure or "views.png")
        elif args.layers:
            for folder in folders:
                show_layers(folder, args.data_dir)
        elif len(folders) > 1 or args.markdown or args.figure:
            groups = read_groups(folders)
            show_table(groups, args.markdown)
            if args.figure:
                draw_runs(groups, args.figure)
        else:
            evaluate(folders[0], args.data_dir)
    except (OSError, ValueError, RuntimeError, ImportError) as reason:
        parser.error((str(reason) or type(reason).__name__).splitlines()[0])


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # a terminal may lack ± or a letter of a name
    main()
