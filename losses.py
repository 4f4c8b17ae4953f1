"""The losses of Contrastive Forward-Forward and related methods, and their gradients by hand.

Covers Eqs. 1-3, 7, 12 and 14-18 of the paper, R(i) of Section 3.5, Eqs. A.1-A.7 and Fig. 4a.

    f      (2B, E)  representations: one row per image view, each with norm 1
    y      (2B,)    the class of each row. With one view there are B rows, not 2B
    s      (2B, 2B) cosine similarities, s_ij = f_i . f_j
    P(i)            rows of the same class as i, without i; |P(i)| is their number
    N(i), A(i)      rows of other classes; all rows except i
    R(i), Rc(i)     saturated positives of i, those with s_ir > 1 - m; the other positives of i
    tau, m          temperature and margin; the paper writes most equations with tau = 1

The sets are boolean masks: P[i, j] is True where j is in P(i). A contrastive loss is the mean of
L_i over the anchors i that have a positive. The paper writes the sum over all anchors.

    >>> f = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    >>> y = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    >>> marginal_contrastive_loss(f, y, margin=0.4)
"""
import math

import torch
from torch.nn.functional import softplus


# --------------------------------------------------------- goodness: FF and SymBa (Eqs. 1, 2, 7)

def goodness(h):
    """The goodness of a layer's pooled outputs h: (B, E) -> (B,), G = ||h||^2 / E.

    Eq. 1 has the sum; this is the mean, as in the authors' code, so theta does not depend on E.
    """
    return h.square().mean(dim=1)


def ff_loss(g_pos, g_neg, threshold=2.0):
    """FF's loss, Eq. 2: goodness with true labels (B,) and with wrong labels (B,) -> scalar."""
    # Eq. 2: L = sum_i log(1 + exp(theta - G_i^pos)) + log(1 + exp(G_i^neg - theta))
    # softplus(x) = log(1 + exp(x)). The result is the mean of the 2B terms, not their sum.
    return (softplus(threshold - g_pos) + softplus(g_neg - threshold)).mean() / 2


def symba_loss(g_pos, g_neg, alpha=1.0):
    """SymBa's loss, Eq. 7: goodness with true labels (B,) and with wrong labels (B,) -> scalar."""
    # Eq. 7: L = sum_i log(1 + exp(-alpha (G_i^pos - G_i^neg))), here the mean
    return softplus(-alpha * (g_pos - g_neg)).mean()


# ---------------------------------------------------------------------------- similarities and sets

def _check(f, y, temperature, margin=0.0):
    """Raise ValueError if a contrastive loss cannot have these arguments."""
    if f.dim() != 2 or y.shape != f.shape[:1]:
        raise ValueError(f"f must be (2B, E), y (2B,); got {tuple(f.shape)} and {tuple(y.shape)}")
    if not 0 <= margin <= 2:
        raise ValueError(f"the margin must be between 0 and 2; got {margin}")
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive; got {temperature}")


def _sets(y):
    """P(i) and N(i) of all rows, for labels y (2B,): two (2B, 2B) masks."""
    same_class = y[:, None] == y[None, :]
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    return same_class & ~itself, ~same_class


def _Q(s, margin):
    """Q of Eq. 15, min(s + m, 1). At s + m = 1 its gradient flows; torch.clamp's may not."""
    return (s + margin).masked_fill(s + margin > 1, 1)


def _log_sum_exp(x, S):
    """log sum_{j in S(i)} exp(x_ij) for each row i, (2B,). x and the mask S are (2B, 2B)."""
    return x.masked_fill(~S, -math.inf).logsumexp(dim=1)


def _size(P):
    """|P(i)| of all rows, (2B,); 1 for an empty P(i), because L_i is divided by it."""
    return P.sum(dim=1).clamp(min=1)


def _mean_over_anchors(L_i, P):
    """The mean of L_i (2B,) over the rows that have a positive. Raises ValueError if none has one;
    on a GPU it returns nan instead, because the check would make the CPU wait."""
    anchors = P.any(dim=1)
    if anchors.device.type == "cpu" and not anchors.any():
        raise ValueError("no row has a positive: every class occurs once in this batch; "
                         "use two views or a larger batch")
    return L_i.masked_fill(~anchors, 0).sum() / anchors.sum()


# ---------------------------------------------------------------------- losses (Eqs. 3, 12, 14-17)

def contrastive_loss(f, y, temperature=0.15):
    """Supervised contrastive loss, outer form, Eq. 3: f (2B, E), y (2B,) -> scalar.

    The rows of f must have norm 1. Raises ValueError for wrong shapes, for temperature <= 0, and
    if no row has a positive (on a GPU the result is then nan).
    """
    _check(f, y, temperature)
    P, N = _sets(y)
    s = f @ f.T                                                                         # (2B, 2B)
    # Eq. 3: L_i = -1/|P(i)| sum_{p in P(i)} log( exp(s_ip/tau) / sum_{a in A(i)} exp(s_ia/tau) )
    log_sum_A = _log_sum_exp(s / temperature, P | N)                                    # (2B,)
    L_i = -((s / temperature - log_sum_A[:, None]) * P).sum(dim=1) / _size(P)
    return _mean_over_anchors(L_i, P)


