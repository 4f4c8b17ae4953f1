"""The pages on results, held against the records: what experiments/README.md and records/ say.

    python -m pytest experiments/test_records.py
"""
import csv
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import eval as evaluation
import train

RECORDS = HERE / "records"
README, RUNS = (path.read_text(encoding="utf-8") for path in (HERE / "README.md",
                                                              RECORDS / "README.md"))
NUMBER = r"(?<![\w.])\d+\.\d+(?![\w.]*\d)"
FOLDERS = sorted(path.parent for path in RECORDS.glob("*/result.json"))


def section(heading, page=README):
    """The text under a heading, up to the next one of its level."""
    level = heading.split()[0]
    return re.split(rf"^#{{1,{len(level)}}} ", page.split(f"\n{heading}\n")[1], flags=re.M)[0]


def commands(text):
    """The indented lines of a text: what a reader pastes into a shell."""
    return "".join(line[4:] + "\n" for line in text.splitlines() if line.startswith("    "))


def records(what):
    """(name, content) of the records of speed: pipeline-vit, pipeline-memory or speed."""
    return [(path.name, json.loads(path.read_text()))
            for path in sorted(RECORDS.glob(f"{what}*.json"))]


def printed_speeds(capsys):
    """All lines that speed.py prints of its records; of those of memory, the memory alone."""
    import speed                                    # here, so that the other tests run without it
    capsys.readouterr()
    for _, record in records("speed"):
        speed.show_speed(record)
    for _, record in records("pipeline-vit"):
        speed.show_pipeline_speed(record)
    lines = capsys.readouterr().out.splitlines()
    for _, record in records("pipeline-memory"):
        speed.show_pipeline_speed(record)
        lines.append(capsys.readouterr().out.splitlines()[-1])
    return lines


# ----------------------------------------------------------------------------- the printed tables

def test_the_table_of_runs_is_what_eval_prints(capsys):
    assert len(FOLDERS) > 100
    evaluation.show_table(evaluation.read_groups(FOLDERS), markdown=True)
    page = set(RUNS.splitlines())
    missing = [line for line in capsys.readouterr().out.splitlines() if line not in page]
    assert not missing, "not in records/README.md: " + "\n".join(missing)


def test_the_tables_of_speed_are_what_speed_prints(capsys):
    readme, lines = set(README.splitlines()), printed_speeds(capsys)
    missing = [line for line in lines if line not in readme]
    assert len(lines) > 20 and not missing, "not in experiments/README.md: " + "\n".join(missing)


# ----------------------------------------------------------------------------- claims and captions

HERE_ARE = {        # number of the claim: the runs whose test accuracies stand first in "Here"
    1: "tenth-cff tenth-ff tenth-symba-s0 tenth-collab-s0",
    2: "tenth-cffm tenth-cff mnist-cffm mnist-cff",
    3: "tenth-cffm tenth-bp mnist-cffm mnist-bp",
    4: "tenth-cffm-randaug tenth-bp-randaug tenth-cffm tenth-bp",
    6: "tenth-cffm-missing80 tenth-bp-missing80 tenth-cffm-randaug tenth-bp-randaug",
    7: "tenth-cffm-wrong40 tenth-bp-wrong40",
    8: "tenth-ff-s0 tenth-ff-head-s0 tenth-symba-s0 tenth-symba-head-s0",
    9: "tenth-cffm-randaug tenth-cffm-token",
    10: "tenth-cffm-views1 tenth-cffm",
    11: "fig7-32-cffm-s0 fig7-32-bp-s0 cifar10-short-cffm-s0 cifar10-short-bp-s0 "
        "fig7-128-cffm-s0 fig7-128-bp-s0",
}


def shown(part="test"):
    """{run or group of seeds: its accuracy as it is printed}."""
    of = {}
    for runs in evaluation.read_groups(FOLDERS):
        of |= {run.name: evaluation.spread([run.accuracy(part)]) for run in runs}
        if len(runs) > 1:
            of[re.sub(r"-s\d+$", "", runs[0].name)] = evaluation.spread(
                [run.accuracy(part) for run in runs])
    return of


