"""The built-in word problems: school arithmetic with its working shown; nothing is downloaded.

    problems.word_problem("train", 17)   # {"question", "reasoning", "answer", "solution", ...}

A problem takes a start, some events and a question from one of the stories below. Each sentence has
a line of working, in which `[x + n]` is an equation over the running total x:

    Mia has 12 cards. She buys 7 more. Tom gives her 3 more. How many cards does she have?
    She has 12 + 7 = 19 cards. She has 19 + 3 = 22 cards.                          answer 22

"solution" has every step. "reasoning", which SFT learns from, states only the last result in half
of the problems, so that GRPO can discover that steps pay off. The words fit into a vocabulary of
512 pieces, and numbers stay between 2 and 108. The difficulty is the number of equations, 1 to 5.
"""

import hashlib
import operator
import random
import re
from collections.abc import Iterator

N_PROBLEMS = {"train": 50_000, "test": 1_000}
DIRECT = 0.5  # share of the problems whose trace states the last result without the steps
LARGEST = 108  # 12 * 9, where the multiplication table ends
DIFFICULTIES, SHARES = (1, 2, 3, 4, 5), (15, 30, 30, 17, 8)  # in percent
BOYS, GIRLS = ("Tom", "Ben", "Sam", "Max", "Leo"), ("Mia", "Ana", "Amy", "Eva", "Zoe")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