def inner_contrastive_loss(f, y, temperature=0.15):
    """Supervised contrastive loss, inner form, Eq. 12: the mean over P(i) is inside the logarithm.

    Arguments and errors: see `contrastive_loss`. By Jensen's inequality it is at most Eq. 3.
    """
    _check(f, y, temperature)
    P, N = _sets(y)
    s = f @ f.T                                                                         # (2B, 2B)
    # Eq. 12: L_i = -log( 1/|P(i)| sum_{p in P(i)} exp(s_ip/tau) / sum_{a in A(i)} exp(s_ia/tau) )
    log_mean_P = _log_sum_exp(s / temperature, P) - _size(P).to(f).log()                # (2B,)
    log_sum_A = _log_sum_exp(s / temperature, P | N)
    L_i = -(log_mean_P - log_sum_A)
    return _mean_over_anchors(L_i, P)


def marginal_contrastive_loss(f, y, margin, temperature=0.15):
    """Marginal contrastive loss, Eqs. 14-17: f (2B, E), y (2B,), margin in 0..2 -> scalar.

    The margin m is added to the similarity of each positive, but the sum never exceeds 1. At m = 0
    this is Eq. 3. Raises ValueError as `contrastive_loss` does, and for a margin outside 0..2.
    """
    _check(f, y, temperature, margin)
    P, N = _sets(y)
    s = f @ f.T                                                                         # (2B, 2B)
    # Eq. 15: Q_ip = min(s_ip + m, 1). Before the margin, in Eq. 14, Q_ip = s_ip
    Q = _Q(s, margin)
    # Eq. 14: L_i = -1/|P(i)| sum_{p in P(i)} log( exp(Q_ip/tau) / Z_i ), where
    #   Z_i = sum_{p' in P(i)} exp(Q_ip'/tau) + sum_{n in N(i)} exp(s_in/tau)
    # Eq. 17 (A.1): L_i = -1/|P(i)| sum_{p in P(i)} Q_ip/tau + log Z_i
    log_Z = _log_sum_exp(torch.where(P, Q, s) / temperature, P | N)     # Q on P(i), s on N(i)
    L_i = -(Q / temperature * P).sum(dim=1) / _size(P) + log_Z
    return _mean_over_anchors(L_i, P)                       # Eq. 16: L = sum_i L_i, here the mean


def saturated(f, y, margin):
    """The sets R(i) of Sec. 3.5: a (2B, 2B) mask, True where j is in P(i) and s_ij > 1 - m.

    s_ij = 1 - m exactly is not saturated. Raises ValueError for wrong shapes or a wrong margin.
    """
    _check(f, y, 1.0, margin)
    P, _ = _sets(y)
    return P & (f @ f.T + margin > 1)                           # s > 1 - m, with the rounding of _Q


# ----------------------------------------------- gradients by hand, case by case (Eqs. 18, A.2-A.7)

def _terms(f, y, i, margin, temperature):
    """Quantities for anchor i: its similarities s (2B,), the masks P, N, R and Rc (2B,), and Z_i.

    Z_i is computed as printed, without logsumexp: in float32 tau must be > 0.012.
    """
    _check(f, y, temperature, margin)
    P, N = _sets(y)
    P, N = P[i], N[i]                                       # the rows of anchor i
    s = f @ f[i]
    # Eq. A.3: for r in R(i) Q = 1 and dQ/df_i = 0, for r in Rc(i) Q = f_i . f_r + m, dQ/df_i = f_r
    R = P & (s + margin > 1)
    Rc = P & ~R
    # Z_i = |R(i)| exp(1/tau)
    #       + sum_{r' in Rc(i)} exp((s_ir' + m)/tau) + sum_{n in N(i)} exp(s_in/tau)
    Z = (R.sum() * torch.exp(f.new_tensor(1 / temperature))
         + torch.exp((s[Rc] + margin) / temperature).sum()
         + torch.exp(s[N] / temperature).sum())
    return s, P, N, R, Rc, Z


def grad_anchor(f, y, k, margin, temperature):
    """dL_k/df_k (E,), Eq. 18: the gradient of anchor k's own loss; zeros if k has no positive.
    k is a row number. Raises ValueError for wrong shapes, margins and temperatures."""
    s, P, N, R, Rc, Z = _terms(f, y, k, margin, temperature)
    if not P.any():
        return torch.zeros_like(f[k])
    # Eq. A.2: 1/tau [ -1/|P(k)| sum_{p in P(k)} dQ_kp/df_k + 1/Z_k (
    #   sum_{p' in P(k)} exp(Q_kp'/tau) dQ_kp'/df_k + sum_{n in N(k)} exp(s_kn/tau) f_n ) ]
    # Eq. 18 (A.3 inserted): 1/tau [ -1/|P(k)| sum_{r' in Rc(k)} f_r' + 1/Z_k (
    #   sum_{r' in Rc(k)} exp((s_kr' + m)/tau) f_r' + sum_{n in N(k)} exp(s_kn/tau) f_n ) ]
    pull = -f[Rc].sum(dim=0) / P.sum()
    push = torch.exp((s[Rc] + margin) / temperature) @ f[Rc] + torch.exp(s[N] / temperature) @ f[N]
    return (pull + push / Z) / temperature


