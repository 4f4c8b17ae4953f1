"""The paper as tests, in its order: losses, gradients, networks, Algorithm 1, settings, results.

    python -m pytest -q                         everything, in a few minutes on two cores
    python -m pytest -q -k eq18                 one equation, table, figure or algorithm

Each loss stands beside a slow, obvious twin in float64; each gradient beside automatic
differentiation of that twin. What an assertion says names the equation and what was expected.
"""
import copy
import functools
import itertools
import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize, pad
from torchvision.transforms import autoaugment

import cff
import eval as evaluation
import losses
import train
import vit

TAU = pytest.mark.parametrize("tau", [1.0, 0.15])
torch.set_num_threads(1)                # two wait for each other beside any other busy process


def batch(seed, n=12, E=3, classes=3):
    """Random unit rows f (n, E) in float64 and labels; in few dimensions, some of them close."""
    g = torch.Generator().manual_seed(seed)
    f = normalize(torch.randn(n, E, dtype=torch.float64, generator=g), dim=1)
    return f, torch.randint(classes, (n,), generator=g)


def sets(y, i):
    """P(i) and N(i) as lists of rows."""
    others = [j for j in range(len(y)) if j != i]
    return [j for j in others if y[j] == y[i]], [j for j in others if y[j] != y[i]]


def slow_anchor_loss(f, y, i, m, tau):
    """L_i of Eq. 17, written as sums over P(i) and N(i)."""
    P, N = sets(y, i)
    Q = {p: torch.clamp(f[i] @ f[p] + m, max=1) for p in P}
    Z = sum(torch.exp(Q[p] / tau) for p in P) + sum(torch.exp(f[i] @ f[n] / tau) for n in N)
    return -sum(Q[p] / tau for p in P) / len(P) + torch.log(Z)


def slow_loss(f, y, m, tau):
    """Eq. 16 as the mean over the anchors that have a positive."""
    L = [slow_anchor_loss(f, y, i, m, tau) for i in range(len(y)) if sets(y, i)[0]]
    return sum(L) / len(L)


def close(got, expected, what, tolerance=1e-10):
    """Assert in words: which equation, what was expected, what came; of many numbers, the worst."""
    def kind(tensor):
        return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    assert kind(got) == kind(expected), \
        f"{what}: expected a tensor {kind(expected)}; got {kind(got)}"
    if not torch.allclose(got, expected, rtol=0, atol=tolerance):
        off = (got - expected).detach().abs().nan_to_num(math.inf)
        words = f"{(off > tolerance).sum()} of {off.numel()} numbers differ"
        if off.numel() <= 12:
            words = f"expected {expected.tolist()}; got {got.tolist()}"
        raise AssertionError(f"{what}: {words}; the largest difference is {off.max():.3g}")


def gradient(value, x):
    """dvalue/dx; in words if the value has no graph."""
    assert value.requires_grad, ("the gradient of Eqs. 1-17: what was computed has none; detach(), "
                                 ".data, .item() and torch.tensor() cut it off")
    return torch.autograd.grad(value, x)[0]


# ------------------------------------------------- Section 3.1: Eqs. 1 and 2, Section 3.3: Eq. 7

def goodness_pair(seed=0, B=6):
    """Goodness (B,) with true and with wrong labels, in float64, far from 0 as well."""
    g = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(2, B, dtype=torch.float64, generator=g)


def test_eq1_goodness_is_the_mean_of_squares():
    h = torch.tensor([[1.0, 2.0, -2.0], [0.0, 6.0, 0.0]], requires_grad=True)
    G = losses.goodness(h)
    close(G, torch.tensor([9 / 3, 36 / 3]), "Eq. 1 / E, the mean of squares of each row", 0)
    close(gradient(G.sum(), h), 2 * h / 3, "the gradient of Eq. 1 / E", 1e-6)


@pytest.mark.parametrize("threshold", [2.0, 0.5])
def test_eq2_is_binary_cross_entropy_with_logits(threshold):
    g_pos, g_neg = goodness_pair().requires_grad_()
    terms = [torch.log(1 + torch.exp(threshold - p)) for p in g_pos]
    terms += [torch.log(1 + torch.exp(n - threshold)) for n in g_neg]
    got, expected = losses.ff_loss(g_pos, g_neg, threshold), sum(terms) / 12
    close(got, expected, "Eq. 2, log(1 + exp(theta - G^pos)) + log(1 + exp(G^neg - theta)), the "
          "mean of its 2B terms")
    close(gradient(got, g_pos), gradient(expected, g_pos), "the gradient of Eq. 2")
    logits, real = torch.cat([g_pos, g_neg]) - threshold, torch.arange(12) < 6
    close(got, binary_cross_entropy_with_logits(logits, real.double()), "Eq. 2")
    assert losses.ff_loss(torch.tensor([-1e4]), torch.tensor([1e4])) == 1e4, \
        "Eq. 2: log(1 + exp(x)) must not overflow (softplus)"


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_eq7_is_softplus_of_the_difference(alpha):
    g_pos, g_neg = goodness_pair()
    got = losses.symba_loss(g_pos, g_neg, alpha)
    expected = sum(torch.log(1 + torch.exp(-alpha * (p - n))) for p, n in zip(g_pos, g_neg)) / 6
    close(got, expected, "Eq. 7, the mean over the batch")


# ----------------------------------------------- Section 3.3: from FF to CFF, Eqs. 5, 6 and 8-12

def test_eq9_is_eq8_with_the_goodness_of_eq5_and_eq6():
    f, y = batch(0)
    p, n = zip(*[(sets(y, i)[0][0], sets(y, i)[1][0]) for i in range(len(y))])
    g_pos, g_neg = (f * f[list(p)]).sum(dim=1), (f * f[list(n)]).sum(dim=1)         # Eqs. 5, 6
    eq9 = -torch.log(torch.exp(g_pos) / (torch.exp(g_pos) + torch.exp(g_neg)))
    close(losses.symba_loss(g_pos, g_neg), eq9.mean(), "Eq. 9; with any goodness Eq. 8")


def test_eq11_of_eq10s_means_is_eq12_but_for_a_constant_where_P_and_N_are_as_many():
    f, y = batch(0, n=5)[0], torch.tensor([0, 0, 0, 1, 2])      # the last two have no positive
    means = [[torch.exp(f[rows] @ f[i]).mean() for rows in sets(y, i)] for i in range(3)]
    eq11 = sum(-torch.log(a / (a + b)) for a, b in means) / 3
    close(losses.inner_contrastive_loss(f, y, 1.0), eq11 + math.log(2), "Eq. 12, Eq. 11 + ln |P|")


# ------------------------------------------------------------------ Section 3.1: Eqs. 3 and 12

def double_loop(f, y, tau, inner):
    """Eq. 3, or Eq. 12 if inner, as sums over i, p and a."""
    L = []
    for i in range(len(y)):
        P, N = sets(y, i)
        Z = sum(torch.exp(f[i] @ f[a] / tau) for a in P + N)
        if P and inner:
            L.append(-torch.log(sum(torch.exp(f[i] @ f[p] / tau) for p in P) / len(P) / Z))
        elif P:
            L.append(-sum(torch.log(torch.exp(f[i] @ f[p] / tau) / Z) for p in P) / len(P))
    assert len(L) < len(y), "one anchor has no positive here, and is not counted"
    return sum(L) / len(L)


