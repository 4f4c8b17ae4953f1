"""Layers trained in parallel by several processes: the pipeline of Section 5.1 and Fig. 8.

    torchrun --nproc-per-node 2 experiments/pipeline.py --dataset cifar10 --algo cffm
    torchrun --nproc-per-node 4 experiments/pipeline.py --resume --out runs/NAME
    python experiments/pipeline.py --schedule runs/NAME     who worked, who waited; schedule.png

No gradient crosses from layer to layer, so layers can train at the same time. Flags and the run's
folder are train.py's, with trace.csv besides; README.md, *The pipeline of layers*, says more.
"""
import csv
import io
import os
import signal
import sys
import time
from collections import deque
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from cff import unit
from eval import COLOURS, print_table, pyplot, save

CANNOT = {"bp": "BP's gradients cross all layers", "scl": "SCL's gradients cross all layers",
          "collab": "each layer's loss of FF Collab needs the goodness of all others"}


# ---------------------------------------------------------------------------- a process's layers

def share(L, n, rank):
    """The layers, a range, of process `rank` of n; ValueError for more processes than layers."""
    if n > L:
        raise ValueError(f"{n} processes for {L} layers: each needs at least one")
    return range(L * rank // n, L * (rank + 1) // n)


class Segment:
    """The layers that this process trains; cff_step and ff_step take it for the model.

    The first process has the images. A later one receives, where the model would cut patches, the
    output of the layer before its own. Its last layer's output is sent on at once, before the loss
    is taken; nothing comes back. So while process r works on batch t, process r - 1 works on batch
    t + 1, and N batches take n + N - 1 steps on n processes. A process sends a batch when the one
    before is on its way into the next process, so that at most two are in between.

    trace: after an epoch, rows (process, batch, event, batch waited for, start, end), in seconds of
    time.time(). A later process drops the model's other layers.
    """

    def __init__(self, model, image_shape, views):
        self.rank, L = dist.get_rank(), len(model.layers)
        mine = share(L, dist.get_world_size(), self.rank)
        self.place, self.is_last = slice(mine.start, mine.stop), mine.stop == L
        self.layers, self.pool, self.patching = model.layers[self.place], model.pool, model.patches
        self.labels, self.num_classes = model.labels, model.num_classes
        self.device = next(model.parameters()).device
        image = torch.zeros(1, *image_shape, device=self.device)
        y = None if model.labels is None else torch.zeros(1, dtype=torch.long, device=self.device)
        with torch.no_grad():                                   # one image, between two layers
            self.shape = model.layers[0](model.patches(image, y)).shape[1:]     # (T, E) or (E,)
        # messages a batch, one a forward pass; FF has two, with the true and with wrong labels
        self.messages = views if model.labels is None else 2
        if self.rank > 0:
            model.layers = self.layers

    def epoch(self, sizes):
        """Yield the number of each batch, for a step on it; sizes: how many images each has."""
        self.batch, self.trace, self.coming, self.going = 0, [], deque(), deque()
        self.expected = (size for size in sizes for _ in range(self.messages))
        for _ in range(self.messages):
            self.expect()
        hook = None if self.is_last else self.layers[-1].register_forward_hook(self.send)
        while self.batch < len(sizes):
            start = time.time()
            yield self.batch
            self.note("step", "", start)
            self.batch += 1
        for request, _, _ in self.going:
            request.wait()
        if hook:
            hook.remove()

    def expect(self):
        """Start to receive the next message, if there is one, while something else is computed."""
        size = next(self.expected, None)
        if self.rank > 0 and size:
            h = torch.empty(size, *self.shape, device=self.device)
            self.coming.append((dist.irecv(h, self.rank - 1), h))

    def patches(self, images, y=None):
        """The first layer's input: patches in the first process, in a later one a message."""
        if self.rank == 0:
            return self.patching(images, y)
        start, (request, h) = time.time(), self.coming.popleft()
        request.wait()
        self.note("receive", self.batch, start)
        self.expect()
        return h if self.labels is None else unit(h)            # FF normalises between layers

    def send(self, layer, x, h):
        """Send h, the last layer's output, on; wait first if the batch before has not left."""
        start, waited_for = time.time(), ""
        if len(self.going) == self.messages:
            request, _, waited_for = self.going.popleft()
            request.wait()
        self.note("send", waited_for, start)
        h = h.detach().contiguous()                             # to be kept until it has left
        self.going.append((dist.isend(h, self.rank + 1), h, self.batch))

    def note(self, event, waited_for, start):
        self.trace.append((self.rank, self.batch, event, waited_for, start, time.time()))


def take_part(s, facts, model, optimizers, augment, generator=None):
    """This process's part in training a model by settings s on data of these facts: its `Segment`,
    with its layers' optimizers, and step(x, y), to which a later process gives y in place of x."""
    margins = train.layer_margins(s, model)
    segment = Segment(model, facts["image_shape"], s["views"])
    segment.optimizers = optimizers[segment.place]
    augment = (lambda y: y) if segment.rank > 0 else augment
    step = train.make_step(s, segment, segment.optimizers, augment, generator)
    if model.labels is None:            # its margins were those of a model of the segment's depth
        step = partial(step, margins=margins[segment.place])
    return segment, step


# -------------------------------------------------------------------------- between the processes

def connect():
    """Join the processes that torchrun started; each has a GPU of its own if there are any."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # others wait as long as the first one loads or validates; torchrun ends the run if one dies
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=1))


def leave(status=0):
    """End this process; at once if it has joined others, as gloo's threads make Python's own end at
    times hang or abort."""
    if not dist.is_initialized():
        raise SystemExit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def stop(*_):
    """Ctrl-C, or a queue's SIGTERM, in the first process: once, as torchrun sends more of them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def pack(value):
    file = io.BytesIO()
    torch.save(value, file)                                     # from any device
    return file.getvalue()


def unpack(data):
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def broadcast(value=None):
    """In every process the first one's value, its tensors on the CPU."""
    box = [pack(value)]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return unpack(box[0])


def gather(value):
    """In the first process a list of every process's value, tensors on the CPU; else None."""
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(pack(value), values)
    return values and [unpack(data) for data in values]


# --------------------------------------------------------------------------------------- training

def train_epoch(segment, step, planned, data=None):
    """Train this process's layers on the batches of an epoch: (learning rate, rows of `data`), in a
    later process (learning rate, y). Returns, in the first process, what became of all's layers:
    a dict a process; None in the others."""
    total = 0
    for i in segment.epoch([len(part) for _, part in planned]):
        rate, part = planned[i]
        x, y = (data[0][part], data[1][part]) if data else 2 * [part.to(segment.device)]
        for optimizer in segment.optimizers:
            optimizer.param_groups[0]["lr"] = rate
        total += len(y) * step(x, y)
    layers = [(layer.state_dict(), optimizer.state_dict())
              for layer, optimizer in zip(segment.layers, segment.optimizers)]
    return gather({"total": total, "layers": layers, "trace": segment.trace})


def train_encoder(run):
    """Stage 1 of `train.train` from where `run` stands, by all processes: the first one's part."""
    s, y = run.settings, run.train[1]
    states = [optimizer.state_dict() for optimizer in run.optimizers]
    broadcast((s, run.facts, run.device.type, run.model.state_dict(), states))
    segment, step = take_part(s, run.facts, run.model, run.optimizers, run.augment, run.generator)
    while run.state["epoch"] < s["epochs"]:
        start, planned = time.time(), train.plan(run)
        broadcast([(rate, y[rows]) for rate, rows in planned])
        parts = train_epoch(segment, step, planned, run.train)
        layers = [layer for each in parts for layer in each["layers"]]
        for l, (weights, state) in enumerate(layers):
            run.model.layers[l].load_state_dict(weights)
            run.optimizers[l].load_state_dict(state)
        write_trace(run.folder, [row for each in parts for row in each["trace"]])
        total, n = torch.cat([each["total"] for each in parts]), sum(len(r) for _, r in planned)
        train.end_epoch(run, total / n, train.validate(run), start)


def assist():
    """What a later process does: train its layers, epoch by epoch, as the first one says."""
    connect()
    told = broadcast()
    if told is not None:                                        # else nothing is left of stage 1
        s, facts, device, weights, states = told
        model = train.make_model(s, facts).to(device)
        model.load_state_dict(weights)
        segment, step = take_part(s, facts, model, train.make_optimizers(model, s), None)
        for optimizer, state in zip(segment.optimizers, states[segment.place]):
            optimizer.load_state_dict(state)
        del told, weights, states
        while (planned := broadcast()) is not None:
            train_epoch(segment, step, planned)


def write_trace(folder, trace):
    """Write `Segment.trace` of all processes to trace.csv, counted from the first event."""
    first = min(start for *_, start, _ in trace)
    lines = ["process,batch,event,waited_for,start,end\n"]
    for *what, start, end in trace:
        lines.append(",".join(map(str, what)) + f",{start - first:.6f},{end - first:.6f}\n")
    train.write(folder / "trace.csv", "".join(lines))


# ----------------------------------------------------------------------------- who waited (Fig. 8)

def read_trace(folder):
    """trace.csv of a run, a dict a row, waited_for None if nothing; OSError if it is not there."""
    path = Path(folder) / "trace.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: no pipeline has trained this run")
    with open(path, newline="") as file:
        return [{"process": int(row["process"]), "batch": int(row["batch"]), "event": row["event"],
                 "waited_for": int(row["waited_for"]) if row["waited_for"] else None,
                 "start": float(row["start"]), "end": float(row["end"])}
                for row in csv.DictReader(file)]


