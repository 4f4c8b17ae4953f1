"""Grade functions that a student wrote from the paper; README.md describes the tasks.

    python classroom/grade.py --template mine.py                    write a file to start from
    python classroom/grade.py mine.py [-k task04]                   grade it, from any folder
    python classroom/grade.py submissions/*.py --csv grades.csv     one row per student

A child process runs the project's own tests with the student's functions in the project's place,
and notes each result at once. If it hangs or dies, a new child grades the tasks that are left.
"""
import argparse
import codecs
import csv
import faulthandler
import glob
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import indent

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

TEST_FILES = ["classroom/test_by_hand.py", "test_cff.py", "experiments/test_pipeline.py"]
TASKS = {       # number: (paper, what to write, the tests that grade it, simplest first)
    1: ("Eqs. 1 and 2", ["losses.goodness", "losses.ff_loss"],
        ["test_worked_example_of_goodness", "test_eq1_goodness_is_the_mean_of_squares",
         "test_eq2_is_binary_cross_entropy_with_logits"]),
    2: ("Eq. 3", ["losses.contrastive_loss"],
        ["test_eq3_of_two_equal_rows_is_zero", "test_worked_example_of_eq3",
         "test_eq3_is_a_double_loop", "test_eq3_of_a_collapsed_layer_is_ln_2B_minus_1"]),
    3: ("Eq. 12", ["losses.inner_contrastive_loss"],
        ["test_worked_example_of_eq12", "test_eq12_is_a_double_loop",
         "test_eq12_is_at_most_eq3_by_jensen"]),
    4: ("Eqs. 14-17, Sec. 3.5", ["losses.marginal_contrastive_loss", "losses.saturated"],
        ["test_worked_example_of_the_margin", "test_eq15_to_eq17_are_a_double_loop",
         "test_eq14_margin_zero_is_eq3", "test_eq17_of_a_collapsed_layer_is_ln_2B_minus_1",
         "test_section_3_5_saturated_pairs_are_positives_above_1_minus_m",
         "test_exactly_at_the_kink_a_pair_is_unsaturated"]),
    5: ("Eq. 18", ["losses.grad_anchor"],
        ["test_worked_example_of_eq18", "test_eq18_gradient_of_the_anchor",
         "test_eq18_term_by_term", "test_eq18_of_an_anchor_without_positives_is_zero",
         "test_eq18_exactly_at_the_kink"]),
    6: ("Eqs. A.5-A.7", ["losses.grad_positive", "losses.grad_negative"],
        ["test_worked_example_of_a5_a6_a7", "test_a5_a_saturated_positive_gets_nothing",
         "test_a6_gradient_of_an_unsaturated_positive", "test_a7_gradient_of_a_negative",
         "test_a7_of_an_anchor_without_positives_is_zero", "test_a6_exactly_at_the_kink"]),
    7: ("Algorithm 1, left", ["cff.cff_step"],
        ["test_algorithm1_on_an_mlp_of_one_layer", "test_algorithm1_clears_old_gradients",
         "test_algorithm1_left_line_by_line", "test_algorithm1_is_local",
         "test_table6_one_view_is_one_forward_pass"]),
    8: ("Algorithm 1, right", ["cff.wrong_labels", "cff.ff_step"],
        ["test_wrong_labels_are_never_right_uniform_and_seeded",
         "test_algorithm1_right_between_two_layers", "test_algorithm1_right_line_by_line",
         "test_ff_symba_and_collab_are_local"]),
    9: ("Sec. 3.4", ["vit.patchify", "vit.Attention", "vit.EncoderLayer"],
        ["test_patches_put_back_together_are_the_image", "test_attention_by_hand",
         "test_section_3_4_attention_is_torchs", "test_section_3_4_encoder_layer_is_torchs"]),
    10: ("Figs. 4a and 8", ["losses.margins", "pipeline.longest_chain"],
         ["test_fig4a_margins", "test_fig8_longest_chain_by_hand"]),
    11: ("the mean of Eq. 13, with less work", ["pooled.pooled_output"],
         ["test_pooled_output_part_by_part",
          "test_pooled_output_gives_each_parameter_its_gradient",
          "test_pooled_output_takes_fewer_products"]),
}
FILE = "students_file.py"       # the child's copy of what is graded
PRINTED = 10_000                # characters kept of what a student's code prints
MEMORY = 4 * 2**30              # bytes that a child may take, on Linux


def task(number):
    return f"task{number:02d}"


def answers(number):
    """[(module, name, function or class)]: what a task asks for, as the project has it."""
    names = [name.split(".") for name in TASKS[number][1]]
    modules = [importlib.import_module(module) for module, _ in names]
    return [(module, name, getattr(module, name)) for module, (_, name) in zip(modules, names)]


