"""The four vectors of the README, and what the tasks say by hand: grading begins with these tests.
At the end those of task11.

    python -m pytest -q -k "worked_example or pooled_output"
"""
import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import losses
import pooled
from test_cff import close, sets, slow_loss


FOUR = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
TWO = torch.tensor([0, 0, 1, 1])
e = math.exp


def four(text, *numbers):
    """(expected, what `close` says) of the worked example: m = 0.4, tau = 1, as in the README."""
    expected = torch.tensor(numbers if len(numbers) > 1 else numbers[0], dtype=torch.float64)
    return expected, f"four vectors, {text}"


def test_worked_example_of_goodness():
    h = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    close(losses.goodness(h), torch.tensor([6.25]), "Eq. 1 / E of [3, 4, 0, 0]", 1e-6)
    got = losses.ff_loss(torch.tensor([2.0]), torch.tensor([2.0]), 2.0)
    close(got, torch.tensor(math.log(2)), "Eq. 2 at G^pos = G^neg = theta, ln 2", 1e-6)


def test_worked_example_of_eq3():
    Z = [e(0.8) + 1 + e(-1), e(0.8) + e(0.6) + e(-0.8), 1 + 1 + e(0.6), 1 + e(-1) + e(-0.8)]
    L = [math.log(Z[0]) - 0.8, math.log(Z[1]) - 0.8, math.log(Z[2]), math.log(Z[3])]
    got = losses.contrastive_loss(FOUR, TWO, 1.0)
    close(got, *four("Eq. 3, the mean of ln Z_i - s_ip", sum(L) / 4))


def test_worked_example_of_eq12():
    y = torch.tensor([0, 0, 0, 1])                                  # row 3 has no positive
    Z = [e(0.8) + 1 + e(-1), e(0.8) + e(0.6) + e(-0.8), 1 + e(0.6) + 1]
    pairs = [(e(0.8), 1), (e(0.8), e(0.6)), (1, e(0.6))]
    L = [-math.log((a + b) / 2 / z) for (a, b), z in zip(pairs, Z)]
    got = losses.inner_contrastive_loss(FOUR, y, 1.0)
    close(got, *four("Eq. 12 with y = [0, 0, 0, 1]", sum(L) / 3))


def test_worked_example_of_the_margin():
    R = losses.saturated(FOUR, TWO, 0.4).nonzero().tolist()
    assert R == [[0, 1], [1, 0]], \
        f"four vectors, Sec. 3.5: R(0) = {{1}}, R(1) = {{0}}, no other; got {R}"
    Z = [e(1) + 1 + e(-1), e(1) + e(0.6) + e(-0.8), e(0.4) + 1 + e(0.6), e(0.4) + e(-1) + e(-0.8)]
    L = [math.log(Z[0]) - 1, math.log(Z[1]) - 1, math.log(Z[2]) - 0.4, math.log(Z[3]) - 0.4]
    got = losses.marginal_contrastive_loss(FOUR, TWO, 0.4, 1.0)
    close(got, *four("Eq. 17, the mean of ln Z_i - Q_ip, Q = 1, 1, 0.4, 0.4", sum(L) / 4))


def test_worked_example_of_eq18():
    Z0, Z2 = e(1) + 1 + e(-1), e(0.4) + 1 + e(0.6)
    close(losses.grad_anchor(FOUR, TWO, 0, 0.4, 1.0),
          *four("Eq. 18, k = 0: Rc is empty, (e^0 f_2 + e^-1 f_3) / Z_0", -e(-1) / Z0, 1 / Z0))
    expected = 1 + (-e(0.4) + 1 + 0.8 * e(0.6)) / Z2, 0.6 * e(0.6) / Z2
    close(losses.grad_anchor(FOUR, TWO, 2, 0.4, 1.0),
          *four("Eq. 18, k = 2: -f_3 + (e^0.4 f_3 + e^0 f_0 + e^0.6 f_1) / Z_2", *expected))


def test_worked_example_of_a5_a6_a7():
    Z0, Z2 = e(1) + 1 + e(-1), e(0.4) + 1 + e(0.6)
    close(losses.grad_positive(FOUR, TWO, 0, 1, 0.4, 1.0),
          *four("Eq. A.5, i = 0, k = 1 in R(0): nothing", 0.0, 0.0))
    close(losses.grad_positive(FOUR, TWO, 2, 3, 0.4, 1.0),
          *four("Eq. A.6, i = 2, k = 3: (-1 + e^0.4 / Z_2) f_2", 0.0, e(0.4) / Z2 - 1))
    close(losses.grad_negative(FOUR, TWO, 0, 2, 0.4, 1.0),
          *four("Eq. A.7, i = 0, k = 2: e^0 / Z_0 f_0", 1 / Z0, 0.0))