def longest_chain(trace):
    """The most steps that waited for each other: n + N - 1 for N batches on n processes (Sec. 5.1).

    A process's step on a batch comes after its step before; after the step that it received its
    input from; and, if it waited until an older message had left, after the step that the receiver
    had made before that message's own, at the latest.
    """
    after = {(row["process"], row["batch"]): [(row["process"], row["batch"] - 1)]
             for row in trace if row["event"] == "step"}
    for row in trace:
        step = row["process"], row["batch"]
        if row["event"] == "receive":
            after[step].append((row["process"] - 1, row["waited_for"]))
        if row["event"] == "send" and row["waited_for"] is not None:
            after[step].append((row["process"] + 1, row["waited_for"] - 1))
    length = {}
    for step in sorted(after, key=lambda step: (step[1], step[0])):     # by batch, then by process
        length[step] = 1 + max(length.get(earlier, 0) for earlier in after[step])
    return max(length.values())


def show_schedule(folder, batches=8):
    """Print what each process did in the last epoch that a pipeline trained; draw its first
    batches, schedule.png in the folder. Raises OSError if there was no pipeline."""
    trace = read_trace(folder)
    n, N = (1 + max(row[what] for row in trace) for what in ("process", "batch"))
    total = max(row["end"] for row in trace)
    print(f"{folder}: {N} batches on {n} processes: the longest chain of dependent steps has "
          f"{longest_chain(trace)}; one process alone makes {n * N}")
    heading = "Process, worked, waited for its input, waited to send, idle before and after"
    rows = [heading.split(", ")]
    for process in range(n):
        spent = {"step": 0, "receive": 0, "send": 0}
        for row in (row for row in trace if row["process"] == process):
            spent[row["event"]] += row["end"] - row["start"]
        step, receive, send = spent.values()
        shares = (step - receive - send, receive, send, total - step)
        rows.append([process + 1, *(f"{seconds / total:.1%}" for seconds in shares)])
    print_table(rows)
    try:
        draw_schedule(trace, n, min(batches, N), Path(folder) / "schedule.png")
    except ImportError as reason:                               # the numbers stand without it
        print(reason)


