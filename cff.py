"""Contrastive Forward-Forward (Fig. 1d, Fig. 3): Algorithm 1 (left column), the linear head of stage 2, and prediction.

    x, y        one batch: images (B, C, H, W) and labels (B,)
    x1, x2      its two augmented views, first as patches (B, P, C*p*p), then as a layer's output (B, P, E), detached
    f1, f2, f   what layer l makes of them, (B, P, E) each and (2B, P, E) together; D = C*H*W, #P = P

One call is one batch. Models come from vit.py; `optimizers` holds one optimizer for each layer, so that no update can
reach another layer.

    >>> optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.004) for layer in model.layers]
    >>> losses = cff_step(model, optimizers, x, y, augment, margins(0.4, 0.1, len(model.layers)), temperature=0.15)
"""
import torch
from torch.nn.functional import cross_entropy, normalize

from losses import marginal_contrastive_loss


# ------------------------------------------------------------------------------- stage 1: the encoder (Algorithm 1, left)

def cff_step(model, optimizers, x, y, augment, margins, temperature, views=2):
    """Train every layer on one batch by Algorithm 1, left; returns the L losses, a tensor (L,).

    augment: images -> one augmented view, drawn anew at each call. margins: a float for each layer; 0 everywhere is CFF
    (Eq. 3), `losses.margins` gives those of CFF+M (Eq. 15). views=1 is the one-forward variant of Table 6: f = f1.
    Raises ValueError as `marginal_contrastive_loss`.
    """
    losses = []
    two = views == 2
    x1, x2 = augment(x), augment(x) if two else None                # x1, x2 = augment(x), augment(x)
    x1 = model.patches(x1)                                          # x1 = patching(x1)              (B, #P, D/#P)
    x2 = model.patches(x2) if two else None                         # x2 = patching(x2)              (B, #P, D/#P)
    y = torch.cat([y, y]) if two else y
    for l, layer in enumerate(model.layers):                        # for l in range(L):
        f1 = layer(x1)                                              # f1 = layers[l].forward(x1)     (B, #P, E)
        f2 = layer(x2) if two else None                             # f2 = layers[l].forward(x2)     (B, #P, E)
        f = torch.cat([f1, f2]) if two else f1                      # f = cat(f1, f2)                (2B, #P, E)
        f_pooled = normalize(model.pool(f))                         # Eq. 13, f / norm2(f)           (2B, E)
        loss = marginal_contrastive_loss(f_pooled, y, margins[l], temperature)      # loss = ContrastiveLoss(f / norm2(f), y)
        optimizers[l].zero_grad()
        loss.backward()                                             # loss.backward()
        optimizers[l].step()                                        # optimizers[l].step()
        x1 = f1.detach()                                            # x1 = f1.detach()
        x2 = f2.detach() if two else None                           # x2 = f2.detach()
        losses.append(loss.detach())
    return torch.stack(losses)


# ---------------------------------------------------------------------------------------- stage 2: the head (Section 3.3)

@torch.no_grad()
def encode(model, images):
    """The pooled output of each layer, without gradients: images (B, C, H, W) -> a list of L tensors (B, E)."""
    h, pooled = model.patches(images), []
    for layer in model.layers:
        h = layer(h)
        pooled.append(model.pool(h))
    return pooled


def head_step(model, optimizer, x, y, augment):
    """Train the linear head on one batch and one augmented view, the encoder frozen; returns the cross-entropy, a scalar."""
    f = encode(model, augment(x))[-1]                               # (B, E), no gradient reaches the encoder
    loss = cross_entropy(model.head(f), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# -------------------------------------------------------------------------------------- backpropagation, to compare with

def bp_step(model, optimizer, x, y, augment):
    """Train encoder and head end to end on one batch (BP+CE, Fig. 1a); returns the cross-entropy, a scalar."""
    h = model.patches(augment(x))
    for layer in model.layers:
        h = layer(h)                                                # nothing is detached: every layer's graph is kept
    loss = cross_entropy(model.head(model.pool(h)), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# ------------------------------------------------------------------------------------------------------------ prediction

@torch.no_grad()
def predict(model, images, algo):
    """Scores (B, classes) of images (B, C, H, W), the largest wins: one forward pass for "cff", "cffm" and "bp" (Section 3.3).

    Raises ValueError for another algo.
    """
    if algo not in ("cff", "cffm", "bp"):
        raise ValueError(f"algo must be cff, cffm or bp; got {algo!r}")
    return model.head(encode(model, images)[-1])