@TAU
@pytest.mark.parametrize("seed", range(3))
def test_eq3_is_a_double_loop(tau, seed):
    f, y = batch(seed)
    f, y[0] = f.requires_grad_(), 99
    got, expected = losses.contrastive_loss(f, y, tau), double_loop(f, y, tau, inner=False)
    close(got, expected, "Eq. 3, -1/|P(i)| sum_{p in P(i)} log( exp(s_ip/tau) / sum_{a in A(i)} "
          "exp(s_ia/tau) ), A(i) without i itself, the mean over the anchors that have a positive")
    close(gradient(got, f), gradient(expected, f),
          "the gradient of Eq. 3 by automatic differentiation, beside an anchor with an empty P(i)")
    assert losses.contrastive_loss(f.float(), y, 0.001).isfinite(), \
        "Eq. 3: exp(s/tau) must not overflow (logsumexp)"


@TAU
@pytest.mark.parametrize("seed", range(3))
def test_eq12_is_a_double_loop(tau, seed):
    f, y = batch(seed)
    f, y[0] = f.requires_grad_(), 99
    got, expected = losses.inner_contrastive_loss(f, y, tau), double_loop(f, y, tau, inner=True)
    close(got, expected, "Eq. 12, -log( 1/|P(i)| sum_{p in P(i)} exp(s_ip/tau) / sum_{a in A(i)} "
          "exp(s_ia/tau) ), the mean over the anchors that have a positive")
    close(gradient(got, f), gradient(expected, f),
          "the gradient of Eq. 12 by automatic differentiation, beside an empty P(i)")
    assert losses.inner_contrastive_loss(f.float(), y, 0.001).isfinite(), \
        "Eq. 12: exp(s/tau) must not overflow (logsumexp)"


@TAU
@pytest.mark.parametrize("seed", range(5))
def test_eq12_is_at_most_eq3_by_jensen(tau, seed):
    f, y = batch(seed)
    inner, outer = losses.inner_contrastive_loss(f, y, tau), losses.contrastive_loss(f, y, tau)
    assert inner < outer, f"Eq. 12 gave {inner}, Eq. 3 {outer}; the mean inside is the smaller loss"


# ---------------------------------------------------------------------- Section 3.5: Eqs. 14-17

@TAU
@pytest.mark.parametrize("m", [0.0, 0.1, 0.4, 2.0])
def test_eq15_to_eq17_are_a_double_loop(tau, m):
    for seed in range(3):
        f, y = batch(seed)
        f, y[0] = f.requires_grad_(), 99
        got, expected = losses.marginal_contrastive_loss(f, y, m, tau), slow_loss(f, y, m, tau)
        close(got, expected, "Eq. 17, -1/|P(i)| sum_p Q_ip/tau + log(sum_p exp(Q_ip/tau) + sum_n "
              f"exp(s_in/tau)), Q = min(s + m, 1) for positives alone (Eq. 15), at m = {m}")
        close(gradient(got, f), gradient(expected, f), "the gradient of Eq. 17 by automatic "
              f"differentiation, none through saturated pairs, at m = {m}")
    assert losses.marginal_contrastive_loss(f.float(), y, m, 0.001).isfinite(), \
        "Eq. 17: exp(Q/tau) must not overflow (logsumexp)"


@TAU
def test_eq14_margin_zero_is_eq3(tau):
    f, y = batch(0)
    close(losses.marginal_contrastive_loss(f, y, 0.0, tau), losses.contrastive_loss(f, y, tau),
          "Eq. 14, at m = 0 Eq. 17 is Eq. 3")


@TAU
def test_eq16_the_sum_of_the_anchors_losses_is_2B_times_the_mean(tau):
    f, y = batch(1, n=8)
    f, y = torch.cat([f, f.flip(1)]), torch.cat([y, y])             # two views: every P(i) has one
    total = sum(slow_anchor_loss(f, y, i, 0.4, tau) for i in range(16))
    close(16 * losses.marginal_contrastive_loss(f, y, 0.4, tau), total, "Eq. 16, sum_i L_i")


def collapsed(B):
    """2B identical rows, B images of B classes in two views; and their loss, ln(2B - 1)."""
    f = normalize(torch.ones(2 * B, 4, dtype=torch.float64), dim=1)
    return f, torch.arange(B).repeat(2), torch.tensor(2 * B - 1).double().log()


@TAU
@pytest.mark.parametrize("B", [2, 5])
def test_eq3_of_a_collapsed_layer_is_ln_2B_minus_1(B, tau):
    f, y, expected = collapsed(B)
    close(losses.contrastive_loss(f, y, tau), expected, "Eq. 3 of identical rows, ln(2B - 1)")


@TAU
@pytest.mark.parametrize("B", [2, 5])
@pytest.mark.parametrize("m", [0.0, 0.4, 2.0])
def test_eq17_of_a_collapsed_layer_is_ln_2B_minus_1(m, B, tau):
    f, y, expected = collapsed(B)
    close(losses.marginal_contrastive_loss(f, y, m, tau), expected,
          "Eq. 17 of identical rows, ln(2B - 1)")


def test_eq17_of_a_layer_that_knows_no_classes_falls_with_the_margin():
    f, y = torch.eye(6, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1])  # all s_ij are 0
    for m, tau in itertools.product((0.0, 0.4, 1.0), (0.15, 1.0)):
        expected = torch.tensor(math.log(2 * math.exp(m / tau) + 3) - m / tau, dtype=f.dtype)
        close(losses.marginal_contrastive_loss(f, y, m, tau), expected,
              "Eq. 17 of equal similarities of at most 1 - m, ln(|P| e^(m/tau) + |N|) - m/tau")
    y = torch.arange(128) % 10                                          # README.md's numbers
    for m, tau, shown in ((0.4, 0.15, 3.7), (0.1, 0.15, 5.0), (0.4, 0.25, 4.3), (0.1, 0.25, 5.2)):
        loss = losses.marginal_contrastive_loss(torch.eye(256), torch.cat([y, y]), m, tau)
        assert round(loss.item(), 1) == shown


@pytest.mark.parametrize("change, words", [
    (dict(f=torch.ones(4)), "must be"), (dict(y=torch.zeros(3)), "must be"),
    (dict(margin=-0.1), "margin"), (dict(margin=2.1), "margin"),
    (dict(temperature=0.0), "temperature"), (dict(temperature=-1.0), "temperature"),
    (dict(y=torch.arange(4)), "no row has a positive"),
])
def test_losses_refuse_what_makes_no_sense(change, words):
    arguments = dict(f=torch.eye(4), y=torch.tensor([0, 0, 1, 1]), temperature=0.15)
    functions = [functools.partial(losses.marginal_contrastive_loss, margin=0.4)]
    if "margin" not in change:
        functions += [losses.contrastive_loss, losses.inner_contrastive_loss]
    for loss in functions:
        with pytest.raises(ValueError, match=words):
            loss(**arguments | change)


def test_section_3_5_saturated_pairs_are_positives_above_1_minus_m():
    f, y = batch(0)
    R = losses.saturated(f, y, 0.4)
    for i in range(len(y)):
        P, N = sets(y, i)
        assert R[i].nonzero()[:, 0].tolist() == [p for p in P if f[i] @ f[p] > 1 - 0.4], \
            f"Sec. 3.5: R({i}), the positives of {i} with s > 1 - m"
    assert not losses.saturated(f, y, 0.0).any(), "Sec. 3.5: at m = 0 nothing is saturated"
    everything = sum(len(sets(y, i)[0]) for i in range(len(y)))
    assert losses.saturated(f, y, 2.0).sum() == everything, \
        "Sec. 3.5: at m = 2 every positive is saturated, no negative, not i itself"


