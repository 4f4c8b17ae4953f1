"""Grade functions that a student wrote from the paper; README.md describes the tasks.

    python classroom/grade.py --template mine.py                    write a file to start from
    python classroom/grade.py mine.py [-k task04]                   grade it, from any folder
    python classroom/grade.py submissions/*.py --csv grades.csv     one row per student

A child process runs the project's own tests with the student's functions in the project's place,
and notes each result at once. If it hangs or dies, a new child grades the tasks that are left.
"""
import argparse
import csv
import faulthandler
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
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import cff
import losses
import pipeline
import pooled
import vit

PROJECT = {module.__name__: module for module in (cff, losses, pipeline, pooled, vit)}
TEST_FILES = ["classroom/test_by_hand.py", "test_cff.py", "experiments/test_pipeline.py"]
TASKS = {       # task: (paper, what to write, the tests that grade it, simplest first)
    "task01": ("Eqs. 1 and 2", [losses.goodness, losses.ff_loss],
        ["test_worked_example_of_goodness", "test_eq1_goodness_is_the_mean_of_squares",
         "test_eq2_is_binary_cross_entropy_with_logits"]),
    "task02": ("Eq. 3", [losses.contrastive_loss],
        ["test_eq3_of_two_equal_rows_is_zero", "test_worked_example_of_eq3",
         "test_eq3_is_a_double_loop", "test_eq3_of_a_collapsed_layer_is_ln_2B_minus_1"]),
    "task03": ("Eq. 12", [losses.inner_contrastive_loss],
        ["test_worked_example_of_eq12", "test_eq12_is_a_double_loop",
         "test_eq12_is_at_most_eq3_by_jensen"]),
    "task04": ("Eqs. 14-17, Sec. 3.5", [losses.marginal_contrastive_loss, losses.saturated],
        ["test_worked_example_of_the_margin", "test_eq15_to_eq17_are_a_double_loop",
         "test_eq14_margin_zero_is_eq3", "test_eq17_of_a_collapsed_layer_is_ln_2B_minus_1",
         "test_section_3_5_saturated_pairs_are_positives_above_1_minus_m",
         "test_exactly_at_the_kink_a_pair_is_unsaturated"]),
    "task05": ("Eq. 18", [losses.grad_anchor],
        ["test_worked_example_of_eq18", "test_eq18_gradient_of_the_anchor",
         "test_eq18_term_by_term", "test_eq18_of_an_anchor_without_positives_is_zero",
         "test_eq18_exactly_at_the_kink"]),
    "task06": ("Eqs. A.5-A.7", [losses.grad_positive, losses.grad_negative],
        ["test_worked_example_of_a5_a6_a7", "test_a5_a_saturated_positive_gets_nothing",
         "test_a6_gradient_of_an_unsaturated_positive", "test_a7_gradient_of_a_negative",
         "test_a7_of_an_anchor_without_positives_is_zero", "test_a6_exactly_at_the_kink"]),
    "task07": ("Algorithm 1, left", [cff.cff_step],
        ["test_algorithm1_on_an_mlp_of_one_layer", "test_algorithm1_clears_old_gradients",
         "test_algorithm1_left_line_by_line", "test_algorithm1_is_local",
         "test_table6_one_view_is_one_forward_pass"]),
    "task08": ("Algorithm 1, right", [cff.wrong_labels, cff.ff_step],
        ["test_wrong_labels_are_never_right_uniform_and_seeded",
         "test_algorithm1_right_between_two_layers", "test_algorithm1_right_line_by_line",
         "test_ff_symba_and_collab_are_local"]),
    "task09": ("Sec. 3.4", [vit.patchify, vit.Attention, vit.EncoderLayer],
        ["test_patches_put_back_together_are_the_image", "test_attention_by_hand",
         "test_section_3_4_attention_is_torchs", "test_section_3_4_encoder_layer_is_torchs"]),
    "task10": ("Figs. 4a and 8", [losses.margins, pipeline.longest_chain],
         ["test_fig4a_margins", "test_fig8_longest_chain_by_hand"]),
    "task11": ("the mean of Eq. 13, with less work", [pooled.pooled_output],
         ["test_pooled_output_part_by_part",
          "test_pooled_output_gives_each_parameter_its_gradient",
          "test_pooled_output_takes_fewer_products"]),
}
FILE = "students_file.py"       # the child's copy of what is graded
PRINTED = 10_000                # characters kept of what a student's code prints
MEMORY = 4 * 2**30              # bytes that a child may take, on Linux