def test_the_claims_have_the_accuracies_of_their_runs_in_order():
    of = shown()
    rows = re.findall(r"^\| (\d+) \|.*\|([^|]+)\|[^|]+\|$", section("## The claims"), flags=re.M)
    cells = {int(number): numbers_of(cell) for number, cell in rows}
    for number, names in HERE_ARE.items():
        expected = [of[name] for name in names.split()]
        assert cells[number][:len(expected)] == expected, f"claim {number}"


def test_the_sentences_have_the_accuracies_of_their_runs():
    of, val = shown(), shown("val")
    mlp = "cifar10-mlp-"
    text = " ".join(section("## The claims").split())
    for said in (
            f"SymBa has {of[mlp + 'symba-lr003']}, CFF {of[mlp + 'cff-edge']}, "
            f"FF Collab {of[mlp + 'collab-lr003']} and FF {of[mlp + 'ff']}, and",
            f"CFF's {of['mnist-cff']}, with {of['mnist-ff']} (FF), {of['mnist-symba']} (SymBa) and "
            f"{of['mnist-collab']} (FF Collab)",
            f"it has {of['cifar10-full60-cffm-s0']} and BP {of['cifar10-full60-bp-s0']}, whose",
            f"also on CIFAR-10 ({of[mlp + 'cffm-edge']} against {of[mlp + 'cff-edge']}), on "
            f"the drawn `shapes` ({of['shapes-cffm']} against one seed's {of['shapes-cff']}), and "
            f"in short runs with each seed ({of['cifar10-short-cffm']} against "
            f"{of['cifar10-short-cff']})",
            f"on MNIST as in the paper ({of['mnist800-bp']} against {of['mnist800-cffm']}), on "
            f"CIFAR-10 without crops unlike there ({of[mlp + 'bp']} against "
            f"{of[mlp + 'cffm-flip']})",
            f"with each seed, {of['tenth-cffm-missing50']} / {of['tenth-bp-missing50']}, and",
            f"each seed, {of['short-cffm-missing80-long']} / {of['short-bp-missing80-long']}.",
            f"at 20 % it has {of['tenth-cffm-wrong20']} / {of['tenth-bp-wrong20']}, and at 40 %",
            f"{val['fig7-128-cffm-s0']} against {val['fig7-128-bp-s0']}, or "
            f"{val['fig7-128-bp-lr0001']} at half",
            f"paper's tables, has {of['tenth-scl-s0']}."):
        assert said in text, f"not said: {said}"


def test_the_claims_have_the_speeds_of_their_records():
    text = " ".join(section("## The claims").split())
    [(_, speed)], [(_, piped)] = records("speed"), records("pipeline-vit")
    steps, one, two = speed["methods"], "CFF+M, 1 view", "CFF+M, 2 views"
    gain, to_bp = (statistics.median(piped["methods"][one][what]) for what in ("gain", "to_bp"))
    with_two = statistics.median(piped["methods"][two]["to_bp"])
    passes, head = (speed["inference"][way]["ratio"]
                    for way in ("FF, a pass for each class", "FF, with head"))
    for said in (f"a step {steps[one]['ratio']:.2f} / {steps[two]['ratio']:.2f} of BP's",
                 f"time {passes:.1f} to {head:.1f} of CFF+M's",
                 f"two views slower ({with_two:.2f})",
                 f"{gain:.2f} times one process, {to_bp:.2f} times BP on two"):
        assert said in text, f"not said: {said}"


def known_accuracies(part):
    """Accuracies of all records on "test" or "val" data, means over seeds, and "m ± s" of them."""
    known = set()
    for runs in evaluation.read_groups(FOLDERS):
        accuracies = [run.accuracy(part) for run in runs]
        known |= {evaluation.spread([value]) for value in accuracies}
        known |= {evaluation.spread(accuracies), evaluation.spread(accuracies).split(" ± ")[0]}
    return known


def numbers_of(text):
    """Decimal numbers of a text, "58.0 ± 0.6" as one; not those of code or of a section's name."""
    text = re.sub(r"`[^`]*`|Secs?\. [\d.]+", "", text)
    return re.findall(rf"{NUMBER}(?: ± \d+\.\d+)?", text)