# ------------------------------------------------------- Section 3.5 and A.1: Eqs. 18, A.1-A.7

M = 0.4


def mixed_batch(seed):
    """A batch with at least one saturated and one unsaturated positive, and its R."""
    f, y = batch(seed)
    R = losses.saturated(f, y, M)
    positives = sum(len(sets(y, i)[0]) for i in range(len(y)))
    assert 0 < R.sum() < positives, "this batch would not tell the cases apart"
    return f, y, R


def autograd_row(f, y, i, k, tau):
    """dL_i/df_k by automatic differentiation of the double loop."""
    rows = f.clone().requires_grad_()
    return torch.autograd.grad(slow_anchor_loss(rows, y, i, M, tau), rows)[0][k]


@TAU
def test_a1_a2_a3_a4_lead_from_eq17_to_the_cases(tau):
    f, y, R = mixed_batch(0)
    for i in range(len(y)):
        (P, N), s = sets(y, i), f @ f[i]
        Q = {p: torch.tensor(1.0).double() if R[i, p] else s[p] + M for p in P}
        moves = {p: float(not R[i, p]) for p in P}      # Eq. A.3: dQ_ip/df_i is f_p in Rc, 0 in R
        Z = sum(torch.exp(Q[p] / tau) for p in P) + torch.exp(s[N] / tau).sum()
        L_i = torch.log(Z) - sum(Q[p] for p in P) / len(P) / tau
        close(L_i, slow_anchor_loss(f, y, i, M, tau), f"Eq. A.1, i = {i}")
        pull = -sum(moves[p] * f[p] for p in P) / len(P)
        push = sum(torch.exp(Q[p] / tau) * moves[p] * f[p] for p in P) \
            + torch.exp(s[N] / tau) @ f[N]
        close(losses.grad_anchor(f, y, i, M, tau), (pull + push / Z) / tau, f"Eq. A.2, i = {i}")
        for k in P:                                     # dQ_ik/df_k is f_i, or 0
            expected = (-1 / len(P) + torch.exp(Q[k] / tau) / Z) * moves[k] * f[i] / tau
            close(losses.grad_positive(f, y, i, k, M, tau), expected, f"Eq. A.4, i = {i}, k = {k}")


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_eq18_gradient_of_the_anchor(tau, seed):
    f, y, R = mixed_batch(seed)
    for k in range(len(y)):
        if sets(y, k)[0]:
            close(losses.grad_anchor(f, y, k, M, tau), autograd_row(f, y, k, k, tau),
                  f"Eq. 18, dL_k/df_k by automatic differentiation, k = {k}")


@TAU
def test_eq18_term_by_term(tau):
    f, y, R = mixed_batch(0)
    k = int(R.any(dim=1).nonzero()[0])
    P, N = sets(y, k)
    r, rc = [p for p in P if R[k, p]], [p for p in P if not R[k, p]]
    Z = len(r) * math.exp(1 / tau) + sum(torch.exp((f[k] @ f[j] + M) / tau) for j in rc) \
        + sum(torch.exp(f[k] @ f[n] / tau) for n in N)
    expected = 1 / tau * (-1 / len(P) * sum((f[j] for j in rc), torch.zeros(3)) + (
        sum((torch.exp((f[k] @ f[j] + M) / tau) * f[j] for j in rc), torch.zeros(3))
        + sum(torch.exp(f[k] @ f[n] / tau) * f[n] for n in N)) / Z)
    close(losses.grad_anchor(f, y, k, M, tau), expected, "Eq. 18, 1/tau [ -1/|P(k)| sum_{r' in "
          "Rc(k)} f_r' + (sum_{r' in Rc(k)} exp((s_kr' + m)/tau) f_r' + sum_{n in N(k)} "
          f"exp(s_kn/tau) f_n) / Z_k ], k = {k}, R = {r}, Rc = {rc}")


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_a5_a_saturated_positive_gets_nothing(tau, seed):
    f, y, R = mixed_batch(seed)
    for i, k in R.nonzero().tolist():
        zero = torch.zeros(3).double()
        close(losses.grad_positive(f, y, i, k, M, tau), zero,
              f"Eq. A.5, a saturated pair moves nothing, i = {i}, k = {k}", 0)
        close(autograd_row(f, y, i, k, tau), zero, "automatic differentiation of L_i", 0)


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_a6_gradient_of_an_unsaturated_positive(tau, seed):
    f, y, R = mixed_batch(seed)
    for i in range(len(y)):
        for k in sets(y, i)[0]:
            if not R[i, k]:
                close(losses.grad_positive(f, y, i, k, M, tau), autograd_row(f, y, i, k, tau),
                      "Eq. A.6, 1/tau [ -f_i/|P(i)| + exp((s_ik + m)/tau)/Z_i f_i ], "
                      f"i = {i}, k = {k}")


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_a7_gradient_of_a_negative(tau, seed):
    f, y, R = mixed_batch(seed)
    for i in range(len(y)):
        P, N = sets(y, i)
        for k in N if P else []:
            close(losses.grad_negative(f, y, i, k, M, tau), autograd_row(f, y, i, k, tau),
                  f"Eq. A.7, 1/tau exp(s_ik/tau)/Z_i f_i, i = {i}, k = {k}")


def test_a5_a6_a7_refuse_a_row_of_the_wrong_set():
    f, y = batch(0)
    P, N = sets(y, 1)
    with pytest.raises(ValueError, match="not a positive"):
        losses.grad_positive(f, y, 1, N[0], M, 0.15)
    with pytest.raises(ValueError, match="not a negative"):
        losses.grad_negative(f, y, 1, P[0], M, 0.15)


def test_eq18_of_an_anchor_without_positives_is_zero():
    f, y = batch(0)
    y[0] = 99
    close(losses.grad_anchor(f, y, 0, M, 0.15), torch.zeros(3).double(),
          "Eq. 18 of an anchor with an empty P(k)", 0)


def test_a7_of_an_anchor_without_positives_is_zero():
    f, y = batch(0)
    y[0] = 99
    close(losses.grad_negative(f, y, 0, 1, M, 0.15), torch.zeros(3).double(),
          "Eq. A.7 of an anchor with an empty P(i)", 0)


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_whole_gradient_is_the_sum_of_the_cases_and_autograds(tau, seed):
    f, y, R = mixed_batch(seed)
    y[0] = 99
    got = losses.marginal_contrastive_grad(f, y, M, tau)
    for k in range(len(y)):
        expected = losses.grad_anchor(f, y, k, M, tau)              # dL/df_k = sum_i dL_i/df_k
        for i in range(len(y)):
            if i != k:
                case = losses.grad_positive if y[i] == y[k] else losses.grad_negative
                expected = expected + case(f, y, i, k, M, tau)
        close(got[k], expected, f"(D + D^T) F, row {k}")
    rows = f.clone().requires_grad_()
    loss = losses.marginal_contrastive_loss(rows, y, M, tau)
    anchors = sum(bool(sets(y, i)[0]) for i in range(len(y)))
    close(got / anchors, gradient(loss, rows), "the mean over anchors")
    assert losses.marginal_contrastive_grad(f.float(), y, M, 0.001).isfinite().all()


