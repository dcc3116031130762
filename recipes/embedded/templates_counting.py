"""Problem templates about having, giving, sharing and comparing things."""

import words
from stories import Person, Story


def inventory(s: Story) -> None:
    """A chain of two to four random events on one heap of things."""
    p, x = s.person(), s.things()
    a = s.n(5, 80)
    colour, other = s.some(words.COLOURS)
    if s.n(0, 1):
        b = s.n(3, 60)
        s.tell(
            f"{p.name} has {a} {colour} {x} and {b} {other} {x}.",
            f"In {p.name}'s room there are {a} {colour} {x} and {b} {other} {x}.",
        )
        have = s.step(
            a,
            "+",
            b,
            f"{p.name} starts with @ {x}.",
            f"Altogether {p.he} has @ {x} at first.",
            f"At the start there are @ {x}.",
        )
    else:
        s.tell(
            f"{p.name} has {a} {x}.",
            f"{p.name} owns {a} {x}.",
            f"There are {a} {x} in {p.name}'s box.",
            f"{p.name} begins the day with {a} {x}.",
        )
        have = a
    for number in range(s.n(2, 3)):
        then = "" if number == 0 else s.pick("Then ", "After that, ", "Later ", "Next, ")
        have = _event(s, p, x, have, then)
    s.tell(
        f"How many {x} does {p.name} have now?",
        f"How many {x} does {p.name} have in the end?",
        f"How many {x} are there now?",
    )


def _event(s: Story, p: Person, x: str, have: int, then: str) -> int:
    """One thing that happens to the heap."""
    who = p.he if then else p.He
    friend = s.rng.choice(words.RELATIVES)
    kind = s.n(0, 7)
    if kind <= 1:
        k = s.n(2, min(60, have)) if have > 2 else 1
        verb, doing = s.rng.choice(
            [
                (f"gives {k} {x} to {p.his} {friend}", f"giving {k} {x} away"),
                (f"loses {k} {x}", f"losing {k} {x}"),
                (f"sells {k} {x}", f"selling {k} {x}"),
                (f"puts {k} {x} away", f"putting {k} {x} away"),
            ]
        )
        s.tell(f"{then}{who} {verb}.")
        return s.step(
            have, "-", k, f"After {doing} {p.he} has @ {x}.", f"Then there are @ {x} left.", f"That leaves @ {x}."
        )
    if kind <= 3:
        k = s.n(2, 60)
        verb, doing = s.rng.choice(
            [
                (f"finds {k} more {x}", f"finding {k} more"),
                (f"buys {k} more {x}", f"buying {k} more"),
                (f"gets {k} {x} from {p.his} {friend}", f"getting {k} more"),
                (f"wins {k} {x}", f"winning {k} more"),
            ]
        )
        s.tell(f"{then}{who} {verb}.")
        return s.step(have, "+", k, f"After {doing} {p.he} has @ {x}.", f"Now there are @ {x}.", f"That makes @ {x}.")
    if kind <= 5:
        c, k, each = s.rng.choice(words.CONTAINERS), s.n(2, 12), s.n(2, 12)
        s.tell(f"{then}{who} buys {k} {c} with {each} {x} each.", f"{then}{who} gets {k} {c} of {each} {x} each.")
        more = s.step(k, "*", each, f"The {c} hold @ {x}.", f"In the {c} there are @ {x}.")
        return s.step(have, "+", more, f"So now {p.name} has @ {x}.", f"Together with the others that makes @ {x}.")
    if kind == 6:
        s.tell(f"{then}the number of {p.his} {x} doubles." if then else f"The number of {p.his} {x} doubles.")
        return s.step(have, "*", 2, f"After doubling there are @ {x}.", f"Twice as many makes @ {x}.")
    s.tell(f"{then}{who} gives half of the {x} to {p.his} {friend}.")
    return s.step(
        have, "/", 2, f"Half of the {x} is @, so {p.name} keeps that many.", f"After giving half away {p.he} has @ {x}."
    )


