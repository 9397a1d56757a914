"""The closed vocabulary of the synthetic tasks: short words, each one token of the bundled tokenizer."""

from __future__ import annotations

NAMES: tuple[str, ...] = tuple(
    """
    Mia Ann Bob Leo Zoe Max Eva Tom Ben Amy Ian Kim Sam Ida Jon Lea Dan Pia Ray Sue Tim Uma Vic Joe Meg Ned Pat Ron
    Ada Gus Hal Ivy Jan Kai Lou Nia Oli Peg Rex Sid Ted Val Wes Abe Bea Cal Dot Eli Fay Gil Iris Jack Kate Lily
    Mark Nina Omar Paul Rosa Sara Theo Vera Will Anna Carl Dora Emil Finn Hans Inga John Karl Lena Marc Nora Otto
    Rita Tina Adam Ruth
    """.split()
)

THINGS: tuple[str, ...] = tuple(
    """
    tea jam rice milk salt corn soup fish ham figs chess golf jazz yoga silk gold rain snow bread cake mint beans
    nuts limes tofu beer wine rum gin cola ice mud sand wool wax ink clay coal iron lead zinc maps films songs
    judo polo cards dice boats cars vans trains ships lamps pens hats coats rings bells harps roses moss oaks
    bees ants cats dogs owls frogs goats hens seals crabs
    """.split()
)

CITIES: tuple[str, ...] = tuple(
    "Rome Oslo Bern Lima Cairo Paris Tokyo Milan Turin Lyon Riga Doha Perth Dakar Sofia Nice".split()
)

WEATHER: tuple[str, ...] = ("hot", "cold", "rainy", "windy", "sunny", "dry")

# verbs of the facts: as stated, and as asked
VERBS: tuple[tuple[str, str], ...] = (("Give", "give"), ("Send", "send"))
HABITS: tuple[tuple[str, str], ...] = (
    ("likes", "like"),
    ("sells", "sell"),
    ("needs", "need"),
    ("wants", "want"),
)

# words of the questions themselves
PHRASES: tuple[str, ...] = tuple(
    """
    What How much many does do is the is of in it this these that and a to from with Tell me what
    Compute Calculate Sort sort Reverse reverse Put Say Repeat Copy Write Answer Give Make words word list order
    alphabetical backwards object JSON Remember Facts Note Weather Time Price Distance Age The cost far old Tools
    """.split()
)

# words of tool declarations, tool calls and JSON keys, which stand between signs
KEYWORDS: tuple[str, ...] = tuple(
    """
    name age city item count start end weather time price distance tool calls invoke parameter type string integer
    object properties required parameters description true false result
    """.split()
)
