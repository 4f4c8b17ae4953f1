"""Section 5.1 and Fig. 8 as tests: layers trained in parallel by real processes (pipeline.py).

    python -m pytest -q experiments/test_pipeline.py
"""
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import pipeline
import train
import vit
from test_runs import PROCESSES, assert_same_runs, run_main

PIPED = ["--device", "cpu", "--patch-size", "16", "--limit", "225", "--batch-size", "64",
         "--epochs", "2", "--head-epochs", "1"]
FOUR = ["--model", "vit-16-2-4"]                                    # four layers


# ---------------------------------------------------------------------------------------- helpers

def run_script(argv, environment, out, err):
    """What a new process does to be `python argv...`, with its output in two files."""
    for fd, file in enumerate((out, err), start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
    os.chdir(Path(out).parent)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = argv
    with open(argv[0]) as script:
        exec(compile(script.read(), argv[0], "exec"), {"__name__": "__main__", "__file__": argv[0]})


def processes(folder, n, script, *argv):
    """Run a script in `folder` in n processes, as torchrun would: [(status, output, errors)]."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"TORCHELASTIC_RUN_ID": "0", "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
             "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command, running = [str(part) for part in (script, *argv)], []
    for rank in range(n):
        files = [str(folder / f"{name}{rank}.txt") for name in ("out", "err")]
        environment = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = PROCESSES.Process(target=run_script, args=(command, environment, *files))
        process.start()
        running.append((process, files))
    for process, _ in running:
        process.join(120)
        process.kill()                                              # if it hangs
        process.join()
    return [(process.exitcode, *(Path(file).read_text() for file in files))
            for process, files in running]


def start(folder, n, *argv):
    """Run pipeline.py in `folder` in n processes, all of which must end well."""
    done = processes(folder, n, HERE / "pipeline.py", *argv)
    assert [status for status, _, _ in done] == n * [0], done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of train.py, to compare with."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run_main(*PIPED, *FOUR, "--out", folder)
    return folder


# --------------------------------------------------------------------------- the same run, sooner

@pytest.mark.parametrize("n", [2, 4])
def test_fig8_pipeline_trains_bit_for_bit_what_one_process_trains(alone, tmp_path, n):
    argv, run = [*PIPED, *FOUR, "--out", "run"], tmp_path / "run"
    if n == 2:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", "2", str(HERE / "pipeline.py"), *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    else:
        start(tmp_path, n, *argv)
    assert_same_runs(alone, run)
    trace = pipeline.read_trace(run)                            # 4 batches, the last one smaller
    steps = sorted((row["process"], row["batch"]) for row in trace if row["event"] == "step")
    assert steps == [(process, batch) for process in range(n) for batch in range(4)]
    assert pipeline.longest_chain(trace) == n + 4 - 1           # L + N - 1, one layer per process
    sent = [(row["batch"], row["waited_for"]) for row in trace
            if row["event"] == "send" and row["process"] == 0]
    assert sent == [(0, None), (0, None), (1, 0), (1, 0), (2, 1), (2, 1), (3, 2), (3, 2)], \
        "two views per batch; one batch waits for the next"


@pytest.mark.parametrize("flags", [
    ["--algo", "ff", "--model", "vit-16-2-3"],
    ["--algo", "symba", "--head", "--model", "mlp-16-3", "--alpha", "4", "--schedule", "cosine"],
    ["--algo", "cff", "--views", "1", "--pool", "token", "--model", "vit-16-2-3"],
], ids=" ".join)
def test_fig8_other_methods_and_models_in_the_pipeline(tmp_path, flags):
    run_main(*PIPED, *flags, "--out", tmp_path / "one")
    start(tmp_path, 2, *PIPED, *flags, "--out", "piped")
    assert_same_runs(tmp_path / "one", tmp_path / "piped")


CTRL_C = """try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)        # torchrun's own"""


