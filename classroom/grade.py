"""Grade functions written after the paper by the project's own tests; the tasks stand in README.md.

    python classroom/grade.py --template > mine.py      what to write, to start from
    python classroom/grade.py mine.py [-k task04]       grade it, from any folder

A task's tests run with the functions of mine.py in the place of the project's.
"""
import importlib.util
import inspect
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import cff              # these are found by the path above
import losses
import pipeline
import vit

TEST_FILES = [ROOT / "classroom" / "test_by_hand.py", ROOT / "test_cff.py",
              ROOT / "experiments" / "test_pipeline.py"]
TASKS = {       # number: (paper, what to write, the tests that grade it, simplest first)
    1: ("Eqs. 1 and 2", [(losses, "goodness"), (losses, "ff_loss")],
        ["test_worked_example_of_goodness", "test_eq1_goodness_is_the_mean_of_squares",
         "test_eq2_is_binary_cross_entropy_with_logits"]),
    2: ("Eq. 3", [(losses, "contrastive_loss")],
        ["test_worked_example_of_eq3", "test_eq3_is_a_double_loop",
         "test_eq3_of_a_collapsed_layer_is_ln_2B_minus_1"]),
    3: ("Eq. 12", [(losses, "inner_contrastive_loss")],
        ["test_worked_example_of_eq12", "test_eq12_is_a_double_loop",
         "test_eq12_is_at_most_eq3_by_jensen"]),
    4: ("Eqs. 14-17, Sec. 3.5", [(losses, "marginal_contrastive_loss"), (losses, "saturated")],
        ["test_worked_example_of_the_margin", "test_eq15_to_eq17_are_a_double_loop",
         "test_eq14_margin_zero_is_eq3", "test_eq17_of_a_collapsed_layer_is_ln_2B_minus_1",
         "test_section_3_5_saturated_pairs_are_positives_above_1_minus_m",
         "test_exactly_at_the_kink_a_pair_is_unsaturated"]),
    5: ("Eq. 18", [(losses, "grad_anchor")],
        ["test_worked_example_of_eq18", "test_eq18_gradient_of_the_anchor",
         "test_eq18_term_by_term", "test_eq18_of_an_anchor_without_positives_is_zero",
         "test_eq18_exactly_at_the_kink"]),
    6: ("Eqs. A.5-A.7", [(losses, "grad_positive"), (losses, "grad_negative")],
        ["test_worked_example_of_a5_a6_a7", "test_a5_a_saturated_positive_gets_nothing",
         "test_a6_gradient_of_an_unsaturated_positive", "test_a7_gradient_of_a_negative",
         "test_a7_of_an_anchor_without_positives_is_zero", "test_a6_exactly_at_the_kink"]),
    7: ("Algorithm 1, left", [(cff, "cff_step")],
        ["test_algorithm1_left_line_by_line", "test_algorithm1_is_local",
         "test_algorithm1_next_layer_reads_the_output_from_before_the_update",
         "test_algorithm1_views_use_different_draws", "test_table6_one_view_is_one_forward_pass"]),
    8: ("Algorithm 1, right", [(cff, "wrong_labels"), (cff, "ff_step")],
        ["test_wrong_labels_are_never_right_uniform_and_seeded",
         "test_algorithm1_right_line_by_line", "test_ff_symba_and_collab_are_local"]),
    9: ("Sec. 3.4", [(vit, "patchify"), (vit, "Attention"), (vit, "EncoderLayer")],
        ["test_patches_put_back_together_are_the_image",
         "test_section_3_4_encoder_layer_is_torchs"]),
    10: ("Figs. 4a and 8", [(losses, "margins"), (pipeline, "longest_chain")],
         ["test_fig4a_margins", "test_fig8_longest_chain_by_hand"]),
}
# test: (its task, its place among the task's tests)
PLACES = {test: (number, place) for number, (_, _, tests) in TASKS.items()
          for place, test in enumerate(tests)}
IMPORTS = """\
import math

import torch
from torch import nn
from torch.nn import functional as F
"""


# ------------------------------------------------------------------------------------ the template

def template():
    """The text of the file a student starts from: signatures and docstrings of all tasks."""
    parts = ['"""My solutions to the tasks of classroom/README.md.\n\n'
             '    python classroom/grade.py THIS_FILE [-k task04]\n"""\n' + IMPORTS]
    for number, (paper, names, _) in TASKS.items():
        stubs = [stub(getattr(module, name), number) for module, name in names]
        parts.append(f"# task{number:02d}: {paper}\n\n" + "\n\n".join(stubs))
    return "\n\n".join(parts)


def stub(thing, number):
    """A function or class with its docstring, its code to be written."""
    if inspect.isclass(thing):
        head = f"class {thing.__name__}(nn.Module):\n"
        methods = [stub(vars(thing)[name], number) for name in ("__init__", "forward")]
        body = "\n" + "\n".join(methods)
    else:
        head = f"def {thing.__name__}{inspect.signature(thing)}:\n"
        body = f'raise NotImplementedError("task{number:02d}")\n'
    if thing.__doc__:
        text = inspect.getdoc(thing)
        end = "\n" if "\n" in text else ""
        body = f'"""{text}{end}"""\n{body}'
    return head + indent(body, "    ")


