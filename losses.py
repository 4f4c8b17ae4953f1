"""The losses of Contrastive Forward-Forward and of the methods it is compared with, and its gradients derived by hand.

Covers Eqs. 1-3, 7, 12 and 14-18 of the paper, R(i) of Section 3.5, Eqs. A.1-A.7 and the margins of Fig. 4a.

    f      (N, E)   representations, one L2-normalised row for each image view; f = cat(f1, f2), N = 2B with two views
    y      (N,)     their classes; y = cat(y, y) with two views
    s      (N, N)   s_ij = f_i . f_j, cosine similarities
    P(i)            rows of the same class as i, without i;  |P(i)| their number
    N(i)            rows of other classes;  A(i) = P(i) + N(i), every row but i
    R(i)            saturated positives, s_ir > 1 - m;  Rc(i) = P(i) without R(i)
    tau, m          temperature, margin; the paper writes Eqs. 12, 16-18 and A.1-A.7 with tau = 1, here they hold for any tau

Sets are boolean masks: P[i, j] is True where j is in P(i). A loss is the mean over the anchors i that have a positive
(the paper writes the sum); an anchor with an empty P(i) contributes nothing and is not counted.

    >>> f = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    >>> marginal_contrastive_loss(f, torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]), margin=0.4)
"""
import math

import torch
from torch.nn.functional import softplus


# ------------------------------------------------------------------------------------ goodness: FF and SymBa (Eqs. 1, 2, 7)

def goodness(h):
    """Goodness of one layer's pooled outputs h (B, E) -> (B,), Eq. 1 as a mean of squares, G = ||h||^2 / E.

    The mean, as in the authors' code, where Eq. 1 has the sum: so the threshold does not depend on the width E.
    """
    return h.square().mean(dim=1)


def ff_loss(g_pos, g_neg, threshold=2.0):
    """FF's loss, Eq. 2, from the goodness (B,) with the true and with a wrong label -> scalar, the mean of its 2B terms."""
    # Eq. 2: L = sum_i log(1 + exp(theta - G_i^pos)) + log(1 + exp(G_i^neg - theta));   softplus(x) = log(1 + exp(x))
    return (softplus(threshold - g_pos) + softplus(g_neg - threshold)).mean() / 2


def symba_loss(g_pos, g_neg, alpha=1.0):
    """SymBa's loss, Eq. 7, from the goodness (B,) with the true and with a wrong label -> scalar, the mean over the batch."""
    # Eq. 7: L = sum_i log(1 + exp(-alpha (G_i^pos - G_i^neg)))
    return softplus(-alpha * (g_pos - g_neg)).mean()


# ---------------------------------------------------------------------------------------------- similarities and sets

def _check(f, y, temperature, margin=0.0):
    """Raise ValueError where f, y, temperature or margin cannot be the arguments of a contrastive loss."""
    if f.dim() != 2 or y.shape != f.shape[:1]:
        raise ValueError(f"f must be (N, E) and y (N,); got {tuple(f.shape)} and {tuple(y.shape)}")
    if not 0 <= margin <= 2:
        raise ValueError(f"the margin must lie in 0..2, the range of 1 - cosine; got {margin}")
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive; got {temperature}")


def _sets(y):
    """P, N and A = P + N as (N, N) masks for labels y (N,)."""
    same_class = y[:, None] == y[None, :]
    A = ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    return same_class & A, ~same_class, A


def _Q(s, P, margin):
    """Q of Eq. 15 for all pairs (N, N): min(s + m, 1) for positives, s for the others.

    Where s + m > 1 it is the constant 1; at s + m = 1 its gradient still flows (that of clamp depends on torch's version).
    """
    Q = torch.where(P, s + margin, s)
    return Q.masked_fill(P & (Q > 1), 1)


def _anchors(P):
    """The rows that have a positive, (N,) bool; ValueError if there is none."""
    anchors = P.any(dim=1)
    if not anchors.any():
        raise ValueError("no row has a positive: every class occurs once in this batch; use two views or larger batches")
    return anchors


