"""The real scripts, small: training, stopping, resuming, reading runs; data, refusals, pictures.

    python -m pytest -q experiments/test_runs.py
"""
import csv
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch.nn.functional import normalize, one_hot
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cff
import eval as evaluation
import losses
import train
import vit
from test_cff import close, goodness_pair, records, same, settings_of, weights

SMALL = ["--device", "cpu", "--model", "vit-16-2-2", "--limit", "450", "--epochs", "3",
         "--head-epochs", "2", "--batch-size", "90"]
TINY = ["--device", "cpu", "--model", "vit-16-2-2", "--limit", "225", "--epochs", "1",
        "--head-epochs", "1", "--batch-size", "90", "--patch-size", "16"]
train.draw_shapes = functools.cache(train.draw_shapes)      # a second saved in each run


def run_main(*flags):
    train.main([str(flag) for flag in flags])


def read_log(folder):
    """log.csv without the seconds: a list of {column: text}."""
    with open(folder / "log.csv", newline="") as file:
        return [{column: value for column, value in row.items() if column != "seconds"}
                for row in csv.DictReader(file)]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


# ------------------------------------------------------------------------- training and testing

def test_train_and_eval_from_the_command_line(tmp_path):
    """The commands of the README, small: shapes are learned, eval.py finds the same accuracy; in a
    terminal that has no ü."""
    def script(name, *flags):
        return subprocess.run([sys.executable, ROOT / name, *flags], capture_output=True, text=True,
                              cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1",
                                                 "PYTHONIOENCODING": "ascii"})
    out = tmp_path / "rün"
    flags = ["--model", "vit-32-4-2", "--limit", "4500", "--epochs", "12", "--head-epochs", "2",
             "--out", str(out)]
    done = script("train.py", *flags)
    assert done.returncode == 0, done.stderr
    result, config = result_of(out), json.loads((out / "config.json").read_text())
    assert result["test_top1"] > 40 and result["test_top10"] == 100 and result["metric"] == "top1"
    assert config["settings"]["epochs"] == 12 and config["data"]["images"] == [4500, 500, 2000]
    assert config["threads"] >= 1 and config["command"].endswith(f"--out '{out}'")
    rows = read_log(out)
    stages = [(row["stage"], row["epoch"]) for row in rows]
    assert stages == [("1", str(epoch)) for epoch in range(1, 13)] + [("2", "1"), ("2", "2")]
    assert float(rows[11]["train_loss_2"]) < float(rows[0]["train_loss_2"]) < math.log(255)
    assert float(rows[11]["probe"]) > 40 and 0 < float(rows[11]["val_saturated_1"]) < 1
    shown = script("eval.py", out)
    assert f"top-1 {result['test_top1']:.2f} %" in shown.stdout, shown.stderr


@pytest.mark.parametrize("flags", [
    ["--algo", "cff"], ["--views", "1"], ["--pool", "token"], ["--augment", "crop+randaug"],
    ["--model", "MLP[16 2]"], ["--missing", "0.5", "--label-noise", "0.2"],
    ["--recipe", "short", "--epochs", "1", "--head-epochs", "1"], ["--algo", "scl"],
    ["--algo", "ff", "--head"], ["--algo", "symba", "--head", "--model", "mlp-16-2"],
    *([*("--algo", algo), *("--model", model)] for algo in ("ff", "symba", "collab", "bp")
      for model in ("vit-16-2-2", "mlp-16-2")),
], ids=" ".join)
def test_settings_of_the_tables_train_and_test(tmp_path, flags):
    out = tmp_path / "run"
    run_main(*TINY, *flags, "--out", out)
    s = json.loads((out / "config.json").read_text())["settings"]
    rows, last_alone = read_log(out), s["algo"] in ("scl", "bp")
    assert [row["stage"] for row in rows] == ["1", "2"][:train.stages(s)]
    assert [f"val_loss_{l}" in rows[0] for l in (1, 2)] == [not last_alone, True]
    assert ("val_saturated_1" in rows[0]) == (s["algo"] == "cffm")
    assert evaluation.evaluate(out) == {k: result_of(out)[f"test_top{k}"] for k in (1, 5, 10)}


@pytest.mark.parametrize("algo", ["cff", "cffm", "ff", "symba", "collab", "scl", "bp"])
def test_validation_is_a_training_step_that_moves_nothing(algo):
    run = train.Run(settings_of("--model", "mlp-16-3", "--limit", 180, "--algo", algo, "--augment",
                                "none", "--views", 1, "--batch-size", 512, "--device", "cpu"))
    before, run.val = weights(run.model), run.train
    measured = train.validate(run)
    assert same(before, weights(run.model))
    assert torch.equal(measured, train.validate(run)), "the same draws every epoch"
    run.generator.manual_seed(run.settings["seed"])                 # the same wrong labels
    step = train.make_step(run.settings, run.model, run.optimizers, run.augment, run.generator)
    close(measured, step(*run.train), f"the losses of {algo}", 1e-6)
    assert not same(before, weights(run.model))


