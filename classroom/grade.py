"""Grade functions that a student wrote from the paper; classroom/README.md has the tasks.

    python classroom/grade.py --template mine.py                    write a file to start from
    python classroom/grade.py mine.py [-k task04]                   grade it, from any folder
    python classroom/grade.py submissions/*.py --csv grades.csv     one row per student

A child process runs the project's own tests on the student's functions and saves each result at
once. If it hangs or crashes, a new child grades the remaining tasks.
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
import train
import vit

PROJECT = {module.__name__: module for module in (cff, losses, pipeline, pooled, train, vit)}
TEST_FILES = ["classroom/test_by_hand.py", "test_cff.py", "experiments/test_pipeline.py"]
TASKS = {       # task: (part of the paper, functions to write, tests from simple to hard)
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
        ["test_pooled_output_part_by_part", "test_pooled_output_gives_each_parameter_its_gradient",
         "test_pooled_output_takes_fewer_products"]),
}
FILE = "students_file.py"       # the child's copy of the file that it grades
PRINTED = 10_000                # characters of its output that a report keeps
MEMORY = 4 * 2**30              # a child's memory limit on Linux, in bytes


# ------------------------------------------------------------------------------ the template

def template():
    """The text of a new file for a student: the signatures and docstrings of all tasks."""
    parts = ['"""My solutions to the tasks of classroom/README.md."""\nimport math\n\n'
             'import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n']
    for task, (paper, answers, _) in TASKS.items():
        parts.append(f"# {task}: {paper}\n\n" + "\n\n".join(stub(task, a) for a in answers))
    return "\n\n".join(parts)


def stub(task, answer):
    """The source of a function or class up to its docstring, with a `raise` instead of code."""
    source, to_write = inspect.getsource(answer), f'raise NotImplementedError("{task}")\n'
    head = source[:source.index('"""', source.index('"""') + 3) + 3] + "\n"
    if inspect.isfunction(answer):
        return f"{head}    {to_write}"
    methods = re.findall(r"    def (?:__init__|forward)\(.*\n", source)
    return head + "".join(f"\n{method}        {to_write}" for method in methods)


# ----------------------------------------------------- the child process: pytest with a plugin

def to_do(text):
    """A function that raises NotImplementedError(text)."""
    def refuse(*arguments, **keywords):
        raise NotImplementedError(text)
    return refuse


def hide_answers():
    """Replace the project's modules by copies without the answers, for all later imports."""
    instead = {id(answer): to_do(f"{task}: write your own {answer.__module__}.{answer.__name__}")
               for task, (_, answers, _) in TASKS.items() for answer in answers}
    instead[id(cff.one_forward_step)] = to_do("task07: write your own cff.one_forward_step")
    for name, module in PROJECT.items():
        sys.modules[name] = types.ModuleType(name)
        for key, value in vars(module).items():                 # an answer may have two names
            setattr(sys.modules[name], key, instead.get(id(value), value))


def guarded(mine, theirs):
    """`mine`, but with an error if it changes a tensor or returns the wrong type."""
    name, parameters = theirs.__qualname__, inspect.signature(theirs).parameters
    kind = {"margins": list, "longest_chain": int}.get(name, torch.Tensor)

    def call(*arguments, **keywords):
        copies = [value.clone() if torch.is_tensor(value) else value for value in arguments]
        result = mine(*copies, **keywords)
        for parameter, value, copy in zip(parameters, arguments, copies):
            assert not torch.is_tensor(value) or torch.equal(value, copy), \
                f"{name} changes its argument {parameter}: compute a new tensor instead"
        assert isinstance(result, kind), \
            f"{name} must return type {kind.__name__}, not {str(result)[:100]}: check its `return`"
        return result
    return call


def students_lines(trace):
    """The lines of the student's file in a traceback, for example ["line 3 in goodness"]."""
    found = re.findall(rf'{FILE}", line (\d+),? in (\S+)', trace)
    return [f"line {line} in {function}" for line, function in found]


