"""Tests of the grader: it catches every mistake and explains it.

    python -m pytest -q classroom
"""
import csv
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grade import PROJECT, ROOT, TASKS, Plugin, grade, judge, template

import losses               # grade.py has added its folder to sys.path
from test_by_hand import FOUR, TWO
from test_cff import slow_anchor_loss


# ------------------------------------------------------------------------------ the zoo of mistakes

MISTAKES = [    # (functions, a piece of their source, wrong code instead of it ...)
    ("goodness", "h.square().mean(dim=1)", "h.square().sum(dim=1)", "h.norm(dim=1) / h.shape[1]",
     "h.square().mean()", "h.detach().square().mean(dim=1)"),
    ("ff_loss", "softplus(threshold - g_pos) + softplus(g_neg - threshold)",
     "softplus(g_pos - threshold) + softplus(threshold - g_neg)",
     "softplus(threshold - g_pos) + softplus(g_neg)",
     "torch.log(1 + torch.exp(threshold - g_pos)) + softplus(g_neg - threshold)"),  # overflows
    ("ff_loss", ".mean() / 2", ".mean()"),
    ("contrastive_loss inner_contrastive_loss", "_log_sum_exp(s / temperature, P | N)",
     "(s / temperature).logsumexp(dim=1)", "_log_sum_exp(s / temperature, N)",
     "((s / temperature).exp() * (P | N)).sum(dim=1).log()"),           # overflows
    ("contrastive_loss", "P, N = _sets(y)",
     "P, N = _sets(y); A = f @ f.T < 1 - 1e-9; P, N = P & A, N & A",    # excludes i by its value
     "P, N = _sets(y); own = torch.eye(len(y)).roll(len(y) // 2, 0).bool()\n"
     "    P, N = P & ~own, N | own"),                                   # other view as a negative
    ("contrastive_loss marginal_contrastive_loss", " / _size(P)", ""),
    ("contrastive_loss", "-((s / temperature", "-((s"),
    ("contrastive_loss", "-((s / temperature - log_sum_A[:, None]) * P).sum(dim=1) / _size(P)",
     "log_sum_A - _log_sum_exp(s / temperature, P) + _size(P).to(f).log()"),        # Eq. 12
    ("contrastive_loss", "_mean_over_anchors(L_i, P)", "L_i[P.any(dim=1)].sum()", "L_i.mean()",
     "_mean_over_anchors(L_i, P).detach()"),
    ("contrastive_loss", "_size(P)\n    return _mean_over_anchors(L_i, P)",
     "P.sum(dim=1)\n    return L_i.nanmean()"),                         # its gradient is nan
    ("inner_contrastive_loss", " - _size(P).to(f).log()",
     "", " + _size(P).to(f).log()", " - _size(P).log()"),               # the last is float32
    ("inner_contrastive_loss", "_log_sum_exp(s / temperature, P)", "_log_sum_exp(s, P)",
     "(s / temperature * P).sum(dim=1) / _size(P) + _size(P).to(f).log()"),         # Eq. 3
    ("inner_contrastive_loss", "_mean_over_anchors(L_i, P)",
     "(L_i * P.any(dim=1)).sum() / P.any(dim=1).sum()"),                # nan
    ("marginal_contrastive_loss", "torch.where(P, Q, s)", "Q", "s", "torch.where(N, Q, s)"),
    ("marginal_contrastive_loss", "_Q(s, margin)", "s + margin", "s - margin",
     "_Q(s / temperature, margin) * temperature", "s + (_Q(s, margin) - s).detach()"),
    ("marginal_contrastive_loss", "-(Q / temperature * P)", "-(s / temperature * P)"),
    ("marginal_contrastive_loss", "_log_sum_exp(torch.where(P, Q, s) / temperature, P | N)",
     "_log_sum_exp(torch.where(P, Q, s) / temperature, P)",
     "((torch.where(P, Q, s) / temperature).exp() * (P | N)).sum(dim=1).log()"),    # overflows
    ("saturated", "P & (f @ f.T + margin > 1)",
     "(f @ f.T + margin > 1)", "P & (f @ f.T + margin < 1)", "P & (f @ f.T - margin > 1)"),
    ("grad_anchor", "-f[Rc].sum(dim=0)", "-f[P].sum(dim=0)"),           # saturated pairs pull, too
    ("grad_anchor", " / P.sum()", " / Rc.sum().clamp(min=1)", ""),
    ("grad_anchor", "(pull + push / Z) / temperature",
     "pull + push / Z", "(push / Z - pull) / temperature", "((pull + push) / Z) / temperature",
     "(pull + push / (Z - R.sum() * math.exp(1 / temperature))) / temperature"),    # R not in Z
    ("grad_anchor", "(s[Rc] + margin)", "s[Rc]"),
    ("grad_anchor", " + torch.exp(s[N] / temperature) @ f[N]", ""),
    ("grad_anchor grad_negative", "if not P.any():", "if False:"),
    ("grad_positive", "if R[k]:", "if False:"),                         # through a saturated pair
    ("grad_positive", "-1 / P.sum().to(f)", "-1"),
    ("grad_positive", "s[k] + margin", "s[k]"),
    ("grad_positive grad_negative", "* f[i] / temperature", "* f[k] / temperature", "* f[i]"),
    ("grad_positive grad_negative", "/ Z",                              # Z_k
     "/ _terms(f, y, k, margin, temperature)[-1]"),
    ("grad_negative", "torch.exp(s[k] / temperature)", "torch.exp((s[k] + margin) / temperature)"),
    ("cff_step", "x1 = f1.detach()\n        x2 = f2.detach()", "x1, x2 = f1, f2",
     "x1 = x2 = f1.detach()", "x1, x2 = layer(x1).detach(), layer(x2).detach()"),
    ("cff_step", "x1, x2 = augment(x), augment(x)",
     "x1 = x2 = augment(x)", "x1 = augment(x)\n    x2 = augment(x1)"),
    ("cff_step", "normalize(f)", "f", "normalize(f, dim=0)"),
    ("cff_step", "model.pool(f1), model.pool(f2)", "model.pool(f1), model.pool(f1)",
     "f1[:, 0], f2[:, 0]", "f1.mean(dim=1), f2.mean(dim=1)"),           # an MLP has no tokens
    ("cff_step", "margins[l], temperature", "margins[0], temperature", "margins[l]"),
    ("cff_step", "if views == 1:", "if False:",                         # two passes, one view
     "if views == 1:\n        model.layers[0](model.patches(x))"),
    ("cff_step ff_step", "        optimizers[l].zero_grad()\n", ""),
    ("cff_step", "    y = torch.cat([y, y])\n", ""),
    ("cff_step", "loss.detach()", "loss"),
    ("wrong_labels", "torch.randint(1, num_classes",
     "torch.randint(0, num_classes", "torch.randint(1, num_classes - 1"),
    ("ff_step", "x1 = unit(f1).detach()", "x1 = unit(f1)", "x1 = f1.detach()",
     "x1 = normalize(f1, dim=-1).detach()", "x1 = unit(layer(x1)).detach()"),
    ("ff_step", "x2 = unit(f2).detach()", "x2 = unit(f1).detach()"),
    ("ff_step", "model.patches(x, y_wrong)", "model.patches(x, y)",
     "model.patches(x, y_wrong.flip(0))", "model.patches(augment(x), y_wrong)"),
    ("ff_step", "layer_goodness(model, x, y_wrong)", "layer_goodness(model, augment(x), y_wrong)"),
    ("ff_step", "model.num_classes", "int(y.max()) + 1"),
    ("ff_step", "goodness(model.pool(f2))", "goodness(f2.flatten(1))"),
    ("ff_step", " + gamma2[l]", " + gamma1[l]"),
    ("ff_step", "loss_l.backward()", "loss_l.neg().backward()"),
    ("patchify", "permute(0, 2, 4, 1, 3, 5)",                           # by column; channels last
     "permute(0, 4, 2, 1, 3, 5)", "permute(0, 2, 4, 3, 5, 1)"),
    ("Attention", "q / d ** 0.5", "q", "q / E ** 0.5"),
    ("Attention", "softmax(dim=3)", "softmax(dim=2)"),                  # over the queries
    ("Attention", "h.transpose(1, 2).reshape(B, T, E)", "h.reshape(B, T, E)"),
    ("Attention", "self.qkv(x)", "(x @ self.qkv.weight.T)"),            # no bias
    ("EncoderLayer", "self.attention(self.norm1(x)) + x",
     "self.norm1(self.attention(x) + x)", "self.attention(self.norm1(x))"),
    ("EncoderLayer", "self.mlp(self.norm2(z)) + z",
     "self.mlp(self.norm2(z)) + x", "self.mlp(self.norm1(z)) + z"),
    ("EncoderLayer", "nn.GELU()", "nn.ReLU()"),
    ("margins", "m0 + (mL - m0) * t", "mL + (m0 - mL) * t"),            # the last layer first
    ("margins", "l / max(L - 1, 1)", "l / L"),
    ("margins", "(1 - t) ** 2", "(1 - t ** 2)"),
    ("margins", "(1 + math.cos", "(1 - math.cos"),
    ("longest_chain", "length.get(earlier, 0)", "length.get((0, earlier[1]), 0)"),
    ("longest_chain", '(row["process"] - 1, row["waited_for"])',
     '(0, row["waited_for"])', '(row["process"] - 1, row["waited_for"] - 1)'),
    ("longest_chain", '(row["process"] + 1, row["waited_for"] - 1)',
     '(1, row["waited_for"] - 1)', '(row["process"] + 1, row["waited_for"])'),
    ("longest_chain", '(row["process"], row["batch"] - 1)', '(row["process"], row["batch"])'),
    ("longest_chain", "1 + max(", "max("),
    ("longest_chain", "(step[1], step[0])", "step"),                    # by process first
    ("pooled_output", "second(u.mean(dim=1))", "second(u).mean(dim=1)", "second(u.sum(dim=1))",
     "second(gelu(first(layer.norm2(z)).mean(dim=1)))"),                # the mean before GELU
    ("pooled_output", "F.layer_norm(x, norm.normalized_shape, eps=norm.eps)",
     "F.layer_norm(x, norm.normalized_shape, eps=0)",
     "(x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + norm.eps).sqrt()"),
    ("pooled_output",
     "F.linear(x_hat, qkv.weight * norm.weight, qkv.bias + qkv.weight @ norm.bias)",
     "qkv(norm(x))", "F.linear(x_hat, qkv.weight * norm.weight, qkv.bias)",         # no beta
     "F.linear(x_hat, qkv.weight, qkv.bias + qkv.weight @ norm.bias)"),             # no g
    ("pooled_output", "qkv.weight @ norm.bias", "(qkv.weight @ norm.bias).detach()"),
    ("pooled_output", " + z.mean(dim=1)", "", " + z.detach().mean(dim=1)"),
    ("pooled_output", "layer.norm2(z)", "layer.norm2(x)"),
    ("pooled_output", "gelu(first", "F.relu(first"),
]


