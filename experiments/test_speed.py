"""What speed.py measures (Tables 2 and 6, Section 5.1), small; and the paper's own numbers.

    python -m pytest -q experiments/test_speed.py
"""
import csv
import json
import math
import platform
import re
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import speed
import train
import vit
from test_cff import close
from test_pipeline import processes

CPU = torch.device("cpu")


# ---------------------------------------------------------- the short cut through a layer's work

def train_some(model, dtype, batch_size, updates, **changes):
    """Losses of each update and all weights after them; FLOP of the first."""
    run = speed.random_run("CFF+M, 2 views", model, "cifar10", batch_size, CPU, **changes)
    run.model.to(dtype)
    optimizers = train.make_optimizers(run.model, run.settings)
    step = train.make_step(run.settings, run.model, optimizers,
                           lambda x: run.augment(x).to(dtype), run.generator)
    losses = []
    flop = speed.flop_of(lambda: losses.append(step(run.x, run.y)))
    losses += [step(run.x, run.y) for _ in range(updates - 1)]
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    return torch.stack(losses), weights, flop


@pytest.mark.parametrize("pool", ["mean", "token"])
@pytest.mark.parametrize("algo, views", [("cff", 1), ("cff", 2), ("cffm", 1), ("cffm", 2),
                                         ("ff", 1), ("symba", 1), ("collab", 1)])
def test_the_short_cut_trains_as_the_plain_way(algo, views, pool):
    plain, short = (train_some("vit-16-2-3", torch.float64, 8, 5, algo=algo, views=views, pool=pool,
                               plain=plain, lr=0.004) for plain in (True, False))
    for a, b, what in zip(plain, short, ("losses", "weights")):
        close(b, a, f"{what} of {algo}", 1e-10)
    assert short[2] < plain[2], "and is shorter"


def test_the_short_cut_takes_three_quarters_of_the_work():
    plain, short = (train_some("vit-128-4-5", torch.float32, 4, 1, plain=plain)[2]
                    for plain in (True, False))
    assert 0.7 < short / plain < 0.77


@pytest.mark.parametrize("algo, augment", [("cffm", "crop"), ("cffm", "crop+randaug"),
                                           ("ff", "crop"), ("symba", "flip"), ("collab", "crop"),
                                           ("scl", "crop"), ("bp", "crop")])
@pytest.mark.parametrize("plain", [True, False])
def test_nothing_in_a_step_waits_for_the_device(algo, augment, plain):
    """On the device "meta", where tensors have no values: who asks for one gets an error."""
    meta = torch.device("meta")
    run = speed.random_run("CFF+M, 2 views", "vit-16-2-3", "cifar10", 8, CPU, algo=algo,
                           plain=plain, augment=augment)
    model, x, y = run.model.to(meta), run.x.to(meta), run.y.to(meta)
    parts = [model] if algo in ("scl", "bp") else model.layers
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]     # AdamW refuses
    step = train.make_step(run.settings, model, optimizers, run.augment, run.generator)
    assert step(x, y).device == meta


def test_all_layers_of_a_random_run_are_on_its_device():
    for method in speed.METHODS:
        run = speed.random_run(method, "vit-16-2-3", "cifar10", 8, torch.device("meta"))
        assert {p.device.type for p in run.model.parameters()} == {"meta"}, method


def test_only_a_local_loss_takes_the_short_cut():
    for algo, short in (("cff", True), ("collab", True), ("scl", False), ("bp", False)):
        s = train.defaults("shapes", algo) | {"model": "vit-16-2-2"}
        model = train.make_model(s, {"image_shape": (3, 32, 32), "num_classes": 10})
        y = torch.zeros(2, dtype=torch.long) if algo == "collab" else None
        h = model.layers[0](model.patches(torch.randn(2, 3, 32, 32), y))
        assert h.requires_grad != short and model.pool(h).requires_grad, algo
        with torch.no_grad():
            assert model.layers[1](h).shape == h.shape and not hasattr(model.layers[1](h), "pooled")


# ------------------------------------------------------------------------- one process alone

