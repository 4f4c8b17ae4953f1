"""The cost of a training step, of inference and of the pipeline: Tables 2 and 6, Section 5.1.

    python experiments/speed.py --model vit-128-4-5
    torchrun --nproc-per-node 2 experiments/speed.py --model vit-128-4-2 --batch-size 64

The first command compares each method's training step with BP's, in time and memory, and measures
inference. The second compares the pipeline of pipeline.py with one process, and with BP by
DistributedDataParallel. Images are random. Prints Markdown tables; --json FILE saves the numbers.
"""
import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cff import encode, predict, update
from eval import print_table
from losses import ff_loss, margins, symba_loss
from pipeline import connect, gather, own_part
from train import begin_stage, defaults, find_device, make_augment, make_model, train_on
from vit import plain_name

METHODS = {"BP": {"algo": "bp"}, "CFF+M, 1 view": {"algo": "cffm", "views": 1},
           "CFF+M, 2 views": {"algo": "cffm", "views": 2}, "FF": {"algo": "ff"},
           "SymBa": {"algo": "symba"}, "FF Collab": {"algo": "collab"},
           "BP, bf16": {"algo": "bp", "precision": "bf16"},
           "CFF+M, 2 views, bf16": {"algo": "cffm", "views": 2, "precision": "bf16"}}


def peak_of(work, device):
    """The peak memory in MB that `work()` adds to the memory in use; NaN if it is unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")

    def memory(key):                                            # in bytes; /proc gives kB
        return 1024 * int(re.search(key + r":\s*(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")               # resets the peak
    before = memory("VmRSS")
    work()
    return (memory("VmHWM") - before) / 1e6


def random_run(method, name, batch_size, device):
    """A run of a model for `train_on`, with random images x; each class occurs at least twice."""
    s = defaults("cifar10", METHODS[method]["algo"]) | METHODS[method] | {"model": name}
    s, data = SimpleNamespace(**s), {"image_shape": (3, 32, 32), "num_classes": 10}
    model = make_model(s, data).to(device)
    run = SimpleNamespace(
        settings=s, data=data, model=model, generator=None,
        margins=margins(s.m0, s.mL, len(model.layers), s.decay),
        goodness_loss=symba_loss if s.algo == "symba" else ff_loss,
        augment=make_augment(s.augment, s.padding, 3 * [0.5], 3 * [0.25], generator=None),
        x=torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=device),
        y=torch.arange(batch_size, device=device) % min(10, batch_size // 2))
    begin_stage(run, 1)
    return run


def random_step(method, *case):
    """A function that makes one training step; case: the model's name, batch size, device."""
    run = random_run(method, *case)
    return lambda: train_on(run, run.x, run.y)


def step_memory(*case):
    """`peak_of` two steps in a new process: activations, gradients and the optimizers' moments."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"    # makes glibc return freed blocks
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(step_memory_here, case)


def step_memory_here(method, name, batch_size, device):
    random_step(method, name, 8, device)()                      # loads the libraries
    return peak_of(repeat(2, random_step(method, name, batch_size, device)), device)


def timed(functions, rounds, barrier=lambda: None):
    """{name: seconds of each round} for {name: function}, after a warm-up round. The functions
    take turns, so a change in the machine's speed affects all. barrier: waits for all processes."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            barrier()
            start = time.perf_counter()
            function().sum().item()                             # waits for a GPU to finish
            barrier()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def repeat(n, step):
    """A function that makes n steps and returns the result of the last one."""
    def steps():
        for _ in range(n):
            result = step()
        return result
    return steps


def summary(times, base):
    """Median, minimum and maximum of `times`, and their median ratio to `base`, round by round."""
    return {"seconds": statistics.median(times), "min": min(times), "max": max(times),
            "ratio": statistics.median(t / b for t, b in zip(times, base))}


# ------------------------------------------------------------------- one process (Tables 2 and 6)

def speed(name, batch_size, rounds, device):
    """Measure training steps, memory, and inference of 100 images, for `show_speed`."""
    case, methods, by_depth = (batch_size, device), {}, {}
    steps = {method: random_step(method, name, *case) for method in METHODS}
    torch.set_float32_matmul_precision("high")          # a method in bf16 changed this for all
    times = timed(steps, rounds)
    for method in METHODS:
        methods[method] = summary(times[method], times["BP"])
        methods[method]["megabytes"] = step_memory(method, name, *case)
    for method in ("BP", "CFF+M, 1 view"):
        by_depth[method] = {L: step_memory(method, re.sub(r"\d+$", str(L), name), *case)
                            for L in (2, 4, 8, 12)}
    cffm, ff = (random_run(method, name, 100, device) for method in ("CFF+M, 1 view", "FF"))
    images = cffm.augment(cffm.x)
    times = timed({
        "CFF+M, one pass": lambda: predict(cffm.model, images, "cffm"),
        "FF, with head": lambda: predict(ff.model, images, "ff", head=True),
        "FF, a pass for each class": lambda: predict(ff.model, images, "ff")}, rounds)
    inference = {way: summary(times[way], times["CFF+M, one pass"]) for way in times}
    return {"methods": methods, "megabytes_by_depth": by_depth, "inference": inference}