def test_validation_is_a_mean_over_images_not_over_batches(monkeypatch):
    monkeypatch.setattr(train, "make_step", lambda *arguments: lambda x, y: y.double().mean())
    run = train.Run(settings_of("--model", "mlp-16-3", "--limit", 180, "--batch-size", 100))
    run.val = run.train
    assert train.validate(run).item() == pytest.approx(run.train[1].double().mean().item())


@pytest.mark.parametrize("algo, losses_of_layers, chosen", [
    ("cff", [[1.0, 3.0], [2.0, 1.0], [0.0, 2.0]], 2), ("bp", [[3.0], [1.0], [2.0]], 2),
    ("ff", [[0.0, 3.0, 1.0], [9.0, 1.0, 2.0], [1.0, 2.0, 2.0]], 2)])
def test_the_epoch_is_chosen_by_the_last_layer_and_ffs_by_all_but_the_first(
        monkeypatch, algo, losses_of_layers, chosen):
    run = train.Run(settings_of("--model", "mlp-16-3", "--limit", 180, "--algo", algo))
    monkeypatch.setattr(run, "save", lambda best: None)
    for losses_of in losses_of_layers:
        loss = torch.tensor(losses_of)
        train.end_epoch(run, loss, loss, 0.0)
    assert run.state["best_epoch"] == chosen


def test_best_weights_are_those_of_the_lowest_validation_loss(tmp_path, monkeypatch):
    """Weights are replaced by the epoch's number; validation losses are 3, 1, 2, then 2, 1."""
    values, seen = iter([3.0, 1.0, 2.0, 2.0, 1.0]), []

    def make_step(s, model, optimizers, augment, generator, stage=1):
        def step(x, y):
            for p in (model.layers if stage == 1 else model.head).parameters():
                p.data.fill_(run.state["epoch"] + 1)
            seen.append([model.layers[1][0].weight[0, 0].item(), stage])
            return torch.tensor(1.0)
        return step
    monkeypatch.setattr(train, "make_step", make_step)
    monkeypatch.setattr(train, "validate", lambda run: torch.tensor(next(values)))
    run = train.Run(settings_of(*SMALL, "--model", "mlp-8-2", out=str(tmp_path / "run")))
    with run.held():
        run.start()
        assert train.train(run)["best_epoch"] == 2
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    assert (best["layers.1.0.weight"] == 2).all() and (best["head.1.weight"] == 2).all()
    assert {weight for weight, stage in seen if stage == 2} == {2.0}, "from the encoder's best"


