"""Tests of the paper: losses, gradients, networks, Algorithm 1, settings, results.

    python -m pytest -q                         all tests of the project, in a few minutes
    python -m pytest -q -k eq18                 one equation, table, figure or algorithm

Each loss is compared with a slow, plain version in float64, and each gradient with automatic
differentiation of that version. A failing test names the equation and what differs.
"""
import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import (binary_cross_entropy_with_logits, cross_entropy, fold, normalize,
                                 pad)

import cff
import eval as evaluation
import losses
import train
import vit

TAU = pytest.mark.parametrize("tau", [1.0, 0.15])
torch.set_num_threads(1)                # on a busy machine, threads wait for each other


def batch(seed, n=12, E=3, classes=3):
    """Random rows f (n, E) of length 1 in float64, and labels. For E = 3 some rows are similar."""
    g = torch.Generator().manual_seed(seed)
    f = normalize(torch.randn(n, E, dtype=torch.float64, generator=g), dim=1)
    return f, torch.randint(classes, (n,), generator=g)


def sets(y, i):
    """P(i) and N(i) as lists of row numbers."""
    others = [j for j in range(len(y)) if j != i]
    return [j for j in others if y[j] == y[i]], [j for j in others if y[j] != y[i]]


def slow_anchor_loss(f, y, i, m, tau):
    """L_i of Eq. 17, computed by sums over P(i) and N(i)."""
    P, N = sets(y, i)
    Q = {p: torch.clamp(f[i] @ f[p] + m, max=1) for p in P}
    Z = sum(torch.exp(Q[p] / tau) for p in P) + sum(torch.exp(f[i] @ f[n] / tau) for n in N)
    return -sum(Q[p] / tau for p in P) / len(P) + torch.log(Z)


def slow_loss(f, y, m, tau):
    """Eq. 16 as the mean over the anchors that have a positive."""
    L = [slow_anchor_loss(f, y, i, m, tau) for i in range(len(y)) if sets(y, i)[0]]
    return sum(L) / len(L)


def check(got, expected, what, tolerance=1e-10):
    """Assert that two tensors have the same shape and dtype, and equal numbers up to `tolerance`.
    The message begins with `what` (the equation) and ends with the largest difference."""
    def kind(tensor):
        return f"shape {tuple(tensor.shape)} and {tensor.dtype}"
    assert kind(got) == kind(expected), f"{what}: expected {kind(expected)}; got {kind(got)}"
    if not torch.allclose(got, expected, rtol=0, atol=tolerance):
        off = (got - expected).detach().abs().nan_to_num(math.inf)
        words = f"{(off > tolerance).sum()} of {off.numel()} numbers differ"
        if off.numel() <= 12:
            words = f"expected {expected.tolist()}; got {got.tolist()}"
        raise AssertionError(f"{what}: {words}; the largest difference is {off.max():.3g}")


def gradient(value, x):
    """dvalue/dx. Asserts that the value has a graph."""
    assert value.requires_grad, ("Eqs. 1-17: the result has no graph, so it has no gradient; "
                                 "detach(), .data, .item() and torch.tensor() remove the graph")
    return torch.autograd.grad(value, x)[0]


# ------------------------------------------------- Section 3.1: Eqs. 1 and 2, Section 3.3: Eq. 7

def goodness_pair(seed=0, B=6):
    """Random goodness (2, B) with true and with wrong labels, in float64, between 0 and 4."""
    g = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(2, B, dtype=torch.float64, generator=g)


def test_eq1_goodness_is_the_mean_of_squares():
    h = torch.tensor([[1.0, 2.0, -2.0], [0.0, 6.0, 0.0]], requires_grad=True)
    G = losses.goodness(h)
    check(G, torch.tensor([9 / 3, 36 / 3]), "Eq. 1 / E, the mean of squares of each row", 0)
    check(gradient(G.sum(), h), 2 * h / 3, "the gradient of Eq. 1 / E", 1e-6)


@pytest.mark.parametrize("threshold", [2.0, 0.5])
def test_eq2_is_binary_cross_entropy_with_logits(threshold):
    g_pos, g_neg = goodness_pair().requires_grad_()
    logits = torch.cat([g_pos, g_neg]) - threshold
    expected = binary_cross_entropy_with_logits(logits, (torch.arange(12) < 6).double())
    got = losses.ff_loss(g_pos, g_neg, threshold)
    check(got, expected, "Eq. 2: the mean of its 2B terms, log(1 + exp(theta - G^pos)) and "
          "log(1 + exp(G^neg - theta))")
    check(gradient(got, g_pos), gradient(expected, g_pos), "the gradient of Eq. 2")
    assert losses.ff_loss(torch.tensor([-1e4]), torch.tensor([1e4])) == 1e4, \
        "Eq. 2: log(1 + exp(x)) must not overflow (softplus)"


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_eq7_is_softplus_of_the_difference(alpha):
    g_pos, g_neg = goodness_pair()
    got = losses.symba_loss(g_pos, g_neg, alpha)
    expected = sum(torch.log(1 + torch.exp(-alpha * (p - n))) for p, n in zip(g_pos, g_neg)) / 6
    check(got, expected, "Eq. 7, the mean over the batch")


# ----------------------------------------------- Section 3.3: from FF to CFF, Eqs. 5, 6 and 8-12

def test_eq9_is_eq8_with_the_goodness_of_eq5_and_eq6():
    f, y = batch(0)
    p = [sets(y, i)[0][0] for i in range(len(y))]       # one positive and one negative per anchor
    n = [sets(y, i)[1][0] for i in range(len(y))]
    g_pos, g_neg = (f * f[p]).sum(dim=1), (f * f[n]).sum(dim=1)                     # Eqs. 5, 6
    eq9 = -torch.log(torch.exp(g_pos) / (torch.exp(g_pos) + torch.exp(g_neg)))
    check(losses.symba_loss(g_pos, g_neg), eq9.mean(), "Eq. 9, which is Eq. 8 with this goodness")


def test_eq12_is_eq11_with_eq10_plus_a_constant_if_P_and_N_have_equal_sizes():
    f, y = batch(0, n=5)[0], torch.tensor([0, 0, 0, 1, 2])      # the last two have no positive
    eq11 = 0
    for i in range(3):
        P, N = sets(y, i)
        mean_P, mean_N = torch.exp(f[P] @ f[i]).mean(), torch.exp(f[N] @ f[i]).mean()   # Eq. 10
        eq11 -= torch.log(mean_P / (mean_P + mean_N)) / 3
    check(losses.inner_contrastive_loss(f, y, 1.0), eq11 + math.log(2), "Eq. 12 = Eq. 11 + ln |P|")


# ---------------------------------------------------------- Sections 3.1 and 3.3: Eqs. 3 and 12

