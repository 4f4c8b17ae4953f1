"""Contrastive Forward-Forward and the methods it is compared with: Algorithm 1 and Fig. 1.

    x, y        one batch: images (B, C, height, width) and labels (B,)
    x1, x2      the inputs of layer l. CFF: two views of x. FF: one view of x, with its true labels
                and with wrong labels. Layer 1 gets patches (B, T, D/#P), each later layer gets the
                detached outputs (B, T, E) of the layer before it. T is the number of tokens
    f1, f2      the outputs of layer l for x1 and x2, (B, T, E); CFF pools and joins them: f (2B, E)

The comments on the right quote Algorithm 1 in its order, with Eq. 13 inserted. Each function takes
one batch. A step trains on it and returns the losses without their graph. Models come from vit.py.
`optimizers` has one optimizer per layer, so an update cannot change another layer.
`augment(images)` returns one augmented view, and draws new random numbers at each call.

    >>> optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.004) for layer in model.layers]
    >>> m = margins(0.4, 0.1, len(model.layers))
    >>> losses = cff_step(model, optimizers, x, y, augment, m, temperature=0.15)
"""
import torch
from torch.nn.functional import cross_entropy, normalize

from losses import contrastive_loss, ff_loss, goodness, marginal_contrastive_loss


# ---------------------------------- Contrastive Forward-Forward (Algorithm 1, left; Figs. 1d and 3)

def cff_step(model, optimizers, x, y, augment, margins, temperature, views=2):
    """Train every layer on one batch by Algorithm 1, left; returns the losses of the layers (L,).

    margins has one float per layer: 0 for CFF (Eq. 3), from `losses.margins` for CFF+M (Eq. 15).
    views is 2, or 1 for one-forward (Table 6). Raises ValueError as the loss does.
    """
    if views == 1:
        return one_forward_step(model, optimizers, x, y, augment, margins, temperature)
    losses = []
    x1, x2 = augment(x), augment(x)                     # x1, x2 = augment(x), augment(x)
    x1 = model.patches(x1)                              # x1 = patching(x1)     # (B, #P, D/#P)
    x2 = model.patches(x2)                              # x2 = patching(x2)     # (B, #P, D/#P)
    y = torch.cat([y, y])
    for l, layer in enumerate(model.layers):            # for l in range(L):
        f1 = layer(x1)                                  # f1 = layers[l].forward(x1)  # (B, #P, E)
        f2 = layer(x2)                                  # f2 = layers[l].forward(x2)  # (B, #P, E)
        f = torch.cat([model.pool(f1), model.pool(f2)])     # f = cat(f1, f2), after Eq. 13: (2B, E)
        loss = marginal_contrastive_loss(normalize(f), y,   # loss = ContrastiveLoss(f/norm2(f), y)
                                         margins[l], temperature)
        optimizers[l].zero_grad()
        loss.backward()                                 # loss.backward()
        optimizers[l].step()                            # optimizers[l].step()
        x1 = f1.detach()                                # x1 = f1.detach()
        x2 = f2.detach()                                # x2 = f2.detach()
        losses.append(loss.detach())
    return torch.stack(losses)


def one_forward_step(model, optimizers, x, y, augment, margins, temperature):
    """`cff_step` with one view: only x1 and f1 (one-forward, Table 6)."""
    losses = []
    x1 = model.patches(augment(x))
    for l, layer in enumerate(model.layers):
        f1 = layer(x1)
        loss = marginal_contrastive_loss(normalize(model.pool(f1)), y, margins[l], temperature)
        losses.append(update(optimizers[l], loss))
        x1 = f1.detach()
    return torch.stack(losses)


@torch.no_grad()
def cff_losses(model, x, y, augment, margins, temperature, views=2):
    """The losses (L,) that `cff_step` would return for one batch, without training."""
    outputs = [encode(model, augment(x)) for _ in range(views)]             # [view][layer]: (B, E)
    losses, y = [], y.repeat(views)
    for l, m in enumerate(margins):
        f = torch.cat([of_view[l] for of_view in outputs])                  # (views * B, E)
        losses.append(marginal_contrastive_loss(normalize(f), y, m, temperature))
    return torch.stack(losses)


