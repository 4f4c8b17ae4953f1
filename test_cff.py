"""The paper as tests, in its order: losses, gradients by hand, the networks, Algorithm 1, data and the real scripts.

    python -m pytest -q                         everything, in a few minutes on two cores
    python -m pytest -q -k eq18                 the tests of one equation, figure or table

Each loss stands beside a slow, obvious twin in float64; each gradient beside automatic differentiation of that twin.
"""
import copy
import csv
import functools
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torchvision
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize, one_hot, pad, softplus
from torchvision.transforms import autoaugment
from torchvision.transforms.functional import to_pil_image

import cff
import eval as evaluation
import losses
import train
import vit

HERE = Path(__file__).parent
TAU = pytest.mark.parametrize("tau", [1.0, 0.15])


def task(number):
    """Marks a test as one that grades this task of the classroom; `-k task04` picks task 4."""
    def mark(test):
        setattr(test, f"task{number:02d}", True)
        return test
    return mark


def batch(seed, n=12, E=3, classes=3):
    """Random normalised rows f (n, E) in float64 and labels; in few dimensions, so that some positives are very close."""
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, E, dtype=torch.float64, generator=g), dim=1), torch.randint(classes, (n,), generator=g)


def sets(y, i):
    """P(i) and N(i) as lists of rows."""
    others = [j for j in range(len(y)) if j != i]
    return [j for j in others if y[j] == y[i]], [j for j in others if y[j] != y[i]]


def slow_anchor_loss(f, y, i, m, tau):
    """L_i of Eq. 17, written as sums over P(i) and N(i)."""
    P, N = sets(y, i)
    Q = lambda j: torch.clamp(f[i] @ f[j] + m, max=1)
    Z = sum(torch.exp(Q(p) / tau) for p in P) + sum(torch.exp(f[i] @ f[n] / tau) for n in N)
    return -sum(Q(p) / tau for p in P) / len(P) + torch.log(Z)


def slow_loss(f, y, m, tau):
    """Eq. 16 as the mean over the anchors that have a positive."""
    L = [slow_anchor_loss(f, y, i, m, tau) for i in range(len(y)) if sets(y, i)[0]]
    return sum(L) / len(L)


def close(got, expected, what, tolerance=1e-10):
    """Assert in words: which equation, what was expected, what came; of many numbers, the one that differs most."""
    kind = lambda tensor: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    assert kind(got) == kind(expected), f"{what}: expected a tensor {kind(expected)}; got {kind(got)}"
    if not torch.allclose(got, expected, rtol=0, atol=tolerance):
        off = (got - expected).detach().abs().nan_to_num(math.inf)
        words = f"expected {expected.tolist()}; got {got.tolist()}" if off.numel() <= 12 else f"{(off > tolerance).sum()} of {off.numel()} numbers differ"
        raise AssertionError(f"{what}: {words}; the largest difference is {off.max():.3g}")


def gradient(value, x):
    """dvalue/dx; in words if the value has no graph."""
    assert value.requires_grad, "the gradient of Eqs. 1-17: what was computed has none; detach(), .data, .item() and torch.tensor() cut it off"
    return torch.autograd.grad(value, x)[0]


# --------------------------------------------------------------------- the worked example: four unit vectors in the plane, two classes

FOUR = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
TWO = torch.tensor([0, 0, 1, 1])
e = math.exp


def four(text, *numbers):
    """(what `close` says, expected) of the worked example: m = 0.4, tau = 1, f and y as in the README."""
    return torch.tensor(numbers if len(numbers) > 1 else numbers[0], dtype=torch.float64), f"four vectors, {text}"


@task(1)
def test_worked_example_of_goodness():
    close(losses.goodness(torch.tensor([[3.0, 4.0, 0.0, 0.0]])), torch.tensor([6.25]), "Eq. 1 / E of [3, 4, 0, 0]", 1e-6)
    got = losses.ff_loss(torch.tensor([2.0]), torch.tensor([2.0]), 2.0)
    close(got, torch.tensor(math.log(2)), "Eq. 2 at G^pos = G^neg = theta, ln 2", 1e-6)


@task(2)
def test_worked_example_of_eq3():
    Z = [e(0.8) + 1 + e(-1), e(0.8) + e(0.6) + e(-0.8), 1 + 1 + e(0.6), 1 + e(-1) + e(-0.8)]
    L = [math.log(Z[0]) - 0.8, math.log(Z[1]) - 0.8, math.log(Z[2]), math.log(Z[3])]
    close(losses.contrastive_loss(FOUR, TWO, 1.0), *four("Eq. 3, the mean of ln Z_i - s_ip", sum(L) / 4))


@task(3)
def test_worked_example_of_eq12():
    f, y = FOUR[[0, 1, 2, 3]], torch.tensor([0, 0, 0, 1])           # three of one class; row 3 has no positive
    Z = [e(0.8) + 1 + e(-1), e(0.8) + e(0.6) + e(-0.8), 1 + e(0.6) + 1]
    L = [-math.log((a + b) / 2 / z) for (a, b), z in zip([(e(0.8), 1), (e(0.8), e(0.6)), (1, e(0.6))], Z)]
    close(losses.inner_contrastive_loss(f, y, 1.0), *four("Eq. 12 with y = [0, 0, 0, 1]", sum(L) / 3))


@task(4)
def test_worked_example_of_the_margin():
    R = losses.saturated(FOUR, TWO, 0.4)
    assert R.nonzero().tolist() == [[0, 1], [1, 0]], f"four vectors, Sec. 3.5: R(0) = {{1}}, R(1) = {{0}}, no other; got {R.nonzero().tolist()}"
    Z = [e(1) + 1 + e(-1), e(1) + e(0.6) + e(-0.8), e(0.4) + 1 + e(0.6), e(0.4) + e(-1) + e(-0.8)]
    L = [math.log(Z[0]) - 1, math.log(Z[1]) - 1, math.log(Z[2]) - 0.4, math.log(Z[3]) - 0.4]
    close(losses.marginal_contrastive_loss(FOUR, TWO, 0.4, 1.0), *four("Eq. 17, the mean of ln Z_i - Q_ip, Q = 1, 1, 0.4, 0.4", sum(L) / 4))


@task(5)
def test_worked_example_of_eq18():
    Z0, Z2 = e(1) + 1 + e(-1), e(0.4) + 1 + e(0.6)
    close(losses.grad_anchor(FOUR, TWO, 0, 0.4, 1.0), *four("Eq. 18, k = 0: Rc is empty, (e^0 f_2 + e^-1 f_3) / Z_0", -e(-1) / Z0, 1 / Z0))
    expected = 1 + (-e(0.4) + 1 + 0.8 * e(0.6)) / Z2, 0.6 * e(0.6) / Z2
    close(losses.grad_anchor(FOUR, TWO, 2, 0.4, 1.0), *four("Eq. 18, k = 2: -f_3 + (e^0.4 f_3 + e^0 f_0 + e^0.6 f_1) / Z_2", *expected))


@task(6)
def test_worked_example_of_a5_a6_a7():
    Z0, Z2 = e(1) + 1 + e(-1), e(0.4) + 1 + e(0.6)
    close(losses.grad_positive(FOUR, TWO, 0, 1, 0.4, 1.0), *four("Eq. A.5, i = 0, k = 1 in R(0): nothing", 0.0, 0.0))
    close(losses.grad_positive(FOUR, TWO, 2, 3, 0.4, 1.0), *four("Eq. A.6, i = 2, k = 3: (-1 + e^0.4 / Z_2) f_2", 0.0, e(0.4) / Z2 - 1))
    close(losses.grad_negative(FOUR, TWO, 0, 2, 0.4, 1.0), *four("Eq. A.7, i = 0, k = 2: e^0 / Z_0 f_0", 1 / Z0, 0.0))


def test_worked_example_in_the_readme():
    """The numbers that the README carries by hand, computed."""
    page = (HERE / "README.md").read_text().split("### Four vectors, by hand")[1].split("## See what was learned")[0]
    P, N = zip(*[sets(TWO, i) for i in range(4)])
    s, shown = FOUR @ FOUR.T, []
    for i in range(4):
        Q = min(s[i, P[i][0]].item() + 0.4, 1)
        Z = e(Q) + sum(e(s[i, n]) for n in N[i])
        shown += [f"= {Z:.4f} |", f"| {math.log(Z) - Q:.4f} |"]
    vectors = losses.grad_anchor(FOUR, TWO, 0, 0.4, 1), losses.grad_anchor(FOUR, TWO, 2, 0.4, 1)
    shown += [f"({v[0]:.4f}, {v[1]:.4f})" for v in vectors] + [f"is {slow_loss(FOUR, TWO, 0.4, 1):.4f}"]
    shown += [f"(0, {losses.grad_positive(FOUR, TWO, 2, 3, 0.4, 1)[1]:.4f})", f"({losses.grad_negative(FOUR, TWO, 0, 2, 0.4, 1)[0]:.4f}, 0)"]
    three = torch.tensor([0, 0, 0, 1])
    shown += [f"the loss is {losses.contrastive_loss(FOUR, TWO, 1):.4f}", f"Eq. 3's {losses.contrastive_loss(FOUR, three, 1):.4f}",
              f"the loss is {losses.inner_contrastive_loss(FOUR, three, 1):.4f}"]
    for number in shown:
        assert number in page, f"not in the README: {number}"


# ------------------------------------------------------------------------------------- Section 3.1: Eqs. 1 and 2, Section 3.3: Eq. 7

def goodness_pair(seed=0, B=6):
    """Goodness (B,) with the true and with a wrong label, in float64, far from 0 as well."""
    g = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(2, B, dtype=torch.float64, generator=g)


@task(1)
def test_eq1_goodness_is_the_mean_of_squares():
    h = torch.tensor([[1.0, 2.0, -2.0], [0.0, 6.0, 0.0]], requires_grad=True)
    G = losses.goodness(h)
    close(G, torch.tensor([9 / 3, 36 / 3]), "Eq. 1 / E, the mean of squares of each row", 0)
    close(gradient(G.sum(), h), 2 * h / 3, "the gradient of Eq. 1 / E", 1e-6)


@task(1)
@pytest.mark.parametrize("threshold", [2.0, 0.5])
def test_eq2_is_binary_cross_entropy_with_logits(threshold):
    g_pos, g_neg = goodness_pair().requires_grad_()
    expected = sum(torch.log(1 + torch.exp(threshold - p)) + torch.log(1 + torch.exp(n - threshold)) for p, n in zip(g_pos, g_neg))
    got = losses.ff_loss(g_pos, g_neg, threshold)
    close(got, expected / 12, "Eq. 2, log(1 + exp(theta - G^pos)) + log(1 + exp(G^neg - theta)), the mean of its 2B terms")
    close(gradient(got, g_pos), gradient(expected / 12, g_pos), "the gradient of Eq. 2")
    logits, real = torch.cat([g_pos, g_neg]) - threshold, torch.arange(12) < 6
    close(losses.ff_loss(g_pos, g_neg, threshold), binary_cross_entropy_with_logits(logits, real.double()), "Eq. 2")
    assert losses.ff_loss(torch.tensor([-1e4]), torch.tensor([1e4])) == 1e4, "Eq. 2: log(1 + exp(x)) must not overflow (softplus)"


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_eq7_is_softplus_of_the_difference(alpha):
    g_pos, g_neg = goodness_pair()
    close(losses.symba_loss(g_pos, g_neg, alpha), softplus(alpha * (g_neg - g_pos)).mean(), "Eq. 7")
    expected = sum(torch.log(1 + torch.exp(-alpha * (p - n))) for p, n in zip(g_pos, g_neg)) / 6
    close(losses.symba_loss(g_pos, g_neg, alpha), expected, "Eq. 7, the mean over the batch")


# ------------------------------------------------------------------------ Section 3.3: from FF to CFF, Eqs. 4-6 and 8-12

def drawn_loss(f, i, p, n):
    """Eq. 9 for anchor i and the drawn p in P(i), n in N(i)."""
    return -torch.log(torch.exp(f[i] @ f[p]) / (torch.exp(f[i] @ f[p]) + torch.exp(f[i] @ f[n])))


def mean_exp(f, i, rows):
    """Eq. 10: the mean of exp(f_i . f_j) over the rows j that can be drawn."""
    return sum(torch.exp(f[i] @ f[j]) for j in rows) / len(rows)


def test_eq4_the_goodness_of_image_and_label_vector_side_by_side():
    model = vit.build_model("mlp-5-2", (1, 2, 3), 4, labels="random")
    x, y = torch.randn(2, 1, 2, 3), torch.tensor([3, 1])
    joined = torch.stack([torch.cat([x[i].flatten(), model.labels[y[i]]]) for i in range(2)])          # [x_i; s_i], 2D
    f = model.layers[0](joined / joined.norm(dim=1, keepdim=True))
    close(cff.layer_goodness(model, x, y)[0], (f.norm(dim=1) ** 2 / 5).detach(), "Eq. 4 / E", 1e-6)


def test_eq5_the_squared_length_of_a_sum_of_unit_vectors_is_2_plus_twice_eq6():
    """Arithmetic of the derivation: why a similarity f_i . f_p can stand for a goodness, a squared length."""
    f, y = batch(0)
    for i in range(len(y)):
        P, N = sets(y, i)
        close((f[i] + f[P[0]]).norm() ** 2, 2 + 2 * f[i] @ f[P[0]], "2 + 2 G of Eq. 6")


def test_eq8_is_eq7_at_alpha_1():
    g_pos, g_neg = goodness_pair()
    eq8 = -torch.log(torch.exp(g_pos) / (torch.exp(g_pos) + torch.exp(g_neg)))
    close(losses.symba_loss(g_pos, g_neg, alpha=1.0), eq8.mean(), "Eq. 8")


def test_eq9_is_eq8_with_the_goodness_of_eq6():
    f, y = batch(0)
    p, n = zip(*[(sets(y, i)[0][0], sets(y, i)[1][0]) for i in range(len(y))])
    g_pos, g_neg = (f * f[list(p)]).sum(dim=1), (f * f[list(n)]).sum(dim=1)                            # Eq. 6
    eq9 = sum(drawn_loss(f, i, p[i], n[i]) for i in range(len(y))) / len(y)
    close(losses.symba_loss(g_pos, g_neg), eq9, "Eq. 9")


def test_eq11_has_the_means_of_eq10_inside_and_is_not_the_mean_of_eq9():
    (f, y), differences = batch(0), []
    for i in range(len(y)):
        P, N = sets(y, i)
        a, b = mean_exp(f, i, P), mean_exp(f, i, N)
        eq11 = -torch.log(a / (a + b))
        differences.append(sum(drawn_loss(f, i, p, n) for p in P for n in N) / len(P) / len(N) - eq11)
    assert max(map(abs, differences)) > 0.01, "the average of Eq. 9 over its draws is another number"


@pytest.mark.parametrize("seed", range(3))
def test_eq12_minus_eq11_lies_between_ln_P_and_ln_N(seed):
    f, y = batch(seed)
    differences = []
    for i in range(len(y)):
        P, N = sets(y, i)
        if P:
            a, b = mean_exp(f, i, P), mean_exp(f, i, N)
            eq12 = -torch.log(a / (len(P) * a + len(N) * b))
            differences.append(eq12 + torch.log(a / (a + b)))
            low, high = sorted([math.log(len(P)), math.log(len(N))])
            assert low <= differences[-1] <= high, f"anchor {i}: {differences[-1]} is not in {low}..{high}"
    eq11 = sum(-torch.log(mean_exp(f, i, P) / (mean_exp(f, i, P) + mean_exp(f, i, N)))
               for i in range(len(y)) for P, N in [sets(y, i)] if P) / len(differences)
    close(losses.inner_contrastive_loss(f, y, 1.0), eq11 + sum(differences) / len(differences), "Eq. 12 = Eq. 11 + the differences")


# ------------------------------------------------------------------------------------------ Section 3.1: Eqs. 3 and 12

@task(2)
@TAU
@pytest.mark.parametrize("seed", range(3))
def test_eq3_is_a_double_loop(tau, seed):
    f, y = batch(seed)
    f, y[0], L = f.requires_grad_(), 99, []                         # an anchor without positives is not counted
    for i in range(len(y)):
        P, N = sets(y, i)
        Z = sum(torch.exp(f[i] @ f[a] / tau) for a in P + N)
        if P:
            L.append(-sum(torch.log(torch.exp(f[i] @ f[p] / tau) / Z) for p in P) / len(P))
    got = losses.contrastive_loss(f, y, tau)
    assert len(L) < len(y)
    close(got, sum(L) / len(L), "Eq. 3, -1/|P(i)| sum_{p in P(i)} log( exp(s_ip/tau) / sum_{a in A(i)} "
          "exp(s_ia/tau) ), A(i) without i itself, the mean over the anchors that have a positive")
    close(gradient(got, f), gradient(sum(L) / len(L), f), "the gradient of Eq. 3 by automatic differentiation, beside an anchor with an empty P(i)")
    assert losses.contrastive_loss(f.float(), y, 0.001).isfinite(), "Eq. 3: exp(s/tau) must not overflow (logsumexp)"


@task(3)
@TAU
@pytest.mark.parametrize("seed", range(3))
def test_eq12_is_a_double_loop(tau, seed):
    f, y = batch(seed)
    f, y[0], L = f.requires_grad_(), 99, []
    for i in range(len(y)):
        P, N = sets(y, i)
        Z = sum(torch.exp(f[i] @ f[a] / tau) for a in P + N)
        if P:
            L.append(-torch.log(sum(torch.exp(f[i] @ f[p] / tau) for p in P) / len(P) / Z))
    got = losses.inner_contrastive_loss(f, y, tau)
    close(got, sum(L) / len(L), "Eq. 12, -log( 1/|P(i)| sum_{p in P(i)} exp(s_ip/tau) / "
          "sum_{a in A(i)} exp(s_ia/tau) ), the mean over the anchors that have a positive")
    close(gradient(got, f), gradient(sum(L) / len(L), f), "the gradient of Eq. 12 by automatic differentiation, beside an anchor with an empty P(i)")
    assert losses.inner_contrastive_loss(f.float(), y, 0.001).isfinite(), "Eq. 12: exp(s/tau) must not overflow (logsumexp)"


@task(3)
@TAU
@pytest.mark.parametrize("seed", range(5))
def test_eq12_is_at_most_eq3_by_jensen(tau, seed):
    f, y = batch(seed)
    inner, outer = losses.inner_contrastive_loss(f, y, tau), losses.contrastive_loss(f, y, tau)
    assert inner < outer, f"Eq. 12 gave {inner}, Eq. 3 gave {outer}; the mean inside the logarithm is the smaller loss"


# ------------------------------------------------------------------------------------------------ Section 3.5: Eqs. 14-17

