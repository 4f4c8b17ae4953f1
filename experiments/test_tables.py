"""The tables on the pages, and the commands in config.json, agree with the records.

    python -m pytest -q experiments/test_tables.py
"""
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import tables
import train
from eval import read_record

FRONT, README, RUNS = (path.read_text(encoding="utf-8") for path in (
    HERE.parent / "README.md", HERE / "README.md", HERE / "records" / "README.md"))


def test_the_pages_have_the_tables_that_tables_py_prints(capsys):
    tables.main()
    printed = capsys.readouterr().out
    for table in filter(None, map(str.strip, printed.split("\n\n"))):
        assert f"\n\n{table}\n" in README + RUNS, f"not on the pages:\n{table}"
    claims = FRONT.split("\n## Which claims we reproduced\n")[1]
    for row in re.findall(r"^\| \d+ .*", claims, flags=re.M):
        assert row in printed, f"a row of the front page that tables.py does not print: {row}"


@pytest.mark.parametrize("folder", tables.FOLDERS, ids=lambda folder: folder.name)
def test_the_command_in_a_record_has_the_settings_of_the_record(folder):
    command = json.loads((folder / "config.json").read_text())["command"]
    new, old = train.parse(shlex.split(command)[2:])[0], read_record(folder).settings
    others = ["out", "data_dir", "device", "recipe"]
    if old.algo not in ("cff", "cffm", "scl"):
        others.append("views")                          # all other methods use one view
    if (folder / "checkpoint.pt").exists():
        saved = train.read(folder / "checkpoint.pt")
        train.make_model(old, saved["data"]).load_state_dict(saved["best"])
        assert saved["settings"] == vars(old), "the kept weights are of another run"
    assert [name for name in train.SETTINGS
            if name not in others and getattr(new, name) != getattr(old, name)] == []
