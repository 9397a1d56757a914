"""The generators of the six tasks: each draws one dialogue with its right answers, from a random source and a difficulty."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import Any

from v4sdk_bench.nano.dialogue import Dialogue, say, split_of
from v4sdk_bench.nano.words import CITIES, HABITS, NAMES, THINGS, VERBS, WEATHER

MAX_FACTS = len(NAMES)


# --- addition and subtraction -------------------------------------------------------------------------------------


def worked_sum(a: int, b: int, sign: str) -> str:
    """The written column method, units first: digit, sign, digit, sign, carry = digit `c` carry, three columns.

    >>> worked_sum(347, 285, "+")
    '7+5+0=2c1 4+8+1=3c1 3+2+1=6c0'
    """
    columns, carry = [], 0
    for place in range(3):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry if sign == "+" else x - y - carry
        out = int(total > 9 or total < 0)
        columns.append(f"{x}{sign}{y}{sign}{carry}={total % 10}c{out}")
        carry = out
    return " ".join(columns)


_SUMS = (
    *(
        "What is {q}?",
        "{q}",
        "{q} =",
        "Compute {q}.",
        "Calculate {q}",
        "How much is {q}?",
        "What is {q}",
        "{q}=?",
    ),
    *("Please compute {q}.", "what is {q}?", "Calculate {q}.", "Work out {q}.", "What does {q} make?"),
)
_SPELLED = {
    "+": ("Add {a} and {b}.", "What is {a} plus {b}?"),
    "-": ("What is {a} minus {b}?", "{a} minus {b}"),
}


def add_sub(rng: Random, difficulty: float) -> Dialogue:
    a, b = (rng.randrange(10 ** rng.choice((1, 2, 3, 3, 3))) for _ in range(2))
    sign = rng.choice("+-")
    if sign == "-" and a < b:
        a, b = b, a
    form = rng.choice(("{a} + {b}", "{a} + {b}", "{a}+{b}")).replace("+", sign)
    user = rng.choice(_SUMS).format(q=form.format(a=a, b=b))
    if rng.random() < 0.15:
        user = rng.choice(_SPELLED[sign]).format(a=a, b=b)
    answer = str(a + b if sign == "+" else a - b)
    return Dialogue("add_sub", (str(a), sign, str(b)), say(user, answer, worked_sum(a, b, sign)))


# --- looking up a fact given earlier ------------------------------------------------------------------------------

Fact = tuple[str, str, str]  # name, verb, thing
_ASKS = (
    "What do I {verb} {name}?",
    "What do I {verb} {name}?",
    "What to {verb} {name}?",
    "Tell me what to {verb} {name}.",
)
_HABIT_ASKS = ("What does {name} {verb}?", "Tell me what {name} {verbs}.")
_HABIT_SHARE = 0.15  # of training; a harder form, not among the held-out questions
_ASKED_AS = dict((*VERBS, *HABITS))


def _state(fact: Fact) -> str:
    name, verb, thing = fact
    return f"{name} {verb} {thing}." if verb.islower() else f"{verb} {name} {thing}."


def _ask(fact: Fact, rng: Random) -> str:
    name, verb, _ = fact
    asks = _HABIT_ASKS if verb.islower() else _ASKS
    return rng.choice(asks).format(name=name, verb=_ASKED_AS[verb], verbs=verb)


def look_up(rng: Random, difficulty: float) -> Dialogue:
    fewest, most = (40, MAX_FACTS) if difficulty >= 1 else (2, max(4, round(difficulty * MAX_FACTS)))
    count = rng.randint(fewest, most)
    habit = difficulty != 1 and rng.random() < _HABIT_SHARE
    verb, _ = rng.choice(HABITS if habit else VERBS)
    facts = [(name, verb, rng.choice(THINGS)) for name in rng.sample(NAMES, count)]
    # at full difficulty the asked fact is an early one, far outside the sliding window
    asked = rng.randrange(count // 2 if difficulty >= 1 else count)
    lead = rng.choice(("", "", "", "Remember: ", "Facts: ", "Note this. "))
    told = lead + " ".join(map(_state, facts)) + rng.choice((" ", " ", "\n"))
    messages = say(told + _ask(facts[asked], rng), _state(facts[asked]))
    return Dialogue("look_up", facts[asked], messages, facts=tuple(facts), asked_at=count - asked - 1)


def ask_more(dialogue: Dialogue, rng: Random, turns: int) -> Dialogue:
    """Put further questions behind a look-up: denser training on the same facts. Held-out facts are not asked."""
    facts = [fact for fact in dialogue.facts if split_of("look_up", fact) == "train"]
    messages = list(dialogue.messages)
    for fact in rng.choices(facts, k=turns):
        messages += say(_ask(fact, rng), _state(fact))
    return replace(dialogue, messages=tuple(messages))


def ask_many(dialogue: Dialogue, rng: Random, most: int) -> Dialogue:
    """Ask for several facts at once instead of one: the densest training on look-ups. Held-out facts are not asked."""
    facts = [fact for fact in dialogue.facts if split_of("look_up", fact) == "train"]
    asked = rng.sample(facts, min(len(facts), rng.randint(2, most)))
    verb = dialogue.operands[1]
    names = ", ".join(name for name, _, _ in asked)
    ask = f"What do {names} {_ASKED_AS[verb]}?" if verb.islower() else f"What do I {_ASKED_AS[verb]} {names}?"
    told = " ".join(map(_state, dialogue.facts))
    return replace(dialogue, messages=say(f"{told} {ask}", " ".join(map(_state, asked))))


# --- sorting and reversing ----------------------------------------------------------------------------------------

_SORTS = (
    "Sort: {q}",
    "Sort these words: {q}",
    "Sort the list: {q}",
    "Put in alphabetical order: {q}",
    "Sort {q}.",
    "Please sort: {q}",
    "Sort alphabetically: {q}",
)
_REVERSALS = (
    "Reverse: {q}",
    "Reverse these words: {q}",
    "Reverse the list: {q}",
    "Say backwards: {q}",
    "Reverse {q}.",
    "Please reverse: {q}",
    "Write in reverse order: {q}",
)


def sort_reverse(rng: Random, difficulty: float) -> Dialogue:
    words = rng.sample(THINGS, rng.randint(3, 5) if difficulty >= 1 else rng.randint(2, 5))
    kind = rng.choice(("sort", "reverse"))
    user = rng.choice(_SORTS if kind == "sort" else _REVERSALS).format(q=", ".join(words))
    answer = ", ".join(sorted(words) if kind == "sort" else words[::-1])
    # a held-out set of words is new in every order
    return Dialogue("sort_reverse", (kind, *sorted(words)), say(user, answer))


# --- calling a declared tool and using its result -----------------------------------------------------------------


def _function(tool: str, about: str, /, **parameters: str) -> Mapping[str, Any]:
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in parameters.items()},
        "required": list(parameters),
    }
    return {"type": "function", "function": {"name": tool, "description": about, "parameters": schema}}


TOOLS: Mapping[str, Mapping[str, Any]] = {
    "weather": _function("weather", "Weather of a city", city="string"),
    "time": _function("time", "Time in a city", city="string"),
    "price": _function("price", "Price of some things", item="string", count="integer"),
    "distance": _function("distance", "Distance of two cities", start="string", end="string"),
    "age": _function("age", "Age of a person", name="string"),
}


def _use(rng: Random, name: str, any_word: bool) -> tuple[str, dict[str, Any], str, str]:
    """A question for a tool: (question, arguments, result, answer); with any word for a city or a person if asked."""
    words = (*NAMES, *THINGS, *CITIES)
    city, other = rng.sample(words if any_word else CITIES, 2)
    if name == "weather":
        found = rng.choice(WEATHER)
        ask = rng.choice(("What is the weather in {0}?", "How is the weather in {0}?", "Weather in {0}?"))
        return ask.format(city), {"city": city}, found, f"The weather in {city} is {found}."
    if name == "time":
        found = f"{rng.randrange(24)}:{rng.randrange(60):02}"
        ask = rng.choice(("What time is it in {0}?", "What is the time in {0}?", "Time in {0}?"))
        return ask.format(city), {"city": city}, found, f"The time in {city} is {found}."
    if name == "price":
        item, count, found = rng.choice(THINGS), rng.randint(2, 99), str(rng.randint(2, 999))
        ask = rng.choice(("What is the price of {0} {1}?", "What do {0} {1} cost?", "Price of {0} {1}?"))
        return (
            ask.format(count, item),
            {"item": item, "count": count},
            found,
            f"The price of {count} {item} is {found}.",
        )
    if name == "distance":
        found = str(rng.randint(20, 999))
        ask = rng.choice(
            (
                "How far is it from {0} to {1}?",
                "What is the distance from {0} to {1}?",
                "Distance from {0} to {1}?",
            )
        )
        said = f"The distance from {city} to {other} is {found}."
        return ask.format(city, other), {"start": city, "end": other}, found, said
    person, found = rng.choice(words if any_word else NAMES), str(rng.randint(2, 99))
    ask = rng.choice(("How old is {0}?", "What is the age of {0}?", "Age of {0}?"))
    return ask.format(person), {"name": person}, found, f"The age of {person} is {found}."


def tool_call(rng: Random, difficulty: float) -> Dialogue:
    declared = rng.sample(sorted(TOOLS), rng.randint(1, 2))
    used = rng.choice(declared)
    user, arguments, result, answer = _use(rng, used, any_word=difficulty > 1)
    call = {
        "id": "call_0",
        "type": "function",
        "function": {"name": used, "arguments": json.dumps(arguments)},
    }
    messages = (
        {"role": "user", "content": user},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": result},
        {"role": "assistant", "content": answer},
    )
    operands = (used, *(str(v) for v in arguments.values()))
    return Dialogue("tool_call", operands, messages, tools=tuple(TOOLS[name] for name in declared))


# --- copying a quoted string --------------------------------------------------------------------------------------

_COPIES = (
    *('Repeat "{q}".', 'Copy "{q}"', 'Say "{q}".', 'Repeat: "{q}"', 'Copy this: "{q}"', 'Write "{q}".'),
    *('Please repeat "{q}".', 'Repeat after me: "{q}"', 'Say "{q}"', 'Copy the text "{q}".'),
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def copy(rng: Random, difficulty: float) -> Dialogue:
    words = [rng.choice(rng.choice((THINGS, THINGS, NAMES, CITIES))) for _ in range(rng.randint(1, 6))]
    for i, _ in enumerate(words):
        if rng.random() < 0.06:
            words[i] = str(rng.randrange(1000))
        elif rng.random() < 0.04:
            words[i] = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 5)))
    text = " ".join(words)
    return Dialogue("copy", (text,), say(rng.choice(_COPIES).format(q=text), text))


# --- answering in JSON --------------------------------------------------------------------------------------------

_FIELDS: Mapping[str, Callable[[Random], str | int]] = {
    "name": lambda rng: rng.choice(NAMES),
    "age": lambda rng: rng.randint(1, 99),
    "city": lambda rng: rng.choice(CITIES),
    "item": lambda rng: rng.choice(THINGS),
    "count": lambda rng: rng.randint(1, 999),
}
_JSONS = (
    "Give JSON with {q}.",
    "Answer in JSON: {q}",
    "Write JSON with {q}.",
    "JSON with {q}",
    "Make a JSON object with {q}.",
    "Please answer in JSON: {q}",
    "Return JSON with {q}.",
    "Give me JSON with {q}.",
)


def _listed(parts: list[str], rng: Random) -> str:
    joined = ", ".join(parts)
    if len(parts) > 1 and rng.random() < 0.3:
        joined = ", ".join(parts[:-1]) + " and " + parts[-1]
    return joined


def json_answer(rng: Random, difficulty: float) -> Dialogue:
    values = {
        key: _FIELDS[key](rng) for key in rng.sample(sorted(_FIELDS), rng.randint(1 + (difficulty >= 1), 4))
    }
    glue = rng.choice((" ", " ", " is "))
    user = rng.choice(_JSONS).format(q=_listed([f"{key}{glue}{value}" for key, value in values.items()], rng))
    response_format = {"type": "json_object"} if rng.random() < 0.1 else None
    operands = tuple(f"{key}={value}" for key, value in sorted(values.items()))
    return Dialogue("json_answer", operands, say(user, json.dumps(values)), response_format=response_format)
