"""The real scripts, small: training, stopping, resuming, refusals, data.

    python -m pytest -q experiments/test_runs.py
"""
import functools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize, one_hot
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cff
import eval as evaluation
import train
from test_cff import settings_of

TINY = ["--device", "cpu", "--model", "vit-16-2-2", "--limit", "225", "--epochs", "1",
        "--head-epochs", "1", "--batch-size", "90", "--patch-size", "16"]
SMALL = [*TINY, "--epochs", "3", "--head-epochs", "2"]
train.draw_shapes = functools.cache(train.draw_shapes)      # saves a second in each run
torch.set_num_threads(1)                                    # the same rounding in each run

PROCESSES = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "torchvision.transforms.v2", "pytest"])


def make_run(*flags, **out):
    return train.make_run(settings_of(*flags, **out))


def run_main(*flags):
    return train.main([str(flag) for flag in flags])


def run_until(where, stage, epoch, *flags):
    """`run_main` with Ctrl-C in a function of train.py, in one epoch; returns the last line."""
    def stop(run, *batch, real=getattr(train, where)):
        if (run.stage, run.epoch) == (stage, epoch):
            raise KeyboardInterrupt
        return real(run, *batch)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train, where, stop)
        run_main(*flags)
    return ended.value.code


def assert_same_runs(one, other):
    """Settings, weights, optimizers, random states, logs and results of two runs are the same."""
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    assert results[0] == results[1] | {"seconds": results[0]["seconds"]}
    a, b = (train.read(run / "checkpoint.pt") for run in (one, other))
    for saved in (a, b):
        saved["settings"].pop("out")
        for row in saved["log"]:
            row.pop("seconds")
    assert a.pop("settings") == b.pop("settings")
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ------------------------------------------------------------------------- training and testing

def test_train_and_eval_from_the_command_line(tmp_path):
    """The README's commands, with a small model, learn shapes, even if a terminal has no ü."""
    def script(name, *flags):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
        return subprocess.run([sys.executable, ROOT / name, *flags], stdout=subprocess.PIPE,
                              text=True, cwd=tmp_path, env=environment, check=True).stdout
    script("train.py", "--model", "vit-32-4-2", "--limit", "2250", "--epochs", "6",
           "--head-epochs", "2", "--out", "rün")
    result = json.loads((tmp_path / "rün" / "result.json").read_text())
    assert result["test_top1"] > 20 and result["test_top10"] == 100 and result["metric"] == "top1"
    assert f"top-1 {result['test_top1']:.2f} %" in script("eval.py", "rün")


@pytest.mark.parametrize("algo", ["cffm", "ff", "scl", "bp"])
def test_validation_has_the_same_draws_in_each_epoch_and_moves_nothing(algo):
    run = make_run(*TINY, "--algo", algo)
    before, losses = [p.clone() for p in run.model.parameters()], train.validate(run)
    assert torch.equal(losses, train.validate(run))
    assert all(map(torch.equal, before, run.model.parameters()))


def test_the_epoch_with_the_lowest_validation_loss_is_kept(tmp_path, monkeypatch):
    assert train.choosing_loss("cff", [9, 1, 2]) == 2, "the last layer's"
    assert train.choosing_loss("ff", [9, 1, 2]) == 3, "of all layers except the first"
    weights, heads, losses = [], [], iter([3.0, 1.0, 2.0, 4.0, 5.0])

    def validate(run):
        weights.append(run.model.layers[0][0].weight.clone())
        heads.append(run.model.head[-1].weight.clone())
        return torch.tensor([0.0, next(losses)])

    def test(run, real=train.test):
        assert torch.equal(run.model.head[-1].weight, heads[3]), "the better of two epochs"
        return real(run)
    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(train, "test", test)
    assert run_main(*SMALL, "--model", "mlp-8-2", "--out", tmp_path)["best_epoch"] == 2
    assert not torch.equal(weights[1], weights[2]) and not torch.equal(heads[3], heads[4])
    assert torch.equal(weights[1], weights[4]), "the head is trained on it"
    assert torch.equal(evaluation.open_run(tmp_path).model.head[-1].weight, heads[3])


