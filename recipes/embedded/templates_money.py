"""Problem templates about prices, wages, savings and shared costs."""

import words
from stories import Story


def shopping(s: Story) -> None:
    """Several kinds of goods, the total, and perhaps the change."""
    p = s.person()
    goods = s.some(words.PRICED, s.n(2, 3))
    bought = [(s.n(2, 12), s.n(2, 12), x) for x in goods]
    listed = [f"{k} {plural(x)} for {c} dollars each" for k, c, x in bought]
    s.tell(
        f"{p.name} buys {', '.join(listed[:-1])} and {listed[-1]}.",
        f"At the {s.place()} {p.name} buys {', '.join(listed[:-1])} and {listed[-1]}.",
    )
    total = 0
    for k, c, x in bought:
        cost = s.step(k, "*", c, f"The {plural(x)} cost @ dollars.")
        if total:
            total = s.step(total, "+", cost, "So far that is @ dollars.", "Together that costs @ dollars.")
        else:
            total = cost
    if s.n(0, 1):
        pay = (total // 50 + 1) * 50 if s.n(0, 1) else total + s.n(1, 40)
        s.tell(f"{p.He} pays with {pay} dollars.", f"{p.He} has {pay} dollars.")
        s.tell(f"How many dollars does {p.he} have left?", "How much money is left, in dollars?")
        s.step(pay, "-", total, f"{p.name} has @ dollars left.", "The money left is @ dollars.")
    else:
        s.tell(f"How many dollars does {p.he} spend?", f"How many dollars does {p.name} pay in total?")


def plural(noun: str) -> str:
    """The plural of a priced thing."""
    irregular = {"scarf": "scarves", "brush": "brushes", "sandwich": "sandwiches", "toy": "toys", "torch": "torches"}
    return irregular.get(noun, noun + "s")


def one_price(s: Story) -> None:
    """Items of one price, a discount, the change."""
    p, x = s.person(), s.rng.choice(words.PRICED)
    k, c, off, left = s.n(2, 12), s.n(3, 15), s.n(1, 10), s.n(1, 50)
    total = k * c - off
    s.tell(
        f"{p.name} wants {k} {plural(x)} that cost {c} dollars each.",
        f"One {x} costs {c} dollars, and {p.name} takes {k} of them.",
    )
    s.tell(f"The seller takes {off} dollars off the total.", f"There is a discount of {off} dollars on the whole.")
    s.tell(f"{p.name} pays with {total + left} dollars.", f"{p.He} gives the seller {total + left} dollars.")
    s.tell(f"How many dollars does {p.he} get back?", "How many dollars of change is that?")
    t = s.step(k, "*", c, f"The {plural(x)} cost @ dollars.", "The full price is @ dollars.")
    t = s.step(t, "-", off, "With the discount that is @ dollars.", "After the discount the price is @ dollars.")
    s.step(total + left, "-", t, f"{p.name} gets @ dollars back.", "The change is @ dollars.")


def savings(s: Story) -> None:
    """Saving each week, spending some."""
    p, x = s.person(), s.rng.choice(words.PRICED)
    a, w, k, cost = s.n(2, 90), s.n(2, 12), s.n(2, 12), s.n(3, 60)
    unit = s.pick("week", "month", "day")
    start = s.n(0, 1)
    if start:
        s.tell(f"{p.name} has {a} dollars in {p.his} money box.", f"{p.name} starts with {a} dollars.")
    s.tell(
        f"{p.name if not start else p.He} saves {w} dollars every {unit} for {k} {unit}s.",
        f"For {k} {unit}s {p.name if not start else p.he} saves {w} dollars each {unit}.",
    )
    t = s.step(w, "*", k, f"In {k} {unit}s {p.name} saves @ dollars.", f"The savings of {k} {unit}s are @ dollars.")
    if start:
        t = s.step(
            a, "+", t, f"With the first money {p.he} has @ dollars.", "Together with the start that is @ dollars."
        )
    s.tell(f"Then {p.he} spends {cost} dollars on a new {x}.", f"Then {p.he} buys a {x} for {cost} dollars.")
    s.tell(f"How many dollars does {p.name} have left?", "How many dollars remain?")
    s.step(t, "-", cost, f"After buying the {x} {p.he} has @ dollars.", f"The {x} leaves {p.him} @ dollars.")


def earnings(s: Story) -> None:
    """Wages per hour on two days."""
    p = s.person()
    d, e = s.some(words.DAYS)
    w, h, g, cost = s.n(3, 12), s.n(2, 9), s.n(2, 9), s.n(5, 60)
    job = s.pick(
        "washing cars",
        "walking dogs",
        "raking leaves",
        "painting fences",
        "babysitting",
        "baking bread",
        "fixing bikes",
    )
    s.tell(f"{p.name} earns {w} dollars an hour for {job}.", f"For {job} {p.name} gets {w} dollars per hour.")
    s.tell(
        f"{p.He} works {h} hours on {d} and {g} hours on {e}.", f"On {d} {p.he} works {h} hours, and on {e} {g} hours."
    )
    t = s.step(h, "+", g, f"{p.name} works @ hours.", "In all that is @ hours.")
    m = s.step(t, "*", w, f"{p.He} earns @ dollars.", "The pay for this is @ dollars.")
    if s.n(0, 1):
        s.tell(
            f"{p.He} spends {cost} dollars at the {s.place()}.",
            f"Then {p.he} gives {cost} dollars to {p.his} {s.rng.choice(words.RELATIVES)}.",
        )
        s.step(m, "-", cost, f"Then {p.he} has @ dollars left.", "That leaves @ dollars.")
        s.tell(f"How many dollars does {p.he} have left?", "How much of the money is left, in dollars?")
    else:
        s.tell(f"How many dollars does {p.name} earn?", "How many dollars is that in total?")


def tickets(s: Story) -> None:
    """Adult and child prices."""
    place, k, c, m, d = s.place(), s.n(2, 9), s.n(5, 15), s.n(2, 12), s.n(2, 9)
    s.tell(
        f"A ticket for the {place} costs {c} dollars for adults and {d} dollars for children.",
        f"At the {place} adults pay {c} dollars and children pay {d} dollars.",
    )
    s.tell(f"A group of {k} adults and {m} children goes in.", f"{k} adults and {m} children want to go.")
    s.tell("How many dollars do they pay together?", "How many dollars do all the tickets cost?")
    u = s.step(k, "*", c, "The adults pay @ dollars.")
    v = s.step(m, "*", d, "The children pay @ dollars.")
    s.step(u, "+", v, "Together they pay @ dollars.", "All the tickets cost @ dollars.")


def split_bill(s: Story) -> None:
    """A bill with a tip shared by friends."""
    p, k = s.person(), s.n(2, 10)
    each = s.n(8, 20)
    tip = s.n(2, 15)
    food = k * each - tip
    meal = s.pick("a dinner", "a lunch", "a boat trip", "a game room", "a present", "a taxi ride")
    s.tell(
        f"{p.name} and {k - 1} friends pay {food} dollars for {meal} and {tip} dollars as a tip."
        if k > 2
        else f"{p.name} and a friend pay {food} dollars for {meal} and {tip} dollars as a tip."
    )
    s.tell(f"The {k} of them share the cost equally.", "Everybody pays the same.")
    s.tell(f"{p.name} had {each + k + tip} dollars before.", f"{p.name} came with {each + k + tip} dollars.")
    s.tell(f"How many dollars does {p.he} have left?", f"How many dollars remain for {p.him}?")
    t = s.step(food, "+", tip, "The whole bill is @ dollars.", "Together it costs @ dollars.")
    one = s.step(t, "/", k, "Each one pays @ dollars.", f"{p.name} pays @ dollars.")
    s.step(each + k + tip, "-", one, f"So {p.he} has @ dollars left.", f"{p.name} keeps @ dollars.")


TEMPLATES = (shopping, shopping, one_price, savings, earnings, tickets, split_bill)
