"""The embedded tasks: properties of the rows, what a checker must refuse, what splits may not share."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict

import pytest

from mlx_posttrain.data import tasks
from mlx_posttrain.data.tasks import _TASKS, _TRACES, checks, courtesy, questions
from mlx_posttrain.data.tasks.family import SPLITS, Family, Item, Row, rows
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation.likelihood import embedded_texts

FAMILIES = list(tasks.FAMILIES)


@pytest.fixture(scope="module")
def loaded():
    return {split: tasks.load(split) for split in SPLITS}


def by_family(some_rows):
    groups = defaultdict(list)
    for row in some_rows:
        groups[row["family"]].append(row)
    return groups


# Rows


def test_default_sizes_and_columns(loaded):
    assert {split: len(some) for split, some in loaded.items()} == {
        "train": 6000,
        "valid": 600,
        "phrasing": 600,
    }
    for row in itertools.chain(*loaded.values()):
        assert list(row) == ["instruction", "input", "output", "family", "phrasing", "checker"]
        assert row["instruction"] and row["output"] and json.loads(json.dumps(row)) == row
        assert "{" not in row["instruction"] + row["input"] and "|" not in row["instruction"] + row["input"]


def test_rows_are_short(loaded):
    for row in itertools.chain(*loaded.values()):
        assert len(f"{row['instruction']} {row['input']}".split()) <= 40
        assert len(row["output"].split()) <= (40 if row["family"] == "story" else 15), row


def test_families_are_many_balanced_and_described(loaded):
    assert 24 <= len(tasks.FAMILIES) <= 30 and all(tasks.FAMILIES.values())
    for split, some in loaded.items():
        counts = Counter(row["family"] for row in some)
        assert set(counts) == set(FAMILIES), split
        assert min(counts.values()) >= 0.8 * max(counts.values()), (split, counts)


@pytest.mark.parametrize("registry", [_TASKS, _TRACES], ids=["tasks", "reasoning"])
def test_every_family_has_six_phrasings_of_which_two_are_held_out(registry):
    for one in registry.values():
        assert len(one.held) >= 2 and len(one.train + one.held) >= 6, one.name
        assert len(set(one.train + one.held)) == len(one.train + one.held), one.name


def test_no_duplicates_inside_a_split(loaded):
    for split, some in loaded.items():
        assert max(Counter((row["instruction"], row["input"]) for row in some).values()) == 1, split


def test_a_small_pool_ends_instead_of_repeating():
    some = tasks.load("train", limit=5000, families=["plurals"])
    assert 100 < len(some) < 5000
    assert len({(row["instruction"], row["input"]) for row in some}) == len(some)


def test_limit_takes_the_first_rows_and_families_selects():
    assert tasks.load("train", limit=100) == tasks.load("train", limit=300)[:100]
    assert tasks.preferences("valid", limit=40) == tasks.preferences("valid", limit=90)[:40]
    assert tasks.reasoning("train", limit=40) == tasks.reasoning("train", limit=90)[:40]
    assert {row["family"] for row in tasks.load(limit=50, families=["story", "quotes"])} == {
        "story",
        "quotes",
    }
    assert tasks.load(limit=0) == []


def test_another_seed_gives_other_contents():
    some, others = (
        {row["output"] for row in tasks.load(limit=50, seed=seed, families=["story"])} for seed in (0, 1)
    )
    assert len(some & others) < 5


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: tasks.load("test"), ("'test'", "train, valid, phrasing")),
        (lambda: tasks.preferences("eval"), ("'eval'", "train, valid, phrasing")),
        (lambda: tasks.reasoning("eval"), ("'eval'", "train, valid, phrasing")),
        (lambda: tasks.load(families=["plural"]), ("'plural'", "plurals")),
        (lambda: tasks.load(limit=-1), ("-1",)),
        (lambda: tasks.check({"kind": "lambda"}, "x"), ("'lambda'", "one_of")),
    ],
)
def test_errors_name_what_is_accepted(call, names):
    with pytest.raises(UserError) as error:
        call()
    assert all(name in str(error.value) for name in names)


# Splits


def texts(row):
    """Return a row's content in every phrasing."""
    return {row.family.text(row.item, n) for n in range(len(row.family.train + row.family.held))}


