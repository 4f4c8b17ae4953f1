"""Contrastive Forward-Forward and the methods it is compared with: Algorithm 1 and Fig. 1.

    x, y        one batch: images (B, C, height, width) and labels (B,)
    x1, x2      CFF: its two views; FF: one view with the true and with wrong labels. First they
                are patches (B, T, D/#P), then the outputs of the layer before, (B, T, E), detached
    f1, f2, f   the outputs of layer l for x1 and x2; f is both, pooled and joined, (2B, E)

Right-hand comments quote Algorithm 1 in its order, with Eq. 13 inserted. T is #P, or #P + 1 with a
label patch. Each function takes one batch; a step trains on it and returns losses without a graph.
Models come from vit.py. `optimizers` has one optimizer per layer, so no update can reach another
layer. `augment(images)` returns one augmented view, with new random draws at each call.

    >>> optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.004) for layer in model.layers]
    >>> m = margins(0.4, 0.1, len(model.layers))
    >>> losses = cff_step(model, optimizers, x, y, augment, m, temperature=0.15)
"""
import torch
from torch.nn.functional import cross_entropy, normalize

from losses import contrastive_loss, ff_loss, goodness, marginal_contrastive_loss


# ---------------------------------- Contrastive Forward-Forward (Algorithm 1, left; Figs. 1d and 3)

def cff_step(model, optimizers, x, y, augment, margins, temperature, views=2):
    """Train every layer on one batch by Algorithm 1, left; returns the losses, (L,).

    margins: one float per layer; all 0 is CFF (Eq. 3), `losses.margins` returns those of CFF+M
    (Eq. 15). views: 2, or 1 for one-forward, Table 6. Raises ValueError as the loss does.
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
    """`cff_step` with one view, x1 and f1 (one-forward, Table 6)."""
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
    """The losses that `cff_step` would return for one batch, without training: (L,)."""
    by_view = [encode(model, augment(x)) for _ in range(views)]
    losses = []
    for l, m in enumerate(margins):
        f = torch.cat([pooled[l] for pooled in by_view])                    # (views * B, E)
        losses.append(marginal_contrastive_loss(normalize(f), y.repeat(views), m, temperature))
    return torch.stack(losses)


def update(optimizer, loss):
    """Backpropagate this loss and update; returns it without its graph."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# ---------------------------------- Forward-Forward, SymBa, FF Collab (Algorithm 1, right; Fig. 1b)

def ff_step(model, optimizers, x, y, augment, loss, generator=None, collab=False):
    """Train every layer on one batch by Algorithm 1, right; returns the losses, (L,).

    loss: (g_pos, g_neg), both (B,) -> scalar: `losses.ff_loss` for FF, `losses.symba_loss` for
    SymBa. generator: a CPU generator that draws the wrong labels. collab=True is FF Collab.
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
    """FF Collab on one batch: layer l's logit is G_l + gamma_l - theta; returns the L losses."""
    def loss(g_pos, g_neg):
        return ff_loss(g_pos, g_neg, threshold)
    return ff_step(model, optimizers, x, y, augment, loss, generator, collab=True)


@torch.no_grad()
def ff_losses(model, x, y, augment, loss, generator=None, collab=False):
    """The losses that `ff_step` would return for one batch, without training: (L,)."""
    x = augment(x)
    y_wrong = wrong_labels(y, model.num_classes, generator)
    G_pos, G_neg = layer_goodness(model, x, y), layer_goodness(model, x, y_wrong)       # (L, B)
    if collab:
        G_pos, G_neg = G_pos + gammas(G_pos), G_neg + gammas(G_neg)
    return torch.stack([loss(g_pos, g_neg) for g_pos, g_neg in zip(G_pos, G_neg)])


def wrong_labels(y, num_classes, generator=None):
    """For each label of y (B,) one of the other classes, all equally likely: (B,), never y.

    generator: a CPU generator; the same seed gives the same labels.
    """
    shift = torch.randint(1, num_classes, y.shape, generator=generator)
    return (y + shift.to(y.device, non_blocking=True)) % num_classes


def unit(h):
    """Divide each image's output by its norm over all tokens: (B, T, E) or (B, E), same shape."""
    return normalize(h.flatten(1)).view_as(h)


def gammas(G):
    """FF Collab: for each layer the goodness of all other layers, detached. G (L, B) -> (L, B)."""
    return (G.sum(dim=0) - G).detach()                  # gamma_l = sum_{k != l} G_k


@torch.no_grad()
def layer_goodness(model, images, y):
    """The goodness of images (B, C, height, width) with labels y (B,) in each layer, (L, B)."""
    return torch.stack([goodness(f) for f in encode(model, images, y)])


# ----------------------------------------------- through the whole network (Figs. 1a, 1c; Sec. 3.3)

def encode(model, images, y=None):
    """Each layer's pooled output: images (B, C, height, width), labels y (B,) -> L tensors (B, E).

    Nothing is detached. Without y the model gets images alone, or the neutral label if it takes
    labels (Table 2).
    """
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
    """Train encoder and head end to end on one batch (BP+CE, Fig. 1a); returns the loss."""
    return update(optimizer, bp_loss(model, x, y, augment))


def bp_loss(model, x, y, augment):
    """Cross-entropy of the head's scores on one batch -> scalar."""
    f = encode(model, augment(x))[-1]
    return cross_entropy(model.head(f), y)


def scl_step(model, optimizer, x, y, augment, temperature, views=2):
    """Train the encoder by Eq. 3 after its last layer alone (SCL, Fig. 1c); returns the loss."""
    return update(optimizer, scl_loss(model, x, y, augment, temperature, views))


def scl_loss(model, x, y, augment, temperature, views=2):
    """Eq. 3 of the last layer's output on one batch -> scalar."""
    f = encode(model, torch.cat([augment(x) for _ in range(views)]))[-1]
    return contrastive_loss(normalize(f), y.repeat(views), temperature)


def head_step(model, optimizer, x, y, augment):
    """Stage 2: train the linear head on one batch, the encoder frozen; returns the loss."""
    return update(optimizer, head_loss(model, x, y, augment))


def head_loss(model, x, y, augment):
    """Cross-entropy of the head's scores on one batch, the encoder frozen -> scalar."""
    with torch.no_grad():
        f = features(model, augment(x))
    return cross_entropy(model.head(f), y)


def features(model, images):
    """What the head reads: (B, E), or with labels (B, (L - 1) E), all layers but the first."""
    pooled = encode(model, images)
    return pooled[-1] if model.labels is None else torch.cat(pooled[1:] or pooled, dim=1)


# ------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict(model, images, algo, head=False):
    """Scores (B, classes) of images (B, C, height, width) by a method; the largest wins.

    "cff", "cffm", "scl" and "bp": the head's, in one forward pass. "ff", "symba" and "collab": the
    goodness with each class's label, summed over the layers, one pass per class; with head=True
    the head's, in one pass (Table 2). Raises ValueError for an unknown algo or an unsuitable model.
    """
    if algo not in ("cff", "cffm", "ff", "symba", "collab", "scl", "bp"):
        raise ValueError(f"algo: cff, cffm, ff, symba, collab, scl or bp; got {algo!r}")
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
