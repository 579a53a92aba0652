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
}
MORE_COUNTABLE = _words(
    "boy girl king queen friend sister brother baby lady story city party berry cherry puppy bunny pony "
    "penny box fox bush dish "
    "glass dress brush watch witch beach peach bench branch lunch church class kiss day toy key way child "
    "man woman knife tooth "
    "cloud song game name bird plant seed nut plate pot pan pen paper picture wheel horn tail wing nest egg"
)

# present, past, possible continuations
VERBS = (
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

OPPOSITES = (
    "big small|hot cold|happy sad|old young|day night|up down|in out|fast slow|tall short|good bad|wet "
    "dry|full empty|open closed|"
    "early late|hard soft|light dark|rich poor|near far|high low|left right|first last|black white|strong "
    "weak|clean dirty|"
    "new ancient|thick thin|wide narrow|loud quiet|long brief|heavy weightless|top bottom|inside "
    "outside|before after|over under|"
    "front back|begin end|start stop|give take|push pull|come go|buy sell|win lose|laugh cry|love "
    "hate|remember forget|ask answer|"
    "find hide|always never|yes no|man woman|boy girl|king queen|brother sister|father mother|son "
    "daughter|uncle aunt|friend enemy|"
    "summer winter|morning evening|north south|east west|sweet sour|true false|right wrong|asleep "
    "awake|alive dead|brave afraid|"
    "kind cruel|safe dangerous|easy difficult|cheap costly|ugly pretty|sharp blunt|deep shallow|smooth "
    "rough|more less|many few|"
    "all none|here there|above below"
)
OPPOSITES_PAIRS = tuple(tuple(pair.split()) for pair in OPPOSITES.split("|"))

# From small to big; neighbours are too similar to compare.
SIZES = _words("ant bee mouse frog duck cat sheep lion horse elephant whale hill mountain")

RHYMES = (
    "cat hat bat rat mat|dog log frog fog|sun fun run bun|cake lake snake rake|tree bee sea key|ball wall "
    "tall fall|boat coat goat|"
    "bed red head bread|ring king sing wing|house mouse|moon spoon soon|star car far jar|nose rose toes|day "
    "play way hay|"
    "night light kite|bell well shell|book hook cook look|fish dish wish|pig big wig dig|box fox|rain train "
    "plane|bear chair hair|"
    "pen hen ten men|door floor more four|clock sock rock|top shop hop|hand sand land|bug rug mug"
)
RHYME_GROUPS = tuple(tuple(group.split()) for group in RHYMES.split("|"))

# A sentence about someone, without its last word.
COMPLETIONS = (
    ("hears the dog. The dog says", "woof"),
    ("hears the cat. The cat says", "meow"),
    ("hears the cow. The cow says", "moo"),
    ("hears the duck. The duck says", "quack"),
    ("hears the pig. The pig says", "oink"),
    ("hears the sheep. The sheep says", "baa"),
    ("is tired and goes to", "bed"),
    ("is hungry and wants to", "eat"),
    ("is thirsty and wants to", "drink"),
    ("cuts the bread with a", "knife"),
    ("eats the soup with a", "spoon"),
    ("opens the door with a", "key"),
    ("is cold and puts on a", "coat"),
    ("looks at the time on the", "clock"),
    ("reads a story in a", "book"),
    ("sees a fish. A fish can", "swim"),
    ("sees a bird. A bird can", "fly"),
    ("sees a frog. A frog can", "jump"),
    ("looks at the grass. The grass is", "green"),
    ("looks at the snow. The snow is", "white"),
    ("looks at the sun. The sun is", "yellow"),
    ("gets eggs from the", "hen"),
    ("gets milk from the", "cow"),
    ("gets honey from the", "bee"),
    ("hears a story with the", "ears"),
    ("sees the moon with the", "eyes"),
    ("smells a flower with the", "nose"),
    ("wears a hat on the", "head"),
    ("wears shoes on the", "feet"),
    ("wears a ring on the", "finger"),
)

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")

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
