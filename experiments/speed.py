"""What a training step, inference and the pipeline cost: Tables 2 and 6, and Section 5.1.

    python experiments/speed.py --model vit-128-4-5
    torchrun --nproc-per-node 2 experiments/speed.py --model vit-128-4-2 --batch-size 64

Prints Markdown tables for random images: training steps by method, compared with BP; inference;
memory by depth. With torchrun: layers trained in parallel (pipeline.py), compared with one process
and with BP by DistributedDataParallel. --json FILE keeps the numbers.
"""
import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from cff import encode, predict, update
from eval import print_table
from losses import ff_loss, margins, symba_loss
from pipeline import connect, gather, leave, own_part
from train import begin_stage, defaults, find_device, make_augment, make_model, train_on
from vit import plain_name

METHODS = {"BP": {"algo": "bp"}, "CFF+M, 1 view": {"algo": "cffm", "views": 1},
           "CFF+M, 2 views": {"algo": "cffm", "views": 2}, "FF": {"algo": "ff"},
           "SymBa": {"algo": "symba"}, "FF Collab": {"algo": "collab"}}
SIZES = {"shapes": ((3, 32, 32), 10), "mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10),
         "cifar100": ((3, 32, 32), 100), "tinyimagenet": ((3, 64, 64), 200)}     # an image, classes


def describe(device, **sizes):
    """What a record begins with: the command, the machine, and the sizes of what was measured."""
    name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"command": shlex.join(["python", *sys.argv]), "device": name,
            "torch": torch.__version__, **sizes}


def peak_of(work, device):
    """Memory in MB that the function `work` needs at its peak, beyond what is in use before; NaN
    where that cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not Path("/proc/self/clear_refs").exists():
        return math.nan

    def status(key):                                            # /proc has it in kB
        return 1024 * int(re.search(key + r":\s*(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")               # resets the peak
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 1e6


def random_run(method, name, dataset, batch_size, device, **changes):
    """A run, as `train_on` takes it, of the model `name` by one of METHODS, with a batch x, y of
    random images; each label has two images. changes: other settings."""
    torch.manual_seed(0)
    shape, classes = SIZES[dataset]
    s = defaults(dataset, METHODS[method]["algo"]) | METHODS[method] | {"model": name} | changes
    s, generator = SimpleNamespace(**s), torch.Generator()
    data = {"image_shape": shape, "num_classes": classes}
    model = make_model(s, data).to(device)
    run = SimpleNamespace(
        settings=s, data=data, model=model, generator=generator,
        margins=margins(s.m0, s.mL, len(model.layers), s.decay),
        goodness_loss=symba_loss if s.algo == "symba" else ff_loss,
        augment=make_augment(s.augment, s.padding, shape[0] * [0.5], shape[0] * [0.25], generator),
        x=torch.randint(256, (batch_size, *shape), dtype=torch.uint8, device=device),
        y=torch.arange(batch_size, device=device) % min(classes, batch_size // 2))
    begin_stage(run, 1)
    return run


def random_step(method, *case):
    """A function that makes one training step, for the arguments of `random_run`."""
    run = random_run(method, *case)
    return lambda: train_on(run, run.x, run.y)


def step_memory(job):
    """`peak_of` two training steps: activations, gradients and the optimizers' moments."""
    method, name, dataset, batch_size, device = job
    random_step(method, name, dataset, 8, device)()             # loads libraries
    return peak_of(repeat(2, random_step(*job)), device)


def measure_memory(jobs):
    """`step_memory` of each job (method, name, dataset, batch_size, device), each in a new process:
    {(method, name): MB}."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"    # there glibc gives freed blocks back
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {job[:2]: MB for job, MB in zip(jobs, pool.map(step_memory, jobs, chunksize=1))}


def make_inference(name, dataset, n, device):
    """Functions that classify n random images."""
    cffm, ff = (random_run(method, name, dataset, n, device) for method in ("CFF+M, 1 view", "FF"))
    images = cffm.augment(cffm.x)
    return {"CFF+M, one pass": lambda: predict(cffm.model, images, "cffm"),
            "FF, with head": lambda: predict(ff.model, images, "ff", head=True),
            "FF, a pass for each class": lambda: predict(ff.model, images, "ff")}


def timed(functions, rounds, barrier=lambda: None):
    """{name: seconds of each round} of {name: function}, after one round to warm up. They take
    turns, so that a change in the machine's speed affects all. barrier: waits for all processes."""
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
    """A function that makes n steps and returns what the last one returns."""
    def steps():
        for _ in range(n):
            result = step()
        return result
    return steps


