"""Contrastive Forward-Forward and the methods it is compared with: Algorithm 1, both columns, and Fig. 1; prediction.

    x, y        one batch: images (B, C, H, W) and labels (B,)
    x1, x2      CFF: its two augmented views; FF: one view with the true labels, and with wrong ones (negatives);
                first as patches (B, P, C*p*p), then as a layer's output (B, P, E), detached; P + 1 with a label patch
    f1, f2, f   what layer l makes of them, (B, P, E) each; f both, pooled and joined, (2B, E); D = C*H*W, #P = P

One call is one batch, and returns losses without a graph. Models come from vit.py; `optimizers` holds one optimizer for each
layer, so that no update can reach another layer; `augment` makes of images one augmented view, drawn anew at each call.

    >>> optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.004) for layer in model.layers]
    >>> losses = cff_step(model, optimizers, x, y, augment, margins(0.4, 0.1, len(model.layers)), temperature=0.15)
"""
import time
from collections import deque
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, normalize

from losses import contrastive_loss, ff_loss, goodness, marginal_contrastive_loss


# ------------------------------------------------------------------- Contrastive Forward-Forward (Algorithm 1, left; Fig. 1d)

def cff_step(model, optimizers, x, y, augment, margins, temperature, views=2):
    """Train every layer on one batch by Algorithm 1, left; returns the L losses, a tensor (L,).

    margins: a float for each layer; 0 everywhere is CFF (Eq. 3), `losses.margins` gives those of CFF+M (Eq. 15).
    views=1 is the one-forward variant of Table 6, with x1 and f1 alone.
    Raises ValueError as `marginal_contrastive_loss`.
    """
    losses = []
    xs = [augment(x) for _ in range(views)]                         # x1, x2 = augment(x), augment(x)
    xs = [model.patches(x) for x in xs]                             # x1, x2 = patching(x1), patching(x2)    (B, #P, D/#P) each
    y = y.repeat(views)
    for l, layer in enumerate(model.layers):                        # for l in range(L):
        fs = [layer(x) for x in xs]                                 # f1 = layers[l].forward(x1), f2 = ...(x2)  (B, #P, E) each
        f = torch.cat([model.pool(f) for f in fs])                  # f = cat(f1, f2), Eq. 13                (2B, E)
        loss = marginal_contrastive_loss(normalize(f), y, margins[l], temperature)      # loss = ContrastiveLoss(f / norm2(f), y)
        optimizers[l].zero_grad()
        loss.backward()                                             # loss.backward()
        optimizers[l].step()                                        # optimizers[l].step()
        xs = [f.detach() for f in fs]                               # x1, x2 = f1.detach(), f2.detach()
        losses.append(loss.detach())
    return torch.stack(losses)


# ----------------------------------------------------------- Forward-Forward, SymBa, FF Collab (Algorithm 1, right; Fig. 1b)

def wrong_labels(y, num_classes, generator=None):
    """For each label of y (B,) one of the other classes, all equally likely: (B,), never y itself."""
    return (y + torch.randint(1, num_classes, y.shape, device=y.device, generator=generator)) % num_classes


def unit(h):
    """Each image's output divided by its norm over all tokens: f / norm2(f), (B, P, E) or (B, E)."""
    return normalize(h.flatten(1)).view_as(h)


def gammas(G):
    """FF Collab: for each layer the goodness of all other layers, detached. G (L, B) -> (L, B)."""
    return (G.sum(dim=0) - G).detach()                              # gamma_l = sum_{k != l} G_k


