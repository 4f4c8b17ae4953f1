"""Small tests for the grader: the README's examples, and single parts of a task.

    python -m pytest -q classroom/test_by_hand.py
"""
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cff
import losses
import pooled
import vit
from test_cff import check, inputs_of, slow_loss, small_case

FOUR = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
TWO = torch.tensor([0, 0, 1, 1])
e = math.exp


def four(text, *numbers):
    """For `check`: the tensor that the four vectors should give, and how its message begins."""
    expected = torch.tensor(numbers if len(numbers) > 1 else numbers[0], dtype=torch.float64)
    return expected, f"four vectors, {text}"


def test_worked_example_of_goodness():
    h = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    check(losses.goodness(h), torch.tensor([6.25]), "Eq. 1 divided by E, for [3, 4, 0, 0]", 1e-6)
    got = losses.ff_loss(torch.tensor([2.0]), torch.tensor([2.0]), 2.0)
    check(got, torch.tensor(math.log(2)), "Eq. 2 at G^pos = G^neg = theta is ln 2", 1e-6)


def test_eq3_of_two_equal_rows_is_zero():
    f = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    check(losses.contrastive_loss(f, torch.tensor([7, 7]), 1.0), torch.tensor(0.0),
          "Eq. 3 for two equal rows of one class is -ln(e / e); A(i) has all rows except i", 1e-6)


def test_worked_example_of_eq3():
    Z = [e(0.8) + 1 + e(-1), e(0.8) + e(0.6) + e(-0.8), 1 + 1 + e(0.6), 1 + e(-1) + e(-0.8)]
    L = [math.log(Z[0]) - 0.8, math.log(Z[1]) - 0.8, math.log(Z[2]), math.log(Z[3])]
    got = losses.contrastive_loss(FOUR, TWO, 1.0)
    check(got, *four("Eq. 3, the mean of ln Z_i - s_ip", sum(L) / 4))


def test_worked_example_of_eq12():
    y = torch.tensor([0, 0, 0, 1])                                  # row 3 has no positive
    Z = [e(0.8) + 1 + e(-1), e(0.8) + e(0.6) + e(-0.8), 1 + e(0.6) + 1]
    pairs = [(e(0.8), 1), (e(0.8), e(0.6)), (1, e(0.6))]
    L = [-math.log((a + b) / 2 / z) for (a, b), z in zip(pairs, Z)]
    got = losses.inner_contrastive_loss(FOUR, y, 1.0)
    check(got, *four("Eq. 12 with y = [0, 0, 0, 1]", sum(L) / 3))


def test_worked_example_of_the_margin():
    R = losses.saturated(FOUR, TWO, 0.4).nonzero().tolist()
    assert R == [[0, 1], [1, 0]], \
        f"four vectors, Sec. 3.5: the saturated pairs are [0, 1] and [1, 0]; got {R}"
    Z = [e(1) + 1 + e(-1), e(1) + e(0.6) + e(-0.8), e(0.4) + 1 + e(0.6), e(0.4) + e(-1) + e(-0.8)]
    L = [math.log(Z[0]) - 1, math.log(Z[1]) - 1, math.log(Z[2]) - 0.4, math.log(Z[3]) - 0.4]
    got = losses.marginal_contrastive_loss(FOUR, TWO, 0.4, 1.0)
    check(got, *four("Eq. 17, the mean of ln Z_i - Q_ip, Q = 1, 1, 0.4, 0.4", sum(L) / 4))


def test_worked_example_of_eq18():
    Z0, Z2 = e(1) + 1 + e(-1), e(0.4) + 1 + e(0.6)
    check(losses.grad_anchor(FOUR, TWO, 0, 0.4, 1.0),
          *four("Eq. 18, k = 0: Rc is empty, (e^0 f_2 + e^-1 f_3) / Z_0", -e(-1) / Z0, 1 / Z0))
    expected = 1 + (-e(0.4) + 1 + 0.8 * e(0.6)) / Z2, 0.6 * e(0.6) / Z2
    check(losses.grad_anchor(FOUR, TWO, 2, 0.4, 1.0),
          *four("Eq. 18, k = 2: -f_3 + (e^0.4 f_3 + e^0 f_0 + e^0.6 f_1) / Z_2", *expected))


def test_worked_example_of_a5_a6_a7():
    Z0, Z2 = e(1) + 1 + e(-1), e(0.4) + 1 + e(0.6)
    check(losses.grad_positive(FOUR, TWO, 0, 1, 0.4, 1.0),
          *four("Eq. A.5, i = 0: k = 1 is in R(0), so the gradient is 0", 0.0, 0.0))
    check(losses.grad_positive(FOUR, TWO, 2, 3, 0.4, 1.0),
          *four("Eq. A.6, i = 2, k = 3: (-1 + e^0.4 / Z_2) f_2", 0.0, e(0.4) / Z2 - 1))
    check(losses.grad_negative(FOUR, TWO, 0, 2, 0.4, 1.0),
          *four("Eq. A.7, i = 0, k = 2: e^0 / Z_0 f_0", 1 / Z0, 0.0))


# -------------------------------------------------------- Algorithm 1 and attention, part by part