def compare_more(s: Story) -> None:
    """B has k more (or fewer) than A; both together."""
    p, q, x = s.person(), s.person(), s.things()
    a, k = s.n(5, 90), s.n(2, 50)
    more = s.n(0, 1) == 1
    word = "more" if more else "fewer"
    s.tell(f"{p.name} has {a} {x}.", f"{p.name} collected {a} {x}.")
    s.tell(f"{q.name} has {k} {word} {x} than {p.name}.", f"{q.name} has {k} {word} than {p.name}.")
    b = s.step(
        a, "+" if more else "-", k, f"{q.name} has @ {x}.", f"{k} {word} than {a} is @, so this is what {q.name} has."
    )
    if s.n(0, 1):
        r, m = s.person(), s.n(2, 6)
        s.tell(f"{r.name} has {m} times as many {x} as {q.name}.")
        b = s.step(b, "*", m, f"{r.name} has @ {x}.", f"{m} times as many is @, the {x} of {r.name}.")
        s.tell(
            f"How many {x} do {p.name} and {r.name} have together?",
            f"How many {x} is that for {p.name} and {r.name} in total?",
        )
    else:
        s.tell(f"How many {x} do they have together?", f"How many {x} do {p.name} and {q.name} have in total?")
    s.step(a, "+", b, "Together they have @ " + x + ".", "In total that is @ " + x + ".")


def difference(s: Story) -> None:
    """Two products compared."""
    p, q, x, c = s.person(), s.person(), s.things(), s.rng.choice(words.CONTAINERS)
    a, b, e, f = s.n(2, 12), s.n(2, 12), s.n(2, 12), s.n(2, 12)
    s.tell(f"{p.name} fills {a} {c} with {b} {x} each.", f"{p.name} has {a} {c} of {b} {x}.")
    s.tell(f"{q.name} fills {e} {c} with {f} {x} each.", f"{q.name} has {e} {c} of {f} {x}.")
    s.tell(f"How many more {x} does {p.name} have than {q.name}?", f"By how many {x} is {p.name} ahead of {q.name}?")
    u = s.step(a, "*", b, f"{p.name} has @ {x}.")
    v = s.step(e, "*", f, f"{q.name} has @ {x}.")
    s.step(u, "-", v, f"So {p.name} has @ more {x}.", f"The difference is @ {x}.")


def sharing(s: Story) -> None:
    """Things put together and shared equally, then some eaten or given back."""
    p, q, x, k = s.person(), s.person(), s.things(), s.n(3, 12)
    total = k * s.n(3, 15)
    a = s.n(2, total - 1)
    b = total - a
    s.tell(f"{p.name} brings {a} {x} and {q.name} brings {b} {x}.", f"{p.name} has {a} {x}, and {q.name} has {b} {x}.")
    s.tell(f"They share all of them equally among {k} children.", f"All the {x} are divided equally among {k} friends.")
    t = s.step(a, "+", b, f"Together there are @ {x}.", f"They have @ {x} in all.")
    each = s.step(t, "/", k, f"Each one gets @ {x}.", f"Shared equally, that is @ {x} each.")
    r = s.person()
    g = s.n(1, 12)
    s.tell(
        f"{r.name} is one of them and then gets {g} extra {x}."
        if s.n(0, 1)
        else f"One of them, {r.name}, receives {g} more {x}."
    )
    s.tell(f"How many {x} does {r.name} have?", f"How many {x} does {r.name} have now?")
    s.step(each, "+", g, f"{r.name} has @ {x}.", f"So {r.name} ends up with @ {x}.")


def leftovers(s: Story) -> None:
    """Packing into full containers and counting what is left."""
    p, x, c = s.person(), s.things(), s.rng.choice(words.CONTAINERS)
    k, each = s.n(2, 12), s.n(3, 12)
    total = k * each + s.n(1, each - 1)
    s.tell(
        f"{p.name} has {total} {x} and packs them into {c} of {each}.",
        f"{p.name} puts {total} {x} into {c} that hold {each} each.",
    )
    s.tell(f"{p.He} fills {k} {c} completely.", f"{p.He} can fill {k} {c}.")
    s.tell(f"How many {x} are left over?", f"How many {x} do not fit?")
    packed = s.step(k, "*", each, f"The full {c} hold @ {x}.", f"In {k} {c} there are @ {x}.")
    s.step(total, "-", packed, f"So @ {x} are left over.", f"That leaves @ {x}.")


def containers_needed(s: Story) -> None:
    """How many containers for two heaps."""
    p, c = s.person(), s.rng.choice(words.CONTAINERS)
    x, y = s.some(words.THINGS)
    each, k = s.n(2, 12), s.n(3, 20)
    total = each * k
    a = s.n(1, total - 1)
    s.tell(f"{p.name} has {a} {x} and {total - a} {y}.", f"There are {a} {x} and {total - a} {y} on {p.name}'s table.")
    s.tell(f"{p.He} packs everything into {c} of {each}.", f"Each of {p.his} {c} takes {each} items.")
    s.tell(f"How many {c} does {p.he} need?", f"How many {c} are needed?")
    t = s.step(a, "+", total - a, "There are @ items in all.", "Altogether that is @ items.")
    s.step(t, "/", each, f"So {p.name} needs @ {c}.", f"This takes @ {c}.")