@task(4)
@TAU
@pytest.mark.parametrize("m", [0.0, 0.1, 0.4, 2.0])
def test_eq15_to_eq17_are_a_double_loop(tau, m):
    for seed in range(3):
        f, y = batch(seed)
        f, y[0] = f.requires_grad_(), 99
        got, expected = losses.marginal_contrastive_loss(f, y, m, tau), slow_loss(f, y, m, tau)
        close(got, expected, f"Eq. 17, -1/|P(i)| sum_p Q_ip/tau + log(sum_p exp(Q_ip/tau) + "
              f"sum_n exp(s_in/tau)), Q = min(s + m, 1) for positives alone (Eq. 15), at m = {m}")
        close(gradient(got, f), gradient(expected, f), f"the gradient of Eq. 17 by automatic differentiation, none through saturated pairs, at m = {m}")
    assert losses.marginal_contrastive_loss(f.float(), y, m, 0.001).isfinite(), "Eq. 17: exp(Q/tau) must not overflow (logsumexp)"


@task(4)
@TAU
def test_eq14_margin_zero_is_eq3(tau):
    f, y = batch(0)
    close(losses.marginal_contrastive_loss(f, y, 0.0, tau), losses.contrastive_loss(f, y, tau), "Eq. 14, at m = 0 Eq. 17 is Eq. 3")


def collapsed(B):
    """2B identical rows, B images in two views, each of its own class; and the loss that they have, ln(2B - 1)."""
    return normalize(torch.ones(2 * B, 4, dtype=torch.float64), dim=1), torch.arange(B).repeat(2), torch.tensor(2 * B - 1).double().log()


@task(2)
@TAU
@pytest.mark.parametrize("B", [2, 5])
def test_eq3_of_a_collapsed_layer_is_ln_2B_minus_1(B, tau):
    f, y, expected = collapsed(B)
    close(losses.contrastive_loss(f, y, tau), expected, "Eq. 3 of identical rows, ln(2B - 1)")


@task(4)
@TAU
@pytest.mark.parametrize("B", [2, 5])
@pytest.mark.parametrize("m", [0.0, 0.4, 2.0])
def test_eq17_of_a_collapsed_layer_is_ln_2B_minus_1(m, B, tau):
    f, y, expected = collapsed(B)
    close(losses.marginal_contrastive_loss(f, y, m, tau), expected, "Eq. 17 of identical rows, ln(2B - 1)")


@TAU
def test_losses_do_not_depend_on_the_order_of_the_batch(tau):
    f, y = batch(1)
    order = torch.randperm(len(y))
    for loss in (lambda f, y: losses.contrastive_loss(f, y, tau), lambda f, y: losses.inner_contrastive_loss(f, y, tau),
                 lambda f, y: losses.marginal_contrastive_loss(f, y, 0.4, tau)):
        close(loss(f[order], y[order]), loss(f, y), "the loss of the rows in another order")


def test_eq17_of_one_view_and_of_two():
    f, y = batch(2, n=8)
    g, _ = batch(3, n=8)
    two, labels = torch.cat([f, g]), torch.cat([y, y])
    close(losses.marginal_contrastive_loss(two, labels, 0.4), slow_loss(two, labels, 0.4, 0.15), "two views")
    close(losses.marginal_contrastive_loss(f, y, 0.4), slow_loss(f, y, 0.4, 0.15), "one view")
    unlike = torch.arange(8)                                        # every image of another class: only the other view is left
    assert losses.marginal_contrastive_loss(two, torch.cat([unlike, unlike]), 0.4) > 0
    with pytest.raises(ValueError, match="no row has a positive"):
        losses.marginal_contrastive_loss(f, unlike, 0.4)


@pytest.mark.parametrize("change, words", [
    (dict(f=torch.ones(4)), "must be"), (dict(y=torch.zeros(3)), "must be"), (dict(margin=-0.1), "margin"),
    (dict(margin=2.1), "margin"), (dict(temperature=0.0), "temperature"), (dict(temperature=-1.0), "temperature"),
    (dict(y=torch.arange(4)), "no row has a positive"),
])
def test_losses_refuse_what_makes_no_sense(change, words):
    arguments = dict(f=torch.eye(4), y=torch.tensor([0, 0, 1, 1]), margin=0.4, temperature=0.15) | change
    with pytest.raises(ValueError, match=words):
        losses.marginal_contrastive_loss(**arguments)
    if "margin" not in change:
        del arguments["margin"]
        for loss in (losses.contrastive_loss, losses.inner_contrastive_loss):
            with pytest.raises(ValueError, match=words):
                loss(**arguments)


def test_defaults_are_those_of_the_paper_and_its_code():
    defaults = lambda function: {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    for loss in (losses.contrastive_loss, losses.inner_contrastive_loss, losses.marginal_contrastive_loss):
        assert defaults(loss) == {"temperature": 0.15}
    assert defaults(losses.ff_loss) == {"threshold": 2.0} and defaults(losses.symba_loss) == {"alpha": 1.0}
    assert defaults(losses.margins) == {"decay": "linear"} and defaults(cff.collab_step)["threshold"] == 2.0


def test_the_whole_gradient_is_stable_at_a_small_temperature():
    f, y = batch(0)
    assert losses.marginal_contrastive_grad(f.float(), y, 0.4, 0.001).isfinite().all()          # exp(1/0.001) overflows


@task(4)
def test_section_3_5_saturated_pairs_are_positives_above_1_minus_m():
    f, y = batch(0)
    R = losses.saturated(f, y, 0.4)
    for i in range(len(y)):
        P, N = sets(y, i)
        assert R[i].nonzero()[:, 0].tolist() == [p for p in P if f[i] @ f[p] > 1 - 0.4], f"Sec. 3.5: R({i}), the positives of {i} with s > 1 - m"
    assert not losses.saturated(f, y, 0.0).any(), "Sec. 3.5: at m = 0 nothing is saturated"
    everything = sum(len(sets(y, i)[0]) for i in range(len(y)))
    assert losses.saturated(f, y, 2.0).sum() == everything, "Sec. 3.5: at m = 2 every positive is saturated, no negative, not i itself"


# ------------------------------------------------------------------------ Section 3.5 and A.1: Eqs. 18, A.5, A.6, A.7

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


@task(5)
@TAU
@pytest.mark.parametrize("seed", range(4))
def test_eq18_gradient_of_the_anchor(tau, seed):
    f, y, R = mixed_batch(seed)
    for k in range(len(y)):
        if sets(y, k)[0]:
            close(losses.grad_anchor(f, y, k, M, tau), autograd_row(f, y, k, k, tau), f"Eq. 18, dL_k/df_k by automatic differentiation, k = {k}")


@task(5)
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
    close(losses.grad_anchor(f, y, k, M, tau), expected, "Eq. 18, 1/tau [ -1/|P(k)| sum_{r' in Rc(k)} f_r' + (sum_{r' in Rc(k)} exp((s_kr' + m)/tau) "
          f"f_r' + sum_{{n in N(k)}} exp(s_kn/tau) f_n) / Z_k ], k = {k}, R = {r}, Rc = {rc}")


@task(6)
@TAU
@pytest.mark.parametrize("seed", range(4))
def test_a5_a_saturated_positive_gets_nothing(tau, seed):
    f, y, R = mixed_batch(seed)
    for i, k in R.nonzero().tolist():
        close(losses.grad_positive(f, y, i, k, M, tau), torch.zeros(3).double(), f"Eq. A.5, a saturated pair moves nothing, i = {i}, k = {k}", 0)
        close(autograd_row(f, y, i, k, tau), torch.zeros(3).double(), "automatic differentiation of L_i", 0)


@task(6)
@TAU
@pytest.mark.parametrize("seed", range(4))
def test_a6_gradient_of_an_unsaturated_positive(tau, seed):
    f, y, R = mixed_batch(seed)
    for i in range(len(y)):
        for k in sets(y, i)[0]:
            if not R[i, k]:
                close(losses.grad_positive(f, y, i, k, M, tau), autograd_row(f, y, i, k, tau),
                      f"Eq. A.6, 1/tau [ -f_i/|P(i)| + exp((s_ik + m)/tau)/Z_i f_i ], i = {i}, k = {k}")


@task(6)
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


@task(5)
def test_eq18_of_an_anchor_without_positives_is_zero():
    f, y = batch(0)
    y[0] = 99
    close(losses.grad_anchor(f, y, 0, M, 0.15), torch.zeros(3).double(), "Eq. 18 of an anchor with an empty P(k)", 0)


@task(6)
def test_a7_of_an_anchor_without_positives_is_zero():
    f, y = batch(0)
    y[0] = 99
    close(losses.grad_negative(f, y, 0, 1, M, 0.15), torch.zeros(3).double(), "Eq. A.7 of an anchor with an empty P(i)", 0)


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_whole_gradient_is_the_sum_of_the_cases(tau, seed):
    f, y, R = mixed_batch(seed)
    y[0] = 99
    for k in range(len(y)):
        expected = losses.grad_anchor(f, y, k, M, tau)              # dL/df_k = dL_k/df_k + sum_{i != k} dL_i/df_k
        for i in range(len(y)):
            if i != k:
                case = losses.grad_positive if y[i] == y[k] else losses.grad_negative
                expected = expected + case(f, y, i, k, M, tau)
        close(losses.marginal_contrastive_grad(f, y, M, tau)[k], expected, f"(D + D^T) F, row {k}")


@TAU
@pytest.mark.parametrize("seed", range(4))
def test_whole_gradient_is_autograds(tau, seed):
    f, y, R = mixed_batch(seed)
    y[0] = 99
    rows = f.clone().requires_grad_()
    sum(slow_anchor_loss(rows, y, i, M, tau) for i in range(len(y)) if sets(y, i)[0]).backward()
    close(losses.marginal_contrastive_grad(f, y, M, tau), rows.grad, "(D + D^T) F")
    rows = f.clone().requires_grad_()
    losses.marginal_contrastive_loss(rows, y, M, tau).backward()
    anchors = sum(bool(sets(y, i)[0]) for i in range(len(y)))
    close(losses.marginal_contrastive_grad(f, y, M, tau) / anchors, rows.grad, "the mean over anchors")


@TAU
def test_gradient_by_hand_passes_gradcheck(tau):
    z, y = batch(5)
    z = (3 * z).requires_grad_()                                    # through the normalisation f = z / ||z|| as well
    s = normalize(z) @ normalize(z).T
    assert (s - (1 - M)).abs().min() > 1e-3, "too near the kink for finite differences"
    by_hand = lambda z: losses.MarginalContrastiveByHand.apply(normalize(z), y, M, tau)
    assert torch.autograd.gradcheck(by_hand, z)
    assert torch.autograd.gradcheck(lambda z: losses.marginal_contrastive_loss(normalize(z), y, M, tau), z)


def test_gradient_through_the_normalisation_and_the_pooling():
    h = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)          # (N, patches, E)
    y = torch.tensor([0, 0, 1, 1, 0, 1])
    z = h.mean(dim=1)
    losses.marginal_contrastive_loss(normalize(z), y, M).backward()
    f, norm = normalize(z).detach(), z.norm(dim=1, keepdim=True).detach()
    df = losses.marginal_contrastive_grad(f, y, M, 0.15) / len(y)
    dz = (df - f * (f * df).sum(dim=1, keepdim=True)) / norm        # dL/dz = (I - f f^T) dL/df / ||z||
    close(h.grad, dz[:, None].expand_as(h) / 4, "dL/dh, each patch 1/P of dL/dz")


KINK = torch.tensor([[1.0, 0.0], [0.5, 0.75 ** 0.5], [-1.0, 0.0]], dtype=torch.float64)          # s_01 = 0.5 = 1 - m
KINK_Z = e(1) + e(-1)                                               # of anchor 0 at tau = 1: Q_01 = 1, s_02 = -1


@task(4)
def test_exactly_at_the_kink_a_pair_is_unsaturated():
    assert not losses.saturated(KINK, torch.tensor([0, 0, 1]), 0.5).any(), "Sec. 3.5: at s = 1 - m exactly a pair is not in R"


def test_exactly_at_the_kink_the_gradient_flows():                  # not graded: that of clamp depends on torch's version
    f, y = KINK.clone().requires_grad_(), torch.tensor([0, 0, 1])
    losses.marginal_contrastive_loss(f, y, 0.5, 1.0).backward()
    close(2 * f.grad, losses.marginal_contrastive_grad(KINK, y, 0.5, 1.0), "Eq. 17, its gradient flows at s = 1 - m exactly")


@task(5)
def test_eq18_exactly_at_the_kink():
    expected = -KINK[1] + (e(1) * KINK[1] + e(-1) * KINK[2]) / KINK_Z
    close(losses.grad_anchor(KINK, torch.tensor([0, 0, 1]), 0, 0.5, 1.0), expected, "Eq. 18 at s = 1 - m, where R is empty")


@task(6)
def test_a6_exactly_at_the_kink():
    expected = (-1 + e(1) / KINK_Z) * KINK[0]
    close(losses.grad_positive(KINK, torch.tensor([0, 0, 1]), 0, 1, 0.5, 1.0), expected, "Eq. A.6 at s = 1 - m, where R is empty")


# ---------------------------------------------------------------------------------------------- Section 4.1: Fig. 4a

@task(10)
def test_fig4a_margins():
    for arguments, expected in [
        ((0.4, 0.1, 8), [0.4 - 0.3 * l / 7 for l in range(8)]), ((0.4, 0.1, 1), [0.4]),          # one layer alone has m0
        ((0, 2, 2), [0, 2]), ((2, 0, 2), [2, 0]),                                               # 0..2, both included
        ((0.4, 0.1, 3, "parabolic"), [0.4, 0.1 + 0.3 / 4, 0.1]), ((0.4, 0.1, 4, "parabolic"), [0.4, 0.1 + 0.3 * 4 / 9, 0.1 + 0.3 / 9, 0.1]),
        ((0.4, 0.1, 3, "cosine"), [0.4, 0.25, 0.1]),
        ((0.4, 0.1, 5, "cosine"), [0.4, 0.25 + 0.15 * 0.5 ** 0.5, 0.25, 0.25 - 0.15 * 0.5 ** 0.5, 0.1]),
        ((0.4, 0.1, 3, "exponential"), [0.4, 0.2, 0.1]),
    ]:
        got = losses.margins(*arguments)
        assert got == pytest.approx(expected), f"Fig. 4a: margins{arguments} is {expected}, from layer 1 to layer L; got {got}"
    for wrong in [(2.5, 0.1, 3), (-0.1, 0.1, 3), (0.4, 2.5, 3), (0.4, -0.1, 3), (0.4, 0.1, 0), (0.4, 0.1, 3, "steep"), (0.0, 0.1, 3, "exponential")]:
        try:
            got = losses.margins(*wrong)
        except ValueError:
            continue
        assert False, f"Fig. 4a: margins{wrong} must raise a ValueError; it gave {got}"


# ------------------------------------------------------------------------------------------- Section 3.4: the networks

@task(9)
def test_patches_put_back_together_are_the_image():
    images = torch.randn(2, 3, 8, 12)
    patches = vit.patchify(images, 4)
    assert patches.shape == (2, 6, 48), f"patching: 8 x 12 pixels of 3 channels are 6 patches of 48 numbers; got {patches.shape}"
    for row in range(2):
        for column in range(3):
            patch, expected = patches[:, 3 * row + column], images[:, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4]
            assert torch.equal(patch, expected.flatten(1)), \
                f"patching: patch {3 * row + column}, row {row}, column {column}, is not its channels, each row by row"


@task(9)
def test_section_3_4_encoder_layer_is_torchs():
    theirs = torch.nn.TransformerEncoderLayer(12, 3, 24, dropout=0, activation="gelu", norm_first=True, batch_first=True)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)                                    # torch starts with scales of 1 and biases of 0
    ours, old = vit.EncoderLayer(12, 3), theirs.state_dict()
    names = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out.", "linear1.": "mlp.0.",
             "linear2.": "mlp.2.", "norm1.": "norm1.", "norm2.": "norm2."}
    ours.load_state_dict({new + kind: old[name + kind] for name, new in names.items() for kind in ("weight", "bias")})
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    close(ours.double()(x), theirs.double()(x), "Sec. 3.4, z = MSA(LN(x)) + x, f = MLP(LN(z)) + z, as torch.nn.TransformerEncoderLayer")


def test_section_3_4_projection_and_position_belong_to_layer_1():
    model = vit.build_model("vit-8-2-3", (3, 8, 8), 10)
    x = model.patches(torch.randn(2, 3, 8, 8))
    embedding, encoder = model.layers[0]
    z = torch.relu(x @ embedding.projection.weight.T + embedding.projection.bias) + embedding.position
    close(model.layers[0](x), encoder(z), "f_1 = encoder_layer_1(projection(x) + E_pos)", 1e-6)
    assert [len(list(layer.parameters())) for layer in model.layers] == [15, 12, 12]
    stds = [vit.build_model("vit-64-2-1", (3, 32, 32), 10, position_std=std).layers[0][0].position.std() for std in (1.0, 0.02)]
    assert stds[0].item() == pytest.approx(1, rel=0.1) and stds[1].item() == pytest.approx(0.02, rel=0.1)


def test_eq13_pooling_and_table_5_token():
    images = torch.randn(2, 3, 8, 8)
    mean, token = (vit.build_model("vit-8-2-1", (3, 8, 8), 10, pool=pool) for pool in ("mean", "token"))
    h = mean.layers[0](mean.patches(images))
    assert h.shape == (2, 4, 8)
    close(mean.pool(h), sum(h[:, j] for j in range(4)) / 4, "Eq. 13", 1e-6)
    h = token.layers[0](token.patches(images))
    assert h.shape == (2, 5, 8) and torch.equal(token.pool(h), h[:, 0])
    start = token.layers[0][0](token.patches(images))
    assert torch.equal(start[0, 0], start[1, 0]), "the class token starts the same for every image"


def test_model_names_and_shapes():
    for name in ("ViT[8 2 3]", "vit-8-2-3"):
        model = vit.build_model(name, (3, 8, 8), 10)
        assert isinstance(model, vit.ViT) and len(model.layers) == 3
        assert cff.predict(model, torch.randn(2, 3, 8, 8), "cffm").shape == (2, 10)
    for name in ("MLP[16 2]", "mlp-16-2"):
        model = vit.build_model(name, (1, 28, 28), 10)
        assert isinstance(model, vit.MLP) and [tuple(layer[0].weight.shape) for layer in model.layers] == [(16, 784), (16, 16)]
        assert (model.layers[0](torch.randn(4, 784)) >= 0).all()    # linear + ReLU
        assert cff.predict(model, torch.randn(2, 1, 28, 28), "cffm").shape == (2, 10)
    for name in ("vit-128-4", "cnn-3-3", "ViT[128 4 0]", "mlp-8-2-2", "ViT[128 4 5", "vit-128--4-5", "vit-128-4-5-", "", "vit"):
        with pytest.raises(ValueError, match="a model is named"):
            vit.build_model(name, (3, 8, 8), 10)