def explain(error):
    """Describe an error in one line of text, with the student's line if one raised it."""
    words = " ".join(re.split(r"\n *(?:assert|\+) ", str(error))[0].split())[:1000]
    lines = students_lines("".join(traceback.format_tb(error.__traceback__)))
    if isinstance(error, NotImplementedError) and re.match(r"task\d\d", words):
        return f"to do: {words}" + "".join(f" ({line})" for line in lines[-1:])
    if lines or not isinstance(error, AssertionError):
        where = lines[-1] if lines else "the test that used your code"
        return f"{where} raised {type(error).__name__}: {words[:300]}"
    if re.search(r"the largest difference is \S+e-0[7-9]$", words):
        words += "; this is float32 rounding: convert masks with P.to(f)"
    return re.sub("^assert ", "your result fails the check: ", words)


class Plugin:
    """Runs the tests of each task on the student's functions, `self.mine`."""

    def __init__(self, folder, seconds, tasks):
        self.folder, self.seconds, self.tasks = Path(folder), seconds, tasks
        self.notes = open(self.folder / "grade.notes", "w", encoding="utf-8", buffering=1)
        self.trace = open(self.folder / "grade.trace", "w", encoding="utf-8")

    def run(self):
        """Run pytest without settings files or conftest.py; returns its exit status."""
        os.chdir(ROOT)                                  # pytest misreads a "[" in a path
        return pytest.main([*TEST_FILES, "-c", os.devnull, "--rootdir=.", "--noconftest",
                            "--capture=no", "-p", "no:terminal", "-p", "no:cacheprovider",
                            "-p", "no:faulthandler"], plugins=[self])

    def note(self, *words):
        """Write a line for the parent. If no other line follows in time, the child exits."""
        self.notes.write(json.dumps(words) + "\n")
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.trace)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        """Import the student's file after the tests have imported the project; then grade it."""
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
        except BaseException as error:                  # a student's file can raise anything
            self.note("refused", explain(error))
            return True
        self.note("read")
        for task in self.tasks:
            self.note(task, *judge(task, list(self.outcomes(task, session.items))))
        return True

    def outcomes(self, task, items):
        """Yield (test, words) for each test case of a task; words are None if it passes."""
        _, answers, tests = TASKS[task]
        for item in [item for test in tests for item in items if item.originalname == test]:
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float32)      # a student's code may have changed these
            torch.set_grad_enabled(True)
            with pytest.MonkeyPatch.context() as project:
                for theirs in answers:
                    name = theirs.__name__
                    mine = getattr(self.mine, name, to_do(f"{task}, your file has no {name}"))
                    if hasattr(mine, "forward"):        # a class
                        project.setattr(mine, "forward", guarded(mine.forward, theirs.forward))
                    else:
                        mine = guarded(mine, theirs)
                    project.setattr(PROJECT[theirs.__module__], name, mine)
                item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
            yield item.originalname, self.words

    def pytest_runtest_makereport(self, item, call):
        """Keep the message of a failure; pytest's own traceback would take longer than the test."""
        status = "failed" if call.excinfo else "passed"
        if call.excinfo:
            self.words = explain(call.excinfo.value)
        elif call.when == "call":
            self.words = None
        return pytest.TestReport(item.nodeid, item.location, {}, status, None, call.when)


def judge(task, outcomes):
    """(state, words): "done", "to do" or, say, "3 of 5"; words explain the first failure."""
    failures = [(test, words) for test, words in outcomes if words is not None]
    passed = {test for test, _ in outcomes} - {test for test, _ in failures}
    tests = set(TASKS[task][2])
    if passed == tests:
        return "done", ""
    test, words = failures[0]
    if all(words and words.startswith("to do") for _, words in outcomes):
        return "to do", "" if re.match(f"to do: {task}([ ,]|$)", words) else words
    return f"{len(passed)} of {len(tests)}", f"{words} (in {test})"


# ------------------------------------------------- the parent: children, reports, command line