def grad_positive(f, y, i, k, margin, temperature):
    """dL_i/df_k (E,), Eqs. A.4-A.6, for k in P(i). ValueError for other k."""
    s, P, N, R, Rc, Z = _terms(f, y, i, margin, temperature)
    if not P[k]:
        raise ValueError(f"row {k} is not a positive of row {i}")
    # Eq. A.4: 1/tau [ -1/|P(i)| + exp(Q_ik/tau) / Z_i ] dQ_ik/df_k
    # Eq. A.5 (A.3 inserted), k in R(i): 0, because a saturated pair has no gradient
    if R[k]:
        return torch.zeros_like(f[k])
    # Eq. A.6 (A.3 inserted), k in Rc(i): 1/tau [ -1/|P(i)| + exp((s_ik + m)/tau) / Z_i ] f_i
    return (-1 / P.sum().to(f) + torch.exp((s[k] + margin) / temperature) / Z) * f[i] / temperature


def grad_negative(f, y, i, k, margin, temperature):
    """dL_i/df_k (E,), Eq. A.7, for k in N(i); zeros if P(i) is empty. ValueError for other k."""
    s, P, N, R, Rc, Z = _terms(f, y, i, margin, temperature)
    if not N[k]:
        raise ValueError(f"row {k} is not a negative of row {i}")
    if not P.any():
        return torch.zeros_like(f[k])
    # Eq. A.7, k in N(i): 1/tau [ exp(s_ik/tau) / Z_i ] f_i    (the paper mixes i and k in Z)
    return torch.exp(s[k] / temperature) / Z * f[i] / temperature


# ------------------------------------------------------------------ gradients by hand, all at once

def marginal_contrastive_grad(f, y, margin, temperature):
    """d(sum_i L_i)/df (2B, E): Eqs. 18 and A.5-A.7 for all pairs, as one matrix product.

    This is the gradient of the sum over anchors; `marginal_contrastive_loss` is the mean. Because
    L_i depends on f only through s_ij = f_i . f_j, it is (D + D^T) f with D_ij = dL_i/ds_ij. Row k
    of D f is Eq. 18, and row k of D^T f is the sum of A.5-A.7 over the anchors i.
    """
    _check(f, y, temperature, margin)
    P, N = _sets(y)
    s = f @ f.T                                                                         # (2B, 2B)
    # D_ij = 1/tau [ exp(Q_ij/tau) / Z_i - 1/|P(i)| ] for j in P(i)
    # D_ij = 1/tau exp(s_ij/tau) / Z_i for j in N(i)
    exponents = torch.where(P, _Q(s, margin), s) / temperature
    softmax = exponents.masked_fill(~(P | N), -math.inf).softmax(dim=1)         # exp(...) / Z_i
    dL_ds = (softmax - P.to(f) / _size(P)[:, None]) / temperature
    # D_ij = 0 for j in R(i), because Q is constant there, and for an anchor without positives
    has_gradient = ~saturated(f, y, margin) & P.any(dim=1, keepdim=True)
    D = torch.where(has_gradient, dL_ds, 0)
    return (D + D.T) @ f


# --------------------------------------------------------------------------- margins (Fig. 4a)

def margins(m0, mL, L, decay="linear"):
    """The margins of L layers, Fig. 4a: a list of floats from m0 (first layer) to mL (last layer).

    decay is "linear" (the paper) or, from its code, "parabolic", "cosine" or "exponential", which
    needs m0 > 0. Raises ValueError for L < 1, margins outside 0..2, and an unknown decay.
    """
    if L < 1 or not (0 <= m0 <= 2 and 0 <= mL <= 2):
        raise ValueError(f"need L >= 1, m0 and mL in 0..2; got L = {L}, m0 = {m0}, mL = {mL}")
    if decay == "exponential" and m0 == 0:
        raise ValueError("the exponential decay, m0 (mL/m0)^t, needs m0 > 0")
    curves = {
        "linear": lambda t: m0 + (mL - m0) * t,
        "parabolic": lambda t: mL + (m0 - mL) * (1 - t) ** 2,
        "cosine": lambda t: mL + (m0 - mL) * (1 + math.cos(math.pi * t)) / 2,
        "exponential": lambda t: m0 * (mL / m0) ** t,
    }
    if decay not in curves:
        raise ValueError(f"decay must be one of {', '.join(curves)}; got {decay!r}")
    return [curves[decay](l / max(L - 1, 1)) for l in range(L)]     # a single layer has m0
