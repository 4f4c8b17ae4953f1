"""Section 5.1 and Fig. 8 as tests: layers trained in parallel by real processes (pipeline.py).

    python -m pytest -q experiments/test_pipeline.py
"""
import inspect
import json
import multiprocessing
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
from test_runs import assert_same_runs, read_log, run_main

PIPED = ["--device", "cpu", "--patch-size", "16", "--limit", "225", "--batch-size", "64",
         "--epochs", "2", "--head-epochs", "1"]
FOUR = ["--model", "vit-16-2-4"]                                    # four layers

multiprocessing.set_forkserver_preload(["torch.distributed", "torchvision.transforms.v2"])


# ---------------------------------------------------------------------------------------- helpers

def torchrun(folder, n, script, *argv):
    """Run a script by torchrun in `folder`, one thread a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               n, script, *argv]                        # standalone: at a port that is free
    return subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          cwd=folder, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


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
    """Run a script in `folder` in n processes, one thread each, as torchrun would, but sooner: they
    are forked from a process that has imported torch. Returns (status, output, errors) of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"TORCHELASTIC_RUN_ID": "0", "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
             "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    fast = "forkserver" in multiprocessing.get_all_start_methods()
    context, running = multiprocessing.get_context("forkserver" if fast else "spawn"), []
    for rank in range(n):
        files = [str(folder / f"{name}{rank}.txt") for name in ("out", "err")]
        environment = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=run_script, args=([str(part) for part in (script, *argv)],
                                                           environment, *files))
        process.start()
        running.append((process, files))
    for process, _ in running:
        process.join(120)
        process.kill()                                              # if it hangs
        process.join()
    return [(process.exitcode, *(Path(file).read_text() for file in files))
            for process, files in running]


def start(folder, n, *argv):
    """Run pipeline.py in `folder` in n processes, and see that all end well."""
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
        done = torchrun(tmp_path, n, HERE / "pipeline.py", *argv)
        assert done.returncode == 0, done.stderr
        assert "pipeline.py --device" in json.loads((run / "config.json").read_text())["command"]
    else:
        start(tmp_path, n, *argv)
    assert_same_runs(alone, run)
    trace = pipeline.read_trace(run)                            # 4 batches, the last one smaller
    steps = sorted((row["process"], row["batch"]) for row in trace if row["event"] == "step")
    assert steps == [(process, batch) for process in range(n) for batch in range(4)]
    assert pipeline.longest_chain(trace) == n + 4 - 1           # L + N - 1 with a layer a process
    sent = [(row["batch"], row["waited_for"]) for row in trace
            if row["event"] == "send" and row["process"] == 0]
    assert sent == [(0, None), (0, None), (1, 0), (1, 0), (2, 1), (2, 1), (3, 2), (3, 2)], \
        "two views a batch, one batch waits for the next"


@pytest.mark.parametrize("flags", [
    ["--algo", "ff", "--model", "vit-16-2-3"],
    ["--algo", "symba", "--head", "--model", "mlp-16-3", "--alpha", "4"],
    ["--algo", "cff", "--views", "1", "--pool", "token", "--model", "vit-16-2-3"],
], ids=" ".join)
def test_fig8_other_methods_and_models_in_the_pipeline(tmp_path, flags):
    run_main(*PIPED, *flags, "--epochs", "1", "--out", tmp_path / "one")
    start(tmp_path, 2, *PIPED, *flags, "--epochs", "1", "--out", "piped")
    assert_same_runs(tmp_path / "one", tmp_path / "piped")


def pipeline_that(happens, folder):
    """A script in `folder`: pipeline.py, with happens() in each process before its 2nd epoch."""
    script = folder / "script.py"
    script.write_text(f"""import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import pipeline
{inspect.getsource(happens)}
whole, epochs = pipeline.train_epoch, []
def train_epoch(*arguments):
    epochs.append(1)
    if len(epochs) == 2:
        {happens.__name__}()
    return whole(*arguments)
pipeline.train_epoch = train_epoch
pipeline.main()
""")
    return script


def the_second_dies():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)


def ctrl_c_and_torchruns_own():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def test_fig8_a_dead_process_ends_the_run_which_goes_on_in_others(alone, tmp_path):
    run, script = tmp_path / "run", pipeline_that(the_second_dies, tmp_path)
    done = torchrun(tmp_path, 2, script, *PIPED, *FOUR, "--out", "run")
    assert done.returncode != 0 and (run / "log.csv").exists(), done.stderr
    assert [row["epoch"] for row in read_log(run)] == ["1"]
    start(tmp_path, 3, "--resume", "--out", "run")              # three go on with what two began
    assert_same_runs(alone, run)
    start(tmp_path, 2, "--resume", "--out", "run")              # nothing is left to do in stage 1
    assert_same_runs(alone, run)


def test_fig8_ctrl_c_is_one_line_however_often_torchrun_passes_it_on(alone, tmp_path):
    script = pipeline_that(ctrl_c_and_torchruns_own, tmp_path)
    (status, _, error), later = processes(tmp_path, 2, script, *PIPED, *FOUR, "--out", "run")
    assert error == "stopped; go on with: python train.py --resume --out run\n"
    assert status == 1 and later[0] == -signal.SIGINT and later[2] == ""
    run_main("--resume", "--out", tmp_path / "run")
    assert_same_runs(alone, tmp_path / "run")