def test_model_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="3 heads do not divide an embedding of width 8"):
        vit.build_model("vit-8-3-1", (3, 8, 8), 10)
    with pytest.raises(ValueError, match="patches of 3 x 3 do not divide an image of 8 x 8"):
        vit.build_model("vit-8-2-1", (3, 8, 8), 10, patch_size=3)
    with pytest.raises(ValueError, match="pool"):
        vit.build_model("vit-8-2-1", (3, 8, 8), 10, pool="max")
    with pytest.raises(ValueError, match="labels must be"):
        vit.build_model("vit-8-2-1", (3, 8, 8), 10, labels="patch")
    with pytest.raises(ValueError, match="200 classes do not fit into the first pixels of an image of 192"):
        vit.build_model("mlp-8-2", (3, 8, 8), 200, labels="one-hot")
    with pytest.raises(ValueError, match="takes images alone"):
        vit.build_model("mlp-8-2", (3, 8, 8), 10).patches(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="takes images and y"):
        vit.build_model("mlp-8-2", (3, 8, 8), 10, labels="one-hot").patches(torch.randn(2, 3, 8, 8))


# ---------------------------------------------------------------------------------------------- Fig. 2: labels as inputs

def test_fig2_label_patch_of_a_vit_stands_in_front():
    model = vit.build_model("vit-8-2-2", (3, 8, 8), 10, labels="one-hot")
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([7, 0, 7, -1])
    patches = model.patches(x, y)
    assert patches.shape == (4, 5, 48) and torch.equal(patches[:, 1:], vit.patchify(x, 4))
    assert torch.equal(patches[0, 0], patches[2, 0]) and not torch.equal(patches[0, 0], patches[1, 0])
    assert not patches[3, 0].any(), "the neutral label is zeros"
    other = model.patches(torch.randn(1, 3, 8, 8), torch.tensor([7]))
    assert torch.equal(other[0, 0], patches[0, 0]), "a label patch does not depend on the batch"
    assert model.layers[0](patches).shape == (4, 5, 8)
    token = vit.build_model("vit-8-2-2", (3, 8, 8), 10, pool="token", labels="random")
    assert token.layers[0](token.patches(x, y)).shape == (4, 6, 8), "class token, label patch, four patches"


def test_fig2b_one_hot_replaces_the_first_pixels_of_an_mlps_input():
    model = vit.build_model("mlp-8-2", (1, 6, 8), 3, labels="one-hot")
    x, y = torch.randn(3, 1, 6, 8), torch.tensor([2, 0, -1])
    expected = x.flatten(1).clone()
    expected[:, :3] = torch.tensor([[0, 0, 4.0], [4, 0, 0], [0, 0, 0]])                 # sqrt(48 / 3) = 4
    close(model.patches(x, y), expected / expected.norm(dim=1, keepdim=True), "Fig. 2b", 1e-6)


def test_fig2c_a_random_vector_follows_the_pixels():
    model = vit.build_model("mlp-8-2", (1, 4, 4), 3, labels="random")
    x, y = torch.randn(3, 1, 4, 4), torch.tensor([2, 0, -1])
    expected = torch.cat([x.flatten(1), torch.stack([model.labels[2], model.labels[0], torch.zeros(16)])], dim=1)
    close(model.patches(x, y), expected / expected.norm(dim=1, keepdim=True), "Fig. 2c", 1e-6)
    close(model.labels[:3].norm(dim=1), torch.full((3,), (16 / 3) ** 0.5), "sqrt(D / classes)", 1e-6)
    assert model.layers[0][0].weight.shape == (8, 32) and model.layers[1][0].weight.shape == (8, 8)


@pytest.mark.parametrize("labels", ["one-hot", "random"])
def test_an_mlps_layers_start_at_one_scale_for_inputs_of_length_1_as_of_variance_1(labels):
    torch.manual_seed(0)
    x, y, spread = torch.randn(500, 1, 28, 28), torch.arange(500) % 10, []
    for kind in (None, labels):
        model = vit.build_model("mlp-100-2", (1, 28, 28), 10, labels=kind)
        h = model.patches(x, y if kind else None)
        spread.append(model.layers[0][0](h).std())
        h = torch.randn(500, 100)
        spread.append(model.layers[1][0](cff.unit(h) if kind else h).std())
    close(torch.stack(spread[2:]), torch.stack(spread[:2]), "standard deviation before the ReLU, layers 1 and 2", 0.06)


@pytest.mark.parametrize("name, labels", [("vit-8-2-2", "random"), ("mlp-8-2", "random"), ("mlp-8-2", "one-hot")])
def test_fig2_labels_of_200_classes_differ_are_saved_and_stay(name, labels):
    model = vit.build_model(name, (3, 16, 16), 200, labels=labels)
    table = model.labels[:200]
    distances = torch.cdist(table, table) + 1e9 * torch.eye(200)
    assert distances.min() > 1 and not model.labels[200].any()
    assert torch.equal(model.state_dict()["labels"], model.labels), "part of the saved model"
    assert "labels" not in dict(model.named_parameters()), "fixed: no optimizer reaches it"
    assert vit.build_model(name, (3, 16, 16), 200).labels is None


# -------------------------------------------------------------------------------------- Section 3.3: Algorithm 1, left

def small_case(name="vit-8-2-3", labels=None):
    """A small model, an optimizer a layer, a batch of six images in three classes, and an augmentation by noise."""
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


@task(7)
@pytest.mark.parametrize("name", ["vit-8-2-3", "mlp-8-3"])
@pytest.mark.parametrize("views", [2, 1])
def test_algorithm1_left_line_by_line(views, name):
    model, optimizers, x, y, _ = small_case(name)
    twin = vit.build_model(name, (3, 8, 8), 3).double()
    twin.load_state_dict(model.state_dict())
    optimizers_by_hand, draws = [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in twin.layers], [x + 0.1, x - 0.1]
    for step in range(2):
        got = cff.cff_step(model, optimizers, x, y, lambda x, views=iter(draws): next(views), [0.4, 0.25, 0.1], 0.3, views)
        inputs, expected = [twin.patches(view) for view in draws[:views]], []
        for l, layer in enumerate(twin.layers):
            outputs = [layer(view) for view in inputs]
            f = torch.cat([output.mean(dim=1) if output.dim() == 3 else output for output in outputs])
            f = f / f.norm(dim=1, keepdim=True)
            loss = slow_loss(f, y.repeat(views), [0.4, 0.25, 0.1][l], 0.3)
            layer.zero_grad()
            loss.backward()
            optimizers_by_hand[l].step()
            inputs = [output.detach() for output in outputs]        # from before the update
            expected.append(loss.detach())
        assert got.shape == (3,) and not got.requires_grad, "Algorithm 1: L losses, without a graph"
        close(got, torch.stack(expected), f"Algorithm 1, {name}, the losses of the layers in step {step + 1}")
        for part, value in model.state_dict().items():
            close(value, twin.state_dict()[part], f"Algorithm 1, {name}, the weights {part} after step {step + 1}", 1e-8)


@task(7)
def test_algorithm1_is_local(small):
    model, optimizers, x, y, augment = small
    for l, optimizer in enumerate(optimizers):
        step = optimizer.step

        def step_and_look(l=l, step=step):
            before = [weights(layer) for layer in model.layers]
            for other, layer in enumerate(model.layers):
                holds = any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
                assert holds == (other == l), f"Algorithm 1: at optimizers[{l}].step() layer {other + 1} has a gradient: {holds}; a layer " \
                    "gets one from its own loss alone, and is updated before the next layer runs"
            step()
            for other, layer in enumerate(model.layers):
                assert same(before[other], weights(layer)) == (other != l), f"Algorithm 1: optimizer {l + 1} moved layer {other + 1}"
            optimizers[l].zero_grad()                               # so that the next layer's look sees its own gradient

        optimizer.step = step_and_look
    head = weights(model.head)
    cff.cff_step(model, optimizers, x, y, augment, [0.4, 0.25, 0.1], 0.15)
    assert same(head, weights(model.head)) and all(p.grad is None for p in model.head.parameters())


@task(7)
def test_algorithm1_next_layer_reads_the_output_from_before_the_update(small):
    model, optimizers, x, y, _ = small
    with torch.no_grad():
        before = model.layers[0](model.patches(x))
    inputs = []
    model.layers[1].register_forward_hook(lambda layer, x, h: inputs.append(x[0]))
    cff.cff_step(model, optimizers, x, y, lambda x: x, [0.4, 0.25, 0.1], 0.15)
    after = model.layers[0](model.patches(x))
    close(inputs[0][:6], before, "Algorithm 1: what layer 2 reads")
    assert not torch.allclose(inputs[0][:6], after), "Algorithm 1: layer 2 reads what layer 1 gave before its update"
    assert not inputs[0].requires_grad, "Algorithm 1: x1 = f1.detach()"


@task(7)
def test_algorithm1_views_use_different_draws(small):
    model, optimizers, x, y, augment = small
    inputs = []
    model.layers[0].register_forward_hook(lambda layer, x, h: inputs.append(x[0]))
    cff.cff_step(model, optimizers, x, y, augment, [0.4, 0.25, 0.1], 0.15)
    both = torch.cat(inputs)                                        # one after the other, or joined
    assert len(both) == 12 and not torch.equal(both[:6], both[6:]), "Algorithm 1: x1 and x2 are two draws of augment(x)"


@task(7)
def test_table6_one_view_is_one_forward_pass(small):
    model, optimizers, x, y, augment = small
    inputs = []
    model.layers[0].register_forward_hook(lambda layer, x, h: inputs.append(x[0]))
    cff.cff_step(model, optimizers, x, y, augment, [0.4, 0.25, 0.1], 0.15, views=1)
    assert len(torch.cat(inputs)) == 6, "Algorithm 1 with views=1 (Table 6): one forward pass of each image"


def test_stage_2_moves_the_head_alone(small):
    model, _, x, y, augment = small
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)      # even an optimizer that could reach every layer
    layers, head = [weights(layer) for layer in model.layers], weights(model.head)
    first = [cff.head_step(model, optimizer, x, y, augment) for _ in range(20)]
    assert all(same(old, weights(layer)) for old, layer in zip(layers, model.layers)) and not same(head, weights(model.head))
    assert all(p.grad is None for p in model.layers.parameters())
    assert first[-1] < first[0] and not first[0].requires_grad
    inputs = []
    model.layers[0].register_forward_hook(lambda layer, x, h: inputs.append(x[0]))
    cff.head_step(model, optimizer, x, y, lambda x: x + 1)
    assert len(inputs) == 1 and torch.equal(inputs[0], model.patches(x + 1)), "stage 2 sees one augmented view"


def test_prediction_is_one_forward_pass(small):
    model, _, x, y, _ = small
    h = model.patches(x)
    for layer in model.layers:
        h = layer(h)
    close(cff.predict(model, x, "cff"), model.head(h.mean(dim=1)), "scores")


def test_fig1_bp_and_scl_are_not_local(small):
    model, _, x, y, augment = small
    cff.bp_step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y, augment)
    assert all(p.grad.abs().sum() > 0 for module in [*model.layers, model.head] for p in [*module.parameters()][-2:])
    model.zero_grad()
    head = weights(model.head)
    cff.scl_step(model, torch.optim.SGD(model.layers.parameters(), lr=0.1), x, y, augment, 0.15)
    assert all(p.grad.abs().sum() > 0 for layer in model.layers for p in [*layer.parameters()][-2:])
    assert same(head, weights(model.head)) and all(p.grad is None for p in model.head.parameters())


@pytest.mark.parametrize("method", ["bp", "scl"])
def test_fig1_bp_step_and_scl_step_are_plain_pytorch(small, method):
    model, _, x, y, _ = small
    twin = vit.build_model("vit-8-2-3", (3, 8, 8), 3).double()
    twin.load_state_dict(model.state_dict())
    encoder = lambda x: twin.layers[2](twin.layers[1](twin.layers[0](twin.patches(x)))).mean(dim=1)
    optimizer = torch.optim.SGD(model.parameters() if method == "bp" else model.layers.parameters(), lr=0.1)
    for _ in range(2):
        twin.zero_grad()
        if method == "bp":
            got = cff.bp_step(model, optimizer, x, y, lambda x: x)
            loss = cross_entropy(twin.head(encoder(x)), y)
        else:
            draws = iter([x + 0.1, x - 0.1])
            got = cff.scl_step(model, optimizer, x, y, lambda x: next(draws), 0.15)
            loss = slow_loss(normalize(torch.cat([encoder(x + 0.1), encoder(x - 0.1)])), y.repeat(2), 0.0, 0.15)
        loss.backward()
        close(got, loss.detach(), "the loss")
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters()):
                q -= 0.1 * q.grad if q.grad is not None else 0
                close(p, q, "a step of SGD")


# ------------------------------------------------------------------- Section 3.3: Algorithm 1, right; SymBa; FF Collab

@pytest.fixture(params=["vit-8-2-3", "mlp-8-3"])
def labelled(request):
    """As `small`, with labels at the input."""
    return small_case(request.param, "one-hot")


def goodness_by_hand(model, x, y):
    """G of Algorithm 1's forward pass, (L, B): mean over tokens, mean of squares; outputs over their norm go on."""
    h, G = model.patches(x, y), []
    for layer in model.layers:
        f = layer(h)
        G.append(((f.mean(dim=1) if f.dim() == 3 else f) ** 2).mean(dim=1))
        h = torch.stack([f_i / (f_i ** 2).sum().sqrt() for f_i in f])
    return torch.stack(G).detach()


@task(8)
def test_wrong_labels_are_never_right_uniform_and_seeded():
    y = torch.arange(20000) % 5
    wrong = cff.wrong_labels(y, 5, torch.Generator().manual_seed(0))
    counts = torch.bincount(5 * y + wrong, minlength=25).view(5, 5)
    assert not counts.diagonal().any(), "Algorithm 1, right: a wrong label must not be the true one"
    others = counts[~torch.eye(5, dtype=torch.bool)]
    assert (others - 1000).abs().max() < 5 * 1000 ** 0.5, f"Algorithm 1, right: each other class about 1000 times: {others.tolist()}"
    again = cff.wrong_labels(y, 5, torch.Generator().manual_seed(0))
    assert torch.equal(wrong, again), "Algorithm 1, right: the same generator gives the same wrong labels"


@task(8)
@pytest.mark.parametrize("method", ["ff", "symba", "collab"])
def test_algorithm1_right_line_by_line(labelled, method):
    model, optimizers, x, _, _ = labelled
    y, twin, draws = torch.tensor([0, 1, 1, 0, 1, 0]), copy.deepcopy(model), itertools.count(1)         # none of the last class
    y_wrong = cff.wrong_labels(y, 3, torch.Generator().manual_seed(5))
    step = {"ff": lambda *a: cff.ff_step(*a, losses.ff_loss, torch.Generator().manual_seed(5)),
            "symba": lambda *a: cff.ff_step(*a, losses.symba_loss, torch.Generator().manual_seed(5)),
            "collab": lambda *a: cff.collab_step(*a, 2.0, torch.Generator().manual_seed(5))}[method]
    optimizers_by_hand = [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in twin.layers]
    for draw in (1, 2):
        got, view = step(model, optimizers, x, y, lambda x: x + next(draws)), x + draw                  # one draw of augment in each step
        G1, G2 = goodness_by_hand(twin, view, y), goodness_by_hand(twin, view, y_wrong)
        x1, x2, expected = twin.patches(view, y), twin.patches(view, y_wrong), []
        for l, layer in enumerate(twin.layers):
            f1, f2 = layer(x1), layer(x2)
            g1, g2 = (((f.mean(dim=1) if f.dim() == 3 else f) ** 2).mean(dim=1) for f in (f1, f2))
            if method == "collab":
                g1, g2 = (g + sum(G[k] for k in range(3) if k != l) for g, G in ((g1, G1), (g2, G2)))
            loss = torch.log(1 + torch.exp(g2 - g1)).mean() if method == "symba" else \
                (torch.log(1 + torch.exp(2 - g1)) + torch.log(1 + torch.exp(g2 - 2))).mean() / 2
            layer.zero_grad()
            loss.backward()
            optimizers_by_hand[l].step()
            x1, x2 = (torch.stack([f_i / (f_i ** 2).sum().sqrt() for f_i in f]).detach() for f in (f1, f2))
            expected.append(loss.detach())
        assert got.shape == (3,) and not got.requires_grad, "Algorithm 1, right: L losses, without a graph"
        close(got, torch.stack(expected), f"Algorithm 1, right: the losses of the layers, {method}, {type(model).__name__}, step {draw}")
        for name, value in model.state_dict().items():
            close(value, twin.state_dict()[name], f"Algorithm 1, right: the weights {name} after step {draw}, {method}, {type(model).__name__}", 1e-8)


def test_collab_gammas_of_three_layers_by_hand():
    G = torch.tensor([[1.0, 0.5], [2.0, 0.25], [4.0, 0.0]], requires_grad=True)          # three layers, two samples
    expected = torch.tensor([[2 + 4, 0.25 + 0], [1 + 4, 0.5 + 0], [1 + 2, 0.5 + 0.25]])
    gamma = cff.gammas(G)
    close(gamma, expected, "gamma_l, the goodness of the other two layers", 0)
    assert not gamma.requires_grad, "gamma is detached"
    logits = G.detach() + gamma - 2.0                                                   # G_l + gamma_l - theta
    close(logits, torch.tensor([7.0, 0.75]).expand(3, 2) - 2.0, "every layer's logit is the sum of all goodness - theta", 0)


@task(8)
@pytest.mark.parametrize("method", ["ff", "symba", "collab"])
def test_ff_symba_and_collab_are_local(labelled, method):
    model, optimizers, x, y, augment = labelled
    for l, optimizer in enumerate(optimizers):
        step = optimizer.step

        def step_and_look(l=l, step=step):
            holds = [any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters()) for layer in model.layers]
            assert holds == [other == l for other in range(3)], f"Algorithm 1, right: at optimizers[{l}].step() the layers have gradients: " \
                f"{holds}; a layer gets one from its own loss alone, and is updated before the next layer runs"
            step()
            optimizers[l].zero_grad()

        optimizer.step = step_and_look
    before, head = weights(model.layers), weights(model.head)
    if method == "collab":
        cff.collab_step(model, optimizers, x, y, augment)
    else:
        cff.ff_step(model, optimizers, x, y, augment, {"ff": losses.ff_loss, "symba": losses.symba_loss}[method])
    after = weights(model.layers)
    assert all(any(not torch.equal(before[name], after[name]) for name in after if name.startswith(f"{l}.")) for l in range(3))
    assert same(head, weights(model.head))


