"""The real scripts, small: training, stopping, resuming, refusals, data, reading runs.

    python -m pytest -q experiments/test_runs.py
"""
import csv
import errno
import functools
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch.nn.functional import normalize, one_hot
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cff
import eval as evaluation
import losses
import train

SMALL = ["--device", "cpu", "--model", "vit-16-2-2", "--limit", "450", "--epochs", "3",
         "--head-epochs", "2", "--batch-size", "90"]
TINY = ["--device", "cpu", "--model", "vit-16-2-2", "--limit", "225", "--epochs", "1",
        "--head-epochs", "1", "--batch-size", "90", "--patch-size", "16"]
ALGOS = train.SETTINGS["algo"][1]
train.draw_shapes = functools.cache(train.draw_shapes)      # saves a second in each run

# new processes are forked from one that has imported torch, where the system can do that
FORKSERVER = "forkserver" in multiprocessing.get_all_start_methods()
PROCESSES = multiprocessing.get_context("forkserver" if FORKSERVER else "spawn")
PROCESSES.set_forkserver_preload(["torch.distributed", "torchvision.transforms.v2"])


def run_main(*flags):
    return train.main([str(flag) for flag in flags])


def make_run(*flags, out="no-such-run"):
    return train.make_run(settings_of(*flags, out=out))


def settings_of(*flags, out="no-such-run"):
    return train.parse([*map(str, flags), "--out", str(out)])[0]


def read_log(folder):
    """log.csv without the seconds: a list of {column: text}."""
    with open(folder / "log.csv", newline="") as file:
        return [{column: value for column, value in row.items() if column != "seconds"}
                for row in csv.DictReader(file)]


def read_json(path):
    return json.loads(path.read_text())


def assert_same_runs(one, other):
    """Weights, optimizers, random states and logs of two runs are the same, bit for bit."""
    a, b = (train.read(run / "checkpoint.pt") for run in (one, other))
    for saved in (a, b):
        saved["settings"].pop("out")
        for row in saved["log"]:
            row.pop("seconds")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert read_log(one) == read_log(other)


# ------------------------------------------------------------------------- training and testing

