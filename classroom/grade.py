"""Grade functions written after the paper by the project's own tests; the tasks stand in README.md.

    python classroom/grade.py --template mine.py                    what to write, to start from
    python classroom/grade.py mine.py [-k task04]                   grade it, from any folder
    python classroom/grade.py submissions/*.py --csv grades.csv     a row a student

A task's tests run with the functions of mine.py in the place of the project's, in a process of
their own (sandbox.py, watched by watch.py): what it does not say in time counts as not done.
"""
import argparse
import csv
import glob
import inspect
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import indent

from watch import LIVE, examine

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import cff              # these are found by the path above
import losses
import pipeline
import pooled
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
         "test_table6_one_view_is_one_forward_pass"]),
    8: ("Algorithm 1, right", [(cff, "wrong_labels"), (cff, "ff_step")],
        ["test_wrong_labels_are_never_right_uniform_and_seeded",
         "test_algorithm1_right_line_by_line", "test_ff_symba_and_collab_are_local"]),
    9: ("Sec. 3.4", [(vit, "patchify"), (vit, "Attention"), (vit, "EncoderLayer")],
        ["test_patches_put_back_together_are_the_image",
         "test_section_3_4_attention_is_torchs", "test_section_3_4_encoder_layer_is_torchs"]),
    10: ("Figs. 4a and 8", [(losses, "margins"), (pipeline, "longest_chain")],
         ["test_fig4a_margins", "test_fig8_longest_chain_by_hand"]),
    11: ("the mean of Eq. 13, by less work", [(pooled, "pooled_output")],
         ["test_pooled_output_is_the_mean_of_the_layers",
          "test_pooled_output_gives_each_parameter_its_gradient",
          "test_pooled_output_pools_before_the_last_product",
          "test_pooled_output_asks_no_gradient_of_its_input"]),
}
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


# ------------------------------------------------------------------------------------- the report

def summary(verdict):
    """Print how far each task is, and what fails first."""
    name, states, remarks = Path(verdict.name).name, verdict.tasks(), dict(verdict.remarks())
    if verdict.printed:
        print(verdict.printed.rstrip("\n"))
    if verdict.refused:
        print(f"{verdict.name} cannot be read: {verdict.refused}", file=sys.stderr)
        return
    for function, module in verdict.taken.items():
        print(f"{name} takes {function} from {module}.py of the project: "
              "that is the answer, so it counts as to do")
    if not states:
        print(f"nothing to grade: tasks are named task01 ... task{len(TASKS)}")
    for number, state in states.items():
        paper, functions, _ = TASKS[number]
        print(f"task{number:02d}  {state:9s} {', '.join(n for _, n in functions)} ({paper})")
        if number in remarks:
            print(indent(remarks[number], 8 * " "))


def row(verdict):
    """The verdict as a row of grades.csv; of a file that cannot be read nothing is done."""
    states = dict.fromkeys(TASKS, "to do") if verdict.refused else verdict.tasks()
    words = [f"cannot be read: {verdict.refused}"] if verdict.refused else []
    words += [f"takes {name} from {module}.py" for name, module in verdict.taken.items()]
    words += [f"task{number:02d}: {text}" for number, text in verdict.remarks()]
    first = " ".join(words[0].split())[:120] if words else ""
    return [verdict.name, *(states.get(number, "") for number in TASKS), first]


def grade_all(paths, only, seconds, table=None):
    """Grade files side by side, a row each in a csv.writer; returns the largest exit status."""
    def one(path):
        verdict = examine(path, only, seconds)
        done = list(verdict.tasks().values()).count("done")
        print(f"{path}: {verdict.refused or f'{done} of {len(verdict.tasks())} tasks done'}",
              file=sys.stderr, flush=True)
        return verdict

    statuses = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            for verdict in pool.map(one, paths):
                statuses.append(verdict.status())
                if table:
                    table.writerow(row(verdict))
                else:
                    print(f"\n{verdict.name}")
                    summary(verdict)
        except KeyboardInterrupt:
            for child in list(LIVE):
                child.kill()
            os._exit(130)
    return max(statuses)


# ------------------------------------------------------------------------------------ command line

def grade(arguments):
    """The exit status: 0 if all that was asked for is done, 1 if not, 2 if nothing was graded."""
    parser = argparse.ArgumentParser(prog="grade.py", description="Grade files of the tasks.")
    parser.add_argument("files", nargs="*", metavar="mine.py", type=os.path.expanduser)
    parser.add_argument("-k", dest="only", default="", metavar="task04", help="these alone")
    parser.add_argument("--seconds", type=float, default=60, help="limit for a task, default 60")
    parser.add_argument("--csv", metavar="grades.csv", type=os.path.expanduser,
                        help="write a row a file, a column a task")
    parser.add_argument("--template", nargs="?", const="", metavar="mine.py",
                        type=os.path.expanduser,
                        help="write what to start from into a new file, or print it")
    options = parser.parse_args(arguments)
    paths = [path for name in options.files             # Windows leaves *.py to the program
             for path in (sorted(glob.glob(name)) if "*" in name else []) or [name]]
    if options.template == "":
        print(template(), end="")
        return 0
    if options.template is None and not paths:
        parser.error("which file? To start one: python grade.py --template mine.py")
    if not 0 < options.seconds <= 86400:
        parser.error(f"--seconds needs a number above 0, a day at most; got {options.seconds:g}")
    if options.csv and not options.csv.endswith(".csv"):
        parser.error(f"--csv needs a name that ends in .csv; got {options.csv}")
    try:
        if options.template:
            with open(options.template, "x", encoding="utf-8") as file:     # never over another
                file.write(template())
            return 0
        if options.csv:                                 # a row is there once it is written
            file = open(options.csv, "w", buffering=1, encoding="utf-8",
                        errors="backslashreplace", newline="")
    except OSError as reason:
        print(f"{options.template or options.csv} cannot be written: {reason}", file=sys.stderr)
        return 2
    if options.csv:
        with file:
            table = csv.writer(file)
            table.writerow(["student", *(f"task{number:02d}" for number in TASKS), "words"])
            return grade_all(paths, options.only, options.seconds, table)
    if len(paths) > 1:
        return grade_all(paths, options.only, options.seconds)
    verdict = examine(paths[0], options.only, options.seconds)
    summary(verdict)
    return verdict.status()


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):             # a console may lack letters of a name
        stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # a time limit's stop is a Ctrl-C
    try:
        raise SystemExit(grade(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit(130)