# -------------------------------------------------------------------------------------- the grading

@contextmanager
def in_place_of(functions):
    """Put {(module, name): function} into the project for a while."""
    old = {place: getattr(*place) for place in functions}
    for place, function in functions.items():
        setattr(*place, function)
    try:
        yield
    finally:
        for place, function in old.items():
            setattr(*place, function)


class Grader:
    """A pytest plugin: a task's tests run on the functions of a student's file, and are counted.

    Raises what the file raises when it is read.
    """

    def __init__(self, path):
        self.path, self.words = Path(path), {}
        self.outcomes = {number: [] for number in TASKS}
        spec = importlib.util.spec_from_file_location("the_students_file", self.path)
        self.mine = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.mine)
        self.taken = {}                                 # answers that are not the student's own
        for _, names, _ in TASKS.values():
            for module, name in names:
                if getattr(self.mine, name, None) is getattr(module, name):
                    self.taken[name] = module.__name__
                    delattr(self.mine, name)

    def pytest_configure(self, config):
        config.option.tbstyle = "native"    # pytest's own reads a test's whole file at each failure

    def pytest_collectreport(self, report):
        if report.failed:
            print(report.longreprtext, file=sys.stderr)

    def pytest_itemcollected(self, item):
        if item.originalname in PLACES:                 # so that -k finds it
            item.extra_keyword_matches.add(f"task{PLACES[item.originalname][0]:02d}")

    def pytest_collection_modifyitems(self, items):
        graded = [item for item in items if item.originalname in PLACES]
        items[:] = sorted(graded, key=lambda item: PLACES[item.originalname])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        _, names, _ = TASKS[PLACES[item.originalname][0]]
        with in_place_of({(module, name): getattr(self.mine, name, self.to_do(name))
                          for module, name in names}):
            return (yield)

    def to_do(self, name):
        """What stands for a function that is not in the file."""
        def missing(*arguments, **keywords):
            raise NotImplementedError(f"{self.path.name} has no {name}")
        return missing

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report, (number, _) = (yield), PLACES[item.originalname]
        if call.when == "call" or report.failed:
            missing = call.excinfo and call.excinfo.errisinstance(NotImplementedError)
            self.outcomes[number].append("to do" if missing else report.outcome)
            if report.failed and number not in self.words:
                words = f"to do: {call.excinfo.value}" if missing else self.explain(item, call)
                self.words[number] = words
        return report

    def explain(self, item, call):
        """What went wrong: the test's words, or which line of the student's code raised what."""
        error, where = call.excinfo.value, self.where(call.excinfo)
        if isinstance(error, AssertionError) and not where:
            return str(error).split("\nassert")[0]
        words = " ".join(str(error).split())[:300]
        where = where or "what your code gave"
        return f"{where} raised {type(error).__name__}: {words} (in {item.name})"

    def where(self, excinfo):
        """The innermost line of the student's file in a traceback, "" if none raised."""
        mine = [entry for entry in excinfo.traceback if Path(entry.path) == self.path.resolve()]
        return f"{self.path.name}, line {mine[-1].lineno + 1}, in {mine[-1].name}," if mine else ""

    def summary(self):
        """Print how far each task is, and what fails first; returns whether all of it is done."""
        for name, module in self.taken.items():
            print(f"{self.path.name} takes {name} from {module}.py of the project: "
                  "that is the answer, so it counts as to do")
        graded = {number: outcomes for number, outcomes in self.outcomes.items() if outcomes}
        if not graded:
            print(f"nothing to grade: tasks are named task01 ... task{len(TASKS)}")
        for number, outcomes in graded.items():
            paper, names, _ = TASKS[number]
            state = f"{outcomes.count('passed')} of {len(outcomes)}"
            if len(set(outcomes)) == 1 and outcomes[0] != "failed":
                state = "done" if outcomes[0] == "passed" else "to do"
            print(f"task{number:02d}  {state:9s} {', '.join(name for _, name in names)} ({paper})")
            words = self.words.get(number, "")
            if state != "to do" or re.search(rf"task(?!{number:02d})\d\d", words):
                print(indent(words + "\n" if words else "", 8 * " "), end="")
        return bool(graded) and all(set(outcomes) == {"passed"} for outcomes in graded.values())


# ------------------------------------------------------------------------------------ command line

def grade(arguments):
    """The exit status: 0 if all that was asked for is done, 1 if not, 2 for an unreadable file."""
    if arguments == ["--template"]:
        print(template(), end="")
        return 0
    if not arguments or arguments[0].startswith("-"):
        print("usage: python grade.py --template > mine.py, then python grade.py mine.py "
              "[-k task04]", file=sys.stderr)
        return 2
    try:
        grader = Grader(arguments[0])
    except (Exception, SystemExit) as reason:           # whatever a file of Python can raise
        print(f"{arguments[0]} cannot be read: {type(reason).__name__}: {reason}", file=sys.stderr)
        return 2
    pytest.main([*map(str, TEST_FILES), "-p", "no:terminal", "-p", "no:cacheprovider",
                 "--capture=no", *arguments[1:]], plugins=[grader])
    return 0 if grader.summary() else 1


if __name__ == "__main__":
    raise SystemExit(grade(sys.argv[1:]))