def test_train_and_eval_from_the_command_line(tmp_path):
    """The commands of the README, small, in a terminal that has no ü: shapes are learned, and
    eval.py finds the same accuracy."""
    def script(name, *flags):
        return subprocess.run([sys.executable, ROOT / name, *flags], capture_output=True, text=True,
                              cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1",
                                                 "PYTHONIOENCODING": "ascii"})
    out = tmp_path / "rün"
    done = script("train.py", "--model", "vit-32-4-2", "--limit", "4500", "--epochs", "12",
                  "--head-epochs", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    result, config = read_json(out / "result.json"), read_json(out / "config.json")
    assert result["test_top1"] > 40 and result["test_top10"] == 100 and result["metric"] == "top1"
    assert config["settings"]["epochs"] == 12 and config["data"]["images"] == [4500, 500, 2000]
    assert config["command"].endswith(f"--out '{out}'")
    rows = read_log(out)
    assert [row["epoch"] for row in rows if row["stage"] == "2"] == ["1", "2"]
    assert float(rows[11]["train_loss_2"]) < float(rows[0]["train_loss_2"]) < math.log(255)
    assert float(rows[11]["probe"]) > 40 and 0 < float(rows[11]["val_saturated_1"]) < 1
    shown = script("eval.py", str(out))
    assert f"top-1 {result['test_top1']:.2f} %" in shown.stdout, shown.stderr


@pytest.mark.parametrize("flags", [
    ["--algo", "cff"], ["--views", "1"], ["--pool", "token"], ["--augment", "crop+randaug"],
    ["--model", "MLP[16 2]"], ["--missing", "0.5", "--label-noise", "0.2"],
    ["--algo", "ff", "--head"], ["--algo", "symba", "--head", "--model", "mlp-16-2"],
    *(["--algo", algo, "--model", model] for algo in ("ff", "symba", "collab", "scl", "bp")
      for model in ("vit-16-2-2", "mlp-16-2")),
], ids=" ".join)
def test_settings_of_the_tables_train_and_test(tmp_path, flags):
    out = tmp_path / "run"
    run_main(*TINY, *flags, "--out", out)
    s, rows = settings_of(*flags), read_log(out)
    assert [row["stage"] for row in rows] == ["1", "2"][:train.stages(s)]
    last_alone = s.algo in ("scl", "bp")
    assert [f"val_loss_{l}" in rows[0] for l in (1, 2)] == [not last_alone, True]
    assert ("val_saturated_1" in rows[0]) == (s.algo == "cffm")
    assert read_json(out / "result.json")["test_top10"] == 100


@pytest.mark.parametrize("algo", ALGOS)
def test_validation_is_a_training_step_that_moves_nothing(algo):
    run = make_run("--model", "mlp-16-3", "--limit", 180, "--algo", algo, "--augment", "none",
                   "--views", 1, "--batch-size", 512, "--device", "cpu")
    before = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    run.val = run.train
    measured = train.validate(run)
    assert torch.equal(measured, train.validate(run)), "the same random draws in each epoch"
    assert torch.equal(before, torch.cat([p.flatten() for p in run.model.parameters()]))
    run.generator.manual_seed(run.settings.seed)                    # the same wrong labels
    assert torch.allclose(measured, train.train_on(run, *run.train), atol=1e-6)
    run.settings.batch_size = 100                                   # 100 and 80 images
    monkeypatched = [len(rows) for rows in train.shuffled_batches(run)]
    assert monkeypatched == [100, 80]


@pytest.mark.parametrize("algo, by_layer, chosen", [
    ("cff", [[1.0, 3.0], [2.0, 1.0], [0.0, 2.0]], 2), ("bp", [[3.0], [1.0], [2.0]], 2),
    ("ff", [[0.0, 3.0, 1.0], [9.0, 1.0, 2.0], [1.0, 2.0, 2.0]], 2)])
def test_the_epoch_is_chosen_by_the_last_layer_and_ffs_by_all_but_the_first(
        tmp_path, monkeypatch, algo, by_layer, chosen):
    """And stage 2 starts from the weights of that epoch. Each epoch's weights are its number."""
    values, head = iter(torch.tensor([*by_layer, *by_layer])), algo == "ff"

    def train_on(run, x, y):
        if run.stage == 2:
            assert (run.model.layers[0][0].weight == chosen).all()
        for p in (run.model.layers if run.stage == 1 else run.model.head).parameters():
            p.data.fill_(run.epoch + 1)
        return torch.ones(len(by_layer[0]))
    monkeypatch.setattr(train, "train_on", train_on)
    monkeypatch.setattr(train, "validate", lambda run: next(values))
    flags = SMALL, "--model", f"mlp-8-{len(by_layer[0])}", "--head-epochs", 3, "--algo", algo
    result = run_main(*flags[0], *flags[1:], *["--head"] * head, "--out", tmp_path / "run")
    assert result["best_epoch"] == chosen
    best = train.read(tmp_path / "run" / "checkpoint.pt")["best"]
    assert (best["layers.0.0.weight"] == chosen).all()


def test_every_setting_reaches_what_it_names():
    def run_with(*flags):
        return make_run("--limit", 180, "--device", "cpu", "--model", "vit-16-2-3", *flags)
    run = run_with("--m0", 0.9, "--mL", 0.3, "--decay", "parabolic", "--position-std", 0.5,
                   "--padding", 2, "--weight-decay", 0.3, "--pool", "token")
    assert run.margins == losses.margins(0.9, 0.3, 3, "parabolic") != losses.margins(0.9, 0.3, 3)
    assert run.model.layers[0][0].position.std().item() == pytest.approx(0.5, rel=0.2)
    assert run.model.pooling == "token" and run.optimizers[2].defaults["weight_decay"] == 0.3
    white = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    black = run.normalise(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    rows = (run.augment(white) == black)[:, 0, :, 16].sum(dim=1)
    assert rows.max() == 2, "up to 2 black rows"
    assert torch.equal(run_with("--fill", "edge").augment(white), run.normalise(white))
    g_pos, g_neg = torch.tensor([5.0, 1.0]), torch.tensor([2.0, 3.0])
    for algo, flag, loss in (("ff", "--threshold", losses.ff_loss(g_pos, g_neg, 3.0)),
                             ("symba", "--alpha", losses.symba_loss(g_pos, g_neg, 3.0))):
        assert run_with("--algo", algo, flag, 3).goodness_loss(g_pos, g_neg) == loss


def test_every_epoch_has_all_images_in_a_new_order():
    run = make_run(*SMALL)
    first, second = (torch.cat(train.shuffled_batches(run)) for _ in range(2))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(450))
    assert not torch.equal(first, second)


def test_every_update_has_the_learning_rate_of_its_schedule(tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    run_main(*SMALL, "--warmup", 4, "--schedule", "cosine", "--lr", 1e-3, "--head-lr", 1e-2,
             "--out", tmp_path / "run")                 # 5 batches; 3 epochs of 2 layers, 2 epochs

    def rate(base, warmup, t, steps):
        return base * min(1, (t + 1) / (warmup + 1)) * (1 + math.cos(math.pi * t / steps)) / 2
    expected = [rate(1e-3, 4, t, 15) for t in range(15) for _ in range(2)]
    assert rates == pytest.approx(expected + [rate(1e-2, 0, t, 10) for t in range(10)])


def test_the_probe_is_least_squares_on_images_without_augmentation():
    f, labels = torch.randn(60, 4), torch.arange(60) % 3
    f += one_hot(labels, 4)
    X = torch.cat([f, torch.ones(60, 1)], dim=1)
    guess = (X @ torch.linalg.lstsq(X, one_hot(labels).float()).solution).argmax(dim=1)
    expected = 100 * (guess == labels).double().mean().item()
    assert train.probe(f, labels, f, labels, 3) == pytest.approx(expected)
    run = make_run(*TINY, "--algo", "ff")
    fit, val = (normalize(cff.encode(run.model, run.normalise(part[0]))[-1])    # neutral labels
                for part in (run.train, run.val))
    value = train.probe(fit, run.train[1], val, run.val[1], 10)
    assert train.measure(run)["probe"] == pytest.approx(value, abs=0.01)


@pytest.mark.parametrize("flags", [["--algo", "cffm"], ["--algo", "ff", "--model", "mlp-16-2"],
                                   ["--algo", "bp"]], ids=" ".join)
def test_bf16_is_for_the_products_of_a_layer_alone(tmp_path, flags):
    seen = []
    for precision in ("fp32", "bf16"):
        run = make_run(*TINY, *flags, "--precision", precision, out=tmp_path / precision)
        y = torch.zeros(2, dtype=torch.long) if "ff" in flags else None
        h = run.model.layers[0](run.model.patches(run.normalise(run.val[0][:2]), y))
        assert h.dtype == torch.float32 and (h == h.bfloat16()).all() == (
            precision == "bf16" and "mlp-16-2" in flags)            # a ViT adds float32
        seen.append(train.train_on(run, *run.train)[..., -1].item() if run.settings.algo != "bp"
                    else train.train_on(run, *run.train).item())
    assert all(weight.dtype == torch.float32 for weight in run.model.state_dict().values())
    assert seen[0] != seen[1] and seen[1] == pytest.approx(seen[0], rel=0.02)


@pytest.mark.parametrize("cores, typed, saved, slowdown, expected", [
    (8, False, None, 1.1, 4), (8, False, None, 1.3, 1),     # a new run; beside other work
    (8, False, 7, 1.3, 7), (4, False, 7, 1, 4),             # a resumed one, with as many as it had
    (8, True, 7, 1, 4),                                     # OMP_NUM_THREADS
])
def test_threads(monkeypatch, cores, typed, saved, slowdown, expected):
    asked, seconds = [4], {1: 1.0, 4: slowdown}
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1])
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(train, "timeit", lambda work, number: seconds[asked[-1]])
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if typed:
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    train.set_threads(torch.device("cpu"), saved and {"threads": saved})
    assert asked[-1] == expected