def test_prediction_sums_the_goodness_over_the_layers():
    """Two classes, two layers; the first layer is sure of class 0, the last prefers class 1 a little."""
    model = vit.build_model("mlp-2-2", (1, 1, 4), 2, labels="one-hot").double()
    with torch.no_grad():
        for layer in model.layers:
            layer[0].weight.zero_(), layer[0].bias.zero_()
        model.layers[0][0].weight[:, :2] = torch.tensor([[12.0, 0.0], [0.0, 4.0]])       # reads the label
        model.layers[1][0].weight[:] = torch.tensor([[1.0, 0.0], [0.0, 2.0]])            # unit inputs: class 1 gets more
    x = torch.tensor([[0.0, 0.0, 3.0, 4.0]], dtype=torch.float64).view(1, 1, 1, 4)
    G = [goodness_by_hand(model, x, torch.tensor([c]))[:, 0] for c in (0, 1)]
    assert G[0][1] < G[1][1] and G[0].sum() > G[1].sum(), "the last layer alone would answer 1, the sum answers 0"
    close(cff.predict(model, x, "ff"), torch.stack([g.sum() for g in G])[None], "goodness, summed over the layers")
    close(cff.predict(model, x, "ff", skip_first=True), torch.stack([g[1:].sum() for g in G])[None], "without the first layer")
    del model.layers[1]
    close(cff.predict(model, x, "ff", skip_first=True), torch.stack([g[0] for g in G])[None], "a single layer is never skipped")


def test_prediction_has_one_pass_for_each_class(labelled):
    model, _, x, y, _ = labelled
    expected = torch.stack([goodness_by_hand(model, x, torch.full((6,), c)).sum(dim=0) for c in range(3)], dim=1)
    for algo in ("ff", "symba", "collab"):
        close(cff.predict(model, x, algo), expected, "column c holds the goodness with label c")
    with pytest.raises(ValueError, match="algo must be"):
        cff.predict(model, x, "hebb")
    with pytest.raises(ValueError, match="cff needs a model built without labels"):
        cff.predict(model, x, "cff")
    with pytest.raises(ValueError, match="ff needs a model built with labels"):
        cff.predict(vit.build_model("mlp-8-2", (3, 8, 8), 3).double(), x, "ff")


def test_table2_the_head_reads_all_layers_but_the_first_with_the_neutral_label(labelled):
    model, _, x, y, _ = labelled
    h, pooled = model.patches(x, torch.full((6,), -1)), []
    for layer in model.layers:
        f = layer(h)
        pooled.append(f.mean(dim=1) if f.dim() == 3 else f)
        h = torch.stack([f_i / (f_i ** 2).sum().sqrt() for f_i in f])
    close(cff.predict(model, x, "ff", head=True), model.head(torch.cat(pooled[1:], dim=1)), "scores of the head")
    before, labels = [weights(layer) for layer in model.layers], model.labels.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    history = [cff.head_step(model, optimizer, x, y, lambda x: x) for _ in range(20)]
    assert history[-1] < history[0] and all(same(old, weights(layer)) for old, layer in zip(before, model.layers))
    assert torch.equal(model.labels, labels)


def test_training_by_hand_derived_gradients_follows_autograd(monkeypatch):
    def run(loss):
        monkeypatch.setattr(cff, "marginal_contrastive_loss", loss)
        torch.manual_seed(0)
        model = vit.build_model("vit-16-2-3", (3, 32, 32), 10, patch_size=8).double()
        optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.004) for layer in model.layers]
        images, labels = train.draw_shapes(200, seed=3)
        augment = train.make_augment("crop", 4, [0.5] * 3, [0.25] * 3, torch.Generator().manual_seed(0))
        history = [cff.cff_step(model, optimizers, images[rows], labels[rows], lambda x: augment(x).double(), [0.4, 0.25, 0.1],
                                0.15) for _ in range(5) for rows in torch.arange(200).split(40)]
        return torch.stack(history), weights(model)

    (autograd, there), (by_hand, here) = run(losses.marginal_contrastive_loss), run(losses.MarginalContrastiveByHand.apply)
    assert autograd[-1].sum() < autograd[0].sum() - 0.5, "this run would show nothing: it did not learn"
    close(by_hand, autograd, "the losses of 25 updates", 1e-8)
    assert all(torch.allclose(here[name], there[name], atol=1e-6) for name in here)


# ------------------------------------------------------------------------------------------------------------- the data

def settings_of(*flags, out="no-such-run"):
    return train.parse([*map(str, flags), "--out", out])[0]


def test_split_is_disjoint_and_seeded():
    images, y = torch.arange(1000)[:, None, None, None], torch.arange(1000) % 10
    rows = lambda *flags: [part[0].flatten().tolist() for part in train.split(images, y.clone(), settings_of(*flags), 10)]
    fit, val = rows("--seed", 1)
    assert (len(fit), len(val)) == (900, 100) and not set(fit) & set(val)
    assert rows("--seed", 1) == [fit, val] and rows("--seed", 2) != [fit, val]
    assert rows("--seed", 1, "--limit", 90) == [fit[:90], val[:10]]
    half = rows("--seed", 1, "--missing", 0.5)
    assert [len(part) for part in half] == [450, 50] and set(half[0]) < set(fit) and set(half[1]) < set(val)
    with pytest.raises(ValueError, match="--limit 901: there are 900"):
        rows("--limit", 901)


def test_table4_label_noise_is_exact_wrong_and_uniform():
    images, y = torch.arange(10000)[:, None, None, None], torch.arange(10000) % 10
    given = y.clone()
    for rows, noisy in train.split(images, given, settings_of("--label-noise", 0.4), 10):
        shift = (noisy - y[rows.flatten()]) % 10
        counts = torch.bincount(shift, minlength=10)
        assert counts[0] == round(0.6 * len(noisy)), "exactly 40 % are wrong, in training and in validation data"
        assert (counts[1:] / counts[1:].sum() - 1 / 9).abs().max() < 5 * (1 / 9 / counts[1:].sum()) ** 0.5
    assert torch.equal(given, y), "the labels that were passed in stay as they are"


def test_mean_and_std_are_those_of_the_pixels():
    images = torch.randint(256, (20, 3, 5, 5), dtype=torch.uint8)
    pixels = images.double() / 255
    mean, std = train.mean_and_std(images)
    assert mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())
    assert std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist())


def test_shapes_need_more_than_pixels():
    fit, fit_y = train.draw_shapes(6000, seed=1)
    test, test_y = train.draw_shapes(1000, seed=2)
    again, _ = train.draw_shapes.__wrapped__(1000, seed=2)          # drawn anew
    assert fit.dtype == torch.uint8 and fit.shape[1:] == (3, 32, 32) and torch.equal(test, again)
    assert torch.bincount(test_y).tolist() == [100] * 10
    fit, test = (images.flatten(1).float() / 255 for images in (fit, test))
    nearest = fit_y[torch.cdist(test, fit).argmin(dim=1)]
    assert 0.3 < (nearest == test_y).float().mean() < 0.7
    X, T = (torch.cat([part, torch.ones(len(part), 1)], dim=1).double() for part in (fit, test))
    W = torch.linalg.solve(X.T @ X + 100 * torch.eye(X.shape[1]).double(), X.T @ one_hot(fit_y).double())
    assert 0.15 < ((T @ W).argmax(dim=1) == test_y).float().mean() < 0.5


def tiny_imagenet(folder, classes=("n02", "n01")):
    """A made-up folder in the layout of Tiny ImageNet: two images a class, one of them grey; two validation images a class."""
    root = folder / "tiny-imagenet-200"
    root.mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(classes) + "\n")
    lines = []
    for value, name in enumerate(classes):
        for part, files in [(root / "train" / name / "images", [f"{name}_0.JPEG", f"{name}_1.JPEG"]),
                            (root / "val" / "images", [f"val_{value}.JPEG", f"val_{value + 2}.JPEG"])]:
            part.mkdir(parents=True, exist_ok=True)
            for channels, file in zip((3, 1), files):
                image = torch.full((channels, 64, 64), 200 * value, dtype=torch.uint8)
                to_pil_image(image).save(part / file)
        lines += [f"val_{value}.JPEG\t{name}\t0\t0\t62\t62", f"val_{value + 2}.JPEG\t{name}\t0\t0\t62\t62"]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def test_tiny_imagenets_layout(tmp_path):
    root = tiny_imagenet(tmp_path)
    images, y, test_images, test_y = train.load_data("tinyimagenet", tmp_path)
    assert images.shape == (4, 3, 64, 64) and test_images.shape == (4, 3, 64, 64) and images.dtype == torch.uint8
    assert y.tolist() == [0, 0, 1, 1] and test_y.tolist() == [1, 1, 0, 0]      # classes in the order of their names
    assert all((image.float().mean() > 100) == (label == 0) for image, label in zip(images, y))        # n01 is the bright one
    assert all((image.float().mean() > 100) == (label == 0) for image, label in zip(test_images, test_y))
    (root / "val" / "val_annotations.txt").unlink()                 # a torn copy
    with pytest.raises(OSError, match="tinyimagenet could not be loaded .*: put tiny-imagenet-200.zip into"):
        train.load_data("tinyimagenet", tmp_path)


def test_tiny_imagenets_archive_is_unpacked_into_its_folder_alone(tmp_path, monkeypatch):
    made = tiny_imagenet(tmp_path / "made")
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "tiny-imagenet-200.zip", "w") as archive:
        for path in made.rglob("*"):
            archive.write(path, path.relative_to(tmp_path / "made"))
        archive.writestr("../../outside.txt", "not here")
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", lambda *arguments, **options: None)
    images, *_ = train.load_data("tinyimagenet", tmp_path / "data")
    assert len(images) == 4 and not list(tmp_path.glob("outside.txt"))


# ----------------------------------------------------------------------------------------------------- the augmentation

@pytest.mark.parametrize("fill, mode", [("zeros", "constant"), ("edge", "replicate")])
def test_flips_and_crops_are_those_of_each_image(fill, mode):
    images = torch.randint(1, 256, (200, 3, 8, 8), dtype=torch.uint8)
    flipped = train.random_flip(images, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(new, old.flip(2)) for new, old in zip(flipped, images)]
    assert all(m or torch.equal(new, old) for m, new, old in zip(mirrored, flipped, images)) and 60 < sum(mirrored) < 140
    cropped, places = train.random_crop(images, 2, torch.Generator().manual_seed(0), fill), set()
    for new, old in zip(cropped, pad(images.float(), [2] * 4, mode=mode).to(torch.uint8)):
        found = [(r, c) for r in range(5) for c in range(5) if torch.equal(new, old[:, r:r + 8, c:c + 8])]
        assert len(found) == 1, "each image is one window of its own padded image"
        places.add(found[0])
    assert len(places) == 25, "every window occurs"
    again = train.random_crop(images, 2, torch.Generator().manual_seed(0), fill)
    assert torch.equal(cropped, again), "the same draws give the same crops"


@pytest.mark.parametrize("channels", [3, 1])
def test_randaugment_is_torchvisions_one_image_at_a_time(channels, monkeypatch):
    images = torch.randint(256, (300, channels, 32, 32), dtype=torch.uint8)
    space = autoaugment.RandAugment()._augmentation_space(31, (32, 32))
    table = [(name, sign * float(values[14]) if values.dim() else 0.0) for name, (values, signed) in space.items()
             for sign in ((-1, 1) if signed else (1,))]
    results = [[autoaugment._apply_op(image, name, value, autoaugment.InterpolationMode.NEAREST, None)
                for name, value in table] for image in images]
    counts = torch.zeros(14)
    names = list(space)
    for new, variants in zip(train.rand_augment(images, torch.Generator().manual_seed(0), num_ops=1), results):
        found = {name for (name, _), variant in zip(table, variants) if (new.int() - variant.int()).abs().max() <= 1}
        assert found, "none of torchvision's operations, up to a rounding of one grey level, makes this image"
        for name in found:
            counts[names.index(name)] += 1 / len(found)
    assert counts.min() > 5, f"each of the 14 operations is drawn: {dict(zip(names, counts.tolist()))}"


def test_augment_normalises_last_and_none_changes_nothing():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    make = lambda kind, **k: train.make_augment(kind, 4, mean, std, torch.Generator().manual_seed(0), **k)
    expected = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    close(make("none")(images), expected, "normalised images", 1e-6)
    close(make("flip", flip=False)(images), expected, "digits are not flipped", 1e-6)
    black = -torch.tensor(mean) / torch.tensor(std)                 # a zero of the padding, normalised
    crops = make("crop")(torch.full((50, 3, 8, 8), 255, dtype=torch.uint8))
    values = crops[:, 0].unique()
    close(values, torch.stack([black[0], torch.tensor((1 - 0.5) / 0.2)]), "padding is black before it is normalised", 1e-6)
    augment = make("crop+randaug")
    assert not torch.equal(augment(images), augment(images)), "a fresh draw for each call"


# ------------------------------------------------------------------------------------------------------- the real thing

SMALL = ["--device", "cpu", "--model", "vit-16-2-2", "--limit", "450", "--epochs", "3", "--head-epochs", "2", "--batch-size", "90"]


train.draw_shapes = functools.cache(train.draw_shapes)              # a second saved in each run of the tests


def run_main(*flags):
    train.main([str(flag) for flag in flags])


multiprocessing.set_forkserver_preload(["eval", "pytest"])


def run_script(folder, script, *argv, processes=({},), threads=2):
    """`python script argv` in `folder`, at the same time once with each of the environments `processes`: CompletedProcess each.

    They are forked from a process that has imported torch, where there is such a thing: seconds are saved each time.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    files, running = [folder / f"{name}{i}.txt" for i in range(len(processes)) for name in ("out", "err")], []
    for i, environment in enumerate(processes):
        code = f"""if True:
            import os, runpy, sys, torch
            for fd, file in enumerate({[str(file) for file in files[2 * i:2 * i + 2]]}, start=1):
                os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
            os.chdir({str(folder)!r})
            os.environ.update({environment})
            torch.set_num_threads({threads})
            sys.argv = {[str(part) for part in (script, *argv)]}
            sys.path.insert(0, {str(HERE)!r})
            runpy.run_path(sys.argv[0], run_name="__main__")"""
        running.append(multiprocessing.get_context(method).Process(target=exec, args=(code, {})))
        running[-1].start()
    for process in running:
        process.join(300)
        process.kill()                                              # if it hangs
        process.join()
    texts = [file.read_text() for file in files]
    return [subprocess.CompletedProcess(argv, process.exitcode, out, err)
            for process, out, err in zip(running, texts[::2], texts[1::2])]


def read_log(folder):
    with open(folder / "log.csv") as file:
        return [{column: value for column, value in row.items() if column != "seconds"} for row in csv.DictReader(file)]


def test_train_and_eval_from_the_command_line(tmp_path):
    """The commands of the README, small: shapes are learned well above chance, eval.py finds the same accuracy."""
    out = tmp_path / "run"
    flags = ["--model", "vit-32-4-2", "--limit", "4500", "--epochs", "12", "--head-epochs", "2", "--out", str(out)]
    done = subprocess.run([sys.executable, HERE / "train.py", *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result, config = json.loads((out / "result.json").read_text()), json.loads((out / "config.json").read_text())
    assert result["test_top1"] > 40 and result["test_top10"] == 100 and result["metric"] == "top1"
    assert result["peak_memory_mb"] is None or 50 < result["peak_memory_mb"] < 20000
    assert config["settings"]["epochs"] == 12 and config["data"]["images"] == [4500, 500, 2000]
    rows = read_log(out)
    assert [(row["stage"], row["epoch"]) for row in rows] == [("1", str(e)) for e in range(1, 13)] + [("2", "1"), ("2", "2")]
    assert float(rows[11]["train_loss_2"]) < float(rows[0]["train_loss_2"]) < math.log(255)
    assert float(rows[11]["probe"]) > 40 and 0 < float(rows[11]["val_saturated_1"]) < 1
    again, = run_script(tmp_path, HERE / "train.py", *flags)
    assert again.returncode == 2 and "holds a run already" in again.stderr, "a run is not overwritten"
    shown, = run_script(tmp_path, HERE / "eval.py", out)
    assert shown.returncode == 0 and f"top-1 {result['test_top1']:.2f} %" in shown.stdout, shown.stderr


@pytest.mark.parametrize("flags", [
    ["--algo", "cff"], ["--views", "1"], ["--pool", "token"], ["--augment", "crop+randaug"], ["--model", "MLP[16 2]"],
    ["--missing", "0.5", "--label-noise", "0.2"], ["--recipe", "short", "--batch-size", "64"],
    ["--algo", "scl"], ["--algo", "ff", "--head"], ["--algo", "symba", "--head", "--model", "mlp-16-2"],
], ids=" ".join)
def test_settings_of_the_tables_train_and_test(tmp_path, flags):
    out = tmp_path / "run"
    run_main(*SMALL, "--limit", 225, "--epochs", 1, "--head-epochs", 1, "--patch-size", 16, *flags, "--out", out)
    rows, result = read_log(out), json.loads((out / "result.json").read_text())
    layers = (2,) if "scl" in flags else (1, 2)
    assert [row["stage"] for row in rows] == ["1", "2"] and all(float(rows[0][f"val_loss_{l}"]) > 0 for l in layers)
    assert evaluation.evaluate(out) == {k: result[f"test_top{k}"] for k in (1, 5, 10)}


@pytest.mark.parametrize("model", ["vit-16-2-2", "mlp-16-2"])
@pytest.mark.parametrize("algo", ["ff", "symba", "collab", "bp"])
def test_methods_without_a_second_stage(tmp_path, algo, model):
    out = tmp_path / "run"
    run_main(*SMALL, "--limit", 225, "--patch-size", 16, "--algo", algo, "--model", model, "--views", 1, "--out", out)
    rows, result = read_log(out), json.loads((out / "result.json").read_text())
    assert [row["stage"] for row in rows] == ["1", "1", "1"] and 0 <= float(rows[0]["probe"]) <= 100
    assert [f"val_loss_{l}" in rows[0] for l in (1, 2)] == [algo != "bp", True] and "val_saturated_1" not in rows[0]
    assert evaluation.evaluate(out) == {k: result[f"test_top{k}"] for k in (1, 5, 10)}
    if algo == "collab":                                            # the logit of each layer is the sum of all goodness
        assert all(row["val_loss_1"] == row["val_loss_2"] for row in rows)


@pytest.mark.parametrize("algo", ["cff", "ff", "symba", "collab", "scl", "bp"])
def test_validation_loss_is_the_training_loss_without_training(algo):
    run = train.Run(settings_of("--model", "mlp-16-3", "--limit", 180, "--algo", algo, "--augment", "none", "--seed", 3,
                                "--views", 1, "--temperature", 0.5, "--threshold", 3, "--alpha", 2))
    x, y = run.train
    before = weights(run.model)
    run.val_generator.set_state(run.generator.get_state())          # the same wrong labels
    measured, f = train.validation_step(run, x, y)
    assert same(before, weights(run.model)) and f[-1].shape == (180, 16)
    trained = train.make_step(run, train.make_optimizers(run.model, run.settings))(x, y)
    close(measured.detach(), trained.reshape(-1), f"the losses of {algo}", 1e-6)


def test_ff_chooses_the_epoch_by_all_layers_but_the_first(monkeypatch):
    run = train.Run(settings_of("--model", "mlp-16-3", "--limit", 180, "--algo", "ff"))
    monkeypatch.setattr(train, "validate_encoder", lambda run, probe: (torch.tensor([8.0, 1.0, 2.0]), 0, 50.0))
    batch = (run.train[0], run.train[1])
    assert train.encoder_epoch(run, train.make_optimizers(run.model, run.settings), [batch])[1] == 3.0


def test_eval_of_a_folder_without_weights_ends_with_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        evaluation.main()
    assert ended.value.code == 2 and "best.pt" in capsys.readouterr().err.splitlines()[-1]


def assert_same_runs(one, other):
    """Two runs' weights, optimizers, random states and logs are equal bit for bit, their seconds apart."""
    for file in ("best.pt", "last.pt"):
        a, b = (torch.load(run / file, weights_only=True) for run in (one, other))
        for part in (a, b):
            part.pop("settings", None)                              # where they are written
            for row in part.get("log", []):
                row.pop("seconds")
        assert equal(a, b), f"{file} of {one.name} and {other.name} differ"
    assert read_log(one) == read_log(other)


