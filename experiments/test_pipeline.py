"""Section 5.1 and Fig. 8 as tests: real processes train layers in parallel (pipeline.py).

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


def run_script(folder, rank, environment, argv):
    """Run `python argv...` in this new process; its output goes to two files."""
    os.chdir(folder)
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def processes(folder, n, script, *argv):
    """Run a script in n processes, as torchrun does. Returns [(status, output, errors)]."""
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
        process.kill()                                              # in case it hangs
        process.join()
        texts = [(folder / f"{name}{rank}.txt").read_text() for name in ("out", "err")]
        done.append((process.exitcode, *texts))
    return done


def start(folder, n, *argv):
    """Run pipeline.py in n processes, which must all succeed."""
    done = processes(folder, n, HERE / "pipeline.py", *argv)
    assert [status for status, _, _ in done] == n * [0], done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of train.py, to compare the pipeline's runs with."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run_main(*PIPED, "--out", folder)
    return folder


def test_fig8_pipeline_gives_the_same_run_as_train_bit_for_bit(alone, tmp_path):
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
def test_fig8_pipeline_gives_the_same_run_with_other_settings(tmp_path, flags):
    run_main(*PIPED, *flags, "--out", tmp_path / "one")
    start(tmp_path, 2, *PIPED, *flags, "--out", "piped")
    assert_same_runs(tmp_path / "one", tmp_path / "piped")


@pytest.mark.parametrize("ranks, signal, words", [
    ("1", 9, "Error"), ("01", 2, "stopped; continue with: python train.py --resume --out run\n"),
], ids=["dead process", "Ctrl-C"])
def test_fig8_a_stopped_run_says_why_and_can_continue(alone, tmp_path, ranks, signal, words):
    """Stop after the first epoch. After Ctrl-C only the first process prints, and only one line."""
    (tmp_path / "script.py").write_text(f"""import os, sys
sys.path.insert(0, {str(HERE)!r})
import pipeline
def train_epoch(part, batches, real=pipeline.train_epoch):
    if part.epoch == 1 and os.environ["RANK"] in "{ranks}":
        try:
            os.kill(os.getpid(), {signal})
        finally:
            os.kill(os.getpid(), 15)                            # as torchrun does
    return real(part, batches)
pipeline.train_epoch = train_epoch
pipeline.main()
""")
    argv = *PIPED, "--out", "run"
    (status, _, error), later = processes(tmp_path, 2, tmp_path / "script.py", *argv)
    assert status == 1 and words in error
    assert signal == 9 or (error, later) == (words, (-2, "", ""))
    start(tmp_path, 3, "--resume", "--out", "run")              # three processes continue
    assert_same_runs(alone, tmp_path / "run")


def test_fig8_pipeline_continues_a_run_that_train_began(alone, tmp_path):
    run_until("validate", 1, 1, *PIPED, "--out", tmp_path / "run")
    start(tmp_path, 2, "--resume", "--out", "run")
    start(tmp_path, 2, "--resume", "--out", "run")              # stage 1 is already complete
    assert_same_runs(alone, tmp_path / "run")


@pytest.mark.parametrize("waits, n, chain", [
    ("nothing", 2, 2 + 5 - 1),                          # a process waits for its input only
    ("the message before to leave", 3, 3 + 5 - 1),      # as in pipeline.py
    ("its own message to be taken", 3, 1 + 2 * 5),      # the last two processes take turns
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


def test_fig8_schedule_says_how_long_the_longest_chain_is(tmp_path, monkeypatch, capsys):
    columns = "process", "batch", "event", "waited_for", "start", "end"
    rows = [(0, 0, "send", None, 5.5, 5.5), (0, 0, "step", None, 5, 6),
            (1, 0, "receive", 0, 5.25, 5.5), (1, 0, "step", None, 5.25, 7)]
    (tmp_path / "trace.json").write_text(json.dumps([dict(zip(columns, row)) for row in rows]))
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--schedule", str(tmp_path)])
    pipeline.main()
    words = "1 batches on 2 processes: the longest chain of dependent steps has 2"
    assert words in capsys.readouterr().out


def test_fig8_unsuitable_runs_are_refused(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    for flags, words in ((["--algo", "collab"], "its losses depend on several layers"),
                         (["--model", "mlp-8-3", "--device", "cpu"], "4 processes for 3 layers")):
        with pytest.raises(ValueError, match=words):
            pipeline.start_run([*flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
