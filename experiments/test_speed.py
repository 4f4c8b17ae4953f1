"""speed.py on small models (Tables 2 and 6, Section 5.1).

    python -m pytest -q experiments/test_speed.py
"""
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
from test_pipeline import processes

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("method", [name for name in speed.METHODS if "bf16" not in name])
def test_nothing_in_a_step_waits_for_the_device(method):
    """Tensors on the device "meta" have no values, so a step that reads a value fails there."""
    run = speed.random_run(method, "vit-16-2-3", 8, META)
    run.augment = train.make_augment("crop+randaug", 4, 3 * [0.5], 3 * [0.25], None)
    assert {p.device for p in run.model.parameters()} == {META}, "all weights are on the device"
    parts = [run.model] if method == "BP" else run.model.layers
    run.optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in parts]    # not AdamW
    assert train.train_on(run, run.x, run.y).device == META


def test_table2_and_table6_times_of_steps_and_inference(capsys, monkeypatch):
    monkeypatch.setattr(speed, "step_memory", lambda *case: 1.0)
    record = speed.speed("vit-8-2-2", 8, 2, CPU)
    sizes = dict(model="vit-8-2-2", batch_size=8, rounds=2, device="cpu", torch="2")
    speed.show_speed({**sizes, **record})
    assert record["methods"]["BP"]["ratio"] == 1 and len(record["inference"]) == 3
    assert "| CFF+M, 2 views " in capsys.readouterr().out


def test_section_5_1_cff_needs_less_memory_than_bp():
    case = "vit-64-4-8", 64, CPU
    bp, cff = speed.step_memory("BP", *case), speed.step_memory("CFF+M, 1 view", *case)
    assert math.isnan(bp) or bp > 3 * cff


def test_section_5_1_speed_of_the_pipeline(tmp_path):
    done = processes(tmp_path, 2, HERE / "speed.py", "--model", "vit-8-2-3", "--rounds", "1",
                     "--batch-size", "9", "--batches", "2", "--json", "speed.json")
    assert [status for status, _, _ in done] == [0, 0], done
    record = json.loads((tmp_path / "speed.json").read_text())
    assert list(record["methods"]) == ["CFF+M, 1 view", "CFF+M, 2 views", "BP"]
    assert record["processes"] == 2 and len(record["megabytes"]) == 2
    assert "| CFF+M, 1 view " in done[0][1] and not done[1][1], "only the first process prints"
