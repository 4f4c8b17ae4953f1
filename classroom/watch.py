"""What grade.py knows of a student's file: sandbox.py runs it in a process, and is watched here.

A file that loops, ends Python or crashes takes its process with it; a new one grades the tasks
that are left. Nothing of the student's runs in this process.
"""
import ast
import codecs
import io
import json
import os
import queue
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
import tokenize
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen

START = 300         # seconds that a process may take before a student's code runs, importing torch
LIVE = set()        # the processes that run


# ------------------------------------------------------------------------- the process and its say

class Child:
    """sandbox.py at work on a job, in a folder that it may fill; what it says are its messages.

    A message carries a token that the job brings. All else that comes is kept in part, or dropped.
    """

    def __init__(self, job, folder):
        self.token, self.messages = secrets.token_hex(16), queue.Queue()
        self.printed, self.traces = bytearray(), deque(maxlen=400)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                       "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1",
                       "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        command = [sys.executable, Path(__file__).with_name("sandbox.py")]
        self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, cwd=folder,
                             env=environment, start_new_session=True)   # no effect on Windows
        LIVE.add(self)
        self.printing = threading.Thread(target=self.keep_what_it_prints, daemon=True)
        self.printing.start()
        threading.Thread(target=self.listen, daemon=True).start()
        try:
            self.process.stdin.write(json.dumps({**job, "token": self.token}).encode())
            self.process.stdin.close()
        except OSError:                                 # it has ended: `listen` notices
            pass

    def listen(self):
        """Sort what comes on stderr, which sandbox.py keeps for itself."""
        while line := self.process.stderr.readline(1_000_000):
            token, _, message = line.partition(b" ")
            if token == self.token.encode():
                self.messages.put(json.loads(message))
            else:                                       # a traceback, by the rules of faulthandler
                self.traces.append(line[:300].decode("utf-8", "replace").rstrip())
        self.messages.put(["ended", self.process.wait()])

    def keep_what_it_prints(self):
        """Read stdout to its end, for a full pipe would stop the process; keep its beginning."""
        while piece := self.process.stdout.read1(65536):
            self.printed += piece[:10_000 - len(self.printed)]

    def message(self, until):
        """The next message; ["late"] if none has come at this time, ["ended", status] after all."""
        try:
            return self.messages.get(timeout=max(until - time.monotonic(), 0))
        except queue.Empty:
            return ["late"]

    def where(self):
        """The innermost line of the student's in the last traceback, ", in NAME, line 3", or ""."""
        found = re.search(r'the_students_file.py", line (\d+) in (\S+)', "\n".join(self.traces))
        return f", in {found[2]}, line {found[1]}" if found else ""

    def kill(self):
        """End it, and what it started where the system knows what that is."""
        LIVE.discard(self)
        try:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        except OSError:
            pass
        self.process.wait()
        self.printing.join(timeout=1)                   # what it started may hold the pipe


# -------------------------------------------------------------------------------- the verdict

@dataclass
class Verdict:
    """What is known of a file: the outcome of each test, and what to say about it."""
    name: str
    refused: str = ""                                   # why it cannot be read
    taken: dict = field(default_factory=dict)           # name: module, answers of the project's
    numbers: dict = field(default_factory=dict)         # test: its task, for all that are graded
    outcomes: dict = field(default_factory=dict)        # test: what the child said of it
    words: dict = field(default_factory=dict)           # task: what fails first
    printed: str = ""

    def tasks(self):
        """{task: "done", "to do" or how many of its tests pass}; what was not said has failed."""
        states = {}
        for number in dict.fromkeys(self.numbers.values()):
            outcomes = [self.outcomes.get(test, "failed") for test, task in self.numbers.items()
                        if task == number]
            states[number] = f"{outcomes.count('passed')} of {len(outcomes)}"
            if set(outcomes) in ({"passed"}, {"to do"}):
                states[number] = "done" if outcomes[0] == "passed" else "to do"
        return states

    def remarks(self):
        """[(task, words)] of what is worth saying: not that what is to do is to do."""
        states = self.tasks()
        plain = {number: rf"to do: (task{number:02d}$|.* has no )" for number in states}
        return [(number, words) for number, words in sorted(self.words.items())
                if states[number] != "to do" or not re.match(plain[number], words)]

    def status(self):
        """The exit status: 0 if all that was asked for is done, 1 if not, 2 if none was graded."""
        if self.refused or not self.numbers:
            return 2
        return 0 if set(self.tasks().values()) == {"done"} else 1


def source(path):
    """The text of a file of Python, whatever its encoding; raises what it or its syntax raises."""
    if not path.is_file() and path.exists():
        raise ValueError("it is no file")
    raw = path.read_bytes()
    if path.suffix == ".ipynb":
        raise ValueError("a notebook: save its code as a file of Python, mine.py, and grade that")
    if len(raw) > 1_000_000:
        raise ValueError("more than 1 MB: the tasks need some 10 KB")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"                             # as PowerShell's > writes
    else:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    text = raw.decode(encoding)
    ast.parse(text, path.name)
    return text


def examine(path, only, seconds):
    """The Verdict on a file, each task within so many seconds; only: words of pytest's -k."""
    verdict, stopped = Verdict(str(path)), set()
    try:
        text = source(Path(path))
    except Exception as reason:                         # whatever the parser can raise
        verdict.refused = f"{type(reason).__name__}: {reason}"
        return verdict
    number = 0
    while number is not None:
        skip = [test for test, task in verdict.numbers.items()
                if test in verdict.outcomes or task in stopped]
        job = {"name": Path(path).name, "path": str(Path(path).resolve()), "text": text,
               "only": only, "skip": skip, "seconds": seconds}
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            child = Child(job, folder)
            try:
                number = hear(child, verdict, seconds)
            finally:
                child.kill()
        verdict.printed = (verdict.printed + child.printed.decode("utf-8", "replace"))[:10_000]
        stopped.add(number)
    return verdict


def hear(child, verdict, seconds):
    """Write into the verdict what a child says; returns the task at which it stopped, or None.

    Of tests it says something only while they run, and these are what was found before a
    student's line was read.
    """
    test, until = None, time.monotonic() + START
    while True:
        kind, *rest = child.message(until)
        if kind == "found":                             # then it reads the student's file
            verdict.numbers = verdict.numbers or rest[0]
            until = time.monotonic() + seconds + 1      # its own alarm, for the traceback, is first
        elif kind == "refused":
            verdict.refused = rest[0]
            return None
        elif kind == "taken":
            verdict.taken = rest[0]
        elif kind == "begins" and rest[0] in verdict.numbers:
            if test is None or verdict.numbers[rest[0]] != verdict.numbers[test]:
                until = time.monotonic() + seconds + 1
            test = rest[0]
        elif kind == "ends" and rest[0] == test:
            verdict.outcomes[test] = rest[1]
            if rest[1] != "passed":
                verdict.words.setdefault(verdict.numbers[test], rest[2])
        elif kind == "over":
            return None
        elif kind in ("late", "ended"):
            if kind == "late":
                words = f"no answer in {seconds:g} s{child.where()}"
            else:
                words = f"Python ended, exit status {rest[0]}{child.where()}"
            if test is None and not verdict.numbers:    # no fault of the student's
                print("\n".join(child.traces), child.printed.decode("utf-8", "replace"),
                      file=sys.stderr)
            if test is None:
                verdict.refused = words if verdict.numbers else "no tests were found, see above"
                return None
            number = verdict.numbers[test]
            verdict.outcomes.setdefault(test, "failed")
            verdict.words.setdefault(number, f"{words} (in {test.split('::')[-1]})")
            return number