def by_hand(f, y, margin, temperature):
    """`marginal_contrastive_loss` with the gradient of `marginal_contrastive_grad`."""
    arguments = f.detach(), y, margin, temperature
    df = losses.marginal_contrastive_grad(*arguments) / len(y)      # each row has a positive
    return losses.marginal_contrastive_loss(*arguments) + (df * (f - f.detach())).sum()


def test_training_by_hand_derived_gradients_follows_autograd(monkeypatch):
    def run(loss):
        monkeypatch.setattr(cff, "marginal_contrastive_loss", loss)
        torch.manual_seed(0)
        model = vit.build_model("vit-16-2-3", (3, 32, 32), 10, patch_size=8).double()
        optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.004) for layer in model.layers]
        images, labels = train.draw_shapes(200, seed=3)
        augment = train.make_augment("crop", 4, [0.5] * 3, [0.25] * 3,
                                     torch.Generator().manual_seed(0))
        history = [cff.cff_step(model, optimizers, images[rows], labels[rows],
                                lambda x: augment(x).double(), [0.4, 0.25, 0.1], 0.15)
                   for _ in range(5) for rows in torch.arange(200).split(40)]
        return torch.stack(history), weights(model)

    (autograd, there), (hand, here) = run(losses.marginal_contrastive_loss), run(by_hand)
    assert autograd[-1].sum() < autograd[0].sum() - 0.5, "it did not learn: this shows nothing"
    close(hand, autograd, "the losses of 25 updates", 1e-8)
    assert all(torch.allclose(here[name], there[name], atol=1e-6) for name in here)


KINK = torch.tensor([[1.0, 0.0], [0.5, 0.75 ** 0.5], [-1.0, 0.0]], dtype=torch.float64)
KINK_Y = torch.tensor([0, 0, 1])                        # s_01 = 0.5 = 1 - m at m = 0.5
KINK_Z = math.e + math.exp(-1)                          # of anchor 0, tau = 1: Q_01 = 1, s_02 = -1


def test_exactly_at_the_kink_a_pair_is_unsaturated():
    assert not losses.saturated(KINK, KINK_Y, 0.5).any(), \
        "Sec. 3.5: at s = 1 - m exactly a pair is not in R"


def test_exactly_at_the_kink_the_gradient_flows():
    f = KINK.clone().requires_grad_()
    got = gradient(losses.marginal_contrastive_loss(f, KINK_Y, 0.5, 1.0), f)
    close(2 * got, losses.marginal_contrastive_grad(KINK, KINK_Y, 0.5, 1.0), "Eq. 17 at s = 1 - m")


def test_eq18_exactly_at_the_kink():
    expected = -KINK[1] + (math.e * KINK[1] + math.exp(-1) * KINK[2]) / KINK_Z
    close(losses.grad_anchor(KINK, KINK_Y, 0, 0.5, 1.0), expected,
          "Eq. 18 at s = 1 - m, where R is empty")


def test_a6_exactly_at_the_kink():
    expected = (-1 + math.e / KINK_Z) * KINK[0]
    close(losses.grad_positive(KINK, KINK_Y, 0, 1, 0.5, 1.0), expected,
          "Eq. A.6 at s = 1 - m, where R is empty")


# --------------------------------------------------------------------- Section 4.1: Fig. 4a

@pytest.mark.parametrize("arguments, expected", [
    ((0.4, 0.1, 8), [0.4 - 0.3 * l / 7 for l in range(8)]), ((0.4, 0.1, 1), [0.4]),
    ((0, 2, 2), [0, 2]), ((2, 0, 2), [2, 0]),                       # 0..2, both included
    ((0.4, 0.1, 3, "parabolic"), [0.4, 0.1 + 0.3 / 4, 0.1]),
    ((0.4, 0.1, 4, "parabolic"), [0.4, 0.1 + 0.3 * 4 / 9, 0.1 + 0.3 / 9, 0.1]),
    ((0.4, 0.1, 3, "cosine"), [0.4, 0.25, 0.1]),
    ((0.4, 0.1, 5, "cosine"), [0.4, 0.25 + 0.15 * 0.5 ** 0.5, 0.25, 0.25 - 0.15 * 0.5 ** 0.5, 0.1]),
    ((0.4, 0.1, 3, "exponential"), [0.4, 0.2, 0.1]),
    ((2.5, 0.1, 3), None), ((-0.1, 0.1, 3), None), ((0.4, 2.5, 3), None), ((0.4, -0.1, 3), None),
    ((0.4, 0.1, 0), None), ((0.4, 0.1, 3, "steep"), None), ((0.0, 0.1, 3, "exponential"), None),
])
def test_fig4a_margins(arguments, expected):
    try:
        got = losses.margins(*arguments)
    except ValueError:
        assert expected is None, f"Fig. 4a: margins{arguments} is {expected}; got a ValueError"
    else:
        assert expected, f"Fig. 4a: margins{arguments} must raise a ValueError; it gave {got}"
        assert got == pytest.approx(expected), \
            f"Fig. 4a: margins{arguments} is {expected}, from layer 1 to layer L; got {got}"


# ------------------------------------------------------------------ Section 3.4: the networks

def test_patches_put_back_together_are_the_image():
    images = torch.randn(2, 3, 8, 12)
    patches = vit.patchify(images, 4)
    assert patches.shape == (2, 6, 48), ("patching: 8 x 12 pixels of 3 channels are 6 patches of "
                                         f"48 numbers; got {patches.shape}")
    for row in range(2):
        for column in range(3):
            patch = patches[:, 3 * row + column]
            expected = images[:, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4].flatten(1)
            assert torch.equal(patch, expected), (f"patching: patch {3 * row + column}, row {row}, "
                                                  f"column {column}, is not its channels, each row "
                                                  "by row")


def test_section_3_4_attention_is_torchs():
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)                        # torch starts with biases of 0
    ours, old = vit.Attention(12, 3), theirs.state_dict()
    ours.load_state_dict({new + kind: old[name + kind] for name, new in
                          (("in_proj_", "qkv."), ("out_proj.", "out."))
                          for kind in ("weight", "bias")})
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected, _ = theirs.double()(x, x, x)
    close(ours.double()(x), expected, "Sec. 3.4, MSA, as torch.nn.MultiheadAttention")


# names of torch.nn.TransformerEncoderLayer's parameters: ours
TORCHS = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out.",
          "linear1.": "mlp.0.", "linear2.": "mlp.2.", "norm1.": "norm1.", "norm2.": "norm2."}


def test_section_3_4_encoder_layer_is_torchs():
    theirs = torch.nn.TransformerEncoderLayer(12, 3, 24, dropout=0, activation="gelu",
                                              norm_first=True, batch_first=True)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)                        # torch starts with scales of 1, biases of 0
    ours, old = vit.EncoderLayer(12, 3), theirs.state_dict()
    ours.load_state_dict({new + kind: old[name + kind] for name, new in TORCHS.items()
                          for kind in ("weight", "bias")})
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    close(ours.double()(x), theirs.double()(x), "Sec. 3.4, z = MSA(LN(x)) + x, f = MLP(LN(z)) + z, "
          "as torch.nn.TransformerEncoderLayer")