# ------------------------------------------------------------------------------ the template

def template():
    """The text of the file a student starts from: signatures and docstrings of all tasks."""
    parts = ['"""My solutions to the tasks of classroom/README.md."""\nimport math\n\n'
             'import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n']
    for number, (paper, _, _) in TASKS.items():
        stubs = [stub(answer, number) for _, _, answer in answers(number)]
        parts.append(f"# {task(number)}: {paper}\n\n" + "\n\n".join(stubs))
    return "\n\n".join(parts)


def stub(answer, number):
    """The head of a function or class, to the end of its docstring; its code is to be written."""
    source, to_write = inspect.getsource(answer), f'raise NotImplementedError("{task(number)}")\n'
    head = source[:source.index('"""', source.index('"""') + 3) + 3] + "\n"
    if inspect.isfunction(answer):
        return f"{head}    {to_write}"
    methods = re.findall(r"    def (?:__init__|forward)\(.*\n", source)
    return head + "".join(f"\n{method}        {to_write}" for method in methods)


# ----------------------------------------------------- the child process: pytest with a plugin

def hide_answers():
    """From now on, whoever imports the project gets copies of its modules without the answers."""
    instead = {id(answer): to_do(f"{task(number)}: {name} of {module.__name__}.py is the answer")
               for number in TASKS for module, name, answer in answers(number)}
    folders = [ROOT, *((ROOT / file).parent for file in TEST_FILES)]
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent in folders:
            sys.modules[name] = types.ModuleType(name)
            for key, value in vars(module).items():             # an answer may have another name
                setattr(sys.modules[name], key, instead.get(id(value), value))


def to_do(text):
    """What stands in the place of a function that a student has not written."""
    def refuse(*arguments, **keywords):
        raise NotImplementedError(text)
    return refuse


def guarded(mine, theirs, name):
    """`mine`, called with copies of its tensors; it may not change them, or return None.

    theirs: the project's function, for the names of the arguments.
    """
    parameters = list(inspect.signature(theirs).parameters)

    def call(*arguments, **keywords):
        copies = [value.clone() if torch.is_tensor(value) else value for value in arguments]
        result = mine(*copies, **keywords)
        for parameter, value, copy in zip(parameters, arguments, copies):
            assert not torch.is_tensor(value) or torch.equal(value, copy), \
                f"{name} changes its argument {parameter}: compute a new tensor instead"
        assert result is not None, f"{name} returned None: is its `return` missing?"
        return result
    return call


def students_lines(text):
    """The lines of the student's file in a traceback: ["line 3 in goodness"]."""
    found = re.findall(rf'{FILE}", line (\d+),? in (\S+)', text)
    return [f"line {line} in {function}" for line, function in found]


def explain(error, test):
    """(outcome, words) of a test that raised an error."""
    words = str(error).split("\nassert")[0][:2000]
    where = students_lines("".join(traceback.format_tb(error.__traceback__)))
    if isinstance(error, NotImplementedError) and re.match(r"task\d\d", words):
        return "to do", f"to do: {words}"
    if where or not isinstance(error, AssertionError):
        where = where[-1] if where else "the test of what your code returned"
        words = f"{where} raised {type(error).__name__}: {' '.join(words.split())[:300]}"
    difference = re.search(r"the largest difference is (\S+)$", words)
    if difference and float(difference[1]) < 1e-6:
        words += "; float32 rounding: use P.to(f)"
    return "failed", f"{words} (in {test})"