def test_every_setting_reaches_what_it_names():
    def run_with(*flags):
        flags = "--limit", 180, "--device", "cpu", "--model", "vit-16-2-3", *flags
        return train.Run(settings_of(*flags))
    run = run_with("--m0", 0.9, "--mL", 0.3, "--decay", "parabolic", "--position-std", 0.5,
                   "--padding", 2)
    m = train.layer_margins(run.settings, run.model)
    assert m == losses.margins(0.9, 0.3, 3, "parabolic") != losses.margins(0.9, 0.3, 3)
    assert run.model.layers[0][0].position.std().item() == pytest.approx(0.5, rel=0.2)
    white = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    black = run.normalise(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    rows = (run.augment(white) == black)[:, 0, :, 16].sum(dim=1)
    assert rows.max() == 2, "up to 2 black rows"
    assert torch.equal(run_with("--fill", "edge").augment(white), run.normalise(white))
    g_pos, g_neg = goodness_pair()
    for algo, flag, loss in (("ff", "--threshold", losses.ff_loss(g_pos, g_neg, 3.0)),
                             ("symba", "--alpha", losses.symba_loss(g_pos, g_neg, 3.0))):
        run = run_with("--algo", algo, flag, 3)
        step = train.make_step(run.settings, run.model, run.optimizers, run.augment, run.generator)
        assert step.keywords["loss"](g_pos, g_neg) == loss
    for algo in ("cffm", "scl"):
        run = run_with("--algo", algo, "--temperature", 3, "--views", 1, "--pool", "token")
        step = train.make_step(run.settings, run.model, run.optimizers, run.augment, run.generator)
        assert (step.keywords["temperature"], step.keywords["views"]) == (3, 1)
        assert run.model.pooling == "token"


@pytest.mark.parametrize("algo", train.SETTINGS["algo"][1])
def test_each_layer_has_an_optimizer_of_its_own_scl_and_bp_have_one_for_all(algo):
    s = settings_of("--model", "mlp-8-3", "--algo", algo, "--weight-decay", 0.3)
    model = train.make_model(s, {"image_shape": (1, 4, 4), "num_classes": 10})
    trained = {"scl": [model.layers], "bp": [model]}.get(algo, model.layers)
    for stage, modules in ((1, trained), (2, [model.head])):
        optimizers = train.make_optimizers(model, s, stage)
        held = [[id(p) for group in optimizer.param_groups for p in group["params"]]
                for optimizer in optimizers]
        assert held == [[id(p) for p in module.parameters()] for module in modules]
        assert all(optimizer.defaults["weight_decay"] == 0.3 for optimizer in optimizers)


def test_every_epoch_has_all_images_in_a_new_order():
    run, seen = train.Run(settings_of(*SMALL)), []
    x, y = run.train
    for _ in range(2):
        seen.append(torch.cat([x.flatten(1).sum(dim=1) + 10 ** 6 * y
                               for x, y in train.batches(run)]))
    stored = x.flatten(1).sum(dim=1) + 10 ** 6 * y      # an image and its label as one number
    for order in (*seen, stored):
        assert torch.equal(order.sort().values, stored.sort().values)
    assert not torch.equal(*seen) and not torch.equal(seen[0], stored)


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


def test_one_view_leaves_out_batches_without_a_pair():
    s, y = {"batch_size": 4, "views": 1, "algo": "cffm"}, torch.tensor([0, 0, 1, 1, 2, 3])
    assert [part.tolist() for part in train.cut(torch.arange(6), y, s)] == [[0, 1, 2, 3]]
    for other in (dict(views=2), dict(algo="ff"), dict(algo="bp")):
        assert len(train.cut(torch.arange(6), y, s | other)) == 2
    run = train.Run(settings_of("--model", "vit-16-2-1", "--views", 1, "--limit", 40, "--seed", 6,
                                "--batch-size", 2, "--patch-size", 16, "--device", "cpu"))
    assert all(train.plan(run) for _ in range(60)), "an order without any pair is drawn anew"


def test_the_probe_is_least_squares_on_images_without_augmentation():
    f, labels = torch.randn(60, 4), torch.arange(60) % 3
    f += one_hot(labels, 4)
    X = torch.cat([f, torch.ones(60, 1)], dim=1)
    guess = (X @ torch.linalg.lstsq(X, one_hot(labels).float()).solution).argmax(dim=1)
    expected = 100 * (guess == labels).double().mean().item()
    assert train.probe(f, labels, f, labels, 3) == pytest.approx(expected)
    run = train.Run(settings_of(*TINY, "--algo", "ff"))
    parts = [train.layer_features(run, part[0])[-1] for part in (run.train, run.val)]
    expected = cff.encode(run.model, run.normalise(run.val[0]))[-1]     # the neutral label
    assert torch.allclose(parts[1], expected, atol=1e-6)
    value = train.probe(normalize(parts[0]), run.train[1], normalize(parts[1]), run.val[1], 10)
    assert train.measure(run)["probe"] == pytest.approx(value, abs=0.01)


# ------------------------------------------------------------------------- the machine

@pytest.mark.parametrize("flags", [["--algo", "cffm"], ["--algo", "ff", "--model", "mlp-16-2"],
                                   ["--algo", "bp"]], ids=" ".join)
def test_bf16_is_for_the_products_of_a_layer_alone(tmp_path, flags):
    losses = []
    for precision in ("fp32", "bf16"):
        run_main(*TINY, *flags, "--precision", precision, "--out", tmp_path / precision)
        losses.append(float(read_log(tmp_path / precision)[0]["train_loss_2"]))
        run = train.Run(settings_of(*TINY, *flags, "--precision", precision))
        y = torch.zeros(2, dtype=torch.long) if "ff" in flags else None
        h = run.model.layers[0](run.model.patches(run.normalise(run.val[0][:2]), y))
        assert h.dtype == torch.float32 and (h == h.bfloat16()).all() == (
            precision == "bf16" and "mlp-16-2" in flags)            # a ViT's has float32 added
    weights_of = torch.load(tmp_path / "bf16" / "best.pt", weights_only=True)["model"].values()
    assert all(weight.dtype == torch.float32 for weight in weights_of)
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("all_threads, said", [(1.1, False), (1.3, True)])
def test_beside_other_work_a_run_says_what_to_type(monkeypatch, capsys, all_threads, said):
    seconds, asked = {1: 1.0, 2: all_threads}, [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1])
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(train, "timeit", lambda work, number: seconds[asked[-1]])
    run = train.Run(settings_of(*TINY, out="a b"))
    train.warn_if_crowded(run)
    line = "OMP_NUM_THREADS=1 python train.py --resume --out 'a b'\n"
    assert capsys.readouterr().out.endswith(line) == said and asked[-1] == 2


def test_the_line_of_a_heads_epoch_says_so(tmp_path, capsys):
    run_main(*TINY, "--out", tmp_path)
    encoder, head, _ = capsys.readouterr().out.splitlines()[-3:]
    assert encoder.startswith("   1 ") and head.startswith("head   1 ")