def ff_step(model, optimizers, x, y, augment, loss, generator=None, collab=False):
    """Train every layer on one batch by Algorithm 1, right; returns the L losses, a tensor (L,).

    loss: (g_pos, g_neg), both (B,) -> scalar: `losses.ff_loss` for FF, `losses.symba_loss` for SymBa. generator: of the
    wrong labels. collab=True adds to the goodness of each layer that of all others (FF Collab).
    """
    losses = []
    x, y_wrong = augment(x), wrong_labels(y, len(model.labels) - 1, generator)      # x, y_wrong = augment(x), wrong(y)
    x1 = model.patches(x, y)                                        # x = patching(x)
    x2 = model.patches(x, y_wrong)                                  # x1, x2 = cat_label_patch(x, y, y_wrong)  (B, #P+1, D/#P)
    gamma1 = gamma2 = [0] * len(model.layers)
    if collab:                                                      # the other layers' goodness, before this batch's updates
        gamma1, gamma2 = gammas(layer_goodness(model, x, y)), gammas(layer_goodness(model, x, y_wrong))
    for l, layer in enumerate(model.layers):                        # for l in range(L):
        f1 = layer(x1)                                              # f1 = layers[l].forward(x1)     (B, #P+1, E)
        f2 = layer(x2)                                              # f2 = layers[l].forward(x2)     (B, #P+1, E)
        loss_l = loss(goodness(model.pool(f1)) + gamma1[l],         # loss = FFLoss(f1.mean(dim=1),
                      goodness(model.pool(f2)) + gamma2[l])         #               f2.mean(dim=1))
        optimizers[l].zero_grad()
        loss_l.backward()                                           # loss.backward()
        optimizers[l].step()                                        # optimizers[l].step()
        x1 = unit(f1).detach()                                      # x1 = (f1/norm2(f1)).detach()
        x2 = unit(f2).detach()                                      # x2 = (f2/norm2(f2)).detach()
        losses.append(loss_l.detach())
    return torch.stack(losses)


def collab_step(model, optimizers, x, y, augment, threshold=2.0, generator=None):
    """FF Collab on one batch: layer l's logit is G_l + gamma_l - theta; returns the L losses, a tensor (L,)."""
    loss = lambda g_pos, g_neg: ff_loss(g_pos, g_neg, threshold)
    return ff_step(model, optimizers, x, y, augment, loss, generator, collab=True)


# ------------------------------------------------------------------------------------------------ through the whole network

def encode(model, images, y=None):
    """The pooled output of each layer: images (B, C, H, W), and labels y (B,) if the model takes them -> L tensors (B, E)."""
    h, pooled = model.patches(images, y), []
    for layer in model.layers:
        h = layer(h)                                                # nothing is detached here
        pooled.append(model.pool(h))
        if y is not None:
            h = unit(h)                                             # FF normalises between layers
    return pooled


@torch.no_grad()
def layer_goodness(model, images, y):
    """The goodness of images (B, C, H, W) with labels y (B,) in each layer, (L, B)."""
    return torch.stack([goodness(f) for f in encode(model, images, y)])


def encode_neutral(model, images):
    """`encode` without a class: with the neutral label, zeros, in a model that takes labels."""
    return encode(model, images, None if model.labels is None else torch.full((len(images),), -1, device=images.device))


def features(model, images):
    """What the head reads: the last layer's pooled output, or in a model that takes labels those of all but the first."""
    pooled = encode_neutral(model, images)
    return pooled[-1] if model.labels is None else torch.cat(pooled[1:] or pooled, dim=1)       # (B, E) or (B, (L-1) E)


def head_step(model, optimizer, x, y, augment):
    """Stage 2: train the linear head on one batch, the encoder frozen; returns the cross-entropy, a scalar (Section 3.3)."""
    with torch.no_grad():
        f = features(model, augment(x))                             # no gradient reaches the encoder
    return update(optimizer, cross_entropy(model.head(f), y))


def bp_step(model, optimizer, x, y, augment):
    """Train encoder and head end to end on one batch (BP+CE, Fig. 1a); returns the cross-entropy, a scalar."""
    return update(optimizer, cross_entropy(model.head(encode(model, augment(x))[-1]), y))


def scl_step(model, optimizer, x, y, augment, temperature, views=2):
    """Train the encoder end to end by Eq. 3 after its last layer (SCL, Fig. 1c); returns the loss, a scalar."""
    f = encode(model, torch.cat([augment(x) for _ in range(views)]))[-1]
    return update(optimizer, contrastive_loss(normalize(f), y.repeat(views), temperature))