def test_section_3_4_encoder_layers_start_as_torchs_do():
    theirs = torch.nn.TransformerEncoderLayer(128, 4, 256, batch_first=True).state_dict()
    ours = vit.EncoderLayer(128, 4).state_dict()        # uniform or constant: alike in these two
    for name, new in TORCHS.items():
        for kind in ("weight", "bias"):
            mine, other = ours[new + kind], theirs[name + kind]
            assert mine.std().item() == pytest.approx(other.std().item(), rel=0.15), new + kind
            reach = other.abs().max().item()
            assert mine.abs().max().item() == pytest.approx(reach, rel=0.05), new + kind


def test_fig3_projection_and_position_belong_to_layer_1():
    model = vit.build_model("vit-8-2-3", (3, 8, 8), 10)
    x = model.patches(torch.randn(2, 3, 8, 8))
    embedding, encoder = model.layers[0]
    z = torch.relu(x @ embedding.projection.weight.T + embedding.projection.bias)
    expected = encoder(z + embedding.position)
    close(model.layers[0](x), expected, "f_1 = encoder_layer_1(MLP_proj(x) + E_pos)", 1e-6)
    assert [len(list(layer.parameters())) for layer in model.layers] == [15, 12, 12]


def test_eq13_is_the_mean_over_patches_and_table5_has_a_token_instead():
    images = torch.randn(2, 3, 8, 8)
    mean, token = (vit.build_model("vit-8-2-1", (3, 8, 8), 10, pool=p) for p in ("mean", "token"))
    h = mean.layers[0](mean.patches(images))
    close(mean.pool(h), sum(h[:, j] for j in range(4)) / 4, "Eq. 13", 1e-6)
    h = token.layers[0](token.patches(images))
    assert h.shape == (2, 5, 8) and torch.equal(token.pool(h), h[:, 0]), "Table 5"
    start = token.layers[0][0](token.patches(images))
    assert torch.equal(start[0, 0], start[1, 0]), "the class token starts the same for every image"


# ---------------------------------------------------------------------- Fig. 2: labels as inputs

def test_fig2_label_patch_of_a_vit_stands_in_front():
    model = vit.build_model("vit-8-2-2", (3, 8, 8), 10, labels="patch")
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([7, 0, 7, -1])
    patches = model.patches(x, y)
    assert patches.shape == (4, 5, 48) and torch.equal(patches[:, 1:], vit.patchify(x, 4))
    assert torch.equal(patches[0, 0], patches[2, 0]) and not patches[3, 0].any(), "neutral: zeros"
    assert not torch.equal(patches[0, 0], patches[1, 0])
    other = model.patches(torch.randn(1, 3, 8, 8), torch.tensor([7]))
    assert torch.equal(other[0, 0], patches[0, 0]), "a label patch does not depend on the batch"
    token = vit.build_model("vit-8-2-2", (3, 8, 8), 10, pool="token", labels="patch")
    assert token.layers[0](token.patches(x, y)).shape == (4, 6, 8), "class token, label, 4 patches"


def test_fig2b_one_hot_replaces_the_first_pixels_of_an_mlps_input():
    model = vit.build_model("mlp-8-2", (1, 6, 8), 3, labels="one-hot")
    x, y = torch.randn(3, 1, 6, 8), torch.tensor([2, 0, -1])
    expected = x.flatten(1).clone()
    expected[:, :3] = torch.tensor([[0, 0, 4.0], [4, 0, 0], [0, 0, 0]])         # sqrt(48 / 3) = 4
    expected = expected / expected.norm(dim=1, keepdim=True)
    close(model.patches(x, y), expected, "Fig. 2b", 1e-6)


def test_fig2c_eq4_a_random_vector_follows_the_pixels():
    model = vit.build_model("mlp-8-2", (1, 4, 4), 3, labels="random")
    x, y = torch.randn(3, 1, 4, 4), torch.tensor([2, 0, -1])
    vectors = torch.stack([model.labels[2], model.labels[0], torch.zeros(16)])
    expected = torch.cat([x.flatten(1), vectors], dim=1)
    expected = expected / expected.norm(dim=1, keepdim=True)
    close(model.patches(x, y), expected, "Fig. 2c, [x_i; s_i] of Eq. 4", 1e-6)
    close(model.labels[:3].norm(dim=1), torch.full((3,), (16 / 3) ** 0.5), "sqrt(D/classes)", 1e-6)
    assert [tuple(layer[0].weight.shape) for layer in model.layers] == [(8, 32), (8, 8)]


@pytest.mark.parametrize("name, labels", [("vit-8-2-2", "patch"), ("mlp-8-2", "random"),
                                          ("mlp-8-2", "one-hot")])
def test_fig2_labels_of_200_classes_differ_are_saved_and_stay(name, labels):
    model = vit.build_model(name, (3, 16, 16), 200, labels=labels)
    table = model.labels[:200]
    assert (torch.cdist(table, table) + 1e9 * torch.eye(200)).min() > 1
    assert not model.labels[200].any(), "the neutral label"
    assert torch.equal(model.state_dict()["labels"], model.labels), "part of the saved model"
    assert "labels" not in dict(model.named_parameters()), "fixed: no optimizer reaches it"


# ------------------------------------------------------- Section 3.3: Algorithm 1, left; Figs. 1, 8

def small_case(name="vit-8-2-3", labels=None):
    """A small model, an optimizer a layer, six images of three classes, augmentation by noise."""
    torch.manual_seed(0)
    model = vit.build_model(name, (3, 8, 8), 3, labels=labels).double()
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in model.layers]
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    return model, optimizers, x, y, lambda x: x + 0.1 * torch.randn_like(x)


@pytest.fixture
def small():
    return small_case()


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pooled(f):
    """Eq. 13 where there are tokens: (B, T, E) or (B, E) -> (B, E)."""
    return f.mean(dim=1) if f.dim() == 3 else f


@pytest.mark.parametrize("name", ["vit-8-2-3", "mlp-8-3"])
@pytest.mark.parametrize("views", [2, 1])
def test_algorithm1_left_line_by_line(views, name):
    model, optimizers, x, y, _ = small_case(name)
    twin, m, draws = copy.deepcopy(model), [0.4, 0.25, 0.1], [x + 0.1, x - 0.2]
    by_hand = [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in twin.layers]
    for step in range(2):
        shifts = iter([0.1, -0.2])
        got = cff.cff_step(model, optimizers, x, y, lambda x: x + next(shifts), m, 0.3, views)
        inputs, expected = [twin.patches(view) for view in draws[:views]], []
        for l, layer in enumerate(twin.layers):
            outputs = [layer(view) for view in inputs]
            f = torch.cat([pooled(output) for output in outputs])
            loss = slow_loss(f / f.norm(dim=1, keepdim=True), y.repeat(views), m[l], 0.3)
            layer.zero_grad()
            loss.backward()
            by_hand[l].step()
            inputs = [output.detach() for output in outputs]        # from before the update
            expected.append(loss.detach())
        assert got.shape == (3,) and not got.requires_grad, \
            "Algorithm 1: L losses, without a graph"
        close(got, torch.stack(expected),
              f"Algorithm 1, {name}, the losses of the layers in step {step + 1}")
        for part, value in model.state_dict().items():
            close(value, twin.state_dict()[part],
                  f"Algorithm 1, {name}, the weights {part} after step {step + 1}", 1e-8)