def equal(a, b):
    """Whether nested dicts and lists of tensors and numbers are the same."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def stop_and_resume(tmp_path, monkeypatch, flags, name, stop):
    """Two runs with the same flags, one of them stopped where `stop`, put in the place of train.NAME, says, and resumed."""
    run_main(*flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, name, stop)
        with pytest.raises(SystemExit, match="go on with: python train.py --resume --out"):
            run_main(*flags, "--out", tmp_path / "parts")
    run_main("--resume", "--out", tmp_path / "parts")
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("stage, epoch, flags", [
    (1, 1, []), (1, 2, []), (2, 1, []), (2, 2, []), (1, 2, ["--algo", "ff"]), (2, 1, ["--algo", "symba", "--head"]),
    (1, 2, ["--algo", "collab", "--model", "mlp-16-2"]), (1, 2, ["--algo", "scl"]), (1, 3, ["--algo", "bp"]),
], ids=str)
def test_resume_is_bit_for_bit(tmp_path, monkeypatch, stage, epoch, flags):
    def stop(row, epochs):                                          # Ctrl-C before this epoch is written down
        if (row["stage"], row["epoch"]) == (stage, epoch):
            raise KeyboardInterrupt

    stop_and_resume(tmp_path, monkeypatch, [*SMALL, *flags], "show_row", stop)


@pytest.mark.parametrize("stop_at", range(9))
def test_a_crash_between_two_files_loses_nothing(tmp_path, monkeypatch, stop_at):
    """Stop at each of the files that one epoch of stage 1 and one of stage 2 write."""
    write, written = train.write, []

    def write_and_stop(path, fill):
        if len(written) == stop_at + 1:
            raise KeyboardInterrupt
        written.append(path)
        write(path, fill)

    flags = [*SMALL, "--epochs", "1", "--head-epochs", "1", "--limit", "180"]
    stop_and_resume(tmp_path, monkeypatch, flags, "write", write_and_stop)


# ------------------------------------------------------------------------------------------- Section 5.1, Fig. 8: the pipeline

PIPED = ["--device", "cpu", "--patch-size", "16", "--limit", "225", "--batch-size", "64", "--epochs", "2", "--head-epochs", "1"]


def torchrun(folder, processes, script, *argv):
    """Run a script by torchrun in `folder`, one thread a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, script, *argv]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def start(folder, n, *flags):
    """Run train.py --pipeline in `folder` in n processes, one thread each, as torchrun would but sooner."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    done = run_script(folder, HERE / "train.py", *flags, "--pipeline", threads=1,
                      processes=[{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)])
    assert [process.returncode for process in done] == n * [0], done


def run_alone(*flags):
    """Run train.py in this process, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_main(*flags)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unpiped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    run_alone(*PIPED, "--model", "vit-16-2-4", "--out", folder / "run")
    return folder / "run"


@pytest.mark.parametrize("n", [2, 4])
def test_fig8_pipeline_trains_bit_for_bit_what_one_process_trains(unpiped, tmp_path, n, capsys):
    flags, run = [*PIPED, "--model", "vit-16-2-4", "--out", "run"], tmp_path / "run"
    if n == 2:
        done = torchrun(tmp_path, n, HERE / "train.py", *flags, "--pipeline")
        assert done.returncode == 0, done.stderr
    else:
        start(tmp_path, n, *flags)
    assert_same_runs(unpiped, run)
    results = [json.loads((folder / "result.json").read_text()) for folder in (unpiped, run)]
    assert results[0]["test_top1"] == results[1]["test_top1"] and results[0]["val_top10"] == results[1]["val_top10"]
    trace = evaluation.read_trace(run)                              # 4 batches, the last one smaller
    steps = sorted((row["process"], row["batch"]) for row in trace if row["event"] == "step")
    assert steps == [(process, batch) for process in range(n) for batch in range(4)]
    assert evaluation.longest_chain(trace) == n + 4 - 1             # L + N - 1 if each process has one layer
    sent = [(row["batch"], row["waited_for"]) for row in trace if row["event"] == "send" and row["process"] == 0]
    assert sent == [(0, None), (0, None), (1, 0), (1, 0), (2, 1), (2, 1), (3, 2), (3, 2)], "two views a batch, one batch waits for the next"
    at = {(row["process"], row["batch"]): (row["start"], row["end"]) for row in trace if row["event"] == "step"}
    for process in range(n - 1):                                    # Fig. 8: on batches t + 1 and t at the same time, if only once
        pairs = [(at[process, batch + 1], at[process + 1, batch]) for batch in range(3)]
        assert any(max(a[0], b[0]) < min(a[1], b[1]) for a, b in pairs), f"processes {process} and {process + 1} worked by turns"
    evaluation.show_schedule(run)
    assert f"the longest chain of dependent steps has {n + 3}" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--algo", "ff", "--model", "vit-16-2-3"], ["--algo", "symba", "--head", "--model", "mlp-16-3"],
                                   ["--algo", "cff", "--views", "1", "--pool", "token", "--model", "vit-16-2-3"]], ids=" ".join)
def test_fig8_other_methods_and_models_in_the_pipeline(tmp_path, flags):
    run_alone(*PIPED, *flags, "--epochs", "1", "--out", tmp_path / "one")
    start(tmp_path, 2, *PIPED, *flags, "--epochs", "1", "--out", "piped")
    assert_same_runs(tmp_path / "one", tmp_path / "piped")


def test_fig8_a_dead_process_ends_the_run_which_goes_on_in_other_processes(unpiped, tmp_path):
    (tmp_path / "dies.py").write_text(f"""if True:
        import os, sys
        sys.path.insert(0, {str(HERE)!r})
        import train
        whole, epochs = train.train_layers, []
        def train_layers(*arguments):
            epochs.append(1)
            if len(epochs) == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), 9)
            return whole(*arguments)
        train.train_layers = train_layers
        train.main()""")
    began = time.time()
    done = torchrun(tmp_path, 2, tmp_path / "dies.py", *PIPED, "--model", "vit-16-2-4", "--out", "run", "--pipeline")
    assert done.returncode != 0 and time.time() - began < 120
    assert [row["epoch"] for row in read_log(tmp_path / "run")] == ["1"]
    start(tmp_path, 3, "--resume", "--out", "run")                  # three go on with what two began
    assert_same_runs(unpiped, tmp_path / "run")
    start(tmp_path, 2, "--resume", "--out", "run")                  # nothing is left to do in stage 1


@task(10)
@pytest.mark.parametrize("waits, n, chain", [
    ("nothing", 2, 2 + 5 - 1),                                      # a process for its input alone
    ("the message before to leave", 2, 2 + 5 - 1),                  # as here
    ("the message before to leave", 3, 3 + 5 - 1),
    ("its own message to be taken", 2, 2 * 5),                      # without any room: it and the last process work by turns
    ("its own message to be taken", 3, 1 + 2 * 5),
], ids=str)
def test_fig8_longest_chain_by_hand(waits, n, chain):
    step = lambda process, batch, event, waited_for=None: dict(process=process, batch=batch, event=event, waited_for=waited_for)
    trace = [step(process, batch, "step") for process in range(n) for batch in range(5)]
    trace += [step(process, batch, "receive", batch) for process in range(1, n) for batch in range(5)]
    if waits == "the message before to leave":
        trace += [step(process, batch, "send", batch - 1 if batch else None) for process in range(n - 1) for batch in range(5)]
    if waits == "its own message to be taken":
        trace += [step(n - 2, batch, "send", batch) for batch in range(5)]                              # the last sender
    got = evaluation.longest_chain(trace)
    assert got == chain, f"Fig. 8, 5 batches on {n} processes; the last sender waits for {waits}: the longest chain has {chain} steps; got {got}"


def test_fig8_layers_are_shared_out_evenly_and_in_order(monkeypatch):
    for L in range(1, 7):
        for n in range(1, L + 1):
            monkeypatch.setattr(cff.dist, "get_world_size", lambda: n)
            segments = []
            for rank in range(n):
                monkeypatch.setattr(cff.dist, "get_rank", lambda: rank)
                model = vit.build_model(f"mlp-8-{L}", (1, 4, 4), 10)
                segments.append(cff.Segment(model, (8,), messages=1))
                assert len(model.layers) == (len(segments[-1].layers) if rank else L), "a later process drops what is not its own"
            assert [l for segment in segments for l in range(segment.first, segment.end)] == list(range(L))
            sizes = [len(segment.layers) for segment in segments]
            assert max(sizes) - min(sizes) <= 1 and [segment.is_last for segment in segments] == [False] * (n - 1) + [True]
    monkeypatch.setattr(cff.dist, "get_world_size", lambda: 7)
    with pytest.raises(ValueError, match="7 processes for 6 layers"):
        cff.Segment(vit.build_model("mlp-8-6", (1, 4, 4), 10), (8,), messages=1)


@pytest.mark.parametrize("flags, world, words", [
    (["--pipeline"], None, "torchrun --nproc-per-node 2 train.py --pipeline"), ([], "2", "torchrun with --pipeline"),
    (["--pipeline", "--algo", "bp"], "2", "gradients cross all layers"), (["--pipeline", "--algo", "scl"], "2", "gradients"),
    (["--pipeline", "--algo", "collab"], "2", "needs the goodness of all others"),
])
def test_fig8_what_cannot_be_piped_is_refused(tmp_path, capsys, monkeypatch, flags, world, words):
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SystemExit) as ended:
        run_main(*flags, "--out", tmp_path / "run")
    assert ended.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_section_5_1_speed_of_the_pipeline(tmp_path, capsys):
    flags = ["--speed", "--model", "vit-8-2-3", "--batch-size", "9", "--rounds", "1", "--batches", "2", "--json", tmp_path / "speed.json"]
    done = torchrun(tmp_path, 2, HERE / "eval.py", *flags)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "speed.json").read_text())
    assert list(record["methods"]) == ["Matrix products", "CFF+M, 1 view", "CFF+M, 2 views", "BP"] and record["processes"] == 2
    for what, row in record["methods"].items():
        work = 2 if what == "Matrix products" else 1                # each process makes as many products as one alone
        assert row["gain"] == [pytest.approx(work * row["alone"] / row["together"])] and row["together"] > 0
    evaluation.show_pipeline_speed(record)
    assert capsys.readouterr().out in done.stdout and len(record["megabytes"]) == 2


def test_best_weights_are_those_of_the_lowest_validation_loss(tmp_path, monkeypatch):
    """Weights are replaced by the epoch's number, validation losses are 3, 1, 2 in stage 1 and 2, 1 in stage 2."""
    seen = []

    def epoch_of(val_losses, part):
        def epoch(run, optimizers, updates):
            number, module = run.state["epoch"], part(run.model)
            seen.append([p.detach().flatten()[0].item() for p in (run.model.layers[1][0].weight, run.model.head[1].bias)])
            with torch.no_grad():
                for p in module.parameters():
                    p.fill_(number + 1)
            return {"train_loss_1": 1.0, "train_loss_2": 1.0, "val_loss_1": 0.0, "val_loss_2": val_losses[number],
                    "val_loss_head": 0.0, "probe": 0.0, "train_saturated_1": 0.0, "train_saturated_2": 0.0}, val_losses[number]
        return epoch

    monkeypatch.setattr(train, "encoder_epoch", epoch_of([3.0, 1.0, 2.0], lambda model: model.layers))
    monkeypatch.setattr(train, "head_epoch", epoch_of([2.0, 1.0], lambda model: model.head))
    run_main(*SMALL, "--model", "mlp-8-2", "--out", tmp_path / "run")
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    assert (best["layers.1.0.weight"] == 2).all() and (best["head.1.weight"] == 2).all()
    assert seen[3][0] == 2, "stage 2 starts from the encoder's best weights"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["best_epoch"], result["best_head_epoch"]) == (2, 2)


def test_a_run_trains_with_its_own_settings():
    run = train.Run(settings_of("--model", "vit-16-2-3", "--limit", 450, "--device", "cpu"))
    assert run.margins == pytest.approx([0.4, 0.25, 0.1])
    assert train.Run(settings_of("--model", "vit-16-2-3", "--algo", "cff", "--limit", 450)).margins == [0.0, 0.0, 0.0]
    images, y = run.train
    assert run.facts["mean"] == pytest.approx((images.double() / 255).mean(dim=(0, 2, 3)).tolist())
    assert run.facts["images"] == [len(y), len(run.val[1]), len(run.test[1])] == [450, 50, 2000]
    assert not torch.equal(run.augment(images[:9]), run.augment(images[:9]))
    assert torch.equal(run.normalise(images[:9]), run.normalise(images[:9]))
    for draw in range(2):
        run.val_generator.manual_seed(0)
        views = run.val_augment(images[:9]) if draw == 0 else views
        assert draw == 0 or torch.equal(views, run.val_augment(images[:9]))


def test_every_setting_reaches_what_it_names():
    run_with = lambda *flags: train.Run(settings_of("--limit", 180, "--device", "cpu", "--model", "vit-16-2-3", *flags))
    run = run_with("--m0", 0.9, "--mL", 0.3, "--decay", "parabolic", "--position-std", 0.5, "--padding", 2)
    assert run.margins == losses.margins(0.9, 0.3, 3, "parabolic") != losses.margins(0.9, 0.3, 3)
    assert run.model.layers[0][0].position.std().item() == pytest.approx(0.5, rel=0.2)
    white, black = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8), run.normalise(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    for augment in (run.augment, run.val_augment):                  # validation's views are augmented as well
        assert (augment(white) == black)[:, 0, :, 16].sum(dim=1).max() == 2, "up to 2 black rows"
    assert torch.equal(run_with("--fill", "edge").augment(white), run.normalise(white))
    g_pos, g_neg = goodness_pair()
    for algo in ("ff", "collab"):
        assert run_with("--algo", algo, "--threshold", 3).loss(g_pos, g_neg) == losses.ff_loss(g_pos, g_neg, 3.0)
    assert run_with("--algo", "symba", "--alpha", 4).loss(g_pos, g_neg) == losses.symba_loss(g_pos, g_neg, 4.0)
    assert train.collapse_value(90, run.settings | {"batch_size": 45}, 10) == pytest.approx(math.log(89)), "90 rows a batch"
    assert {algo: train.collapse_value(90, {"algo": algo}, 10) for algo in ("ff", "symba", "collab", "bp")} == \
        dict(ff=math.log(2), symba=math.log(2), collab=math.log(2), bp=math.log(10))


@pytest.mark.parametrize("algo", train.CHOICES["algo"])
def test_each_layer_has_an_optimizer_of_its_own_scl_and_bp_have_one_for_all(algo):
    settings = settings_of("--model", "mlp-8-3", "--algo", algo, "--weight-decay", 0.3)
    model = train.make_model(settings, {"image_shape": (1, 4, 4), "num_classes": 10})
    trained = {"scl": [model.layers], "bp": [model]}.get(algo, model.layers)            # BP trains the head as well
    for stage, modules in ((1, trained), (2, [model.head])):
        optimizers = train.make_optimizers(model, settings, stage)
        assert [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers] == \
            [[id(p) for p in module.parameters()] for module in modules]
        assert all(type(optimizer) is torch.optim.AdamW and optimizer.defaults["weight_decay"] == 0.3 for optimizer in optimizers)


def test_every_epoch_has_all_images_in_a_new_order(monkeypatch):
    run, seen = train.Run(settings_of(*SMALL)), []

    def epoch(run, optimizers, updates):
        seen.append(torch.cat([x.flatten(1).sum(dim=1) + 10 ** 6 * y for x, y in updates]))
        return {"val_loss_1": 1.0, "probe": 0.0}, 1.0

    monkeypatch.setattr(run, "save", lambda *arguments: None)
    train.train_stage(run, 1, train.make_optimizers(run.model, run.settings), epoch, 2, 0.1)
    x, y = run.train
    stored = x.flatten(1).sum(dim=1) + 10 ** 6 * y                  # an image and its label as one number
    for order in (*seen, stored):
        assert torch.equal(order.sort().values, stored.sort().values)
    assert not torch.equal(*seen) and not torch.equal(seen[0], stored)


def test_ffs_probe_is_fitted_and_tested_without_augmentation(monkeypatch):
    run, seen = train.Run(settings_of(*SMALL, "--algo", "ff")), []
    monkeypatch.setattr(train, "encode_neutral", lambda model, x: (seen.append(x), cff.encode_neutral(model, x))[1])
    x, y = run.train[0][:9], run.train[1][:9]
    train.train_layers(run, train.make_optimizers(run.model, run.settings), [(x, y)])
    train.validation_step(run, x, y)
    assert [torch.equal(images, run.normalise(x)) for images in seen] == [True, True]


@pytest.mark.parametrize("flags, words", [
    (["--model", "vit-16-3-2"], "heads do not divide"), (["--patch-size", "5"], "patches of 5 x 5 do not divide"),
    (["--model", "resnet"], "a model is named"), (["--limit", "100000"], "there are 9000 training images"),
    (["--dataset", "cifar11"], "invalid choice"), (["--m0", "3"], "--m0 must lie in 0..2"), (["--epochs", "0"], "--epochs"),
    (["--temperature", "0"], "--temperature"), (["--resume"], "no run in"), (["--batch", "64"], "unrecognized"),
    (["--views", "1", "--limit", "36", "--batch-size", "2", "--seed", "8"], "two images of a class in a batch"), (["--padding", "33"], "more than the image's side"),
    (["--head"], "--head and --skip-first are for"), (["--algo", "bp", "--skip-first"], "--head and --skip-first are for"),
])
def test_bad_input_ends_with_one_line_and_status_2(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        run_main(*flags, "--out", tmp_path / "run")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("train.py: error:") and words in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dataset, file", [("mnist", "train-images-idx3-ubyte.gz"), ("cifar10", "cifar-10-python.tar.gz"),
                                           ("cifar100", "cifar-100-python.tar.gz"), ("tinyimagenet", "tiny-imagenet-200.zip")])