def update(optimizer, loss):
    """Backpropagate a loss and update the weights; returns the loss without its graph."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# ---------------------------------- Forward-Forward, SymBa, FF Collab (Algorithm 1, right; Fig. 1b)

def ff_step(model, optimizers, x, y, augment, loss, generator=None, collab=False):
    """Train every layer on one batch by Algorithm 1, right; returns the losses of the layers (L,).

    loss is a function of g_pos (B,) and g_neg (B,), `losses.ff_loss` for FF and `losses.symba_loss`
    for SymBa. A CPU generator draws the wrong labels. collab=True is FF Collab.
    """
    losses = []
    x = augment(x)                                      # x, y_wrong = augment(x), wrong(y)
    y_wrong = wrong_labels(y, model.num_classes, generator)
    x1 = model.patches(x, y)                            # x = patching(x)
    x2 = model.patches(x, y_wrong)                      # x1, x2 = cat_label_patch(x, y, y_wrong)
    gamma1 = gamma2 = [0] * len(model.layers)           # FF Collab: goodness of the other layers
    if collab:                                          # before this batch's updates
        gamma1 = gammas(layer_goodness(model, x, y))
        gamma2 = gammas(layer_goodness(model, x, y_wrong))
    for l, layer in enumerate(model.layers):            # for l in range(L):
        f1 = layer(x1)                                  # f1 = layers[l].forward(x1) # (B, #P+1, E)
        f2 = layer(x2)                                  # f2 = layers[l].forward(x2) # (B, #P+1, E)
        loss_l = loss(                                  # loss = FFLoss(
            goodness(model.pool(f1)) + gamma1[l],       #     f1.mean(dim=1),
            goodness(model.pool(f2)) + gamma2[l])       #     f2.mean(dim=1))
        optimizers[l].zero_grad()
        loss_l.backward()                               # loss.backward()
        optimizers[l].step()                            # optimizers[l].step()
        x1 = unit(f1).detach()                          # x1 = (f1/norm2(f1)).detach()
        x2 = unit(f2).detach()                          # x2 = (f2/norm2(f2)).detach()
        losses.append(loss_l.detach())
    return torch.stack(losses)


def collab_step(model, optimizers, x, y, augment, threshold=2.0, generator=None):
    """FF Collab on one batch: the logit of layer l is G_l + gamma_l - theta; losses (L,)."""
    def loss(g_pos, g_neg):
        return ff_loss(g_pos, g_neg, threshold)
    return ff_step(model, optimizers, x, y, augment, loss, generator, collab=True)


@torch.no_grad()
def ff_losses(model, x, y, augment, loss, generator=None, collab=False):
    """The losses (L,) that `ff_step` would return for one batch, without training."""
    x = augment(x)
    y_wrong = wrong_labels(y, model.num_classes, generator)
    G_pos = layer_goodness(model, x, y)                                     # (L, B)
    G_neg = layer_goodness(model, x, y_wrong)
    if collab:
        G_pos, G_neg = G_pos + gammas(G_pos), G_neg + gammas(G_neg)
    return torch.stack([loss(g_pos, g_neg) for g_pos, g_neg in zip(G_pos, G_neg)])


def wrong_labels(y, num_classes, generator=None):
    """A random wrong label for each label of y, (B,) -> (B,); all other classes are equally likely.
    A CPU generator draws them: the same seed gives the same labels."""
    shift = torch.randint(1, num_classes, y.shape, generator=generator)
    return (y + shift.to(y.device, non_blocking=y.is_cuda)) % num_classes


def unit(h):
    """Divide each image's output, (B, T, E) or (B, E), by its norm over all tokens."""
    return normalize(h.flatten(1)).view_as(h)