def paper_rows():
    with open(HERE / "paper.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


THE_PAPERS = {      # number of the claim: the rows of paper.csv in "Paper", in its order
    1: ["1 vit-128-4-5 cff", "1 vit-128-4-5 ff", "1 vit-128-4-5 symba", "1 vit-128-4-5 collab"],
    2: ["1 vit-128-4-5 cffm", "1 vit-128-4-5 cff", "1 mlp-500-3 cffm", "1 mlp-500-3 cff"],
    3: ["3 vit-128-4-5 crop cffm", "3 vit-128-4-5 crop bp", "3 mlp-500-3 cffm", "3 mlp-500-3 bp"],
    4: ["3 vit-128-4-5 crop+randaug cffm", "3 vit-128-4-5 crop+randaug bp",
        "3 vit-128-4-5 crop cffm", "3 vit-128-4-5 crop bp"],
    6: ["4 missing 0.8 cffm", "4 missing 0.8 bp", "4 none cffm", "4 none bp"],
    7: ["4 noise 0.4 cffm", "4 noise 0.4 bp"],
    8: ["1 vit-128-4-5 ff", "2 vit-128-4-5 head ff", "1 vit-128-4-5 symba",
        "2 vit-128-4-5 head symba"],
    9: ["5 vit-128-4-5 mean cffm", "5 vit-128-4-5 token cffm"],
    10: ["3 vit-128-4-5 crop cffm", "6 vit-128-4-5 crop views difference cffm"],
}


def test_the_claims_have_the_papers_numbers_in_order():
    """Each word of a row's description stands in it, "none" for nothing in a column; no two rows of
    that description differ."""
    rows = re.findall(r"^\| (\d+) \|[^|]*\|([^|]+)\|", section("## The claims"), flags=re.M)
    cells = {int(number): numbers_of(cell) for number, cell in rows}
    for number, descriptions in THE_PAPERS.items():
        for shown, description in zip(cells[number], descriptions, strict=True):
            table, *words, method = description.split()
            found = {row["value"].lstrip("-") for row in paper_rows()
                     if (row["table"], row["method"]) == (table, method)
                     and row["quantity"].startswith("accuracy")
                     and all(word in re.split("[ _]", " ".join(
                         value or "none" for value in row.values())) for word in words)}
            assert found == {shown}, f"claim {number}, {description}"


def test_the_numbers_of_the_claims_are_the_records_the_papers_or_the_speeds(capsys):
    speeds = set(re.findall(NUMBER, "\n".join(printed_speeds(capsys))))
    accuracies, validated = known_accuracies("test"), known_accuracies("val")
    values = " ".join(row["value"] for row in paper_rows())
    paper = set(re.findall(NUMBER, values)) | {"1.8"}       # Sec. 5.1 has that in its text alone
    claims = section("## The claims").split("\n### ")[0]
    rows = [line.strip("|").split("|") for line in re.findall(r"^\| \d.*", claims, flags=re.M)]
    assert len(rows) == 12
    for _, claim, of_paper, here, holds in rows:
        assert re.match(" (yes|no|partly)[,: ]", holds)
        assert not numbers_of(claim)
        unknown = set(numbers_of(of_paper)) - paper
        assert not unknown, f"{claim.strip()}: not in paper.csv: {unknown}"
        unknown = set(numbers_of(here)) - accuracies - speeds
        assert not unknown, f"{claim.strip()}: in no record: {unknown}"
    text = re.sub(r"^\|.*", "", claims + section("## The pictures"), flags=re.M)
    accuracies |= set(probes().values())
    seen = 0
    for sentence in re.split(r"\.\s|\n\n", text):
        sentence = re.sub(r"[\d., and]+ points", "", " ".join(sentence.split()))   # differences
        shown = accuracies | speeds | paper
        if "validation accuracy" in sentence:
            shown = validated
        numbers = set(numbers_of(sentence))
        seen += len(numbers)
        assert numbers <= shown, f"in no record: {numbers - shown}: {sentence}"
    assert seen > 40


def probes():
    """{run or method of the tenth: the probe's mean over epochs 181 to 200}, as it is printed."""
    means = {}
    for path in sorted(RECORDS.glob("tenth-*-s?")):
        rows = [row for row in evaluation.read_log(path) if row["epoch"] > 180]
        mean = statistics.mean(row["probe"] for row in rows)
        for name in (path.name, path.name[:-len("-s0")]):
            means.setdefault(name, []).append(mean)
    return {name: evaluation.spread(values) for name, values in means.items()}


def converged(name):
    record = evaluation.read_record(RECORDS / name)
    return evaluation.epochs_to_convergence(record.settings, record.log)


def test_what_is_said_of_epochs_of_the_tenth_is_so():
    best = {runs: "{}, {} and {}".format(*(evaluation.read_record(
        RECORDS / f"tenth-{runs}-s{seed}").result["best_epoch"] for seed in range(3)))
        for runs in ("cffm-randaug", "cffm-token", "cffm-views1", "bp-randaug", "ff")}
    mean = {algo: evaluation.spread([converged(f"tenth-{algo}-s{seed}") for seed in range(3)], 0)
            for algo in ("bp", "cff", "cffm", "ff")}
    cffm, bp, symba = (evaluation.read_record(RECORDS / run) for run in (
        "cifar10-full60-cffm-s0", "cifar10-full60-bp-s0", "tenth-symba-s0"))
    losses = evaluation.choosing_losses(bp.settings, bp.log)
    text = " ".join(section("## The claims").split())
    for said in (f"BP's validation loss is least in epoch {bp.result['best_epoch']} and ends "
                 f"{losses[-1] / min(losses) - 1:.0%} higher, CFF+M's is least in epoch "
                 f"{cffm.result['best_epoch']}.".replace("%", " %"),
                 f"FF's validation loss is least in epoch {best['ff']} of 200, "
                 f"SymBa's in {symba.result['best_epoch']}, so",
                 "with means of {tenth-cffm-missing80} / {tenth-bp-missing80}.".format(**probes()),
                 f"validation loss is least in epoch {best['cffm-randaug']} of 200, BP's in "
                 f"{best['bp-randaug']}.",
                 f"validation loss is least in epoch {best['cffm-token']} of 200: neither",
                 "with means of {tenth-cffm-views1} and {tenth-cffm}; its ".format(**probes())
                 + f"validation loss is least in epoch {best['cffm-views1']} of 200",
                 "SymBa's last layer has {tenth-symba-s0}, FF's {tenth-ff-s0};".format(**probes()),
                 "level, with means of {tenth-cffm} and {tenth-cff}".format(**probes()),
                 "also by the probe of the last 20 epochs, with means of {tenth-cffm} and "
                 "{tenth-bp}.".format(**probes()),
                 "the tenth CFF takes {cff}, and BP {bp}, fewer than CFF+M".format(**mean),
                 "CFF+M after {cffm} epochs, FF after {ff} of 200;".format(**mean)):
        assert said in text, f"not said: {said}"
    large = (evaluation.read_record(RECORDS / f"tenth-cffm-m0{m}-s0") for m in (6, 8))
    assert "is least in epoch {} and {} of 200: they".format(
        *(record.result["best_epoch"] for record in large)) in " ".join(README.split())
    for what, seeds in (("", 3), ("-missing80", 2)):        # "with each seed", also by the probe
        for seed in range(seeds):
            cffm, bp = (float(probes()[f"tenth-{a}{what}-s{seed}"]) for a in ("cffm", "bp"))
            assert cffm > bp
    sizes = [*RECORDS.glob("fig7-*/"), *RECORDS.glob("cifar10-short-bp-s0/")]
    least = [evaluation.read_record(path).result["best_epoch"] for path in sizes]
    assert len(least) == 6 and min(least) >= 25, "no validation loss of these short runs rises"


def test_every_claim_that_does_not_simply_hold_is_explained_in_three_sentences():
    claims = section("## The claims")
    holds = dict(re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", claims, flags=re.M))
    notes = dict(re.findall(r"^- \*\*(\d+), .*?\*\* (.*?)(?=^- |^\n)", claims, flags=re.M | re.S))
    assert {number for number, said in holds.items() if not said.startswith("yes")} <= set(notes)
    for number, note in notes.items():
        assert len(re.findall(r"\.(?=\s)", note)) <= 3, f"note {number} is longer"


def test_the_epochs_of_convergence_are_those_of_the_records():
    epochs = {}
    for algo in ("cffm", "ff"):
        record = evaluation.read_record(RECORDS / f"mnist-constant-{algo}-s0")
        v = evaluation.choosing_losses(record.settings, record.log)
        epochs[algo] = [next(epoch for epoch, value in enumerate(v, start=1)
                             if v[0] - value >= share * (v[0] - min(v)))
                        for share in (0.99, 0.9)]
    (a, b), (A, B) = epochs.values()
    text = " ".join(section("## The claims").split())
    assert f"MNIST: CFF+M after {a}, FF after {A}" in text
    assert f"CFF+M and FF make 90 % of the fall in {b} and {B} epochs." in text


def test_what_is_said_of_each_seed_is_so():
    def of_seeds(name, seeds=3):
        names = (f"{name}-s{seed}" for seed in range(seeds))
        return [evaluation.read_record(RECORDS / name).accuracy("test") for name in names]

    def above(better, worse):
        return all(a > b for a, b in zip(better, worse, strict=True))

    text = " ".join(section("## The claims").split())
    cff, cffm, bp, cffm_randaug, bp_randaug, one_view, token = (
        of_seeds(f"tenth-{name}") for name in (
            "cff", "cffm", "bp", "cffm-randaug", "bp-randaug", "cffm-views1", "cffm-token"))
    lead = "{:.1f}, {:.1f} and {:.1f}".format(*(a - b for a, b in zip(cff, cffm, strict=True)))
    assert above(cff, cffm) and f"with each seed on the test images, by {lead} points" in text
    for usual, other, of_paper in ((cffm, one_view, "the paper has 1.42"),
                                   (cffm_randaug, token, "in the paper it costs 5")):
        cost = "{:.1f}, {:.1f} and {:.1f}".format(*(a - b for a, b in zip(usual, other)))
        assert f"By seeds it costs {cost} points, where {of_paper}" in text
    short = [evaluation.read_record(RECORDS / f"cifar10-short-{name}").accuracy("test")
             for name in ("cffm-s0", "s1", "s2")]
    assert above(short, of_seeds("cifar10-short-cff")) and "short runs with each seed" in text
    assert above(cffm, bp) and "With each seed CFF+M is ahead" in text
    assert above(bp_randaug, cffm_randaug) and "seen with each seed" in text
    assert above(bp_randaug, bp) and above(cffm, cffm_randaug) and "only BP gains by R" in text
    for missing in (50, 80):
        few = [of_seeds(f"tenth-{algo}-missing{missing}", 2) for algo in ("bp", "cffm")]
        less = [(a - b) - (c - d) for a, b, c, d in zip(bp_randaug, few[0], cffm_randaug, few[1])]
        assert above(*few) and less[0] > 0.5 and less[1] > (0 if missing == 80 else 0.5)
    assert "loses less; with 80 % missing and seed 1 hardly so" in text
    for wrong in (20, 40):
        bp, cffm = (of_seeds(f"tenth-{algo}-wrong{wrong}") for algo in ("bp", "cffm"))
        costs = [[a - b for a, b in zip(right, wrong, strict=True)]
                 for right, wrong in ((cffm_randaug, cffm), (bp_randaug, bp))]
        assert above(*costs)
    assert "cost CFF+M more than BP with each seed: at 20 %" in text
    assert above(of_seeds("short-cffm-missing80-long"), of_seeds("short-bp-missing80-long"))
    assert "short recipe, it is ahead with each seed" in text


def test_the_rates_of_the_tenth_have_the_records_validation_losses():
    names = {name: algo for algo, name in evaluation.NAMES.items()}
    table = re.findall(r"^\| (\S+(?: Collab)?) \| (\d+) \| (0\.\d+: .*) \|$", README, flags=re.M)
    seen = set()
    for method, epochs, cell in table:
        algo = names[method]
        for lr, shown in re.findall(r"(0\.\d+): (\d\.\d{3})", cell):
            name = f"tenth-{algo}-lr{lr.replace('.', '')}"
            name = name if (RECORDS / name).exists() else f"tenth-{algo}-s0"
            record = evaluation.read_record(RECORDS / name)
            losses = evaluation.choosing_losses(record.settings, record.log)[:int(epochs)]
            assert record.settings["lr"] == float(lr) and len(losses) == int(epochs), name
            assert shown == f"{min(losses):.3f}", name
            seen.add(name)
    assert {path.name for path in FOLDERS if re.match(r"tenth-[a-z]+-lr", path.name)} < seen


def test_the_losses_by_wrong_labels_are_those_of_the_records():
    text = section("### When wrong labels stop CFF+M")
    row = r"^\| (\S+) \| (.*) ?\| `(tenth-\S+)` \| (\S+) \| (\S+) \| (\S+) \|$"
    of, said = shown(), " ".join(text.split())
    table = re.findall(row, text, flags=re.M)
    runs = {path.name for path in FOLDERS if re.match("tenth-.*-wrong40(?!.*-s[12]$)", path.name)}
    assert len(table) == len(runs) and runs == {name for _, _, name, *_ in table}
    for method, changed, name, equal, least, accuracy in table:
        record = evaluation.read_record(RECORDS / name)
        s, losses = record.settings, evaluation.choosing_losses(record.settings, record.log)
        assert evaluation.NAMES[s["algo"]] == method and len(losses) == 200, name
        assert ("crops alone" in changed) == (s["augment"] == "crop"), name
        m, images, most = s["mL"] * (s["algo"] == "cffm"), record.images[1], s["batch_size"]
        batches = [min(most, images - start) for start in range(0, images, most)]
        level = sum(B * loss_of_equal(B, m, s["temperature"]) for B in batches) / images
        level = math.log(10) if s["algo"] == "bp" else level
        found = f"{level:.3f}", f"{min(losses):.3f}", of[name]
        assert (equal, least, accuracy) == found, name
    probe = evaluation.read_log(RECORDS / "tenth-cffm-wrong40-s0")[0]["probe"]
    bp, cffm = (evaluation.read_record(RECORDS / f"tenth-{algo}-wrong40-crop")
                for algo in ("bp", "cffm"))
    for words in (f"from {probe:.1f} after the first epoch to a mean of "
                  f"{probes()['tenth-cffm-wrong40-s0']} in the last 20",
                  f"least in epoch {bp.result['best_epoch']} of 200 and ends at "
                  f"{bp.log[-1]['val_loss_4']:.3f}, above",
                  f"CFF+M's is least in epoch {cffm.result['best_epoch']}."):
        assert words in said, f"not said: {words}"


def loss_of_equal(B, m, tau):
    """Eq. 17 of B images of ten classes in two views, all similarities equal and at most 1 - m."""
    P = 1 + 2 * (B - 1) / 10                            # the other view; a tenth of other images
    return math.log(P * math.exp(m / tau) + 2 * B - 1 - P) - m / tau


def test_the_parts_of_the_short_recipe_have_the_records_validation_accuracies():
    table = dict(re.findall(r"^\|[^|]*\| `(short15[^`]*)` \| ([^|]+) \|", README, flags=re.M))
    assert set(table) == {path.name for path in FOLDERS if path.name.startswith("short15")}
    for name, shown in table.items():
        value = evaluation.read_record(RECORDS / name).accuracy("val")
        assert shown == f"{value:.1f}", f"{name} has {value} % on validation data"


# ------------------------------------------------------------------------------------- the commands

@pytest.fixture(scope="module")
def commands_of_records():
    """{name of the run's folder: arguments of train.py}, as a shell makes them of the commands."""
    if not shutil.which("bash"):
        pytest.skip("the commands are expanded by bash")
    typed = commands(section("## The commands", RUNS))
    script = "python() { printf '%q ' \"$@\"; echo; }\n" + typed
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = [shlex.split(line)[1:] for line in done.stdout.splitlines()
             if line.startswith("train.py ")]
    named = {Path(call[call.index("--out") + 1]).name: call for call in calls}
    assert len(named) == len(calls), "two commands write to the same folder"
    return named


def test_every_record_has_its_command_and_every_command_its_record(commands_of_records):
    assert set(commands_of_records) == {path.name for path in FOLDERS}


def test_each_command_has_the_settings_of_its_record(commands_of_records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, arguments in commands_of_records.items():
        record = evaluation.read_record(RECORDS / name)
        settings, _ = train.parse(arguments)
        different = {key: (settings[key], value) for key, value in record.settings.items()
                     if key in train.SETTINGS and settings[key] != value
                     and key not in ("out", "data_dir", "device", "recipe")}
        assert not different, f"{name}: (by its command, in its record): {different}"


def test_the_commands_for_the_papers_rows_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, seen = section("## The paper's tables, row by row"), 0
    short = dict(re.findall(r'(\w+)\(\) \{ python train\.py (.*) "\$@"; \}', README))
    assert set(short) == {"c10", "mlp"}
    for line in re.findall(r"`((?:c10|mlp|python train\.py)(?: [^`]*)?)`", text):
        for word, meant in (*short.items(), ("python train.py", "")):
            if line.startswith(word):
                train.parse(shlex.split(meant + line[len(word):]))
                seen += 1
    assert seen >= 25
    models = re.findall(r"`(vit-[\d-]+)`", text)
    assert len(models) == 8 and all(train.plain_name(model) == model for model in models)


def test_the_records_that_commands_name_are_there():
    text = re.sub(r"\$R\b", "experiments/records", README + RUNS)
    named = set(re.findall(r"experiments/records/[^\s`)]+", text))
    assert len(named) > 8
    for name in named:
        pattern = re.sub(r"-N\.json", "-*.json", name)
        assert list(ROOT.glob(pattern.rstrip("/"))), f"{name}: no such record"
    for name in set(re.findall(r"`((?:cifar10|short|tenth|mnist|shapes)-[\w-]*\w)`", text)):
        assert list(RECORDS.glob(name + "*")), f"{name}: no such record"
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (HERE / picture).exists(), f"no picture {picture}"


# -------------------------------------------------------------------------------------- the page

def test_no_cell_of_a_table_is_a_paragraph():
    skipped, pages = {"data", "runs", "venv", "node_modules"}, []
    for path in ROOT.rglob("*.md"):
        parts = path.relative_to(ROOT).parts
        if not any(part.startswith(".") or part in skipped for part in parts):
            pages.append(path)
    assert {HERE / "README.md", RECORDS / "README.md"} <= set(pages)
    for page in pages:
        for line in page.read_text(encoding="utf-8").splitlines():
            for cell in re.split(r"(?<!\\)\|", line) if line.startswith("|") else []:
                assert len(cell.strip()) <= 180, f"{page.relative_to(ROOT)}: {cell.strip()}"


@pytest.mark.parametrize("page", [README, RUNS], ids=["experiments", "records"])
def test_a_page_is_no_longer_than_400_lines_and_prose_no_wider_than_140(page):
    lines = page.splitlines()
    assert len(lines) < 400
    wide = [line for line in lines if len(line) > 140 and not line.startswith("|")]
    with_versions = [line for line in wide if "torch 2." in line]       # headings of printed tables
    assert wide == with_versions, wide


# ---------------------------------------------------------------------------------- the front page

def test_the_front_pages_numbers_are_those_of_this_page_and_of_the_records():
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    here = section("## The claims")
    holds = dict(re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", here, flags=re.M))
    rows = front.split("## What of the paper holds here")[1].split("\n## ")[0]
    rows = [row for row in rows.splitlines() if row.startswith("| ")][1:]
    numbers = [number for row in rows for number in re.findall(r"\d+\.\d+(?: ± \d\.\d)?", row)]
    assert len(rows) == 8 and len(numbers) > 30
    for row in rows:
        _, claim, *_, verdict, _ = (cell.strip() for cell in row.split("|"))
        assert verdict == holds[claim], row
    for number in numbers:
        assert number in here or number == "1.42", f"not in {HERE.name}/README.md: {number}"
    expected = re.findall(r"([\d.]+) % \((?:record )?`([^`]+)`\)", front)
    assert len(expected) == 3, "what a laptop can expect"
    for value, record in expected:
        result = json.loads((HERE / "records" / record / "result.json").read_text())
        assert value == f"{result['test_top1']:.1f}", record


def test_the_front_page_quotes_cff_step_as_it_is():
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = front.split("## The heart of it")[1].split("\n## ")[0]
    quoted = [line for line in quoted.splitlines() if line.startswith("    ")]
    source = (ROOT / "cff.py").read_text(encoding="utf-8").split("def one_forward_step")[0]
    assert len(quoted) == 15 and "\n".join(quoted) in source
