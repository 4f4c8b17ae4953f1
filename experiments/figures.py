"""Draw the paper's pictures of margins, runs and layers, and a picture of augmented images.

    python experiments/figures.py fig4a                 margins by layer, for each --decay
    python experiments/figures.py fig4b RUN...          accuracy by margin
    python experiments/figures.py fig5 RUN              one run, layer by layer
    python experiments/figures.py fig6 RUN...           accuracy by epoch; epochs to convergence
    python experiments/figures.py fig7 RUN...           accuracy by model, or by another setting
    python experiments/figures.py views --dataset X     images, and two views for each --augment

RUN is a run's folder; RUN... may also be patterns. Runs that differ only in the seed are averaged.
--out FILE: where the picture goes. Needs matplotlib; fig5 also scikit-learn, checkpoint, data.
"""
import argparse
import os
import re
import statistics
import sys
from itertools import combinations
from pathlib import Path

import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import (NAMES, epochs_to_convergence, essential, find_folders, open_run, read_groups,
                  show_layers, spread, three_images)
from losses import margins
from train import SETTINGS, defaults, layer_features, load_data, make_augment

# The colour and the marker of each method (colours by Okabe and Ito: clear to colour-blind readers)
COLOURS = dict(zip(NAMES, "#D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()))
MARKS = dict(zip(NAMES, "sD^vPXo"))
MARGINS = ("m0", "mL", "decay")                                 # the settings of CFF+M only


def make_figure(rows=1, columns=1, size=(8, 4), **options):
    """(figure, axes) for `write_figure`; size in inches; options: for Figure.subplots."""
    os.environ.pop("MPLBACKEND", None)      # a notebook sets it; unknown names stop matplotlib
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False})    # "$" in names
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def write_figure(figure, path):
    """Write the picture to path, and print the path."""
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"picture: {path}")


# ------------------------------------------------------------------ Figs. 4a and 5, augmented views

def fig4a(m0=0.4, mL=0.1, L=8):
    """Fig. 4a: the margins of L layers, from m0 to mL, one line for each --decay."""
    figure, axis = make_figure(size=(6, 4))
    for decay in SETTINGS["decay"][1]:
        axis.plot(range(1, L + 1), margins(m0, mL, L, decay), marker="o", label=decay)
    axis.set(xlabel="layer", ylabel="margin (a cosine similarity)", xticks=range(1, L + 1),
             title=f"Margins from {m0} to {mL}")
    axis.legend(title="decay")
    return figure


def views(dataset, data_dir, n=10):
    """n training images, and two views of each for every --augment. Returns the figure."""
    s = defaults(dataset, "cffm")
    images, y, _, _ = load_data(dataset, data_dir)
    images = images[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:n]]
    rows = [("original", images / 255)]
    for kind in SETTINGS["augment"][1][1:]:                             # without "none"
        augment = make_augment(kind, s["padding"], [0.0], [1.0], torch.Generator().manual_seed(0),
                               flip=dataset != "mnist", fill=s["fill"])
        rows += [(f"{kind}, view {view}", augment(images)) for view in (1, 2)]
    figure, axes = make_figure(len(rows), size=(n + 2, len(rows)))
    figure.suptitle(f"{n} training images of {dataset}, and two views for each --augment")
    for axis, (name, row) in zip(axes, rows):
        show_images(axis, row)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def show_images(axis, images):
    """Draw images (n, 1 or 3, H, W), with values from 0 to 1, side by side."""
    strip = torch.cat(list(images), dim=2).expand(3, -1, -1)            # (3, H, n W)
    axis.imshow(strip.permute(1, 2, 0).numpy())
    axis.set(xticks=[], yticks=[])