# ------------------------------------------------------------------------------ the template

def template():
    """The text of the file a student starts from: signatures and docstrings of all tasks."""
    parts = ['"""My solutions to the tasks of classroom/README.md."""\nimport math\n\n'
             'import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n']
    for task, (paper, answers, _) in TASKS.items():
        parts.append(f"# {task}: {paper}\n\n" + "\n\n".join(stub(task, a) for a in answers))
    return "\n\n".join(parts)


def stub(task, answer):
    """The head of a function or class, to the end of its docstring; its code is to be written."""
    source, to_write = inspect.getsource(answer), f'raise NotImplementedError("{task}")\n'
    head = source[:source.index('"""', source.index('"""') + 3) + 3] + "\n"
    if inspect.isfunction(answer):
        return f"{head}    {to_write}"
    methods = re.findall(r"    def (?:__init__|forward)\(.*\n", source)
    return head + "".join(f"\n{method}        {to_write}" for method in methods)


# ----------------------------------------------------- the child process: pytest with a plugin

def to_do(text):
    """What stands in the place of a function that a student has not written."""
    def refuse(*arguments, **keywords):
        raise NotImplementedError(text)
    return refuse


def hide_answers():
    """From now on, whoever imports the project gets copies of its modules without the answers."""
    instead = {id(answer): to_do(f"{task}: {answer.__module__}.{answer.__name__} is the answer")
               for task, (_, answers, _) in TASKS.items() for answer in answers}
    instead[id(cff.one_forward_step)] = to_do("task07: cff.one_forward_step is half of the answer")
    for name, module in PROJECT.items():
        sys.modules[name] = types.ModuleType(name)
        for key, value in vars(module).items():                 # an answer may have another name
            setattr(sys.modules[name], key, instead.get(id(value), value))


def guarded(mine, theirs):
    """`mine`, called with copies of its tensors; it may not change them, or return None."""
    name, parameters = theirs.__qualname__, inspect.signature(theirs).parameters

    def call(*arguments, **keywords):
        copies = [value.clone() if torch.is_tensor(value) else value for value in arguments]
        result = mine(*copies, **keywords)
        for parameter, value, copy in zip(parameters, arguments, copies):
            assert not torch.is_tensor(value) or torch.equal(value, copy), \
                f"{name} changes its argument {parameter}: compute a new tensor instead"
        assert result is not None, f"{name} returned None: is its `return` missing?"
        return result
    return call


def students_lines(trace):
    """The lines of the student's file in a traceback: ["line 3 in goodness"]."""
    found = re.findall(rf'{FILE}", line (\d+),? in (\S+)', trace)
    return [f"line {line} in {function}" for line, function in found]


def explain(error):
    """An error in one line of text, with the student's line that raised it."""
    words = " ".join(str(error).split("\nassert")[0].split())[:1000]
    if isinstance(error, NotImplementedError) and re.match(r"task\d\d", words):
        return f"to do: {words}"
    where = students_lines("".join(traceback.format_tb(error.__traceback__)))
    if where or not isinstance(error, AssertionError):
        where = where[-1] if where else "the test of your result"
        return f"{where} raised {type(error).__name__}: {words[:300]}"
    if re.search(r"the largest difference is \S+e-0[7-9]$", words):
        words += "; float32 rounding: use P.to(f)"
    return words


