"""What a training step, inference and the pipeline cost: Tables 2 and 6, and Section 5.1.

    python experiments/speed.py --model vit-128-4-5
    torchrun --nproc-per-node 2 experiments/speed.py --model vit-128-4-2 --batch-size 64

Prints Markdown tables, of random images of a data set's sizes: training steps by method, against
BP; inference; memory by depth. Under torchrun: layers trained in parallel (pipeline.py) against one
process, and against BP by DistributedDataParallel. --json FILE keeps the numbers.
"""
import argparse
import ctypes
import json
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from cff import encode, predict, update
from eval import print_table
from pipeline import connect, gather, leave, take_part
from train import defaults, find_device, make_augment, make_model, make_optimizers, make_step
from vit import plain_name

METHODS = {"BP": {"algo": "bp"}, "CFF+M, 1 view": {"algo": "cffm", "views": 1},
           "CFF+M, 2 views": {"algo": "cffm"},
           "CFF+M, 2 views, --plain": {"algo": "cffm", "plain": True},
           "FF": {"algo": "ff"}, "SymBa": {"algo": "symba"}, "FF Collab": {"algo": "collab"}}
SIZES = {"shapes": ((3, 32, 32), 10), "mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10),
         "cifar100": ((3, 32, 32), 100), "tinyimagenet": ((3, 64, 64), 200)}     # an image, classes


# ------------------------------------------------------------------------------------ the machine

def keep_memory():
    """Let glibc (Linux) keep the memory that a step has freed: to fetch it anew costs time."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                      # M_MMAP_MAX: large blocks come from the heap as well
        mallopt(-1, -1)                     # M_TRIM_THRESHOLD: the heap never shrinks


def describe_device(device):
    """The GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info, name = Path("/proc/cpuinfo"), platform.processor()
    if info.exists():
        found = re.search(r"model name\s*: (.*)", info.read_text())
        name = found[1] if found else name
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads"


def peak_of(work, device):
    """What the function `work` needs at its peak beyond what is there before, in MB; None where
    that cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not Path("/proc/self/clear_refs").exists():
        return None

    def status(key):                                            # /proc has it in kB
        return 1024 * int(re.search(key + r":\s*(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")               # forgets the peak
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 1e6


def flop_of(step):
    """FLOP of a step's products, those of attention by its formula: fused ones are not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


# -------------------------------------------------------------------------------- what is measured