class Plugin:
    """Runs the tests of tasks, with the functions of `self.mine` in the project's place."""

    def __init__(self, folder, seconds, numbers):
        self.folder, self.seconds, self.numbers = Path(folder), seconds, numbers
        self.answers = {number: answers(number) for number in TASKS}
        self.notes = open(self.folder / "grade.notes", "w", encoding="utf-8", buffering=1)
        self.trace = open(self.folder / "grade.trace", "w", encoding="utf-8")

    def run(self):
        """Run pytest without the settings in the project's folder and above; returns its status."""
        settings = self.folder / "pytest.ini"
        settings.write_text("[pytest]\n", encoding="utf-8")
        os.chdir(ROOT)                                  # pytest misreads a "[" in a path
        return pytest.main([*TEST_FILES, "-c", str(settings), "--rootdir=.", "--noconftest",
                            "--capture=no", "-p", "no:terminal", "-p", "no:cacheprovider",
                            "-p", "no:faulthandler"], plugins=[self])

    def note(self, *words):
        """Write a line for the parent. Unless another follows in time, the child ends itself."""
        self.notes.write(json.dumps(words) + "\n")
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.trace)

    def pytest_collectreport(self, report):
        if report.failed:                               # no fault of the student's
            print(report.longreprtext)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        """Read the student's file, now that the tests have imported the project; then grade it."""
        hide_answers()
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        if sys.platform == "linux":
            import resource                             # Windows has none
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        self.note("begun")
        try:
            self.mine = importlib.import_module(Path(FILE).stem)
        except BaseException as error:                  # whatever a file of Python can raise
            where = students_lines("".join(traceback.format_tb(error.__traceback__)))[-1:]
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.note("refused", ": ".join([*where, words]).replace(" in <module>", ""))
            return True
        self.note("read")
        for number in self.numbers:
            self.note(number, *judge(number, list(self.outcomes(number, session.items))))
        return True

    def outcomes(self, number, items):
        """Yield (test, outcome, words) for each case of a task's tests, simplest first."""
        for item in (item for test in TASKS[number][2] for item in items
                     if item.originalname == test):
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float32)      # a student's code may have set these two
            torch.set_grad_enabled(True)
            with pytest.MonkeyPatch.context() as project:
                for module, name, theirs in self.answers[number]:
                    mine = getattr(self.mine, name, to_do(f"{task(number)}, {name}"))
                    if hasattr(mine, "forward"):        # a class
                        forward = guarded(mine.forward, theirs.forward, name)
                        project.setattr(mine, "forward", forward)
                    else:
                        mine = guarded(mine, theirs, name)
                    project.setattr(module, name, mine)
                item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
            yield item.originalname, *self.outcome

    def pytest_runtest_makereport(self, item, call):
        """A report without a traceback, which would take pytest longer than the test."""
        if call.excinfo:
            self.outcome = explain(call.excinfo.value, item.originalname)
        elif call.when == "call":
            self.outcome = "passed", ""
        return pytest.TestReport(item.nodeid, item.location, {},
                                 "failed" if call.excinfo else "passed", None, call.when)


def judge(number, outcomes):
    """(state, words) of a task: "done", "to do" or how many tests pass, and what fails first."""
    tests = {test: {outcome for name, outcome, _ in outcomes if name == test}
             for test in TASKS[number][2]}
    passed = list(tests.values()).count({"passed"})
    words = next((words for _, outcome, words in outcomes if outcome != "passed"), "")
    if all(outcome == "to do" for _, outcome, _ in outcomes):
        own = words.startswith(f"to do: {task(number)}") and "answer" not in words
        return "to do", "" if own else words
    return "done" if passed == len(tests) else f"{passed} of {len(tests)}", words


def child(folder, seconds, *numbers):
    plugin = Plugin(folder, float(seconds), [int(number) for number in numbers])
    faulthandler.enable(plugin.trace)                   # a crash leaves its line, too
    plugin.run()
    os._exit(0)


# ------------------------------------------------------------------- the parent: children, reports

def examine(path, numbers, seconds):
    """Grade tasks of a file: {task: (state, words)}, what it printed, why it cannot be read."""
    tasks, printed, left = {}, "", list(numbers)
    try:
        source = read_source(path)
    except Exception as error:                          # whatever the parser can raise
        return {}, "", f"{type(error).__name__}: {error}"
    while left:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            Path(folder, FILE).write_bytes(source)
            status = run_child(folder, seconds, left)
            notes, trace, more = (Path(folder, f"grade.{name}").read_text("utf-8", "replace")
                                  for name in ("notes", "trace", "printed"))
        notes = {key: words for key, *words in map(json.loads, notes.splitlines())}
        printed = (printed + more)[:PRINTED]
        ended = f"Python ended, exit status {status}"
        if "Timeout" in trace:
            ended = f"no result in {seconds:g} s"
        ended = ", at ".join([ended, *students_lines(trace)[:1]])
        if "read" not in notes:
            return {}, printed, notes.get("refused", [ended])[0]
        tasks |= {number: notes[number] for number in left if number in notes}
        left = [number for number in left if number not in notes]
        if left:                                        # the first of them has ended the child
            stopped = left.pop(0)
            tasks[stopped] = f"0 of {len(TASKS[stopped][2])}", ended
    return tasks, printed, ""


def report(path, tasks, printed, refused):
    lines = [printed.rstrip("\n")] if printed else []
    lines += [f"{path} cannot be read: {refused}"] if refused else []
    for number, (state, words) in tasks.items():
        names = ", ".join(name.split(".")[1] for name in TASKS[number][1])
        lines.append(f"{task(number)}  {state:9s} {names} ({TASKS[number][0]})")
        lines += [indent(words, 8 * " ")] if words else []
    return "\n".join(lines)