@pytest.mark.parametrize("happens, lines, words", [
    ("os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)", None, "Error"),
    (CTRL_C, 1, "stopped; continue with: python train.py --resume --out run"),
    ("pipeline.train.validate = lambda run: torch.tensor([torch.nan])", 1, "not a number"),
    ("pipeline.train.cff_step = None", None, "'NoneType' object is not callable"),
], ids=["dead process", "Ctrl-C", "nan", "mistake"])
def test_fig8_a_run_that_ends_early_says_why_and_continues(alone, tmp_path, happens, lines, words):
    """`happens` before the second epoch. Ctrl-C and a loss that is not a number give one line."""
    (tmp_path / "script.py").write_text(f"""import os, signal, sys, torch
sys.path.insert(0, {str(HERE)!r})
import pipeline
train_epoch, calls = pipeline.train_epoch, []
def counted(*arguments):
    calls.append(1)
    if len(calls) == 2:
        {happens}
    return train_epoch(*arguments)
pipeline.train_epoch = counted
pipeline.main()
""")
    argv = *PIPED, *FOUR, "--out", "run"
    (status, _, error), later = processes(tmp_path, 2, tmp_path / "script.py", *argv)
    assert status == 1 and words in error and lines in (None, error.count("\n")), error
    assert ("Traceback" in error) == (lines is None)
    assert happens != CTRL_C or later[0] == -signal.SIGINT and later[2] == ""
    start(tmp_path, 3, "--resume", "--out", "run")              # three continue what two began
    assert_same_runs(alone, tmp_path / "run")


def test_fig8_pipeline_continues_a_run_that_train_began(alone, tmp_path, monkeypatch):
    def stop(run, save=train.save):
        save(run)
        if run.epoch == 1:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume --out"):
        patch.setattr(train, "save", stop)
        run_main(*PIPED, *FOUR, "--out", tmp_path / "run")
    start(tmp_path, 2, "--resume", "--out", "run")
    assert_same_runs(alone, tmp_path / "run")
    start(tmp_path, 2, "--resume", "--out", "run")              # nothing is left to do in stage 1
    assert_same_runs(alone, tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_fig8_a_later_process_drops_the_layers_of_others(monkeypatch, rank):
    monkeypatch.setattr(pipeline.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(pipeline.dist, "get_rank", lambda: rank)
    model = vit.build_model("mlp-8-5", (1, 4, 4), 10)
    segment = pipeline.Segment(model, (1, 4, 4), views=2)
    assert len(segment.layers) == [2, 3][rank] and len(model.layers) == [5, 3][rank]


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
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--schedule", str(tmp_path)])
    with pytest.raises(SystemExit, match="trace.json is missing: no pipeline"):
        pipeline.main()
    pipeline.write_trace(tmp_path, [dict(zip(columns, row)) for row in rows])
    pipeline.main()
    lines = capsys.readouterr().out.splitlines()
    assert "1 batches on 2 processes: the longest chain of dependent steps has 2" in lines[0]
    assert lines[2].split() == ["1", "50.0%", "0.0%", "0.0%", "50.0%"]
    assert lines[3].split() == ["2", "75.0%", "12.5%", "0.0%", "12.5%"]


@pytest.mark.parametrize("world, flags, words", [
    (None, [], "torchrun --nproc-per-node 2 experiments/pipeline.py"),
    ("2", ["--algo", "bp"], "gradients cross all layers"),
    ("2", ["--algo", "collab"], "needs the goodness of all others"),
    ("4", ["--model", "vit-16-2-3", "--device", "cpu"], "4 processes for 3 layers"),
], ids=str)
def test_fig8_what_cannot_be_piped_is_refused(tmp_path, monkeypatch, world, flags, words):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        if world:
            monkeypatch.setenv(name, world)
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *flags, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="^pipeline.py: error: .*" + words):
        pipeline.main()
    assert not (tmp_path / "run").exists()