class Plugin:
    """Runs the tests of tasks, with the functions of `self.mine` in the project's place."""

    def __init__(self, folder, seconds, tasks):
        self.folder, self.seconds, self.tasks = Path(folder), seconds, tasks
        self.notes = open(self.folder / "grade.notes", "w", encoding="utf-8", buffering=1)
        self.trace = open(self.folder / "grade.trace", "w", encoding="utf-8")

    def run(self):
        """Run pytest without the settings in the project's folder and above; returns its status."""
        os.chdir(ROOT)                                  # pytest misreads a "[" in a path
        return pytest.main([*TEST_FILES, "-c", os.devnull, "--rootdir=.", "--noconftest",
                            "--capture=no", "-p", "no:terminal", "-p", "no:cacheprovider",
                            "-p", "no:faulthandler"], plugins=[self])

    def note(self, *words):
        """Write a line for the parent. Unless another follows in time, the child ends itself."""
        self.notes.write(json.dumps(words) + "\n")
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.trace)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        """Read the student's file, now that the tests have imported the project; then grade it."""
        assert not session.testsfailed, f"pytest cannot import one of {TEST_FILES}"
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
            self.note("refused", explain(error))
            return True
        self.note("read")
        for task in self.tasks:
            self.note(task, *judge(task, list(self.outcomes(task, session.items))))
        return True

    def outcomes(self, task, items):
        """Yield (test, words) for each case of a task's tests; words are None if it passes."""
        _, answers, tests = TASKS[task]
        for item in [item for test in tests for item in items if item.originalname == test]:
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float32)      # a student's code may have set these two
            torch.set_grad_enabled(True)
            with pytest.MonkeyPatch.context() as project:
                for theirs in answers:
                    mine = getattr(self.mine, theirs.__name__, to_do(task))
                    if hasattr(mine, "forward"):        # a class
                        project.setattr(mine, "forward", guarded(mine.forward, theirs.forward))
                    else:
                        mine = guarded(mine, theirs)
                    project.setattr(PROJECT[theirs.__module__], theirs.__name__, mine)
                item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
            yield item.originalname, self.words

    def pytest_runtest_makereport(self, item, call):
        """A report without a traceback, which would take pytest longer than the test."""
        status = "failed" if call.excinfo else "passed"
        if call.excinfo:
            self.words = explain(call.excinfo.value)
        elif call.when == "call":
            self.words = None
        return pytest.TestReport(item.nodeid, item.location, {}, status, None, call.when)


def judge(task, outcomes):
    """(state, words): "done", "to do" or how many tests pass, and what fails first."""
    failures = [(test, words) for test, words in outcomes if words is not None]
    passed = {test for test, _ in outcomes} - {test for test, _ in failures}
    tests = set(TASKS[task][2])
    if passed == tests:
        return "done", ""
    test, words = failures[0]
    if all(words and words.startswith("to do") for _, words in outcomes):
        return "to do", "" if words == f"to do: {task}" else words
    return f"{len(passed)} of {len(tests)}", f"{words} (in {test})"


# ------------------------------------------------- the parent: children, reports, command line