def read_source(path):
    """The bytes of a file of Python; raises what reading it or its syntax raises."""
    if path.endswith(".ipynb"):
        raise ValueError("a notebook: save its code as a Python file, mine.py, and grade that")
    source = Path(path).read_bytes()
    if source.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is saved as UTF-16: save it as UTF-8")
    compile(source, Path(path).name, "exec")
    return source


def run_child(folder, seconds, numbers):
    """Run `child` on this folder in a process; returns its exit status."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg",
                "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "PYTEST_ADDOPTS": "",
                "PYTEST_PLUGINS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, Path(__file__).resolve(), "--child", folder, seconds, *numbers]
    with open(Path(folder, "grade.printed"), "wb") as printed:
        return subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL,
                              stdout=printed, stderr=printed, env=os.environ | settings).returncode


# ------------------------------------------------------------------------------ command line

def grade(arguments):
    """Run a command line; returns its exit status. Raises ValueError and OSError, in words."""
    parser = argparse.ArgumentParser(prog="grade.py", description="Grade files of the tasks.")
    parser.add_argument("files", nargs="*", metavar="mine.py")
    parser.add_argument("--template", metavar="mine.py", help="write a new file to start from")
    parser.add_argument("-k", dest="only", default=[], action="append", metavar="task04",
                        help="grade this task only; can be repeated")
    parser.add_argument("--seconds", type=float, default=60, help="limit for a task, default 60")
    parser.add_argument("--csv", metavar="grades.csv", help="write one row per file")
    parser.add_argument("--reports", metavar="DIR", help="write one text file per student")
    parser.add_argument("--force", action="store_true", help="let these two overwrite files")
    options = parser.parse_args(arguments)
    only = {name for word in options.only for name in word.split(",")}
    if not only <= set(map(task, TASKS)):
        raise ValueError(f"-k {','.join(only)}: tasks are named task01 ... {task(len(TASKS))}")
    if not 0 < options.seconds <= 86400:
        raise ValueError(f"--seconds needs 1 to 86400; got {options.seconds:g}")
    if options.csv and not options.csv.lower().endswith(".csv"):
        raise ValueError(f"--csv needs a name that ends in .csv; got {options.csv}")
    if options.template:
        with open(options.template, "x", encoding="utf-8") as file:     # never over a file
            file.write(template())
        return 0
    if not options.files:
        raise ValueError("which file? To start one: python grade.py --template mine.py")
    return grade_files(options, [number for number in TASKS if not only or task(number) in only])


def grade_files(options, numbers):
    """Grade files, several at once, and print or write the verdicts as they come."""
    paths = []
    for name in options.files:                          # Windows leaves *.py to the program
        paths += sorted(glob.glob(name.replace("[", "[[]"))) or [name]
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):                    # one folder per student
        names = [f"{Path(path).absolute().parent.name}-{Path(path).stem}" for path in paths]
    if options.reports:
        Path(options.reports).mkdir(exist_ok=options.force)
    table = open(options.csv or os.devnull, "w" if options.force or not options.csv else "x",
                 buffering=1, encoding="utf-8-sig", errors="backslashreplace", newline="")
    columns = [task(number) for number in numbers]
    csv.writer(table).writerow(["name", "file", "status", "points", "maximum", *columns,
                                *(f"{column} words" for column in columns)])
    status, pool = 0, ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    verdicts = pool.map(lambda path: examine(path, numbers, options.seconds), paths)
    for name, path, (tasks, printed, refused) in zip(names, paths, verdicts):
        states, words = zip(*(tasks.get(number, ("", "")) for number in numbers))
        points = states.count("done")
        csv.writer(table).writerow([name, path, refused or "graded", points, len(numbers),
                                    *states, *words])
        text = report(path, tasks, printed, refused)
        if options.reports:
            Path(options.reports, name + ".txt").write_text(text + "\n", "utf-8", "replace")
        if options.csv or options.reports:
            text = f"{path}: {refused or f'{points} of {len(numbers)} done'}"
        elif len(paths) > 1:
            text = f"{path}\n{text}\n"
        print(text, flush=True)
        status = max(status, 2 if refused else int(points < len(numbers)))
    return status


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    for stream in (sys.stdout, sys.stderr):             # a console may lack letters of a name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(grade(sys.argv[1:]))
    except (OSError, ValueError) as error:
        print(error, "(see --force)" if isinstance(error, FileExistsError) else "", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:                           # do not wait for the threads
        os._exit(130)