def test_every_update_has_the_learning_rate_of_its_schedule(tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    run_main(*SMALL, "--warmup", 4, "--schedule", "cosine", "--lr", 1e-3, "--head-lr", 1e-2,
             "--batch-size", 45, "--out", tmp_path / "run")           # 5 batches

    def rate(base, warmup, t, steps):
        return base * min(1, (t + 1) / (warmup + 1)) * (1 + math.cos(math.pi * t / steps)) / 2
    expected = [rate(1e-3, 4, t, 15) for t in range(15) for _ in range(2)]
    assert rates == pytest.approx(expected + [rate(1e-2, 0, t, 10) for t in range(10)])


def test_the_probe_is_least_squares_on_images_without_augmentation():
    run = make_run(*TINY, "--algo", "ff", "--limit", 450)
    (fit, y), (val, val_y) = ((cff.encode(run.model, run.normalise(x))[-1], y)  # neutral labels
                              for x, y in (run.train, run.val))
    fit, val = (torch.cat([normalize(f), torch.ones(len(f), 1)], dim=1) for f in (fit, val))
    guess = (val @ torch.linalg.lstsq(fit, one_hot(y).float()).solution).argmax(dim=1)
    right = 100 * (guess == val_y).double().mean().item()
    assert train.measure(run)["probe"] == pytest.approx(right, abs=2.1)    # one of 50 may differ


@pytest.mark.parametrize("flags", [["--algo", "cffm"], ["--algo", "ff", "--model", "mlp-16-2"],
                                   ["--algo", "bp"]], ids=" ".join)
def test_bf16_is_for_the_products_of_a_layer_alone(flags):
    losses = []
    for precision in ("fp32", "bf16"):
        run = make_run(*TINY, *flags, "--precision", precision)
        f = train.layer_features(run, run.val[0])[-1]
        assert f.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        losses.append(train.train_on(run, *run.train).sum().item())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("saved, typed, slowdown, expected", [
    (None, "", 1.1, 4), (None, "", 1.3, 1),                 # a new run; the second on a busy CPU
    (7, "", 1.3, 7), (9, "", 1, 8), (7, "4", 1, 4),         # resumed; 8 cores; OMP_NUM_THREADS
])
def test_threads(monkeypatch, saved, typed, slowdown, expected):
    asked, seconds = [4], {1: 1.0, 4: slowdown}
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1])
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(train, "timeit", lambda work, number: seconds[asked[-1]])
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": typed} if typed else {})
    train.set_threads(torch.device("cpu"), saved and {"threads": saved})
    assert asked[-1] == expected


# ---------------------------------------------------------------------------- stop and resume

@pytest.mark.parametrize("where, stage, epoch, flags", [
    ("train_on", 1, 0, []), ("validate", 1, 2, ["--augment", "crop+randaug", "--missing", "0.5"]),
    ("train_on", 2, 0, ["--algo", "scl"]), ("train_on", 1, 1, ["--algo", "ff"]),
    ("validate", 2, 1, ["--algo", "symba", "--head"]), ("train_on", 1, 2, ["--algo", "bp"]),
    ("validate", 1, 1, ["--algo", "collab", "--model", "MLP[16 2]", "--label-noise", "0.2"]),
], ids=str)
def test_resume_after_ctrl_c_is_bit_for_bit(tmp_path, where, stage, epoch, flags):
    whole, out = tmp_path / "whole", tmp_path / "a b"
    run_main(*SMALL, *flags, "--out", whole)
    said = run_until(where, stage, epoch, *SMALL, *flags, "--out", out)
    assert said == f'stopped; continue with: python train.py --resume --out "{out}"'
    run_main("--resume", "--out", out)
    assert_same_runs(whole, out)


def test_a_run_killed_at_random_moments_continues_bit_for_bit(tmp_path):
    whole, killed, statuses = tmp_path / "whole", tmp_path / "killed", []
    flags = [*TINY, "--epochs", 40, "--head-epochs", 10]
    run_main(*flags, "--out", whole)
    while 0 not in statuses:
        begun = ["--resume"] if (killed / "checkpoint.pt").exists() else flags
        child = PROCESSES.Process(target=run_main, args=(*begun, "--out", killed))
        child.start()
        while child.is_alive() and not (killed / "checkpoint.pt").exists():
            time.sleep(0.01)
        child.join(random.uniform(1, 3) + len(statuses) / 5 if statuses else 0.1)
        child.kill()                                                # kill -9
        child.join()
        statuses.append(child.exitcode)
    assert set(statuses) == {-9, 0}, "killed, and continued to its end"
    assert_same_runs(whole, killed)