def test_missing_data_say_where_to_put_which_file(tmp_path, monkeypatch, dataset, file):
    def no_network(*arguments, **options):
        raise OSError("no network")

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", no_network)
    with pytest.raises(OSError, match=f"put .*{file}.* into {re.escape(str(tmp_path))}.* or use --dataset shapes") as error:
        train.load_data(dataset, str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_setting_comes_from_what_is_typed_then_the_recipe_then_the_data_set():
    assert settings_of("--dataset", "cifar10")["padding"] == 12
    assert settings_of("--dataset", "cifar10", "--recipe", "short")["padding"] == 4
    assert settings_of("--dataset", "cifar10", "--recipe", "short", "--padding", 7)["padding"] == 7
    paper = settings_of("--dataset", "cifar10")
    expected = dict(model="vit-128-4-5", batch_size=512, lr=0.004, head_lr=0.0005, epochs=600, head_epochs=50, temperature=0.15,
                    m0=0.4, mL=0.1, views=2, augment="crop", pool="mean", schedule="constant", warmup=0, position_std=1.0)
    assert {name: paper[name] for name in expected} == expected
    models = {"mnist": "mlp-500-3", "cifar100": "vit-192-6-6", "tinyimagenet": "vit-240-6-7"}
    assert {dataset: settings_of("--dataset", dataset)["model"] for dataset in models} == models
    bp = ["--dataset", "cifar10", "--algo", "bp"]
    assert settings_of(*bp)["lr"] == 0.0005 and settings_of(*bp, "--recipe", "short")["lr"] == 0.002 and settings_of(*bp, "--lr", 1)["lr"] == 1
    assert settings_of("--algo", "bp")["lr"] == 0.002, "shapes have the recipe for short runs"


def test_a_run_is_named_by_what_is_typed():
    name = lambda *flags: train.parse(list(flags))[0]["out"]
    assert name("--dataset", "cifar10") == "runs/cifar10-cffm-vit-128-4-5-s0"
    assert name("--dataset", "cifar10", "--model", "ViT[64 4 4]", "--recipe", "short", "--limit", "9", "--seed", "2") == \
        "runs/cifar10-cffm-vit-64-4-4-short-limit9-s2"
    assert train.parse(["--model", "ViT[64 4 4]"])[0]["model"] == "vit-64-4-4", "one model, one name: its runs share a row of a table"
    assert name("--views", "1", "--data-dir", "x", "--head-lr", "0.1") == "runs/shapes-cffm-vit-64-4-3-views1-headlr0.1-s0"


def test_resume_refuses_another_setting(tmp_path, capsys):
    run_main(*SMALL, "--out", tmp_path / "run")
    with pytest.raises(SystemExit):
        train.parse(["--resume", "--out", str(tmp_path / "run"), "--lr", "0.1"])
    assert "has --lr 0.004" in capsys.readouterr().err
    assert train.parse(["--resume", "--out", str(tmp_path / "run"), "--device", "auto", "--data-dir", "x"])[0]["data_dir"] == "x"
    assert train.parse(["--resume", "--out", f"{tmp_path}/./run/"])[0]["out"] == str(tmp_path / "run"), "the same folder, as a shell writes it"
    before = (tmp_path / "run" / "log.csv").read_text()
    (tmp_path / "run" / "last.pt").unlink()                         # as the records in results/ are kept
    with pytest.raises(SystemExit) as ended:
        run_main("--resume", "--out", tmp_path / "run")
    assert ended.value.code == 2 and "last.pt, which --resume needs" in capsys.readouterr().err
    assert (tmp_path / "run" / "log.csv").read_text() == before


def test_collapse_and_nan_are_said_in_words(tmp_path, capsys, monkeypatch):
    collapsed = lambda f, y, m, tau: 0 * f.sum() + math.log(len(y) - 1)
    with monkeypatch.context() as patch:
        patch.setattr(cff, "marginal_contrastive_loss", collapsed)
        run_main(*SMALL, "--out", tmp_path / "flat")
    assert "Layer 1 has collapsed" in capsys.readouterr().out
    monkeypatch.setattr(cff, "marginal_contrastive_loss", lambda f, y, m, tau: f.sum() * math.nan)
    with pytest.raises(SystemExit, match="not a number in epoch 1"):
        run_main(*SMALL, "--out", tmp_path / "nan")
    assert not (tmp_path / "nan" / "last.pt").exists()


def test_a_long_run_on_a_cpu_is_announced(tmp_path, capsys, monkeypatch):
    run = train.Run(settings_of(*SMALL, "--epochs", 600))
    train.show_progress(run, 1, 3, 5, 600, 0.03)
    assert "hours" not in capsys.readouterr().out
    train.show_progress(run, 1, 3, 5, 600, 30.0)                    # 10 s an update, 3,000 updates
    assert "about 8.3 hours" in (shown := capsys.readouterr().out)
    assert "--model vit-64-4-4 --recipe short --limit 450 --epochs 30 --head-epochs 10 --out runs/short" in shown
    run.settings["model"] = "mlp-16-2"
    train.show_progress(run, 1, 3, 5, 600, 30.0)
    assert "the same command with --limit 450 --epochs 30" in capsys.readouterr().out, "an MLP stays one"


def test_a_last_batch_without_positives_is_skipped():
    settings = {"batch_size": 4, "views": 1, "algo": "cffm"}
    parts = list(train.batches(torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 3]), settings))
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3]]
    for other in (dict(views=2), dict(algo="ff"), dict(algo="bp")):
        assert len(list(train.batches(torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 3]), settings | other))) == 2


def test_learning_rate_rises_and_falls():
    cosine = lambda step: train.learning_rate(step, 100, {"schedule": "cosine"}, 1.0, 9)
    assert cosine(0) == pytest.approx(0.1) and cosine(99) < 0.001 and cosine(50) == pytest.approx(0.5)
    constant = lambda step: train.learning_rate(step, 100, {"schedule": "constant"}, 0.3, 0)
    assert constant(0) == constant(99) == 0.3


def test_every_update_has_the_learning_rate_of_its_schedule(tmp_path, monkeypatch):
    rates, settings, step = [], settings_of(*SMALL, "--warmup", 4, "--schedule", "cosine"), torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    run_main(*SMALL, "--warmup", 4, "--schedule", "cosine", "--out", tmp_path / "run")
    encoder = [train.learning_rate(t, 15, settings, settings["lr"], 4) for t in range(15) for layer in range(2)]     # 3 epochs, 5 batches
    assert rates == encoder + [train.learning_rate(t, 10, settings, settings["head_lr"], 0) for t in range(10)]     # 2 epochs


def test_top_k_and_each_data_sets_metric(monkeypatch):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))              # guesses, the first first
    scores = torch.empty(20).index_copy(0, order, 20.0 - torch.arange(20))
    asked = []
    monkeypatch.setattr(train, "predict", lambda model, images, *how: (asked.append(how), scores.repeat(len(images), 1))[1])
    model = vit.build_model("mlp-4-1", (1, 4, 4), 10)
    y = order[torch.tensor([0, 0, 2, 4, 5, 9, 10, 19])]                                 # how many guesses come before the label
    assert train.accuracy(model, torch.zeros(8, 1), y, lambda x: x, settings_of("--algo", "ff", "--skip-first")) == {1: 25, 5: 50, 10: 75}
    assert asked == [("ff", False, True)], "by the run's method, head and skip_first"
    assert train.METRIC == {"shapes": "top1", "mnist": "top1", "cifar10": "top1", "cifar100": "top5", "tinyimagenet": "top10"}


def test_mnist_is_not_flipped_and_other_data_are(monkeypatch):
    images, y = torch.arange(256).repeat(300).to(torch.uint8).view(300, 1, 16, 16), torch.arange(300) % 10
    monkeypatch.setattr(train, "load_data", lambda *arguments: (images, y, images, y))
    for dataset in ("mnist", "cifar10"):
        run = train.Run(settings_of("--dataset", dataset, "--model", "mlp-4-1", "--augment", "flip", "--device", "cpu"))
        x = run.train[0]
        flipped = (run.augment(x) == run.normalise(x.flip(3))).flatten(1).all(dim=1)
        assert flipped.float().mean() == (0 if dataset == "mnist" else pytest.approx(0.5, abs=0.1))


def test_probe_is_least_squares_and_the_watch_sees_what_the_loss_sees(small):
    model, optimizers, x, y, augment = small
    with train.watch(model) as seen:
        h = model.layers[0](model.patches(x))
    assert torch.equal(seen[0][0], h.mean(dim=1)) and not model.layers[0]._forward_hooks
    f = torch.randn(60, 4)
    labels = (f @ torch.randn(4, 3)).argmax(dim=1)
    probe = train.Probe(3)
    for rows in torch.arange(60).split(25):
        probe.add(f[rows], labels[rows])
    X = torch.cat([f, torch.ones(60, 1)], dim=1)
    expected = (X @ torch.linalg.lstsq(X, one_hot(labels, 3).float()).solution).argmax(dim=1)
    assert probe.correct(f, labels) == (expected == labels).sum()


def test_section_3_5_saturated_share_is_counted_over_all_pairs():
    f, y, R = mixed_batch(0)
    assert train.saturated_share(f, y, M).tolist() == [R.sum(), sum(len(sets(y, i)[0]) for i in range(len(y)))]


# ------------------------------------------------------------------------------------------------ what a run learned: eval.py

def slow_fisher(f, y, classes_mean=False):
    """Eqs. 19-22, entry by entry."""
    E, N, labels = f.shape[1], len(f), sorted(set(y.tolist()))
    mean = lambda rows: [sum(f[i, a].item() for i in rows) / len(rows) for a in range(E)]
    S_w, S_b, m = torch.zeros(E, E, dtype=f.dtype), torch.zeros(E, E, dtype=f.dtype), mean(range(N))
    for c in labels:
        rows = [i for i in range(N) if y[i] == c]
        m_c = mean(rows)
        for a in range(E):
            for b in range(E):
                S_w[a, b] += sum((f[i, a] - m_c[a]) * (f[i, b] - m_c[b]) for i in rows) / len(rows)
                S_b[a, b] += len(rows) * (m_c[a] - m[a]) * (m_c[b] - m[b]) / N
    return torch.linalg.solve(S_w / (len(labels) if classes_mean else 1), S_b).trace().item()


def test_eq19_to_eq22_fisher_criterion_is_a_double_loop():
    f, y = batch(0, n=40, E=4, classes=3)
    f = f + normalize(torch.randn(3, 4, dtype=f.dtype, generator=torch.Generator().manual_seed(1)), dim=1)[y]
    for averaged in (False, True):
        assert abs(evaluation.fisher_criterion(f, y, averaged) - slow_fisher(f, y, averaged)) < 1e-9
    assert evaluation.fisher_criterion(f, y, averaged=True) == pytest.approx(3 * evaluation.fisher_criterion(f, y))
    rotated = f @ torch.tensor([[2.0, 1, 0, 0], [0, 1, 0, 3], [0, 0, 0.5, 0], [1, 0, 0, 1]], dtype=f.dtype)
    assert evaluation.fisher_criterion(rotated, y) == pytest.approx(slow_fisher(f, y)), "no linear map changes it"


def test_eq22_with_a_singular_scatter_is_that_of_the_rest():
    f, y = batch(0, n=40, E=4, classes=3)
    dead = torch.cat([f, torch.zeros(40, 2, dtype=f.dtype), f[:, :1]], dim=1)           # units always off, a unit twice
    assert evaluation.fisher_criterion(dead, y) == pytest.approx(evaluation.fisher_criterion(f, y), abs=1e-9)


def test_eq19_within_class_scatter_is_that_of_scikit_learns_lda():
    discriminant_analysis = pytest.importorskip("sklearn.discriminant_analysis")
    y = torch.arange(3).repeat_interleave(20)                                           # balanced
    f = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + y[:, None]
    lda = discriminant_analysis.LinearDiscriminantAnalysis(solver="eigen", store_covariance=True).fit(f.numpy(), y.numpy())
    S_w = 3 * torch.as_tensor(lda.covariance_)
    means = torch.stack([f[y == c].mean(dim=0) for c in range(3)]) - f.mean(dim=0)
    assert evaluation.fisher_criterion(f, y) == pytest.approx(torch.linalg.solve(S_w, means.T @ means / 3).trace().item(), abs=1e-9)


def test_fig5_the_three_images_are_an_anchor_a_positive_and_a_negative():
    f = normalize(torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [1, 1], [1, 2], [2, 1], [3, 1]]), dim=1)
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    assert evaluation.three_images(f, y) == [0, 3, 5], "cosines of positives 0 < 0.71 < 0.995, of negatives 0.45 < 0.89 < 0.95"
    assert evaluation.three_images(f, torch.tensor([5, 0, 0, 0, 1, 1, 1]))[0] == 1, "the first that has a positive"
    with pytest.raises(ValueError, match="both a positive and a negative"):
        evaluation.three_images(f, torch.arange(7))


def test_fig6_convergence_is_99_percent_of_the_fall():
    log = lambda *losses: [{"epoch": e, "train_loss_1": 0, "val_loss_1": 7.0, "val_loss_2": v} for e, v in enumerate(losses, start=1)]
    assert evaluation.epochs_to_convergence({"algo": "cff"}, log(5, 4.02, 4.011, 4.009, 4, 4.5)) == 4
    assert evaluation.epochs_to_convergence({"algo": "cff"}, log(5, 6, 7)) == 1, "a loss that never fell"
    three = [{"val_loss_1": a, "val_loss_2": b, "val_loss_3": c} for a, b, c in ((9, 1, 1), (0, 1, 0.5), (0, 0.5, 0.5))]
    assert evaluation.epochs_to_convergence({"algo": "ff"}, three) == 3, "FF's is the sum without the first layer"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders of five tiny runs: CFF with two seeds, CFF+M with two margins, FF; and of each thing that is no finished run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"cff-s0": ["--algo", "cff"], "cff-s1": ["--algo", "cff", "--seed", 1], "m2": ["--m0", 0.2], "m6": ["--m0", 0.6],
                        "ff": ["--algo", "ff"]}.items():
        run_main(*SMALL, "--limit", 225, "--patch-size", 16, "--epochs", 2, "--head-epochs", 1, *flags, "--out", folder / name)
    for name in ("empty", "unfinished", "torn", "other"):
        (folder / name).mkdir()
    for file in ("config.json", "log.csv"):
        (folder / "unfinished" / file).write_text((folder / "ff" / file).read_text())
        (folder / "torn" / file).write_text((folder / "ff" / file).read_text())
    (folder / "torn" / "result.json").write_text('{"test_top1": 5')
    (folder / "torn" / "best.pt").write_bytes((folder / "ff" / "best.pt").read_bytes()[:5000])
    (folder / "other" / "best.pt").write_text("some text")
    return folder