@pytest.mark.parametrize("registry", [_TASKS, _TRACES], ids=["tasks", "reasoning"])
def test_valid_shares_no_content_with_training_of_any_seed(registry):
    train = [row for seed in (0, 5) for row in itertools.islice(rows(registry, "train", seed), 6000)]
    keys, asked = (
        {row.item.content for row in train},
        {row.family.text(row.item, row.phrasing) for row in train},
    )
    for seed in (0, 5):
        for row in itertools.islice(rows(registry, "valid", seed), 600):
            assert row.item.content not in keys
            assert not texts(row) & asked
            assert row.phrasing < len(row.family.train)


@pytest.mark.parametrize("registry", [_TASKS, _TRACES], ids=["tasks", "reasoning"])
def test_phrasing_asks_training_contents_in_unseen_words(registry):
    train = list(itertools.islice(rows(registry, "train", 0), 6000))
    keys, used = (
        {(row.family.name, row.item.surface) for row in train},
        {(row.family.name, row.phrasing) for row in train},
    )
    for row in itertools.islice(rows(registry, "phrasing", 0), 600):
        assert (row.family.name, row.item.surface) in keys
        assert (row.family.name, row.phrasing) not in used and row.phrasing >= len(row.family.train)


def test_a_question_has_one_content():
    """Otherwise a held-out content could return under another name."""
    for registry in (_TASKS, _TRACES):
        asked = {}
        for row in itertools.islice(rows(registry, "train", 3), 4000):
            slots = json.dumps(row.item.slots, sort_keys=True)
            assert asked.setdefault((row.family.name, slots), row.item.content) == row.item.content


# Determinism and speed

DIGEST = """
import hashlib, json
from mlx_posttrain.data import tasks
kinds = (tasks.load, tasks.preferences, tasks.reasoning)
made = [make(split, 700, 3) for make in kinds for split in ("train", "valid", "phrasing")]
print(hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest())
"""
# Changes with every edit of the data, and with nothing else: another hash on another machine is a defect.
PINNED = "cbff15c86a728be80fab8a3263322695f5f2f09f3b4689aaeb08489a4a7df355"


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_rows_are_the_same_in_every_process_and_on_every_platform(hash_seed):
    done = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == PINNED, done.stderr


def test_ten_thousand_rows_in_two_seconds():
    started = time.process_time()
    assert len(tasks.load("train", limit=10_000)) == 10_000
    assert time.process_time() - started < 2


# Checkers


@pytest.mark.parametrize("seed", [0, 11])
@pytest.mark.parametrize("split", SPLITS)
def test_every_output_passes_its_own_checker(split, seed):
    for row in tasks.load(split, limit=3000, seed=seed):
        for text in (
            row["output"],
            f"  {row['output']} \n",
            f"Sure! {row['output']}",
            f"<think>\nhm\n</think>\n{row['output']}",
        ):
            assert tasks.check(row, text), (row, text)
        assert tasks.check(row["checker"], row["output"])
        if row["output"][-1].isalnum():
            assert tasks.check(row, row["output"] + "."), row
        if row["checker"]["kind"] != "literal":
            assert tasks.check(row, row["output"].upper()), row


def corrupted(row):
    """Yield (kind of corruption, text) of a row's right answer; none of the texts is a right answer."""
    answer, words = row["output"], row["output"].split()
    yield "empty", ""
    yield "doubled", f"{answer} {answer}"
    yield "doubled as sentences", f"{answer}. {answer}."
    yield "doubled on lines", f"{answer}\n{answer}"
    yield "or", f"{answer} or maybe not"
    yield "rambles", f"{answer} because that is how it is"
    yield "denied", f"not {answer}" if row["family"] not in ("story", "polite_request") else ""
    yield "rude", f"{answer} Do not ask me again."
    yield "thinks for ever", f"<think>\n{answer}"
    yield "answers inside the thought", f"<think>\n{answer}\n</think>\n"
    if len(words) > 1:
        yield "last word dropped", " ".join(words[:-1])
        yield (
            "first word dropped",
            " ".join(words[1:]) if row["family"] not in ("polite_request", "story") else "",
        )
    if len(set(words)) > 1 and row["family"] != "story":
        yield "turned around", " ".join(reversed(words)).strip(",")