def summary(times, base):
    """Median, minimum and maximum of `times`, and the median of their ratios to those of `base`."""
    return {"seconds": statistics.median(times), "min": min(times), "max": max(times),
            "ratio": statistics.median(t / b for t, b in zip(times, base))}


# ------------------------------------------------------------------- one process (Tables 2 and 6)

def speed(name, batch_size, rounds, dataset="cifar10", depths=(2, 4, 8, 12), n=100):
    """Measure training steps, inference of n images and memory; the record `show_speed` prints."""
    device = find_device()
    case = name, dataset, batch_size, device
    steps = {method: random_step(method, *case) for method in METHODS}
    times = timed(steps, rounds)
    inference = timed(make_inference(name, dataset, n, device), rounds)
    deep, compared = {L: re.sub(r"\d+$", str(L), name) for L in depths}, ("BP", "CFF+M, 1 view")
    memory = measure_memory([(method, *case) for method in METHODS] + [
        (method, model, *case[1:]) for method in compared for model in deep.values()])
    methods = {method: {**summary(times[method], times["BP"]), "megabytes": memory[method, name]}
               for method in METHODS}
    base = inference["CFF+M, one pass"]
    return {**describe(device, model=name, dataset=dataset, batch_size=batch_size, rounds=rounds),
            "methods": methods, "images": n,
            "inference": {way: summary(t, base) for way, t in inference.items()},
            "megabytes_by_depth": {method: {L: memory[method, model]
                                            for L, model in deep.items()} for method in compared}}


def show_speed(record):
    """Print a record of `speed` as Markdown tables."""
    print("A training step of {model} on images of {dataset}'s size, batch {batch_size}, {device}, "
          "torch {torch};\nmedians of {rounds} rounds:\n".format(**record))
    rows = [["Method", "Seconds (min-max)", "/ BP", "Peak memory, MB", "/ BP"]]
    base = record["methods"]["BP"]["megabytes"]
    for method, row in record["methods"].items():
        rows.append([method, f"{row['seconds']:.2f} ({row['min']:.2f}-{row['max']:.2f})",
                     f"{row['ratio']:.2f}", f"{row['megabytes']:.0f}",
                     f"{row['megabytes'] / base:.2f}"])
    print_table(rows, markdown=True)
    print(f"\nInference, {record['images']} images at once:\n")
    rows = [["Way", "ms per image (min-max)", "/ CFF+M"]]
    for way, row in record["inference"].items():
        ms = [1000 * row[key] / record["images"] for key in ("seconds", "min", "max")]
        rows.append([way, "{:.2f} ({:.2f}-{:.2f})".format(*ms), f"{row['ratio']:.1f}"])
    print_table(rows, markdown=True)
    print("\nPeak memory of a step by the number of layers, MB:\n")
    rows = [["Method", *record["megabytes_by_depth"]["BP"]]]
    for method, by_depth in record["megabytes_by_depth"].items():
        rows.append([method, *(f"{MB:.0f}" for MB in by_depth.values())])
    print_table(rows, markdown=True)


# -------------------------------------------------------------------- several processes (Sec. 5.1)

def piped_steps(method, N, *case):
    """A function that trains on one random batch N times, by all processes, each its layers."""
    run = own_part(random_run(method, *case))
    if run.model.rank > 0:
        run.augment = lambda x: x                               # later processes get no images

    def epoch():
        for _ in run.model.epoch(N * [len(run.y)]):
            losses = train_on(run, run.x, run.y)
        return losses
    return epoch


def data_parallel_steps(N, *case):
    """A function that trains N times by BP, each process on its share of the random batch."""
    run = random_run("BP", *case)
    x, y = (part.tensor_split(dist.get_world_size())[dist.get_rank()] for part in (run.x, run.y))
    # DistributedDataParallel averages the gradients of one call: encoder and head must be one
    run.model.forward = lambda images: run.model.head(encode(run.model, images)[-1])
    whole = DistributedDataParallel(run.model)
    return repeat(N, lambda: update(run.optimizers[0], cross_entropy(whole(run.augment(x)), y)))


