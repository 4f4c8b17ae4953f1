"""The tables and commands on the pages agree with the records.

    python -m pytest -q experiments/test_tables.py
"""
import re
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import tables
import train
from eval import read_record

FRONT, README, RUNS = (path.read_text(encoding="utf-8") for path in (
    HERE.parent / "README.md", HERE / "README.md", HERE / "records" / "README.md"))


def test_the_tables_on_the_pages_are_those_that_tables_prints(capsys):
    tables.main()
    printed = capsys.readouterr().out
    for table in filter(None, map(str.strip, printed.split("\n\n"))):
        assert f"\n\n{table}\n" in README + RUNS, f"python experiments/tables.py has\n{table}"
    rows = "\n".join(re.findall(r"^\|.*", FRONT, flags=re.M))
    for number in re.findall(r"\d+\.\d ± \d+\.\d", rows):
        assert number in printed, f"{number} on the front page"


def test_each_record_has_its_command_with_its_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                         # no folder of a run is here
    lines = re.findall(r"^    (.*)", RUNS.split("\n## The commands\n")[1], flags=re.M)
    script = 'python() { printf "%q " "$@"; echo; }\n' + "\n".join(lines)
    shown = subprocess.check_output(["bash", "-euc", script], text=True)
    calls = [shlex.split(line)[1:] for line in shown.splitlines() if line.startswith("train.py ")]
    commands = {Path(flags[flags.index("--out") + 1]).name: flags for flags in calls}
    assert set(commands) == {folder.name for folder in tables.FOLDERS}
    for folder in tables.FOLDERS:
        new, old = train.parse(commands[folder.name])[0], read_record(folder).settings
        without_views = () if old.algo in ("cff", "cffm", "scl") else ("views",)
        different = [name for name in train.SETTINGS if getattr(new, name) != getattr(old, name)
                     and name not in ("out", "data_dir", "device", "recipe", *without_views)]
        assert not different, f"{folder.name}: its command has another {different}"