# -------------------------------------------------------------------------------------------- losses (Eqs. 3, 12, 14-17)

def contrastive_loss(f, y, temperature=0.15):
    """Supervised contrastive loss, outer form, Eq. 3: f (N, E) normalised, y (N,) -> scalar, the mean over anchors.

    Raises ValueError if shapes do not fit, temperature <= 0 or no row has a positive.
    """
    _check(f, y, temperature)
    P, N, A = _sets(y)
    s = f @ f.T                                                                         # (N, N)
    # Eq. 3: L_i = -1/|P(i)| sum_{p in P(i)} log( exp(s_ip/tau) / sum_{a in A(i)} exp(s_ia/tau) )
    log_sum_A = (s / temperature).masked_fill(~A, -math.inf).logsumexp(dim=1)           # (N,)
    L = -((s / temperature - log_sum_A[:, None]) * P).sum(dim=1) / P.sum(dim=1).clamp(min=1)
    return L[_anchors(P)].mean()                                                        # L = sum_i L_i, here the mean


def inner_contrastive_loss(f, y, temperature=0.15):
    """Supervised contrastive loss, inner form, Eq. 12: the mean over P(i) stands inside the logarithm.

    Arguments, result and errors as `contrastive_loss`, which is never smaller (Jensen's inequality).
    """
    _check(f, y, temperature)
    P, N, A = _sets(y)
    s = f @ f.T                                                                         # (N, N)
    # Eq. 12: L_i = -log( 1/|P(i)| sum_{p in P(i)} exp(s_ip/tau) / sum_{a in A(i)} exp(s_ia/tau) )
    log_sum_P = (s / temperature).masked_fill(~P, -math.inf).logsumexp(dim=1)           # (N,)
    log_sum_A = (s / temperature).masked_fill(~A, -math.inf).logsumexp(dim=1)
    L = -(log_sum_P - P.sum(dim=1).to(f).log() - log_sum_A)
    return L[_anchors(P)].mean()                                                        # L = sum_i L_i, here the mean


def marginal_contrastive_loss(f, y, margin, temperature=0.15):
    """Marginal contrastive loss, Eqs. 14-17: f (N, E) normalised, y (N,), margin m in 0..2 -> scalar, the mean over anchors.

    A positive counts as more similar than it is by m, but never as more than 1. At m = 0 it is Eq. 14: Eq. 3 with its
    denominator split into positives and negatives.
    Raises ValueError as `contrastive_loss`, and for a margin outside 0..2.
    """
    _check(f, y, temperature, margin)
    P, N, A = _sets(y)
    s = f @ f.T                                                                         # (N, N)
    # Eq. 14: L_i = -1/|P(i)| sum_{p in P(i)} log( exp(Q(f_i, f_p)/tau) / Z_i ), there with Q(a, b) = a . b, and
    #         Z_i = sum_{p' in P(i)} exp(Q(f_i, f_p')/tau) + sum_{n in N(i)} exp(s_in/tau)
    # Eq. 15: Q(f_i, f_p) = min(f_i . f_p + m, 1); negatives keep f_i . f_n
    Q = _Q(s, P, margin)
    # Eq. 17 (A.1): L_i = -1/|P(i)| sum_{p in P(i)} Q(f_i, f_p)/tau + log Z_i
    L = -(Q / temperature * P).sum(dim=1) / P.sum(dim=1).clamp(min=1) \
        + (Q / temperature).masked_fill(~A, -math.inf).logsumexp(dim=1)
    return L[_anchors(P)].mean()                                                        # Eq. 16: L = sum_i L_i, here the mean


def saturated(f, y, margin):
    """R of Sec. 3.5 for all anchors: (N, N) bool, True where j is in R(i), a positive with s_ij > 1 - m.

    Exactly at s_ij = 1 - m the pair is not saturated. Raises ValueError as `marginal_contrastive_loss`.
    """
    _check(f, y, 1.0, margin)
    P, N, A = _sets(y)
    return P & (f @ f.T + margin > 1)           # s > 1 - m, rounded as _Q rounds


