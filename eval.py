"""What a run learned, and what a training step costs.

    python eval.py runs/NAME                            top-1, top-5, top-10 accuracy on the test set; the paper's metric
    python eval.py --speed                              BP against one-view and two-view CFF+M: time and memory of a step
    python eval.py --speed --model vit-128-4-5 --batch-size 512 --rounds 10

A run's folder holds all that is needed; nothing has to be said again.
"""
import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

from cff import bp_step, cff_step
from losses import margins
from train import METRIC, accuracy, describe_device, load_data, make_augment, make_model
from vit import build_model


# ------------------------------------------------------------------------------------------------------ accuracy of a run

def load_run(folder):
    """The trained model of a run's folder, in evaluation mode on the CPU, its settings and the facts of its data.

    Raises FileNotFoundError if there is no best.pt in it.
    """
    best = torch.load(Path(folder) / "best.pt", map_location="cpu", weights_only=True)
    model = make_model(best["settings"], best["data"])
    model.load_state_dict(best["model"])
    return model.eval(), best["settings"], best["data"]


def evaluate(folder, data_dir=None):
    """Print the test accuracy of the run in `folder`; returns {1: top-1, 5: top-5, 10: top-10} in %."""
    model, settings, facts = load_run(folder)
    _, _, images, y = load_data(settings["dataset"], data_dir or settings["data_dir"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    normalise = make_augment("none", 0, facts["mean"], facts["std"], torch.Generator(device))
    top = accuracy(model.to(device), images.to(device), y.to(device), normalise)
    print(f"{folder}: {settings['algo']} with {settings['model']} on {settings['dataset']}, {len(y)} test images")
    print("  ".join(f"top-{k} {value:.2f} %" for k, value in top.items()))
    k = int(METRIC[settings["dataset"]].removeprefix("top"))
    print(f"The paper's metric for {settings['dataset']} is top-{k}: {top[k]:.2f} %")
    return top


# --------------------------------------------------------------------------------------------------- cost of a step

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
    layer_margins, views = margins(0.4, 0.1, len(model.layers)), 1 if "1" in method else 2
    return lambda: cff_step(model, optimizers, x, y, augment, layer_margins, 0.15, views)


def peak_memory(arguments):
    """What two steps need at their peak beyond what was there before, in MB; None where it cannot be measured."""
    device = arguments[-1]
    step = make_step(*arguments)
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
    """Time the methods in turn, `rounds` times after a warm-up, and print medians and ratios to BP; returns them as a dict.

    Ratios are taken within a round and then their median, so that a machine whose speed drifts hurts all alike.
    Memory is measured in a fresh process for each method.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    methods = ["BP", "CFF+M, 1 view", "CFF+M, 2 views"]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = dict(zip(methods, pool.map(peak_memory, [(m, name, batch_size, device) for m in methods], chunksize=1)))
    steps = {method: make_step(method, name, batch_size, device) for method in methods}
    seconds = {method: [] for method in methods}
    for _ in range(rounds + 1):
        for method, step in steps.items():
            start = time.perf_counter()
            step().sum().item()                         # waits for a GPU to finish
            seconds[method].append(time.perf_counter() - start)
    print(f"One training step of {name}, batch {batch_size}, on {describe_device(device)}: median of {rounds}, (min-max)")
    print(f"{'':16}{'seconds':>8}{'(min-max)':>16}{'/ BP':>8}{'peak MB':>10}{'/ BP':>8}")
    table = {}
    for method in methods:
        times = seconds[method][1:]
        ratio = statistics.median(t / bp for t, bp in zip(times, seconds["BP"][1:]))
        table[method] = {"seconds": statistics.median(times), "min": min(times), "max": max(times), "ratio": ratio}
        text = f"{method:16}{statistics.median(times):8.3f}{min(times):9.3f}-{max(times):.3f}{ratio:9.2f}"
        if memory[method]:
            table[method].update(megabytes=memory[method], memory_ratio=memory[method] / memory["BP"])
            text += f"{memory[method]:10.0f}{memory[method] / memory['BP']:8.2f}"
        print(text)
    return {"command": "python " + " ".join(sys.argv), "device": describe_device(device), "torch": torch.__version__,
            "model": name, "batch_size": batch_size, "rounds": rounds, "methods": table}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs")
    parser.add_argument("--data-dir", help="where the data sets are, if not where the run found them")
    parser.add_argument("--speed", action="store_true", help="measure training steps on this machine")
    parser.add_argument("--model", default="vit-128-4-5", help="for --speed [vit-128-4-5]")
    parser.add_argument("--batch-size", type=int, default=512, help="for --speed [512]")
    parser.add_argument("--rounds", type=int, default=5, help="for --speed: measured steps of each method [5]")
    parser.add_argument("--json", metavar="FILE", help="for --speed: write the numbers there too")
    args = parser.parse_args()
    if not args.runs and not args.speed:
        parser.error("name the folder of a run, or say --speed")
    try:
        for folder in args.runs:
            evaluate(folder, args.data_dir)
        if args.speed:
            record = speed(args.model, args.batch_size, args.rounds)
            if args.json:
                Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    except (OSError, ValueError) as reason:
        parser.error(str(reason))


if __name__ == "__main__":
    main()