def broken_items(s: Story) -> None:
    """Containers arrive, some items are bad, the rest is shared or sold."""
    x, c = s.things(), s.rng.choice(words.CONTAINERS)
    k, each, bad = s.n(3, 12), s.n(3, 12), s.n(2, 20)
    place = s.place()
    s.tell(
        f"The {place} receives {k} {c} with {each} {x} each.", f"A truck brings {k} {c} of {each} {x} to the {place}."
    )
    s.tell(f"{bad} of the {x} are broken.", f"Unfortunately {bad} {x} are damaged.")
    t = s.step(k, "*", each, f"There are @ {x} in the {c}.", f"The {place} gets @ {x}.")
    good = s.step(t, "-", bad, f"Without the bad ones there are @ {x}.", f"Only @ {x} are good.")
    old = s.n(5, 99)
    s.tell(f"The {place} already had {old} good {x}.", f"Before that, there were {old} good {x} in stock.")
    s.tell(f"How many good {x} are there now?", f"How many good {x} does the {place} have now?")
    s.step(good, "+", old, f"With the old ones that makes @ good {x}.", f"So now there are @ good {x}.")


def grid(s: Story) -> None:
    """Rows and columns, some missing."""
    place, x = s.place(), s.pick("chairs", "seats", "plants", "trees", "lamps", "tables", "benches", "tents", "desks")
    r, k, m = s.n(3, 12), s.n(3, 12), s.n(2, 30)
    s.tell(f"At the {place} there are {r} rows of {k} {x}.", f"The {place} has {r} rows with {k} {x} in each row.")
    t = s.step(r, "*", k, f"There are @ {x} in the rows.", f"The rows hold @ {x}.")
    if s.n(0, 1):
        s.tell(f"{m} of them are removed.", f"{m} of the {x} are taken away.")
        t = s.step(t, "-", m, f"After taking some away there are @ {x}.", f"That leaves @ {x}.")
    else:
        s.tell(f"Another {m} {x} stand at the side.", f"There are also {m} more {x} outside.")
        t = s.step(t, "+", m, f"With the others there are @ {x}.", f"Altogether that makes @ {x}.")
    h = s.n(2, 40)
    s.tell(f"{h} {x} are painted.", f"Workers clean {h} of the {x}.")
    s.tell(f"How many {x} are not done yet?", f"How many {x} still have to be done?")
    s.step(t, "-", h, f"So @ {x} are still to be done.", f"There remain @ {x}.")


def ages(s: Story) -> None:
    """Ages in relation to each other, some years later."""
    p, q = s.person(), s.person()
    a, k, m, y = s.n(4, 15), s.n(2, 9), s.n(2, 4), s.n(2, 20)
    s.tell(f"{p.name} is {a} years old.", f"{p.name} turned {a} today.")
    s.tell(f"{q.name} is {m} times as old as {p.name}.", f"{q.name}'s age is {m} times the age of {p.name}.")
    b = s.step(a, "*", m, f"{q.name} is @ years old.", f"The age of {q.name} is @ years.")
    if s.n(0, 1):
        r = s.person()
        s.tell(f"{r.name} is {k} years younger than {q.name}.", f"{r.name} is {k} years less than {q.name}.")
        b, q = s.step(b, "-", k, f"{r.name} is @ years old.", f"That makes {r.name} @ years old."), r
    if s.n(0, 1):
        s.tell(f"How old will {q.name} be in {y} years?", f"What will be the age of {q.name} after {y} more years?")
        s.step(b, "+", y, f"In {y} years {q.name} will be @ years old.", f"After {y} years that is @ years.")
    else:
        s.tell(f"How old are {p.name} and {q.name} together?", f"What is the sum of the ages of {p.name} and {q.name}?")
        s.step(a, "+", b, "Together they are @ years old.", "The sum of their ages is @ years.")