def double_loop(f, y, tau, inner):
    """Eq. 3, or Eq. 12 if inner=True, computed by sums over i, p and a."""
    L = []
    for i in range(len(y)):
        P, N = sets(y, i)
        Z = sum(torch.exp(f[i] @ f[a] / tau) for a in P + N)
        if P and inner:
            L.append(-torch.log(sum(torch.exp(f[i] @ f[p] / tau) for p in P) / len(P) / Z))
        elif P:
            L.append(-sum(torch.log(torch.exp(f[i] @ f[p] / tau) / Z) for p in P) / len(P))
    return sum(L) / len(L)


def check_loss(loss_function, slow_version, seed, tau, equation, formula):
    f, y = batch(seed)
    y[0] = 99                                           # anchor 0 has no positive: not counted
    f.requires_grad_()
    got, expected = loss_function(f, y, temperature=tau), slow_version(f, y, tau=tau)
    check(got, expected, f"{equation}, {formula}; i is not in A(i); the loss is the mean over the "
          "anchors that have a positive")
    check(gradient(got, f), gradient(expected, f), f"the gradient of {equation} by automatic "
          "differentiation; one P(i) of this batch is empty")
    assert loss_function(f.float(), y, temperature=0.001).isfinite(), \
        f"{equation}: exp(s/tau) must not overflow (logsumexp)"


@TAU
@pytest.mark.parametrize("seed", range(3))
def test_eq3_is_a_double_loop(tau, seed):
    check_loss(losses.contrastive_loss, partial(double_loop, inner=False), seed, tau, "Eq. 3",
               "-1/|P(i)| sum_{p in P(i)} log( exp(s_ip/tau) / sum_{a in A(i)} exp(s_ia/tau) )")


@TAU
@pytest.mark.parametrize("seed", range(3))
def test_eq12_is_a_double_loop(tau, seed):
    check_loss(losses.inner_contrastive_loss, partial(double_loop, inner=True), seed, tau, "Eq. 12",
               "-log( 1/|P(i)| sum_{p in P(i)} exp(s_ip/tau) / sum_{a in A(i)} exp(s_ia/tau) )")


@TAU
@pytest.mark.parametrize("seed", range(5))
def test_eq12_is_at_most_eq3_by_jensen(tau, seed):
    f, y = batch(seed)
    inner, outer = losses.inner_contrastive_loss(f, y, tau), losses.contrastive_loss(f, y, tau)
    assert inner < outer, f"Eq. 12 must be less than Eq. 3 (Jensen): got {inner} and {outer}"


# ---------------------------------------------------------------------- Section 3.5: Eqs. 14-17

@TAU
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [0.0, 0.1, 0.4, 2.0])
def test_eq15_to_eq17_are_a_double_loop(m, seed, tau):
    check_loss(partial(losses.marginal_contrastive_loss, margin=m), partial(slow_loss, m=m), seed,
               tau, f"Eq. 17 at m = {m}", "-1/|P(i)| sum_p Q_ip/tau + log(sum_p exp(Q_ip/tau) + "
               "sum_n exp(s_in/tau)), Q = min(s + m, 1) only for positives (Eq. 15)")


@TAU
def test_eq14_margin_zero_is_eq3(tau):
    f, y = batch(0)
    check(losses.marginal_contrastive_loss(f, y, 0.0, tau), losses.contrastive_loss(f, y, tau),
          "Eq. 14: at m = 0, Eq. 17 is Eq. 3")


SAME = normalize(torch.ones(10, 4, dtype=torch.float64), dim=1)     # 2B identical rows:
SAME_Y = torch.arange(5).repeat(2)                                  # B = 5 classes in two views
SAME_LOSS = torch.tensor(2 * 5 - 1).double().log()


@TAU
def test_eq3_of_a_collapsed_layer_is_ln_2B_minus_1(tau):
    check(losses.contrastive_loss(SAME, SAME_Y, tau), SAME_LOSS,
          "Eq. 3 for identical rows is ln(2B - 1)")


@TAU
@pytest.mark.parametrize("m", [0.0, 0.4, 2.0])
def test_eq17_of_a_collapsed_layer_is_ln_2B_minus_1(m, tau):
    check(losses.marginal_contrastive_loss(SAME, SAME_Y, m, tau), SAME_LOSS,
          "Eq. 17 for identical rows is ln(2B - 1)")


@pytest.mark.parametrize("change, words", [
    (dict(f=torch.ones(4)), "must be"), (dict(y=torch.zeros(3)), "must be"),
    (dict(margin=-0.1), "margin"), (dict(margin=2.1), "margin"),
    (dict(temperature=0.0), "temperature"), (dict(y=torch.arange(4)), "no row has a positive"),
])
def test_losses_reject_invalid_arguments(change, words):
    arguments = dict(f=torch.eye(4), y=torch.tensor([0, 0, 1, 1]), margin=0.4) | change
    with pytest.raises(ValueError, match=words):
        losses.marginal_contrastive_loss(**arguments)


def test_section_3_5_saturated_pairs_are_positives_above_1_minus_m():
    f, y = batch(0)
    R = losses.saturated(f, y, 0.4)
    for i in range(len(y)):
        P, N = sets(y, i)
        assert R[i].nonzero()[:, 0].tolist() == [p for p in P if f[i] @ f[p] > 1 - 0.4], \
            f"Sec. 3.5: R({i}) must have the positives of row {i} with s > 1 - m, and no others"


# ------------------------------------------------------- Section 3.5 and A.1: Eqs. 18, A.1-A.7

M = 0.4                                 # the margin of these tests


def mixed_batch(seed):
    """A batch f, y and its R. For seeds 0 to 3 some positives are saturated, and some are not."""
    f, y = batch(seed)
    return f, y, losses.saturated(f, y, M)


def autograd_row(f, y, i, k, tau):
    """dL_i/df_k, by automatic differentiation of `slow_anchor_loss`."""
    rows = f.clone().requires_grad_()
    return torch.autograd.grad(slow_anchor_loss(rows, y, i, M, tau), rows)[0][k]


@TAU
def test_a1_a2_a3_a4_lead_from_eq17_to_eq18_a5_and_a6(tau):
    f, y, R = mixed_batch(0)
    for i in range(len(y)):
        P, N = sets(y, i)
        s = f @ f[i]
        Q = {p: torch.tensor(1.0).double() if R[i, p] else s[p] + M for p in P}
        factor = {p: float(not R[i, p]) for p in P}     # Eq. A.3: dQ_ip/df_i = factor * f_p
        Z = sum(torch.exp(Q[p] / tau) for p in P) + torch.exp(s[N] / tau).sum()
        L_i = torch.log(Z) - sum(Q[p] for p in P) / len(P) / tau
        check(L_i, slow_anchor_loss(f, y, i, M, tau), f"Eq. A.1, i = {i}")
        pull = -sum(factor[p] * f[p] for p in P) / len(P)
        push = sum(torch.exp(Q[p] / tau) * factor[p] * f[p] for p in P)
        push = push + torch.exp(s[N] / tau) @ f[N]
        check(losses.grad_anchor(f, y, i, M, tau), (pull + push / Z) / tau, f"Eq. A.2, i = {i}")
        for k in P:                                     # dQ_ik/df_k = factor * f_i
            expected = (-1 / len(P) + torch.exp(Q[k] / tau) / Z) * factor[k] * f[i] / tau
            check(losses.grad_positive(f, y, i, k, M, tau), expected, f"Eq. A.4, i = {i}, k = {k}")


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_eq18_gradient_of_the_anchor(tau, seed):
    f, y, _ = mixed_batch(seed)
    for k in range(len(y)):
        if sets(y, k)[0]:
            check(losses.grad_anchor(f, y, k, M, tau), autograd_row(f, y, k, k, tau),
                  f"Eq. 18, dL_k/df_k by automatic differentiation, k = {k}")