def a_loss_is_no_number():
    pipeline.train.validate = lambda run: pipeline.torch.tensor([float("nan")])


def test_fig8_a_loss_that_is_no_number_ends_the_run_with_one_line(tmp_path):
    script = pipeline_that(a_loss_is_no_number, tmp_path)
    (status, out, error), _ = processes(tmp_path, 2, script, *PIPED, *FOUR, "--out", "run")
    assert status == 1 and "nan" in out.splitlines()[-1]
    assert error.startswith("train.py: a loss is not a number") and error.count("\n") == 1
    assert [row["epoch"] for row in read_log(tmp_path / "run")] == ["1"]


def test_fig8_pipeline_goes_on_with_a_run_that_train_began(alone, tmp_path, monkeypatch):
    def stop(self, best, save=train.Run.save):
        save(self, best)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume --out"):
        patch.setattr(train.Run, "save", stop)
        run_main(*PIPED, *FOUR, "--out", tmp_path / "run")
    assert len(read_log(tmp_path / "run")) == 1
    start(tmp_path, 2, "--resume", "--out", "run")
    assert_same_runs(alone, tmp_path / "run")


def test_fig8_layers_are_shared_out_evenly_and_in_order():
    for L in range(1, 7):
        for n in range(1, L + 1):
            parts = [pipeline.share(L, n, rank) for rank in range(n)]
            assert [l for part in parts for l in part] == list(range(L))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("rank", [0, 1])
def test_fig8_a_later_process_drops_the_layers_of_others(monkeypatch, rank):
    monkeypatch.setattr(pipeline.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(pipeline.dist, "get_rank", lambda: rank)
    model = vit.build_model("mlp-8-5", (1, 4, 4), 10)
    segment = pipeline.Segment(model, (1, 4, 4), views=2)
    assert len(segment.layers) == [2, 3][rank] and len(model.layers) == [5, 3][rank]
    assert segment.shape == (8,) and segment.messages == 2


# ----------------------------------------------------------------------------------- the schedule

@pytest.mark.parametrize("waits, n, chain", [
    ("nothing", 2, 2 + 5 - 1),                          # a process for its input alone
    ("the message before to leave", 2, 2 + 5 - 1),      # as here
    ("the message before to leave", 3, 3 + 5 - 1),
    ("its own message to be taken", 2, 2 * 5),          # no room: it and the last work by turns
    ("its own message to be taken", 3, 1 + 2 * 5),
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
    got = pipeline.longest_chain(trace)
    assert got == chain, (f"Fig. 8, 5 batches on {n} processes; the last sender waits for {waits}: "
                          f"the longest chain has {chain} steps; got {got}")


def test_fig8_schedule_says_who_worked_and_waited(tmp_path, monkeypatch, capsys):
    rows = [(0, 0, "send", "", 0.5, 0.5), (0, 0, "step", "", 0, 1),
            (1, 0, "receive", 0, 0.25, 0.5), (1, 0, "step", "", 0.25, 2)]
    pipeline.write_trace(tmp_path, rows)
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--schedule", str(tmp_path)])
    pipeline.main()
    lines = capsys.readouterr().out.splitlines()
    assert "1 batches on 2 processes: the longest chain of dependent steps has 2" in lines[0]
    assert lines[2].split() == ["1", "50.0%", "0.0%", "0.0%", "50.0%"]
    assert lines[3].split() == ["2", "75.0%", "12.5%", "0.0%", "12.5%"]
    assert (tmp_path / "schedule.png").exists() or "pip install matplotlib" in lines[-1]


# --------------------------------------------------------------------------------- what is refused

def refused(monkeypatch, capsys, world, *argv):
    """The line with which pipeline.py ends, with status 2, started as one of `world` processes."""
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    if world:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", world)
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        pipeline.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    return line


@pytest.mark.parametrize("world, flags, words", [
    (None, [], "torchrun --nproc-per-node 2 experiments/pipeline.py"),
    ("2", ["--algo", "bp"], "gradients cross all layers"),
    ("2", ["--algo", "scl"], "gradients cross all layers"),
    ("2", ["--algo", "collab"], "needs the goodness of all others"),
    ("4", ["--model", "vit-16-2-3", "--device", "cpu"], "4 processes for 3 layers"),
], ids=str)
def test_fig8_what_cannot_be_piped_is_refused(tmp_path, capsys, monkeypatch, world, flags, words):
    assert words in refused(monkeypatch, capsys, world, *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fig8_no_schedule_of_a_run_that_no_pipeline_trained(tmp_path, capsys, monkeypatch):
    assert "trace.csv" in refused(monkeypatch, capsys, None, "--schedule", tmp_path)


def test_fig8_help_tells_of_the_pipeline_and_of_the_flags(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        pipeline.main()
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "--schedule runs/NAME" in out and "--batch-size" in out