def test_algorithm1_on_an_mlp_of_one_layer():
    model, optimizers, x, y, _ = small_case("mlp-8-1")
    f = model.layers[0](x.flatten(1))
    expected = slow_loss(f / f.norm(dim=1, keepdim=True), y, 0.4, 0.3).detach()[None]
    got = cff.cff_step(model, optimizers, x, y, lambda x: x, [0.4], 0.3, views=1)
    check(got, expected, "Algorithm 1 with views=1, one MLP layer and no augmentation returns the "
          "loss of f/norm2(f): divide each row of f by its own length")


def test_algorithm1_clears_old_gradients():
    model, optimizers, x, y, _ = small_case("mlp-8-1")
    weight, seen = model.layers[0][0].weight, []
    optimizers[0].step = lambda: seen.append(weight.grad.clone())       # keeps the weights
    for _ in range(2):
        cff.cff_step(model, optimizers, x, y, lambda x: x, [0.4], 0.3)
    check(seen[1], seen[0], "Algorithm 1: the same batch and weights must give the same gradient "
          "again; without zero_grad() the old gradient is added")


def test_algorithm1_right_between_two_layers():
    model, optimizers, x, y, _ = small_case("vit-8-2-2", "patch")
    views, inputs = [], inputs_of(model.layers[1])
    cff.ff_step(model, optimizers, x, y, lambda x: views.append(x) or x, losses.ff_loss)
    assert len(views) == 1, ("Algorithm 1, right: the true and the wrong labels share one view, so "
                             f"call augment once per step; your code called it {len(views)} times")
    lengths = torch.cat(inputs).flatten(1).norm(dim=1)
    check(lengths, torch.ones_like(lengths), "Algorithm 1, right: layer 2's input for an image, "
          "f/norm2(f), must have length 1; norm2 is the norm over all tokens together")


def test_attention_by_hand():
    attention, x = vit.Attention(8, 2), torch.zeros(1, 2, 8)
    with torch.no_grad():
        for linear in (attention.qkv, attention.out):           # q = k = v = x
            linear.weight.copy_(torch.eye(8).repeat(len(linear.weight) // 8, 1))
            linear.bias.zero_()
    x[0, 0, :4] = 1                                             # d = 4, and q k^T is 4 or 0
    check(attention(x)[0, :, 0], torch.tensor([e(2) / (e(2) + 1), 0.5]), "Sec. 3.4, softmax(q k^T "
          "/ sqrt(d)) v with d = E/H = 4 (0.804 comes from sqrt(E), 0.982 from no division, 0.119 "
          "from a softmax over the queries)", 1e-5)


# ------------------------------------------------------------------------------ the pooled output

B, T, E, H = 25, 5, 12, 3       # B * T is large: products of W alone hardly count


def layers():
    """An encoder layer, an object that has only its parts, and an input."""
    torch.manual_seed(0)
    layer = vit.EncoderLayer(E, H).double()
    for p in layer.parameters():
        nn.init.normal_(p)                          # scales are no longer 1, biases no longer 0
    attention = SimpleNamespace(qkv=layer.attention.qkv, out=layer.attention.out, num_heads=H)
    parts = SimpleNamespace(**dict(layer.named_children()) | {"attention": attention})
    return layer, parts, torch.randn(B, T, E, dtype=torch.float64)


@pytest.mark.parametrize("part, words", [
    ("mlp", "without attention, z is x: W2 mean(u) + b2 + mean(z), with u = GELU(W1 LN(z) + b1)"),
    ("beta", "without the MLP, if all numbers in x are equal: LN(x) is beta, so qkv is W beta + b"),
    ("eps", "without the MLP, for small x: LN divides by sqrt(var + eps); var is a mean over E"),
    ("all", "the result is the mean over tokens of f = MLP(LN(z)) + z (Eq. 13)"),
])
def test_pooled_output_part_by_part(part, words):
    layer, parts, x = layers()
    if part != "all":
        off = parts.attention.out if part == "mlp" else parts.mlp[2]
        nn.init.zeros_(off.weight)
    if part == "beta":
        x = torch.ones_like(x)
    if part == "eps":
        x = 1e-3 * x
    expected = layer(x).mean(dim=1)
    check(pooled.pooled_output(parts, x), expected, f"Sec. 3.4, {words}", 1e-8)


def test_pooled_output_gives_each_parameter_its_gradient():
    layer, parts, x = layers()
    weights = torch.randn(B, E, dtype=torch.float64)
    (layer(x).mean(dim=1) * weights).sum().backward()
    expected = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    (pooled.pooled_output(parts, x) * weights).sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, f"Sec. 3.4: {name} has no gradient"
        check(p.grad, expected[name], f"Sec. 3.4, the gradient of {name}")


def test_pooled_output_takes_fewer_products():
    """Both passes count; the unit is one product of all tokens with an E x E matrix."""
    _, parts, x = layers()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pooled.pooled_output(parts, x).sum().backward()
    attention = 6 * 2 * B * T * T * E                   # q k^T and (softmax) v, in both passes
    n = (counter.get_total_flops() - attention) / (2 * B * T * E * E)
    first, both = 18 + 3 * 2 / T, 15 + 3 * 2 / T + 1    # + 1 for products of W alone
    words = f"Sec. 3.4: your code makes {n:.1f} products of all tokens with an E x E matrix"
    assert n < first + 0.01, \
        f"{words}; {first:.1f} are enough, because pool(W2 u + b2 + z) = W2 pool(u) + b2 + pool(z)"
    assert n < both + 0.01, \
        f"{words}; {both:.1f} are enough: move LN's g and beta into W and b"
    assert n > 15, f"{words}, but at least 15 are needed: write every product with @ or F.linear"