def run_child(source, seconds, tasks):
    """Grade tasks in a child process: ({first word of a note: the rest}, output, how it ended)."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg",
                "PYTHONBREAKPOINT": "0", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8",
                "PYTEST_ADDOPTS": "", "PYTEST_PLUGINS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
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
    ended = f"no result in {seconds:g} s" if "Timeout" in trace else "Python exited"
    ended = ", at ".join([ended, *students_lines(trace)[:1]])
    return {key: words for key, *words in map(json.loads, notes)}, printed, ended


def examine(path, tasks, seconds):
    """Grade a file: ({task: (state, words)}, its output, why it cannot be graded or "")."""
    try:
        source = Path(path).read_bytes()
        if source[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("it is saved as UTF-16; save it as UTF-8")
        compile(source, Path(path).name, "exec")
    except Exception as error:                          # Python's parser raises many errors
        return {}, "", f"{type(error).__name__}: {error}"
    results, printed, left = {}, "", list(tasks)
    while left:
        notes, more, ended = run_child(source, seconds, left)
        printed = (printed + more)[:PRINTED]
        if "read" not in notes:
            return {}, printed, notes.get("refused", [ended])[0]
        results |= {task: notes[task] for task in left if task in notes}
        left = [task for task in left if task not in notes]
        if left:                                        # the first of them ended the child
            results[left.pop(0)] = "stopped", ended
    return results, printed, ""


def report(headline, printed, results):
    """The text that a student reads, as one string."""
    lines = [headline, *printed.splitlines()]
    for task, (state, words) in results.items():
        lines.append(f"{task}  {state:9s} {TASKS[task][0]}")
        if words:
            lines.append(f"        {words}")
    return "\n".join(lines) + "\n"


def grade_files(options, tasks):
    """Grade up to four files at once; write and print the results in order. Returns the status."""
    paths, n = [Path(path).absolute().with_suffix("").parts[1:] for path in options.files], 1
    while len({path[-n:] for path in paths}) < len(set(paths)):     # two have the same name
        n += 1
    names = ["-".join(path[-n:]) for path in paths]
    if len(set(names)) < len(names):
        raise FileExistsError("two of these files would have the same name in the table")
    for path in filter(None, (options.csv, options.reports)):       # check both, then write
        if os.path.exists(path) and not options.force:
            raise FileExistsError(f"{path} exists: choose another name, or add --force")
    table = csv.writer(open(options.csv or os.devnull, "w", 1, "utf-8-sig", newline=""))
    if options.reports:
        Path(options.reports).mkdir(exist_ok=True)
    table.writerow(["name", "status", "points", "maximum", *tasks,
                    *(f"{task} message" for task in tasks)])
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
    """Run a command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="grade.py", description="Grade answers to the tasks.")
    parser.add_argument("files", nargs="+", metavar="mine.py", help="files with answers")
    parser.add_argument("--template", action="store_true", help="write a new mine.py to start from")
    parser.add_argument("-k", action="append", metavar="task04", help="one task; repeat for more")
    parser.add_argument("--seconds", type=float, default=60, help="time limit per task, default 60")
    parser.add_argument("--csv", metavar="grades.csv", help="write a table, one row per file")
    parser.add_argument("--reports", metavar="DIR", help="write one report per file")
    parser.add_argument("--force", action="store_true", help="let --csv and --reports overwrite")
    options = parser.parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):              # IDLE and notebooks do not have it
        sys.stdout.reconfigure(errors="backslashreplace")   # a console may lack a character
    unknown = [task for task in options.k or [] if task not in TASKS]
    if unknown:
        parser.exit(2, f"-k {unknown[0]}: use one of task01 ... {max(TASKS)}; repeat -k for more\n")
    if Path(options.csv or "").suffix.lower() == ".py":     # --force would overwrite an answer
        parser.exit(2, f"--csv {options.csv}: this is a Python file, not a table\n")
    try:
        if not options.template:
            return grade_files(options, [task for task in TASKS if task in (options.k or TASKS)])
        with open(options.files[0], "x", encoding="utf-8") as file:     # never overwrites
            file.write(template())
        return 0
    except (OSError, KeyboardInterrupt) as error:
        parser.exit(2, f"{str(error) or 'stopped by Ctrl-C'}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _, _, folder, seconds, *tasks = sys.argv
        plugin = Plugin(folder, float(seconds), tasks)
        faulthandler.enable(plugin.trace)               # writes the line of a crash
        plugin.run()
        os._exit(0)
    sys.exit(grade(sys.argv[1:]))