def test_algorithm1_is_local(small):
    model, optimizers, x, y, augment = small
    for l, optimizer in enumerate(optimizers):
        def step_and_look(l=l, step=optimizer.step):
            before = [weights(layer) for layer in model.layers]
            holds = gradients_of(model)
            assert holds == [other == l for other in range(3)], \
                f"Algorithm 1: at optimizers[{l}].step() the layers have gradients: {holds}; a " \
                "layer gets one from its own loss alone, and is updated before the next layer runs"
            step()
            for other, layer in enumerate(model.layers):
                assert same(before[other], weights(layer)) == (other != l), \
                    f"Algorithm 1: optimizer {l + 1} moved layer {other + 1}"
            optimizers[l].zero_grad()                   # the next look is for its own gradient

        optimizer.step = step_and_look
    head = weights(model.head)
    cff.cff_step(model, optimizers, x, y, augment, [0.4, 0.25, 0.1], 0.15)
    assert same(head, weights(model.head)) and all(p.grad is None for p in model.head.parameters())


def gradients_of(model):
    """Whether each layer holds a gradient."""
    return [any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
            for layer in model.layers]


def inputs_of(layer):
    """A list that collects what the layer reads, forward pass by forward pass."""
    inputs = []
    layer.register_forward_hook(lambda layer, x, h: inputs.append(x[0]))
    return inputs


def test_table6_one_view_is_one_forward_pass(small):
    model, optimizers, x, y, augment = small
    inputs = [inputs_of(layer) for layer in model.layers]
    cff.cff_step(model, optimizers, x, y, augment, [0.4, 0.25, 0.1], 0.15, views=1)
    assert [len(torch.cat(read)) for read in inputs] == [6, 6, 6], \
        "Algorithm 1 with views=1 (Table 6): one forward pass of each image"


def test_stage_2_of_fig3_moves_the_head_alone(small):
    model, _, x, y, augment = small
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)      # even one that could reach all
    layers, head = weights(model.layers), weights(model.head)
    expected = cross_entropy(cff.predict(model, x + 1, "cff"), y).detach()
    inputs = inputs_of(model.layers[0])
    got = cff.head_step(model, optimizer, x, y, lambda x: x + 1)
    close(got, expected, "cross-entropy of the head's scores of one augmented view")
    assert len(inputs) == 1 and not got.requires_grad
    assert same(layers, weights(model.layers)) and not same(head, weights(model.head))
    assert all(p.grad is None for p in model.layers.parameters())


def test_prediction_is_one_forward_pass(small):
    model, _, x, y, _ = small
    h = model.patches(x)
    for layer in model.layers:
        h = layer(h)
    inputs = inputs_of(model.layers[0])
    close(cff.predict(model, x, "cff"), model.head(h.mean(dim=1)), "scores")
    assert len(inputs) == 1


@pytest.mark.parametrize("method", ["bp", "scl"])
def test_fig1_bp_and_scl_are_plain_pytorch_and_not_local(small, method):
    model, _, x, y, _ = small
    twin = copy.deepcopy(model)

    def encoder(x):
        return twin.layers[2](twin.layers[1](twin.layers[0](twin.patches(x)))).mean(dim=1)
    parameters = model.parameters() if method == "bp" else model.layers.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        twin.zero_grad()
        if method == "bp":
            got = cff.bp_step(model, optimizer, x, y, lambda x: x)
            loss = cross_entropy(twin.head(encoder(x)), y)
        else:
            shifts = iter([0.1, -0.1])
            got = cff.scl_step(model, optimizer, x, y, lambda x: x + next(shifts), 0.15)
            f = normalize(torch.cat([encoder(x + 0.1), encoder(x - 0.1)]))
            loss = slow_loss(f, y.repeat(2), 0.0, 0.15)
        loss.backward()
        close(got, loss.detach(), "the loss")
        assert gradients_of(model) == [True, True, True]
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters()):
                q -= 0.1 * q.grad if q.grad is not None else 0
                close(p, q, "a step of SGD")


# -------------------------------------- Section 3.3: Algorithm 1, right; SymBa; FF Collab; Table 2

@pytest.fixture(params=["vit-8-2-3", "mlp-8-3"])
def labelled(request):
    """As `small`, with labels at the input."""
    return small_case(request.param, "patch" if request.param.startswith("vit") else "one-hot")


def outputs_by_hand(model, x, y):
    """Each layer's pooled output in Algorithm 1, right: what goes on is divided by its norm."""
    h, outputs = model.patches(x, y), []
    for layer in model.layers:
        f = layer(h)
        outputs.append(pooled(f))
        h = torch.stack([f_i / (f_i ** 2).sum().sqrt() for f_i in f])
    return outputs


def goodness_by_hand(model, x, y):
    """G of these outputs, (L, B): mean of squares."""
    return torch.stack([(f ** 2).mean(dim=1) for f in outputs_by_hand(model, x, y)]).detach()


def test_wrong_labels_are_never_right_uniform_and_seeded():
    y = torch.arange(20000) % 5
    wrong = cff.wrong_labels(y, 5, torch.Generator().manual_seed(0))
    counts = torch.bincount(5 * y + wrong, minlength=25).view(5, 5)
    assert not counts.diagonal().any(), "Algorithm 1, right: a wrong label must not be the true one"
    others = counts[~torch.eye(5, dtype=torch.bool)]
    assert (others - 1000).abs().max() < 5 * 1000 ** 0.5, \
        f"Algorithm 1, right: each other class about 1000 times: {others.tolist()}"
    again = cff.wrong_labels(y, 5, torch.Generator().manual_seed(0))
    assert torch.equal(wrong, again), \
        "Algorithm 1, right: the same generator gives the same wrong labels"


def ff_family_step(method, *arguments, seed=5):
    """A step of FF, SymBa or Collab whose wrong labels are those of the seed."""
    generator = torch.Generator().manual_seed(seed)
    if method == "collab":
        return cff.collab_step(*arguments, 2.0, generator)
    loss = {"ff": losses.ff_loss, "symba": losses.symba_loss}[method]
    return cff.ff_step(*arguments, loss, generator)


@pytest.mark.parametrize("method", ["ff", "symba", "collab"])
def test_algorithm1_right_line_by_line(labelled, method):
    model, optimizers, x, _, _ = labelled
    y, twin = torch.tensor([0, 1, 1, 0, 1, 0]), copy.deepcopy(model)            # none of class 2
    y_wrong = cff.wrong_labels(y, 3, torch.Generator().manual_seed(5))
    by_hand = [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in twin.layers]
    draws = itertools.count(1)
    what = f"{method}, {type(model).__name__}"
    for draw in (1, 2):                                 # one draw of augment in each step
        got = ff_family_step(method, model, optimizers, x, y, lambda x: x + next(draws))
        view, expected = x + draw, []
        G1, G2 = goodness_by_hand(twin, view, y), goodness_by_hand(twin, view, y_wrong)
        x1, x2 = twin.patches(view, y), twin.patches(view, y_wrong)
        for l, layer in enumerate(twin.layers):
            f1, f2 = layer(x1), layer(x2)
            g1, g2 = ((pooled(f) ** 2).mean(dim=1) for f in (f1, f2))
            if method == "collab":
                g1, g2 = (g + sum(G[k] for k in range(3) if k != l)
                          for g, G in ((g1, G1), (g2, G2)))
            loss = (torch.log(1 + torch.exp(2 - g1)) + torch.log(1 + torch.exp(g2 - 2))).mean() / 2
            if method == "symba":
                loss = torch.log(1 + torch.exp(g2 - g1)).mean()
            layer.zero_grad()
            loss.backward()
            by_hand[l].step()
            x1, x2 = (torch.stack([f_i / (f_i ** 2).sum().sqrt() for f_i in f]).detach()
                      for f in (f1, f2))
            expected.append(loss.detach())
        assert got.shape == (3,) and not got.requires_grad, \
            "Algorithm 1, right: L losses, without a graph"
        close(got, torch.stack(expected),
              f"Algorithm 1, right: the losses of the layers, {what}, step {draw}")
        for name, value in model.state_dict().items():
            close(value, twin.state_dict()[name],
                  f"Algorithm 1, right: the weights {name} after step {draw}, {what}", 1e-8)