@pytest.mark.parametrize("n", [5, 6])                   # this write fails: a file of epoch 2
def test_a_full_disk_is_one_line_and_a_whole_checkpoint_stays(tmp_path, monkeypatch, n):
    written = []

    def full(path, content, write=Path.write_bytes):
        written.append(path)
        write(path, content[:100] if len(written) == n else content)
        if len(written) == n:
            raise OSError("No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(SystemExit, match="No space left on device; continue with: python tr"):
            run_main(*SMALL, "--out", tmp_path / "run")
    assert not list(tmp_path.glob("run/*.tmp"))
    run_main("--resume", "--out", tmp_path / "run")
    run_main(*SMALL, "--out", tmp_path / "whole")
    assert_same_runs(tmp_path / "whole", tmp_path / "run")


def test_a_run_goes_on_while_another_program_has_log_csv_open(tmp_path, monkeypatch, capsys):
    def busy(path, target, replace=Path.replace):                   # as on Windows
        if target.name == "log.csv" and train.read(tmp_path / "checkpoint.pt")["stage"] == 1:
            raise PermissionError(f"Access is denied: {target}")
        replace(path, target)
    monkeypatch.setattr(Path, "replace", busy)
    run_main(*TINY, "--out", tmp_path)
    assert "log.csv is open in another program" in capsys.readouterr().out
    assert (tmp_path / "log.csv").read_text().splitlines()[-1].startswith("2,1,")


def test_a_mistake_in_the_code_shows_where_it_is(tmp_path, monkeypatch):
    def mistake(*arguments):
        raise ValueError("a mistake")
    monkeypatch.setattr(train, "cff_step", mistake)
    with pytest.raises(ValueError) as error:
        run_main(*TINY, "--out", tmp_path / "run")
    assert error.traceback[-1].name == "mistake", "not hidden behind one line"


def test_training_works_as_a_library_in_a_thread_without_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)                        # as in pythonw, or with >&-
    with ThreadPoolExecutor() as threads:
        threads.submit(train.train, make_run(*TINY, out=tmp_path / "new")).result()
        threads.submit(run_main, *TINY, "--out", tmp_path / "another").result()
    assert_same_runs(tmp_path / "new", tmp_path / "another")