def test_resume_takes_as_many_threads_unless_others_are_asked_for(tmp_path, monkeypatch):
    run_main(*TINY, "--out", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["threads"] == torch.get_num_threads()
    (tmp_path / "config.json").write_text(json.dumps(config | {"threads": 7}))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for typed, cores, expected in ((False, 8, 7), (False, 4, 4), (True, 8, 1)):     # not above 4
        asked = [1]
        monkeypatch.setattr(torch, "set_num_threads", asked.append)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        if typed:
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
        run_main("--resume", "--out", tmp_path)
        assert max(asked) == expected


# ---------------------------------------------------------------------------- stop and resume

def assert_same_runs(one, other):
    """Two runs' weights, optimizers, random states and logs are the same, bit for bit."""
    for file in ("best.pt", "last.pt"):
        a, b = (torch.load(run / file, weights_only=True) for run in (one, other))
        for part in (a, b):
            part.pop("settings", None)                  # where they are written
            for row in part.get("log", []):
                row.pop("seconds")
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert read_log(one) == read_log(other)


def stop_and_resume(tmp_path, monkeypatch, flags, name, stop):
    """Two runs with the same flags, one stopped where `stop`, for train.NAME, says, and resumed."""
    run_main(*flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, name, stop)
        with pytest.raises(SystemExit, match="go on with: python train.py --resume --out"):
            run_main(*flags, "--out", tmp_path / "parts")
    run_main("--resume", "--out", tmp_path / "parts")
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("stage, epoch, flags", [
    (1, 1, []), (1, 2, []), (2, 1, []), (2, 2, []), (1, 2, ["--algo", "ff"]),
    (2, 1, ["--algo", "symba", "--head"]), (1, 2, ["--algo", "collab", "--model", "mlp-16-2"]),
    (1, 2, ["--algo", "scl"]), (1, 3, ["--algo", "bp"]),
], ids=str)
def test_resume_is_bit_for_bit(tmp_path, monkeypatch, stage, epoch, flags):
    end_epoch = train.end_epoch

    def stop(run, *arguments):                          # Ctrl-C before this epoch is written down
        if (run.state["stage"], run.state["epoch"] + 1) == (stage, epoch):
            raise KeyboardInterrupt
        end_epoch(run, *arguments)

    stop_and_resume(tmp_path, monkeypatch, [*SMALL, *flags], "end_epoch", stop)


@pytest.mark.parametrize("stop_at", range(9))
def test_a_crash_between_two_files_loses_nothing(tmp_path, monkeypatch, stop_at):
    """Stop at each of the files that one epoch of stage 1 and one of stage 2 write."""
    write, written = train.write, []

    def write_and_stop(path, content):
        if len(written) == stop_at + 1:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    stop_and_resume(tmp_path, monkeypatch, TINY, "write", write_and_stop)


def test_resume_refuses_another_setting_and_a_run_without_its_state(tmp_path, capsys):
    out = tmp_path / "run"
    run_main(*TINY, "--out", out)

    def parse(*flags):
        return train.parse(["--resume", "--out", str(out), *flags])[0]
    with pytest.raises(SystemExit):
        parse("--lr", "0.1")
    assert "lr cannot change" in capsys.readouterr().err
    assert parse("--device", "auto", "--data-dir", "x")["data_dir"] == "x", "another machine"
    assert parse(*TINY, "--device", "auto")["limit"] == 225, "the run's own flags again"
    assert train.parse(["--resume", "--out", f"{out}/./"])[0]["out"] == str(out)
    (tmp_path / "ff").mkdir()
    ff = json.dumps({"settings": settings_of("--algo", "ff", "--head")})
    (tmp_path / "ff" / "config.json").write_text(ff)
    assert train.parse(["--resume", "--out", str(tmp_path / "ff"), "--head"])[0]["algo"] == "ff"
    for text in ("", "[1]", "{}"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "config.json").write_text(text)
        with pytest.raises(SystemExit):
            train.parse(["--resume", "--out", str(tmp_path / "other")])
        assert "config.json is not there, or not a run's" in capsys.readouterr().err
    before = (out / "log.csv").read_text()
    (out / "last.pt").unlink()                          # as in experiments/records
    with pytest.raises(SystemExit) as ended:
        run_main("--resume", "--out", out)
    assert ended.value.code == 2 and "last.pt cannot be read" in capsys.readouterr().err
    assert (out / "log.csv").read_text() == before


def test_a_fault_while_a_run_is_running_is_one_line_and_nothing_is_lost(tmp_path, monkeypatch):
    """A full disk, SIGTERM as a queue sends it: what, in which folder, how to go on."""
    out, save = tmp_path / "a b", torch.save

    def full(content, path):
        save(content, path)
        if path.name == "last.pt.tmp" and content["epoch"] == 2:
            raise OSError("No space left on device")

    def stop(run, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
    again = f"; go on with: python train.py --resume --out '{out}'$"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(SystemExit, match="^No space left on device" + again):
            run_main(*SMALL, "--out", out)
    assert not list(out.glob("*.tmp")) and [row["epoch"] for row in read_log(out)] == ["1", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "end_epoch", stop)
        with pytest.raises(SystemExit, match="^stopped" + again):
            run_main("--resume", "--out", out)
    run_main("--resume", "--out", out)
    run_main(*SMALL, "--out", tmp_path / "whole")
    assert_same_runs(tmp_path / "whole", out)


def test_one_folder_is_one_runs(tmp_path, capsys):
    """Whoever comes second is refused; what a killed process held, the system has let go."""
    def refused(words, *flags):
        with pytest.raises(SystemExit) as ended:
            run_main(*flags, "--out", tmp_path)
        assert ended.value.code == 2 and words in capsys.readouterr().err
    first = train.Run(settings_of(*TINY, out=str(tmp_path)))
    with first.held():
        refused("another process is training this run", *TINY)      # started together
        first.start()
        refused("another process is training this run", "--resume")
    refused("holds a run: go on with it (--resume)", *TINY)
    hold = ("import train; run = train.Run(train.parse(['--resume', '--out', '.'])[0]); "
            "held = run.held(); ")
    killed = [sys.executable, "-c", hold + "import os; print(flush=True); os.kill(os.getpid(), 9)"]
    process = subprocess.Popen(killed, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE)
    process.wait()
    assert process.stdout.read() and (tmp_path / ".lock").exists()
    run_main("--resume", "--out", tmp_path)


def test_a_file_that_another_program_reads_is_replaced_when_it_is_free(tmp_path, monkeypatch):
    """Windows raises PermissionError while another process has the file open."""
    waits, replace = [], Path.replace

    def busy(path, target):
        if len(waits) < tries:
            raise PermissionError(f"Access is denied: {target}")
        replace(path, target)
    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(train.time, "sleep", waits.append)
    tries = 1
    train.write(tmp_path / "log.csv", "new")
    assert (tmp_path / "log.csv").read_text() == "new" and waits == [1]
    tries = 9
    with pytest.raises(PermissionError, match="log.csv"):
        train.write(tmp_path / "log.csv", "newer")
    assert os.listdir(tmp_path) == ["log.csv"], "nothing half-written is left"


def test_a_reader_that_goes_away_ends_a_run_with_one_line(tmp_path):
    command = [sys.executable, ROOT / "train.py", *SMALL, "--epochs", "200", "--out", "run"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    run.stdout.readline()                               # as `train.py | head -1`
    run.stdout.close()
    error = run.stderr.read().splitlines()
    assert run.wait() == 1 and len(error) == 1 and error[0].endswith("--resume --out run"), error


# ------------------------------------------------------------------------- what a user may type

@pytest.mark.parametrize("flags, words", [
    (["--model", "vit-16-3-2"], "heads do not divide"), (["--patch-size", "5"], "do not divide"),
    (["--model", "resnet"], "a model is named"), (["--limit", "100000"], "there are 9000 training"),
    (["--dataset", "cifar11"], "invalid choice"), (["--m0", "3"], "m0 must lie in 0..2"),
    (["--epochs", "0"], "epochs"), (["--temperature", "0"], "temperature"), (["--lr", "nan"], "lr"),
    (["--resume"], "no run to resume"), (["--batch", "64"], "unrecognized"),
    (["--views", "1", "--limit", "36", "--batch-size", "2", "--seed", "8"], "two images of a"),
    (["--limit", "10"], "need two classes"), (["--algo", "bp", "--head"], "--head is for ff"),
    (["--decay", "exponential", "--m0", "0"], "needs m0 > 0"),
    (["--recipe", "mlp"], "not for vit-64-4-3"),
])
def test_bad_input_ends_with_one_line_and_status_2(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        run_main(*flags, "--out", tmp_path / "run")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and "error:" in error and words in error
    assert not (tmp_path / "run").exists()


def test_a_setting_comes_from_what_is_typed_then_the_data_set_then_the_recipe():
    s = settings_of("--dataset", "tinyimagenet", "--recipe", "short", "--epochs", 7)
    assert (s["epochs"], s["padding"], s["batch_size"]) == (7, 6, 128)
    shapes, plain = settings_of(), settings_of("--recipe", "none")
    assert (shapes["recipe"], shapes["head_epochs"], plain["epochs"]) == ("short", 4, 600)
    bp = ["--dataset", "cifar10", "--algo", "bp", "--recipe", "short"]
    assert settings_of(*bp)["lr"] == 0.002 and settings_of(*bp, "--lr", 1)["lr"] == 1
    mlp = settings_of("--dataset", "cifar10", "--recipe", "mlp")
    assert mlp["model"] == "mlp-800-4", "not a ViT by an MLP's rates"


def test_a_path_is_what_people_type(monkeypatch, tmp_path, capsys):
    """`--out=~/x` and `--data-dir '~/x'`, which no shell expands, nor PowerShell any."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))                            # Windows
    s, _ = train.parse(["--out=~/a b", "--data-dir=~/data"])
    assert s["out"] == str(tmp_path / "a b") and s["data_dir"] == str(tmp_path / "data")
    run_main(*TINY, "--out=~/a b")
    (tmp_path / "a b" / "result.json").unlink()
    assert run_eval("~/a*") == 0 and run_eval("~/a b", "--markdown") == 2
    assert f"--resume --out '{tmp_path}/a b'" in capsys.readouterr().err


def test_a_run_is_named_by_what_is_typed():
    def name(*flags):
        return Path(train.parse(list(flags))[0]["out"]).as_posix()
    assert name("--dataset", "cifar10") == "runs/cifar10-cffm-vit-128-4-5-s0"
    flags = ["--dataset", "cifar10", "--model", "ViT[64 4 4]", "--recipe", "short", "--limit", "9"]
    assert name(*flags, "--seed", "2") == "runs/cifar10-cffm-vit-64-4-4-recipeshort-limit9-s2"
    assert name("--views", "1", "--data-dir", "x", "--head-lr", "0.1") == \
        "runs/shapes-cffm-vit-64-4-3-views1-headlr0.1-s0"


# ------------------------------------------------------------------------------------- the data

def test_mnist_is_not_flipped_and_other_data_are(monkeypatch):
    images = torch.arange(256).repeat(300).to(torch.uint8).view(300, 1, 16, 16)
    data = images, torch.arange(300) % 10
    monkeypatch.setattr(train, "load_data", lambda *arguments: (*data, *data))
    for dataset, share in (("mnist", 0), ("cifar10", pytest.approx(0.5, abs=0.1))):
        run = train.Run(settings_of("--dataset", dataset, "--model", "mlp-4-1", "--augment", "flip",
                                    "--device", "cpu"))
        x = run.train[0]
        flipped = (run.augment(x) == run.normalise(x.flip(3))).flatten(1).all(dim=1)
        assert flipped.float().mean() == share


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
    ridge = 100 * torch.eye(X.shape[1]).double()
    W = torch.linalg.solve(X.T @ X + ridge, X.T @ one_hot(fit_y).double())
    assert 0.15 < ((T @ W).argmax(dim=1) == test_y).float().mean() < 0.5


def test_tiny_imagenets_layout(tmp_path):
    """A made-up folder: two images a class and part, one of them grey; n01 is the bright one."""
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
    with open(root / "train" / "n02" / "images" / "1.JPEG", "r+b") as file:
        file.truncate(200)
    with pytest.raises(OSError, match=r"tinyimagenet .* \(\S*n02.images.1.JPEG: (?i:.*truncated)"):
        train.load_data("tinyimagenet", tmp_path)


@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "cifar100", "tinyimagenet"])
def test_missing_data_are_said_in_one_line(tmp_path, monkeypatch, dataset):
    def no_network(*arguments, **options):
        raise OSError("no network")
    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar,
                   torchvision.datasets.utils):
        monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    words = f"{dataset} could not be loaded from --data-dir {re.escape(str(tmp_path))} .no network"
    with pytest.raises(OSError, match=words) as error:
        train.load_data(dataset, str(tmp_path))
    assert "\n" not in str(error.value) and "--dataset shapes" in str(error.value)


# ------------------------------------------------------------------------------------ reading runs

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders of five tiny runs, and of each thing that is no finished run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"cff-s0": ["--algo", "cff"], "cff-s1": ["--algo", "cff", "--seed", 1],
                        "m2": ["--m0", 0.2], "m6": ["--m0", 0.6], "ff": ["--algo", "ff"]}.items():
        run_main(*TINY, "--epochs", 2, *flags, "--out", folder / name)
    for name in ("empty", "unfinished", "torn", "other"):
        (folder / name).mkdir()
    for file in ("config.json", "log.csv"):
        for name in ("unfinished", "torn"):
            (folder / name / file).write_text((folder / "ff" / file).read_text())
    (folder / "torn" / "result.json").write_text('{"test_top1": 5')
    (folder / "torn" / "best.pt").write_bytes((folder / "ff" / "best.pt").read_bytes()[:5000])
    (folder / "other" / "best.pt").write_text("some text")
    return folder


def run_eval(*arguments):
    """eval.py's exit status."""
    try:
        evaluation.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def test_what_is_no_finished_run_is_said_in_a_line_and_the_rest_shown(finished, capsys):
    names = ("empty", "cff-s0", "unfinished", "cff-s1", "torn", "nothing")
    assert run_eval(*[finished / name for name in names]) == 0
    out, err = capsys.readouterr()
    assert out.strip().splitlines()[-1].split()[:2] == ["cff", "CFF"] and "0, 1" in out, "one row"
    for words in ("empty: no run", "unfinished: not finished; python train.py --resume",
                  "torn: no run that can be read", "nothing: no run"):
        assert words in err and len(err.splitlines()) == 4
    assert run_eval(finished / "empty", finished / "torn") == 2, "nothing is left"
    for name in ("torn", "other", "empty"):
        assert run_eval(finished / name) == 2 and "cannot be read" in capsys.readouterr().err


def test_accuracy_by_class_and_by_layer(finished, capsys):
    run, _ = evaluation.open_run(finished / "cff-s0"), evaluation.evaluate(finished / "cff-s0")
    out = capsys.readouterr().out.splitlines()
    line = next(line for line in out if line.startswith("top-1 by"))
    images, y = run.test
    right = cff.predict(run.model, run.normalise(images[y == 3]), "cff").argmax(dim=1) == 3
    assert f" triangle {100 * right.double().mean():.1f}," in line and line.count(",") == 9
    fit, test = (train.layer_features(run, part[0])[1] for part in (run.train, run.test))
    probe = train.probe(normalize(fit), run.train[1], normalize(test), run.test[1], 10)
    assert out[-1].startswith("linear probe by layer") and out[-1].endswith(f", {probe:.1f} %")


def test_a_run_that_stopped_before_its_head_is_not_tested(finished, tmp_path, capsys):
    for file in ("config.json", "best.pt", "log.csv"):
        (tmp_path / file).write_bytes((finished / "cff-s0" / file).read_bytes())
    rows = (tmp_path / "log.csv").read_text().splitlines(keepends=True)
    (tmp_path / "log.csv").write_text("".join(row for row in rows if not row.startswith("2,")))
    assert evaluation.evaluate(tmp_path) == {}
    out = capsys.readouterr().out
    assert "not finished" in out and "head is not trained" in out and "linear probe" in out


def test_a_table_of_runs_row_by_hand(finished, capsys):
    groups = evaluation.read_groups(finished / name for name in ("cff-s0", "cff-s1", "ff"))
    evaluation.show_table(groups, markdown=True)
    out = [line.strip("| ") for line in capsys.readouterr().out.splitlines()]
    heading, rows = re.split(r" +\| ", out[2]), [re.split(r" +\| ", row) for row in out[4:6]]
    table = [dict(zip(heading, row)) for row in rows]
    a, b = (result_of(finished / f"cff-s{seed}")["test_top1"] for seed in (0, 1))
    assert out[0] == ("In all rows: model vit-16-2-2, data shapes, images 225, augment crop, pool "
                      "mean, missing 0.0, wrong 0.0, metric top1")
    assert [(row["Run"], row["Method"], row["Views"], row["Epochs"]) for row in table] == \
        [("cff", "CFF", "2", "2 + 1"), ("ff", "FF", "1", "2")]
    assert table[0]["Seeds"] == "0, 1"
    assert table[0]["Test %"] == f"{(a + b) / 2:.1f} ± {abs(a - b) / 2 ** 0.5:.1f}"
    assert table[1]["Validation %"] == f"{result_of(finished / 'ff')['val_top1']:.1f}"


def test_fig5_numbers_stand_without_pictures(finished, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rows, run = evaluation.show_layers(finished / "m2"), evaluation.open_run(finished / "m2")
    assert "pip install matplotlib" in capsys.readouterr().out and len(rows) == 2
    images, y = run.val
    losses_2 = [float(row["val_loss_2"]) for row in read_log(finished / "m2")[:2]]
    first, f = (normalize(f_l) for f_l in evaluation.layer_features(run, images))
    assert rows[1]["Val loss"] == min(losses_2), "of the epoch kept"
    _, positive, negative = evaluation.three_images(first, y)
    assert rows[1]["Cosine to the positive"] == pytest.approx((f[0] @ f[positive]).item(), abs=1e-6)
    assert rows[1]["to the negative"] == pytest.approx((f[0] @ f[negative]).item(), abs=1e-6)
    assert run_eval(finished / "m2", "--layers", "--figure", "a.png") == 2, "it is layers.png"
    assert run_eval("--margins", 0.4, 0.1, 3) == 2
    assert "linear      0.400 0.250 0.100" in capsys.readouterr().out
    run_eval("--margins", 0, 0.1, 3)
    shown = capsys.readouterr().out
    assert "linear      0.000 0.050 0.100" in shown and "exponential" not in shown


def test_pictures_of_layers_runs_margins_and_views(finished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert run_eval(finished / "m2", finished / "ff", "--layers") == 0
    runs = [finished / name for name in ("m2", "m6", "cff-s0", "cff-s1")]
    assert run_eval(*runs, "--figure", "m0.png") == 0
    assert run_eval(finished / "m2", finished / "ff", "--figure", "epochs.png") == 0
    assert run_eval("--margins", 0.4, 0.1, 8) == 0 and run_eval("--show-views") == 0
    pictures = [finished / name / "layers.png" for name in ("m2", "ff")]
    for picture in [*pictures, *map(Path, ("m0.png", "epochs.png", "margins.png", "views.png"))]:
        grey = pil_to_tensor(Image.open(picture).convert("L")).float()
        assert min(grey.shape[1:]) > 200 and grey.std() > 10, f"{picture} shows nothing"


# ---------------------------------------------------------------------- models, data and figures

@pytest.mark.parametrize("labels", ["one-hot", "random"])
def test_an_mlps_layers_start_at_one_scale_for_inputs_of_length_1_as_of_variance_1(labels):
    torch.manual_seed(0)
    x, y, spread = torch.randn(500, 1, 28, 28), torch.arange(500) % 10, []
    for kind in (None, labels):
        model = vit.build_model("mlp-100-2", (1, 28, 28), 10, labels=kind)
        spread.append(model.layers[0][0](model.patches(x, y if kind else None)).std())
        h = torch.randn(500, 100)
        spread.append(model.layers[1][0](cff.unit(h) if kind else h).std())
    close(torch.stack(spread[2:]), torch.stack(spread[:2]), "deviation before the ReLU", 0.06)


def test_section_4_mean_and_deviation_are_those_of_the_training_pixels():
    run = train.Run(settings_of("--limit", 20, "--device", "cpu"))
    pixels = run.train[0].double() / 255
    assert run.facts["mean"] == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())
    assert run.facts["std"] == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist())


def test_section_4_views_are_normalised_last_and_drawn_anew():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])

    def make(kind):
        return train.make_augment(kind, 4, mean.tolist(), std.tolist(),
                                  torch.Generator().manual_seed(0))
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    close(make("none")(images), expected, "normalised images", 1e-6)
    augment = make("crop+randaug")
    assert not torch.equal(augment(images), augment(images)), "a fresh draw for each call"


def test_fig7_runs_that_differ_in_several_settings_are_not_drawn():
    with pytest.raises(ValueError, match="differ in m0, temperature$"):
        evaluation.what_varies(records((dict(m0=0.2), 1), (dict(temperature=1.0), 1)))
    assert evaluation.what_varies(records(({}, 1), (dict(algo="bp", lr=0.1), 1))) == "", \
        "each method has its own rates"


def test_section_4_metrics_count_a_label_among_the_first_k_guesses(monkeypatch):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))      # the first, first
    scores = torch.empty(20).index_copy(0, order, 20.0 - torch.arange(20))
    monkeypatch.setattr(train, "predict", lambda model, x, algo, head: scores.repeat(len(x), 1))
    y = order[torch.tensor([0, 0, 2, 4, 5, 9, 10, 19])]                         # guesses before it
    s = {"algo": "ff", "head": False}
    assert train.accuracy(None, torch.zeros(8, 1), y, lambda x: x, s) == {1: 25, 5: 50, 10: 75}