@TAU
def test_eq18_term_by_term(tau):
    f, y, R = mixed_batch(0)
    k = int(R.any(dim=1).nonzero()[0])                  # the first anchor whose R(k) is not empty
    P, N = sets(y, k)
    r, rc = [p for p in P if R[k, p]], [p for p in P if not R[k, p]]
    Z = (len(r) * math.exp(1 / tau) + sum(torch.exp((f[k] @ f[j] + M) / tau) for j in rc)
         + sum(torch.exp(f[k] @ f[n] / tau) for n in N))
    none = torch.zeros(3)                               # the sums over Rc(k) if it is empty
    pull = -1 / len(P) * sum((f[j] for j in rc), none)
    push = (sum((torch.exp((f[k] @ f[j] + M) / tau) * f[j] for j in rc), none)
            + sum(torch.exp(f[k] @ f[n] / tau) * f[n] for n in N))
    check(losses.grad_anchor(f, y, k, M, tau), 1 / tau * (pull + push / Z),
          "Eq. 18, 1/tau [ -1/|P(k)| sum_{r' in Rc(k)} f_r' + (sum_{r' in Rc(k)} "
          "exp((s_kr' + m)/tau) f_r' + sum_{n in N(k)} exp(s_kn/tau) f_n) / Z_k ], "
          f"k = {k}, R = {r}, Rc = {rc}")


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_a5_a_saturated_positive_gets_nothing(tau, seed):
    f, y, R = mixed_batch(seed)
    for i, k in R.nonzero().tolist():
        check(losses.grad_positive(f, y, i, k, M, tau), torch.zeros(3).double(),
              f"Eq. A.5: a saturated pair has no gradient, i = {i}, k = {k}", 0)


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_a6_gradient_of_an_unsaturated_positive(tau, seed):
    f, y, R = mixed_batch(seed)
    for i in range(len(y)):
        for k in sets(y, i)[0]:
            if not R[i, k]:
                check(losses.grad_positive(f, y, i, k, M, tau), autograd_row(f, y, i, k, tau),
                      "Eq. A.6, 1/tau [ -f_i/|P(i)| + exp((s_ik + m)/tau)/Z_i f_i ], "
                      f"i = {i}, k = {k}")


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_a7_gradient_of_a_negative(tau, seed):
    f, y, _ = mixed_batch(seed)
    for i in range(len(y)):
        P, N = sets(y, i)
        for k in N if P else []:                        # L_i is not defined if P(i) is empty
            check(losses.grad_negative(f, y, i, k, M, tau), autograd_row(f, y, i, k, tau),
                  f"Eq. A.7, 1/tau exp(s_ik/tau)/Z_i f_i, i = {i}, k = {k}")


def test_eq18_of_an_anchor_without_positives_is_zero():
    f, y = batch(0)
    y[0] = 99
    check(losses.grad_anchor(f, y, 0, M, 0.15), torch.zeros(3).double(),
          "Eq. 18 for an anchor with an empty P(k)", 0)


def test_a7_of_an_anchor_without_positives_is_zero():
    f, y = batch(0)
    y[0] = 99
    check(losses.grad_negative(f, y, 0, 1, M, 0.15), torch.zeros(3).double(),
          "Eq. A.7 for an anchor with an empty P(i)", 0)


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_whole_gradient_of_the_sum_in_eq16_matches_autograd(tau, seed):
    f, y, _ = mixed_batch(seed)
    y[0] = 99                                           # anchor 0 has no positive
    rows = f.clone().requires_grad_()
    L = [slow_anchor_loss(rows, y, i, M, tau) for i in range(len(y)) if sets(y, i)[0]]
    got = losses.marginal_contrastive_grad(f, y, M, tau)
    check(got, gradient(sum(L), rows), "(D + D^T) f, the gradient of Eq. 16")
    assert losses.marginal_contrastive_grad(f.float(), y, M, 0.001).isfinite().all()


def test_training_with_hand_derived_gradients_matches_autograd(small):
    model, optimizers, x, y, _ = small
    twin = copy.deepcopy(model)
    cff.cff_step(model, optimizers, x, y, lambda x: x, [M, M, M], 0.15, views=1)
    x1 = twin.patches(x)
    for layer in twin.layers:
        f1 = layer(x1)
        f = normalize(twin.pool(f1))
        f.backward(losses.marginal_contrastive_grad(f.detach(), y, M, 0.15) / len(y))
        torch.optim.AdamW(layer.parameters(), lr=0.01).step()
        x1 = f1.detach()
    close_weights(model, twin, "after one step, with autograd and with the gradient by hand")


KINK = torch.tensor([[1.0, 0.0], [0.5, 0.75 ** 0.5], [-1.0, 0.0]], dtype=torch.float64)
KINK_Y = torch.tensor([0, 0, 1])                        # s_01 = 0.5 = 1 - m at m = 0.5
KINK_Z = math.e + math.exp(-1)                          # of anchor 0, tau = 1: Q_01 = 1, s_02 = -1


def test_exactly_at_the_kink_a_pair_is_unsaturated():
    assert not losses.saturated(KINK, KINK_Y, 0.5).any(), \
        "Sec. 3.5: at s = 1 - m exactly a pair is not in R"


def test_exactly_at_the_kink_the_gradient_flows():
    f = KINK.clone().requires_grad_()
    got = gradient(losses.marginal_contrastive_loss(f, KINK_Y, 0.5, 1.0), f)
    check(2 * got, losses.marginal_contrastive_grad(KINK, KINK_Y, 0.5, 1.0), "Eq. 17 at s = 1 - m")


def test_eq18_exactly_at_the_kink():
    expected = -KINK[1] + (math.e * KINK[1] + math.exp(-1) * KINK[2]) / KINK_Z
    check(losses.grad_anchor(KINK, KINK_Y, 0, 0.5, 1.0), expected,
          "Eq. 18 at s = 1 - m, where R(k) is empty")


def test_a6_exactly_at_the_kink():
    expected = (-1 + math.e / KINK_Z) * KINK[0]
    check(losses.grad_positive(KINK, KINK_Y, 0, 1, 0.5, 1.0), expected,
          "Eq. A.6 at s = 1 - m, where R(i) is empty")


