"""Evaluate runs as in the paper's results section (Section 4), and print the numbers.

    python eval.py runs/NAME                   test accuracy; the accuracy of a probe on each layer
    python eval.py runs/NAME --layers          the numbers of Fig. 5, layer by layer
    python eval.py runs/* [--markdown]         a table with one row per run, or per group of seeds

A table needs neither data nor weights. A probe is a linear classifier fitted to a layer's output.
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
from types import SimpleNamespace

import torch
from torch.nn.functional import normalize

from train import (DEFAULTS, METRIC, SETTINGS, WITH_LABELS, accuracy, choosing_loss, layer_features,
                   make_run, probe, read, stages)

NAMES = {"cff": "CFF", "cffm": "CFF+M", "ff": "FF", "symba": "SymBa", "collab": "FF Collab",
         "scl": "SCL", "bp": "BP+CE"}


# ------------------------------------------------------------------------------------ reading runs

def find_folders(names):
    """The folders for a list of names, each folder once. A name that does not exist is a pattern,
    such as runs/m*, because not every shell expands it. A pattern without matches is kept."""
    found = {}
    for name in names:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name))
        for folder in matches or [name]:
            found.setdefault(os.path.realpath(folder), folder)  # r, r/ and a link to r are the same
    return list(found.values())


def open_run(folder, **changes):
    """The run in `folder`, from `train.make_run`, with its best weights so far. `changes` replace
    settings, for example device="cpu". Raises OSError or ValueError with a one-line message."""
    saved = read(Path(folder) / "checkpoint.pt")
    if not isinstance(saved, dict) or not saved.get("best"):
        raise OSError(f"{folder}: checkpoint.pt is not from train.py, or has no finished epoch yet")
    s = DEFAULTS | saved["settings"] | {"out": str(folder)} | changes
    run = make_run(SimpleNamespace(**s), saved)
    run.model.load_state_dict(run.best)
    return run


def read_log(folder):
    """The rows of stage 1 in a run's log.csv: a list of {column: float}."""
    with open(Path(folder) / "log.csv", newline="", encoding="utf-8-sig") as file:  # as Excel saves
        rows = [row for row in csv.DictReader(file) if row.get("stage") == "1"]
    return [{column: float(value) for column, value in row.items() if value} for row in rows]


class Record(SimpleNamespace):
    """A finished run: name, settings, result, log (of stage 1), images (how many in each part)."""

    def accuracy(self, part):
        """Accuracy in % on the "val" or "test" images, by the metric of the data set."""
        return self.result[f"{part}_{self.result['metric']}"]