def fig5(run, **changes):
    """Fig. 5 for the run in a folder, one column per layer: t-SNE and the Fisher criterion (Eqs.
    19-22); losses and |R|/|P|; cosines between three images. changes: as for `eval.open_run`."""
    run = open_run(run, **changes)
    images, y = run.val
    rows, features = show_layers(run), layer_features(run, images)
    three = images[three_images(normalize(features[0]), y)].cpu() / 255
    figure, axes = make_figure(3, len(rows), (max(8, 2.8 * len(rows)), 8), squeeze=False,
                               height_ratios=[3, 3, 1.3])
    figure.suptitle(f"{run.folder.absolute().name}: {len(y)} validation images, by layer")
    draw_tsne(axes[0], features, y[:1000].cpu())
    draw_epochs(axes[1], [row for row in run.log if row["stage"] == 1])
    for row, top, bottom in zip(rows, axes[0], axes[2]):
        top.set_title(f"Layer {row['Layer']}\nFisher criterion {row['Fisher']:.2f}", fontsize=10)
        show_images(bottom, three)
        bottom.set_title(f"cosine to the positive {row['Cosine to the positive']:.2f},\n"
                         f"to the negative {row['to the negative']:.2f}", fontsize=9)
        bottom.set_xlabel("anchor, positive, negative", fontsize=9)
    figure.legend(ncols=6, fontsize=9, loc="outside lower center")
    return figure