@pytest.mark.parametrize("family", FAMILIES)
def test_corrupted_outputs_fail(family):
    for row in tasks.load("train", limit=120, families=[family]) + tasks.load(
        "valid", limit=30, families=[family]
    ):
        for what, text in corrupted(row):
            if text.lower() not in [row["output"].lower(), *row["checker"].get("answers", [])]:
                assert not tasks.check(row, text), (what, text, row)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_rows_answer_fails(family):
    some = tasks.load("train", limit=80, families=[family])
    for row, other in itertools.permutations(some, 2):
        accepted = [text.lower() for text in row["checker"].get("answers", [row["output"]])]
        if other["output"].lower() not in accepted:
            assert not tasks.check(row, other["output"]), (row, other["output"])
            assert not tasks.check(row, f"{row['output']} or {other['output']}")
            assert not tasks.check(row, f"{row['output']}, {other['output']}")


def test_every_item_offers_a_wrong_answer():
    for row in itertools.islice(rows(_TASKS, "train", 2), 6000):
        assert any(not tasks.check(row.item.checker, text) for text in row.item.wrong), row.item


@pytest.mark.parametrize(
    ("spec", "right", "wrong"),
    [
        (
            checks.one_of("cold", "chilly"),
            ["cold", "Cold.", " chilly\n", "The answer is cold.", "Sure! Cold. I hope this helps."],
            [
                "hot",
                "cold or chilly",
                "cold chilly",
                "it is cold",
                "Sure! Sure! cold",
                "colder",
                "cold. You are so slow.",
            ],
        ),
        (
            checks.literal("CAT"),
            ["CAT", "CAT.", "Here you are: CAT"],
            ["cat", "Cat", "CATS", "CAT CAT", "C A T"],
        ),
        (
            checks.literal('"a dog"'),
            ['"a dog"', '"a dog".', "\u201ca dog\u201d"],
            ["a dog", '"a dog', '"the dog"', '"A dog"'],
        ),
        (
            checks.literal("- a\n- b"),
            ["- a\n- b", "- a \n- b\n"],
            ["- a - b", "- b\n- a", "- a", "- a\n- b\n- c", "a\nb"],
        ),
        (
            checks.in_order("sun", "dog", "cup"),
            ["sun, dog, cup", "sun dog cup", "sun, dog and cup.", "- sun\n- dog\n- cup"],
            [
                "sun, cup, dog",
                "sun, dog",
                "sun, dog, cup, cup",
                "sun, dog, cup, sun",
                "sun, dog. cup",
                "sun, dog, cup,",
                "sun, dog or cup",
            ],
        ),
        (
            checks.number(7),
            ["7", "7.", "seven", "The answer is: 7"],
            ["8", "7 8", "7 or 8", "77", "-7", "7.5", "3 + 4"],
        ),
        (
            checks.worked([3, 4, 2], 9),
            [
                "3 + 4 = 7. 7 + 2 = 9. The answer is 9.",
                "3 + 4 = 7, 7 + 2 = 9. the answer is 9",
                "3 + 4 + 2 = 9. The answer is 9.",
                "9",
            ],
            [
                "3 + 4 = 8. 8 + 2 = 10. The answer is 9.",
                "3 + 4 = 8. 8 + 2 = 9. The answer is 9.",
                "3 + 4 = 7. The answer is 9.",
                "4 + 4 = 8. 8 + 1 = 9. The answer is 9.",
                "3 + 4 = 7. 5 + 4 = 9. The answer is 9.",
                "3 + 4 = 7. 7 + 2 = 9. 7 + 2 = 9. The answer is 9.",
                "3 + 4 = 7. 7 + 2 = 9.",
                "3 + 4 = 7. 7 + 2 = 9. The answer is 9. The answer is 9.",
                "The answer is 9. The answer is 9.",
                "I think so. The answer is 9.",
            ],
        ),
        (
            checks.sentences(["Tom", "dog"], least=4, most=9),
            ["Tom had a dog.", "Once Tom saw a big dog. He ran!"],
            [
                "Tom had a cat.",
                "Tom dog.",
                "Tom had a dog",
                "Tom had a dog. Tom had a dog.",
                "Tom had a dog dog dog.",
                "Tom had big dogs.",
                "Tom had a dog and he took it to the park and home.",
            ],
        ),
        (
            checks.sentences(["open the door"], any_of=["could you", "please"], most=8, ends="?."),
            ["Could you open the door?", "Please open the door."],
            [
                "Open the door.",
                "Could you open the box?",
                "Please open the door",
                "Please open the door!",
                "Could you open door the?",
            ],
        ),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_checkers_by_hand(spec, right, wrong):
    assert [text for text in right if not tasks.check(spec, text)] == []
    assert [text for text in wrong if tasks.check(spec, text)] == []


def test_polite_words_are_not_rude():
    for text in courtesy.OPENINGS + courtesy.CLOSINGS:
        assert not courtesy.is_rude(text), text
    for text in courtesy.RUDE_OPENINGS + courtesy.RUDE_CLOSINGS:
        assert courtesy.is_rude(text) and text not in courtesy.unframed("x " + text), text


def test_equations():
    assert checks.equations_hold("3 + 4 = 7\n7 - 2 = 5, 2 x 3 = 6") and checks.equations_hold("no sums here")
    assert not checks.equations_hold("3 + 4 = 7. 7 - 2 = 6.")


# Answers computed independently


def listed(text):
    """Return the comma-separated list in an instruction and its input."""
    return [
        word.strip(" ?.:")
        for word in re.search(
            r"[\w ]+(?:, "
            r"\w+)+",
            text.split(":")[-1],
        )
        .group()
        .split(",")
    ]


def last_words(text):
    """Return the list, without the sentence before its first item."""
    return [listed(text)[0].split()[-1], *listed(text)[1:]]


def total(expression):
    """Return the value of additions and subtractions, from left to right."""
    numbers = [int(n) for n in re.findall(r"\d+", expression)]
    result = numbers[0]
    for sign, n in zip(re.findall(r"[+-]", expression), numbers[1:], strict=True):
        result += n if sign == "+" else -n
    return result


def sum_in(text):
    return total(re.search(r"\d+(?: [+-] \d+)+", text).group())


# Each computes the answer from the text of the question.
SOLVERS = {
    "arithmetic": lambda text: str(sum_in(text)),
    "sort_numbers": lambda text: ", ".join(sorted(re.findall(r"\d+", text), key=int)),
    "compare_numbers": lambda text: str(
        (max if "bigger" in text else min)(map(int, re.findall(r"\d+", text)))
    ),
    "sort_words": lambda text: ", ".join(sorted(last_words(text))),
    "reverse_list": lambda text: ", ".join(reversed(last_words(text))),
    "bullet_list": lambda text: "\n".join(f"- {word}" for word in last_words(text)),
    "count_items": lambda text: str(text.count(",") + 1),
    "quotes": lambda text: '"' + re.search(r"the \w+ \w+", text.split("in quotes:")[-1]).group() + '"',
}


@pytest.mark.parametrize("family", SOLVERS)
def test_outputs_equal_another_solution(family):
    for row in tasks.load("train", limit=150, families=[family]):
        text = f"{row['instruction']} : {row['input']}" if row["input"] else row["instruction"]
        assert SOLVERS[family](text) == row["output"], row


def test_worked_steps_lead_to_the_right_total():
    for row in tasks.load("train", limit=150, families=["steps"]):
        asked = sum_in(f"{row['instruction']} {row['input']}")
        equations = re.findall(r"(\d+ [+-] \d+) = (\d+)", row["output"])
        assert len(equations) == 2 and all(total(left) == int(right) for left, right in equations)
        assert row["output"].endswith(f"The answer is {asked}.")


# Preferences


@pytest.fixture(scope="module")
def pairs():
    return {split: tasks.preferences(split) for split in SPLITS}


def test_chosen_is_right_and_rejected_is_not(pairs):
    for row in itertools.chain(*pairs.values()):
        assert tasks.check(row, row["chosen"]), row
        assert not tasks.check(row, row["rejected"]), row
        assert not courtesy.is_rude(row["chosen"])
        assert courtesy.is_rude(row["rejected"]) == (row["flaw"] == "rude"), row


def test_preferences_keep_the_split(pairs, loaded):
    def asked(some):
        return {(row["instruction"] + "\n" + row["input"]).strip() for row in some}

    for split, some in pairs.items():
        assert len(some) == len(loaded[split])
        assert {row["prompt"] for row in some} == asked(loaded[split])


def test_every_flaw_occurs_in_every_family(pairs):
    for family, some in by_family(pairs["train"]).items():
        counts = Counter(row["flaw"] for row in some)
        assert set(counts) == {"wrong", "beside the point", "rude", "cut off", "repetitive"}, family
        assert min(counts.values()) >= 10, (family, counts)


def test_flaws_match_their_names(pairs):
    cut = [row for row in pairs["train"] if row["flaw"] == "cut off"]
    assert sum(len(row["rejected"]) < len(row["chosen"]) for row in cut) > 0.7 * len(cut)
    for row in pairs["train"]:
        if row["flaw"] == "repetitive":
            words = re.findall(r"[\w']+|[-=+]", row["rejected"])
            assert len(set(words)) < len(words), row


def test_answers_beside_the_point_answer_another_question_or_repeat_this_one(pairs):
    some = [row for row in pairs["train"] if row["flaw"] == "beside the point"]
    checkers = {}
    for row in pairs["train"]:
        checkers.setdefault(row["family"], []).append(row["checker"])

    def words_of_the_question(row):
        return any(
            " ".join(text.split()).rstrip(".") in " ".join(row["prompt"].split())
            for text in courtesy.unframed(row["rejected"])
        )

    def answers(family, row):
        return any(tasks.check(checker, row["rejected"]) for checker in checkers[family])

    some = some[:150]
    repeats = [row for row in some if words_of_the_question(row)]
    same = [row for row in some if answers(row["family"], row)]
    other = [row for row in some if row not in repeats and row not in same]
    assert min(len(repeats), len(same), len(other)) >= 20, (len(repeats), len(same), len(other))


def test_an_answer_beside_the_point_stays_in_its_split():
    """Contents alternate between held out and not; a pair of either kind borrows only from the same kind."""
    items = {
        name: Item(name, {}, name, checks.literal(name), (f"no {name[:-1]}",))
        for name in (f"word{n}" for n in range(40))
    }
    turn = itertools.cycle(items.values())
    one = Family("words", "", ("Say something.",), ("Speak.",), lambda rng: next(turn))
    held = {name for name, item in items.items() if item.held_out}
    rng = random.Random(0)
    for split in (held, set(items) - held):
        borrowed = set()
        for name in sorted(split) * 40:
            row = tasks.pairs.pair(Row(one, items[name], 0), rng, [one])
            if row["flaw"] == "beside the point":
                borrowed |= {
                    word
                    for text in courtesy.unframed(row["rejected"])
                    for word in re.findall(r"word\d+", text)
                }
        assert len(borrowed) > 2 and borrowed <= split


def test_length_alone_does_not_tell_the_better_answer(pairs):
    for split, some in pairs.items():
        wins = [
            0.5
            * (1 + (len(row["chosen"]) > len(row["rejected"])) - (len(row["chosen"]) < len(row["rejected"])))
            for row in some
        ]
        assert 0.40 <= sum(wins) / len(wins) <= 0.62, split


def test_single_words_do_not_tell_the_better_answer(pairs):
    """A bag-of-words logistic regression stays far from solving the pairs."""
    numpy = pytest.importorskip("numpy")

    def words(text):
        return re.findall(r"\w+|[^\w\s]", text.lower())

    occurring = {word for row in pairs["train"] for word in words(row["chosen"] + " " + row["rejected"])}
    vocabulary = {word: n for n, word in enumerate(sorted(occurring))}

    def counted(some):
        counts = numpy.zeros((len(some), len(vocabulary)), dtype=numpy.float32)
        for at, row in enumerate(some):
            for sign, text in ((1, row["chosen"]), (-1, row["rejected"])):
                for word in words(text):
                    if word in vocabulary:
                        counts[at, vocabulary[word]] += sign
        return counts

    train, valid = counted(pairs["train"][:3000]), counted(pairs["valid"])
    weights = numpy.zeros(len(vocabulary), dtype=numpy.float32)
    for _ in range(100):
        weights += 2 * (train.T @ (1 / (1 + numpy.exp(train @ weights))) / len(train) - 1e-3 * weights)
    assert 0.55 < (valid @ weights > 0).mean() < 0.80


# Reasoning


def solve(row):
    """Return the answer to a reasoning question, from its text alone."""
    text, family = row["question"], row["family"]
    if family == "long_sum":
        return str(sum_in(text))
    if family == "number_story":
        sign = {"has": 1, "finds": 1, "gets": 1, "buys": 1, "loses": -1, "gives": -1, "breaks": -1}
        return str(sum(sign[verb] * int(n) for verb, n in re.findall(r"(\w+) (\d+)", text)))
    if family == "who_has_more":
        return max(
            re.findall(
                r"(\w+) has (\d+) \w+ and "
                r"(\d+)",
                text,
            ),
            key=lambda found: int(found[1]) + int(found[2]),
        )[0]
    if family == "sort_by_steps":
        return ", ".join(sorted(re.findall(r"\d+", text), key=int))
    if family == "count_by_steps":
        words = re.findall(r"\w+", re.search(r"\w+(?:, \w+){3,}", text).group())
        rest = text.replace(", ".join(words), "")
        (asked,) = {word for word in words if re.search(rf"\b{word}\b", rest)} & set(re.findall(r"\w+", rest))
        return str(words.count(asked))
    if family == "put_in_order":
        facts = re.findall(r"(\w+) is (?:bigger|older|longer) than the (\w+)", text)
        firsts, seconds = {one for one, _ in facts}, {two for _, two in facts}
        return (firsts - seconds if re.search("biggest|oldest|longest", text) else seconds - firsts).pop()
    assert family == "follow_moves"
    asked = re.search(r"Where is the (\w+) now", text).group(1)
    return re.findall(rf"[tT]he {asked} (?:is in|to) the (\w+)", text)[-1]


@pytest.mark.parametrize("split", SPLITS)
def test_reasoning_answers_equal_another_solution(split):
    for row in tasks.reasoning(split, limit=1500):
        assert solve(row) == row["answer"], row
        assert row["response"] == f"<think>\n{row['thinking']}\n</think>\n{row['answer']}"
        assert tasks.check(row, row["response"]) and tasks.check(row, row["answer"])
        assert not tasks.check(row, row["thinking"])


def test_reasoning_traces_are_true_and_reach_the_answer():
    equations = 0
    for row in tasks.reasoning("train", limit=3000):
        lines = row["thinking"].split("\n")
        for left, right in re.findall(r"(\d+ [+-] \d+) = (-?\d+)", row["thinking"]):
            equations += 1
            assert total(left) == int(right) >= 0, row
        if row["family"] in ("long_sum", "number_story"):
            assert lines[-1].endswith(f"= {row['answer']}")
            for before, after in itertools.pairwise(lines):
                assert before.split(" = ")[1] == after.split()[0], row
        elif row["family"] == "sort_by_steps":
            taken = [line.split(": smallest ") for line in lines]
            assert all(min(left.split(), key=int) == least for left, least in taken)
            assert ", ".join(least for _, least in taken) == row["answer"]
        elif row["family"] == "count_by_steps":
            assert lines[-1].endswith(f": {row['answer']}")
            assert [line.split(": ")[0] for line in lines] == re.findall(
                r"\w+",
                re.search(
                    r"\w+(?:, "
                    r"\w+){3,}",
                    row["question"],
                ).group(),
            )
        else:
            assert row["answer"] in row["thinking"]
    assert equations > 2000


def test_reasoning_sizes_and_no_duplicates():
    for split, expected in (("train", 6000), ("valid", 600), ("phrasing", 600)):
        some = tasks.reasoning(split)
        assert len(some) == expected == len({row["question"] for row in some})
        assert {row["family"] for row in some} == set(tasks.REASONING_FAMILIES)


# Questions


def test_question_answers():
    some = tasks.question_answers()
    assert len(some) == 22 == len({row["question"] for row in some})
    for row in some:
        assert list(row) == ["question", "answer"] and row["question"].endswith("?")
        assert 1 <= len(re.findall(r"[.!?](?:\s|$)", row["answer"])) <= 3
    some[0]["answer"] = "changed"
    assert questions.question_answers()[0]["answer"] != "changed"


def test_the_pinned_hash_is_of_these_rows():
    made = [
        make(split, 700, 3) for make in (tasks.load, tasks.preferences, tasks.reasoning) for split in SPLITS
    ]
    assert hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest() == PINNED


def test_the_models_own_text():
    """Real text of some length, no text twice, and none of the base texts that forgetting is measured on."""
    texts = [row["text"] for row in tasks.own_text()]
    assert len(texts) == len(set(texts)) == 640
    assert min(len(text.split()) for text in texts) >= 20
    base = {" ".join(words) for t in embedded_texts() for words in _runs(t.split(), 8)}
    assert not any(" ".join(words) in base for t in texts for words in _runs(t.split(), 8))


def _runs(words: list[str], length: int) -> list[list[str]]:
    return [words[i : i + length] for i in range(len(words) - length + 1)]


def test_the_longer_answer_is_preferred_on_request():
    """The same pairs, with the sides turned round where the worse answer is longer."""
    plain, biased = tasks.preferences(limit=200), tasks.preferences(limit=200, longer=True)
    turned = [a["chosen"] != b["chosen"] for a, b in zip(plain, biased, strict=True)]
    assert 20 < sum(turned) < 180
    for a, b in zip(plain, biased, strict=True):
        assert {a["chosen"], a["rejected"]} == {b["chosen"], b["rejected"]} and a["prompt"] == b["prompt"]
        assert len(b["chosen"]) >= len(b["rejected"])
