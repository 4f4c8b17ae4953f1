"""The tables and commands in README.md and records/README.md agree with the records.

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


def test_the_pages_have_the_tables_that_tables_py_prints(capsys):
    tables.main()
    printed = capsys.readouterr().out
    for table in filter(None, map(str.strip, printed.split("\n\n"))):
        assert f"\n\n{table}\n" in README + RUNS, f"not on the pages:\n{table}"
    claims = FRONT.split("\n## Which claims we reproduced\n")[1]
    for row in re.findall(r"^\| \d+ .*", claims, flags=re.M):
        assert row in printed, f"a row of the front page that tables.py does not print: {row}"


def test_each_record_has_a_command_with_the_same_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                         # a folder without runs
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
        assert not different, f"{folder.name}: settings that differ from its command: {different}"
