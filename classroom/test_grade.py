"""The classroom's own tests: each mistake that students make is noticed, and told in words.

    python -m pytest -q classroom
"""
import csv
import inspect
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from grade import ROOT, TASKS, TEST_FILES, grade, template
from watch import source

import cff              # found by the path that grade.py sets
import losses
import pipeline
import pooled
import test_by_hand
import test_cff
import test_pipeline
import vit

HERE = Path(__file__).resolve().parent
TESTS = {**vars(test_by_hand), **vars(test_cff), **vars(test_pipeline)}


# ------------------------------------------------------------------------------ the zoo of mistakes

# (task, module, name, from, to): changes of the project's functions; each must fail its task
MISTAKES = [
    # task01
    (1, losses, "goodness", "h.square().mean(dim=1)", "h.square().sum(dim=1)"),
    (1, losses, "goodness", "h.square().mean(dim=1)", "h.norm(dim=1) / h.shape[1]"),
    (1, losses, "goodness", "h.square().mean(dim=1)", "h.square().mean()"),
    (1, losses, "goodness", "h.square()", "h.detach().square()"),
    (1, losses, "ff_loss", "softplus(threshold - g_pos) + softplus(g_neg - threshold)",
     "softplus(g_pos - threshold) + softplus(threshold - g_neg)"),      # the signs
    (1, losses, "ff_loss", "softplus(g_neg - threshold)", "softplus(g_neg)"),
    (1, losses, "ff_loss", ".mean() / 2", ".mean()"),
    (1, losses, "ff_loss", "softplus(threshold - g_pos)",
     "torch.log(1 + torch.exp(threshold - g_pos))"),                    # overflows
    # task02
    (2, losses, "contrastive_loss", "_log_sum_exp(s / temperature, P | N)",
     "(s / temperature).logsumexp(dim=1)"),                             # i itself in A(i)
    (2, losses, "contrastive_loss", "P | N", "N"),                      # no positives in the sum
    (2, losses, "contrastive_loss", " / _size(P)", ""),                 # 1/|P| dropped
    (2, losses, "contrastive_loss", "-((s / temperature", "-((s"),
    (2, losses, "contrastive_loss", "_mean_over_anchors(L_i, P)", "L_i[P.any(dim=1)].sum()"),
    (2, losses, "contrastive_loss", "_mean_over_anchors(L_i, P)", "L_i.mean()"),    # all rows
    (2, losses, "contrastive_loss", "_mean_over_anchors(L_i, P)",
     "_mean_over_anchors(L_i, P).detach()"),
    (2, losses, "contrastive_loss", "_size(P)\n    return _mean_over_anchors(L_i, P)",
     "P.sum(dim=1)\n    return L_i.nanmean()"),                         # its gradient is nan
    (2, losses, "contrastive_loss", "P, N = _sets(y)",                  # i taken out by its value
     "P, N = _sets(y); A = f @ f.T < 1 - 1e-9; P, N = P & A, N & A"),
    (2, losses, "contrastive_loss", "_log_sum_exp(s / temperature, P | N)",
     "((s / temperature).exp() * (P | N)).sum(dim=1).log()"),           # overflows
    (2, losses, "contrastive_loss", "P, N = _sets(y)",                  # own view a negative
     "P, N = _sets(y); own = torch.eye(len(y)).roll(len(y) // 2, 0).bool()\n"
     "    P, N = P & ~own, N | own"),
    (2, losses, "contrastive_loss",                                     # Eq. 12
     "-((s / temperature - log_sum_A[:, None]) * P).sum(dim=1) / _size(P)",
     "log_sum_A - _log_sum_exp(s / temperature, P) + _size(P).to(f).log()"),
    # task03
    (3, losses, "inner_contrastive_loss", " - _size(P).to(f).log()", ""),           # 1/|P| dropped
    (3, losses, "inner_contrastive_loss", "- _size(P).to(f).log()", "+ _size(P).to(f).log()"),
    (3, losses, "inner_contrastive_loss", "_log_sum_exp(s / temperature, P | N)",
     "(s / temperature).logsumexp(dim=1)"),                             # i itself in A(i)
    (3, losses, "inner_contrastive_loss", "_log_sum_exp(s / temperature, P)",
     "_log_sum_exp(s, P)"),
    (3, losses, "inner_contrastive_loss", "P | N", "N"),
    (3, losses, "inner_contrastive_loss", "_log_sum_exp(s / temperature, P)",       # Eq. 3
     "(s / temperature * P).sum(dim=1) / _size(P) + _size(P).to(f).log()"),
    (3, losses, "inner_contrastive_loss", "_mean_over_anchors(L_i, P)",
     "(L_i * P.any(dim=1)).sum() / P.any(dim=1).sum()"),                # nan
    # task04
    (4, losses, "marginal_contrastive_loss", "torch.where(P, Q, s)", "Q"),          # on negatives
    (4, losses, "marginal_contrastive_loss", "_Q(s, margin)", "s + margin"),        # min forgotten
    (4, losses, "marginal_contrastive_loss", "_Q(s, margin)", "s - margin"),
    (4, losses, "marginal_contrastive_loss", "torch.where(P, Q, s)", "s"),          # not in Z
    (4, losses, "marginal_contrastive_loss", "-(Q / temperature * P)",
     "-(s / temperature * P)"),                                         # in Z alone
    (4, losses, "marginal_contrastive_loss", " / _size(P)", ""),
    (4, losses, "marginal_contrastive_loss", "_Q(s, margin)",
     "_Q(s / temperature, margin) * temperature"),
    (4, losses, "marginal_contrastive_loss", "_Q(s, margin)",           # R(i) has a gradient
     "s + (_Q(s, margin) - s).detach()"),
    (4, losses, "marginal_contrastive_loss",                            # overflows
     "_log_sum_exp(torch.where(P, Q, s) / temperature, P | N)",
     "((torch.where(P, Q, s) / temperature).exp() * (P | N)).sum(dim=1).log()"),
    (4, losses, "marginal_contrastive_loss", "P | N", "P"),             # no sum over N(i) in Z
    (4, losses, "marginal_contrastive_loss", "P, Q, s", "N, Q, s"),     # Q on N(i), s on P(i)
    (4, losses, "saturated", "P & (", "("),
    (4, losses, "saturated", "margin > 1", "margin < 1"),
    (4, losses, "saturated", "f @ f.T + margin", "f @ f.T - margin"),
    # task05
    (5, losses, "grad_anchor", "-f[Rc].sum(dim=0)", "-f[P].sum(dim=0)"),    # saturated pairs, too
    (5, losses, "grad_anchor", " / P.sum()", " / Rc.sum().clamp(min=1)"),
    (5, losses, "grad_anchor", " / P.sum()", ""),
    (5, losses, "grad_anchor", "(pull + push / Z) / temperature", "pull + push / Z"),
    (5, losses, "grad_anchor", "(s[Rc] + margin)", "s[Rc]"),
    (5, losses, "grad_anchor", "/ Z", "/ (Z - R.sum() * math.exp(1 / temperature))"),   # R not in Z
    (5, losses, "grad_anchor", "pull + push / Z", "push / Z - pull"),
    (5, losses, "grad_anchor", "pull + push / Z", "(pull + push) / Z"),
    (5, losses, "grad_anchor", "if not P.any():", "if False:"),
    (5, losses, "grad_anchor", " + torch.exp(s[N] / temperature) @ f[N]", ""),
    # task06
    (6, losses, "grad_positive", "if R[k]:", "if False:"),              # through a saturated pair
    (6, losses, "grad_positive", "-1 / P.sum().to(f)", "-1"),
    (6, losses, "grad_positive", "* f[i]", "* f[k]"),
    (6, losses, "grad_positive", "* f[i] / temperature", "* f[i]"),
    (6, losses, "grad_positive", "/ Z", "/ _around(f, y, k, margin, temperature)[-1]"),  # Z_k
    (6, losses, "grad_positive", "s[k] + margin", "s[k]"),
    (6, losses, "grad_negative", "torch.exp(s[k] / temperature)",
     "torch.exp((s[k] + margin) / temperature)"),
    (6, losses, "grad_negative", "/ Z", "/ _around(f, y, k, margin, temperature)[-1]"),  # Z_k
    (6, losses, "grad_negative", "* f[i] / temperature", "* f[i]"),
    (6, losses, "grad_negative", "if not P.any():", "if False:"),
    (6, losses, "grad_negative", "* f[i]", "* f[k]"),
    # task07
    (7, cff, "cff_step", "x1 = f1.detach()\n        x2 = f2.detach()", "x1, x2 = f1, f2"),
    (7, cff, "cff_step", "x1 = f1.detach()\n        x2 = f2.detach()",  # after the update
     "x1, x2 = layer(x1).detach(), layer(x2).detach()"),
    (7, cff, "cff_step", "x2 = f2.detach()", "x2 = f1.detach()"),       # one view for both
    (7, cff, "cff_step", "model.pool(f2)", "model.pool(f1)"),
    (7, cff, "cff_step", "x1, x2 = augment(x), augment(x)", "x1 = x2 = augment(x)"),
    (7, cff, "cff_step", "x1, x2 = augment(x), augment(x)",             # x2 augmented twice
     "x1 = augment(x)\n    x2 = augment(x1)"),
    (7, cff, "cff_step", "normalize(f)", "f"),
    (7, cff, "cff_step", "model.pool(f1), model.pool(f2)", "f1[:, 0], f2[:, 0]"),
    (7, cff, "cff_step", "model.pool(f1), model.pool(f2)",              # an MLP has no tokens
     "f1.mean(dim=1), f2.mean(dim=1)"),
    (7, cff, "cff_step", "margins[l]", "margins[0]"),
    (7, cff, "cff_step", "margins[l], temperature", "margins[l]"),
    (7, cff, "cff_step", "if views == 1:",                              # two passes for one view
     "if views == 1:\n        model.layers[0](model.patches(x))"),
    (7, cff, "cff_step", "if views == 1:", "if False:"),
    (7, cff, "cff_step", "        optimizers[l].zero_grad()\n", ""),
    (7, cff, "cff_step", "    y = torch.cat([y, y])\n", ""),
    (7, cff, "cff_step", "loss.detach()", "loss"),
    # task08
    (8, cff, "wrong_labels", "torch.randint(1,", "torch.randint(0,"),   # the true one among them
    (8, cff, "wrong_labels", "torch.randint(1, num_classes", "torch.randint(1, num_classes - 1"),
    (8, cff, "ff_step", "x1 = unit(f1).detach()", "x1 = unit(f1)"),
    (8, cff, "ff_step", "x1 = unit(f1).detach()", "x1 = f1.detach()"),  # length not removed
    (8, cff, "ff_step", "x1 = unit(f1).detach()",                       # each token by itself
     "x1 = normalize(f1, dim=-1).detach()"),
    (8, cff, "ff_step", "x1 = unit(f1).detach()", "x1 = unit(layer(x1)).detach()"),
    (8, cff, "ff_step", "x2 = unit(f2).detach()", "x2 = unit(f1).detach()"),
    (8, cff, "ff_step", "        optimizers[l].zero_grad()\n", ""),
    (8, cff, "ff_step", "model.patches(x, y_wrong)", "model.patches(x, y)"),
    (8, cff, "ff_step", "model.patches(x, y_wrong)",                    # of another image
     "model.patches(x, y_wrong.flip(0))"),
    (8, cff, "ff_step", "model.patches(x, y_wrong)",                    # another draw
     "model.patches(augment(x), y_wrong)"),
    (8, cff, "ff_step", "layer_goodness(model, x, y_wrong)",
     "layer_goodness(model, augment(x), y_wrong)"),
    (8, cff, "ff_step", "model.num_classes", "int(y.max()) + 1"),       # of those in the batch
    (8, cff, "ff_step", "goodness(model.pool(f2))", "goodness(f2.flatten(1))"),
    (8, cff, "ff_step", " + gamma2[l]", " + gamma1[l]"),
    (8, cff, "ff_step", "loss_l.backward()", "loss_l.neg().backward()"),
    # task09
    (9, vit, "patchify", "permute(0, 2, 4, 1, 3, 5)", "permute(0, 4, 2, 1, 3, 5)"),  # by column
    (9, vit, "patchify", "permute(0, 2, 4, 1, 3, 5)", "permute(0, 2, 4, 3, 5, 1)"),  # C last
    (9, vit, "Attention", "q, k, v)", "q, k, v, scale=1)"),
    (9, vit, "Attention", "q, k, v)", "q, k, v, scale=E ** -0.5)"),
    (9, vit, "Attention", "F.scaled_dot_product_attention(q, k, v)",
     "(q / d ** 0.5 @ k.mT).softmax(dim=-2) @ v"),
    (9, vit, "Attention", "h.transpose(1, 2).reshape(B, T, E)", "h.reshape(B, T, E)"),
    (9, vit, "Attention", "self.qkv(x)", "(x @ self.qkv.weight.T)"),    # no bias
    (9, vit, "EncoderLayer", "self.attention(self.norm1(x)) + x",       # post-norm
     "self.norm1(self.attention(x) + x)"),
    (9, vit, "EncoderLayer", "self.attention(self.norm1(x)) + x", "self.attention(self.norm1(x))"),
    (9, vit, "EncoderLayer", "self.mlp(self.norm2(z)) + z", "self.mlp(self.norm2(z)) + x"),
    (9, vit, "EncoderLayer", "nn.GELU()", "nn.ReLU()"),
    (9, vit, "EncoderLayer", "self.mlp(self.norm2(z))", "self.mlp(self.norm1(z))"),
    # task10
    (10, losses, "margins", "m0 + (mL - m0) * t", "mL + (m0 - mL) * t"),    # last layer first
    (10, losses, "margins", "l / max(L - 1, 1)", "l / L"),
    (10, losses, "margins", "(1 - t) ** 2", "(1 - t ** 2)"),
    (10, losses, "margins", "(1 + math.cos", "(1 - math.cos"),
    (10, pipeline, "longest_chain", "length.get(earlier, 0)", "length.get((0, earlier[1]), 0)"),
    (10, pipeline, "longest_chain", '(row["process"] - 1, row["waited_for"])',
     '(0, row["waited_for"])'),
    (10, pipeline, "longest_chain", '(row["process"] + 1, row["waited_for"] - 1)',
     '(1, row["waited_for"] - 1)'),
    (10, pipeline, "longest_chain", '(row["process"], row["batch"] - 1)',
     '(row["process"], row["batch"])'),
    (10, pipeline, "longest_chain", '(row["process"] - 1, row["waited_for"])',
     '(row["process"] - 1, row["waited_for"] - 1)'),
    (10, pipeline, "longest_chain", '(row["process"] + 1, row["waited_for"] - 1)',
     '(row["process"] + 1, row["waited_for"])'),
    (10, pipeline, "longest_chain", "1 + max(", "max("),
    (10, pipeline, "longest_chain", "(step[1], step[0])", "step"),      # by process first
    # task11
    (11, pooled, "pooled_output", "second(u.mean(dim=1))", "second(u).mean(dim=1)"),
    (11, pooled, "pooled_output", "F.linear(x_hat, qkv.weight * norm.weight, "
     "qkv.bias + qkv.weight @ norm.bias)", "qkv(norm(x))"),
    (11, pooled, "pooled_output", " + z.mean(dim=1)", ""),
    (11, pooled, "pooled_output", "z.mean(dim=1)", "z.detach().mean(dim=1)"),
    (11, pooled, "pooled_output", "u.mean(dim=1)", "u.sum(dim=1)"),
    (11, pooled, "pooled_output", "qkv.bias + qkv.weight @ norm.bias", "qkv.bias"),     # no beta
    (11, pooled, "pooled_output", "qkv.weight @ norm.bias", "(qkv.weight @ norm.bias).detach()"),
    (11, pooled, "pooled_output", "qkv.weight * norm.weight, ", "qkv.weight, "),        # no g
    (11, pooled, "pooled_output", "layer.norm2(z)", "layer.norm2(x)"),
    (11, pooled, "pooled_output", "gelu(first", "F.relu(first"),
]