def test_table2_and_table6_speed_of_steps_and_inference(capsys, monkeypatch):
    few = {method: speed.METHODS[method] for method in list(speed.METHODS)[:5]}
    monkeypatch.setattr(speed, "METHODS", few)
    monkeypatch.setattr(speed, "measure_memory",                # new processes take seconds each
                        lambda cases: {case[:2]: 100.0 * len(case[1]) for case in cases})
    record = speed.speed("vit-8-2-2", 8, 2, depths=(1, 10), n=4)
    flop = {method: row["gigaflop"] for method, row in record["methods"].items()}
    assert flop["CFF+M, 2 views"] < flop["CFF+M, 2 views, --plain"]
    for method in ("CFF+M, 2 views", "FF"):             # views and passes are paid for in products
        assert flop[method] == pytest.approx(2 * flop["CFF+M, 1 view"], rel=0.3)
    assert record["megabytes_by_depth"]["BP"] == {1: 900.0, 10: 1000.0}
    speed.show_speed(json.loads(json.dumps(record)))
    out = capsys.readouterr().out
    assert "| CFF+M, 2 views, --plain | " in out
    assert re.search(r"\| Method +\| 1 +\| 10 +\|", out)


@pytest.mark.parametrize("dataset", speed.SIZES)
def test_table6_every_method_steps_on_random_images_of_every_data_set(dataset):
    for method in speed.METHODS:
        losses = speed.random_step(method, "vit-8-2-2", dataset, 8, CPU)()
        assert losses.isfinite().all(), method


def test_table6_memory_of_bp_grows_with_depth_and_that_of_cff_does_not():
    cases = [("BP", 8), ("CFF+M, 1 view", 8), ("CFF+M, 1 view", 2)]     # a new process each
    memory = speed.measure_memory([(method, f"vit-64-4-{L}", "cifar10", 64, CPU)
                                   for method, L in cases])
    bp, cff, cff_of_two_layers = memory.values()
    if bp is None:
        pytest.skip("memory cannot be measured here")
    assert cff < 1.5 * cff_of_two_layers and bp > 2 * cff


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_table6_freed_memory_is_kept():
    import resource
    speed.keep_memory()
    faults = []
    for _ in range(5):
        torch.ones(20_000_000)                                  # 80 MB in 20,000 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert min(b - a for a, b in zip(faults, faults[1:])) < 1000    # what else runs has faults too


@pytest.mark.parametrize("argv, words", [
    (["--batch-size", "1"], "--batch-size 2 or more"), (["--rounds", "0"], "1 or more"),
    (["--model", "vit-12"], "a model is named"), (["--dataset", "imagenet"], "invalid choice"),
], ids=str)
def test_table6_what_cannot_be_measured_is_refused(capsys, argv, words):
    with pytest.raises(SystemExit) as ended:
        speed.main(argv)
    assert ended.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


# ----------------------------------------------------------------------------- several processes

def test_section_5_1_speed_of_the_pipeline(tmp_path, capsys):
    (tmp_path / "small.py").write_text(f"""if True:
        import functools, sys
        sys.path.insert(0, {str(HERE)!r})
        import speed
        speed.matrix_product = functools.partial(speed.matrix_product, size=64)
        speed.main()""")
    done = processes(tmp_path, 2, tmp_path / "small.py", "--model", "vit-8-2-3", "--rounds", "1",
                     "--batch-size", "9", "--batches", "2", "--dataset", "cifar100",
                     "--json", "speed.json")
    assert [status for status, _, _ in done] == [0, 0], done
    record = json.loads((tmp_path / "speed.json").read_text())
    assert list(record["methods"]) == ["Matrix products", "CFF+M, 1 view", "CFF+M, 2 views", "BP"]
    assert record["processes"] == 2 and len(record["megabytes"]) == 2
    speed.show_pipeline_speed(record)
    assert capsys.readouterr().out in done[0][1] and not done[1][1], "the first alone says it"


# ----------------------------------------------------------------------------- the paper's numbers

def test_table1_to_table6_are_in_paper_csv_spelled_as_the_flags_of_train():
    with open(HERE / "paper.csv", newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    sizes = {table: sum(row[0] == table for row in rows) for table in "123456"}
    # 5 x 5 - 2, 8 x 2, 15 x 2, 5 x 2, 2 x 2, 6 x 4
    assert sizes == {"1": 23, "2": 16, "3": 30, "4": 10, "5": 4, "6": 24}
    assert len({row[:-1] for row in rows}) == len(rows), "two rows of one key"
    for _, dataset, model, augment, setting, method, quantity, value in rows:
        for name, typed in (("dataset", dataset), ("augment", augment), ("algo", method)):
            assert typed in train.SETTINGS[name][1]
        shape, classes = speed.SIZES[dataset]
        patch = {} if model.startswith("mlp") else {"patch_size": 8 if shape[1] == 64 else 4}
        assert model == vit.plain_name(model) and vit.build_model(model, shape, classes, **patch)
        assert setting == "" or setting.split()[0] in train.SETTINGS
        assert quantity in ("accuracy_percent", "accuracy_difference", "inference_ms_x10",
                            "seconds_per_epoch")
        assert math.isfinite(float(value))