# --------------------------------------------------------------------- Section 4.1: Fig. 4a

@pytest.mark.parametrize("arguments, expected", [
    ((0.4, 0.1, 8), [0.4 - 0.3 * l / 7 for l in range(8)]), ((0.4, 0.1, 1), [0.4]),
    ((0, 2, 2), [0, 2]), ((2, 0, 2), [2, 0]),                       # 0 and 2 are allowed
    ((0.4, 0.1, 4, "parabolic"), [0.4, 0.1 + 0.3 * 4 / 9, 0.1 + 0.3 / 9, 0.1]),
    ((0.4, 0.1, 5, "cosine"), [0.4, 0.25 + 0.15 * 0.5 ** 0.5, 0.25, 0.25 - 0.15 * 0.5 ** 0.5, 0.1]),
    ((0.4, 0.1, 3, "exponential"), [0.4, 0.2, 0.1]),
    ((2.5, 0.1, 3), None), ((-0.1, 0.1, 3), None), ((0.4, 2.5, 3), None), ((0.4, -0.1, 3), None),
    ((0.4, 0.1, 0), None), ((0.4, 0.1, 3, "steep"), None), ((0.0, 0.1, 3, "exponential"), None),
])                                                      # None means a ValueError
def test_fig4a_margins(arguments, expected):
    try:
        got = losses.margins(*arguments)
    except ValueError:
        got = None
    assert got == pytest.approx(expected), \
        f"Fig. 4a: margins{arguments} must be {expected} (None: a ValueError); got {got}"


# ------------------------------------------------------------------ Section 3.4: the networks

def test_patches_put_back_together_are_the_image():
    images = torch.randn(2, 3, 8, 12)
    patches = vit.patchify(images, 4)
    assert patches.shape == (2, 6, 48), ("patching: 2 images of 3 x 8 x 12 give 6 patches of 48 "
                                         f"numbers each, (2, 6, 48); got {tuple(patches.shape)}")
    check(fold(patches.transpose(1, 2), (8, 12), 4, stride=4), images, "patching: the image, put "
          "back by fold; patches go row by row, the numbers of a patch channel by channel", 0)


def load_torchs(ours, theirs):
    """Copy the weights of a torch module to our module, which has other names for them."""
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in (("self_attn", "attention"), ("in_proj_", "qkv."), ("out_proj", "out"),
                         ("linear1", "mlp.0"), ("linear2", "mlp.2")):
            name = name.replace(old, new)
        state[name] = value
    ours.load_state_dict(state)


@pytest.fixture
def torchs_layer():
    """torch's encoder layer. All its parameters are random, also biases and scales."""
    layer = torch.nn.TransformerEncoderLayer(12, 3, 24, dropout=0, activation="gelu",
                                             norm_first=True, batch_first=True).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer


def test_section_3_4_attention_is_torchs(torchs_layer):
    ours, x = vit.Attention(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    load_torchs(ours, torchs_layer.self_attn)
    expected, _ = torchs_layer.self_attn(x, x, x)
    check(ours(x), expected, "Sec. 3.4, MSA, as torch.nn.MultiheadAttention")


def test_section_3_4_encoder_layer_is_torchs(torchs_layer):
    ours, x = vit.EncoderLayer(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    load_torchs(ours, torchs_layer)
    check(ours(x), torchs_layer(x), "Sec. 3.4, z = MSA(LN(x)) + x, f = MLP(LN(z)) + z, as "
          "torch.nn.TransformerEncoderLayer")


def test_section_3_4_encoder_layer_is_initialised_as_torchs():
    ours, like_torch = vit.EncoderLayer(128, 4), vit.EncoderLayer(128, 4)
    load_torchs(like_torch, torch.nn.TransformerEncoderLayer(128, 4, 256))
    for (name, value), other in zip(ours.named_parameters(), like_torch.parameters()):
        assert value.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.05), name


def test_fig3_projection_and_position_belong_to_layer_1():
    model = vit.build_model("vit-8-2-3", (3, 8, 8), 10)
    x = model.patches(torch.randn(2, 3, 8, 8))
    embedding, encoder = model.layers[0]
    z = torch.relu(x @ embedding.projection.weight.T + embedding.projection.bias)
    check(model.layers[0](x), encoder(z + embedding.position),
          "Fig. 3: f_1 = encoder_layer_1(MLP_proj(x) + E_pos)", 1e-6)
    assert [len(list(layer.parameters())) for layer in model.layers] == [15, 12, 12]


def test_table5_class_token_comes_first_and_pool_returns_it():
    model = vit.build_model("vit-8-2-1", (3, 8, 8), 10, pool="token")
    x = model.patches(torch.randn(2, 3, 8, 8))
    h = model.layers[0](x)
    assert h.shape == (2, 5, 8) and torch.equal(model.pool(h), h[:, 0])


# ---------------------------------------------------------------------- Fig. 2: labels as inputs

def test_fig2_label_patch_of_a_vit_comes_before_the_image_patches():
    model = vit.build_model("vit-8-2-2", (3, 8, 8), 10, labels="patch")
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([7, 0, 7, -1])
    patches = model.patches(x, y)
    assert patches.shape == (4, 5, 48) and torch.equal(patches[:, 1:], vit.patchify(x, 4))
    assert torch.equal(patches[0, 0], patches[2, 0]) and not patches[3, 0].any(), "neutral: zeros"


def test_fig2b_one_hot_replaces_the_first_pixels_of_an_mlps_input():
    model = vit.build_model("mlp-8-2", (1, 6, 8), 3, labels="one-hot")
    x, y = torch.randn(3, 1, 6, 8), torch.tensor([2, 0, -1])
    expected = x.flatten(1).clone()
    expected[:, :3] = torch.tensor([[0, 0, 4.0], [4, 0, 0], [0, 0, 0]])         # sqrt(48 / 3) = 4
    expected = expected / expected.norm(dim=1, keepdim=True)
    check(model.patches(x, y), expected, "Fig. 2b", 1e-6)


def test_fig2c_eq4_a_random_vector_follows_the_pixels():
    model = vit.build_model("mlp-8-2", (1, 4, 4), 3, labels="random")
    x, y = torch.randn(3, 1, 4, 4), torch.tensor([2, 0, -1])
    vectors = torch.stack([model.labels[2], model.labels[0], torch.zeros(16)])
    expected = torch.cat([x.flatten(1), vectors], dim=1)
    expected = expected / expected.norm(dim=1, keepdim=True)
    check(model.patches(x, y), expected, "Fig. 2c, [x_i; s_i] of Eq. 4", 1e-6)
    check(model.labels[:3].norm(dim=1), torch.full((3,), (16 / 3) ** 0.5), "sqrt(D/classes)", 1e-6)


@pytest.mark.parametrize("name, labels", [("vit-8-2-2", "patch"), ("mlp-8-2", "random"),
                                          ("mlp-8-2", "one-hot")])
def test_fig2_labels_are_distinct_saved_and_fixed_and_unknown_ones_are_rejected(name, labels):
    model = vit.build_model(name, (3, 16, 16), 200, labels=labels)
    table = model.labels[:200]
    assert (torch.cdist(table, table) + 1e9 * torch.eye(200)).min() > 1
    assert torch.equal(model.state_dict()["labels"], model.labels), "Fig. 2: labels are saved"
    assert "labels" not in dict(model.named_parameters()), "Fig. 2: labels are not trained"
    with pytest.raises(ValueError, match="labels must be 0..199, or -1 for neutral"):
        model.patches(torch.zeros(2, 3, 16, 16), torch.tensor([0, 200]))


# ---------------------------------------------------- Section 3.4: Algorithm 1, left; Figs. 1a, 1c

def small_case(name="vit-8-2-3", labels=None):
    """A small model, an optimizer per layer, six images in three classes, `augment` with noise."""
    torch.manual_seed(0)
    model = vit.build_model(name, (3, 8, 8), 3, labels=labels).double()
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in model.layers]
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    return model, optimizers, x, y, lambda x: x + 0.1 * torch.randn_like(x)


