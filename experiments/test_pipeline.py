"""Section 5.1 and Fig. 8 as tests: layers trained in parallel by real processes (pipeline.py).

    python -m pytest -q experiments/test_pipeline.py
"""
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import pipeline
from test_runs import PROCESSES, assert_same_runs, run_main, run_until

PIPED = ["--model", "vit-16-2-4", "--device", "cpu", "--patch-size", "16", "--limit", "225",
         "--batch-size", "64", "--epochs", "2", "--head-epochs", "1"]


# ---------------------------------------------------------------------------------------- helpers

def run_script(folder, rank, environment, argv):
    """What a new process does to be `python argv...`, with its output in two files."""
    os.chdir(folder)
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def processes(folder, n, script, *argv):
    """Run a script in `folder` in n processes, as torchrun would: [(status, output, errors)]."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"TORCHELASTIC_RUN_ID": "0", "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    argv, running, done = [str(script), *map(str, argv)], [], []
    for rank in range(n):
        running.append(PROCESSES.Process(target=run_script, args=(folder, rank, environment, argv)))
        running[rank].start()
    for rank, process in enumerate(running):
        process.join(120)
        process.kill()                                              # if it hangs
        process.join()
        texts = [(folder / f"{name}{rank}.txt").read_text() for name in ("out", "err")]
        done.append((process.exitcode, *texts))
    return done


def start(folder, n, *argv):
    """Run pipeline.py in `folder` in n processes, all of which must end well."""
    done = processes(folder, n, HERE / "pipeline.py", *argv)
    assert [status for status, _, _ in done] == n * [0], done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of train.py, to compare with."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run_main(*PIPED, "--out", folder)
    return folder


# --------------------------------------------------------------------------- the same run, sooner

def test_fig8_pipeline_trains_bit_for_bit_what_one_process_trains(alone, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "4", HERE / "pipeline.py", *PIPED, "--out", "run"]
    subprocess.run(command, cwd=tmp_path, timeout=300, check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert_same_runs(alone, tmp_path / "run")
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())       # of 4 batches
    assert pipeline.longest_chain(trace) == 4 + 4 - 1           # L + N - 1, one layer per process
    sent = [(row["batch"], row["waited_for"]) for row in trace
            if row["event"] == "send" and row["process"] == 0]
    assert sent == [(0, None), (0, None), (1, 0), (1, 0), (2, 1), (2, 1), (3, 2), (3, 2)]


@pytest.mark.parametrize("flags", [
    ["--algo", "ff", "--model", "vit-16-2-3"],
    ["--algo", "symba", "--head", "--model", "mlp-16-3", "--alpha", "4", "--schedule", "cosine"],
    ["--algo", "cff", "--views", "1", "--pool", "token", "--model", "vit-16-2-3"],
], ids=" ".join)
def test_fig8_other_methods_and_models_in_the_pipeline(tmp_path, flags):
    run_main(*PIPED, *flags, "--out", tmp_path / "one")
    start(tmp_path, 2, *PIPED, *flags, "--out", "piped")
    assert_same_runs(tmp_path / "one", tmp_path / "piped")


@pytest.mark.parametrize("ranks, signal, words", [
    ("1", 9, "Error"), ("01", 2, "stopped; continue with: python train.py --resume --out run\n"),
], ids=["dead process", "Ctrl-C"])
def test_fig8_a_run_that_ends_early_says_why_and_continues(alone, tmp_path, ranks, signal, words):
    """After the first epoch. Ctrl-C gives one line, in the first process."""
    (tmp_path / "script.py").write_text(f"""import os, sys
sys.path.insert(0, {str(HERE)!r})
import pipeline
def train_epoch(part, batches, real=pipeline.train_epoch):
    if part.epoch == 1 and os.environ["RANK"] in "{ranks}":
        try:
            os.kill(os.getpid(), {signal})
        finally:
            os.kill(os.getpid(), 15)                            # torchrun's own
    return real(part, batches)
pipeline.train_epoch = train_epoch
pipeline.main()
""")
    argv = *PIPED, "--out", "run"
    (status, _, error), later = processes(tmp_path, 2, tmp_path / "script.py", *argv)
    assert status == 1 and words in error
    assert signal == 9 or (error, later) == (words, (-2, "", ""))
    start(tmp_path, 3, "--resume", "--out", "run")              # three continue what two began
    assert_same_runs(alone, tmp_path / "run")


def test_fig8_pipeline_continues_a_run_that_train_began(alone, tmp_path):
    run_until("validate", 1, 1, *PIPED, "--out", tmp_path / "run")
    start(tmp_path, 2, "--resume", "--out", "run")
    start(tmp_path, 2, "--resume", "--out", "run")              # nothing is left to do in stage 1
    assert_same_runs(alone, tmp_path / "run")


# --------------------------------------------------------------------- the schedule, the refusals

@pytest.mark.parametrize("waits, n, chain", [
    ("nothing", 2, 2 + 5 - 1),                          # a process for its input alone
    ("the message before to leave", 3, 3 + 5 - 1),      # as here
    ("its own message to be taken", 3, 1 + 2 * 5),      # no room: it and the last work by turns
], ids=str)
def test_fig8_longest_chain_by_hand(waits, n, chain):
    def step(process, batch, event, waited_for=None):
        return dict(process=process, batch=batch, event=event, waited_for=waited_for)
    trace = [step(process, batch, "step") for process in range(n) for batch in range(5)]
    trace += [step(process, batch, "receive", batch)
              for process in range(1, n) for batch in range(5)]
    if waits == "the message before to leave":
        trace += [step(process, batch, "send", batch - 1 if batch else None)
                  for process in range(n - 1) for batch in range(5)]
    if waits == "its own message to be taken":
        trace += [step(n - 2, batch, "send", batch) for batch in range(5)]      # the last sender
    assert pipeline.longest_chain(trace) == chain


def test_fig8_schedule_says_who_worked_and_waited(tmp_path, monkeypatch, capsys):
    columns = "process", "batch", "event", "waited_for", "start", "end"
    rows = [(0, 0, "send", None, 5.5, 5.5), (0, 0, "step", None, 5, 6),
            (1, 0, "receive", 0, 5.25, 5.5), (1, 0, "step", None, 5.25, 7)]
    (tmp_path / "trace.json").write_text(json.dumps([dict(zip(columns, row)) for row in rows]))
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--schedule", str(tmp_path)])
    pipeline.main()
    lines = capsys.readouterr().out.splitlines()
    assert "1 batches on 2 processes: the longest chain of dependent steps has 2" in lines[0]
    assert lines[2].split() == ["1", "50.0%", "0.0%", "0.0%"]
    assert lines[3].split() == ["2", "87.5%", "12.5%", "0.0%"]


def test_fig8_what_cannot_be_piped_is_refused(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    for flags, words in ((["--algo", "collab"], "its losses depend on several layers"),
                         (["--model", "mlp-8-3", "--device", "cpu"], "4 processes for 3 layers")):
        with pytest.raises(ValueError, match=words):
            pipeline.start_run([*flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
