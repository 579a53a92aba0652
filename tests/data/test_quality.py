"""Each filter on rows that it clearly must keep or drop, and all filters on real data."""

import random
from pathlib import Path

import pytest

from mlx_posttrain.data.quality import (
    bands,
    clean,
    is_boilerplate,
    is_cut_off,
    is_language,
    near_duplicates,
    normalised,
    shingles,
)
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.errors import UserError

PROSE = "The old house on the hill had been empty for many years before the new family came"


def row(prompt: str, answer: str) -> Conversation:
    return Conversation((Turn("user", prompt), Turn("assistant", answer)))


@pytest.mark.parametrize(
    "answer",
    [
        PROSE,
        PROSE + ",",
        "First we went home, and then we saw the",
        "There are three: red, green and",
        "```python\nprint(1)",
        "1. Wash the apples.\n2. Cut them with a",
        PROSE + ". " + PROSE + " to live in it and",
    ],
)
def test_cut_off(answer: str) -> None:
    assert is_cut_off(answer)


@pytest.mark.parametrize(
    "answer",
    [
        PROSE + ".",
        PROSE + '."',
        PROSE + "\u3002",
        "Paris",
        "The capital is Paris",
        "switch on",
        "- apples and pears from the garden\n- a loaf of bread from the baker\n- milk for the small cat",
        "Here are some good ideas for a dinner:\n- pasta with tomato sauce and fresh basil from the garden",
        "red, green, blue, yellow, orange, purple, brown, pink, grey, black, white, violet, cyan",
        "def f(x):\n    y = x + 1\n    z = y + 2\n    for a in range(z):\n        y += a * x\n    return y",
        "```python\nprint(1)\n```",
        "Roses are red and violets are blue\nSugar is sweet and so are you\nThe sun goes down on the quiet "
        "sea",
        "Dear Ann,\n\n" + PROSE + ".\n\nYours sincerely,\nJane Austen",
        PROSE + ". Yours sincerely, Jane Austen",
        "The answer is the sum of all the numbers from one to ten, which is 55",
        "",
        "  ",
    ],
)
def test_not_cut_off(answer: str) -> None:
    assert not is_cut_off(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I cannot have opinions.",
        "Well, as an AI, I do not eat.",
        "I'm just an AI language model.",
        "I\u2019m sorry, but I can\u2019t help with that.",
        "I am sorry, I am unable to open links.",
        "I cannot provide that information.",
        "Sorry, I can't do this.",
        "<noinput>",
        "N/A",
        "https://example.org/a www.example.org",
        "...",
        "I was trained by OpenAI.",
    ],
)
def test_boilerplate(answer: str) -> None:
    assert is_boilerplate(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI judge, I find the robot not guilty.",
        "Elon Musk helped to found OpenAI.",
        "I am sorry for your loss, and I hope you feel better soon.",
        "I cannot wait to see you!",
        "See https://example.org for more.",
        "None of them came.",
        "日本",
    ],
)
def test_not_boilerplate(answer: str) -> None:
    assert not is_boilerplate(answer)


LANGUAGES = {
    "en": "The cat sat on the mat and it was happy with the food that they gave to it.",
    "de": "Die Katze ist nicht auf der Matte und sie wird mit dem Hund von der Straße auch gehen.",
    "fr": "Le chat est sur la table et les enfants sont dans une maison avec leur mère qui est belle.",
    "es": "El gato es muy bonito y los niños son felices con su madre en una casa que está en un lugar.",
    "it": "Il gatto è sul tavolo della cucina e la madre di Anna non è a casa con le figlie.",
    "pt": "O gato é uma beleza e os meninos não são felizes com a mãe em uma casa que foi para você.",
    "nl": "De kat zit op het dak van een huis en dat is niet te zien voor de hond met zijn bal.",
}


def test_language() -> None:
    for name, text in LANGUAGES.items():
        assert {other for other in LANGUAGES if is_language(text, other)} == {name}
    assert not is_language("Привет, как дела?")
    assert not is_language("她周一去了学校")
    for text in (
        "Paris",
        "",
        "42",
        "for i in range(10): print(i in x)",
        "20 miles per hour is about 32 kilometres per hour or so.",
        "déjà vu",
        # two stopwords are not enough
        "Ragu alla Bolognese, Spaghetti alla Carbonara, Risotto, Polenta, Lasagne",
    ):
        assert is_language(text)


def test_near_duplicates() -> None:
    words = [f"word{i}" for i in range(40)]
    base = " ".join(words)
    # 36 shingles; a changed last word changes 1 of them: 35 / 37; a changed middle word 5: 31 / 41 = .756;
    # two changed middle words 10: 26 / 46 = .565
    near, middle, far = " ".join([*words[:-1], "x"]), words.copy(), words.copy()
    middle[20] = "x"
    far[10] = far[30] = "x"
    assert len(shingles(base)) == 36
    assert list(near_duplicates([base, near, "other text", base.upper()])) == [False, True, False, True]
    assert list(near_duplicates([base, " ".join(middle)], threshold=0.7)) == [False, True]
    assert list(near_duplicates([base, " ".join(far)], threshold=0.7)) == [False, False]
    assert list(near_duplicates([base, " ".join(middle)], threshold=0.8)) == [False, False]
    # the last is near the second, which was dropped, and not near the first, which was kept
    assert list(near_duplicates([base, " ".join(middle), " ".join([*middle[:10], "x", *middle[11:]])])) == [
        False,
        True,
        False,
    ]
    assert list(near_duplicates(["a b", "a b", "a c", ""])) == [False, True, False, False]
    assert [list(near_duplicates([base, near], seed=s)) for s in (0, 1)] == [[False, True]] * 2