def draw_schedule(trace, n, batches, path):
    """Fig. 8: a line a process, a bar a step on the first `batches`, hatched where it waits."""
    figure, axis = pyplot().subplots(figsize=(9, 1.5 + 0.5 * n), layout="constrained")
    colours, received = list(COLOURS.values())[:6], {}          # when a step's last message came
    for row in (row for row in trace if row["batch"] < batches):
        process, start, end = row["process"], row["start"], row["end"]
        bar = dict(y=process, left=start, width=end - start, height=0.8)
        if row["event"] == "step":                              # noted after the waits within it
            axis.barh(**bar, color=colours[row["batch"] % 6], edgecolor="white")
            axis.text((received.get(process, start) + end) / 2, process, row["batch"] + 1,
                      ha="center", va="center", zorder=3)
        else:
            axis.barh(**bar, color="white", edgecolor="grey", hatch="////", lw=0, zorder=2)
        if row["event"] == "receive":
            received[process] = end
    axis.set(xlabel="seconds", yticks=range(n), yticklabels=[f"process {i + 1}" for i in range(n)],
             title=f"{path.parent.name}: steps on batches 1 to {batches} (hatched: waiting)")
    axis.invert_yaxis()
    save(figure, path)


# ----------------------------------------------------------------------------------- command line