@pytest.mark.parametrize("method", ["ff", "symba", "collab"])
def test_ff_symba_and_collab_are_local(labelled, method):
    model, optimizers, x, y, augment = labelled
    for l, optimizer in enumerate(optimizers):
        def step_and_look(l=l, step=optimizer.step):
            holds = gradients_of(model)
            assert holds == [other == l for other in range(3)], \
                f"Algorithm 1, right: at optimizers[{l}].step() layers have gradients: {holds}; " \
                "a layer gets one from its own loss alone, and is updated before the next runs"
            step()
            optimizers[l].zero_grad()

        optimizer.step = step_and_look
    before, head = [weights(layer) for layer in model.layers], weights(model.head)
    ff_family_step(method, model, optimizers, x, y, augment)
    assert not any(same(old, weights(layer)) for old, layer in zip(before, model.layers))
    assert same(head, weights(model.head))


def test_prediction_has_one_pass_for_each_class(labelled):
    model, _, x, y, _ = labelled
    G = [goodness_by_hand(model, x, torch.full((6,), c)).sum(dim=0) for c in range(3)]
    inputs = inputs_of(model.layers[0])
    for algo in ("ff", "symba", "collab"):
        close(cff.predict(model, x, algo), torch.stack(G, dim=1), "column c: goodness with label c")
    assert sum(len(rows) for rows in inputs) == 3 * 3 * 6, "3 methods, 3 classes, 6 images"
    for name, algo, words in ((model, "hebb", "algo"), (model, "cff", "built without labels"),
                              (small_case()[0], "ff", "built with labels")):
        with pytest.raises(ValueError, match=words):
            cff.predict(name, x, algo)


def test_table2_the_head_reads_all_layers_but_the_first_with_the_neutral_label(labelled):
    model, _, x, y, _ = labelled
    f = torch.cat(outputs_by_hand(model, x, torch.full((6,), -1))[1:], dim=1)
    close(cff.predict(model, x, "ff", head=True), model.head(f), "scores of the head")
    expected = cross_entropy(model.head(f), y).detach()
    optimizer = torch.optim.AdamW(model.head.parameters())
    close(cff.head_step(model, optimizer, x, y, lambda x: x), expected, "its loss")


# ------------------------------------------------ Section 4: the settings of the tables, the data

def settings_of(*flags, out="no-such-run"):
    return train.parse([*map(str, flags), "--out", out])[0]


def test_table1_every_row_is_what_a_data_set_gives_by_default():
    models = {"mnist": "mlp-500-3", "cifar10": "vit-128-4-5", "cifar100": "vit-192-6-6",
              "tinyimagenet": "vit-240-6-7"}
    for dataset, model in models.items():
        for algo in ("ff", "symba", "collab", "cff", "cffm"):
            s = settings_of("--dataset", dataset, "--algo", algo)
            augment = "none" if dataset == "mnist" else "crop"
            assert (s["model"], s["augment"]) == (model, augment)
    metrics = [train.METRIC.get(dataset, "top1") for dataset in models]
    assert metrics == ["top1", "top1", "top5", "top10"]
    s = settings_of("--dataset", "cifar10")
    expected = dict(batch_size=512, lr=0.004, head_lr=0.0005, epochs=600, head_epochs=50,
                    temperature=0.15, m0=0.4, mL=0.1, decay="linear", views=2, pool="mean",
                    schedule="constant", warmup=0, position_std=1.0, patch_size=4, threshold=2.0,
                    alpha=1.0, weight_decay=0.01, padding=4)
    assert {name: s[name] for name in expected} == expected
    assert settings_of("--dataset", "tinyimagenet")["patch_size"] == 8, "64 patches as well"


def test_table3_bp_has_its_rate_and_randaugment_comes_before_the_crop(monkeypatch):
    assert settings_of("--dataset", "cifar10", "--algo", "bp")["lr"] == 0.0005
    monkeypatch.setattr(train, "rand_augment", lambda images, generator: 255 - images)
    x = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(plain("crop+randaug")(x), plain("crop")(255 - x))


def test_table4_missing_data_and_exactly_so_many_wrong_labels():
    images, y = torch.arange(10000)[:, None, None, None], torch.arange(10000) % 10
    given = y.clone()
    for rows, noisy in train.split(images, given, settings_of("--label-noise", 0.4), 10):
        counts = torch.bincount((noisy - y[rows.flatten()]) % 10, minlength=10)
        assert counts[0] == round(0.6 * len(noisy)), "40 % are wrong, in training and validation"
        share = counts[1:] / counts[1:].sum()
        assert (share - 1 / 9).abs().max() < 5 * (1 / 9 / counts[1:].sum()) ** 0.5, "uniformly"
    assert torch.equal(given, y), "the labels that were passed in stay as they are"
    half = train.split(images, y, settings_of("--missing", 0.5), 10)
    assert [len(labels) for _, labels in half] == [4500, 500]


def test_section_4_a_tenth_is_validation_disjoint_and_by_the_seed():
    images, y = torch.arange(1000)[:, None, None, None], torch.arange(1000) % 10

    def rows(*flags):
        parts = train.split(images, y, settings_of(*flags), 10)
        return [part.flatten().tolist() for part, _ in parts]
    fit, val = rows("--seed", 1)
    assert (len(fit), len(val)) == (900, 100) and not set(fit) & set(val)
    assert rows("--seed", 1) == [fit, val] and rows("--seed", 2) != [fit, val]
    assert rows("--seed", 1, "--limit", 90) == [fit[:90], val[:10]]
    with pytest.raises(ValueError, match="--limit 901: there are 900"):
        rows("--limit", 901)


def plain(kind, padding=2, fill="zeros"):
    """make_augment without normalising, back in 0..255."""
    augment = train.make_augment(kind, padding, [0.0] * 3, [1.0] * 3,
                                 torch.Generator().manual_seed(0), fill=fill)
    return lambda images: (255 * augment(images)).round().to(torch.uint8)


@pytest.mark.parametrize("fill, mode", [("zeros", "constant"), ("edge", "replicate")])
def test_section_4_flips_and_crops_are_those_of_each_image(fill, mode):
    images = torch.randint(1, 256, (200, 3, 8, 8), dtype=torch.uint8)
    flipped = plain("flip")(images)
    mirrored = [torch.equal(new, old.flip(2)) for new, old in zip(flipped, images)]
    assert all(m or torch.equal(new, old) for m, new, old in zip(mirrored, flipped, images))
    assert 60 < sum(mirrored) < 140, "each with probability 1/2"
    places, crops = set(), plain("crop", fill=fill)(images)
    for new, old in zip(crops, pad(images.float(), [2] * 4, mode=mode).to(torch.uint8)):
        found = [(r, c, flip) for r in range(5) for c in range(5) for flip in (False, True)
                 if torch.equal(new.flip(2) if flip else new, old[:, r:r + 8, c:c + 8])]
        assert len(found) == 1, "each image is one window of its own padded image"
        places.add(found[0][:2])
    assert len(places) == 25, "every window occurs"