def pipeline_speed(name, batch_size, rounds, N, dataset="cifar10", size=1024):
    """Time N batches in the first process alone and in all: by the pipeline, for BP by
    DistributedDataParallel. Products of matrices of this size, as many in each process, show what
    this machine can gain. Returns, in the first, the record that `show_pipeline_speed` prints."""
    device = find_device()
    n, case = dist.get_world_size(), (name, dataset, batch_size, device)
    piped_steps("CFF+M, 1 view", 1, f"vit-8-2-{n}", dataset, 8, device)()       # loads libraries
    memory = gather(peak_of(lambda: piped_steps("CFF+M, 1 view", 2, *case)(), device))
    matrix = torch.randn(size, size, device=device)
    product = repeat(N, lambda: matrix @ matrix)
    ways = {"Matrix products": (product, product)}              # of one process, of all together
    for method in ("CFF+M, 1 view", "CFF+M, 2 views"):
        ways[method] = repeat(N, random_step(method, *case)), piped_steps(method, N, *case)
    ways["BP"] = repeat(N, random_step("BP", *case)), data_parallel_steps(N, *case)

    functions = {}
    for what, (alone, together) in ways.items():
        functions[what, 0] = alone if dist.get_rank() == 0 else lambda: torch.zeros(1)
        functions[what, 1] = together
    times = timed(functions, rounds, dist.barrier)
    if memory is None:
        return None
    methods = {}
    for what in ways:
        work = n if what == "Matrix products" else 1    # of all processes to that of one alone
        alone, together = times[what, 0], times[what, 1]
        methods[what] = {"alone": statistics.median(alone), "together": statistics.median(together),
                         "gain": [work * a / b for a, b in zip(alone, together)],
                         "to_bp": [b / a for a, b in zip(together, times["BP", 1])]}
    return {**describe(device, model=name, dataset=dataset, batch_size=batch_size, rounds=rounds),
            "batches": N, "processes": n, "megabytes": memory, "methods": methods}


def show_pipeline_speed(record):
    """Print a record of `pipeline_speed` as a Markdown table."""
    print("{batches} batches of {batch_size} random images of {dataset}'s size, {model}, "
          "{processes} processes, {device}, torch {torch};\nmedians of {rounds} rounds "
          "(min-max):\n".format(**record))
    rows = [["What", "One process, s", f"{record['processes']} processes, s", "Gain",
             "Speed / BP's"]]
    for what, row in record["methods"].items():
        rows.append([what, f"{row['alone']:.1f}", f"{row['together']:.1f}", ranged(row["gain"]),
                     "-" if what == "Matrix products" else ranged(row["to_bp"])])
    print_table(rows, markdown=True)
    print("\n" + memory_line(record))


def memory_line(record):
    """The memory in a record of `pipeline_speed`, in words."""
    return ("Peak memory of the processes, one view, {model}, batch {batch_size}: ".format(**record)
            + " + ".join(f"{MB:.0f}" for MB in record["megabytes"]) + " MB")


def ranged(values):
    """Median, minimum and maximum of values: "1.80 (1.75-1.84)"."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


# ----------------------------------------------------------------------------------- command line

def main(argv=None):
    """The command line; what cannot be measured ends with one line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=plain_name, default="vit-128-4-5", help="[vit-128-4-5]")
    add("--dataset", choices=SIZES, default="cifar10", help="sizes of images, classes [cifar10]")
    add("--batch-size", type=int, default=512, help="[512]")
    add("--rounds", type=int, default=5, help="measured rounds, after one to warm up [5]")
    add("--batches", type=int, default=20, help="with torchrun, of each measurement [20]")
    add("--json", metavar="FILE", type=os.path.expanduser, help="write the numbers there too")
    args = parser.parse_args(argv)
    processes = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 0
    if min(args.rounds, args.batches) < 1 or args.batch_size < max(2, processes):
        parser.error("--rounds, --batches: 1 or more; --batch-size: 2 or more, one per process")
    sizes = args.model, args.batch_size, args.rounds
    try:
        random_run("BP", args.model, args.dataset, 2, torch.device("cpu"))
    except ValueError as reason:                                # of the model's name or sizes
        parser.error(str(reason))
    if processes:
        connect()
        record, show = pipeline_speed(*sizes, args.batches, args.dataset), show_pipeline_speed
    else:
        record, show = speed(*sizes, args.dataset), show_speed
    if record:                                                  # only the first process has it
        show(record)
    if record and args.json:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    if processes:
        leave(0)


if __name__ == "__main__":
    main()
