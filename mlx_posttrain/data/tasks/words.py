"""The vocabulary of the tasks: short, common words of children's books.

Every family that uses a list follows an edit of it.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


ANIMALS = _words(
    "dog cat horse cow sheep pig goat hen duck goose bird fish frog mouse rat rabbit fox wolf bear lion "
    "tiger monkey elephant donkey "
    "camel deer snake turtle bee ant fly spider butterfly owl crow eagle whale shark"
)
COLOURS = _words("red blue green yellow white black brown orange pink purple grey gold silver")
FOODS = _words(
    "apple cake egg bread soup rice pie cheese milk honey sugar butter meat bean corn potato "
    "carrot banana cookie sandwich"
)
CLOTHES = _words("hat coat shoe shirt dress sock glove boot cap belt scarf ring")
BODY = _words("hand foot head nose ear eye mouth arm leg knee finger toe neck")
VEHICLES = _words("car bus train boat ship bike cart truck plane wagon")
FURNITURE = _words("chair table bed shelf desk sofa stool bench")

# kind -> (its words, its name in "a dog is an animal")
KINDS = {
    "animal": (ANIMALS, "an animal"),
    "colour": (COLOURS, "a colour"),
    "food": (FOODS, "a food"),
    "clothing": (CLOTHES, "something to wear"),
    "body": (BODY, "a part of the body"),
    "vehicle": (VEHICLES, "something to ride in"),
    "furniture": (FURNITURE, "a piece of furniture"),
}
WITHOUT_ARTICLE = frozenset(
    (*COLOURS, "bread", "soup", "rice", "cheese", "milk", "honey", "sugar", "butter", "meat", "corn")
)

PLACES = _words("garden park house kitchen school forest field river town village barn market shop farm yard")
THINGS = _words(
    "ball book box cup key bag drum kite doll toy stick stone leaf flower bell basket rope spoon letter "
    "button coin candle lamp clock"
)
NATURE = _words("sun moon star tree hill sky rain snow wind road door wall window bridge fire lake")
COUNTED_FOODS = _words("apple cake egg pie bean potato carrot banana cookie")
NOUNS = sorted({*ANIMALS, *CLOTHES, *BODY, *VEHICLES, *FURNITURE, *PLACES, *THINGS, *NATURE, *COUNTED_FOODS})
ADJECTIVES = _words(
    "big small old new good bad happy sad little nice clean wet dry soft warm cold strong pretty kind funny"
)
NAMES = _words(
    "Tom Anna Ben Lily Sam Max Mia Tim Sara Jack Lucy Peter Mary John Kate Bob Jane Rose Fred Nick"
)

IRREGULAR_PLURALS = {
    "sheep": "sheep",
    "goose": "geese",
    "fish": "fish",
    "mouse": "mice",
    "wolf": "wolves",
    "deer": "deer",
    "foot": "feet",
    "shelf": "shelves",
    "leaf": "leaves",
    "potato": "potatoes",
    "child": "children",
    "man": "men",
    "woman": "women",
    "knife": "knives",
    "tooth": "teeth",
    "scarf": "scarves",
    "calf": "calves",
}
MORE_COUNTABLE = _words(
    "boy girl king queen friend sister brother baby lady story city party berry cherry puppy bunny pony "
    "penny box fox bush dish "
    "glass dress brush watch witch beach peach bench branch lunch church class kiss day toy key way child "
    "man woman knife tooth "
    "cloud song game name bird plant seed nut plate pot pan pen paper picture wheel horn tail wing nest egg "
    "pencil pocket lesson teacher doctor farmer baker driver hunter sailor soldier prince giant fairy dragon "
    "castle tower palace cave island ocean stream pond path street corner hole branch root grape plum lemon "
    "onion pumpkin melon pea cherry jar mug fork bowl kettle oven pillow blanket mirror lock nail hammer saw "
    "ladder brick tent flag map whistle trumpet violin piano mask crown sword shield arrow net hook engine "
    "rocket robot camel puppet balloon ticket present pupil cousin uncle aunt neighbour minute hour week "
    "month year colour number word page line rule kitten lamb calf chick pigeon robin parrot lizard crab "
    "seal bat worm moth beetle hut room roof stair gate fence post sign pool boxer dancer painter singer "
    "writer"
)

# present, past, possible continuations
_VERBS = (
    ("walk", "walked", "to the park|to school|home|in the garden"),
    ("play", "played", "in the garden|with a ball|at home|with the dog"),
    ("jump", "jumped", "over the wall|into the lake|on the bed"),
    ("look", "looked", "at the sky|at the moon|for the key"),
    ("cook", "cooked", "some soup|some rice|an egg"),
    ("wash", "washed", "the car|the dog|the cups"),
    ("clean", "cleaned", "the kitchen|the table|the window"),
    ("help", "helped", "the old man|a friend|in the shop"),
    ("open", "opened", "the door|the box|a window"),
    ("close", "closed", "the door|the box|a book"),
    ("call", "called", "a friend|the dog|for help"),
    ("talk", "talked", "to a friend|about the book|on the bus"),
    ("paint", "painted", "the wall|a picture|the boat"),
    ("plant", "planted", "a tree|some beans|a flower"),
    ("visit", "visited", "the farm|a friend|the town"),
    ("wait", "waited", "for the bus|at home|for the rain"),
    ("climb", "climbed", "the hill|a tree|over the wall"),
    ("fill", "filled", "the cup|the bag|a basket"),
    ("pick", "picked", "an apple|some flowers|the beans"),
    ("push", "pushed", "the cart|the door|a box"),
    ("pull", "pulled", "the rope|the wagon|a box"),
    ("laugh", "laughed", "at the monkey|with a friend|in the park"),
    ("go", "went", "to the park|to school|to the market"),
    ("see", "saw", "a bird|the moon|a big fish"),
    ("eat", "ate", "an apple|some bread|the cake"),
    ("make", "made", "a cake|a kite|some soup"),
    ("find", "found", "a coin|the key|a nest"),
    ("give", "gave", "the dog a bone|a friend a book|the hen some corn"),
    ("run", "ran", "to the river|home|in the field"),
    ("take", "took", "the bus|a bag|the book home"),
    ("buy", "bought", "a hat|some milk|a new coat"),
    ("sing", "sang", "a song|in the garden|at school"),
    ("write", "wrote", "a letter|a story|in the book"),
    ("drink", "drank", "some milk|some water|from the cup"),
    ("sit", "sat", "on the chair|under a tree|by the fire"),
    ("hear", "heard", "a bell|the wind|a song"),
)
_GOING = (
    ("go", "went"),
    ("run", "ran"),
    ("walk", "walked"),
    ("come", "came"),
    ("ride", "rode"),
    ("drive", "drove"),
)
_HOLDING = (
    ("find", "found"),
    ("see", "saw"),
    ("take", "took"),
    ("buy", "bought"),
    ("hold", "held"),
    ("carry", "carried"),
    ("want", "wanted"),
    ("like", "liked"),
    ("lose", "lost"),
    ("keep", "kept"),
    ("bring", "brought"),
    ("need", "needed"),
)

VERBS = tuple((present, past, tuple(ends.split("|"))) for present, past, ends in _VERBS) + tuple(
    (present, past, tuple(f"{before} {what}" for what in after))
    for verbs, before, after in ((_GOING, "to the", PLACES), (_HOLDING, "the", THINGS))
    for present, past in verbs
)

# From small to big; neighbours of the first and second degree are too similar to compare.
SIZES = _words(
    "seed ant bee nut coin egg cup mouse shoe frog duck cat fox goat sheep lion cow horse car elephant truck "
    "bus house church ship lake hill mountain"
)

RHYMES = (
    "cat hat bat rat mat fat sat pat|dog log frog fog hog jog|sun fun run bun gun nun|"
    "cake lake snake rake make take wake shake|tree bee sea key knee free three tea|"
    "ball wall tall fall call hall small|boat coat goat note float throat|bed red head bread said led|"
    "ring king sing wing bring thing spring string|star car far jar bar tar|nose rose toes goes knows those|"
    "day play way hay say may stay grey|night light kite bite right white bright fight|"
    "bell well shell tell fell sell smell yell|book hook cook look took shook|pig big wig dig fig|"
    "rain train plane lane chain cane|bear chair hair pear where care|pen hen ten men then when|"
    "door floor more four store shore|clock sock rock lock block knock|top shop hop stop drop mop|"
    "hand sand land band stand|moon spoon soon noon|fish dish wish|box fox"
)
RHYME_GROUPS = tuple(tuple(group.split()) for group in RHYMES.split("|"))

# What one person may ask of another; {} is a thing.
REQUESTS = (
    "give me the {}",
    "pass me the {}",
    "bring me the {}",
    "show me the {}",
    "help me find the {}",
    "hold the {}",
    "look at the {}",
    "carry the {}",
    "clean the {}",
    "put the {} on the table",
    "come here with the {}",
    "wait for me by the {}",
    "buy me the {}",
    "pick up the {}",
    "take the {} home",
)

# Very short stories; {name}, {animal} and {thing} are given in the task.
STORIES = (
    "One day {name} found a {thing} in the garden. A {animal} came to see it. They played all day and were "
    "happy.",
    "{name} had a {animal}. The {animal} lost a {thing}. {name} looked for it and found it under the bed. "
    "They were glad.",
    "There was a {animal} that wanted a {thing}. {name} was kind and gave it one. Now they are good friends.",
    "{name} saw a {animal} by the river. The {animal} had a {thing}. They laughed and went home together.",
    "Once a {animal} met {name}. {name} had a new {thing}. They shared it and played in the sun.",
)


def a(noun: str) -> str:
    """Return the noun with "a" or "an", or alone where it takes neither."""
    return noun if noun in WITHOUT_ARTICLE else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return the plural of a noun."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")