# ---------------------------------------------------------------------------- stop and resume

@pytest.mark.parametrize("where, stage, epoch, flags", [
    ("train_on", 1, 0, []), ("train_on", 1, 1, ["--algo", "ff"]), ("validate", 1, 2, []),
    ("train_on", 2, 0, []), ("validate", 2, 1, ["--algo", "symba", "--head"]),
    ("validate", 1, 1, ["--algo", "collab", "--model", "mlp-16-2"]),
    ("train_on", 1, 2, ["--algo", "scl"]), ("train_on", 1, 2, ["--algo", "bp"]),
], ids=str)
def test_ctrl_c_is_one_line_and_resume_is_bit_for_bit(tmp_path, monkeypatch, where, stage, epoch,
                                                       flags):
    run_main(*SMALL, *flags, "--out", tmp_path / "whole")
    out, real = tmp_path / "a b", getattr(train, where)

    def stop(run, *batch):
        if (run.stage, run.epoch) == (stage, epoch):
            raise KeyboardInterrupt
        return real(run, *batch)
    with monkeypatch.context() as patch:
        patch.setattr(train, where, stop)
        again = f"^stopped; continue with: python train.py --resume --out '{out}'$"
        with pytest.raises(SystemExit, match=again):
            run_main(*SMALL, *flags, "--out", out)
    run_main("--resume", "--out", out)
    assert_same_runs(tmp_path / "whole", out)