def test_bands_reach_the_recall_at_the_threshold_with_the_fewest_candidates() -> None:
    assert bands(0.7) == (25, 5)  # 1 - (1 - .7^5)^25 = .990; (21, 6) has .928
    for threshold in (0.05, 0.1, 0.3, 0.5, 0.6, 0.75, 0.8, 0.9, 0.95, 1.0):
        b, r = bands(threshold)
        assert b >= 2 and b * r <= 128 and 1 - (1 - threshold**r) ** b >= 0.98
        if r < 64:
            assert 1 - (1 - threshold ** (r + 1)) ** (128 // (r + 1)) < 0.98
    assert bands(0.01) == (128, 1)


@pytest.mark.parametrize(
    "threshold, shared, own",  # shingles; the similarity of a pair is shared / (shared + 2 own)
    [(0.7, 70, 15), (0.7, 60, 10), (0.5, 40, 20), (0.9, 90, 5), (0.3, 30, 35)],
)
def test_pairs_at_the_threshold_are_found(threshold: float, shared: int, own: int) -> None:
    number = iter(range(10**9))

    def words(count: int) -> list[str]:
        return [f"w{next(number)}" for _ in range(count)]

    texts = []
    for _ in range(500):
        begun = words(shared + 4)
        texts += [" ".join([*begun, *words(own)]) for _ in range(2)]
    found = list(near_duplicates(texts, threshold))
    assert not any(found[::2]) and sum(found[1::2]) >= 0.98 * 500
    assert not any(near_duplicates(texts[:100], shared / (shared + 2 * own) + 0.01))


def test_near_duplicates_against_all_pairs() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(200)]
    texts = [" ".join(rng.choices(vocabulary, k=60)) for _ in range(60)]
    for text in texts[:40]:
        words = text.split()
        for _ in range(rng.choice([1, 1, 6])):
            words[rng.randrange(60)] = "x"
        texts.append(" ".join(words))
    sets = [shingles(t) for t in texts]
    expected, kept = [], []
    for s in sets:
        duplicate = any(len(s & k) / len(s | k) >= 0.7 for k in kept)
        expected.append(duplicate)
        if not duplicate:
            kept.append(s)
    found = list(near_duplicates(texts))
    assert not any(f and not e for f, e in zip(found, expected))  # confirmed exactly: no false positives
    assert sum(found) >= 0.98 * sum(expected) > 15


def test_clean_counts_in_order() -> None:
    rows = [
        row("a question", "This is a fine answer."),
        row("a question", "Short."),
        row("a question", "word " * 50 + "."),
        row("a question", PROSE + " and"),
        row("a question", "As an AI language model, I cannot say."),
        row("Übersetze", LANGUAGES["de"]),
        row("A  Question!", "this is a fine answer"),
        row("first", PROSE + " to live in it."),
        row("First, ", PROSE + " to live in it now."),
    ]
    kept, drops = clean(rows, max_words=40)
    assert list(drops.items()) == [
        ("too short", 1),
        ("too long", 1),
        ("cut off", 1),
        ("boilerplate", 1),
        ("not en", 1),
        ("duplicate", 1),
        ("near duplicate", 1),
        ("over the number kept", 0),
    ]
    assert kept == [rows[0], rows[7]]
    everything, drops = clean(
        rows, min_words=0, complete=False, boilerplate=False, language=None, exact=False, near=None, keep=None
    )
    assert everything == rows
    assert drops == {"too short": 0, "too long": 0}
    assert normalised("A  Question!") == "a question"


def test_the_number_kept_is_drawn_by_seed_and_row() -> None:
    rows = [row(f"question {i}", f"This is answer number {i}.") for i in range(100)]
    kept, drops = clean(rows, keep=20, near=None)
    assert len(kept) == 20
    assert drops["over the number kept"] == 80
    assert kept == [r for r in rows if r in kept]  # in their order
    assert clean(rows, keep=20, near=None)[0] == kept
    assert {r.turns for r in clean(rows[::-1], keep=20, near=None)[0]} == {r.turns for r in kept}
    assert clean(rows, keep=20, near=None, seed=1)[0] != kept
    without = clean([r for r in rows if r is not kept[0]], keep=20, near=None)[0]
    # one row less in the source changes one row of the draw
    assert {r.turns for r in kept[1:]} < {r.turns for r in without}


def test_settings_out_of_range() -> None:
    rows = [row("q", "An answer that is fine.")]
    for options, message in [
        ({"min_words": 9, "max_words": 3}, "min_words 9 and max_words 3"),
        ({"language": "xx"}, "unknown language 'xx' .there are en, de"),
        ({"near": 0.0}, "near 0.0"),
        ({"keep": 0}, "keep 0"),
        ({"min_words": 99}, "no row is left after cleaning .too short: 1."),
    ]:
        with pytest.raises(UserError, match=message):
            clean(rows, **options)  # type: ignore[arg-type]


def test_real_answers_pass_and_cut_ones_do_not() -> None:
    path = Path(__file__).parents[2].parent / "shared" / "data" / "instruct" / "roleplay.jsonl"
    if not path.is_file():
        pytest.skip("needs ../shared/data")
    from mlx_posttrain.data.formats import parse_rows
    from mlx_posttrain.data.sources import load_rows

    answers = [r.turns[-1].content for r in parse_rows(load_rows(str(path), limit=1000))[0]]  # type: ignore[union-attr]
    assert sum(map(is_cut_off, answers)) <= 3
    rng = random.Random(0)
    cut = []
    for answer in answers:
        words = answer.split(" ")
        if len(words) >= 25:
            piece = " ".join(words[: rng.randint(15, len(words) - 2)]).rstrip()
            cut += [piece] if piece[-1] not in ".!?:" else []
    assert sum(map(is_cut_off, cut)) > 0.9 * len(cut) > 500