def changed(module, name, old, new):
    """A function or class of the project with a piece of its source replaced."""
    source = re.sub(r" *# .*", "", inspect.getsource(getattr(module, name)))    # without comments
    assert source.count(old) == 1, f"{name} has {source.count(old)} times {old!r}"
    names = dict(vars(module))
    exec(source.replace(old, new), names)
    return names[name]


def cases(test):
    """The arguments of a test function, a dict for each of its cases, made as pytest makes them."""
    grids = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, rows = re.split(", *", mark.args[0]), mark.args[1]
            grids.append([dict(zip(names, row if len(names) > 1 else [row])) for row in rows])
    wanted = inspect.signature(test).parameters
    if "labelled" in wanted:
        grids.append([{"labelled": case} for case in (("vit-8-2-3", "patch"),
                                                      ("mlp-8-3", "one-hot"))])
    for parts in itertools.product(*grids):
        case = {name: value for part in parts for name, value in part.items()}
        if "small" in wanted:
            case["small"] = test_cff.small_case()
        if "labelled" in wanted:
            case["labelled"] = test_cff.small_case(*case["labelled"])
        yield case


def first_failure(number):
    """What a task's first failing test raises; None if all pass."""
    for name in TASKS[number][2]:
        for case in cases(TESTS[name]):
            try:
                TESTS[name](**case)
            except Exception as failure:
                return failure
    return None