def test_worked_example_in_the_readme():
    """The numbers that the README carries by hand, computed."""
    page = (ROOT / "README.md").read_text(encoding="utf-8").split("Four vectors, by hand")[1]
    s, shown = FOUR @ FOUR.T, [f"is {slow_loss(FOUR, TWO, 0.4, 1):.4f}"]
    for i in range(4):
        P, N = sets(TWO, i)
        Q = min(s[i, P[0]].item() + 0.4, 1)
        Z = e(Q) + sum(e(s[i, n]) for n in N)
        shown += [f"| {Z:.4f} |", f"| {math.log(Z) - Q:.4f} |"]
    for k in (0, 2):
        v = losses.grad_anchor(FOUR, TWO, k, 0.4, 1)
        shown.append(f"({v[0]:.4f}, {v[1]:.4f})")
    shown.append(f"(0, {losses.grad_positive(FOUR, TWO, 2, 3, 0.4, 1)[1]:.4f})")
    shown.append(f"({losses.grad_negative(FOUR, TWO, 0, 2, 0.4, 1)[0]:.4f}, 0)")
    for number in shown:
        assert number in page, f"not in the README: {number}"


# ------------------------------------------------------------------------------ the pooled output

B, T, E, H = 25, 5, 12, 3       # many tokens: what is done with W alone is small beside them


def layers():
    """torch's encoder layer, its parts by our names, which cannot be called, and an input."""
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0, activation="gelu", norm_first=True,
                                        batch_first=True, dtype=torch.float64)
    for p in theirs.parameters():
        nn.init.normal_(p)                          # torch starts with scales of 1, biases of 0
    parts, parts.attention, qkv = nn.Module(), nn.Module(), nn.Linear(E, 3 * E)
    parts.norm1, parts.norm2, parts.attention.num_heads = theirs.norm1, theirs.norm2, H
    qkv.weight, qkv.bias = theirs.self_attn.in_proj_weight, theirs.self_attn.in_proj_bias
    parts.attention.qkv, parts.attention.out = qkv, theirs.self_attn.out_proj
    parts.mlp = nn.Sequential(theirs.linear1, nn.GELU(), theirs.linear2)
    return theirs, parts, torch.randn(B, T, E, dtype=torch.float64)


def products(parts, x):
    """The FLOP of a forward and a backward pass, in a product of all tokens with an E x E matrix,
    without attention's q k^T and (softmax) v, six passes in all."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:   # counts q k^T
        pooled.pooled_output(parts, x).sum().backward()
    attention = 6 * 2 * B * T * T * E
    return (counter.get_total_flops() - attention) / (2 * B * T * E * E)


def test_pooled_output_is_the_mean_of_the_layers():
    theirs, parts, x = layers()
    close(pooled.pooled_output(parts, x), theirs(x).mean(dim=1),
          "Eq. 13 of Sec. 3.4's layer, the mean over tokens of f = MLP(LN(z)) + z")


def test_pooled_output_gives_each_parameter_its_gradient():
    theirs, parts, x = layers()
    weights = torch.randn(B, E, dtype=torch.float64)
    (theirs(x).mean(dim=1) * weights).sum().backward()
    expected = {name: p.grad for name, p in parts.named_parameters()}
    parts.zero_grad()
    (pooled.pooled_output(parts, x) * weights).sum().backward()
    for name, p in parts.named_parameters():
        assert p.grad is not None, f"Sec. 3.4: {name} has no gradient"
        close(p.grad, expected[name], f"Sec. 3.4, the gradient of {name}")


def test_pooled_output_pools_before_the_last_product():
    _, parts, x = layers()          # forward 3 + 1 + 2, backward twice that, and W2's rows
    most, n = 18 + 3 * 2 / T, products(parts, x)
    assert n < most + 0.01, (f"Sec. 3.4: {n:.1f} products of all tokens with an E x E matrix, "
                             f"{most:.1f} do: pool(W2 u + b2 + z) = W2 pool(u) + b2 + pool(z)")


def test_pooled_output_asks_no_gradient_of_its_input():
    _, parts, x = layers()          # backward without LN(x)'s gradient, of 3 products
    most, n = 15 + 3 * 2 / T + 1, products(parts, x)        # 1: what is done with W alone
    assert n < most + 0.01, (f"Sec. 3.4: {n:.1f} products of all tokens with an E x E matrix, "
                             f"{most:.1f} do: LN's g and beta need no gradient of LN(x)")
    assert n > 15, f"Sec. 3.4: {n:.1f} products of matrices, 15 are needed: write them with @"
