"""Print the tables of results of this folder's README.md and records/README.md from the records.

    python experiments/tables.py

Copy the printed tables to their pages; test_tables.py checks that they are there. tables.md is the
template for the tables whose words are written by hand. Names in braces stand for numbers:

    {tenth-cff}                        test accuracy of a record, or of a group of seeds
    {tenth-cff validation}             its validation accuracy
    {tenth-cff epochs}                 epochs to convergence (Fig. 6)
    {tenth-cff-s0 lowest in 60}        lowest validation loss in the first 60 epochs
    {tenth-cff-s0 below equal}         for each layer, the epoch of `epochs_below_equal`
    {3 vit-128-4-5 crop cffm}          accuracy in paper.csv, by table, model, setting (if none,
                                       augmentation) and method
    {CFF+M, 1 view: ratio}             a ratio of times in speed.json
    {pipeline CFF+M, 1 view: gain}     a median from pipeline-vit-128-4-2.json
"""
import csv
import json
import math
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import speed
from eval import choosing_losses, epochs_to_convergence, read_groups, show_table, spread, table_row
from losses import margins

RECORDS = HERE / "records"
FOLDERS = sorted(path.parent for path in RECORDS.glob("*/result.json"))


def read_json(name):
    return json.loads((RECORDS / name).read_text())


def values_of_runs():
    values = {}
    for runs in read_groups(FOLDERS):
        single = [(run.name, [run]) for run in runs]
        for name, some in [*single, (table_row(runs)["Run"], runs)]:
            epochs = [epochs_to_convergence(run.settings, run.log) for run in some]
            values[name] = spread([run.accuracy("test") for run in some])
            values[f"{name} validation"] = spread([run.accuracy("val") for run in some])
            values[f"{name} epochs"] = spread(epochs, digits=0)
        for run in runs:
            losses = choosing_losses(run.settings, run.log)
            for n in (30, 60, 120, 200):
                values[f"{run.name} lowest in {n}"] = f"{min(losses[:n]):.3f}"
            if run.settings.recipe == "tenth" and run.settings.algo in ("cff", "cffm"):
                values[f"{run.name} below equal"] = epochs_below_equal(run)
    return values


def epochs_below_equal(run):
    """For each layer, the epoch from which its validation loss stays below `loss_of_equal`."""
    s, L = run.settings, int(run.settings.model.split("-")[-1])
    by_layer = margins(s.m0, s.mL, L, s.decay) if s.algo == "cffm" else L * [0.0]
    found = []
    for l, m in enumerate(by_layer, start=1):
        equal = loss_of_equal(run, m)
        above = [i for i, row in enumerate(run.log, start=1) if row[f"val_loss_{l}"] >= equal]
        begins = max(above, default=0) + 1
        found.append(str(begins) if begins <= len(run.log) else "never")
    return ", ".join(found)


def loss_of_equal(run, m):
    """The expected validation loss with margin m when all similarities are equal and at most 1 - m
    (Eq. 17), for ten classes: an anchor shares its class with n other images of its batch."""
    s, images, total = run.settings, run.images[1], 0
    for start in range(0, images, s.batch_size):
        B = min(s.batch_size, images - start)
        for n in range(1, B):
            P = s.views * (n + 1) - 1
            N = s.views * B - 1 - P
            chance = math.comb(B - 1, n) * 0.1 ** n * 0.9 ** (B - 1 - n)
            loss = math.log(P * math.exp(m / s.temperature) + N) - m / s.temperature
            total += B * chance * loss
    return total / images


def values_of_speeds():
    one, several, values = read_json("speed.json"), read_json("pipeline-vit-128-4-2.json"), {}
    for name, row in one["methods"].items():
        values[f"{name}: ratio"] = f"{row['ratio']:.2f}"
    for name, row in one["inference"].items():
        values[f"{name}: ratio"] = f"{row['ratio']:.1f}"
    for name, row in several["methods"].items():
        for key in ("gain", "to_bp"):
            values[f"pipeline {name}: {key}"] = f"{statistics.median(row[key]):.2f}"
    return values


def values_of_the_paper():
    values = {}
    for row in csv.DictReader((HERE / "paper.csv").read_text().splitlines()):
        words = row["table"], row["model"], row["setting"] or row["augment"], row["method"]
        if row["quantity"].startswith("accuracy"):          # the first data set's
            values.setdefault(" ".join(words), row["value"].lstrip("-"))
    return values


def main():
    values = values_of_runs() | values_of_speeds() | values_of_the_paper()
    text = (HERE / "tables.md").read_text(encoding="utf-8")
    print(re.sub(r"\{(.+?)\}", lambda match: values[match[1]], text))
    speed.show_speed(read_json("speed.json"))
    print()
    speed.show_pipeline_speed(read_json("pipeline-vit-128-4-2.json"))
    print()
    for n in (1, 2, 4):
        print("- " + speed.memory_line(read_json(f"pipeline-memory-{n}.json")))
    print()
    show_table(read_groups(FOLDERS), markdown=True)


if __name__ == "__main__":
    main()