def thirds(s: Story) -> None:
    """A fraction of a heap leaves, the rest is counted."""
    p, x = s.person(), s.things()
    word, k = s.rng.choice([("half", 2), ("a third", 3), ("a quarter", 4), ("a fifth", 5), ("a tenth", 10)])
    a, more = k * s.n(3, 20), s.n(2, 40)
    s.tell(f"{p.name} has {a} {x}.", f"{p.name} made {a} {x}.")
    s.tell(
        f"{p.He} gives {word} of them to {p.his} {s.rng.choice(words.RELATIVES)}.",
        f"{p.He} sells {word} of them at the {s.place()}.",
    )
    g = s.step(a, "/", k, f"{word.capitalize()} of the {x} is @ {x}.", f"{p.name} parts with @ {x}.")
    left = s.step(a, "-", g, f"So @ {x} remain.", f"{p.He} keeps @ {x}.")
    s.tell(f"Then {p.he} makes {more} new ones.", f"Afterwards {p.he} gets another {more} {x}.")
    s.tell(f"How many {x} does {p.name} have now?", f"How many {x} does {p.he} have in the end?")
    s.step(left, "+", more, f"Now {p.name} has @ {x}.", f"In the end there are @ {x}.")


def three_people(s: Story) -> None:
    """Three heaps from one another, then the total."""
    p, q, r, x = s.person(), s.person(), s.person(), s.things()
    a, k, m = s.n(4, 60), s.n(2, 30), s.n(2, 40)
    s.tell(f"{p.name} has {a} {x}.", f"{p.name} found {a} {x}.")
    s.tell(f"{q.name} has {k} more than {p.name}, and {r.name} has {m} fewer than {q.name}.")
    s.tell(f"How many {x} do the three have together?", "How many is that in total?")
    b = s.step(a, "+", k, f"{q.name} has @ {x}.")
    c = s.step(b, "-", m, f"{r.name} has @ {x}.")
    t = s.step(a, "+", b, f"{p.name} and {q.name} have @ {x}.", f"The first two have @ {x}.")
    s.step(t, "+", c, f"All three have @ {x}.", f"Together the three have @ {x}.")


def animals(s: Story) -> None:
    """Animals on a farm: born, sold, moved."""
    p = s.person()
    x, y = s.some(words.ANIMALS)
    a, m, k, g = s.n(3, 40), s.n(2, 6), s.n(2, 20), s.n(2, 20)
    s.tell(
        f"On the farm of {p.name} there are {a} {x} and {m} times as many {y}.",
        f"{p.name} keeps {a} {x}, and {m} times as many {y}.",
    )
    b = s.step(a, "*", m, f"There are @ {y}.", f"{p.name} has @ {y}.")
    t = s.step(a, "+", b, "Together that is @ animals.", "In all there are @ animals.")
    s.tell(f"{p.He} sells {k} animals.", f"{k} animals are sold to {s.person().name}.")
    t = s.step(t, "-", k, "After the sale there are @ animals.", "That leaves @ animals.")
    if s.n(0, 1):
        s.tell(f"In spring {g} young animals are born.", f"Then {g} babies are born.")
        t = s.step(t, "+", g, "With the young ones there are @ animals.", "The births make it @ animals.")
    s.tell("How many animals are on the farm now?", f"How many animals does {p.name} have now?")


def legs(s: Story) -> None:
    """Counting legs or wheels of two kinds."""
    p = s.person()
    (x, a), (y, b), part = s.rng.choice(
        [
            (("chickens", 2), ("cows", 4), "legs"),
            (("ducks", 2), ("sheep", 4), "legs"),
            (("bicycles", 2), ("cars", 4), "wheels"),
            (("tricycles", 3), ("cars", 4), "wheels"),
            (("stools", 3), ("tables", 4), "legs"),
            (("spiders", 8), ("beetles", 6), "legs"),
        ]
    )
    m, n = s.n(2, 15), s.n(2, 15)
    s.tell(
        f"{p.name} counts {m} {x} and {n} {y} near the {s.place()}.",
        f"Near the {s.place()} {p.name} sees {m} {x} and {n} {y}.",
    )
    s.tell(f"Each of the {x} has {a} {part} and each of the {y} has {b} {part}.")
    s.tell(f"How many {part} are there in all?", f"How many {part} does {p.name} count?")
    u = s.step(m, "*", a, f"The {x} have @ {part}.")
    v = s.step(n, "*", b, f"The {y} have @ {part}.")
    s.step(u, "+", v, f"In all there are @ {part}.", f"Together that makes @ {part}.")


TEMPLATES = (
    inventory,
    inventory,
    inventory,
    inventory,
    compare_more,
    compare_more,
    difference,
    sharing,
    leftovers,
    containers_needed,
    broken_items,
    grid,
    ages,
    thirds,
    three_people,
    animals,
    legs,
)