def run_eval(monkeypatch, *arguments):
    """eval.py's exit status."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    try:
        evaluation.main()
    except SystemExit as end:
        return end.code
    return 0


def test_what_is_no_finished_run_is_said_in_a_line_and_the_rest_shown(finished, capsys, monkeypatch):
    folders = [finished / name for name in ("empty", "cff-s0", "unfinished", "cff-s1", "torn", "nothing")]
    assert run_eval(monkeypatch, *folders) == 0
    out, err = capsys.readouterr()
    row = out.splitlines()[-1].split("  ")
    assert row[0] == "cff" and "0, 1" in out and out.count("vit-") == 1, "two seeds, one row"
    for words in ("empty: no run", "unfinished: not finished; go on with: python train.py --resume", "torn: config.json, result.json or",
                  "nothing: no run"):
        assert words in err and len(err.splitlines()) == 4
    assert run_eval(monkeypatch, finished / "empty", finished / "torn") == 2, "nothing is left"
    for name, words in (("torn", "best.pt cannot be read"), ("other", "best.pt cannot be read"), ("empty", "no weights of a run")):
        assert run_eval(monkeypatch, finished / name) == 2
        assert words in capsys.readouterr().err


def test_accuracy_by_class_and_by_layer(finished, capsys):
    run, top = evaluation.open_run(finished / "cff-s0"), evaluation.evaluate(finished / "cff-s0")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("top-1 of each class"))
    images, y = run.test
    right = cff.predict(run.model, run.normalise(images[y == 3]), "cff").argmax(dim=1) == 3
    assert f" triangle {100 * right.double().mean():.1f}," in line and line.count(",") == 9
    assert top[1] == json.loads((finished / "cff-s0" / "result.json").read_text())["test_top1"]
    images, y = run.train
    features = evaluation.layer_features(run, images)
    expected = run.model.pool(run.model.layers[0](run.model.patches(run.normalise(images))))
    assert torch.allclose(features[0], expected, atol=1e-5) and len(features) == 2
    X = torch.cat([normalize(features[1]), torch.ones(len(y), 1)], dim=1).double()
    test = torch.cat([normalize(evaluation.layer_features(run, run.test[0])[1]), torch.ones(2000, 1)], dim=1).double()
    ridge = 1e-6 * (X.T @ X).trace() * torch.eye(X.shape[1]).double()
    guess = (test @ torch.linalg.solve(X.T @ X + ridge, X.T @ one_hot(y, 10).double())).argmax(dim=1)
    assert evaluation.probe_layers(run)[1] == pytest.approx(100 * (guess == run.test[1]).double().mean().item(), abs=0.11)


def test_a_run_that_stopped_before_its_head_is_not_tested(finished, tmp_path, capsys):
    for file in ("config.json", "best.pt", "log.csv"):
        (tmp_path / file).write_bytes((finished / "cff-s0" / file).read_bytes())
    rows = (tmp_path / "log.csv").read_text().splitlines(keepends=True)
    (tmp_path / "log.csv").write_text("".join(row for row in rows if not row.startswith("2,")))
    assert evaluation.evaluate(tmp_path) == {}
    out = capsys.readouterr().out
    assert "not finished" in out and "head is not trained" in out and "linear probe" in out and "top-1" not in out


def test_a_table_of_runs_row_by_hand(finished, capsys):
    evaluation.show_table([finished / name for name in ("cff-s0", "cff-s1", "ff")], markdown=True)
    said, _, heading, _, *rows = [line.strip("| ") for line in capsys.readouterr().out.splitlines()]
    table = [dict(zip(re.split(r" +\| ", heading), re.split(r" +\| ", row))) for row in rows]
    results = [json.loads((finished / f"cff-s{seed}" / "result.json").read_text()) for seed in (0, 1)]
    a, b = (result["test_top1"] for result in results)
    assert said == "In all rows: model vit-16-2-2, data shapes, images 225, augment crop, pool mean, missing 0.0, wrong 0.0, metric top-1"
    assert [row["Run"] for row in table] == ["cff", "ff"] and [row["Method"] for row in table] == ["CFF", "FF"]
    assert [row["Views"] for row in table] == ["2", "1"] and [row["Epochs"] for row in table] == ["2 + 1", "2"]
    assert table[0]["Seeds"] == "0, 1" and table[0]["Test %"] == f"{(a + b) / 2:.1f} ± {abs(a - b) / 2 ** 0.5:.1f}"
    assert table[1]["Validation %"] == f"{json.loads((finished / 'ff' / 'result.json').read_text())['val_top1']:.1f}"


def test_a_data_set_a_limit_and_a_kind_of_model_have_their_own_table(finished, tmp_path, capsys):
    for name, old, new in (("mnist", '"shapes"', '"mnist"'), ("mlp", "vit-16-2-2", "mlp-500-3"), ("all", '"limit": 225', '"limit": 0'),
                           ("skip", '"skip_first": false', '"skip_first": true')):
        (tmp_path / name).mkdir()
        for file in ("config.json", "log.csv", "result.json"):
            (tmp_path / name / file).write_text((finished / "ff" / file).read_text().replace(old, new))
    evaluation.show_table([finished / "cff-s0", *(tmp_path / name for name in ("mnist", "mlp", "all", "skip")), finished / "ff"])
    tables = capsys.readouterr().out.split("\n\nIn all rows: ")
    rows = [[line.split()[0] for line in table.strip().splitlines()[3:]] for table in tables]
    assert rows == [["cff-s0", "skip", "ff"], ["mnist"], ["mlp"], ["all"]] and "data mnist" in tables[1]
    assert tables[0].count("FF without layer 1 ") == 1


def test_a_table_says_what_the_paper_reports_at_full_scale():
    mnist, vit = train.defaults("mnist", "ff"), train.defaults("cifar10", "cffm")
    assert evaluation.paper_says(mnist) == "97.12" and evaluation.paper_says(vit) == "80.42"
    assert evaluation.paper_says({**vit, "model": "mlp-800-4", "augment": "flip"}) == "54.55"
    for change in (dict(limit=10000), dict(pool="token"), dict(missing=0.5), dict(model="vit-64-4-4"), dict(augment="none"), dict(views=1, m0=0.2), dict(m0=0.2), dict(algo="ff", skip_first=True)):
        assert evaluation.paper_says({**vit, **change}) == "-"
    table4 = {**vit, "model": "vit-192-6-6", "augment": "crop+randaug"}
    for said, settings in (("80.58", {**table4, "missing": 0.5}), ("71.20", {**table4, "label_noise": 0.4}), ("-", {**table4, "missing": 0.5, "limit": 9}),
                           ("79.00", {**vit, "views": 1}), ("76.63", {**vit, "augment": "crop+randaug", "pool": "token"}), ("65.33", {**vit, "algo": "ff", "head": True})):
        assert evaluation.paper_says(settings) == said


def test_fig5_numbers_stand_without_pictures(finished, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rows = evaluation.show_layers(finished / "m2")
    out, run = capsys.readouterr().out, evaluation.open_run(finished / "m2")
    assert "pip install matplotlib" in out and len(rows) == 2
    f = evaluation.layer_features(run, run.val[0])[1]
    assert rows[1]["Fisher"] == pytest.approx(evaluation.fisher_criterion(f, run.val[1]))
    assert rows[1]["Val loss"] == min(float(row["val_loss_2"]) for row in read_log(finished / "m2")[:2]), "of the epoch kept"
    f = normalize(f)
    _, positive, negative = evaluation.three_images(normalize(evaluation.layer_features(run, run.val[0])[0]), run.val[1])
    assert rows[1]["Cosine to the positive"] == pytest.approx((f[0] @ f[positive]).item(), abs=1e-6)
    assert rows[1]["to the negative"] == pytest.approx((f[0] @ f[negative]).item(), abs=1e-6)
    assert run_eval(monkeypatch, "--margins", 0.4, 0.1, 3) == 2 and "linear      0.400 0.250 0.100" in capsys.readouterr().out


def test_pictures_of_layers_runs_margins_and_views(finished, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert run_eval(monkeypatch, finished / "m2", finished / "ff", finished / "empty", "--layers") == 0, "one of three is no run"
    assert "empty" in capsys.readouterr().err
    assert run_eval(monkeypatch, *[finished / name for name in ("m2", "m6", "cff-s0", "cff-s1")], "--figure", "m0.png") == 0
    assert run_eval(monkeypatch, finished / "m2", finished / "ff", "--figure", "epochs.png") == 0
    assert run_eval(monkeypatch, "--margins", 0.4, 0.1, 8) == 0
    assert run_eval(monkeypatch, "--show-views", "--figure", "shapes.png") == 0
    pictures = [finished / name / file for name in ("m2", "ff") for file in ("layers.png", "curves.png")]
    for picture in [*pictures, *map(Path, ("m0.png", "epochs.png", "margins.png", "shapes.png"))]:
        grey = torchvision.io.decode_image(str(picture), "GRAY").float()
        assert min(grey.shape[1:]) > 200 and grey.std() > 10, f"{picture} shows nothing"
        assert (grey[0, 0] > 250).all() and (grey[0, -1] > 250).all() and (grey[0, :, -1] > 250).all(), f"{picture} is cut"


def records(*runs):
    """Groups of one record each, of (settings that differ from the defaults, result)."""
    return [[evaluation.Record("", {**train.DEFAULTS, **settings}, {"metric": "top1", **result}, [], [900, 100, 200])]
            for settings, result in runs]


def test_fig4b_fig7_and_table_4_what_is_drawn_against_what():
    val = lambda value: {"val_top1": value, "test_top1": value - 10}
    by_margin = records((dict(m0=0.6), val(72)), (dict(m0=0.2), val(70)), (dict(algo="cff"), val(69)))
    assert evaluation.what_varies(by_margin) == "m0"
    assert evaluation.series(by_margin, "m0") == {"cff": [(0.4, 69, 0)], "cffm": [(0.2, 70, 0), (0.6, 72, 0)]}
    by_margin[0] += records((dict(m0=0.6, seed=1), val(76)))[0]
    assert evaluation.series(by_margin, "m0")["cffm"][1] == (0.6, 74, pytest.approx(8 ** 0.5)), "two seeds, 72 and 76"
    by_model = records(*[(dict(model=name), val(50)) for name in ("vit-128-4-5", "vit-64-4-4", "vit-240-6-7")])
    assert [x for x, _, _ in evaluation.series(by_model, "model")["cffm"]] == ["vit-64-4-4", "vit-128-4-5", "vit-240-6-7"]
    noisy = records((dict(label_noise=0.2), val(60)), (dict(label_noise=0.0), val(80)))
    assert evaluation.series(noisy, "label_noise") == {"cffm": [(0.0, 70, 0), (0.2, 50, 0)]}, "the test accuracy"
    assert evaluation.series(records(({}, val(50)), (dict(limit=100), val(40))), "limit")["cffm"][0][0] == 900, "0 means all"
    assert evaluation.what_varies(records(({}, {}), (dict(algo="bp", lr=0.1), {}))) == "", "each method has its own rates"


def test_fig7_models_stand_in_order_and_methods_without_margins_are_level():
    pytest.importorskip("matplotlib")
    accuracy = {"val_top1": 50}
    axes = [evaluation.pyplot().subplots()[1] for _ in range(2)]
    evaluation.draw_by_setting(axes[0], records((dict(algo="cff", model="vit-128-4-5"), accuracy),
                                                *[(dict(model=name), accuracy) for name in ("vit-128-4-5", "vit-64-4-4")]), "model")
    axes[0].figure.canvas.draw()
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["vit-64-4-4", "vit-128-4-5"]
    evaluation.draw_by_setting(axes[1], records((dict(m0=0.2), accuracy), (dict(m0=0.6), accuracy), (dict(algo="bp"), accuracy)), "m0")
    level, = [line for line in axes[1].lines if line.get_label() == "BP+CE"]
    assert list(level.get_xdata()) == [0, 1], "from side to side"


@pytest.mark.parametrize("one, other", [(dict(m0=0.2), dict(m0=0.4, temperature=1.0)), (dict(algo="bp"), dict(model="mlp-8-2", seed=3,
                                        augment="flip"))], ids=["of one method", "of two methods"])
def test_runs_that_differ_in_several_settings_are_not_drawn(one, other):
    with pytest.raises(ValueError, match="differ in (m0, temperature|augment, model)$"):
        evaluation.what_varies(records((one, {}), (other, {})))


def test_table2_and_table6_speed_of_steps_inference_and_memory_by_depth(capsys, monkeypatch):
    few = {method: evaluation.METHODS[method] for method in ("BP", "CFF+M, 1 view", "CFF+M, 2 views")}
    monkeypatch.setattr(evaluation, "METHODS", {**few, "FF": ("ff", 1)})
    memory = lambda cases: {case[:2]: 100.0 * len(case[1]) for case in cases}           # new processes take seconds each
    monkeypatch.setattr(evaluation, "measure_memory", memory)
    record = evaluation.speed("vit-8-2-2", 8, 2, depths=(1, 10), n=4)
    table = record["methods"]
    assert list(table) == list(evaluation.METHODS) and table["BP"]["ratio"] == 1
    assert all(row["min"] <= row["seconds"] <= row["max"] and row["share"] > 0 for row in table.values())
    for method in ("CFF+M, 2 views", "FF"):                         # views and passes are paid for in products
        assert table[method]["gigaflop"] == pytest.approx(2 * table["CFF+M, 1 view"]["gigaflop"], rel=0.3)
    assert list(record["inference"]) == ["CFF+M, one pass", "FF, with head", "FF, a pass for each class"]
    assert record["megabytes_by_depth"]["BP"] == {1: 900.0, 10: 1000.0}
    assert list(record["augment"]) == ["crop", "crop+randaug"]
    assert all(row["images"] * row["seconds"] == pytest.approx(8) for row in record["augment"].values())
    evaluation.show_speed(json.loads(json.dumps(record)))
    out = capsys.readouterr().out
    assert "| CFF+M, 2 views | " in out and "| crop+randaug | " in out and re.search(r"\| Method +\| 1 +\| 10 +\|", out)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    import resource
    train.keep_memory()
    faults = []
    for n in (30_000_000, 25_000_000, 20_000_000):                  # 80 MB in 20,000 pages are the last
        torch.ones(n)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[2] - faults[1] < 1000


def test_memory_of_bp_grows_with_depth_and_that_of_cff_does_not():
    cases = [(method, f"vit-64-4-{L}", "cifar10", 64, torch.device("cpu")) for method in ("BP", "CFF+M, 1 view") for L in (2, 8)]
    memory = evaluation.measure_memory(cases)
    if memory:                                                      # {} where it cannot be measured
        assert memory["BP", "vit-64-4-8"] > 2 * memory["BP", "vit-64-4-2"]
        assert memory["CFF+M, 1 view", "vit-64-4-8"] < 1.5 * memory["CFF+M, 1 view", "vit-64-4-2"]


def test_the_readmes_numbers_are_the_records(capsys):
    """Each line of what eval.py prints of the records in results/ stands in the README."""
    readme = (HERE / "README.md").read_text()
    folders = sorted(path.parent for path in (HERE / "results").glob("*/result.json"))
    assert folders
    evaluation.show_table(folders, markdown=True)
    evaluation.show_speed(json.loads((HERE / "results" / "speed.json").read_text()))
    for path in sorted((HERE / "results").glob("pipeline-vit*.json")):
        evaluation.show_pipeline_speed(json.loads(path.read_text()))
    lines = capsys.readouterr().out.splitlines()
    for path in sorted((HERE / "results").glob("pipeline-memory*.json")):               # of these the memory alone
        evaluation.show_pipeline_speed(json.loads(path.read_text()))
        lines.append(capsys.readouterr().out.splitlines()[-1])
    for line in lines:
        assert line in readme, f"not in the README: {line}"


def test_the_numbers_of_the_readmes_claims_are_accuracies_of_records_or_the_papers_or_speeds(capsys):
    readme, results = (HERE / "README.md").read_text(), HERE / "results"
    known, validated = [f"{value:.2f}" for by_method in evaluation.PAPER.values() for value in by_method.values()], []
    known += ["97.30"]                                              # Table 3's CFF+M on MNIST; PAPER has Table 1's
    for runs in evaluation.read_groups([path.parent for path in results.glob("*/result.json")]):
        for part, shown in (("test_", known), ("val_", validated)):
            accuracies = [run.result[part + run.result["metric"]] for run in runs]
            shown += [f"{value:.1f}" for value in (*accuracies, statistics.mean(accuracies))]
    evaluation.show_speed(json.loads((results / "speed.json").read_text()))
    for path in results.glob("pipeline-vit*.json"):
        evaluation.show_pipeline_speed(json.loads(path.read_text()))
    known += re.findall(r"\d+\.\d+", capsys.readouterr().out)
    claims = readme.split("### What of the paper holds here")[1].split("\n### ")[0]
    claims = re.sub(r"^\|[^|]*\||Sec\. [\d.]+", "", claims, flags=re.M)
    by_validation = r"By validation accuracy.*?(?:\. |\n)|alidation accuracy: .*|which alone has .*"
    for text, shown in ((re.sub(by_validation, "", claims), known), (" ".join(re.findall(by_validation, claims)), validated)):
        numbers = {number for number in re.findall(r"\b\d+\.\d+\b", text) if float(number) > 0.9}      # the smaller ones are settings
        assert numbers and numbers <= set(shown), f"in no record and no table of the paper: {numbers - set(shown)}"
    for name, shown in re.findall(r"\| `(short15[^`.]*)` \| ([^|]+) \|", readme):
        value = json.loads((results / name / "result.json").read_text())["val_top1"]
        assert shown == f"{value:.1f}", f"{name} has {value} % on validation data"


# ------------------------------------------------------------------------------------------------------------ the classroom
#
#     python test_cff.py --template > mine.py         what to write, to start from
#     python test_cff.py mine.py [-k task04]          grade it
#
# The tests marked @task above are the grading: they run on the student's functions in the place of the project's.

TASKS = {                                                           # number: (paper, what to write)
    1: ("Eqs. 1 and 2", [(losses, "goodness"), (losses, "ff_loss")]),
    2: ("Eq. 3", [(losses, "contrastive_loss")]),
    3: ("Eq. 12", [(losses, "inner_contrastive_loss")]),
    4: ("Eqs. 14-17, Sec. 3.5", [(losses, "marginal_contrastive_loss"), (losses, "saturated")]),
    5: ("Eq. 18", [(losses, "grad_anchor")]),
    6: ("Eqs. A.5-A.7", [(losses, "grad_positive"), (losses, "grad_negative")]),
    7: ("Algorithm 1, left", [(cff, "cff_step")]),
    8: ("Algorithm 1, right", [(cff, "wrong_labels"), (cff, "ff_step")]),
    9: ("Sec. 3.4", [(vit, "patchify"), (vit, "Attention"), (vit, "EncoderLayer")]),
    10: ("Figs. 4a and 8", [(losses, "margins"), (evaluation, "longest_chain")]),
}


def template():
    """The file a student starts from: signatures and docstrings of all tasks."""
    def stub(thing, number, indent=""):
        lines = [f"{indent}{type_of(thing)} {thing.__name__}{signature(thing)}:"]
        if thing.__doc__:
            lines += [f'{indent}    """' + thing.__doc__.strip() + '"""']
        if inspect.isclass(thing):
            return "\n".join([*lines, *(f"\n{stub(thing.__dict__[name], number, indent + '    ')}" for name in ("__init__", "forward"))])
        return "\n".join([*lines, f'{indent}    raise NotImplementedError("task{number:02d}")'])

    def type_of(thing):
        return "class" if inspect.isclass(thing) else "def"

    def signature(thing):
        return "(nn.Module)" if inspect.isclass(thing) else str(inspect.signature(thing))

    parts = ['"""My solutions; the tasks stand in the README. Grade them: python test_cff.py THIS_FILE"""\nimport math\n\n'
             "import torch\nfrom torch import nn\nfrom torch.nn import functional as F"]
    for number, (paper, names) in TASKS.items():
        parts.append(f"# task{number:02d}: {paper}\n\n" + "\n\n\n".join(stub(getattr(module, name), number) for module, name in names))
    return "\n\n\n".join(parts) + "\n"


@contextmanager
def in_place_of(functions):
    """Put {(module, name): function} into the project for a while."""
    old = {place: getattr(*place) for place in functions}
    for place, function in functions.items():
        setattr(*place, function)
    try:
        yield
    finally:
        for place, function in old.items():
            setattr(*place, function)


class Grader:
    """A pytest plugin: runs each task's tests on the functions of a student's file, and tells how far each task is."""

    def __init__(self, path):
        self.path, self.outcomes, self.words = Path(path), {number: [] for number in TASKS}, {}
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        self.mine = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.mine)
        tasks = {name: number for number, (_, names) in TASKS.items() for _, name in names}
        self.taken = {}                                             # answers that are not the student's own
        for name, number in tasks.items():
            function = getattr(self.mine, name, None)
            if function is not None and function.__module__ != self.mine.__name__:
                self.taken[name] = function.__module__
                delattr(self.mine, name)

    def number(self, item):
        """The task that a test belongs to, None if to none."""
        return next((number for number in TASKS if hasattr(item.function, f"task{number:02d}")), None)

    def pytest_configure(self, config):
        config.option.tbstyle = "native"                            # pytest's usual one reads this whole file at each failure

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.number(item)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        names = TASKS[self.number(item)][1]
        with in_place_of({(module, name): getattr(self.mine, name, self.to_do(name)) for module, name in names}):
            return (yield)

    def to_do(self, name):
        """What stands for a function that is not in the file."""
        def missing(*arguments, **keywords):
            raise NotImplementedError(f"{self.path.name} has no {name}")
        return missing

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report, number = (yield), self.number(item)
        if call.when == "call" or report.failed:
            missing = call.excinfo and call.excinfo.errisinstance(NotImplementedError)
            self.outcomes[number].append("to do" if missing else report.outcome)
            if report.failed:
                self.words.setdefault(number, f"to do: {call.excinfo.value}" if missing else self.explain(item, call.excinfo))
        return report

    def explain(self, item, excinfo):
        """What went wrong, in words: the test's, or where the student's code raised what."""
        if excinfo.errisinstance(AssertionError) and not self.where(excinfo):
            return str(excinfo.value).split("\nassert")[0]
        words = " ".join(str(excinfo.value).split())[:300]
        return f"{self.where(excinfo) or 'what your code gave'} raised {excinfo.typename}: {words} (in {item.name})"

    def where(self, excinfo):
        """The innermost line of the student's file in a traceback, "" if none raised."""
        lines = [entry for entry in excinfo.traceback if Path(entry.path) == self.path.resolve()]
        return f"{self.path.name}, line {lines[-1].lineno + 1}, in {lines[-1].name}," if lines else ""

    def summary(self):
        """Print a line a task, and what fails first in it; returns whether all that was asked for is done."""
        for name, module in self.taken.items():
            print(f"{self.path.name} takes {name} from {module}.py of the project: that is the answer, so it counts as to do")
        for number, outcomes in self.outcomes.items():
            if outcomes:
                passed, todo = outcomes.count("passed"), outcomes.count("to do")
                state = "done" if passed == len(outcomes) else "to do" if todo == len(outcomes) else f"{passed} of {len(outcomes)}"
                paper, names = TASKS[number]
                print(f"task{number:02d}  {state:9s} {', '.join(name for _, name in names)} ({paper})")
                words = self.words.get(number, "")
                for line in words.splitlines() if state != "to do" or re.search(f"task(?!{number:02d})\\d\\d", words) else []:
                    print(f"        {line}")
        flat = [outcome for outcomes in self.outcomes.values() for outcome in outcomes]
        if not flat:
            print(f"nothing to grade: tasks are named task01 ... task{len(TASKS)}")
        return bool(flat) and all(outcome == "passed" for outcome in flat)