def gammas(G):
    """FF Collab's gamma: the goodness of all other layers, detached. G (L, B) -> (L, B)."""
    return (G.sum(dim=0) - G).detach()                  # gamma_l = sum_{k != l} G_k


@torch.no_grad()
def layer_goodness(model, images, y):
    """The goodness (L, B) in each layer of images (B, C, height, width) with labels y (B,)."""
    return torch.stack([goodness(f) for f in encode(model, images, y)])


# ----------------------------------------------- through the whole network (Figs. 1a, 1c; Sec. 3.3)

def encode(model, images, y=None):
    """The pooled output of each layer: images (B, C, height, width) -> a list of L tensors (B, E).
    Nothing is detached. y (B,) is for a model with labels; the default is the neutral label."""
    if y is None and model.labels is not None:
        y = torch.full((len(images),), -1, device=images.device)
    h, pooled = model.patches(images, y), []
    for layer in model.layers:
        h = layer(h)
        pooled.append(model.pool(h))
        if y is not None:
            h = unit(h)                                 # FF normalises between layers
    return pooled


def bp_step(model, optimizer, x, y, augment):
    """Train encoder and head together on one batch (BP+CE, Fig. 1a); returns the loss."""
    return update(optimizer, bp_loss(model, x, y, augment))


def bp_loss(model, x, y, augment):
    """Cross-entropy of the head's scores on one batch -> scalar."""
    f = encode(model, augment(x))[-1]
    return cross_entropy(model.head(f), y)


def scl_step(model, optimizer, x, y, augment, temperature, views=2):
    """Train all layers by one loss, Eq. 3 after the last layer (SCL, Fig. 1c); returns the loss."""
    return update(optimizer, scl_loss(model, x, y, augment, temperature, views))


def scl_loss(model, x, y, augment, temperature, views=2):
    """Eq. 3 for the last layer's output on one batch -> scalar."""
    f = encode(model, torch.cat([augment(x) for _ in range(views)]))[-1]
    return contrastive_loss(normalize(f), y.repeat(views), temperature)


def head_step(model, optimizer, x, y, augment):
    """Stage 2: train the head on one batch; the encoder is frozen. Returns the loss."""
    return update(optimizer, head_loss(model, x, y, augment))


def head_loss(model, x, y, augment):
    """Cross-entropy of the head's scores on one batch -> scalar. The encoder gets no gradient."""
    with torch.no_grad():
        f = features(model, augment(x))
    return cross_entropy(model.head(f), y)


def features(model, images):
    """The head's input: (B, E), or with labels the outputs of layers 2 to L, (B, (L - 1) E)."""
    pooled = encode(model, images)
    if model.labels is None:
        return pooled[-1]
    return torch.cat(pooled[1:] or pooled, dim=1)       # if L = 1, layer 1


# ------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict(model, images, algo, head=False):
    """Scores (B, classes) of images (B, C, height, width); the class with the largest one wins.

    "cff", "cffm", "scl" and "bp" use the head, in one forward pass. "ff", "symba" and "collab" sum
    the layers' goodness, in one pass per class; with head=True they use the head, in one pass
    (Table 2). Raises ValueError for an unknown algo or an unsuitable model.
    """
    if algo not in ("cff", "cffm", "ff", "symba", "collab", "scl", "bp"):
        raise ValueError(f"algo must be cff, cffm, ff, symba, collab, scl or bp; got {algo!r}")
    by_goodness = algo in ("ff", "symba", "collab")
    if by_goodness != (model.labels is not None):
        kind = "with" if by_goodness else "without"
        raise ValueError(f"{algo} needs a model built {kind} labels")
    if head or not by_goodness:
        return model.head(features(model, images))
    scores = []
    for c in range(model.num_classes):
        y = torch.full((len(images),), c, device=images.device)
        scores.append(layer_goodness(model, images, y).sum(dim=0))
    return torch.stack(scores, dim=1)