def start_run(argv):
    """The `train.Run` of a command line; ValueError, in one line, for what cannot be piped."""
    if not dist.is_torchelastic_launched():             # a cluster may set WORLD_SIZE as well
        raise ValueError("start it by torchrun --nproc-per-node 2 experiments/pipeline.py, with "
                         "the flags of train.py; or say --schedule runs/NAME")
    s, resume = train.parse(argv)
    n, here = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    gpus = torch.cuda.device_count() if s["device"] != "cpu" else 0
    if s["algo"] in CANNOT:
        raise ValueError(f"--algo {s['algo']} cannot be piped: {CANNOT[s['algo']]}")
    if 0 < gpus < here:
        raise ValueError(f"{here} processes for {gpus} GPUs: start fewer, or use --device cpu")
    run = train.Run(s)
    share(len(run.model.layers), n, rank=0)                     # raises what it would raise later
    run.lock = run.held()                                       # as long as this process lives
    run.load() if resume else run.start()
    return run


def lead(run):
    """What the first process does: `train.train`, with stage 1 by all."""
    print("{algo} with {model} on {dataset}, seed {seed}, in {out}".format(**run.settings)
          + f", by {os.environ['WORLD_SIZE']} processes")
    connect()
    if run.state["stage"] == 1:
        train_encoder(run)
    broadcast(None)                                             # the others end
    train.train(run)                                            # what is left: stage 2, the test


def main():
    argv = sys.argv[1:]
    later = dist.is_torchelastic_launched() and int(os.environ.get("RANK", 0)) > 0
    if {"-h", "--help"} & set(argv):
        print(__doc__, flush=True)
        return train.parse(["--help"])
    run = None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if later else stop)
    try:
        if len(argv) > 1 and argv[0] == "--schedule":
            return [show_schedule(folder) for folder in argv[1:]]
        if not later:
            run = start_run(argv)
        assist() if later else lead(run)
    except (KeyboardInterrupt, OSError, ValueError, RuntimeError) as reason:
        said = (str(reason) or "stopped").splitlines()[0]
        if run:
            said += f"; go on with: {run.go_on}"
        elif not later:                                         # data, model or device at fault
            said = f"pipeline.py: error: {said}"
        print(said, file=sys.stderr)
        leave(1 if run or later else 2)
    except SystemExit as reason:                                # a loss that is not a number
        if not dist.is_initialized():
            raise
        print(reason, file=sys.stderr)
        leave(1)
    leave()


if __name__ == "__main__":
    main()