@pytest.mark.parametrize("number", TASKS)
def test_each_mistake_fails_its_task_with_words_that_point_to_it(number):
    mistakes = [mistake for mistake in MISTAKES if mistake[0] == number]
    assert len(mistakes) >= 5 and first_failure(number) is None
    for _, module, name, old, new in mistakes:
        with pytest.MonkeyPatch.context() as project:
            project.setattr(module, name, changed(module, name, old, new))
            failure = first_failure(number)
        assert failure is not None, f"task{number:02d}: {new!r} for {old!r} in {name} not noticed"
        if isinstance(failure, AssertionError):     # others say what the student's code raised
            words = str(failure).split("\nassert")[0]
            points = re.search(r"Eq\. |Eqs\. |Sec\. |Algorithm 1|Fig\. |patching", words)
            assert points, f"{new!r} in {name} fails with {words!r}"


# --------------------------------------------------------------------------------- grading a file

@pytest.fixture
def graded(tmp_path, monkeypatch, capsys):
    """To run grade.py in tmp_path: (exit status, lines it prints, what it says on stderr)."""
    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        status = grade([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err
    return run


def by_task(lines):
    return {line.split()[0]: line for line in lines if line.startswith("task")}


def test_the_classroom_grades_a_file(tmp_path, graded):
    """One task done, one wrong, one raises, one needs another, one is copied, the rest to do."""
    done = "\n\n".join([inspect.getsource(losses.goodness), "softplus = F.softplus\n",
                        inspect.getsource(losses.ff_loss)])
    wrong = "def inner_contrastive_loss(f, y, temperature=0.15):\n    return f.sum()\n"
    raises = "def grad_anchor(f, y, k, margin, temperature):\n    return f[k] @ f[k, 1:]\n"
    needs = ("def cff_step(model, optimizers, x, y, *others, **more):\n"
             "    return marginal_contrastive_loss(x, y, 0.4)\n")
    copied = "from losses import margins\n"
    mine = "\n\n".join([template(), done, wrong, raises, needs, copied])
    (tmp_path / "mine.py").write_text(mine, encoding="utf-8")
    status, lines, errors = graded("mine.py")
    text = "\n".join(lines)
    assert status == 1 and not errors, errors
    assert lines[0].startswith("mine.py takes margins from losses.py of the project"), text
    found = by_task(lines)
    assert list(found) == [f"task{number:02d}" for number in TASKS]
    assert "done" in found["task01"] and "to do" in found["task02"], text
    assert re.search(r"task03  \d+ of \d+ ", found["task03"]) and "four vectors, Eq. 12" in text
    assert re.search(r"mine.py, line \d+, in grad_anchor, raised RuntimeError", text)
    assert "to do" in found["task07"], text
    assert lines[lines.index(found["task07"]) + 1].strip() == "to do: task04"
    assert "to do" in found["task10"], text
    command = [sys.executable, HERE / "grade.py", tmp_path / "mine.py", "-k", "task01"]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
    lines = run.stdout.splitlines()                                     # from another folder
    assert run.returncode == 0 and lines[1:] == [found["task01"]], lines
    status, lines, _ = graded("mine.py", "-k", "task12")
    assert status == 2 and lines[-1].startswith("nothing to grade"), lines


def test_a_file_that_cannot_be_read_is_refused(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("raise SystemExit(0)", encoding="utf-8")
    assert grade([str(mine)]) == 2
    assert capsys.readouterr().err.startswith(f"{mine} cannot be read: SystemExit")


HOSTILE = """
import ctypes, os, sys, torch
import test_cff
os.chdir("/")

def goodness(h):
    os._exit(0)

def contrastive_loss(f, y, temperature=0.15):
    while True:
        pass

def inner_contrastive_loss(f, y, temperature=0.15):
    print("x" * 2_000_000)
    for channel in range(1, 20):
        for token in ("", "0 "):
            try:
                os.write(channel, f'{token}["ends", "{os.environ["PYTEST_CURRENT_TEST"]}", '
                                  '"passed", ""]\\n["over"]\\n'.encode())
            except OSError:
                pass
    return input()

def saturated(f, y, margin):
    test_cff.close.__defaults__ = (1e9,)
    torch.Tensor.all = lambda *others, **more: True                     # which it inherits
    return torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0] * 4, [0] * 4]).bool()

def marginal_contrastive_loss(f, y, margin, temperature=0.15):
    return f.sum()

def grad_anchor(f, y, k, margin, temperature):
    torch.set_default_dtype(torch.float16)
    torch.set_grad_enabled(False)
    sys.exit(0)

def grad_positive(f, y, i, k, margin, temperature):
    return bytearray(2 ** 36)

def patchify(images, patch_size):
    p = patch_size
    return torch.nn.functional.unfold(images, p, stride=p).transpose(1, 2)
"""


def test_no_file_can_end_or_stop_or_forge_its_grading(tmp_path, graded):
    (tmp_path / "my file.py").write_text(HOSTILE, encoding="utf-8")
    tests = [f"task{number:02d}" for number in range(1, 7)] + ["patches_put_back"]
    status, lines, _ = graded("my file.py", "--seconds", "3", "-k", " or ".join(tests))
    text, found = "\n".join(lines), by_task(lines)
    assert status == 1 and len(text) < 20_000
    for number in range(1, 7):
        passed = "0" if number < 6 else r"\d+"
        assert re.match(rf"task{number:02d}  {passed} of", found[f"task{number:02d}"]), text[-3000:]
    assert "done" in found["task09"], text[-3000:]                      # the state was put back
    words = [lines[lines.index(found[f"task{number:02d}"]) + 1] for number in range(1, 7)]
    assert "Python ended, exit status 0" in words[0]
    assert re.search("no answer in 3 s, in contrastive_loss, line 1[01] ", words[1])
    assert "raised EOFError" in words[2]
    assert "my file.py changes torch.Tensor.all, which" in words[3]
    assert "raised SystemExit" in words[4]
    assert "raised MemoryError" in words[5] or sys.platform != "linux"


COPIED = """
import importlib.util
import losses as answers
from losses import saturated

exec(open("LOSSES", encoding="utf-8").read())
spec = importlib.util.spec_from_file_location("mine", "LOSSES")
mine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mine)
goodness = mine.goodness
TEXT
def inner_contrastive_loss(f, y, temperature=0.15):
    return answers.inner_contrastive_loss(f, y, temperature)
"""


def test_a_folder_of_files_is_graded_into_a_table(tmp_path, graded):
    """A file in UTF-16, one that copies in five ways, and some that cannot be read."""
    done = "\n".join(["from torch.nn.functional import softplus",
                      inspect.getsource(losses.goodness), inspect.getsource(losses.ff_loss)])
    (tmp_path / "done.py").write_text(done, encoding="utf-16")
    text = re.sub(r" *# .*", "", inspect.getsource(losses.contrastive_loss)).replace("P", "own")
    copied = COPIED.replace("LOSSES", (ROOT / "losses.py").as_posix()).replace("TEXT", text)
    (tmp_path / "losses.py").write_text(copied, encoding="utf-8")
    (tmp_path / "mixed.py").write_text("if 1:\n\tx = 1\n        y = 1\n", encoding="utf-8")
    (tmp_path / "umlaut.py").write_bytes(b"# \xfc\n")
    tests = "worked_example_of_goodness or worked_example_of_eq"
    status, lines, errors = graded("*.py", "--csv", "grades.csv", "-k", tests)
    assert status == 2 and not lines and len(errors.splitlines()) == 4, errors
    with open(tmp_path / "grades.csv", encoding="utf-8", newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["done.py", "losses.py", "mixed.py", "umlaut.py"]
    assert [rows["done.py"][f"task0{number}"] for number in (1, 2, 4)] == ["done", "to do", ""]
    assert [rows["losses.py"][f"task0{number}"] for number in (1, 2, 3, 5)] == ["to do"] * 4, rows
    assert rows["losses.py"]["words"] == "takes goodness from losses.py"
    assert rows["mixed.py"]["words"].startswith("cannot be read: TabError")
    assert "SyntaxError" in rows["umlaut.py"]["words"] and rows["umlaut.py"]["task10"] == "to do"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_a_file_is_read_in_its_own_encoding(tmp_path, encoding):
    text = "# coding: latin-1\nx = 'ä'\n" if encoding == "latin-1" else "x = 'ä'\n"
    (tmp_path / "mine.py").write_text(text, encoding=encoding, newline="")
    assert source(tmp_path / "mine.py").lstrip("\ufeff") == text


def test_a_notebook_is_asked_for_as_python(tmp_path, graded):
    (tmp_path / "mine.ipynb").write_text("{}", encoding="utf-8")
    status, _, errors = graded("mine.ipynb")
    assert status == 2 and "a notebook: save its code as a file of Python" in errors


def test_the_template_has_every_task(tmp_path, graded):
    status, lines, _ = graded("--template")
    assert status == 0 and "\n".join(lines) + "\n" == template()
    for _, names, _ in TASKS.values():
        for _, name in names:
            assert any(re.match(rf"(def|class) {name}\(", line) for line in lines), name


def test_the_template_is_written_into_a_new_file_alone(tmp_path, graded):
    assert graded("--template", "mine.py") == (0, [], "")
    assert (tmp_path / "mine.py").read_text(encoding="utf-8") == template()
    (tmp_path / "mine.py").write_text("my work", encoding="utf-8")
    status, _, errors = graded("--template", "mine.py")
    assert status == 2 and re.fullmatch("mine.py cannot be written: .*\n", errors)
    assert (tmp_path / "mine.py").read_text(encoding="utf-8") == "my work"
    with pytest.raises(SystemExit):
        graded("mine.py", "--csv", "mine.py")                           # no table over a file


# ------------------------------------------------------------------------------------- the README

def page():
    return (HERE / "README.md").read_text(encoding="utf-8")


def test_numbers_worked_by_hand_in_the_readme():
    f, y, three = test_by_hand.FOUR, test_by_hand.TWO, torch.tensor([0, 0, 0, 1])
    e, two = math.exp, torch.tensor([2.0])
    Z_0 = e(0.8) + e(0) + e(-1)
    anchor_0 = losses.grad_anchor(f, y, 0, 0.4, 1)
    anchor_2 = losses.grad_anchor(f, y, 2, 0.4, 1)
    positive = losses.grad_positive(f, y, 2, 3, 0.4, 1)
    negative = losses.grad_negative(f, y, 0, 2, 0.4, 1)
    same = normalize(torch.ones(6, 4))
    shown = [
        f"25 / 4 = {losses.goodness(torch.tensor([[3.0, 4, 0, 0]])).item()}",
        f"ln 2 = {losses.ff_loss(two, two, 2.0):.4f}",
        f"ln(e^0.8 + e^0 + e^-1) - 0.8 = {math.log(Z_0) - 0.8:.4f}; "
        f"the loss is {losses.contrastive_loss(f, y, 1):.4f}",
        f"-ln((e^0.8 + e^0) / 2 / {Z_0:.4f}) = {-math.log((e(0.8) + 1) / 2 / Z_0):.4f}; "
        f"the loss is {losses.inner_contrastive_loss(f, three, 1):.4f}, "
        f"Eq. 3's {losses.contrastive_loss(f, three, 1):.4f}",
        f"the loss is {losses.marginal_contrastive_loss(f, y, 0.4, 1):.4f}, R(0) = {{1}}",
        f"k = 0 gives ({anchor_0[0]:.4f}, {anchor_0[1]:.4f})",
        f"k = 2 gives ({anchor_2[0]:.4f}, {anchor_2[1]:.4f})",
        f"dL_2/df_3 = (0, {positive[1]:.4f})",
        f"dL_0/df_2 = ({negative[0]:.4f}, 0)",
        f"ln 5 = {losses.contrastive_loss(same, torch.tensor([0, 1, 2] * 2), 0.15):.4f}",
        f"has {vit.patchify(torch.zeros(1, 1, 8, 12), 4).shape[1]} patches",
        "in 4 layers: " + ", ".join(f"{m:.1f}" for m in losses.margins(0.4, 0.1, 4)),
    ]
    text = " ".join(page().split())
    for number in shown:
        assert number in text, f"not in README.md: {number}"


def test_the_trace_worked_by_hand_in_the_readme():
    rows = re.findall(r"(\d), (\d), (step|send|receive), (None|\d)", page())
    trace = [{"process": int(process), "batch": int(batch), "event": event,
              "waited_for": None if waited_for == "None" else int(waited_for)}
             for process, batch, event, waited_for in rows]
    assert len(trace) == 8 and pipeline.longest_chain(trace) == 3
    assert "So 2 + 2 - 1 = 3; 5 batches give 6." in " ".join(page().split())


def test_the_readmes_words_for_k_pick_tests():
    sources = "".join(path.read_text(encoding="utf-8") for path in TEST_FILES)
    tests = re.findall(r"^def (test_\w+)", sources, re.M)
    rows = [line.split("|") for line in page().splitlines() if line.startswith("| ")][1:]
    words = [word for row in rows for word in row[3].strip(" `").split(" or ")]
    assert words
    for word in words:
        assert any(word in test for test in tests), f"-k {word} picks no test"