class Zoo(Plugin):
    """Grades the project's functions: first unchanged, then with one mistake at a time."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        items = session.items
        self.right, self.wrong = {}, {task: {} for task in TASKS}
        for task, (_, answers, _) in TASKS.items():
            right = {answer.__name__: answer for answer in answers}
            self.mine = SimpleNamespace(**right)
            self.right[task] = judge(task, list(self.outcomes(task, items)))
            for functions, old, *wrong in MISTAKES:
                for name in right.keys() & functions.split():
                    for new in wrong:
                        self.mine = SimpleNamespace(**right | changed(right[name], old, new))
                        failures = (words for _, words in self.outcomes(task, items) if words)
                        self.wrong[task][name, old, new] = next(failures, "")
        return True


def changed(answer, old, new):
    """The names in the answer's module, after `new` has replaced `old` in the answer's source."""
    source = re.sub(r" *# .*", "", inspect.getsource(answer))           # drop comments
    assert source.count(old) == 1, f"{answer.__name__} must contain {old!r} once"
    names = dict(vars(PROJECT[answer.__module__]))
    exec(source.replace(old, new), names)
    return names


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    zoo, here = Zoo(tmp_path_factory.mktemp("zoo"), None, None), Path.cwd()
    assert zoo.run() == pytest.ExitCode.TESTS_FAILED            # pytest itself works
    os.chdir(here)
    return zoo


@pytest.mark.parametrize("task", TASKS)
def test_each_mistake_fails_its_task_and_the_words_say_why(zoo, task):
    assert zoo.right[task] == ("done", "") and len(zoo.wrong[task]) >= 5
    for (name, old, new), words in zoo.wrong[task].items():
        points = re.search(r"Eqs?\. |Sec\. |Algorithm 1|Fig\. |patching| raised |check: ", words)
        assert points, f"{name} with {new!r} instead of {old!r} gives: {words!r}"
        assert "float32 rounding" in words or new != " - _size(P).log()"


# ---------------------------------------------------------------------------------- grading files

HONEST = Path(losses.__file__).read_text(encoding="utf-8")


def with_line(line):            # as the first line of contrastive_loss
    return HONEST.replace("    _check(f, y, temperature)", f"    {line}", 1)


IMPORTING = """import losses
from losses import goodness
from train import ff_loss
contrastive_loss = lambda *a, **k: losses.contrastive_loss(*a, **k)
"""
FILES = {       # name: (source, status, task01, task02, pattern in the words)
    "honest": (HONEST, "graded", "done", "done", ""),
    "half": (template() + HONEST.split("def contr")[0], "graded", "done", "to do", ""),
    "blank": ("", "graded", "to do", "to do", ""),
    "looping": (HONEST.replace("return h", "while True: h", 1), "graded", "stopped", "done",
                r"no result in 5 s, at line \d+ in goodness"),
    "exiting": (with_line("import os; os._exit(0)"), "graded", "done", "stopped", "Python exited"),
    "leaving": ("x = 1\nimport sys; sys.exit(0)", "line 2 in <module> raised", "", "", ""),
    "crashing": (with_line("import ctypes; ctypes.string_at(0)"), "graded", "done", "stopped",
                 r"Python exited, at line \d+ in contrastive_loss"),
    "flooding": (with_line("print(1_000_000 * 'x')"), "graded", "done", "done", ""),
    "importing": (IMPORTING, "graded", "to do", "to do", "write your own losses.goodness"),
    "müller": ("\ufeff# ß\n" + HONEST.replace("\n", "\r\n"), "graded", "done", "done", ""),
    "plotting": ('import os\nassert os.environ["MPLBACKEND"] == "Agg"\n' + HONEST,
                 "graded", "done", "done", ""),
    "wrong": ("ff_loss = contrastive_loss = lambda *_: print()", "graded", "0 of 3", "0 of 4",
              "(?s)has no goodness .*contrastive_loss must return type Tensor, not None"),
    "mutating": (with_line("f.mul_(0)"), "graded", "done", "0 of 4", "changes its argument f"),
    "utf16": (HONEST, "it is saved as UTF-16", "", "", ""),
}


def test_files_that_a_teacher_meets(tmp_path, monkeypatch):
    """Settings for pytest above the project, in pytest.ini and conftest.py, have no effect."""
    grader = tmp_path / "DL [2025]" / "classroom" / "grade.py"
    shutil.copytree(ROOT, grader.parent.parent, ignore=lambda folder, names: [
        name for name in names if not name.endswith((".py", "classroom", "experiments"))])
    for name, (text, *_) in FILES.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-16" if name == "utf16" else "utf-8", newline="")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -x -ra --tb=short\n")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-x -k nothing")
    files = sorted(tmp_path.glob("*.py"))
    (tmp_path / "conftest.py").write_text("raise SystemExit")
    command = [sys.executable, grader, *files, "--seconds", "5",
               "-k", "task01", "-k", "task02", "--csv", "grades.csv", "--reports", "reports"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert run.returncode == 2 and not run.stderr, run.stderr
    with open(tmp_path / "grades.csv", encoding="utf-8-sig", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == sorted(FILES)
    for name, (_, status, first, second, words) in FILES.items():
        row, report = rows[name], (tmp_path / "reports" / f"{name}.txt").read_text("utf-8")
        assert status in row["status"] and (row["task01"], row["task02"]) == (first, second), row
        assert re.search(words, row["task01 message"] + row["task02 message"]), row
        assert re.search(words, report) and len(report) < 11_000
        assert row["points"] == str([first, second].count("done")) and row["maximum"] == "2"


def test_one_file_and_refused_options(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(HONEST, encoding="utf-8")
    assert grade(["mine.py", "-k", "task02", "-k", "task01"]) == 0
    assert re.fullmatch(".*2 of 2 done\n(task0.  done .*\n){2}\n", capsys.readouterr().out)
    for words in ("-k task1", "-k eq1", "-k task01,task02", "--csv a.py --force",
                  "--csv mine.py", "--csv new.CSV --reports .", "--template"):
        with pytest.raises(SystemExit, match="2"):
            grade(["mine.py", *words.split()])
        assert re.fullmatch("(-k|--csv) .*: .*\n|.*exists.*\n", capsys.readouterr().err)
    assert Path("mine.py").read_text("utf-8") == HONEST and os.listdir() == ["mine.py"]
    files = [Path(student, "src", "mine.py") for student in ("alice", "bob")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text(HONEST, encoding="utf-8")
    grade([*map(str, files), "-k", "task01", "--reports", "reports"])
    assert sorted(os.listdir("reports")) == ["alice-src-mine.txt", "bob-src-mine.txt"]
    monkeypatch.setattr(sys, "stdout", None)                    # as in IDLE
    assert grade(["mine.py", "-k", "task02", "--csv", "new.CSV"]) == 0
    assert Path("new.CSV").read_bytes().startswith(b"\xef\xbb\xbfname,")     # Excel needs this


def test_numbers_worked_by_hand_in_the_readmes():
    f, y, three = FOUR, TWO, torch.tensor([0, 0, 0, 1])
    shared = [losses.marginal_contrastive_loss(f, y, 0.4, 1),
              *losses.grad_anchor(f, y, 0, 0.4, 1), *losses.grad_anchor(f, y, 2, 0.4, 1),
              losses.grad_positive(f, y, 2, 3, 0.4, 1)[1],
              losses.grad_negative(f, y, 0, 2, 0.4, 1)[0]]
    here = [losses.contrastive_loss(f, y, 1), losses.contrastive_loss(f, three, 1),
            losses.inner_contrastive_loss(f, three, 1)]
    front = [slow_anchor_loss(f, y, i, 0.4, 1) for i in range(4)]
    for name, numbers in (("classroom/README.md", shared + here), ("README.md", shared + front)):
        page = (ROOT / name).read_text(encoding="utf-8")
        for number in numbers:
            assert f"{number:.4f}" in page, f"{name} lacks {number:.4f}"
