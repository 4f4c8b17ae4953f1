"""Each command of figures.py draws a picture, or says why it cannot.

    python -m pytest -q experiments/test_figures.py
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import figures
import train
from eval import find_folders, read_groups

RECORDS = HERE / "records"
MARGINS = [RECORDS / f"tenth-{name}" for name in ("cff-s?", "cffm-s?", "cffm-m0*")]
METHODS = [RECORDS / f"tenth-{algo}-s?" for algo in ("bp", "cff", "cffm", "ff")]
MODELS = [RECORDS / f"fig7-{size}-{algo}-s0" for size in (32, 128) for algo in ("bp", "cffm")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run. Its name is not valid TeX, so no text may be read as TeX."""
    folder = tmp_path_factory.mktemp("runs") / "r$1_{2$"
    train.main(["--limit", "200", "--epochs", "2", "--head-epochs", "1", "--batch-size", "64",
                "--model", "vit-16-2-2", "--device", "cpu", "--out", str(folder)])
    return folder


def refusal(capsys, *arguments):
    """The last line that figures.py prints when it refuses these arguments."""
    with pytest.raises(SystemExit, match="2"):
        figures.main([str(argument) for argument in arguments])
    return capsys.readouterr().err.splitlines()[-1]


def assert_shows_something(picture):
    with Image.open(picture) as image:
        assert min(image.size) > 200 and len(image.convert("L").getcolors()) > 10


@pytest.mark.parametrize("figure, arguments", [
    ("fig4a", []), ("fig4b", MARGINS), ("fig6", METHODS), ("fig7", MODELS),
    ("views", ["--dataset", "shapes"])])
def test_each_command_draws_a_picture(figure, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figures.main([figure, *map(str, arguments)])
    assert capsys.readouterr().out == f"picture: {figure}.png\n"
    assert_shows_something(f"{figure}.png")


def test_fig5_is_drawn_in_the_folder_of_the_run_or_at_out(run, tmp_path, capsys):
    pytest.importorskip("sklearn")
    before = set(run.iterdir())
    figures.main(["fig5", str(run), "--device", "cpu", "--out", str(tmp_path / "5.png")])
    assert set(run.iterdir()) == before, "with --out, a read-only folder can be drawn"
    assert "Fisher" in capsys.readouterr().out
    assert_shows_something(tmp_path / "5.png")
    figures.main(["fig5", str(run), "--device", "cpu"])
    assert_shows_something(run / "fig5.png")


def test_a_notebooks_backend_and_a_bad_name_do_not_stop_fig6(tmp_path):
    command = [sys.executable, str(HERE / "figures.py"), "fig6", "nowhere", str(METHODS[0])]
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped: nowhere" in done.stderr, done
    assert_shows_something(tmp_path / "fig6.png")


@pytest.mark.parametrize("figure, runs, words", [
    ("fig4b", [RECORDS / f"tenth-cffm-{name}-s0" for name in ("m02", "views1")], "in m0, views"),
    ("fig7", METHODS, "no setting except the method: use fig6"), ("fig6", ["x"], "none of these")])
def test_runs_that_do_not_fit_a_figure_are_refused_with_a_reason(figure, runs, words, capsys):
    assert words in refusal(capsys, figure, *runs)


def test_fig4b_points_are_means_of_seeds_and_cff_is_a_horizontal_line():
    figure, expected = figures.fig7(map(str, MARGINS)), {}
    for runs in read_groups(find_folders(map(str, MARGINS))):
        mean = sum(run.accuracy("val") for run in runs) / len(runs)
        expected[runs[0].settings.algo, runs[0].settings.m0] = pytest.approx(mean)
    cff, cffm = figure.axes[0].lines[:2]
    assert list(cff.get_ydata()) == 2 * [expected["cff", 0.4]]
    assert list(cffm.get_ydata()) == [expected["cffm", m0] for m0 in (0.2, 0.4, 0.6, 0.8)]
