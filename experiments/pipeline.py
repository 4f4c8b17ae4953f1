"""Train layers in parallel, by several processes: the pipeline of Section 5.1 and Fig. 8.

    torchrun --nproc-per-node 2 experiments/pipeline.py --dataset cifar10 --algo cffm
    torchrun --nproc-per-node 4 experiments/pipeline.py --resume --out runs/NAME
    python experiments/pipeline.py --schedule runs/NAME     who worked and who waited (Fig. 8)

No gradient crosses from one layer to another, so layers can train at the same time. All flags of
train.py work here, and the run's folder is the same. See *The pipeline of layers* in README.md.
"""
import io
import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from subprocess import list2cmdline
from types import SimpleNamespace

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from cff import unit


# ---------------------------------------------------------------------------- a process's layers

class Segment:
    """The layers that this process trains; cff_step and ff_step use it as the model.

    Only the first process has images. A later process receives the output of the layer before its
    own. Each process sends its last layer's output on before it computes that layer's loss; nothing
    comes back. While process r works on batch t, process r - 1 works on batch t + 1, so N batches
    take n + N - 1 steps on n processes. Before a process sends a batch, it waits until the batch
    before has left, so at most two batches wait for the next process. `trace`: the epoch's events.
    """

    def __init__(self, model, image_shape, views):
        self.rank, n, L = dist.get_rank(), dist.get_world_size(), len(model.layers)
        self.is_last = self.rank == n - 1
        self.own = slice(L * self.rank // n, L * (self.rank + 1) // n)  # of the model's layers
        self.layers, self.pool, self.labels = model.layers[self.own], model.pool, model.labels
        self.cut_patches, self.num_classes = model.patches, model.num_classes
        self.device = next(model.parameters()).device
        image = torch.zeros(1, *image_shape, device=self.device)
        y = None if model.labels is None else torch.zeros(1, dtype=torch.long, device=self.device)
        with torch.no_grad():                                   # the shape of one image's message
            self.shape = model.layers[0](model.patches(image, y)).shape[1:]     # (T, E) or (E,)
        self.messages = views if model.labels is None else 2    # per batch, one per forward pass
        if self.rank > 0:
            model.layers = self.layers                          # frees the other layers

    def epoch(self, sizes):
        """Yield each batch's number; the caller then makes a step on it. sizes: images in each."""
        self.batch, self.trace = 0, []
        self.coming, self.going = [], []                        # messages that are on their way
        self.expected = (size for size in sizes for _ in range(self.messages))  # one per message
        for _ in range(self.messages):
            self.expect()
        hook = None if self.is_last else self.layers[-1].register_forward_hook(self.send)
        while self.batch < len(sizes):
            start = time.time()
            yield self.batch
            self.note("step", None, start)
            self.batch += 1
        for request, _, _ in self.going:
            request.wait()
        if hook:
            hook.remove()

    def expect(self):
        """Start to receive the next message, if any is left; computation goes on meanwhile."""
        size = next(self.expected, None)
        if self.rank > 0 and size:
            h = torch.empty(size, *self.shape, device=self.device)
            self.coming.append((dist.irecv(h, self.rank - 1), h))

    def patches(self, images, y=None):
        """The input of this process's layers: patches in the first process, elsewhere a message."""
        if self.rank == 0:
            return self.cut_patches(images, y)
        start, (request, h) = time.time(), self.coming.pop(0)
        request.wait()
        self.note("receive", self.batch, start)
        self.expect()
        return h if self.labels is None else unit(h)            # FF normalises between layers

    def send(self, layer, x, h):
        """Send h, the last layer's output; first wait until the batch before has left."""
        start, waited_for = time.time(), None
        if len(self.going) == self.messages:
            request, _, waited_for = self.going.pop(0)
            request.wait()
        self.note("send", waited_for, start)
        h = h.detach().contiguous()                             # kept until it has left
        self.going.append((dist.isend(h, self.rank + 1), h, self.batch))

    def note(self, event, waited_for, start):
        """Add an event to the trace; waited_for: the batch of the message that it waited for."""
        self.trace.append({"process": self.rank, "batch": self.batch, "event": event,
                           "waited_for": waited_for, "start": start, "end": time.time()})


def own_part(run):
    """A copy of a run with only this process's layers (a `Segment`), optimizers and margins."""
    part = SimpleNamespace(**vars(run))
    part.model = Segment(run.model, run.data["image_shape"], run.settings.views)
    part.optimizers = run.optimizers[part.model.own]
    part.margins = run.margins[part.model.own]
    return part


# -------------------------------------------------------------------------- between the processes

def connect():
    """Connect the processes that torchrun started. If there are GPUs, each process uses one."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # the others wait while the first process validates; if a process dies, torchrun ends the run
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=1))


def stop(*_):
    """Handle Ctrl-C in the first process, once only, because torchrun sends further signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def unpack(data):
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def broadcast(value=None):
    """The first process's value, in every process, with its tensors on the CPU."""
    box = [train.pack(value)]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return unpack(box[0])


def gather(value):
    """In the first process, the list of all processes' values (tensors on the CPU); else None."""
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(train.pack(value), values)
    return values and [unpack(data) for data in values]


# --------------------------------------------------------------------------------------- training

def train_epoch(part, batches):
    """Train this process's layers for one epoch; batches: lists of row numbers. Returns one dict
    per process (losses, weights, optimizer states, trace) in the first process, None in others."""
    segment, (images, labels), total = part.model, part.train, 0
    for i in segment.epoch([len(rows) for rows in batches]):
        train.set_learning_rate(part, i)
        rows = batches[i].to(labels.device)
        total += len(rows) * train.train_on(part, images[rows], labels[rows])
    layers = [(layer.state_dict(), optimizer.state_dict())
              for layer, optimizer in zip(segment.layers, part.optimizers)]
    return gather({"total": total, "layers": layers, "trace": segment.trace})


def train_encoder(run):
    """The first process's part of stage 1, from the run's next epoch on; the others `assist`."""
    shared = {name: getattr(run, name) for name in ("settings", "data", "margins", "goodness_loss")}
    states = [optimizer.state_dict() for optimizer in run.optimizers]
    broadcast((shared, run.train[1], run.model.state_dict(), states))
    part = own_part(run)
    if run.epoch < run.settings.epochs:
        train.print_heading(run)
    while run.epoch < run.settings.epochs:
        start, batches = time.time(), train.batches_of(run, run.train[1], True)
        part.epoch, _ = broadcast((run.epoch, batches))
        parts = train_epoch(part, batches)
        layers = [layer for each in parts for layer in each["layers"]]
        for l, (weights, state) in enumerate(layers):
            run.model.layers[l].load_state_dict(weights)
            run.optimizers[l].load_state_dict(state)
        trace = [row for each in parts for row in each["trace"]]
        train.write(run.folder / "trace.json", json.dumps(trace, indent=1).encode())
        total = torch.cat([each["total"] for each in parts])                    # (L,)
        n = sum(len(rows) for rows in batches)
        train.end_epoch(run, total / n, train.validate(run), start)


def assist():
    """The work of a later process: train its layers, in each epoch that the first announces."""
    connect()
    received = broadcast()
    if received is None:                                        # stage 1 is complete
        return
    shared, labels, weights, states = received
    run = SimpleNamespace(**shared, generator=None, augment=lambda y: y)
    device = train.find_device(run.settings.device)
    run.train = labels.to(device), labels.to(device)            # no images: labels replace them
    run.model = train.make_model(run.settings, run.data).to(device)
    run.model.load_state_dict(weights)
    train.begin_stage(run, 1)
    part = own_part(run)
    for optimizer, state in zip(part.optimizers, states[part.model.own]):
        optimizer.load_state_dict(state)
    del received, weights, states, run                          # they belong to all layers
    while (planned := broadcast()) is not None:
        part.epoch, batches = planned
        train_epoch(part, batches)


# --------------------------------------------------------------------------- the schedule (Fig. 8)

def longest_chain(trace):
    """The length of the longest chain of steps in which each depends on the one before: n + N - 1
    for N batches on n processes (Sec. 5.1).

    A process's step on a batch depends on its step on the batch before, and on the step that sent
    its input. If the process had to wait until its message of an older batch b had left, its step
    also depends on the next process's step on batch b - 1, which began to receive that message.
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
    """Print the longest chain of steps in the last epoch of a pipeline; draw its first batches."""
    path = Path(folder) / "trace.json"
    if not path.exists():
        raise SystemExit(f"{path} is missing: pipeline.py has not trained this run")
    trace = json.loads(path.read_text())
    n, N = 1 + max(row["process"] for row in trace), 1 + max(row["batch"] for row in trace)
    print(f"{folder}: {N} batches on {n} processes: the longest chain of dependent steps has "
          f"{longest_chain(trace)} steps; one process would make {n * N}")
    try:
        draw_schedule(trace, n, min(batches, N), path.with_name("schedule.png"))
    except ImportError as reason:                               # the chain is printed anyway
        print(f"no picture: {reason}; pip install matplotlib")


def draw_schedule(trace, n, batches, path):
    """Draw Fig. 8: one row per process, one bar per step on the first batches; hatched: waiting."""
    from figures import COLOURS, make_figure, write_figure      # needs matplotlib
    figure, axis = make_figure(size=(9, 1.5 + 0.5 * n))
    colours, first = list(COLOURS.values())[:6], min(row["start"] for row in trace)
    for row in (row for row in trace if row["batch"] < batches):
        process, start, end = row["process"], row["start"] - first, row["end"] - first
        bar = dict(y=process, left=start, width=end - start, height=0.8)
        if row["event"] == "step":
            axis.barh(**bar, color=colours[row["batch"] % 6], edgecolor="white")
            axis.text(end, process, f"{row['batch'] + 1} ", ha="right", va="center")
        else:                                                   # drawn over its step's bar
            axis.barh(**bar, color="white", edgecolor="grey", hatch="////", lw=0, zorder=2)
    axis.set(xlabel="seconds", yticks=range(n), yticklabels=[f"process {i + 1}" for i in range(n)],
             title=f"{path.parent.name}: steps on batches 1 to {batches} (hatched: waiting)")
    axis.invert_yaxis()
    write_figure(figure, path)


def start_run(argv):
    """The run of a command line. Raises ValueError if the pipeline cannot train it."""
    s, saved = train.parse(argv)
    n, here = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if s.algo not in ("cff", "cffm", "ff", "symba"):
        raise ValueError(f"--algo {s.algo} cannot run in the pipeline: its losses depend on "
                         "several layers")
    run = train.make_run(s, saved)
    if n > len(run.model.layers):
        raise ValueError(f"{n} processes for {len(run.model.layers)} layers: start fewer")
    if run.device.type == "mps":
        raise ValueError("the pipeline needs --device cpu or cuda")
    if run.device.type == "cuda" and here > torch.cuda.device_count():
        raise ValueError("each process needs its own GPU: start fewer, or add --device cpu")
    if not saved:
        train.start(run)
    return run


def lead(run):
    """The work of the first process: `train.train`, with stage 1 by all processes."""
    command = list2cmdline(["python", "train.py", "--resume", "--out", str(run.folder)])
    try:
        connect()
        print(f"{run.folder}, by {dist.get_world_size()} processes", flush=True)
        if run.stage == 1:
            train_encoder(run)
        broadcast(None)                                         # tells the others to end
        train.train(run)                                        # stage 2 and the test
    except (KeyboardInterrupt, OSError) as reason:      # Ctrl-C has no message
        raise SystemExit(f"{str(reason) or 'stopped'}; continue with: {command}")


def main():
    argv, status = sys.argv[1:], 1
    if argv[:1] == ["--schedule"] and len(argv) == 2:
        return show_schedule(argv[1])
    if not dist.is_torchelastic_launched() or {"-h", "--help"} & set(argv):
        raise SystemExit(__doc__)
    later = int(os.environ["RANK"]) > 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if later else stop)
    try:
        if later:
            assist()
        else:
            lead(start_run(argv))
        status = 0
    except SystemExit as reason:
        if not dist.is_initialized():
            raise
        print(reason, file=sys.stderr)
    except Exception as reason:
        if isinstance(reason, (OSError, ValueError)) and not dist.is_initialized():
            raise SystemExit(f"pipeline.py: error: {reason}")   # about flags, data or the disk
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)                    # at a normal exit, threads of gloo can hang or abort


if __name__ == "__main__":
    main()