@pytest.mark.parametrize("channels", [3, 1])
def test_table3_randaugment_is_torchvisions_one_image_at_a_time(channels):
    images = torch.randint(256, (300, channels, 32, 32), dtype=torch.uint8)
    space = autoaugment.RandAugment()._augmentation_space(31, (32, 32))
    table = [(name, sign * float(values[14]) if values.dim() else 0.0)
             for name, (values, signed) in space.items() for sign in ((-1, 1) if signed else (1,))]
    counts, nearest = dict.fromkeys(space, 0), autoaugment.InterpolationMode.NEAREST
    generator = torch.Generator().manual_seed(0)
    got = train.rand_augment(images, generator, num_ops=1, groups=100)
    for new, old in zip(got, images):
        variants = [autoaugment._apply_op(old, name, value, nearest, None) for name, value in table]
        found = {name for (name, _), variant in zip(table, variants)
                 if (new.int() - variant.int()).abs().max() <= 1}
        assert found, "none of torchvision's operations, up to a grey level, makes this image"
        for name in found:
            counts[name] += 1 / len(found)
    assert min(counts.values()) > 5, f"each of the 14 operations is drawn: {counts}"


def test_table3_randaugment_deals_the_images_to_other_groups_for_each_operation():
    images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8).expand(140, -1, -1, -1)
    generator, here = torch.Generator().manual_seed(0), torch.get_rng_state()
    once, thrice = (train.rand_augment(images, generator, n, groups=4) for n in (1, 3))
    assert 1 < len(once.unique(dim=0)) <= 4 < len(thrice.unique(dim=0)), "one image, four draws"
    assert torch.equal(torch.get_rng_state(), here), "the global generator stays as it was"


# -------------------------------------------------- Section 4.2-4.4: Eqs. 19-22, Figs. 4b, 5, 6, 7

def slow_fisher(f, y):
    """Eqs. 19-22, entry by entry."""
    E, N, labels = f.shape[1], len(f), sorted(set(y.tolist()))

    def mean(rows):                                     # Eq. 20: m of all rows, m_c of a class
        return [sum(f[i, a].item() for i in rows) / len(rows) for a in range(E)]
    S_w, S_b, m = torch.zeros(E, E).double(), torch.zeros(E, E).double(), mean(range(N))
    for c in labels:
        rows = [i for i in range(N) if y[i] == c]
        m_c = mean(rows)
        for a, b in itertools.product(range(E), repeat=2):          # Eqs. 21 and 19
            S_w[a, b] += sum((f[i, a] - m_c[a]) * (f[i, b] - m_c[b]) for i in rows) / len(rows)
            S_b[a, b] += len(rows) * (m_c[a] - m[a]) * (m_c[b] - m[b]) / N
    return torch.linalg.solve(S_w, S_b).trace().item()                              # Eq. 22


def test_eq19_eq20_eq21_eq22_fisher_criterion_is_a_double_loop():
    f, y = batch(0, n=40, E=4, classes=3)
    g = torch.Generator().manual_seed(1)
    f = f + normalize(torch.randn(3, 4, dtype=f.dtype, generator=g), dim=1)[y]
    assert evaluation.fisher_criterion(f, y) == pytest.approx(slow_fisher(f, y), abs=1e-9)
    turned = f @ torch.tensor([[2.0, 1, 0, 0], [0, 1, 0, 3], [0, 0, 0.5, 0], [1, 0, 0, 1]]).double()
    assert evaluation.fisher_criterion(turned, y) == pytest.approx(slow_fisher(f, y)), \
        "no linear map changes it"
    dead = torch.cat([f, torch.zeros(40, 2).double(), f[:, :1]], dim=1)     # always off; twice
    assert evaluation.fisher_criterion(dead, y) == pytest.approx(slow_fisher(f, y), abs=1e-9)


def test_fig5_row_3_counts_saturated_pairs_and_row_4_takes_median_cosines():
    run = train.Run(settings_of("--model", "vit-16-2-2", "--limit", 180, "--device", "cpu"))
    row, m = train.measure(run), train.layer_margins(run.settings, run.model)
    images, y = run.val
    for l, f in enumerate(train.layer_features(run, images), start=1):
        R = losses.saturated(normalize(f), y, m[l - 1]).sum().item()
        P = sum(len(sets(y, i)[0]) for i in range(len(y)))
        assert row[f"val_saturated_{l}"] == pytest.approx(R / P, abs=1e-6)
    f = normalize(torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [1, 1], [1, 2], [2, 1], [3, 1]]), dim=1)
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    assert evaluation.three_images(f, y) == [0, 3, 5], "of 0 < 0.71 < 0.995, and 0.45 < 0.89 < 0.95"
    with pytest.raises(ValueError, match="no positive"):
        evaluation.three_images(f, torch.arange(7))


def test_fig6_convergence_is_99_percent_of_the_fall():
    def log(*values):
        return [{"val_loss_1": 7.0, "val_loss_2": value} for value in values]
    converged = evaluation.epochs_to_convergence
    assert converged({"algo": "cff"}, log(5, 4.02, 4.011, 4.009, 4, 4.5)) == 4
    assert converged({"algo": "cff"}, log(5, 6, 7)) == 1, "a loss that never fell"
    three = [{"val_loss_1": a, "val_loss_2": b, "val_loss_3": c}
             for a, b, c in ((9, 1, 1), (0, 1, 0.5), (0, 0.5, 0.5))]
    assert converged({"algo": "ff"}, three) == 3, "FF's is the sum without the first layer"


def records(*runs):
    """Groups of one record each, of (settings that differ from the defaults, accuracy)."""
    return [[evaluation.Record("", {**train.DEFAULTS, **s}, {
        "metric": "top1", "val_top1": value, "test_top1": value - 10}, [], [900, 100, 200])]
        for s, value in runs]


@pytest.mark.parametrize("varied, runs, x, y", [
    ("m0", [(dict(m0=0.6), 72), (dict(m0=0.2), 70), (dict(algo="cff"), 69)],        # Fig. 4b
     [0, 1], [70, 72]),
    ("model", [(dict(model="vit-128-4-5"), 50), (dict(model="vit-64-4-4"), 40)],    # Fig. 7
     [0, 1], [40, 50]),
    ("label_noise", [(dict(label_noise=0.2), 60), ({}, 80)], [0, 1], [70, 50]),     # Table 4: test
    ("limit", [(dict(limit=900), 50), (dict(algo="bp"), 40)], [0], [50]),           # not by epoch
])
def test_fig4b_fig7_table4_accuracy_is_drawn_against_what_varies(varied, runs, x, y):
    pytest.importorskip("matplotlib")
    groups, (figure, axis) = records(*runs), evaluation.pyplot().subplots()
    assert evaluation.what_varies(groups) == varied
    evaluation.draw_by_setting(axis, groups, varied)
    line = next(line for line in axis.lines if len(line.get_xdata()) == len(x) and line.get_marker()
                == evaluation.MARKS["cffm"])
    assert list(line.get_xdata()) == x and list(line.get_ydata()) == y
    level = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"]
    assert level == ([69] if varied == "m0" else []), "what has no margins is level"
    evaluation.pyplot().close(figure)