def read_record(folder):
    """The `Record` of a finished run. Raises OSError with a one-line message if there is none."""
    folder = Path(folder)
    if (folder / "config.json").exists() and not (folder / "result.json").exists():
        raise OSError(f"{folder}: not finished; continue with train.py --resume --out {folder}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        result = json.loads((folder / "result.json").read_text(encoding="utf-8-sig"))
        record = Record(
            name=folder.absolute().name, settings=SimpleNamespace(**DEFAULTS | config["settings"]),
            result=result, log=read_log(folder), images=config["data"]["images"])
        if not record.log:
            raise ValueError("log.csv has no epochs, or semicolons instead of commas")
        table_row([record])                     # raises an error if something else is missing
    except Exception as reason:                 # people edit these files, so any error can occur
        raise OSError(f"{folder}: cannot be read as a run ({type(reason).__name__}: {reason})")
    return record


def read_groups(folders):
    """Finished runs as a list of groups; the records in a group differ only in the seed. Reports
    skipped folders and equal runs on stderr. Raises OSError if there is no finished run."""
    groups, seen = {}, {}
    for folder in folders:
        try:
            record = read_record(folder)
        except OSError as reason:
            print(f"skipped: {reason}", file=sys.stderr)
            continue
        group = json.dumps(essential(record))
        first = seen.setdefault((group, record.settings.seed), folder)
        if first is not folder:
            print(f"{first} and {folder} have equal settings and seed; both count", file=sys.stderr)
        groups.setdefault(group, []).append(record)
    if not groups:
        raise OSError("none of these folders holds a finished run")
    return list(groups.values())


def essential(record):
    """A run's settings except the seed, the folders, the device and the name of the recipe."""
    others = ("seed", "out", "data_dir", "device", "recipe")
    return {name: getattr(record.settings, name) for name in SETTINGS if name not in others}


def choosing_losses(settings, log):
    """The validation loss that selects the weights, one value per epoch."""
    columns = [column for column in log[0] if column.startswith("val_loss")]    # one per layer
    return [choosing_loss(settings.algo, [row[column] for column in columns]) for row in log]


def epochs_to_convergence(settings, log):
    """Fig. 6: the first epoch at which the validation loss has completed 99 % of its drop."""
    v = choosing_losses(settings, log)
    converged = [v[0] - value >= 0.99 * (v[0] - min(v)) for value in v]
    return 1 + converged.index(True)


# ---------------------------------------------------------------------- one run (Sec. 4.2, Fig. 5)

def evaluate(folder, **changes):
    """Print a run's accuracy and probes. Returns {k: top-k in %}; {} if the head is untrained."""
    run, top = open_run(folder, **changes), {}
    s, (images, y) = run.settings, run.test
    print(f"{folder}: {s.algo} with {s.model} on {s.dataset}, {len(y)} test images")
    if not (run.folder / "result.json").exists():
        print("not finished: these numbers are for its best weights so far")
    if run.stage < stages(s):
        print("its head is not trained yet")
    else:
        top = accuracy(run.model, images, y, run.normalise, s)
        print("  ".join(f"top-{k} {value:.2f} %" for k, value in top.items()))
    train_images, train_y = (part[:10000] for part in run.train)
    by_layer = zip(layer_features(run, train_images), layer_features(run, images))
    probes = [probe(normalize(f), train_y, normalize(test_f), y, run.model.num_classes)
              for f, test_f in by_layer]
    print("accuracy of a probe by layer: " + ", ".join(f"{value:.1f} %" for value in probes))
    return top


def fisher_criterion(f, y):
    """Tr(S_w^-1 S_b), Eqs. 19-22, for pooled outputs f (N, E) with labels y (N,): a float. S_w is
    singular if, for example, a unit is always 0; therefore S_w^-1 is the pseudo-inverse."""
    f, y = f.cpu().double(), y.cpu()                                # MPS has no float64
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
    """Row numbers of an anchor (row 0), and of the positive and the negative with the median cosine
    to it. f (n, E) is normalised, y is (n,). Raises ValueError without a positive or negative."""
    s = f @ f[0]
    P = (y == y[0]).nonzero()[1:, 0]                                # without row 0 itself
    N = (y != y[0]).nonzero()[:, 0]
    if not len(P) or not len(N):
        raise ValueError("the first validation image has no positive or no negative")
    P, N = P[s[P].argsort()], N[s[N].argsort()]                     # sorted by cosine
    return [0, P[len(P) // 2].item(), N[len(N) // 2].item()]


def show_layers(run, markdown=False):
    """Print the numbers of Fig. 5 for a run from `open_run`; returns them, one dict per layer."""
    images, y = run.val
    best, rows = run.log[run.best_epoch - 1], []                    # epochs count from 1
    features = layer_features(run, images)
    three = three_images(normalize(features[0]), y)
    for l, f in enumerate(features, start=1):
        anchor, positive, negative = normalize(f[three])
        fisher = fisher_criterion(f, y)
        row = {"Layer": l, "Fisher": fisher, "Fisher, S_w/C": fisher * len(y.unique())}
        for column in ("train_loss", "val_loss", "train_saturated", "val_saturated"):
            row[column] = best.get(f"{column}_{l}", "-")        # SCL and BP: one loss
        rows.append(row | {"Cosine to the positive": (anchor @ positive).item(),
                           "to the negative": (anchor @ negative).item()})
    print(f"{run.folder}: {len(y)} validation images, epoch {run.best_epoch}; saturated: |R|/|P|")
    cells = [[f"{x:.3f}" if isinstance(x, float) else x for x in row.values()] for row in rows]
    print_table([list(rows[0]), *cells], markdown)
    return rows


# ---------------------------------------------------------------------------------- tables of runs

def spread(values, digits=1):
    """One value as "53.2"; several values as mean and standard deviation, "53.2 ± 0.4"."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def print_table(rows, markdown=False):
    """Print rows of cells in aligned columns. The first row is the heading."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for number, row in enumerate(rows):
        cells = [str(cell).ljust(width) for cell, width in zip(row, widths)]
        print("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
        if markdown and number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def table_row(runs):
    """The row of `show_table` for the records of one group: {column: cell}."""
    first, s = runs[0], runs[0].settings                # the others differ only in the seed
    converged = [epochs_to_convergence(run.settings, run.log) for run in runs]
    seconds = [statistics.median(row["seconds"] for row in run.log) for run in runs]
    return {
        "Run": first.name if len(runs) == 1 else re.sub(r"-?s\d+$", "", first.name),
        "Method": NAMES[s.algo] + " + head" * s.head, "Model": s.model, "Data": s.dataset,
        "Images": first.images[0], "Augment": s.augment,
        "Views": 1 if s.algo in (*WITH_LABELS, "bp") else s.views, "Pool": s.pool,
        "Missing": s.missing, "Wrong": s.label_noise,
        "Epochs": f"{s.epochs} + {s.head_epochs}" if stages(s) == 2 else f"{s.epochs}",
        "Seeds": ", ".join(str(run.settings.seed) for run in runs),
        "Validation %": spread([run.accuracy("val") for run in runs]),
        "Test %": spread([run.accuracy("test") for run in runs]),
        "Converged": spread(converged, digits=0), "s/epoch": spread(seconds)}


def show_table(groups, markdown=False):
    """Print one row per group of `read_groups`, in one table per data set, --limit and kind of
    model. A column whose cells are all equal is printed once, above the table."""
    tables = {}
    for runs in groups:
        s = runs[0].settings
        tables.setdefault((s.dataset, s.limit, s.model[:3]), []).append(table_row(runs))
    for (dataset, _, _), rows in tables.items():
        shared = ("Model", "Data", "Images", "Augment", "Views", "Pool", "Missing", "Wrong")
        same = [column for column in shared if len({row[column] for row in rows}) == 1]
        values = [f"{column.lower()} {rows[0][column]}" for column in same]
        print(f"In all rows: {', '.join(values)}, metric {METRIC.get(dataset, 'top1')}\n")
        columns = [column for column in rows[0] if column not in same]
        print_table([columns] + [[row[column] for column in columns] for row in rows], markdown)
        print()


# ------------------------------------------------------------------------------------ command line

def main(argv=None):
    """Run the command line. An error ends with a one-line message and exit status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s RUN [RUN ...] [--FLAG]; --help lists the flags",
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", type=os.path.expanduser, help="folders of runs")
    add("--layers", action="store_true", help="print the numbers of Fig. 5 for each run")
    add("--markdown", action="store_true", help="print tables as Markdown")
    add("--data-dir", type=os.path.expanduser, help="folder of the data; default: as in the run")
    add("--device", choices=SETTINGS["device"][1], help="default: as in the run")
    add("--precision", choices=SETTINGS["precision"][1], help="default: as in the run")
    changes = vars(parser.parse_args(argv))             # after the pops, only settings are left
    folders = find_folders(changes.pop("runs"))
    layers, markdown = changes.pop("layers", False), changes.pop("markdown", False)
    try:
        if layers:
            for folder in folders:
                show_layers(open_run(folder, **changes), markdown)
        elif markdown or len(folders) > 1:
            show_table(read_groups(folders), markdown)
        else:
            evaluate(folders[0], **changes)
    except (OSError, ValueError) as reason:
        parser.error(str(reason) or type(reason).__name__)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):          # IDLE and notebooks lack it
        sys.stdout.reconfigure(errors="replace")    # a terminal may lack ± or a letter of a name
    main()