# --------------------------------------------------------------------- gradients by hand, case by case (Eqs. 18, A.5-A.7)
#
# As printed, for reading and testing: exp(1/tau) must be a number, tau > 0.012 in float32. What stands further down has no
# such limit.

def _around(f, y, i, margin, temperature):
    """What the equations need of anchor i: s_i (N,), the masks P, N, R, Rc (N,) and Z_i."""
    _check(f, y, temperature, margin)
    P, N, A = (mask[i] for mask in _sets(y))
    s = f @ f[i]
    R = P & (s + margin > 1)        # Eq. A.3: Q(f_i, f_r) = 1 for r in R(i), f_i . f_r + m for r in Rc(i): dQ/df_i = 0 or f_r
    Rc = P & ~R
    # Z_i = |R(i)| exp(1/tau) + sum_{r' in Rc(i)} exp((s_ir' + m)/tau) + sum_{n in N(i)} exp(s_in/tau)
    Z = R.sum() * torch.exp(f.new_tensor(1 / temperature)) \
        + torch.exp((s[Rc] + margin) / temperature).sum() + torch.exp(s[N] / temperature).sum()
    return s, P, N, R, Rc, Z


def grad_anchor(f, y, k, margin, temperature):
    """dL_k/df_k (E,), Eq. 18: the gradient of an anchor's own loss; zeros if k has no positive."""
    s, P, N, R, Rc, Z = _around(f, y, k, margin, temperature)
    if not P.any():
        return torch.zeros_like(f[k])
    # Eq. A.2: 1/tau [ -1/|P(k)| sum_{p in P(k)} dQ_kp/df_k
    #                  + ( sum_{p' in P(k)} exp(Q_kp'/tau) dQ_kp'/df_k + sum_{n in N(k)} exp(s_kn/tau) f_n ) / Z_k ]
    # Eq. 18 (A.3 put in): 1/tau [ -1/|P(k)| sum_{r' in Rc(k)} f_r'
    #                  + ( sum_{r' in Rc(k)} exp((s_kr' + m)/tau) f_r' + sum_{n in N(k)} exp(s_kn/tau) f_n ) / Z_k ]
    pull = -f[Rc].sum(dim=0) / P.sum()
    push = (torch.exp((s[Rc] + margin) / temperature) @ f[Rc] + torch.exp(s[N] / temperature) @ f[N]) / Z
    return (pull + push) / temperature


def grad_positive(f, y, i, k, margin, temperature):
    """dL_i/df_k (E,) for k in P(i), Eqs. A.5 and A.6: how the loss of anchor i moves its positive k.

    Raises ValueError if k is not in P(i).
    """
    s, P, N, R, Rc, Z = _around(f, y, i, margin, temperature)
    if not P[k]:
        raise ValueError(f"row {k} is not a positive of row {i}")
    # Eq. A.4: 1/tau [ -1/|P(i)| + exp(Q_ik/tau) / Z_i ] dQ_ik/df_k
    # Eq. A.5 (A.3 put in), k in R(i): 0, a saturated pair moves nothing
    if R[k]:
        return torch.zeros_like(f[k])
    # Eq. A.6 (A.3 put in), k in Rc(i): 1/tau [ -1/|P(i)| f_i + exp((s_ik + m)/tau) / Z_i f_i ]
    return (-f[i] / P.sum() + torch.exp((s[k] + margin) / temperature) / Z * f[i]) / temperature


