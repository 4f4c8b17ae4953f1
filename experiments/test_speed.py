"""speed.py on small models (Tables 2 and 6, Section 5.1).

    python -m pytest -q experiments/test_speed.py
"""
import json
import math
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import speed
from test_pipeline import processes

CPU = torch.device("cpu")


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