def show_speed(record):
    """Print a record of `speed` as Markdown tables."""
    print("One training step of {model} on images of CIFAR-10's size: batch {batch_size}, "
          "{device}, torch {torch}.\nMedians of {rounds} rounds:\n".format(**record))
    rows = [["Method", "Seconds (min-max)", "Time / BP", "Peak memory, MB", "Memory / BP"]]
    base = record["methods"]["BP"]["megabytes"]
    for method, row in record["methods"].items():
        MB = row["megabytes"]
        rows.append([method, ranged([row["min"], row["seconds"], row["max"]]),
                     f"{row['ratio']:.2f}", f"{MB:.0f}", f"{MB / base:.2f}"])
    print_table(rows, markdown=True)
    print("\nInference on 100 images at once:\n")
    rows = [["Method", "ms per image (min-max)", "Time / CFF+M"]]
    for method, row in record["inference"].items():
        ms = [1000 * row[key] / 100 for key in ("min", "seconds", "max")]
        rows.append([method, ranged(ms), f"{row['ratio']:.1f}"])
    print_table(rows, markdown=True)
    print("\nPeak memory of a step in MB, by number of layers:\n")
    rows = [["Method", *record["megabytes_by_depth"]["BP"]]]
    for method, by_depth in record["megabytes_by_depth"].items():
        rows.append([method, *(f"{MB:.0f}" for MB in by_depth.values())])
    print_table(rows, markdown=True)


# -------------------------------------------------------------------- several processes (Sec. 5.1)

def piped_steps(method, N, *case):
    """A function that trains N times on one random batch; each process trains its own layers."""
    run = own_part(random_run(method, *case))
    if run.model.rank > 0:
        run.augment = lambda x: x                               # only the first process has images

    def epoch():
        for _ in run.model.epoch(N * [len(run.y)]):
            losses = train_on(run, run.x, run.y)
        return losses
    return epoch


def data_parallel_steps(N, name, batch_size, device):
    """A function that makes N steps of BP; each process has its share of the batch."""
    run = random_run("BP", name, batch_size // dist.get_world_size(), device)
    # DistributedDataParallel averages gradients after one call, which must run encoder and head
    run.model.forward = lambda images: run.model.head(encode(run.model, images)[-1])
    whole, optimizer = DistributedDataParallel(run.model), run.optimizers[0]
    return repeat(N, lambda: update(optimizer, cross_entropy(whole(run.augment(run.x)), run.y)))


def pipeline_speed(name, batch_size, rounds, N, device):
    """Time N batches on the first process alone and on all: CFF+M by the pipeline, BP by
    DistributedDataParallel. Returns numbers for `show_pipeline_speed` in the first process, None
    in others."""
    n, case = dist.get_world_size(), (name, batch_size, device)
    piped_steps("CFF+M, 1 view", 1, f"vit-8-2-{n}", 8, device)()            # loads the libraries
    memory = gather(peak_of(lambda: piped_steps("CFF+M, 1 view", 2, *case)(), device))
    ways = {}                               # method: (in the first process, in all processes)
    for method in ("CFF+M, 1 view", "CFF+M, 2 views"):
        ways[method] = repeat(N, random_step(method, *case)), piped_steps(method, N, *case)
    ways["BP"] = repeat(N, random_step("BP", *case)), data_parallel_steps(N, *case)
    functions, methods = {}, {}
    for what, (alone, together) in ways.items():
        functions[what, "alone"] = alone if dist.get_rank() == 0 else lambda: torch.zeros(1)
        functions[what, "together"] = together
    times = timed(functions, rounds, dist.barrier)
    for what in ways:
        alone, together = times[what, "alone"], times[what, "together"]
        methods[what] = {"alone": statistics.median(alone), "together": statistics.median(together),
                         "gain": [a / b for a, b in zip(alone, together)],
                         "to_bp": [b / a for a, b in zip(together, times["BP", "together"])]}
    return memory and {"processes": n, "megabytes": memory, "methods": methods}


def show_pipeline_speed(record):
    """Print a record of `pipeline_speed` as a Markdown table."""
    print("{batches} batches of {batch_size} random images of CIFAR-10's size: {model}, "
          "{processes} processes, {device}, torch {torch}.\nMedians of {rounds} rounds "
          "(min-max):\n".format(**record))
    rows = [["Method", "One process, s", f"{record['processes']} processes, s", "Gain",
             "Speed / BP"]]
    for what, row in record["methods"].items():
        rows.append([what, f"{row['alone']:.1f}", f"{row['together']:.1f}", ranged(row["gain"]),
                     ranged(row["to_bp"])])
    print_table(rows, markdown=True)
    print("\n" + memory_line(record))


def memory_line(record):
    """The memory in a record of `pipeline_speed`, in words."""
    return ("Peak memory per process, one view, {model}, batch {batch_size}: ".format(**record)
            + " + ".join(f"{MB:.0f}" for MB in record["megabytes"]) + " MB")


def ranged(values):
    """Median, minimum and maximum of values, such as "1.80 (1.75-1.84)"."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=plain_name, default="vit-128-4-5", help="[vit-128-4-5]")
    parser.add_argument("--batch-size", type=int, default=512, help="images per batch [512]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up [5]")
    parser.add_argument("--batches", type=int, default=20, help="per round, with torchrun [20]")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    args, device = parser.parse_args(), find_device()
    several, sizes = dist.is_torchelastic_launched(), (args.model, args.batch_size, args.rounds)
    if several:
        connect()
        measured, show = pipeline_speed(*sizes, args.batches, device), show_pipeline_speed
    else:
        measured, show = speed(*sizes, device), show_speed
    if measured:                                                # only in the first process
        chip = f"{platform.processor() or platform.machine()}, threads: {torch.get_num_threads()}"
        if device.type == "cuda":
            chip = torch.cuda.get_device_name()
        record = {"device": chip, "torch": torch.__version__, **vars(args), **measured}
        show(record)
        if args.json:
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    if several:                                                 # see the end of pipeline.py
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