def update(optimizer, loss):
    """One step of backpropagation; returns the loss without its graph."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# ------------------------------------------------------------------------------------------------------------ prediction

@torch.no_grad()
def predict(model, images, algo, head=False, skip_first=False):
    """Scores (B, classes) of images (B, C, H, W); the largest wins.

    "cff", "cffm", "scl" and "bp": the head's, in one forward pass. "ff", "symba" and "collab": one pass with each class's label,
    the goodness summed over the layers, without the first if skip_first (and there are more); with head=True one pass with
    the neutral label, and the head (Table 2). Raises ValueError for another algo, or a model that was not built for it.
    """
    if algo not in ("cff", "cffm", "ff", "symba", "collab", "scl", "bp"):
        raise ValueError(f"algo must be cff, cffm, ff, symba, collab, scl or bp; got {algo!r}")
    by_goodness = algo in ("ff", "symba", "collab")
    if by_goodness == (model.labels is None):
        raise ValueError(f"{algo} needs a model built {'with' if by_goodness else 'without'} labels")
    if head or not by_goodness:
        return model.head(features(model, images))
    B, C = len(images), len(model.labels) - 1
    y = torch.arange(C, device=images.device).repeat(B)             # 0 ... C-1 for the first image, then for the second, ...
    G = layer_goodness(model, images.repeat_interleave(C, dim=0), y)                    # (L, B*C)
    return (G[1:] if skip_first and len(G) > 1 else G).sum(dim=0).view(B, C)


# --------------------------------------------------------------------------- layer-parallel training (Section 5.1, Fig. 8)

class Segment:
    """The layers that this process trains, of the processes of torch.distributed in a line; stands for the model in
    cff_step, ff_step and encode, which do not know of it.

    The first process has the images. A later one receives, where the model would cut patches, the output of the layer before
    its own. Its last layer's output is sent on at once, before the loss is taken; nothing comes back. So while process r
    works on batch t, process r - 1 works on batch t + 1, and N batches take n + N - 1 steps on n processes. A process sends a
    batch when the one before is on its way into the next process, so that at most two are in between.

    shape: of the message for one image. messages: of a batch, one for each forward pass. trace: rows (process, batch, event,
    batch waited for, start, end), in seconds of time.time(), after each epoch. Raises ValueError for more processes than layers.
    """

    def __init__(self, model, shape, messages):
        self.rank, n, L = dist.get_rank(), dist.get_world_size(), len(model.layers)
        if n > L:
            raise ValueError(f"{n} processes for {L} layers: each needs at least one")
        self.first, self.end = L * self.rank // n, L * (self.rank + 1) // n             # its layers: first ... end - 1
        self.layers, self.pool, self.labels, self.cut = model.layers[self.first:self.end], model.pool, model.labels, model.patches
        self.shape, self.messages, self.is_last = shape, messages, self.end == L
        if self.rank > 0:
            model.layers = self.layers                              # the others are dropped

    @contextmanager
    def epoch(self, sizes):
        """Within it messages flow; sizes: the number of images of each batch of the epoch."""
        self.batch, self.trace, self.coming, self.going = 0, [], deque(), deque()
        self.expected = (size for size in sizes for _ in range(self.messages))
        for _ in range(self.messages):
            self.expect()
        hook = None if self.is_last else self.layers[-1].register_forward_hook(self.send)
        try:
            yield
            for request, _, _ in self.going:
                request.wait()
        finally:
            if hook:
                hook.remove()

    def expect(self):
        """Start to receive the next message, if there is one, while something else is computed."""
        size = next(self.expected, None)
        if self.rank > 0 and size:
            h = torch.empty(size, *self.shape, device=next(self.layers.parameters()).device)
            self.coming.append((dist.irecv(h, self.rank - 1), h))

    def patches(self, images, y=None):
        """The input of this process's first layer: patches (with labels y) in the first process, in a later one a message."""
        if self.rank == 0:
            return self.cut(images, y)
        start, (request, h) = time.time(), self.coming.popleft()
        request.wait()
        self.note("receive", self.batch, start)
        self.expect()
        return h if self.labels is None else unit(h)                # FF normalises between layers

    def send(self, layer, x, h):
        """Send h, the output of this process's last layer, on; wait first if the batch before has not left."""
        start, waited_for = time.time(), ""
        if len(self.going) == self.messages:
            request, _, waited_for = self.going.popleft()
            request.wait()
        self.note("send", waited_for, start)
        h = h.detach().contiguous()
        self.going.append((dist.isend(h, self.rank + 1), h, self.batch))                # h must live until it is sent

    def steps(self, updates):
        """Yield each update of an epoch, noting when the step on it is done."""
        for update in updates:
            start = time.time()
            yield update
            self.note("step", "", start)
            self.batch += 1

    def note(self, event, waited_for, start):
        self.trace.append((self.rank, self.batch, event, waited_for, start, time.time()))