def grade(arguments):
    """The command line of the classroom; returns the exit status: 0 if everything is done, 1 if not, 2 if a file cannot be read."""
    if arguments == ["--template"]:
        print(template(), end="")
        return 0
    if not arguments or arguments[0].startswith("-"):
        print("usage: python test_cff.py --template > mine.py, then python test_cff.py mine.py [-k task04]", file=sys.stderr)
        return 2
    try:
        grader = Grader(arguments[0])
    except Exception as reason:                                     # whatever a file of Python can raise
        print(f"{arguments[0]} cannot be read: {type(reason).__name__}: {reason}", file=sys.stderr)
        return 2
    pytest.main([__file__, "-p", "no:terminal", "-p", "no:cacheprovider", "--capture=no", *arguments[1:]], plugins=[grader])
    return 0 if grader.summary() else 1


# Mistakes that students make, as changes of the project's functions: (task, module, name, from, to). Each must fail its task.
MISTAKES = [
    (1, losses, "goodness", "h.square().mean(dim=1)", "h.square().sum(dim=1)"),
    (1, losses, "goodness", "h.square().mean(dim=1)", "h.norm(dim=1) / h.shape[1]"),
    (1, losses, "goodness", "h.square().mean(dim=1)", "h.square().mean()"),
    (1, losses, "goodness", "h.square()", "h.detach().square()"),
    (1, losses, "ff_loss", "softplus(threshold - g_pos) + softplus(g_neg - threshold)",                     # the signs
     "softplus(g_pos - threshold) + softplus(threshold - g_neg)"),
    (1, losses, "ff_loss", "softplus(g_neg - threshold)", "softplus(g_neg)"),
    (1, losses, "ff_loss", ".mean() / 2", ".mean()"),
    (1, losses, "ff_loss", "softplus(threshold - g_pos)", "torch.log(1 + torch.exp(threshold - g_pos))"),   # overflows
    (2, losses, "contrastive_loss", ".masked_fill(~A, -math.inf)", ""),                                     # self not excluded
    (2, losses, "contrastive_loss", "~A", "~N"),                                                            # no positives in the sum
    (2, losses, "contrastive_loss", " / P.sum(dim=1).clamp(min=1)", ""),                                    # 1/|P| dropped
    (2, losses, "contrastive_loss", "-((s / temperature", "-((s"),
    (2, losses, "contrastive_loss", "L[_anchors(P)].mean()", "L[_anchors(P)].sum()"),
    (2, losses, "contrastive_loss", "L[_anchors(P)].mean()", "L.mean()"),                                   # empty P(i) counted
    (2, losses, "contrastive_loss", "L[_anchors(P)].mean()", "L[_anchors(P)].mean().detach()"),
    (2, losses, "contrastive_loss", ".clamp(min=1)\n    return L[_anchors(P)].mean()", "\n    return L.nanmean()"),              # gradient nan
    (2, losses, "contrastive_loss", "P, N, A = _sets(y)", "P, N, A = _sets(y); A = f @ f.T < 1 - 1e-9; P = P & A"),              # self by value
    (2, losses, "contrastive_loss", "(s / temperature).masked_fill(~A, -math.inf).logsumexp(dim=1)",        # overflows
     "((s / temperature).exp() * A).sum(dim=1).log()"),
    (2, losses, "contrastive_loss", "P, N, A = _sets(y)",                                                   # own view a negative
     "P, N, A = _sets(y); own = torch.eye(len(y)).roll(len(y) // 2, 0).bool(); P, N = P & ~own, N | own"),
    (2, losses, "contrastive_loss", "    L = -((s / temperature - log_sum_A[:, None]) * P).sum(dim=1) / P.sum(dim=1).clamp(min=1)",
     "    L = log_sum_A - (s / temperature).masked_fill(~P, -math.inf).logsumexp(dim=1) + P.sum(dim=1).to(f).log()"),      # Eq. 12
    (3, losses, "inner_contrastive_loss", "log_sum_P - P.sum(dim=1).to(f).log()", "log_sum_P"),             # 1/|P| dropped
    (3, losses, "inner_contrastive_loss", "- P.sum(dim=1).to(f).log()", "+ P.sum(dim=1).to(f).log()"),
    (3, losses, "inner_contrastive_loss", ".masked_fill(~A, -math.inf)", ""),
    (3, losses, "inner_contrastive_loss", "(s / temperature).masked_fill(~P", "s.masked_fill(~P"),
    (3, losses, "inner_contrastive_loss", "masked_fill(~A", "masked_fill(~N"),
    (3, losses, "inner_contrastive_loss", "(s / temperature).masked_fill(~P, -math.inf).logsumexp(dim=1)",  # the mean outside: Eq. 3
     "(s / temperature * P).sum(dim=1) / P.sum(dim=1).clamp(min=1) + P.sum(dim=1).to(f).log()"),
    (3, losses, "inner_contrastive_loss", "L[_anchors(P)].mean()", "(L * _anchors(P)).sum() / _anchors(P).sum()"),    # nan
    (4, losses, "marginal_contrastive_loss", "_Q(s, P, margin)", "(s + margin).clamp(max=1)"),              # on negatives
    (4, losses, "marginal_contrastive_loss", "_Q(s, P, margin)", "torch.where(P, s + margin, s)"),          # min forgotten
    (4, losses, "marginal_contrastive_loss", "_Q(s, P, margin)", "torch.where(P, s - margin, s)"),
    (4, losses, "marginal_contrastive_loss", "(Q / temperature).masked_fill", "(s / temperature).masked_fill"),            # not in Z
    (4, losses, "marginal_contrastive_loss", "-(Q / temperature * P)", "-(s / temperature * P)"),           # in Z alone
    (4, losses, "marginal_contrastive_loss", " / P.sum(dim=1).clamp(min=1)", ""),
    (4, losses, "marginal_contrastive_loss", "_Q(s, P, margin)", "_Q(s / temperature, P, margin) * temperature"),
    (4, losses, "marginal_contrastive_loss", "_Q(s, P, margin)", "s + (_Q(s, P, margin) - s).detach()"),    # gradient of saturated pairs
    (4, losses, "marginal_contrastive_loss", "(Q / temperature).masked_fill(~A, -math.inf).logsumexp(dim=1)", "((Q / temperature).exp() * A).sum(dim=1).log()"),
    (4, losses, "saturated", "P & (", "("),
    (4, losses, "saturated", "margin > 1", "margin < 1"),
    (4, losses, "saturated", "f @ f.T + margin", "f @ f.T - margin"),
    (5, losses, "grad_anchor", "-f[Rc].sum(dim=0)", "-f[P].sum(dim=0)"),                                    # through saturated pairs
    (5, losses, "grad_anchor", " / P.sum()", " / Rc.sum().clamp(min=1)"),
    (5, losses, "grad_anchor", " / P.sum()", ""),
    (5, losses, "grad_anchor", "(pull + push) / temperature", "pull + push"),
    (5, losses, "grad_anchor", "(s[Rc] + margin)", "s[Rc]"),
    (5, losses, "grad_anchor", "/ Z", "/ (Z - R.sum() * math.exp(1 / temperature))"),                       # R missing in Z
    (5, losses, "grad_anchor", "pull + push", "push - pull"),
    (5, losses, "grad_anchor", "if not P.any():", "if False:"),
    (5, losses, "grad_anchor", " + torch.exp(s[N] / temperature) @ f[N]", ""),
    (6, losses, "grad_positive", "if R[k]:", "if False:"),                                                  # through a saturated pair
    (6, losses, "grad_positive", "-f[i] / P.sum()", "-f[i]"),
    (6, losses, "grad_positive", "temperature) / Z * f[i]", "temperature) / Z * f[k]"),
    (6, losses, "grad_positive", "* f[i]) / temperature", "* f[i])"),
    (6, losses, "grad_positive", "/ Z", "/ _around(f, y, k, margin, temperature)[-1]"),                     # Z of the wrong anchor
    (6, losses, "grad_positive", "s[k] + margin", "s[k]"),
    (6, losses, "grad_negative", "torch.exp(s[k] / temperature)", "torch.exp((s[k] + margin) / temperature)"),
    (6, losses, "grad_negative", "/ Z", "/ _around(f, y, k, margin, temperature)[-1]"),
    (6, losses, "grad_negative", "* f[i] / temperature", "* f[i]"),
    (6, losses, "grad_negative", "if not P.any():", "if False:"),
    (6, losses, "grad_negative", "/ Z * f[i]", "/ Z * f[k]"),
    (7, cff, "cff_step", "[f.detach() for f in fs]", "fs"),
    (7, cff, "cff_step", "[f.detach() for f in fs]", "[layer(x).detach() for x in xs]"),                    # after the update
    (7, cff, "cff_step", "[augment(x) for _ in range(views)]", "[augment(x)] * views"),                     # one draw for both
    (7, cff, "cff_step", "normalize(f)", "f"),
    (7, cff, "cff_step", "model.pool(f) for f", "f[:, 0] for f"),
    (7, cff, "cff_step", "margins[l]", "margins[0]"),
    (7, cff, "cff_step", "margins[l], temperature", "margins[l]"),
    (7, cff, "cff_step", "model.pool(f) for f", "f.mean(dim=1) for f"),                                     # an MLP has no patches
    (7, cff, "cff_step", "[layer(x) for x in xs]", "[layer(x) for x in xs * (3 - views)][:views]"),         # two passes for one view
    (7, cff, "cff_step", "        optimizers[l].zero_grad()\n", ""),
    (7, cff, "cff_step", "y = y.repeat(views)", "f = None"),                                                # y not doubled
    (7, cff, "cff_step", "loss.detach()", "loss"),
    (8, cff, "wrong_labels", "torch.randint(1,", "torch.randint(0,"),                                       # the true label among them
    (8, cff, "wrong_labels", "torch.randint(1, num_classes", "torch.randint(1, num_classes - 1"),
    (8, cff, "ff_step", "x1 = unit(f1).detach()", "x1 = unit(f1)"),
    (8, cff, "ff_step", "x1 = unit(f1).detach()", "x1 = f1.detach()"),                                      # length not removed
    (8, cff, "ff_step", "x1 = unit(f1).detach()", "x1 = normalize(f1, dim=-1).detach()"),                   # each token by itself
    (8, cff, "ff_step", "x1 = unit(f1).detach()", "x1 = unit(layer(x1)).detach()"),
    (8, cff, "ff_step", "        optimizers[l].zero_grad()\n", ""),
    (8, cff, "ff_step", "model.patches(x, y_wrong)", "model.patches(x, y)"),
    (8, cff, "ff_step", "model.patches(x, y_wrong)", "model.patches(x, y_wrong.flip(0))"),                  # of another image
    (8, cff, "ff_step", "model.patches(x, y_wrong)", "model.patches(augment(x), y_wrong)"),                 # another draw
    (8, cff, "ff_step", "layer_goodness(model, x, y_wrong)", "layer_goodness(model, augment(x), y_wrong)"),
    (8, cff, "ff_step", "len(model.labels) - 1", "int(y.max()) + 1"),                                       # of those in the batch
    (8, cff, "ff_step", "goodness(model.pool(f2))", "goodness(f2.flatten(1))"),
    (8, cff, "ff_step", "loss_l.backward()", "loss_l.neg().backward()"),
    (9, vit, "patchify", "permute(0, 2, 4, 1, 3, 5)", "permute(0, 4, 2, 1, 3, 5)"),                         # columns first
    (9, vit, "patchify", "permute(0, 2, 4, 1, 3, 5)", "permute(0, 2, 4, 3, 5, 1)"),                         # channels last
    (9, vit, "Attention", "q / d ** 0.5", "q"),
    (9, vit, "Attention", "q / d ** 0.5", "q / E ** 0.5"),
    (9, vit, "Attention", "softmax(dim=-1)", "softmax(dim=-2)"),
    (9, vit, "Attention", "h.transpose(1, 2).reshape(B, P, E)", "h.reshape(B, P, E)"),                      # heads not brought back
    (9, vit, "EncoderLayer", "self.attention(self.norm1(x)) + x", "self.norm1(self.attention(x) + x)"),     # post-norm
    (9, vit, "EncoderLayer", "self.attention(self.norm1(x)) + x", "self.attention(self.norm1(x))"),
    (9, vit, "EncoderLayer", "self.mlp(self.norm2(z)) + z", "self.mlp(self.norm2(z)) + x"),
    (9, vit, "EncoderLayer", "nn.GELU()", "nn.ReLU()"),
    (9, vit, "EncoderLayer", "self.mlp(self.norm2(z))", "self.mlp(self.norm1(z))"),
    (9, vit, "Attention", "self.qkv(x)", "(x @ self.qkv.weight.T)"),                                        # no bias
    (10, losses, "margins", "m0 + (mL - m0) * t", "mL + (m0 - mL) * t"),                                    # last layer first
    (10, losses, "margins", "l / max(L - 1, 1)", "l / L"),
    (10, losses, "margins", "(1 - t) ** 2", "(1 - t ** 2)"),
    (10, losses, "margins", "(1 + math.cos", "(1 - math.cos"),
    (10, evaluation, "longest_chain", "length.get(earlier, 0)", "length.get((0, earlier[1]), 0)"),
    (10, evaluation, "longest_chain", "(row[\"process\"] - 1, row[\"waited_for\"])", "(0, row[\"waited_for\"])"),
    (10, evaluation, "longest_chain", "(row[\"process\"] + 1, row[\"waited_for\"] - 1)", "(1, row[\"waited_for\"] - 1)"),
    (10, evaluation, "longest_chain", "(row[\"process\"], row[\"batch\"] - 1)", "(row[\"process\"], row[\"batch\"])"),
    (10, evaluation, "longest_chain", "(row[\"process\"] - 1, row[\"waited_for\"])", "(row[\"process\"] - 1, row[\"waited_for\"] - 1)"),
    (10, evaluation, "longest_chain", "(row[\"process\"] + 1, row[\"waited_for\"] - 1)", "(row[\"process\"] + 1, row[\"waited_for\"])"),
    (10, evaluation, "longest_chain", "1 + max(", "max("),
    (10, evaluation, "longest_chain", "(step[1], step[0])", "step"),                                        # by process first
]


def changed(module, name, old, new):
    """A function or class of the project with a piece of its source replaced."""
    source = re.sub(r" *#.*", "", inspect.getsource(getattr(module, name)))             # without comments
    assert source.count(old) == 1, f"{name} has {source.count(old)} times {old!r}"
    names = dict(vars(module))
    exec(source.replace(old, new), names)
    return names[name]


def first_failure(number):
    """The first failure of a task's tests, as an exception; None if all pass."""
    for test in [test for test in globals().values() if hasattr(test, f"task{number:02d}")]:
        grids = [[dict(zip(mark.args[0].split(", "), values if ", " in mark.args[0] else [values])) for values in mark.args[1]]
                 for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        wanted = inspect.signature(test).parameters
        if "small" in wanted:
            grids.append([{"small": None}])
        if "labelled" in wanted:
            grids.append([{"labelled": "vit-8-2-3"}, {"labelled": "mlp-8-3"}])
        for choice in itertools.product(*grids):
            arguments = {name: value for part in choice for name, value in part.items()}
            if "small" in arguments:
                arguments["small"] = small_case()
            if "labelled" in arguments:
                arguments["labelled"] = small_case(arguments["labelled"], "one-hot")
            try:
                test(**arguments)
            except Exception as failure:
                return failure
    return None


@pytest.mark.parametrize("number", TASKS)
def test_each_mistake_fails_its_task_with_words_that_point_to_it(number):
    mistakes = [mistake for mistake in MISTAKES if mistake[0] == number]
    assert len(mistakes) >= 5 and first_failure(number) is None
    for _, module, name, old, new in mistakes:
        with in_place_of({(module, name): changed(module, name, old, new)}):
            failure = first_failure(number)
        assert failure is not None, f"task{number:02d}: {new!r} for {old!r} in {name} is not noticed"
        if isinstance(failure, AssertionError):                     # others say what the student's code raised
            words = str(failure).split("\nassert")[0]
            assert re.search(r"Eq\. |Eqs\. |Sec\. |Algorithm 1|Fig\. |patching", words), f"{new!r} in {name} fails with {words!r}"


def test_the_classroom_grades_a_file(tmp_path, capsys):
    """One task done, one wrong, one that raises, one that needs another first, one copied, the rest to do."""
    mine = template()
    done = inspect.getsource(losses.goodness) + "\n\nsoftplus = F.softplus\n\n\n" + inspect.getsource(losses.ff_loss)
    wrong = "def inner_contrastive_loss(f, y, temperature=0.15):\n    return f.sum()\n"
    raises = "def grad_anchor(f, y, k, margin, temperature):\n    return f[k] @ f[k, 1:]\n"
    needs = "def cff_step(model, optimizers, x, y, *others, **more):\n    return marginal_contrastive_loss(x, y, 0.4)\n"
    (tmp_path / "mine.py").write_text("\n\n".join([mine, done, wrong, raises, needs, "from losses import margins"]))
    command = [sys.executable, HERE / "test_cff.py", tmp_path / "mine.py"]
    graded = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert graded.returncode == 1, graded.stderr
    lines = graded.stdout.splitlines()
    assert lines[0].startswith("mine.py takes margins from losses.py of the project"), graded.stdout
    found = {line.split()[0]: line for line in lines if line.startswith("task")}
    assert list(found) == [f"task{number:02d}" for number in TASKS] and "done" in found["task01"] and "to do" in found["task02"]
    assert re.search(r"task03  \d+ of \d+ ", found["task03"]) and "four vectors, Eq. 12" in graded.stdout
    assert re.search(r"mine.py, line \d+, in grad_anchor, raised RuntimeError", graded.stdout)
    assert "to do" in found["task07"] and lines[lines.index(found["task07"]) + 1].strip() == "to do: task04"
    none, = run_script(tmp_path, *command[1:], "-k", "task11")
    assert none.returncode == 1 and none.stdout.splitlines()[-1].startswith("nothing to grade"), none.stdout
    one, = run_script(tmp_path, *command[1:], "-k", "task01")
    assert one.returncode == 0 and len(one.stdout.splitlines()) == 2, one.stdout
    (tmp_path / "mine.py").write_text("def goodness(h:")
    assert grade([str(tmp_path / "mine.py")]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'mine.py'} cannot be read: SyntaxError")


if __name__ == "__main__":
    raise SystemExit(grade(sys.argv[1:]))