def test_a_folder_is_for_one_run_with_its_settings_and_data(tmp_path, capsys, monkeypatch):
    theirs = tmp_path / "theirs" / "checkpoint.pt"                  # another program's
    train.write(theirs, b"theirs")
    for flags, words in ((TINY, "holds files"), (["--resume"], "no run to resume")):
        with pytest.raises(SystemExit) as ended:
            run_main(*flags, "--out", theirs.parent)
        assert words in f"{ended.value.code} {capsys.readouterr().err}"
    assert theirs.read_text() == "theirs"
    tmp_path = tmp_path / "run"
    first, second = (make_run(*TINY, out=tmp_path) for _ in range(2))       # started together
    train.start(first)
    with pytest.raises(FileExistsError):
        train.start(second)
    resume = ["--resume", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        train.parse([*resume, "--lr", "0.1"])
    assert "lr cannot change" in capsys.readouterr().err
    fewer = [part[:-10] for part in train.load_data("shapes", "")]
    monkeypatch.setattr(train, "load_data", lambda *where: fewer)
    with pytest.raises(SystemExit, match="the run began with"):
        run_main(*resume)


# ------------------------------------------------------------------------- what a user may type

def test_eval_counts_a_run_once_and_skips_what_it_cannot_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m[1]", "m1", "empty", "excel", "old"):
        shutil.copytree(ROOT / "experiments" / "records" / "shapes-bp", name)
    log = Path("m1", "log.csv").read_text()
    Path("m[1]", "log.csv").write_text(log, encoding="utf-8-sig")           # saved by Excel
    Path("excel", "log.csv").write_text(log.replace(",", ";"))
    Path("empty", "result.json").write_text("{}")
    Path("old", "config.json").write_text('{"settings": {"algo": "older"}, "data": {}}')
    folders = evaluation.find_folders(["m[1]", "m[1]/", tmp_path / "m[1]", "e*", "old", "none"])
    groups = evaluation.read_groups(folders)
    assert [[record.name for record in records] for records in groups] == [["m[1]"]]
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["empty:", "excel:", "old:", "none:"]
    evaluation.read_groups(evaluation.find_folders(["m[1]", "m1"]))
    assert "m[1] and m1 have equal settings and seed" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--model", "vit-16-3-2"], "heads do not divide"), (["--patch-size", "5"], "do not divide"),
    (["--model", "resnet"], "a model is named"), (["--limit", "100000"], "there are 9000 training"),
    (["--dataset", "cifar11"], "invalid choice"), (["--m0", "3"], "m0 must lie in 0..2"),
    (["--lr", "nan"], "lr must lie in"), (["--limit", "8"], "are left"),
    (["--limit", "18", "--views", "1"], "two images of a class"),
    (["--temperature", "inf"], "temperature must lie"), (["--seed", "9" * 20], "seed must lie"),
    (["--resume"], "no run to resume"), (["--batch", "64"], "unrecognized"),
    (["--decay", "exponential", "--m0", "0"], "needs m0 > 0"),
    (["--algo", "bp", "--head"], "--head is for ff"), (["--recipe", "mlp"], "not for vit-64-4-3"),
])
def test_bad_input_ends_with_one_line(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        run_main(*flags, "--out", tmp_path / "run")
    printed = capsys.readouterr().err.strip().splitlines()
    line = printed[-1] if ended.value.code == 2 else ended.value.code
    assert "error:" in line and words in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_flags_win_then_the_data_set_then_the_recipe():
    s = settings_of("--dataset", "tinyimagenet", "--recipe", "short", "--epochs", 7)
    assert (s.epochs, s.padding, s.batch_size) == (7, 6, 128)
    s.model, data = "ViT[16 2 2]", {"image_shape": (3, 32, 32), "num_classes": 10}
    assert train.make_model(s, data).patches(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 192)
    mnist, plain = settings_of("--dataset", "mnist"), settings_of("--recipe", "none")
    assert (mnist.model, mnist.views, mnist.epochs, plain.epochs) == ("mlp-500-3", 1, 30, 600)
    assert settings_of("--dataset", "cifar10", "--algo", "bp", "--recipe", "short").lr == 0.002


# ------------------------------------------------------------------------------------- the data

def test_mnist_is_not_flipped(monkeypatch):
    data = torch.randint(256, (300, 1, 16, 16), dtype=torch.uint8), torch.arange(300) % 4
    monkeypatch.setattr(train, "load_data", lambda *where: (*data, *data))
    run = make_run(*TINY, "--dataset", "mnist", "--model", "mlp-4-1", "--augment", "flip")
    assert torch.equal(run.augment(run.train[0]), run.normalise(run.train[0]))


def test_tiny_imagenets_layout(tmp_path):
    """A made-up folder: one image per class and part. Class n01 has bright, grey JPEGs."""
    root, lines = tmp_path / "tiny-imagenet-200", []
    for name, channels, value in (("n02", 3, 0), ("n01", 1, 200)):
        image = to_pil_image(torch.full((channels, 64, 64), value, dtype=torch.uint8))
        for file in (root / "train" / name / "images" / "0.JPEG", root / "val" / "images" / name):
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, "JPEG")
        lines.append(f"{name}\t{name}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    images, y, test_images, test_y = train.load_data("tinyimagenet", tmp_path)
    assert images.shape == test_images.shape == (2, 3, 64, 64) and images.dtype == torch.uint8
    assert y.tolist() == [0, 1] and test_y.tolist() == [1, 0]               # n01 is class 0
    assert [image.min() > 100 for image in (*images, *test_images)] == [True, False, False, True]


@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "cifar100", "tinyimagenet"])
def test_missing_data_give_one_line(tmp_path, monkeypatch, dataset):
    def no_network(*arguments, **options):
        raise OSError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    words = f"{dataset} could not be loaded from --data-dir {re.escape(str(tmp_path))} .no network"
    with pytest.raises(SystemExit, match=words):
        run_main("--dataset", dataset, "--data-dir", tmp_path, "--out", tmp_path / "run")
