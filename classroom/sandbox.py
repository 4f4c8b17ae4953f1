"""The process that runs a student's file: watch.py starts it, and believes its messages alone.

It gets a job as JSON on stdin. Before a line of the student's is read, it finds the tests, cuts
the answers out of the project's modules and remembers what no student may change; a token that
the job brings goes with each message. What this does not keep out is said in README.md.
"""
import dis
import faulthandler
import inspect
import json
import os
import random
import sys
import types
from pathlib import Path

import pytest
import torch

from grade import ROOT, TASKS, TEST_FILES

MORE_MEMORY = 4 * 2**30     # bytes that a student's code may take, where the system can limit it
SHORT = 40                  # instructions; two who write so little may well write the same
# test: (its task, its place among the task's tests)
PLACES = {test: (number, place) for number, (_, _, tests) in TASKS.items()
          for place, test in enumerate(tests)}
ANSWERS = {name: (module, getattr(module, name))
           for _, names, _ in TASKS.values() for module, name in names}


# ----------------------------------------------------------- answers that are not the student's own

def project_modules():
    """{name: module} of all that is imported from the project's folders."""
    folders = {ROOT, *(path.parent for path in TEST_FILES)}
    return {name: module for name, module in list(sys.modules.items())
            if Path(getattr(module, "__file__", None) or ".").parent in folders}


def cut_out_answers():
    """Give who imports the project from now on copies of its modules, without the answers.

    The tests have imported the modules themselves. Returns what stands for the answers.
    """
    blanks = {name: blank(name) for name in ANSWERS}
    originals = project_modules()
    copies = {name: types.ModuleType(name) for name in originals}
    instead = {id(module): copies[name] for name, module in originals.items()}
    instead.update({id(answer): blanks[name] for name, (_, answer) in ANSWERS.items()})
    for name, module in originals.items():
        for key, value in vars(module).items():         # by whatever name it knows an answer
            setattr(copies[name], key, instead.get(id(value), value))
    sys.modules.update(copies)
    return blanks


def blank(name):
    """What stands for an answer: a function or class that says so when it is called."""
    module, answer = ANSWERS[name]
    number = next(n for n, (_, names, _) in TASKS.items() if (module, name) in names)

    def refuse(*arguments, **keywords):
        raise NotImplementedError(f"{name} of {module.__name__}.py is the answer of "
                                  f"task{number:02d}, to be written")
    if inspect.isclass(answer):
        return type(name, (torch.nn.Module,), {"__init__": refuse, "__module__": module.__name__})
    return refuse


def is_taken(mine, name, blanks, file):
    """Whether a function or class in a student's file is the project's, renamed inside perhaps."""
    if mine is blanks[name]:
        return True
    mine, answer = code(mine), code(ANSWERS[name][1])
    if mine is None or recipe(mine) != recipe(answer):
        return False
    return len(recipe(answer)) > SHORT or mine.co_filename != str(file)


def code(thing):
    """The code object of a function, or of a class's forward; None of anything else."""
    thing = vars(thing).get("forward") if inspect.isclass(thing) else thing
    return getattr(inspect.unwrap(thing), "__code__", None)


def recipe(code):
    """What code does, without lines, comments, docstring and the names of its variables."""
    steps = []
    for step in dis.get_instructions(code):
        named = step.opcode in dis.hasname or step.opcode in dis.hasconst
        what = step.argval if named else step.arg
        steps.append((step.opname, recipe(what) if inspect.iscode(what) else repr(what)))
    return steps


# --------------------------------------------------------------------- what no student may change

def namespaces():
    """What the tests are made of, as {name: module or class}."""
    names = ("builtins", "math", "pytest", "torch", "torch.autograd", "torch.nn",
             "torch.nn.functional")
    return {**{name: sys.modules[name] for name in names}, **project_modules(),
            "torch.Tensor": torch.Tensor, "torch.nn.Module": torch.nn.Module}


class Belongings:
    """The functions of some namespaces as they are now, to be put back."""

    PARTS = ("__code__", "__defaults__", "__kwdefaults__")

    def __init__(self, spaces):
        self.functions, self.parts = [], []
        for space_name, space in spaces.items():
            for key in dir(space):
                name, value = f"{space_name}.{key}", vars(space).get(key)   # inherited ones: None
                if inspect.isroutine(value) or key not in vars(space):
                    self.functions.append((name, space, key, value))
                if inspect.isfunction(value):
                    self.parts += [(name, value, part, getattr(value, part)) for part in self.PARTS]

    def put_back(self):
        """Undo what was changed; returns its names."""
        changed = []
        for name, space, key, value in self.functions:
            if vars(space).get(key) is not value:
                delattr(space, key) if value is None else setattr(space, key, value)
                changed.append(name)
        for name, function, part, value in self.parts:
            if getattr(function, part) is not value:
                setattr(function, part, value)
                changed.append(name)
        return changed


def settle(folder, path):
    """Put the process's own settings back to where every test expects them."""
    os.chdir(folder)
    sys.path[:] = path
    sys.setrecursionlimit(1000)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.autograd.set_detect_anomaly(False)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)


def limit_memory():
    """Let the process take no more than MORE_MEMORY beyond what it has, on Linux."""
    try:
        import resource                                 # not on Windows
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        limit = pages * resource.getpagesize() + MORE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):          # a limit of the user's own is lower
        pass


# -------------------------------------------------------------------------------------- the grading

