"""What a run learned, and what a training step costs.

    python eval.py runs/NAME                            top-1, top-5, top-10 accuracy on the test set; the paper's metric
    python eval.py results/*/ [--markdown]              a row for each run, or for each group of seeds, from its records
    python eval.py --speed                              BP against one-view and two-view CFF+M: time and memory of a step
    python eval.py --speed --model vit-128-4-5 --batch-size 512 --rounds 10

A run's folder holds all that is needed; no setting has to be said again.
"""
import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from cff import bp_step, cff_step
from losses import margins
from train import DEFAULTS, METRIC, accuracy, describe_device, load_data, make_augment, make_model
from vit import build_model


# ------------------------------------------------------------------------------------------------------ accuracy of a run

def load_run(folder):
    """The trained model of a run's folder, in evaluation mode on the CPU, its settings and the facts of its data.

    Raises FileNotFoundError if there is no best.pt in it.
    """
    best = torch.load(Path(folder) / "best.pt", map_location="cpu", weights_only=True)
    settings = {**DEFAULTS, **best["settings"]}
    model = make_model(settings, best["data"])
    model.load_state_dict(best["model"])
    return model.eval(), settings, best["data"]


def evaluate(folder, data_dir=None):
    """Print the test accuracy of the run in `folder`; returns {1: top-1, 5: top-5, 10: top-10} in %."""
    model, settings, facts = load_run(folder)
    _, _, images, y = load_data(settings["dataset"], data_dir or settings["data_dir"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    normalise = make_augment("none", 0, facts["mean"], facts["std"], torch.Generator(device))
    top = accuracy(model.to(device), images.to(device), y.to(device), normalise, settings)
    print(f"{folder}: {settings['algo']} with {settings['model']} on {settings['dataset']}, {len(y)} test images")
    print("  ".join(f"top-{k} {value:.2f} %" for k, value in top.items()))
    k = int(METRIC[settings["dataset"]].removeprefix("top"))
    print(f"The paper's metric for {settings['dataset']} is top-{k}: {top[k]:.2f} %")
    return top


# ------------------------------------------------------------------------------------------------------ tables of runs

def spread(values, digits=1):
    """"53.2", or over several seeds their mean and standard deviation, "53.2 ± 0.4"."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def show_table(folders, markdown=False):
    """Print a row for each run, from its config.json and result.json; runs that differ in the seed alone share a row."""
    groups = {}
    for folder in map(Path, folders):
        config, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
        settings = {key: value for key, value in {**DEFAULTS, **config["settings"]}.items()
                    if key not in ("seed", "out", "data_dir", "device")}
        groups.setdefault(json.dumps([settings, config["device"]]), []).append((folder.name, config, result))
    rows = [["Run", "Method", "Model", "Data", "Images", "Epochs", "Seeds", "Validation %", "Test %", "Minutes"]]
    for runs in groups.values():
        names, configs, results = zip(*runs)
        s, seeds = configs[0]["settings"], [config["settings"]["seed"] for config in configs]
        name = names[0].removesuffix(f"-s{seeds[0]}") if len(runs) > 1 else names[0]
        rows.append([name, s["algo"], s["model"], s["dataset"], configs[0]["data"]["images"][0],
                     f"{s['epochs']} + {s['head_epochs']}", ", ".join(map(str, sorted(seeds))),
                     spread([result["val_top1"] for result in results]),
                     spread([result["test_" + result["metric"]] for result in results]),
                     spread([result["seconds"] / 60 for result in results])])
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [str(cell).ljust(width) for cell, width in zip(row, widths)]
        print("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells))
        if markdown and number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


# ------------------------------------------------------------------------------------------------------ cost of a step

def make_step(method, name, batch_size, device):
    """A function that trains on one batch of random 32 x 32 images: "BP", "CFF+M, 1 view" or "CFF+M, 2 views"."""
    torch.manual_seed(0)
    model = build_model(name, (3, 32, 32), 10).to(device)
    x = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    y = torch.randint(10, (batch_size,), device=device)
    augment = make_augment("crop", 12, [0.5] * 3, [0.25] * 3, torch.Generator(device))
    if method == "BP":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0005)
        return lambda: bp_step(model, optimizer, x, y, augment)
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.004) for layer in model.layers]
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


def speed(name, batch_size, rounds):
    """Time the methods in turn, `rounds` times after a warm-up; returns the record that `show_speed` prints.

    Ratios to BP are taken within a round and then their median, so that a machine whose speed drifts hurts all alike.
    Memory is measured in a fresh process for each method, in which large blocks go back to the system when they are freed:
    what is left is what the method holds, without what the C library's allocator keeps in reserve.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    methods = ["BP", "CFF+M, 1 view", "CFF+M, 2 views"]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"                # read by the new processes' glibc
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = dict(zip(methods, pool.map(peak_memory, [(m, name, batch_size, device) for m in methods], chunksize=1)))
    steps = {method: make_step(method, name, batch_size, device) for method in methods}
    seconds = {method: [] for method in methods}
    for _ in range(rounds + 1):
        for method, step in steps.items():
            start = time.perf_counter()
            step().sum().item()                                     # waits for a GPU to finish
            seconds[method].append(time.perf_counter() - start)
    table = {}
    for method in methods:
        times = seconds[method][1:]
        table[method] = {"seconds": statistics.median(times), "min": min(times), "max": max(times),
                         "ratio": statistics.median(t / bp for t, bp in zip(times, seconds["BP"][1:]))}
        if memory["BP"]:
            table[method].update(megabytes=memory[method], memory_ratio=memory[method] / memory["BP"])
    return {"command": "python " + " ".join(sys.argv), "device": describe_device(device), "torch": torch.__version__,
            "model": name, "batch_size": batch_size, "rounds": rounds, "methods": table}


def show_speed(record):
    """Print a record of `speed` as a Markdown table."""
    print(f"A training step of {record['model']}, batch {record['batch_size']}, on {record['device']}, torch {record['torch']}; "
          f"medians of {record['rounds']} rounds:\n")
    print("| Method | Seconds (least-most) | / BP | Peak memory, MB | / BP |\n|---|---|---|---|---|")
    for method, row in record["methods"].items():
        memory = f"{row['megabytes']:.0f} | {row['memory_ratio']:.2f}" if "megabytes" in row else "- | -"
        print(f"| {method} | {row['seconds']:.2f} ({row['min']:.2f}-{row['max']:.2f}) | {row['ratio']:.2f} | {memory} |")


def main():
    parser = argparse.ArgumentParser("eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs: one to test it, several for a table")
    parser.add_argument("--data-dir", help="where the data sets are, if not where the run found them")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown, also that of one run")
    parser.add_argument("--speed", action="store_true", help="measure training steps on this machine")
    parser.add_argument("--model", default="vit-128-4-5", help="for --speed [vit-128-4-5]")
    parser.add_argument("--batch-size", type=int, default=512, help="for --speed [512]")
    parser.add_argument("--rounds", type=int, default=5, help="for --speed: measured steps of each method [5]")
    parser.add_argument("--json", metavar="FILE", help="for --speed: write the numbers there too")
    args = parser.parse_args()
    if bool(args.runs) == args.speed:
        parser.error("name the folders of runs, or say --speed")
    try:
        if args.speed:
            record = speed(args.model, args.batch_size, args.rounds)
            show_speed(record)
            if args.json:
                Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
        elif len(args.runs) > 1 or args.markdown:
            show_table(args.runs, args.markdown)
        else:
            evaluate(args.runs[0], args.data_dir)
    except (OSError, ValueError, RuntimeError, EOFError) as reason:       # no run, a damaged one, no data, senseless sizes
        parser.error(str(reason).splitlines()[0])


if __name__ == "__main__":
    main()