def run_child(source, seconds, tasks):
    """Grade tasks in a child: its notes by their first word, what it printed, how it ended."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg",
                "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "PYTEST_ADDOPTS": "",
                "PYTEST_PLUGINS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder, FILE).write_bytes(source)
        command = [sys.executable, __file__, "--child", folder, str(seconds), *tasks]
        with open(Path(folder, "grade.printed"), "w+", encoding="utf-8", errors="replace") as file:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                           env=os.environ | settings)
            file.seek(0)
            printed = file.read(PRINTED)
        notes = Path(folder, "grade.notes").read_text("utf-8").splitlines()
        trace = Path(folder, "grade.trace").read_text("utf-8", "replace")
    ended = f"no result in {seconds:g} s" if "Timeout" in trace else "Python ended"
    ended = ", at ".join([ended, *students_lines(trace)[:1]])
    return {key: words for key, *words in map(json.loads, notes)}, printed, ended


def examine(path, tasks, seconds):
    """Grade a file: {task: (state, words)}, what it printed, why it cannot be read."""
    try:
        source = Path(path).read_bytes()
        if source[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("it is saved as UTF-16: save it as UTF-8")
        compile(source, Path(path).name, "exec")
    except Exception as error:                          # whatever the parser can raise
        return {}, "", f"{type(error).__name__}: {error}"
    results, printed, left = {}, "", list(tasks)
    while left:
        notes, more, ended = run_child(source, seconds, left)
        printed = (printed + more)[:PRINTED]
        if "read" not in notes:
            return {}, printed, notes.get("refused", [ended])[0]
        results |= {task: notes[task] for task in left if task in notes}
        left = [task for task in left if task not in notes]
        if left:                                        # the first of them has ended the child
            results[left.pop(0)] = "stopped", ended
    return results, printed, ""


def report(headline, printed, results):
    """The text that a student reads."""
    lines = [headline, *printed.splitlines()]
    for task, (state, words) in results.items():
        lines.append(f"{task}  {state:9s} {TASKS[task][0]}")
        if words:
            lines.append(f"        {words}")
    return "\n".join(lines) + "\n"


def grade_files(options, tasks):
    """Grade files, several at once; write and print each result as it comes."""
    names = [Path(path).stem for path in options.files]
    if len(set(names)) < len(names):                    # one folder per student
        names = [f"{Path(path).absolute().parent.name}-{Path(path).stem}" for path in options.files]
    if options.reports:
        Path(options.reports).mkdir(exist_ok=options.force)
    mode = "w" if options.force or not options.csv else "x"
    table = csv.writer(open(options.csv or os.devnull, mode, buffering=1, encoding="utf-8-sig",
                            newline=""))
    table.writerow(["name", "status", "points", "maximum", *tasks,
                    *(f"{task} words" for task in tasks)])
    worst, pool = 0, ThreadPool(min(4, os.cpu_count()))
    graded = pool.imap(lambda path: examine(path, tasks, options.seconds), options.files)
    for name, path, (results, printed, refused) in zip(names, options.files, graded):
        states, words = zip(*(results.get(task, ("", "")) for task in tasks))
        points = states.count("done")
        table.writerow([name, refused or "graded", points, len(tasks), *states, *words])
        headline = f"{path}: " + (refused or f"{points} of {len(tasks)} done")
        text = report(headline, printed, results)
        if options.reports:
            Path(options.reports, name + ".txt").write_text(text, "utf-8", "replace")
        print(headline if options.csv or options.reports else text, flush=True)
        worst = max(worst, 2 if refused else int(points < len(tasks)))
    return worst


def grade(arguments):
    """Run a command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="grade.py", description="Grade files of the tasks.")
    parser.add_argument("files", nargs="+", metavar="mine.py")
    parser.add_argument("--template", action="store_true", help="write a new file to start from")
    parser.add_argument("-k", action="append", metavar="task04", help="grade this task only")
    parser.add_argument("--seconds", type=float, default=60, help="limit for a task, default 60")
    parser.add_argument("--csv", metavar="grades.csv", help="write one row per file")
    parser.add_argument("--reports", metavar="DIR", help="write one text file per student")
    parser.add_argument("--force", action="store_true", help="let these two overwrite files")
    options = parser.parse_args(arguments)
    only = ",".join(options.k or TASKS).split(",")
    if not set(only) <= set(TASKS):
        parser.error(f"-k {','.join(only)}: tasks are named task01 ... {max(TASKS)}")
    try:
        if not options.template:
            return grade_files(options, [task for task in TASKS if task in only])
        with open(options.files[0], "x", encoding="utf-8") as file:     # never over a file
            file.write(template())
        return 0
    except OSError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _, _, folder, seconds, *tasks = sys.argv
        plugin = Plugin(folder, float(seconds), tasks)
        faulthandler.enable(plugin.trace)               # a crash leaves its line, too
        plugin.run()
        os._exit(0)
    sys.stdout.reconfigure(errors="backslashreplace")   # a console may lack letters of a name
    sys.exit(grade(sys.argv[1:]))