class Grader:
    """A pytest plugin: a task's tests run on the functions of a student's file; `say` tells how."""

    def __init__(self, job, say, channel):
        self.job, self.say, self.channel = job, say, channel
        self.file = Path.cwd() / "the_students_file.py"
        self.mine, self.task, self.outcome = types.ModuleType("the_students_file"), None, None

    def pytest_configure(self, config):
        config.option.tbstyle = "native"    # pytest's own reads a test's whole file at each failure

    def pytest_collectreport(self, report):
        if report.failed:
            print(report.longreprtext)

    def pytest_itemcollected(self, item):
        if item.originalname in PLACES:                 # so that -k finds it
            item.extra_keyword_matches.add(f"task{PLACES[item.originalname][0]:02d}")

    def pytest_collection_modifyitems(self, items):
        graded = [item for item in items if item.originalname in PLACES]
        items[:] = sorted(graded, key=lambda item: PLACES[item.originalname])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if session.testsfailed:                         # a file of tests cannot be imported
            return
        self.say("found", {item.nodeid: PLACES[item.originalname][0] for item in session.items})
        skip = set(self.job["skip"])
        session.items[:] = [item for item in session.items if item.nodeid not in skip]
        if session.items:
            self.read()

    def read(self):
        """Run the student's file; say why it cannot be, or which answers are not its own."""
        self.belongings = Belongings(namespaces())
        self.settings = (self.file.parent, list(sys.path))
        blanks = cut_out_answers()
        self.file.write_text(self.job["text"], encoding="utf-8", newline="")    # for tracebacks
        sys.modules["the_students_file"] = self.mine
        self.mine.__file__ = self.job["path"]
        limit_memory()
        self.set_alarm()
        refused = ""
        try:
            exec(compile(self.job["text"], str(self.file), "exec"), vars(self.mine))
        except BaseException as reason:                 # whatever a file of Python can raise
            words = 'sys.exit() and main() belong under if __name__ == "__main__":'
            if not isinstance(reason, SystemExit):
                words = " ".join(str(reason).split())[:300]
            refused = f"{type(reason).__name__}: {words}"
        changed = self.belongings.put_back()
        if changed and not refused:
            refused = f"it changes {changed[0]}, which the tests need"
        if refused:
            self.say("refused", refused)
            os._exit(2)
        taken = {}
        for name, (module, _) in ANSWERS.items():
            if is_taken(getattr(self.mine, name, None), name, blanks, self.file):
                taken[name] = module.__name__
                delattr(self.mine, name)
        self.say("taken", taken)

    def set_alarm(self):
        """Say where the code is shortly before watch.py loses its patience."""
        faulthandler.dump_traceback_later(self.job["seconds"], file=self.channel)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        number, _ = PLACES[item.originalname]
        if number != self.task:
            self.task = number
            self.set_alarm()
        settle(*self.settings)
        self.outcome = ["failed", ""]
        self.say("begins", item.nodeid)
        result = yield
        self.say("ends", item.nodeid, *self.outcome)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        _, names, _ = TASKS[PLACES[item.originalname][0]]
        try:
            with pytest.MonkeyPatch.context() as project:
                for module, name in names:
                    mine = getattr(self.mine, name, self.to_do(name))
                    project.setattr(module, name, mine)
                result = yield
        finally:
            changed = self.belongings.put_back()
        assert not changed, f"{self.job['name']} changes {changed[0]}, which the tests need"
        return result

    def to_do(self, name):
        """What stands for a function that is not in the file."""
        def missing(*arguments, **keywords):
            raise NotImplementedError(f"{self.job['name']} has no {name}")
        return missing

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call" or report.failed:
            self.outcome = [report.outcome, ""]
            if call.excinfo and call.excinfo.errisinstance(NotImplementedError):
                self.outcome = ["to do", f"to do: {call.excinfo.value}"[:2000]]
            elif call.excinfo:
                self.outcome[1] = self.explain(item, call)[:2000]
        return report

    def explain(self, item, call):
        """What went wrong: the test's words, or which line of the student's code raised what."""
        error, where = call.excinfo.value, self.where(call.excinfo)
        if isinstance(error, AssertionError) and not where:
            return str(error).split("\nassert")[0] + f" (in {item.name})"
        words = " ".join(str(error).split())[:300]
        where = where or "what your code gave"
        return f"{where} raised {type(error).__name__}: {words} (in {item.name})"

    def where(self, excinfo):
        """The innermost line of the student's file in a traceback, "" if none raised."""
        mine = [entry for entry in excinfo.traceback if Path(entry.path) == self.file]
        if not mine:
            return ""
        return f"{self.job['name']}, line {mine[-1].lineno + 1}, in {mine[-1].name},"


def main():
    """Do the job that stdin brings; stdout and stderr are the student's then, stdin is empty."""
    job = json.loads(sys.stdin.buffer.read())
    channel = os.fdopen(os.dup(2), "wb")                # stderr, kept for messages
    os.dup2(1, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable(file=channel)                   # a crash says where, too
    token, dumps = job.pop("token"), json.dumps

    def say(*message):
        channel.write(f"{token} {dumps(message)}\n".encode())
        channel.flush()

    arguments = [*map(str, TEST_FILES), "-p", "no:terminal", "-p", "no:cacheprovider",
                 "-p", "no:faulthandler", "--capture=no"]
    arguments += ["-k", job["only"]] if job["only"] else []
    status = pytest.main(arguments, plugins=[Grader(job, say, channel)])
    if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED,
                  pytest.ExitCode.NO_TESTS_COLLECTED):
        say("over")


if __name__ == "__main__":
    main()
