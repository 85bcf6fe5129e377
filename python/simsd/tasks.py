"""Four families of short tasks with a held-out split and exact grading.

They mirror, at the size of a 2 M parameter model, the four kinds of benchmark that the paper reports: worked
arithmetic (GSM8K), small Python expressions (MBPP), recall of facts (TriviaQA) and four-option questions (MMLU). The
built-in tiny pair is trained on `training_item`; `simsd bench` measures on `held_out`.

No held-out item shares its (template, operands) pair with any training item: the pair's CRC-32 decides its side. For
facts the operands are the fact itself, so a held-out item asks a known fact in a phrasing never seen for that fact.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

FAMILIES = ("arithmetic", "code", "facts", "choice")

_HELD_OUT_ONE_IN = 8
_MAX_OPERAND = 60
_MAX_FACTOR = 9


@dataclass(frozen=True)
class Task:
    """One question, its full reference response and the final answer that grading looks for."""

    family: str
    prompt: str
    response: str
    answer: str


_Drawn = tuple[Task, bool]  # a task and whether its (template, operands) pair is held out


def _pair_is_held_out(*pair: object) -> bool:
    return zlib.crc32(repr(pair).encode()) % _HELD_OUT_ONE_IN == 0


# Arithmetic: an opening gives the first number, one or two events change it.

_NAMES = "Tom Anna Ben Sara Max Emma Leo Nina Sam Lily Paul Rosa Dan Kate Ali Mia".split()
_THINGS = "apples books coins cards pens shells stamps eggs plums nuts cups toys roses keys balls stones".split()

_OPENINGS = (
    "{name} has {a} {things}.",
    "{name} owns {a} {things}.",
    "{name} starts with {a} {things}.",
    "{name} found {a} {things}.",
)
_PRODUCT_OPENINGS = (
    "{name} has {a} boxes of {b} {things}.",
    "{name} buys {a} bags with {b} {things} each.",
    "{name} fills {a} shelves with {b} {things} each.",
)
_GAINS = ("buys {n} more", "gets {n} more", "finds {n} more", "is given {n}", "wins {n}")
_LOSSES = ("gives away {n}", "loses {n}", "sells {n}", "breaks {n}", "throws away {n}")
_QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} are there at the end?",
    "What is the number of {things} now?",
)


def _draw_arithmetic(rng: random.Random) -> _Drawn:
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    template: list[str] = []
    operands: list[int] = []
    steps: list[str] = []

    events = rng.choice((1, 2))
    if rng.random() < 0.25:
        opening = rng.choice(_PRODUCT_OPENINGS)
        a, b = rng.randint(2, _MAX_FACTOR), rng.randint(2, _MAX_FACTOR)
        value = a * b
        operands += [a, b]
        steps.append(f"{a}*{b}={value}")
        text = opening.format(name=name, things=things, a=a, b=b)
        events -= 1
    else:
        opening = rng.choice(_OPENINGS)
        value = rng.randint(2, _MAX_OPERAND)
        operands.append(value)
        text = opening.format(name=name, things=things, a=value)
    template.append(opening)

    happened = []
    for _ in range(events):
        gain = value < 3 or rng.random() < 0.5
        event = rng.choice(_GAINS if gain else _LOSSES)
        n = rng.randint(2, _MAX_OPERAND if gain else min(value, _MAX_OPERAND))
        after = value + n if gain else value - n
        steps.append(f"{value}{'+' if gain else '-'}{n}={after}")
        happened.append(event.format(n=n))
        template.append(event)
        operands.append(n)
        value = after

    question = rng.choice(_QUESTIONS)
    template.append(question)
    if happened:
        text += f" {name} {' and '.join(happened)}."
    prompt = f"{text} {question.format(name=name, things=things)}"
    task = Task("arithmetic", prompt, f"{';'.join(steps)}. ANSWER: {value}", str(value))
    return task, _pair_is_held_out(template, operands)


# Code: each operation has its expression and an English request. {i} is an index, {v} an item of the list.

_OPERATIONS: tuple[tuple[str, str], ...] = (
    ("max(x)", "the largest item of x"),
    ("min(x)", "the smallest item of x"),
    ("len(x)", "the length of x"),
    ("sorted(x)", "the items of x in ascending order"),
    ("sorted(x)[::-1]", "the items of x in descending order"),
    ("x[::-1]", "the items of x in reverse"),
    ("x[0]", "the first item of x"),
    ("x[-1]", "the last item of x"),
    ("x[{i}]", "the item of x at index {i}"),
    ("x[{i}:]", "the items of x from index {i} on"),
    ("x[:{i}]", "the items of x before index {i}"),
    ("x.index({v})", "the index of the first {v} in x"),
    ("x.count({v})", "the number of times {v} is in x"),
)
_CODE_REQUESTS = (
    "Let x=[{items}]. Write Python for {wanted}.",
    "With x=[{items}], give {wanted} in Python.",
    "For x=[{items}], how does Python get {wanted}?",
)
_CODE_EVALUATIONS = ("Let x=[{items}]. What is {expression}?", "With x=[{items}], evaluate {expression}.")


def _draw_code(rng: random.Random) -> _Drawn:
    x = [rng.randint(0, 9) for _ in range(rng.randint(3, 7))]
    i, v = rng.randrange(1, len(x)), rng.choice(x)
    operation, wanted = rng.choice(_OPERATIONS)
    expression = operation.format(i=i, v=v)
    template = rng.choice(_CODE_REQUESTS + _CODE_EVALUATIONS)
    prompt = template.format(items=_compact(x), wanted=wanted.format(i=i, v=v), expression=expression)
    value = eval(expression, {"__builtins__": {}, "max": max, "min": min, "len": len, "sorted": sorted}, {"x": x})
    answer = f"[{_compact(value)}]" if isinstance(value, list) else str(value)
    return Task("code", prompt, f"{expression}=={answer}", answer), _pair_is_held_out(template, expression, x)


def _compact(items: list[int]) -> str:
    return ",".join(map(str, items))


# Facts: one relation per table, "subject answer" pairs, every subject and answer a single word.


@dataclass(frozen=True)
class _Relation:
    table: str
    statement: str
    phrasings: tuple[str, ...]

    def pairs(self) -> list[tuple[str, str]]:
        words = self.table.split()
        return list(zip(words[::2], words[1::2], strict=True))


_CAPITALS = """
France Paris Italy Rome Spain Madrid Portugal Lisbon Germany Berlin Austria Vienna Belgium Brussels Norway Oslo
Sweden Stockholm Finland Helsinki Denmark Copenhagen Iceland Reykjavik Ireland Dublin Poland Warsaw Hungary Budapest
Romania Bucharest Bulgaria Sofia Greece Athens Turkey Ankara Russia Moscow Ukraine Kyiv Belarus Minsk Latvia Riga
Lithuania Vilnius Estonia Tallinn Croatia Zagreb Serbia Belgrade Slovakia Bratislava Albania Tirana Georgia Tbilisi
Armenia Yerevan Azerbaijan Baku Egypt Cairo Libya Tripoli Tunisia Tunis Algeria Algiers Morocco Rabat Sudan Khartoum
Kenya Nairobi Uganda Kampala Rwanda Kigali Ghana Accra Senegal Dakar Mali Bamako Nigeria Abuja Angola Luanda
Zambia Lusaka Zimbabwe Harare Mozambique Maputo Namibia Windhoek Niger Niamey Liberia Monrovia Japan Tokyo
China Beijing Vietnam Hanoi Thailand Bangkok Laos Vientiane Nepal Kathmandu Bangladesh Dhaka Pakistan Islamabad
Afghanistan Kabul Iran Tehran Iraq Baghdad Syria Damascus Lebanon Beirut Jordan Amman Qatar Doha Oman Muscat
Bahrain Manama Uzbekistan Tashkent Canada Ottawa Cuba Havana Jamaica Kingston Peru Lima Chile Santiago Ecuador Quito
Uruguay Montevideo Venezuela Caracas Australia Canberra Fiji Suva Cyprus Nicosia Malta Valletta Mongolia Ulaanbaatar
"""
_SYMBOLS = """
hydrogen H helium He lithium Li beryllium Be boron B carbon C nitrogen N oxygen O fluorine F neon Ne sodium Na
magnesium Mg aluminium Al silicon Si phosphorus P sulfur S chlorine Cl argon Ar potassium K calcium Ca titanium Ti
chromium Cr manganese Mn iron Fe cobalt Co nickel Ni copper Cu zinc Zn gallium Ga arsenic As selenium Se bromine Br
krypton Kr silver Ag tin Sn iodine I xenon Xe barium Ba tungsten W platinum Pt gold Au mercury Hg lead Pb radon Rn
uranium U
"""
_NUMBERS = """
hydrogen 1 helium 2 lithium 3 beryllium 4 boron 5 carbon 6 nitrogen 7 oxygen 8 fluorine 9 neon 10 sodium 11
magnesium 12 aluminium 13 silicon 14 phosphorus 15 sulfur 16 chlorine 17 argon 18 potassium 19 calcium 20 titanium 22
chromium 24 manganese 25 iron 26 cobalt 27 nickel 28 copper 29 zinc 30 gallium 31 arsenic 33 selenium 34 bromine 35
krypton 36 silver 47 tin 50 gold 79
"""
_CURRENCIES = """
Japan yen China yuan India rupee Russia ruble Poland zloty Hungary forint Thailand baht Vietnam dong Mexico peso
Israel shekel Turkey lira Ukraine hryvnia Bangladesh taka Georgia lari Armenia dram Peru sol Brazil real
Kazakhstan tenge Nigeria naira Ghana cedi Kenya shilling Zambia kwacha Iran rial Malaysia ringgit Albania lek
Romania leu Kuwait dinar Morocco dirham Switzerland franc Denmark krone Sweden krona
"""

_RELATIONS = (
    _Relation(
        _CAPITALS,
        "The capital of {s} is {o}.",
        (
            "What is the capital of {s}?",
            "Name the capital city of {s}.",
            "Which city is the capital of {s}?",
            "Where is the government seat of {s}?",
            "The map of {s} shows which capital?",
            "Tell me which capital {s} has.",
        ),
    ),
    _Relation(
        _SYMBOLS,
        "The symbol of {s} is {o}.",
        (
            "What is the symbol of {s}?",
            "Name the chemical symbol of {s}.",
            "Which symbol does {s} have?",
            "How do chemists write {s}?",
            "Which letters stand for {s}?",
            "Tell me the element symbol for {s}.",
        ),
    ),
    _Relation(
        _CURRENCIES,
        "The currency of {s} is the {o}.",
        (
            "What is the currency of {s}?",
            "Name the currency used in {s}.",
            "Which money do people use in {s}?",
            "How do you pay in {s}?",
            "The banks of {s} issue which money?",
            "Tell me which currency {s} has.",
        ),
    ),
    _Relation(
        _NUMBERS,
        "The atomic number of {s} is {o}.",
        (
            "What is the atomic number of {s}?",
            "Name the atomic number of {s}.",
            "Which atomic number does {s} have?",
            "How many protons does {s} have?",
            "What number is {s} in the periodic table?",
            "Tell me the proton count of {s}.",
        ),
    ),
)
_FACTS = tuple((relation, s, o) for relation in _RELATIONS for s, o in relation.pairs())


def _phrasing_is_held_out(subject: str, statement: str, phrasing: int, phrasings: int) -> bool:
    """Two phrasings of each fact, chosen by its CRC-32, are never trained on."""
    first = zlib.crc32(f"{statement}/{subject}".encode()) % phrasings
    return phrasing in (first, (first + phrasings // 2) % phrasings)


def _draw_facts(rng: random.Random) -> _Drawn:
    relation, s, o = rng.choice(_FACTS)
    k = rng.randrange(len(relation.phrasings))
    task = Task("facts", relation.phrasings[k].format(s=s), relation.statement.format(s=s, o=o), o)
    return task, _phrasing_is_held_out(s, relation.statement, k, len(relation.phrasings))


# Choice: which of four classes a thing belongs to. A question lists its classes in a fixed cycle that may start at any
# of them, so the letter follows from the fact and from the list's order together.


@dataclass(frozen=True)
class _Classes:
    members: dict[str, str]  # class -> its members, as words
    statement: str
    phrasings: tuple[str, ...]


_CLASSES = (
    _Classes(
        {
            "Africa": "Libya Tunisia Algeria Morocco Sudan Kenya Uganda Rwanda Ghana Senegal Mali Nigeria Angola "
            "Zambia Zimbabwe Mozambique Namibia Niger Liberia",
            "America": "Canada Cuba Jamaica Peru Chile Ecuador Uruguay Venezuela Mexico Brazil",
            "Asia": "Japan China Vietnam Thailand Laos Nepal Bangladesh Pakistan Afghanistan Iran Iraq Syria "
            "Lebanon Jordan Qatar Oman Bahrain Uzbekistan Mongolia India Israel Malaysia Kuwait",
            "Europe": "France Italy Spain Portugal Germany Austria Belgium Norway Sweden Finland Denmark Iceland "
            "Ireland Poland Hungary Romania Bulgaria Greece Ukraine Belarus Latvia Lithuania Estonia Croatia Serbia "
            "Slovakia Albania Malta Switzerland",
        },
        "{s} lies in {o}.",
        (
            "On which continent is {s}?",
            "Name the continent of {s}.",
            "Where in the world is {s}?",
            "Which part of the world has {s}?",
            "Tell me which continent {s} is on.",
            "Where does {s} lie?",
        ),
    ),
    _Classes(
        {
            "metal": "lithium sodium magnesium aluminium potassium calcium titanium chromium manganese iron cobalt "
            "nickel copper zinc silver tin barium tungsten platinum gold mercury lead uranium",
            "nonmetal": "hydrogen carbon nitrogen oxygen phosphorus sulfur selenium",
            "halogen": "fluorine chlorine bromine iodine",
            "noble gas": "helium neon argon krypton xenon radon",
        },
        "The element {s} is a {o}.",
        (
            "What kind of element is {s}?",
            "Name the group of the element {s}.",
            "Which class of element is {s}?",
            "How do chemists class {s}?",
            "Tell me what kind of element {s} is.",
            "To which kind of element does {s} belong?",
        ),
    ),
    _Classes(
        {
            "mammal": "dog cat horse cow lion tiger whale bat mouse rabbit goat camel wolf bear",
            "bird": "eagle owl duck goose swan crow parrot penguin robin stork",
            "fish": "salmon trout tuna shark cod carp herring pike",
            "insect": "ant bee wasp beetle butterfly mosquito fly moth",
        },
        "The {s} is a kind of {o}.",
        (
            "What kind of animal is the {s}?",
            "Name the class of the animal {s}.",
            "Which class of animal is the {s}?",
            "How do zoologists class the {s}?",
            "Tell me what kind of animal the {s} is.",
            "To which kind of animal does the {s} belong?",
        ),
    ),
)
_MEMBERS = tuple(
    (classes, member, name)
    for classes in _CLASSES
    for name, words in classes.members.items()
    for member in words.split()
)


def _draw_choice(rng: random.Random) -> _Drawn:
    classes, s, o = rng.choice(_MEMBERS)
    phrasing, start = rng.choice(classes.phrasings), rng.randrange(4)
    names = list(classes.members)
    options = names[start:] + names[:start]
    letter = "ABCD"[options.index(o)]
    listed = " ".join(f"{name}: {option}" for name, option in zip("ABCD", options, strict=True))
    response = f"{classes.statement.format(s=s, o=o)} ANSWER: {letter}"
    task = Task("choice", f"{phrasing.format(s=s)} {listed}", response, letter)
    return task, _pair_is_held_out(phrasing, s, start)


_DRAW: dict[str, Callable[[random.Random], _Drawn]] = {
    "arithmetic": _draw_arithmetic,
    "code": _draw_code,
    "facts": _draw_facts,
    "choice": _draw_choice,
}


def _drawer(family: str) -> Callable[[random.Random], _Drawn]:
    if family not in _DRAW:
        raise ValueError(f"unknown task family {family!r}; the families are {', '.join(FAMILIES)}")
    return _DRAW[family]


def training_item(family: str, rng: random.Random) -> Task:
    """Draw one training item; raises ValueError for an unknown family."""
    draw = _drawer(family)
    while True:
        task, is_held_out = draw(rng)
        if not is_held_out:
            return task


def held_out(family: str, count: int, seed: int = 0) -> list[Task]:
    """Draw `count` distinct held-out items, the same ones for the same seed.

    Raises ValueError for an unknown family, or where the family has fewer than `count` held-out items.
    """
    draw = _drawer(family)
    rng = random.Random(f"{family}/{seed}")
    items: dict[str, Task] = {}
    draws = 0
    while len(items) < count:
        task, is_held_out = draw(rng)
        if is_held_out:
            items.setdefault(task.prompt, task)
        draws += 1
        if draws > 200 * (count + 10):
            raise ValueError(f"asked for {count} distinct held-out {family} items, found only {len(items)}")
    return list(items.values())


def is_correct(task: Task, text: str) -> bool:
    """Whether the final answer in `text` is the task's answer; the steps before it are not judged."""
    text = text.strip()
    if task.family in ("arithmetic", "choice"):
        _, found, answer = text.rpartition("ANSWER:")
    elif task.family == "code":
        _, found, answer = text.rpartition("==")
    else:
        *rest, answer = text.removesuffix(".").split() or [""]
        found = bool(rest)
    return bool(found) and answer.strip() == task.answer