def grad_negative(f, y, i, k, margin, temperature):
    """dL_i/df_k (E,) for k in N(i), Eq. A.7: how the loss of anchor i moves its negative k; zeros if P(i) is empty.

    Raises ValueError if k is not in N(i).
    """
    s, P, N, R, Rc, Z = _around(f, y, i, margin, temperature)
    if not N[k]:
        raise ValueError(f"row {k} is not a negative of row {i}")
    if not P.any():
        return torch.zeros_like(f[k])
    # Eq. A.7, k in N(i): 1/tau [ exp(s_ik/tau) / Z_i ] f_i         (all of Z belongs to the anchor i)
    return torch.exp(s[k] / temperature) / Z * f[i] / temperature


# ------------------------------------------------------------------------------- gradients by hand, all at once, in use

def marginal_contrastive_grad(f, y, margin, temperature):
    """d(sum_i L_i)/df (N, E): Eqs. 18 and A.5-A.7 for every pair, as one matrix product.

    Each L_i depends on f through s_ij = f_i . f_j alone, so with D_ij = dL_i/ds_ij the whole gradient is (D + D^T) F:
    row k of D F is Eq. 18 and row k of D^T F sums A.5-A.7 over the anchors i. Arguments and errors as the loss.
    """
    _check(f, y, temperature, margin)
    P, N, A = _sets(y)
    s = f @ f.T                                                                         # (N, N)
    R = P & (s + margin > 1)
    # D_ij = 1/tau [ -1/|P(i)| (only for j in P(i)) + exp(Q_ij/tau) / Z_i ]; zero for j in R(i), for j = i, for empty P(i)
    D = (_Q(s, P, margin) / temperature).masked_fill(~A, -math.inf).softmax(dim=1)
    D = (D - P.to(f) / P.sum(dim=1, keepdim=True).clamp(min=1)) / temperature
    D = D.masked_fill(R | ~A | ~_anchors(P)[:, None], 0)
    return (D + D.T) @ f


class MarginalContrastiveByHand(torch.autograd.Function):
    """`marginal_contrastive_loss` whose backward pass is `marginal_contrastive_grad` instead of autograd.

        loss = MarginalContrastiveByHand.apply(f, y, margin, temperature)

    Autograd takes over at dL/df, for the normalisation, the pooling and the layer's weights. Training a ViT with it follows
    training without it.
    """

    @staticmethod
    def forward(ctx, f, y, margin, temperature):
        ctx.save_for_backward(f, y)
        ctx.margin, ctx.temperature = margin, temperature
        return marginal_contrastive_loss(f, y, margin, temperature)

    @staticmethod
    def backward(ctx, grad_output):
        f, y = ctx.saved_tensors
        P, N, A = _sets(y)
        grad = marginal_contrastive_grad(f, y, ctx.margin, ctx.temperature) / P.any(dim=1).sum()
        return grad_output * grad, None, None, None


# ------------------------------------------------------------------------------------------------ margins (Fig. 4a)

def margins(m0, mL, L, decay="linear"):
    """The margin of each of L layers, a list of floats from m0 (first) down to mL (last), Sec. 4.1 and Fig. 4a.

    decay: "linear" as in the paper, or "parabolic", "cosine", "exponential" (needs m0 > 0) from the authors' code.
    One layer alone has m0. Raises ValueError for L < 1, a margin outside 0..2 or another decay.
    """
    if L < 1 or not (0 <= m0 <= 2 and 0 <= mL <= 2):
        raise ValueError(f"margins need L >= 1 layers and m0, mL in 0..2; got L = {L}, m0 = {m0}, mL = {mL}")
    if decay == "exponential" and m0 == 0:
        raise ValueError("the exponential decay m0 (mL/m0)^t needs m0 > 0")
    curves = {
        "linear": lambda t: m0 + (mL - m0) * t,
        "parabolic": lambda t: mL + (m0 - mL) * (1 - t) ** 2,
        "cosine": lambda t: mL + (m0 - mL) * (1 + math.cos(math.pi * t)) / 2,
        "exponential": lambda t: m0 * (mL / m0) ** t,
    }
    if decay not in curves:
        raise ValueError(f"decay must be one of {', '.join(curves)}; got {decay!r}")
    return [curves[decay](l / max(L - 1, 1)) for l in range(L)]