def draw_tsne(axes, features, y):
    """Draw the t-SNE of each layer's features, for the first images, whose labels are y."""
    from sklearn.manifold import TSNE
    classes = y.unique().tolist()
    for l, (axis, f) in enumerate(zip(axes, features), start=1):
        tsne = TSNE(perplexity=min(30, len(y) // 4), init="pca", random_state=0)
        points = tsne.fit_transform(f[:len(y)].cpu().numpy())             # (n, 2)
        for i, c in enumerate(classes):
            axis.scatter(*points[(y == c).numpy()].T, s=11, lw=0, color=f"C{i % 10}",
                         marker="osD^vP*<>X"[i % 10],
                         label=f"class {c}" if l == 1 and len(classes) <= 10 else None)
        axis.set(xticks=[], yticks=[])
    axes[0].set_ylabel("t-SNE (no units)")


def draw_epochs(axes, log):
    """Draw each layer's share |R|/|P| of saturated pairs (left) and its loss (right) by epoch."""
    epochs = [row["epoch"] for row in log]
    for l, left in enumerate(axes, start=1):
        right = left.twinx()
        for axis, column, colour, scale in (
                (left, "saturated", "C1", 100), (right, "loss", "C0", 1)):
            axis.tick_params(axis="y", colors=colour)
            if f"train_{column}_{l}" not in log[0]:     # R only exists in CFF+M; BP has one loss
                axis.set_yticks([])
                continue
            for part, style, name in (("train", "-", "training"), ("val", "--", "validation")):
                axis.plot(epochs, [scale * row[f"{part}_{column}_{l}"] for row in log], style,
                          color=colour, marker=".", ms=3,
                          label=name if axis is right and l == len(axes) else None)
        left.set(xlabel="epoch", xlim=(0, len(log) + 1))
    axes[0].set_ylabel("|R|/|P|, %", color="C1")
    right.set_ylabel("loss", color="C0")                        # `right` is the last layer's axis


# -------------------------------------------------------------------------------- Figs. 4b, 6 and 7

def fig6(runs):
    """Fig. 6: the probe's accuracy by epoch, as mean and range of the seeds. A marker shows the
    mean epoch of convergence; the legend gives its mean and standard deviation."""
    groups = read_groups(find_folders(runs))
    figure, axis = make_figure(size=(9, 4.5))
    for group in groups:
        algo = group[0].settings.algo
        probes = torch.tensor([[row["probe"] for row in run.log] for run in group]).numpy()
        epochs = range(1, probes.shape[1] + 1)                          # probes: (seeds, epochs)
        converged = [epochs_to_convergence(run.settings, run.log) for run in group]
        marked = round(statistics.mean(converged)) - 1                  # the index of an epoch
        axis.plot(epochs, probes.mean(axis=0), color=COLOURS[algo], marker=MARKS[algo], ms=9,
                  mec="black", markevery=[marked],
                  label=f"{NAMES[algo]}: {spread(converged, digits=0)}")
        axis.fill_between(epochs, probes.min(axis=0), probes.max(axis=0), color=COLOURS[algo],
                          alpha=0.15)
    axis.set(xlabel="epoch", ylabel="validation accuracy of the probe, %")
    return finish(figure, groups, "", legend="epochs to\nconvergence (marker)")


def what_varies(groups):
    """The one setting in which the groups differ; ValueError if none or several do. Methods differ
    in their defaults, so groups of two methods are compared by data and model only."""
    shared, varied = ("dataset", "limit", "model", "augment", "missing", "label_noise"), set()
    for a, b in combinations([essential(runs[0]) for runs in groups], 2):
        names = a if a["algo"] == b["algo"] else shared
        varied |= {name for name in names if a[name] != b[name]}
    if len(varied) != 1:
        names = ", ".join(sorted(varied)) or "no setting except the method: use fig6"
        raise ValueError(f"runs must differ in exactly one setting; these differ in {names}")
    return varied.pop()


def fig7(runs):
    """Figs. 4b and 7: accuracy by the one setting that varies, as mean and standard deviation of
    the seeds, on validation images, as in the paper. In Fig. 4b methods without margins are
    horizontal lines. Runs that vary --missing or --label-noise are compared by test accuracy."""
    groups = read_groups(find_folders(runs))
    varied = what_varies(groups)
    table4 = varied in ("missing", "label_noise")
    part, part_name = ("test", "test") if table4 else ("val", "validation")
    figure, axis = make_figure(size=(8.5, 4.5))
    ticks = sorted({tick(runs, varied) for runs in groups
                    if varied not in MARGINS or runs[0].settings.algo == "cffm"})
    for algo in NAMES:
        mine = [runs for runs in groups if runs[0].settings.algo == algo]
        mine.sort(key=lambda runs: tick(runs, varied))
        accuracies = [[run.accuracy(part) for run in runs] for runs in mine]
        means = [statistics.mean(values) for values in accuracies]
        spreads = [statistics.stdev(values) if len(values) > 1 else 0 for values in accuracies]
        look = {"color": COLOURS[algo], "label": NAMES[algo]}
        if mine and varied in MARGINS and algo != "cffm":
            axis.axhline(means[0], ls="--", **look)
        elif mine:
            positions = [ticks.index(tick(runs, varied)) for runs in mine]
            axis.errorbar(positions, means, yerr=spreads, marker=MARKS[algo], capsize=3, **look)
    axis.set_xticks(range(len(ticks)), [label for _, label in ticks])
    axis.set(xlabel=f"{varied}: {SETTINGS[varied][2]}", ylabel=f"{part_name} accuracy, %")
    return finish(figure, groups, varied, legend="method")


def tick(runs, varied):
    """(sort key, label) of the tick for a group of runs, on an axis of the setting `varied`."""
    value, allowed = getattr(runs[0].settings, varied), SETTINGS[varied][1]
    if varied == "model":
        return tuple(int(size) for size in re.findall(r"\d+", value)), value
    return allowed.index(value) if isinstance(allowed, list) else value, value


def finish(figure, groups, varied, legend):
    """Add a title with the runs' settings except `varied`, a grid, and a legend with its title."""
    s, axis = groups[0][0].settings, figure.axes[0]
    shared = [name for name in ("dataset", "model", "augment") if name != varied]
    axis.set_title(", ".join(getattr(s, name) for name in shared))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title=legend)
    return figure


def main(argv=None):
    """The command line. If a picture cannot be drawn, one line says why; the exit status is 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, add = parser.add_subparsers(dest="figure", required=True), {}
    for name, draw in (("fig4a", fig4a), ("fig4b", fig7), ("fig5", fig5), ("fig6", fig6),
                       ("fig7", fig7), ("views", views)):
        command = commands.add_parser(name, argument_default=argparse.SUPPRESS)
        command.set_defaults(draw=draw)
        command.add_argument("--out", metavar="FILE", help="where the picture goes")
        add[name] = command.add_argument
    for name in ("fig4b", "fig6", "fig7"):
        add[name]("runs", nargs="+", metavar="RUN", help="folders of runs, or patterns")
    add["fig5"]("run", metavar="RUN", help="the folder of a run")
    add["fig5"]("--device", choices=SETTINGS["device"][1], help="default: the run's")
    add["fig5"]("--data-dir", help="folder of the data sets; default: the run's")
    add["views"]("--dataset", choices=SETTINGS["dataset"][1], default="shapes")
    add["views"]("--data-dir", default="data", help="folder of the data sets")
    args = vars(parser.parse_args(argv))
    draw, name = args.pop("draw"), args.pop("figure")
    out = args.pop("out", Path(args.get("run", ""), f"{name}.png"))
    try:
        write_figure(draw(**args), out)
    except (ImportError, OSError, ValueError) as reason:
        advice = "; pip install matplotlib scikit-learn" if isinstance(reason, ImportError) else ""
        parser.error((str(reason) or type(reason).__name__) + advice)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")    # a terminal may lack a letter of a name
    main()