def random_run(method, name, dataset, batch_size, device, **changes):
    """What it takes to train the model `name` by one of METHODS, with a batch x, y of random pixels
    and as many labels as have two images each. changes: settings other than the method's own."""
    torch.manual_seed(0)
    shape, classes = SIZES[dataset]
    s = defaults(dataset, METHODS[method]["algo"]) | METHODS[method] | {"model": name} | changes
    facts, generator = {"image_shape": shape, "num_classes": classes}, torch.Generator()
    augment = make_augment(s["augment"], s["padding"], shape[0] * [0.5], shape[0] * [0.25],
                           generator)
    x = torch.randint(256, (batch_size, *shape), dtype=torch.uint8, device=device)
    model = make_model(s, facts).to(device)
    y = torch.arange(batch_size, device=device) % min(classes, batch_size // 2)     # all in pairs
    return SimpleNamespace(settings=s, facts=facts, model=model, x=x, y=y, augment=augment,
                           generator=generator)


def random_step(method, *case):
    """A function that makes one training step, for the arguments of `random_run`."""
    run = random_run(method, *case)
    optimizers = make_optimizers(run.model, run.settings)
    step = make_step(run.settings, run.model, optimizers, run.augment, run.generator)
    return lambda: step(run.x, run.y)


def step_memory(job):
    """`peak_of` two training steps: activations, gradients and the optimizers' moments."""
    method, name, dataset, batch_size, device = job
    random_step(method, name, dataset, 8, device)()     # libraries are loaded, whatever the method
    return peak_of(repeat(2, random_step(*job)), device)


def measure_memory(jobs):
    """`step_memory` of each job (method, name, dataset, batch_size, device), in a fresh process
    each: {(method, name): MB, or None where it cannot be measured}.

    There large blocks go back to the system when they are freed: what is left is what the method
    holds, without what the C library's allocator keeps in reserve.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"            # for the new processes' glibc
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {job[:2]: MB for job, MB in zip(jobs, pool.map(step_memory, jobs, chunksize=1))}


def make_inference(name, dataset, n, device):
    """Functions that classify n random images: CFF+M in one pass; FF with a head, and by class."""
    cffm, ff = (random_run(method, name, dataset, n, device) for method in ("CFF+M, 1 view", "FF"))
    images = cffm.augment(cffm.x)
    return {"CFF+M, one pass": lambda: predict(cffm.model, images, "cffm"),
            "FF, with head": lambda: predict(ff.model, images, "ff", head=True),
            "FF, a pass for each class": lambda: predict(ff.model, images, "ff")}


def timed(functions, rounds, barrier=lambda: None):
    """{name: seconds of each round} of {name: function}, called in turn, after one to warm up.

    In turn, so that a machine whose speed drifts hurts all alike; ratios are taken in a round.
    barrier: waits for other processes; the time is from when all are ready to when all are done.
    """
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
    """A function that makes n steps and returns what the last one does."""
    def steps():
        for _ in range(n):
            result = step()
        return result
    return steps


def matrix_product(device, size=2048):
    """A function that multiplies two square matrices."""
    matrix = torch.randn(size, size, device=device)
    return lambda: matrix @ matrix


def summary(times, base):
    """Median, least and most of `times`, and the median of their ratios to those of `base`."""
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
    methods = {method: {
        **summary(times[method], times["BP"]), "gigaflop": flop_of(step) / 1e9,
        "megabytes": memory[method, name]} for method, step in steps.items()}
    base = inference["CFF+M, one pass"]
    return {"command": shlex.join(["python", *sys.argv]), "device": describe_device(device),
            "torch": torch.__version__, "model": name, "dataset": dataset,
            "batch_size": batch_size, "rounds": rounds, "methods": methods, "images": n,
            "inference": {way: summary(t, base) for way, t in inference.items()},
            "megabytes_by_depth": {method: {L: memory[method, model]
                                            for L, model in deep.items()} for method in compared}}


def show_speed(record):
    """Print a record of `speed` as Markdown tables."""
    print("A training step of {model} on {dataset}'s sizes, batch {batch_size}, on {device}, torch "
          "{torch};\nmedians of {rounds} rounds:\n".format(**record))
    rows = [["Method", "Seconds (least-most)", "/ BP", "GFLOP", "Peak memory, MB", "/ BP"]]
    base = record["methods"]["BP"]["megabytes"]
    for method, row in record["methods"].items():
        memory = ["-", "-"]
        if base:
            memory = [f"{row['megabytes']:.0f}", f"{row['megabytes'] / base:.2f}"]
        rows.append([method, f"{row['seconds']:.2f} ({row['min']:.2f}-{row['max']:.2f})",
                     f"{row['ratio']:.2f}", f"{row['gigaflop']:.0f}", *memory])
    print_table(rows, markdown=True)
    print(f"\nInference, {record['images']} images at once:\n")
    rows = [["Way", "ms an image (least-most)", "/ CFF+M"]]
    for way, row in record["inference"].items():
        ms = [1000 * row[key] / record["images"] for key in ("seconds", "min", "max")]
        rows.append([way, f"{ms[0]:.2f} ({ms[1]:.2f}-{ms[2]:.2f})", f"{row['ratio']:.1f}"])
    print_table(rows, markdown=True)
    print("\nPeak memory of a step by the number of layers, MB:\n")
    rows = [["Method", *record["megabytes_by_depth"]["BP"]]]
    for method, by_depth in record["megabytes_by_depth"].items():
        rows.append([method, *("-" if MB is None else f"{MB:.0f}" for MB in by_depth.values())])
    print_table(rows, markdown=True)


# -------------------------------------------------------------------- several processes (Sec. 5.1)

def piped_steps(method, N, *case):
    """A function that trains on one random batch N times, by all processes, each its layers."""
    run = random_run(method, *case)
    segment, step = take_part(run.settings, run.facts, run.model,
                              make_optimizers(run.model, run.settings), run.augment, run.generator)

    def epoch():
        for _ in segment.epoch(N * [len(run.y)]):
            losses = step(run.x if segment.rank == 0 else run.y, run.y)
        return losses
    return epoch


def data_parallel_steps(N, *case):
    """A function that trains N times by BP, each process on its share of the random batch."""
    run = random_run("BP", *case)
    x, y = (part.tensor_split(dist.get_world_size())[dist.get_rank()] for part in (run.x, run.y))
    (optimizer,) = make_optimizers(run.model, run.settings)
    # DistributedDataParallel averages the gradients of one call: encoder and head must be one
    run.model.forward = lambda images: run.model.head(encode(run.model, images)[-1])
    whole = DistributedDataParallel(run.model)
    return repeat(N, lambda: update(optimizer, cross_entropy(whole(run.augment(x)), y)))


def pipeline_speed(name, batch_size, rounds, N, dataset="cifar10"):
    """Time N batches in the first process alone and in all: by the pipeline, for BP by
    DistributedDataParallel. The record that `show_pipeline_speed` prints, None but in the first.

    Matrix products, as many in each process, tell what more processes can gain on this machine.
    """
    device = find_device()
    n, case = dist.get_world_size(), (name, dataset, batch_size, device)
    # a small step first, as in step_memory
    piped_steps("CFF+M, 1 view", 1, f"vit-8-2-{n}", dataset, 8, device)()
    memory = gather(peak_of(lambda: piped_steps("CFF+M, 1 view", 2, *case)(), device))
    product = repeat(10, matrix_product(device))
    ways = {"Matrix products": (product, product)}              # of one process, of all together
    for method in ("CFF+M, 1 view", "CFF+M, 2 views"):
        ways[method] = repeat(N, random_step(method, *case)), piped_steps(method, N, *case)
    ways["BP"] = repeat(N, random_step("BP", *case)), data_parallel_steps(N, *case)

    functions = {}
    for what, (alone, together) in ways.items():
        if dist.get_rank() > 0:
            alone = lambda: torch.zeros(1)
        functions |= {(what, 0): alone, (what, 1): together}
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
    return {"command": shlex.join(["torchrun", "--nproc-per-node", str(n), *sys.argv]),
            "device": describe_device(device), "torch": torch.__version__, "model": name,
            "dataset": dataset, "batch_size": batch_size, "rounds": rounds, "batches": N,
            "processes": n, "megabytes": memory, "methods": methods}


def show_pipeline_speed(record):
    """Print a record of `pipeline_speed` as a Markdown table."""
    print("{batches} batches of {batch_size} random images of {dataset}'s sizes, {model}, "
          "{processes} processes, {device}, torch {torch};\nmedians of {rounds} rounds "
          "(least-most):\n".format(**record))
    rows = [["What", "One process, s", f"{record['processes']} processes, s", "Gain",
             "Speed / BP's"]]
    for what, row in record["methods"].items():
        rows.append([what, f"{row['alone']:.1f}", f"{row['together']:.1f}", ranged(row["gain"]),
                     "-" if what == "Matrix products" else ranged(row["to_bp"])])
    print_table(rows, markdown=True)
    if None not in record["megabytes"]:
        print("\nPeak memory of the processes, one view, {model}, batch {batch_size}: ".format(
            **record) + " + ".join(f"{MB:.0f}" for MB in record["megabytes"]) + " MB")


def ranged(values):
    """Median of values, their least and most: "1.80 (1.75-1.84)"."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


# ----------------------------------------------------------------------------------- command line

def main(argv=None):
    """The command line; what cannot be measured ends with one line and exit status 2."""
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
        parser.error("--rounds and --batches must be 1 or more, --batch-size 2 or more, and not "
                     "less than the processes")
    sizes = args.model, args.batch_size, args.rounds
    try:
        random_run("BP", args.model, args.dataset, 2, torch.device("cpu"))  # raises for a bad model
        keep_memory()                           # not that one's: what a step adds would not be seen
        if processes:
            connect()
            record, show = pipeline_speed(*sizes, args.batches, args.dataset), show_pipeline_speed
        else:
            record, show = speed(*sizes, args.dataset), show_speed
        if record:                                                  # only the first process has it
            show(record)
        if record and args.json:
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    except (OSError, ValueError, RuntimeError) as reason:
        said = (str(reason) or type(reason).__name__).splitlines()[0]
        print(f"speed.py: error: {said}", file=sys.stderr)
        leave(2)
    if processes:
        leave()


if __name__ == "__main__":
    main()