@pytest.fixture
def small():
    return small_case()


def weights(module):
    """A copy of a module's state_dict."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    """Whether two state_dicts are equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close_weights(model, twin, what):
    for name, value in model.state_dict().items():
        check(value, twin.state_dict()[name], f"the weights {name} {what}", 1e-8)


def pooled(f):
    """Eq. 13 for (B, T, E), or an MLP's output (B, E) as it is: -> (B, E)."""
    return f.mean(dim=1) if f.dim() == 3 else f


def inputs_of(layer):
    """A list that collects the inputs of a layer, one entry per forward pass."""
    inputs = []
    layer.register_forward_hook(lambda layer, x, h: inputs.append(x[0]))
    return inputs


def gradients_of(model):
    """For each layer, whether it has a gradient: a list of bool."""
    return [any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
            for layer in model.layers]


def check_local(train_step, model, optimizers, algorithm):
    """Assert that the optimizers step in order, each while only its own layer has a gradient."""
    steps = []

    def watched_step(l, step):
        holds = gradients_of(model)
        assert holds == [other == l for other in range(len(optimizers))], \
            f"{algorithm}: at optimizers[{l}].step() only layers[{l}] may have a gradient: " \
            f"each layer has its own loss. Which layers have a gradient: {holds}"
        step()
        optimizers[l].zero_grad()                       # for the check of the next layer
        steps.append(l)

    for l, optimizer in enumerate(optimizers):
        optimizer.step = partial(watched_step, l, optimizer.step)
    train_step()
    assert steps == [0, 1, 2], f"{algorithm}: optimizers 0, 1, 2 must step in order; got {steps}"


def test_eq13_is_the_mean_of_the_patches():
    model, _, x, _, _ = small_case()
    f1 = model.layers[0](model.patches(x))                          # (B, #P, E)
    check(model.pool(f1), sum(f1[:, j] for j in range(4)) / 4, "Eq. 13, the mean over #P = 4")


@pytest.mark.parametrize("name", ["vit-8-2-3", "mlp-8-3"])
@pytest.mark.parametrize("views", [2, 1])
def test_algorithm1_left_line_by_line(views, name):
    model, optimizers, x, y, _ = small_case(name)
    twin, m = copy.deepcopy(model), [0.4, 0.25, 0.1]
    twin_optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in twin.layers]
    for step in (1, 2):
        shifts = iter([0.1, -0.2])                      # augment's first and second view
        got = cff.cff_step(model, optimizers, x, y, lambda x: x + next(shifts), m, 0.3, views)
        inputs, expected = [twin.patches(view) for view in (x + 0.1, x - 0.2)[:views]], []
        for l, layer in enumerate(twin.layers):
            outputs = [layer(view) for view in inputs]
            f = torch.cat([pooled(output) for output in outputs])
            loss = slow_loss(f / f.norm(dim=1, keepdim=True), y.repeat(views), m[l], 0.3)
            layer.zero_grad()
            loss.backward()
            twin_optimizers[l].step()
            inputs = [output.detach() for output in outputs]        # from before the update
            expected.append(loss.detach())
        assert got.shape == (3,) and not got.requires_grad, "Algorithm 1: return L losses, detached"
        check(got, torch.stack(expected),
              f"Algorithm 1: the losses of the layers of {name} in step {step}")
        close_weights(model, twin, f"of {name} after step {step} of Algorithm 1")


def test_algorithm1_is_local(small):
    model, optimizers, x, y, augment = small
    check_local(lambda: cff.cff_step(model, optimizers, x, y, augment, [0.4, 0.25, 0.1], 0.15),
                model, optimizers, "Algorithm 1")
    assert all(p.grad is None for p in model.head.parameters()), "Algorithm 1: no head is trained"


def test_table6_one_view_is_one_forward_pass(small):
    model, optimizers, x, y, augment = small
    inputs = [inputs_of(layer) for layer in model.layers]
    cff.cff_step(model, optimizers, x, y, augment, [0.4, 0.25, 0.1], 0.15, views=1)
    assert [len(torch.cat(read)) for read in inputs] == [6, 6, 6], \
        "Algorithm 1 with views=1 (Table 6): each layer must process each of the 6 images once"


def whole_encoder(model, x):
    """The last layer's pooled output, with its graph through all layers."""
    return torch.nn.Sequential(*model.layers)(model.patches(x)).mean(dim=1)


def test_prediction_is_one_pass_and_stage_2_of_fig3_trains_only_the_head(small):
    model, _, x, y, _ = small
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)      # it could change all weights
    layers, head = weights(model.layers), weights(model.head)
    scores = model.head(whole_encoder(model, x + 1))
    inputs = inputs_of(model.layers[0])
    check(cff.predict(model, x + 1, "cff"), scores, "prediction: the head's scores")
    got = cff.head_step(model, optimizer, x, y, lambda x: x + 1)
    check(got, cross_entropy(scores, y).detach(), "stage 2: cross-entropy of one view")
    assert len(inputs) == 2, "prediction and stage 2 take one forward pass each"
    assert same(layers, weights(model.layers)) and not same(head, weights(model.head))


@pytest.mark.parametrize("method", ["bp", "scl"])
def test_fig1_bp_and_scl_backpropagate_through_all_layers(small, method):
    model, _, x, y, _ = small
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        if method == "bp":
            got = cff.bp_step(model, optimizer, x, y, lambda x: x)
            loss = cross_entropy(twin.head(whole_encoder(twin, x)), y)
        else:
            shifts = iter([0.1, -0.1])                  # augment's first and second view
            got = cff.scl_step(model, optimizer, x, y, lambda x: x + next(shifts), 0.15)
            f = torch.cat([whole_encoder(twin, x + 0.1), whole_encoder(twin, x - 0.1)])
            loss = slow_loss(normalize(f), y.repeat(2), 0.0, 0.15)
        twin_optimizer.zero_grad()
        loss.backward()
        twin_optimizer.step()
        check(got, loss.detach(), f"the loss of {method}")
        close_weights(model, twin, f"after a step of {method} with SGD")