@pytest.mark.parametrize("name, options, words", [
    *((name, {}, "a model is named") for name in (
        "vit-128-4", "cnn-3-3", "ViT[128 4 0]", "mlp-8-2-2", "vit-8--2-2", "vit-8-2-2-", "vit")),
    ("vit-8-2-1", dict(pool="max"), "pool"), ("vit-8-2-1", dict(labels="one-hot"), "labels"),
    ("mlp-8-2", dict(labels="patch"), "labels"),
    ("mlp-8-2", dict(labels="one-hot", num_classes=200), "200 classes do not fit"),
])
def test_models_refuse_what_does_not_fit(name, options, words):
    with pytest.raises(ValueError, match=words):
        vit.build_model(name, (3, 8, 8), **{"num_classes": 10, **options})


@pytest.mark.parametrize("labels, y, words", [(None, torch.tensor([0, 1]), "takes images alone"),
                                              ("one-hot", None, "takes images and y")])
def test_models_refuse_labels_they_do_not_take_and_miss_those_they_do(labels, y, words):
    with pytest.raises(ValueError, match=words):
        model = vit.build_model("mlp-8-2", (3, 8, 8), 10, labels=labels)
        model.patches(torch.randn(2, 3, 8, 8), y)


def test_model_names_and_shapes():
    model = vit.build_model("ViT[8 2 3]", (3, 8, 8), 10)
    assert isinstance(model, vit.ViT) and len(model.layers) == 3
    layers = vit.build_model("MLP[16 2]", (1, 28, 28), 10).layers
    assert [tuple(layer[0].weight.shape) for layer in layers] == [(16, 784), (16, 16)]
    assert (layers[0](torch.randn(4, 784)) >= 0).all(), "linear + ReLU"
