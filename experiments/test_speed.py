"""What speed.py measures (Tables 2 and 6, Section 5.1), small; and the paper's own numbers.

    python -m pytest -q experiments/test_speed.py
"""
import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import speed
import train
import vit
from test_pipeline import processes

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("method", speed.METHODS)
@pytest.mark.parametrize("augment", ["crop", "crop+randaug"])
def test_nothing_in_a_step_waits_for_the_device(method, augment):
    """On the device "meta", where tensors have no values, asking for a value is an error."""
    run = speed.random_run(method, "vit-16-2-3", "cifar10", 8, META, augment=augment)
    assert {p.device for p in run.model.parameters()} == {META}, "all is on the device of the run"
    parts = [run.model] if method == "BP" else run.model.layers
    run.optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in parts]    # AdamW fails
    assert train.train_on(run, run.x, run.y).device == META


@pytest.mark.parametrize("precision, expected", [("tf32", "high"), ("fp32", "highest")])
def test_a_model_comes_with_its_precision_of_matrix_products(monkeypatch, precision, expected):
    """So speed.py and the later processes of a pipeline train as train.py does, on a GPU."""
    asked = []
    monkeypatch.setattr(train, "find_device", lambda name="auto": torch.device("cuda"))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    speed.random_run("BP", "mlp-8-2", "mnist", 8, CPU, precision=precision)
    assert asked == [expected]


@pytest.mark.parametrize("dataset", speed.SIZES)
@pytest.mark.parametrize("method", speed.METHODS)
def test_table6_every_method_steps_on_random_images_of_every_data_set(method, dataset):
    assert speed.random_step(method, "vit-8-2-2", dataset, 8, CPU)().isfinite().all()


def test_table2_and_table6_speed_of_steps_and_inference(capsys, monkeypatch):
    monkeypatch.setattr(speed, "measure_memory", lambda jobs: {job[:2]: 1.0 for job in jobs})
    record = speed.speed("vit-8-2-2", 8, 2, depths=(1, 10), n=4)
    speed.show_speed(json.loads(json.dumps(record)))
    assert record["methods"]["BP"]["ratio"] == 1 and len(record["inference"]) == 3
    assert "| CFF+M, 2 views | " in capsys.readouterr().out


def test_section_5_1_cff_needs_less_memory_than_bp():
    case = "vit-64-4-8", "cifar10", 64, CPU
    bp, cff = speed.measure_memory([("BP", *case), ("CFF+M, 1 view", *case)]).values()
    assert math.isnan(bp) or bp > 3 * cff


@pytest.mark.parametrize("argv, words", [(["--batch-size", "1"], "--batch-size: 2 or more"),
                                         (["--model", "vit-12"], "a model is named")], ids=str)
def test_table6_what_cannot_be_measured_is_refused(capsys, argv, words):
    with pytest.raises(SystemExit):
        speed.main(argv)
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_section_5_1_speed_of_the_pipeline(tmp_path):
    done = processes(tmp_path, 2, HERE / "speed.py", "--model", "vit-8-2-3", "--rounds", "1",
                     "--batch-size", "9", "--batches", "2", "--dataset", "cifar100",
                     "--json", "speed.json")
    assert [status for status, _, _ in done] == [0, 0], done
    record = json.loads((tmp_path / "speed.json").read_text())
    assert list(record["methods"]) == ["Matrix products", "CFF+M, 1 view", "CFF+M, 2 views", "BP"]
    assert record["processes"] == 2 and len(record["megabytes"]) == 2
    assert "| CFF+M, 1 view " in done[0][1] and not done[1][1], "only the first prints"


def test_table1_to_table6_are_in_paper_csv_spelled_as_the_flags_of_train():
    with open(HERE / "paper.csv", newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert len({row[:-1] for row in rows}) == len(rows) == 107, "each number once"
    for _, dataset, model, augment, setting, method, quantity, value in rows:
        for name, typed in (("dataset", dataset), ("augment", augment), ("algo", method)):
            assert typed in train.SETTINGS[name][1]
        assert model == vit.plain_name(model) and dataset in speed.SIZES
        assert setting == "" or setting.split()[0] in train.SETTINGS
        assert math.isfinite(float(value))