# -------------------------------------- Section 3.4: Algorithm 1, right; SymBa; FF Collab; Table 2

@pytest.fixture(params=["vit-8-2-3", "mlp-8-3"])
def labelled(request):
    """Like `small`, with a model that takes labels."""
    return small_case(request.param, "patch" if request.param.startswith("vit") else "one-hot")


def outputs_by_hand(model, x, y):
    """Each layer's pooled output in Algorithm 1, right. The next layer gets output / norm."""
    h, outputs = model.patches(x, y), []
    for layer in model.layers:
        f = layer(h)
        outputs.append(pooled(f))
        h = torch.stack([f_i / (f_i ** 2).sum().sqrt() for f_i in f])
    return outputs


def goodness_by_hand(model, x, y):
    """The goodness (L, B) of these outputs: the mean of their squares."""
    return torch.stack([(f ** 2).mean(dim=1) for f in outputs_by_hand(model, x, y)]).detach()


def test_wrong_labels_are_never_right_uniform_and_seeded():
    y = torch.arange(20000) % 5
    wrong = cff.wrong_labels(y, 5, torch.Generator().manual_seed(0))
    counts = torch.bincount(5 * y + wrong, minlength=25).view(5, 5)
    assert not counts.diagonal().any(), "Algorithm 1, right: a wrong label must not be the true one"
    others = counts[~torch.eye(5, dtype=torch.bool)]
    assert (others - 1000).abs().max() < 5 * 1000 ** 0.5, \
        f"Algorithm 1, right: each wrong label must occur about 1000 times; got {others.tolist()}"
    assert torch.equal(wrong, cff.wrong_labels(y, 5, torch.Generator().manual_seed(0))), \
        "Algorithm 1, right: generators with the same seed must give the same wrong labels"


def step_with_labels(method, model, optimizers, x, y, augment):
    """One step of FF, SymBa or FF Collab. The generator of the wrong labels has seed 5."""
    generator = torch.Generator().manual_seed(5)
    if method == "collab":
        return cff.collab_step(model, optimizers, x, y, augment, 2.0, generator)
    loss_function = losses.ff_loss if method == "ff" else losses.symba_loss
    return cff.ff_step(model, optimizers, x, y, augment, loss_function, generator)


@pytest.mark.parametrize("method", ["ff", "symba", "collab"])
def test_algorithm1_right_line_by_line(labelled, method):
    model, optimizers, x, _, _ = labelled
    y, twin = torch.tensor([0, 1, 1, 0, 1, 0]), copy.deepcopy(model)            # class 2 is absent
    y_wrong = cff.wrong_labels(y, 3, torch.Generator().manual_seed(5))
    twin_optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in twin.layers]
    draws = iter([1, 2])                                # augment draws once per step
    for draw in (1, 2):
        got = step_with_labels(method, model, optimizers, x, y, lambda x: x + next(draws))
        view, expected = x + draw, []
        G1, G2 = goodness_by_hand(twin, view, y), goodness_by_hand(twin, view, y_wrong)
        x1, x2 = twin.patches(view, y), twin.patches(view, y_wrong)
        for l, layer in enumerate(twin.layers):
            f1, f2 = layer(x1), layer(x2)
            g1, g2 = (pooled(f1) ** 2).mean(dim=1), (pooled(f2) ** 2).mean(dim=1)
            if method == "collab":                      # G1, G2: from before the step
                g1 = g1 + sum(G1[k] for k in range(3) if k != l)
                g2 = g2 + sum(G2[k] for k in range(3) if k != l)
            loss = (torch.log(1 + torch.exp(2 - g1)) + torch.log(1 + torch.exp(g2 - 2))).mean() / 2
            if method == "symba":
                loss = torch.log(1 + torch.exp(g2 - g1)).mean()
            layer.zero_grad()
            loss.backward()
            twin_optimizers[l].step()
            x1 = torch.stack([f / (f ** 2).sum().sqrt() for f in f1]).detach()
            x2 = torch.stack([f / (f ** 2).sum().sqrt() for f in f2]).detach()
            expected.append(loss.detach())
        assert got.shape == (3,) and not got.requires_grad, "Algorithm 1, right: L losses, detached"
        check(got, torch.stack(expected),
              f"Algorithm 1, right: the losses of the layers in step {draw} of {method}")
        close_weights(model, twin, f"after step {draw} of {method} (Algorithm 1, right)")


@pytest.mark.parametrize("method", ["ff", "symba", "collab"])
def test_ff_symba_and_collab_are_local(labelled, method):
    model, optimizers, *data = labelled
    check_local(lambda: step_with_labels(method, model, optimizers, *data), model, optimizers,
                "Algorithm 1, right")


def test_prediction_by_goodness_takes_one_pass_per_class(labelled):
    model, _, x, y, _ = labelled
    G = [goodness_by_hand(model, x, torch.full((6,), c)).sum(dim=0) for c in range(3)]
    inputs = inputs_of(model.layers[0])
    for algo in ("ff", "symba", "collab"):
        check(cff.predict(model, x, algo), torch.stack(G, dim=1), "column c: goodness with label c")
    assert sum(len(rows) for rows in inputs) == 3 * 3 * 6, "3 methods, 3 classes, 6 images"
    with pytest.raises(ValueError, match="built without labels"):
        cff.predict(model, x, "cff")


def test_table2_head_reads_all_layers_except_the_first_with_the_neutral_label(labelled):
    model, _, x, y, _ = labelled
    f = torch.cat(outputs_by_hand(model, x, torch.full((6,), -1))[1:], dim=1)
    check(cff.predict(model, x, "ff", head=True), model.head(f), "Table 2: the head's scores")


# ------------------------------------------------ Section 4: the settings of the tables, the data

def settings_of(*flags, out="no-such-run"):
    """The settings of train.py for these flags."""
    return train.parse([*map(str, flags), "--out", str(out)])[0]


def small_run(monkeypatch, *flags):
    """A run on a CPU with 180 shapes for training, 20 for validation and 20 for testing."""
    data = *train.draw_shapes(200, seed=1), *train.draw_shapes(20, seed=2)
    monkeypatch.setattr(train, "load_data", lambda dataset, folder: data)
    return train.make_run(settings_of("--device", "cpu", *flags))


@pytest.mark.parametrize("name", ["vit-16-2-3", "mlp-16-3"])
@pytest.mark.parametrize("views", [2, 1])
@pytest.mark.parametrize("method", ["cff", "cffm", "scl", "ff", "symba", "collab", "bp",
                                    "head of cffm", "head of symba"])