# The values a letter may take, given the running total x. If there are none, the sentence does not
# fit here and the plot is drawn again.
NUMBERS = {
    "a": lambda x: range(3, 41),  # the first total
    "b": lambda x: range(30, 100),  # the first total of stories that mostly take away
    "n": lambda x: range(2, 21),  # more
    "s": lambda x: range(2, min(21, x - 1)),  # fewer; at least two stay, so every plural is right
    "k": lambda x: range(2, 10),  # k times m
    "m": lambda x: range(3, 13),
    "f": lambda x: range(3, 10) if x <= 12 else (),  # x times f
    "d": lambda x: [d for d in range(2, 10) if x % d == 0 and 2 <= x // d <= 12],  # x divided by d
    "t": lambda x: range(x + 2, min(x + 30, LARGEST)),  # a goal above x
}

# Each story: its nouns, then its sentences with their working, in which x is the total before the
# sentence and y the latest result. The first noun, Tom (the hero), Mia (a friend), he and him are
# replaced by what is drawn. Ana and Ben are replaced by the current and the next person of a chain.
STORIES = """
cards pens books balls shells
start Tom has {a} cards.
start Tom has {a} red cards and {n} blue cards. | Tom has [a + n] cards.
start Tom has {k} bags with {m} cards in each. | The bags hold [k * m] cards.
event He buys {n} more. | He has [x + n] cards.
event Mia gives him {n} more. | He has [x + n] cards.
event He gives {s} cards to Mia. | Then he has [x - s].
event He loses {s} cards. | Then he has [x - s].
event He gives half of the cards to Mia. | He keeps [x / 2].
event He buys {k} bags with {m} cards in each. | He buys [k * m]. Then he has [x + y].
ask How many cards does he have?
ask He wants {t} cards. How many more does he need? | He needs [t - x] more.
ask He puts the cards in {d} boxes. How many cards does each box hold? | Each box holds [x / d].
ask He sells all the cards for {f} dollars each. How many dollars does he get? | He gets [x * f].
ask Mia has twice as many as Tom. How many do they have in all? | Mia has [x * 2]. In all [x + y].

cookies cakes pies
start Tom bakes {a} cookies.
start Tom bakes {k} trays with {m} cookies on each. | The trays hold [k * m] cookies.
event He bakes {n} more. | He has [x + n] cookies.
event Mia brings {n} more. | He has [x + n] cookies.
event Mia brings twice as many as he has. | Mia brings [x * 2]. Then he has [x + y].
event His friends eat {s} cookies. | Then he has [x - s].
event His friends eat half of the cookies. | He keeps [x / 2].
ask How many cookies does he have?
ask He shares the cookies with Mia, half for each. How many does Mia get? | Mia gets [x / 2].
ask He puts {d} cookies on each plate. How many plates does he need? | He needs [x / d] plates.
ask He sells all the cookies for {f} dollars each. How many dollars does he get? | He gets [x * f].

cards pens books balls shells
start Tom has {b} dollars.
start Tom gets {m} dollars a day for {k} days. | He gets [m * k] dollars.
event He buys food for {s} dollars. | Then he has [x - s].
event Mia gives him {n} dollars. | He has [x + n] dollars.
event He buys {k} cards for {m} dollars each. | The cards cost [k * m]. Then he has [x - y].
event He gives half of the money to Mia. | He keeps [x / 2].
ask How many dollars does he have?
ask A bike costs {t} dollars. How many more dollars does he need? | He needs [t - x] more.
ask Hats cost {d} dollars each. How many hats can he buy? | He can buy [x / d] hats.

bus train boat
start A bus starts with {a} people.
start A bus has {a} boys and {n} girls. | The bus has [a + n] people.
start A bus has {k} rows with {m} people in each. | The rows hold [k * m] people.
event At the next stop {n} more people get on. | Then there are [x + n].
event At the next stop {k} groups of {m} people get on. | The groups are [k * m]. Then [x + y].
event At the next stop {s} people get off. | Then there are [x - s].
event At the next stop half of the people get off. | Half is [x / 2].
ask How many people are on the bus?
ask The bus has {t} seats. How many seats are free? | Then [t - x] seats are free.
ask Each pays {f} dollars. How many dollars do they pay? | They pay [x * f] dollars.

story
start Tom has a story of {b} pages.
start Tom has {k} stories of {m} pages each. | The stories have [k * m] pages.
event He reads {s} pages. | Then [x - s] pages are left.
event He reads {m} pages a day for {k} days. | He reads [m * k] pages. Then [x - y] are left.
event He gets one more story of {m} pages. | Then [x + m] pages are left.
ask How many pages are left to read?
ask Then he reads {d} pages a day. How many days does he need? | He needs [x / d] days.

cards pens books balls shells
start Ana has {a} cards.
event Ben has {n} more cards than Ana. | Ben has [x + n].
event Ben has {s} fewer cards than Ana. | Ben has [x - s].
event Ben has twice as many cards as Ana. | Ben has [x * 2].
event Ben has {f} times as many cards as Ana. | Ben has [x * f].
event Ben has half as many cards as Ana. | Ben has [x / 2].
ask How many cards does Ana have?
ask Ben has {n} more. How many do Ana and Ben have in all? | Ben has [x + n]. In all [x + y].

years
start Ana is {a} years old.
event Ben is {n} years older than Ana. | Ben is [x + n].
event Ben is {s} years younger than Ana. | Ben is [x - s].
event Ben is twice as old as Ana. | Ben is [x * 2].
event Ben is half as old as Ana. | Ben is [x / 2].
ask How old is Ana?
ask How old will Ana be in {n} years? | In {n} years Ana is [x + n].
"""


def word_problem(split: str, index: int) -> dict:
    """Problem number `index` of "train" or "test", the same on every machine and Python."""
    if split not in ("train", "test"):  # no problem would ever fit it
        raise ValueError(f'word problems have the splits "train" and "test", not {split!r}')
    rng = random.Random(f"{split} {index}")
    difficulty = rng.choices(DIFFICULTIES, SHARES)[0]
    while True:  # until the numbers work out and the equations belong to this split
        nouns, plot = _plot(rng, difficulty)
        lines = _count(rng, plot)
        if lines and split_of(" ".join(working for _, working in lines)) == split:
            break
    lines = _name(rng, nouns, lines)
    question, steps = (" ".join(filter(None, texts)) for texts in zip(*lines, strict=True))
    last = re.split(r"(?<=\.) ", steps)[-1]
    direct = re.sub(r"\d+ [-+*/] \d+ = (\d+)", r"\1", last)
    reasoning = direct if rng.random() < DIRECT else steps
    answer = re.findall(r"= (\d+)", steps)[-1]
    return {"question": question, "reasoning": reasoning, "answer": answer, "solution": steps,
            "task_type": "math", "difficulty": difficulty}


def rows(name: str, split: str) -> Iterator[dict]:
    """All rows of "problems", or of "solutions", whose traces have every step."""
    for i in range(N_PROBLEMS[split]):
        row = word_problem(split, i)
        yield row | {"reasoning": row["solution"]} if name == "solutions" else row


def split_of(solution: str) -> str:
    """A hash of the equations decides: those of a test problem occur in no training problem."""
    chain = ", ".join(re.findall(r"\d+ [-+*/] \d+", solution))
    return "test" if hashlib.sha256(chain.encode()).digest()[0] < 64 else "train"


def _plot(rng: random.Random, difficulty: int) -> tuple[list, list]:
    """A story's nouns, and (sentence, working) pairs with `difficulty` equations between them."""
    while True:
        nouns, sentences = rng.choice(_STORIES)
        start, ask = rng.choice(sentences["start"]), rng.choice(sentences["ask"])
        plot, room = [start], difficulty - (start[1] + ask[1]).count("[")
        for event in rng.sample(sentences["event"], len(sentences["event"])):  # each at most once
            if event[1].count("[") <= room:
                plot.append(event)
                room -= event[1].count("[")
        if room == 0:
            return nouns, [*plot, ask]


def _parse(story: str) -> tuple[list, dict]:
    """(nouns, {"start" | "event" | "ask": (sentence, working) pairs})"""
    nouns, *lines = story.splitlines()
    sentences = {"start": [], "event": [], "ask": []}
    for line in lines:
        kind, sentence, working = re.fullmatch(r"(\w+) ([^|]+?)(?: \| (.+))?", line).groups("")
        sentences[kind].append((sentence, working))
    return nouns.split(), sentences


_STORIES = [_parse(story) for story in STORIES.strip().split("\n\n")]


def _count(rng: random.Random, plot: list) -> list | None:
    """The plot with its numbers drawn and its equations solved; None if they do not work out."""
    lines, total = [], 0
    for sentence, working in plot:
        numbers = {"x": total, "y": total, "2": 2}  # y: the latest number drawn or computed
        for letter in re.findall(r"{(\w)}", sentence):
            if not (choices := NUMBERS[letter](total)):
                return None
            numbers[letter] = numbers["y"] = rng.choice(choices)
        while equation := re.search(r"\[(\w) (.) (\w)\]", working):
            left, sign, right = numbers[equation[1]], equation[2], numbers[equation[3]]
            result = OPERATIONS[sign](left, right)
            if not 2 <= result <= LARGEST or sign == "/" and left % right:
                return None
            numbers["y"] = result
            working = working.replace(equation[0], f"{left} {sign} {right} = {result}")
        lines.append((sentence.format(**numbers), working.format(**numbers)))
        total = numbers["y"]
    return lines


def _name(rng: random.Random, nouns: list, lines: list) -> list:
    """The lines with people and things drawn in place of those in STORIES."""
    # The friend is of the other sex, so that "he" and "she" each name one person.
    heroes, friends, he, him, his = rng.choice(
        [(BOYS, GIRLS, "he", "him", "his"), (GIRLS, BOYS, "she", "her", "her")]
    )
    people = rng.sample(BOYS + GIRLS, len(lines) + 1)
    words = {"Tom": rng.choice(heroes), "Mia": rng.choice(friends), nouns[0]: rng.choice(nouns)}
    words |= {"he": he, "him": him, "His": his.title(), "He": he.title(), "Ana": people.pop()}
    named = []
    for line in lines:
        words["Ben"] = people[-1]
        named.append([re.sub(r"\w+", lambda word: words.get(word[0], word[0]), t) for t in line])
        if "Ben" in line[0]:  # the next person becomes the current one
            words["Ana"] = people.pop()
    return named
