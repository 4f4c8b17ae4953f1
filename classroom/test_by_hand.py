"""The four vectors of the README, and what the tasks say by hand: grading begins with these tests.

    python -m pytest -q -k worked_example
"""
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import losses
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