def test_train_on_and_validate_return_the_losses_of_the_method(monkeypatch, method, views, name):
    run = small_run(monkeypatch, "--model", name, "--algo", method.split()[-1], "--views", views,
                    "--m0", 0.8, "--mL", 0.2, "--temperature", 0.3, "--threshold", 1.5,
                    "--alpha", 3)
    train.begin_stage(run, 2 if "head" in method else 1)
    twin, before = copy.deepcopy(run.model), weights(run.model)
    optimizers = train.make_optimizers(twin, run.settings, run.stage)
    without_training = train.validate(run)
    assert not without_training.requires_grad and not any(gradients_of(run.model))
    assert same(before, weights(run.model)), "validation must not change the weights"
    g, data = run.generator, (*run.val, run.augment)                # x, y, augment
    steps = {
        "cff": lambda: cff.cff_step(twin, optimizers, *data, [0.0, 0.0, 0.0], 0.3, views),
        "cffm": lambda: cff.cff_step(twin, optimizers, *data, [0.8, 0.5, 0.2], 0.3, views),
        "scl": lambda: cff.scl_step(twin, optimizers[0], *data, 0.3, views),
        "ff": lambda: cff.ff_step(
            twin, optimizers, *data, lambda p, n: losses.ff_loss(p, n, 1.5), g),
        "symba": lambda: cff.ff_step(
            twin, optimizers, *data, lambda p, n: losses.symba_loss(p, n, 3.0), g),
        "collab": lambda: cff.collab_step(twin, optimizers, *data, 1.5, g),
        "bp": lambda: cff.bp_step(twin, optimizers[0], *data),
        "head": lambda: cff.head_step(twin, optimizers[0], *data)}
    g.manual_seed(run.settings.seed)                    # the seed that train.validate uses
    expected = steps[method.split()[0]]()
    check(without_training, expected, "train.validate", 1e-6)
    g.manual_seed(run.settings.seed)
    check(train.train_on(run, *run.val), expected, "train.train_on", 1e-6)
    assert not same(before, weights(run.model))


def test_table1_default_settings_are_the_papers():
    models = {"mnist": "mlp-500-3", "cifar10": "vit-128-4-5", "cifar100": "vit-192-6-6",
              "tinyimagenet": "vit-240-6-7"}
    for dataset, model in models.items():
        s = settings_of("--dataset", dataset, "--algo", "ff")
        assert (s.model, s.augment) == (model, "none" if dataset == "mnist" else "crop")
    assert train.METRIC == {"cifar100": "top5", "tinyimagenet": "top10"}, "others: top1"
    expected = dict(batch_size=512, lr=0.004, head_lr=0.0005, epochs=600, head_epochs=50,
                    temperature=0.15, m0=0.4, mL=0.1, decay="linear", views=2, pool="mean",
                    schedule="constant", warmup=0, position_std=1.0, patch_size=4, threshold=2.0,
                    alpha=1.0, weight_decay=0.01, padding=4)
    s = vars(settings_of("--dataset", "cifar10"))
    assert {name: s[name] for name in expected} == expected
    assert settings_of("--dataset", "tinyimagenet").patch_size == 8, "Sec. A.2: 64 patches"


def test_table3_bp_has_its_own_learning_rate_and_randaugment_precedes_the_crop(monkeypatch):
    assert settings_of("--dataset", "cifar10", "--algo", "bp").lr == 0.0005
    monkeypatch.setattr(train, "rand_augment", lambda images, generator: 255 - images)
    x = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(augment_only("crop+randaug")(x), augment_only("crop")(255 - x))


def test_table4_missing_data_and_an_exact_fraction_of_wrong_labels():
    images, y = torch.arange(1000)[:, None, None, None], torch.arange(1000) % 10
    for rows, noisy in train.split(images, y, settings_of("--label-noise", 0.4), 10):
        wrong = (noisy != y[rows.flatten()]).sum()
        assert wrong == round(0.4 * len(noisy)), "40 % are wrong, in both parts"
    half = train.split(images, y, settings_of("--missing", 0.5), 10)
    assert [len(labels) for _, labels in half] == [450, 50]


def test_section_4_images_are_standardised_by_the_training_images(monkeypatch):
    run = small_run(monkeypatch)
    x = run.normalise(run.train[0])                                 # (180, 3, 32, 32)
    std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0)
    check(mean, torch.zeros(3), "the mean of each channel", 1e-4)
    check(std, torch.ones(3), "the standard deviation of each channel", 1e-4)


def test_settings_reach_the_augmentation_the_model_and_the_optimizers(monkeypatch):
    calls = []
    monkeypatch.setattr(train, "make_augment", lambda *args, **options: calls.append(
        (args[:2], options.get("fill"))))
    run = small_run(monkeypatch, "--augment", "flip", "--padding", 3, "--fill", "edge", "--pool",
                    "token", "--weight-decay", 0.3, "--lr", 0.2, "--decay", "parabolic")
    assert (("flip", 3), "edge") in calls and run.model.pooling == "token"
    assert run.margins == losses.margins(0.4, 0.1, 3, "parabolic")
    for optimizer in run.optimizers:
        assert [optimizer.defaults[name] for name in ("lr", "weight_decay")] == [0.2, 0.3]


def test_the_seed_decides_the_weights_and_the_batches(monkeypatch):
    def start(seed):
        run = small_run(monkeypatch, "--seed", seed)
        order = torch.cat(train.batches_of(run, run.train[1], shuffled=True))
        return order, next(run.model.parameters())
    for one, again, other in zip(start(1), start(1), start(2)):
        assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("dataset, shape", [("MNIST", (6, 5)), ("CIFAR10", (6, 5, 3))])
def test_section_4_load_data_keeps_rows_columns_and_parts(monkeypatch, dataset, shape):
    def data_set(folder, train, download=False):
        part = torch.randint(256, (4, *shape), dtype=torch.uint8)
        made[train] = part
        return SimpleNamespace(data=part.numpy(), targets=[int(train)] * 4)
    made = {}
    monkeypatch.setattr(train.torchvision.datasets, dataset, data_set)
    images, y, test_images, test_y = train.load_data(dataset.lower(), "folder")
    assert y.tolist() == [1] * 4 and test_y.tolist() == [0] * 4
    for got, part in ((images, made[True]), (test_images, made[False])):
        assert torch.equal(got[2, -1], part.reshape(4, 6, 5, -1)[2, :, :, -1])


def test_table1_top_k_accuracy(monkeypatch):
    def predict(model, x, algo, head):
        assert (algo, head) == ("symba", True)
        c = (torch.arange(20) - y[x][:, None]) % 20                 # 0 for the right class
        return torch.where(c == 0, -rank[x][:, None] - 0.5, -c)
    monkeypatch.setattr(train, "predict", predict)
    s, model = SimpleNamespace(algo="symba", head=True), SimpleNamespace(num_classes=20)
    y, rank = torch.arange(40) % 20, torch.arange(40) % 8       # rank: classes that score higher
    found = train.accuracy(model, torch.arange(40), y, lambda x: x, s)
    assert found == {k: round(100 * (rank < k).double().mean().item(), 2) for k in (1, 5, 10)}