def train_on_noise(*flags):
    """train.py with random images, which need no time to be drawn."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (500, 3, 32, 32), dtype=torch.uint8, generator=g)
    train.load_data = lambda *where: (x, torch.arange(500) % 10, x[:100], torch.arange(100) % 10)
    run_main(*flags)


def test_a_run_killed_at_random_moments_continues_bit_for_bit(tmp_path):
    whole, killed, kills = tmp_path / "whole", tmp_path / "killed", 0
    flags = [*SMALL, "--epochs", 12, "--head-epochs", 6]

    def process(*flags, seconds):
        child = PROCESSES.Process(target=train_on_noise, args=flags)
        child.start()
        child.join(seconds)
        child.kill()                                                # kill -9
        child.join()
        return child.exitcode
    assert process(*flags, "--out", whole, seconds=100) == 0
    while not (killed / "result.json").exists():
        begun = ["--resume"] if (killed / "checkpoint.pt").exists() else flags
        seconds = random.uniform(0.5, 2) + 0.1 * kills
        kills += process(*begun, "--out", killed, seconds=seconds) != 0
    assert kills >= 2
    assert_same_runs(whole, killed)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    written = []

    def full(path, content, write=Path.write_bytes):
        written.append(path.name)
        write(path, content if len(written) < 6 else content[:100])
        if len(written) == 6:                           # the second epoch's checkpoint.pt.tmp
            raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(SystemExit, match="No space left on device; continue with: python tr"):
            run_main(*SMALL, "--out", tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.tmp")) and len(read_log(tmp_path / "run")) == 1
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
    assert [row["stage"] for row in read_log(tmp_path)] == ["1", "2"]


def test_a_mistake_in_the_code_shows_where_it_is(tmp_path, monkeypatch):
    for kind in (AttributeError, ValueError):
        def mistake(*arguments):
            raise kind("a mistake")
        monkeypatch.setattr(train, "cff_step", mistake)
        with pytest.raises(kind) as error:
            run_main(*TINY, "--out", tmp_path / kind.__name__)
        assert error.traceback[-1].name == "mistake", "not hidden behind one line"


def test_one_folder_is_one_runs(tmp_path, capsys):
    first, second = (make_run(*TINY, out=tmp_path) for _ in range(2))       # started together
    train.start(first)
    with pytest.raises(FileExistsError):
        train.start(second)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as ended:
        run_main(*TINY, "--seed", 1, "--out", tmp_path)
    assert ended.value.code == 2 and "holds a run: continue it" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_other_settings_other_data_and_no_run(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    run_main(*TINY, "--out", out)
    resume = ["--resume", "--out", str(out)]
    assert train.parse([*resume, "--device", "auto", "--data-dir", "x"])[0].data_dir == "x"
    for flags, words in (([*resume, "--lr", "0.1"], "lr cannot change"),
                         (["--resume", "--out", str(tmp_path)], "no run to resume")):
        with pytest.raises(SystemExit):
            train.parse(flags)
        assert words in capsys.readouterr().err
    fewer = [part[:-10] for part in train.load_data("shapes", "")]
    monkeypatch.setattr(train, "load_data", lambda *where: fewer)
    with pytest.raises(SystemExit, match="the run began with"):
        run_main(*resume)


# ------------------------------------------------------------------------- what a user may type

@pytest.mark.parametrize("flags, words", [
    (["--model", "vit-16-3-2"], "heads do not divide"), (["--patch-size", "5"], "do not divide"),
    (["--model", "resnet"], "a model is named"), (["--limit", "100000"], "there are 9000 training"),
    (["--dataset", "cifar11"], "invalid choice"), (["--m0", "3"], "m0 must lie in 0..2"),
    (["--epochs", "0"], "epochs"), (["--temperature", "0"], "temperature"), (["--lr", "nan"], "lr"),
    (["--resume"], "no run to resume"), (["--batch", "64"], "unrecognized"),
    (["--limit", "8"], "are left"), (["--algo", "bp", "--head"], "--head is for ff"),
    (["--decay", "exponential", "--m0", "0"], "needs m0 > 0"),
    (["--recipe", "mlp"], "not for vit-64-4-3"),
])
def test_bad_input_ends_with_one_line(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        run_main(*flags, "--out", tmp_path / "run")
    printed = capsys.readouterr().err.strip().splitlines()
    line = printed[-1] if ended.value.code == 2 else ended.value.code
    assert "error:" in line and words in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_a_batch_needs_two_images_of_a_class():
    run = make_run("--model", "mlp-8-1", "--views", 1, "--limit", 40, "--batch-size", 4)
    y = torch.tensor([0, 0, 1, 1, 2, 3])
    batches = torch.arange(6).split(4)
    assert [rows.tolist() for rows in train.usable(batches, y, run)] == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="two images of a class"):
        train.usable(batches[1:], y, run)
    run.settings.views = 2
    assert len(train.usable(batches, y, run)) == 2


def test_flags_win_then_the_data_set_then_the_recipe():
    s = settings_of("--dataset", "tinyimagenet", "--recipe", "short", "--epochs", 7)
    assert (s.epochs, s.padding, s.batch_size) == (7, 6, 128)
    shapes, plain, mnist = settings_of(), settings_of("--recipe", "none"), settings_of(
        "--dataset", "mnist")
    assert (shapes.recipe, shapes.head_epochs, plain.epochs) == ("short", 4, 600)
    assert (mnist.recipe, mnist.model, mnist.views, mnist.epochs) == ("mlp", "mlp-500-3", 1, 30)
    bp = ["--dataset", "cifar10", "--algo", "bp", "--recipe", "short"]
    assert settings_of(*bp).lr == 0.002 and settings_of(*bp, "--lr", 1).lr == 1


def test_a_run_is_named_by_its_flags(monkeypatch, tmp_path):
    def name(*flags):
        return Path(train.parse(list(flags))[0].out).as_posix()
    flags = ["--dataset", "cifar10", "--model", "ViT[64 4 4]", "--recipe", "short", "--limit", "9"]
    assert name("--dataset", "cifar10") == "runs/cifar10-cffm-vit-128-4-5-s0"
    assert name(*flags, "--seed", "2") == "runs/cifar10-cffm-vit-64-4-4-recipeshort-limit9-s2"
    for variable in ("HOME", "USERPROFILE"):                        # Windows has the second
        monkeypatch.setenv(variable, str(tmp_path))
    assert name("--out=~/a b") == (tmp_path / "a b").as_posix(), "which no shell expands"


# ------------------------------------------------------------------------------------- the data

def test_mnist_is_not_flipped_and_fewer_than_ten_classes_are_enough(tmp_path, monkeypatch):
    images = torch.arange(256).repeat(300).to(torch.uint8).view(300, 1, 16, 16)
    data = images, torch.arange(300) % 4
    monkeypatch.setattr(train, "load_data", lambda *arguments: (*data, *data))
    for dataset, share in (("mnist", 0), ("cifar10", pytest.approx(0.5, abs=0.1))):
        flags = "--dataset", dataset, "--model", "mlp-4-1", "--augment", "flip", "--device", "cpu"
        run = make_run(*flags)
        x = run.train[0]
        flipped = (run.augment(x) == run.normalise(x.flip(3))).flatten(1).all(dim=1)
        assert flipped.float().mean() == share
    result = run_main(*flags, "--epochs", 1, "--head-epochs", 1, "--out", tmp_path / "run")
    assert "test_top1" in result and "test_top5" not in result


def test_shapes_need_more_than_pixels():
    (fit, fit_y), (test, test_y) = (train.draw_shapes(n, seed) for n, seed in ((6000, 1), (1000, 2)))
    assert torch.equal(test, train.draw_shapes.__wrapped__(1000, 2)[0])     # drawn anew
    assert torch.bincount(test_y).tolist() == [100] * 10
    fit, test = (images.flatten(1).float() / 255 for images in (fit, test))
    nearest = fit_y[torch.cdist(test, fit).argmin(dim=1)]
    assert 0.3 < (nearest == test_y).float().mean() < 0.7


def test_tiny_imagenets_layout(tmp_path):
    """A made-up folder: two images per class and part, one of them grey; n01 is the bright one."""
    root, lines = tmp_path / "tiny-imagenet-200", []
    for value, name in enumerate(("n02", "n01")):
        val = [f"val_{value}.JPEG", f"val_{value + 2}.JPEG"]
        for part, files in [(root / "train" / name / "images", ["0.JPEG", "1.JPEG"]),
                            (root / "val" / "images", val)]:
            part.mkdir(parents=True, exist_ok=True)
            for channels, file in zip((3, 1), files):
                image = torch.full((channels, 64, 64), 200 * value, dtype=torch.uint8)
                to_pil_image(image).save(part / file)
        lines += [f"{file}\t{name}\t0\t0\t62\t62" for file in val]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    images, y, test_images, test_y = train.load_data("tinyimagenet", tmp_path)
    assert images.shape == test_images.shape == (4, 3, 64, 64) and images.dtype == torch.uint8
    assert y.tolist() == [0, 0, 1, 1] and test_y.tolist() == [1, 1, 0, 0]
    for part, labels in ((images, y), (test_images, test_y)):
        assert [image.float().mean() > 100 for image in part] == [label == 0 for label in labels]
    os.truncate(root / "train" / "n02" / "images" / "1.JPEG", 200)
    with pytest.raises(OSError, match="tinyimagenet could not be loaded .*truncated"):
        train.load_data("tinyimagenet", tmp_path)


@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "cifar100", "tinyimagenet"])
def test_missing_data_give_one_line(tmp_path, monkeypatch, dataset):
    def no_network(*arguments, **options):
        raise OSError("no network")
    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar,
                   torchvision.datasets.utils):
        monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    words = f"{dataset} could not be loaded from --data-dir {re.escape(str(tmp_path))} .no network"
    with pytest.raises(SystemExit, match=words):
        run_main("--dataset", dataset, "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ reading runs

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of three tiny runs, of one that was not finished, and an empty folder."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"cff-s0": ["--algo", "cff"], "cff-s1": ["--algo", "cff", "--seed", 1],
                        "ff": ["--algo", "ff"]}.items():
        run_main(*TINY, "--epochs", 2, *flags, "--out", folder / name)
    train.start(make_run(*TINY, out=folder / "unfinished"))
    (folder / "empty").mkdir()
    return folder


def show(capsys, *arguments):
    """What eval.py prints: (output, errors, exit status)."""
    status = 0
    try:
        evaluation.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    return *capsys.readouterr(), status


def test_a_table_of_runs_row_by_hand(finished, capsys):
    folders = [finished / name for name in ("cff-s0", "empty", "cff-s1", "unfinished", "ff")]
    out, errors, status = show(capsys, *folders, "--markdown")
    lines = [re.split(r" +\| ", line.strip("| ")) for line in out.splitlines()]
    cff_row, ff_row = (dict(zip(lines[2], row)) for row in lines[4:6])
    a, b = (read_json(finished / f"cff-s{seed}" / "result.json")["test_top1"] for seed in (0, 1))
    assert (cff_row["Run"], cff_row["Epochs"], cff_row["Seeds"]) == ("cff", "2 + 1", "0, 1")
    assert cff_row["Test %"] == f"{(a + b) / 2:.1f} ± {abs(a - b) / 2 ** 0.5:.1f}"
    assert (ff_row["Method"], ff_row["Views"], ff_row["Epochs"]) == ("FF", "1", "2")
    assert "empty: no run" in errors and "unfinished: not finished" in errors and not status
    assert show(capsys, finished / "empty")[2] not in (0, None), "nothing is left"


def test_accuracy_by_class_and_by_layer(finished, capsys):
    saved = train.read(finished / "cff-s0" / "checkpoint.pt")
    run = train.make_run(settings_of(*TINY, "--epochs", 2, "--algo", "cff"), saved)
    out, _, _ = show(capsys, finished / "cff-s0")
    images, y = run.test
    right = cff.predict(run.model, run.normalise(images[y == 3]), "cff").argmax(dim=1) == 3
    assert re.search(rf" triangle {100 * right.double().mean():.1f}\b", out)
    fit, test = (normalize(train.layer_features(run, part[0])[1]) for part in (run.train, run.test))
    probe = train.probe(fit, run.train[1], test, run.test[1], 10)
    assert f"{probe:.1f} %" in out.splitlines()[-1]
