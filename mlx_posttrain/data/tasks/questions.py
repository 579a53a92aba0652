"""Twenty-two questions with answers, for a first supervised run of a model that already knows English."""

from __future__ import annotations

_QUESTIONS = (
    (
        "Why is the sky blue?",
        "Sunlight holds every colour. The air scatters blue light far more than red, so blue reaches our "
        "eyes from all sides.",
    ),
    ("What is the capital of France?", "The capital of France is Paris."),
    (
        "How do plants make their food?",
        "Plants use sunlight to turn water and carbon dioxide into sugar. This is called photosynthesis.",
    ),
    (
        "What is gravity?",
        "Gravity is the pull that things with mass have on each other. It keeps us on the ground and the "
        "Moon near the Earth.",
    ),
    (
        "Why do we need sleep?",
        "Sleep lets the body repair itself and helps the brain keep what it learned during the day.",
    ),
    (
        "What is a computer program?",
        "A computer program is a list of instructions that tells a computer, step by step, what to do.",
    ),
    (
        "How many days are there in a leap year?",
        "A leap year has 366 days. The extra day is the 29th of February.",
    ),
    (
        "Why do leaves fall in autumn?",
        "In autumn there is less light, so many trees drop their leaves to save water and energy for the "
        "winter.",
    ),
    (
        "What is the largest ocean on Earth?",
        "The Pacific Ocean is the largest. It covers about a third of the Earth's surface.",
    ),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote the play in the 1590s."),
    ("What does a thermometer measure?", "A thermometer measures temperature: how hot or cold something is."),
    (
        "How does a bicycle stay upright?",
        "A rider keeps balance by steering a little toward the side the bicycle leans to. Moving faster "
        "makes this easier.",
    ),
    ("What is water made of?", "Each molecule of water is made of two hydrogen atoms and one oxygen atom."),
    (
        "Why does ice float?",
        "Water expands when it freezes, so ice is less dense than the liquid and floats on it.",
    ),
    (
        "What is machine learning?",
        "Machine learning is a way of making programs that find patterns in examples instead of following "
        "rules that someone "
        "wrote by hand.",
    ),
    (
        "What is a noun?",
        'A noun is a word that names a person, a place, a thing or an idea, such as "teacher", "river" or '
        '"hope".',
    ),
    (
        "How can I save energy at home?",
        "Switch off lights you do not need, wash clothes in cooler water, and keep windows closed while the "
        "heating is on.",
    ),
    (
        "What causes day and night?",
        "The Earth turns around once in 24 hours. It is day on the side that faces the Sun and night on the "
        "other.",
    ),
    ("What do bees make?", "Bees make honey from the nectar of flowers, and wax to build their combs."),
    (
        "How do I say thank you to a teacher?",
        "Tell your teacher what you learned and why it mattered to you. A short note in your own words is "
        "always welcome.",
    ),
    (
        "What is the boiling point of water?",
        "At sea level water boils at 100 degrees Celsius, which is 212 degrees Fahrenheit.",
    ),
    (
        "Why should I learn to cook?",
        "Cooking at home saves money, lets you choose what goes into your food, and is a pleasure to share.",
    ),
)


def question_answers() -> list[dict[str, str]]:
    """Return the 22 rows, each with question and answer."""
    return [{"question": question, "answer": answer} for question, answer in _QUESTIONS]