def test_section_4_split_is_90_to_10_disjoint_and_seeded():
    images, y = torch.arange(1000)[:, None, None, None], torch.arange(1000) % 10

    def rows(*flags):
        parts = train.split(images, y, settings_of(*flags), 10)
        return [part.flatten().tolist() for part, _ in parts]
    fit, val = rows("--seed", 1)
    assert (len(fit), len(val)) == (900, 100) and not set(fit) & set(val)
    assert rows("--seed", 1) == [fit, val] and rows("--seed", 2) != [fit, val]
    assert rows("--seed", 1, "--limit", 90) == [fit[:90], val[:10]]


def augment_only(kind, padding=2, fill="zeros"):
    """train.make_augment without normalisation: uint8 images -> uint8 images."""
    augment = train.make_augment(kind, padding, [0.0] * 3, [1.0] * 3,
                                 torch.Generator().manual_seed(0), fill=fill)
    return lambda images: (255 * augment(images)).round().to(torch.uint8)


@pytest.mark.parametrize("fill, mode", [("zeros", "constant"), ("edge", "replicate")])
def test_section_4_each_image_has_its_own_flip_and_crop(fill, mode):
    images = torch.randint(1, 256, (200, 3, 8, 8), dtype=torch.uint8)
    windows, flips, crops = set(), 0, augment_only("crop", fill=fill)(images)
    for new, old in zip(crops, pad(images.float(), [2] * 4, mode=mode).to(torch.uint8)):
        found = [(r, c, flip) for r in range(5) for c in range(5) for flip in (False, True)
                 if torch.equal(new.flip(2) if flip else new, old[:, r:r + 8, c:c + 8])]
        assert len(found) == 1, "each crop is one window of its own padded image"
        windows.add(found[0][:2])
        flips += found[0][2]
    assert len(windows) == 25, "all 25 windows occur"
    assert 60 < flips < 140, "each image is flipped with probability 1/2"


def test_table3_randaugment_is_torchvisions_and_keeps_the_order_of_the_images(monkeypatch):
    def brighten(num_ops, magnitude):
        assert (num_ops, magnitude) == (1, 14)
        return lambda images: images + 1
    monkeypatch.setattr(train.v2, "RandAugment", brighten)
    x = torch.randint(200, (50, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(train.rand_augment(x, torch.Generator()), x + 3), "three operations"


def test_table3_randaugment_regroups_the_images_for_each_operation():
    images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8).expand(140, -1, -1, -1)
    generator, before = torch.Generator().manual_seed(0), torch.get_rng_state()
    once = train.rand_augment(images, generator, num_ops=1, groups=4).unique(dim=0)
    thrice = train.rand_augment(images, generator, num_ops=3, groups=4).unique(dim=0)
    assert 1 < len(once) <= 4 < len(thrice), "equal images differ only by group"
    again = train.rand_augment(images, generator, num_ops=1, groups=4).unique(dim=0)
    assert once.shape != again.shape or not torch.equal(once, again), "each call draws anew"
    assert torch.equal(torch.get_rng_state(), before), "the global generator must not change"


# -------------------------------------------------------- Sections 4.2, 4.3: Eqs. 19-22, Figs. 5, 6

def test_eq19_eq20_eq21_eq22_fisher_criterion():
    f, y = batch(0, n=40, E=4, classes=3)
    f = f + torch.eye(3, 4, dtype=f.dtype)[y]           # moves the classes apart
    groups = [f[y == c] for c in range(3)]
    means = torch.stack([f_c.mean(dim=0) for f_c in groups])                        # Eq. 20
    S_w = sum(torch.cov(f_c.T, correction=0) for f_c in groups)                     # Eqs. 19, 21
    S_b = torch.cov(means.T, correction=0, fweights=y.bincount())                   # Eq. 19
    expected = pytest.approx(torch.linalg.solve(S_w, S_b).trace().item(), abs=1e-9)     # Eq. 22
    assert evaluation.fisher_criterion(f, y) == expected
    singular = torch.cat([f, torch.zeros(40, 2).double(), f[:, :1]], dim=1)
    assert evaluation.fisher_criterion(singular, y) == expected, "units that are 0 or equal"


def test_fig5_row_3_counts_saturated_pairs(monkeypatch):
    run = small_run(monkeypatch, "--model", "vit-16-2-2")
    row = train.measure(run)
    for part, (images, y) in (("train", run.train), ("val", run.val)):
        P = sum(len(sets(y, i)[0]) for i in range(len(y)))
        for l, f in enumerate(train.layer_features(run, images)):
            R = losses.saturated(normalize(f), y, [0.4, 0.1][l]).sum().item()
            assert row[f"{part}_saturated_{l + 1}"] == pytest.approx(R / P, abs=1e-6)


def test_fig5_row_4_shows_pairs_with_the_median_cosine():
    f = normalize(torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [1, 1], [1, 2], [2, 1], [3, 1]]), dim=1)
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    assert evaluation.three_images(f, y) == [0, 3, 5], "medians of 0, 0.71, 0.995; 0.45, 0.89, 0.95"


def test_fig5_shows_the_losses_of_the_best_epoch_and_cosines_by_layer(monkeypatch):
    run = small_run(monkeypatch, "--model", "vit-16-2-2")
    run.log, run.best_epoch = [{f"val_loss_{l}": 10 * l + i for l in (1, 2)} for i in range(3)], 2
    features = [normalize(f) for f in train.layer_features(run, run.val[0])]
    a, p, n = evaluation.three_images(features[0], run.val[1])      # the same in every layer
    for l, (f, row) in enumerate(zip(features, evaluation.show_layers(run)), start=1):
        got = row["val_loss"], row["Cosine to the positive"], row["to the negative"]
        expected = 10 * l + 1, (f[a] @ f[p]).item(), (f[a] @ f[n]).item()
        assert got == pytest.approx(expected, abs=1e-6)


def test_fig6_convergence_is_99_percent_of_the_drop():
    def log(*losses_of_layer_2):
        return [{"val_loss_1": 7.0, "val_loss_2": value} for value in losses_of_layer_2]
    cff_run, ff_run = settings_of("--algo", "cff"), settings_of("--algo", "ff")
    converged = evaluation.epochs_to_convergence
    assert converged(cff_run, log(5, 4.02, 4.011, 4.009, 4, 4.5)) == 4
    three = [{"val_loss_1": a, "val_loss_2": b, "val_loss_3": c}
             for a, b, c in ((9, 1, 1), (0, 1, 0.5), (0, 0.5, 0.5))]
    assert converged(ff_run, three) == 3, "for FF: the sum over all layers except the first"
