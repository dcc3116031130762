"""Problem templates about time, distance, rates, amounts and daily totals."""

import words
from stories import Story


def distance(s: Story) -> None:
    """Speeds and hours in two parts."""
    p = s.person()
    how = s.pick("cycles", "drives", "rides", "walks", "sails", "hikes", "runs")
    v, h, u, g = s.n(3, 40), s.n(2, 9), s.n(3, 40), s.n(2, 9)
    s.tell(
        f"{p.name} {how} for {h} hours at {v} kilometers per hour.",
        f"For {h} hours {p.name} {how} at {v} kilometers per hour.",
    )
    a = s.step(v, "*", h, f"In the first part {p.he} covers @ kilometers.", f"The first {h} hours give @ kilometers.")
    if s.n(0, 1):
        s.tell(
            f"Then {p.he} {how} for {g} hours at {u} kilometers per hour.",
            f"After a rest {p.he} {how} {g} more hours at {u} kilometers per hour.",
        )
        b = s.step(
            u, "*", g, f"In the second part {p.he} covers @ kilometers.", f"The next {g} hours give @ kilometers."
        )
        s.tell("How many kilometers is that in total?", f"How far does {p.name} go, in kilometers?")
        s.step(a, "+", b, "The whole way is @ kilometers.", "In total that is @ kilometers.")
    else:
        far = a + s.n(2, 80)
        s.tell(f"The whole trip is {far} kilometers long.", f"The way to the {s.place()} is {far} kilometers.")
        s.tell("How many kilometers are left?", f"How many kilometers does {p.he} still have to go?")
        s.step(far, "-", a, "There are @ kilometers left.", "So @ kilometers remain.")


def commute(s: Story) -> None:
    """The same way there and back, several days."""
    p, place = s.person(), s.place()
    a, d, extra = s.n(2, 15), s.n(2, 7), s.n(2, 40)
    s.tell(f"The {place} is {a} kilometers from {p.name}'s house.", f"{p.name} lives {a} kilometers from the {place}.")
    s.tell(f"{p.He} goes there and back on {d} days.", f"On {d} days {p.he} travels there and back again.")
    s.tell(f"{p.He} also makes a trip of {extra} kilometers.", f"Another trip is {extra} kilometers long.")
    s.tell("How many kilometers is that in all?", f"How many kilometers does {p.name} travel in total?")
    b = s.step(a, "*", 2, "There and back is @ kilometers.", "One day means @ kilometers.")
    t = s.step(b, "*", d, f"In {d} days that is @ kilometers.", f"The {d} days make @ kilometers.")
    s.step(t, "+", extra, "With the other trip it is @ kilometers.", f"In all {p.name} travels @ kilometers.")


def reading(s: Story) -> None:
    """Pages read per day, the rest of the book."""
    p = s.person()
    v, d, more = s.n(3, 40), s.n(2, 12), s.n(2, 60)
    what = s.pick("book", "novel", "comic", "diary", "story")
    pages = v * d + more + s.n(2, 90)
    s.tell(f"{p.name} reads a {what} of {pages} pages.", f"{p.name}'s {what} has {pages} pages.")
    s.tell(f"{p.He} reads {v} pages a day for {d} days.", f"For {d} days {p.he} reads {v} pages each day.")
    s.tell(f"Then {p.he} reads {more} pages on one day.", f"On the weekend {p.he} reads {more} more pages.")
    s.tell("How many pages are left?", f"How many pages does {p.he} still have to read?")
    t = s.step(v, "*", d, f"In {d} days {p.name} reads @ pages.", f"The {d} days give @ pages.")
    t = s.step(t, "+", more, f"Altogether {p.he} has read @ pages.", "With the extra pages that is @ pages.")
    s.step(pages, "-", t, "So @ pages are left.", "There remain @ pages.")


def reading_days(s: Story) -> None:
    """How many days the rest takes at an even pace."""
    p = s.person()
    v, d, done = s.n(2, 12), s.n(3, 20), s.n(5, 90)
    noun, verb = s.rng.choice(
        [("pages", "reads"), ("exercises", "solves"), ("words", "learns"), ("bricks", "lays"), ("letters", "writes")]
    )
    s.tell(f"{p.name} has {v * d + done} {noun} to finish.", f"There are {v * d + done} {noun} waiting for {p.name}.")
    s.tell(f"{done} {noun} are already done.", f"{p.He} has finished {done} of them.")
    s.tell(f"Now {p.he} {verb} {v} {noun} each day.", f"From now on {p.he} {verb} {v} {noun} per day.")
    s.tell("How many days does the rest take?", f"How many more days does {p.he} need?")
    t = s.step(v * d + done, "-", done, f"There are @ {noun} left.", f"The rest is @ {noun}.")
    s.step(t, "/", v, "This takes @ days.", f"So {p.name} needs @ days.")


def recipe(s: Story) -> None:
    """Ingredients for several batches, some in the house."""
    p = s.person()
    thing, unit = s.rng.choice(
        [
            ("flour", "cups"),
            ("sugar", "spoons"),
            ("milk", "cups"),
            ("butter", "ounces"),
            ("rice", "cups"),
            ("cocoa", "spoons"),
            ("honey", "spoons"),
        ]
    )
    dish = s.pick("cake", "pie", "bread", "pudding", "pizza", "tray of cookies", "pot of soup", "tray of muffins")
    a, k = s.n(2, 12), s.n(2, 12)
    b = s.n(2, 12)
    s.tell(f"One {dish} needs {a} {unit} of {thing}.", f"{p.name} uses {a} {unit} of {thing} for each {dish}.")
    s.tell(f"{p.name} makes {k} of these for the {s.place()}.", f"{p.name} plans to make {k} of them.")
    t = s.step(a, "*", k, f"This takes @ {unit} of {thing}.", f"{p.name} needs @ {unit} of {thing}.")
    if s.n(0, 1):
        s.tell(f"{b} more {unit} are needed for the decoration.", f"The topping takes another {b} {unit}.")
        t = s.step(t, "+", b, f"With the extra amount it is @ {unit}.", f"Altogether that is @ {unit}.")
    have = s.n(1, max(1, min(60, t - 1)))
    s.tell(f"{p.He} already has {have} {unit}.", f"There are {have} {unit} in the kitchen.")
    s.tell(f"How many {unit} of {thing} must {p.he} buy?", f"How many more {unit} does {p.he} need?")
    s.step(t, "-", have, f"So {p.he} must buy @ {unit}.", f"That means @ more {unit}.")


def harvest(s: Story) -> None:
    """Crops from trees or rows, sold and shared out."""
    p, x = s.person(), s.rng.choice(words.CROPS)
    r, k, sold, c = s.n(2, 12), s.n(3, 12), s.n(2, 60), s.n(2, 10)
    s.tell(
        f"{p.name} picks {k} {x} from each of {r} rows.",
        f"In {p.name}'s garden there are {r} rows, and each gives {k} {x}.",
    )
    t = s.step(r, "*", k, f"The harvest is @ {x}.", f"{p.name} picks @ {x}.")
    if t - sold > 2 and s.n(0, 1):
        sold = t - c * ((t - sold) // c or 1)
        s.tell(f"{p.He} sells {sold} of them and packs the rest into {c} equal baskets.")
        left = s.step(t, "-", sold, f"After the sale there are @ {x}.", f"The rest is @ {x}.")
        s.tell(f"How many {x} are in each basket?", "How many are in one basket?")
        s.step(left, "/", c, f"Each basket holds @ {x}.", f"One basket has @ {x}.")
    else:
        price = s.n(2, 9)
        s.tell(f"{sold} of the {x} are rotten.", f"Birds eat {sold} of them.")
        left = s.step(t, "-", sold, f"There are @ good {x}.", f"That leaves @ {x}.")
        s.tell(f"The rest is sold for {price} dollars each.", f"Each of the others brings {price} dollars.")
        s.tell(f"How many dollars does {p.name} get?", "How much money is that, in dollars?")
        s.step(left, "*", price, f"{p.name} gets @ dollars.", "The money is @ dollars.")


def bus(s: Story) -> None:
    """People getting on and off."""
    vehicle = s.pick("bus", "train", "tram", "ferry", "boat", "subway")
    have, first = s.n(5, 70), True
    s.tell(
        f"There are {have} people on a {vehicle}.",
        f"A {vehicle} starts with {have} passengers.",
        f"A {vehicle} leaves the {s.place()} with {have} people.",
    )
    for _ in range(s.n(1, 2)):
        off, on = s.n(1, 40), s.n(1, 40)
        s.tell(
            f"At the {'next' if first else s.pick('following', 'second')} stop {off} people get off and {on} get on."
        )
        have = s.step(have, "-", off, f"After {off} people get off there are @ people.", "Then there are @ people.")
        have = s.step(
            have, "+", on, f"With {on} new ones there are @ people.", f"After {on} get on there are @ people."
        )
        first = False
    s.tell(f"How many people are on the {vehicle} now?", "How many people are there now?")


def classroom(s: Story) -> None:
    """Classes, groups and absentees."""
    k, each, away, size = s.n(2, 9), s.n(10, 30), s.n(1, 20), s.n(2, 10)
    away += (k * each - away) % size
    event = s.pick("trip", "contest", "play", "game", "picnic", "concert", "party")
    s.tell(f"A school has {k} classes with {each} students each.", f"{k} classes of {each} students plan a {event}.")
    s.tell(
        f"{away} students are ill on the day of the {event}.",
        f"On the day of the {event} {away} students stay at home.",
    )
    t = s.step(k, "*", each, "There are @ students.", "The classes have @ students.")
    t = s.step(t, "-", away, "Only @ students come.", "That leaves @ students.")
    if s.n(0, 1):
        s.tell(f"The others form groups of {size}.", f"The rest is divided into teams of {size}.")
        s.tell("How many groups are there?", "How many teams is that?")
        s.step(t, "/", size, "So there are @ groups.", "That makes @ teams.")
    else:
        adults = s.n(2, 20)
        s.tell(f"{adults} adults come along.", f"They are joined by {adults} parents.")
        s.tell(f"How many people take part in the {event}?", "How many people is that in all?")
        s.step(t, "+", adults, "With the adults there are @ people.", "In all @ people take part.")


def days(s: Story) -> None:
    """Totals over three named days."""
    p, x = s.person(), s.things()
    d, e, f = s.some(words.DAYS, 3)
    a, k, m = s.n(3, 60), s.n(2, 40), s.n(2, 4)
    verb = s.pick("sells", "makes", "collects", "paints", "counts", "packs")
    s.tell(f"On {d} {p.name} {verb} {a} {x}.", f"{p.name} {verb} {a} {x} on {d}.")
    s.tell(f"On {e} {p.he} {verb} {k} more than on {d}.", f"On {e} it is {k} more than on {d}.")
    b = s.step(a, "+", k, f"On {e} it is @ {x}.", f"{e} brings @ {x}.")
    t = s.step(a, "+", b, f"The two days make @ {x}.", f"{d} and {e} give @ {x}.")
    if s.n(0, 1):
        s.tell(f"On {f} {p.he} {verb} {m} times as many as on {d}.")
        c = s.step(a, "*", m, f"On {f} it is @ {x}.", f"{f} brings @ {x}.")
        t = s.step(t, "+", c, f"All three days make @ {x}.", f"With {f} that is @ {x}.")
    s.tell(f"How many {x} is that in all?", f"How many {x} is the total?")


def machine(s: Story) -> None:
    """Output per hour, target, remaining hours."""
    x, rate, h, more = s.things(), s.n(2, 12), s.n(2, 12), s.n(2, 9)
    target = rate * (h + more)
    who = s.pick("A machine", "A factory", "A workshop", "A robot", "A printer")
    s.tell(f"{who} makes {rate} {x} per hour.", f"{who} produces {rate} {x} every hour.")
    s.tell(
        f"It has been running for {h} hours and has to make {target} {x}.",
        f"The order is {target} {x}, and {h} hours are over.",
    )
    s.tell("How many more hours does it need?", "How many hours are left until the order is done?")
    t = s.step(rate, "*", h, f"So far it made @ {x}.", f"In {h} hours that is @ {x}.")
    left = s.step(target, "-", t, f"There are @ {x} left to make.", f"The rest is @ {x}.")
    s.step(left, "/", rate, "This takes @ hours.", "So it needs @ more hours.")


def tank(s: Story) -> None:
    """Filling and leaking."""
    what = s.pick("tank", "pool", "barrel", "pond", "bath")
    a, v, m, out = s.n(5, 99), s.n(4, 20), s.n(2, 12), s.n(1, 3)
    s.tell(f"A {what} contains {a} liters of water.", f"There are {a} liters of water in a {what}.")
    s.tell(
        f"Every minute {v} liters flow in and {out} liters flow out.",
        f"Each minute a pipe adds {v} liters and {out} liters leak out.",
    )
    s.tell(
        f"How many liters are in the {what} after {m} minutes?",
        f"How much water, in liters, is there {m} minutes later?",
    )
    g = s.step(v, "-", out, f"Each minute the {what} gains @ liters.", "The gain is @ liters per minute.")
    t = s.step(g, "*", m, f"In {m} minutes that is @ liters.", f"The {m} minutes bring @ liters.")
    s.step(a, "+", t, f"Then the {what} holds @ liters.", "So there are @ liters.")


def stairs(s: Story) -> None:
    """Up and down a building or a ladder."""
    p, f, k, down = s.person(), s.n(2, 12), s.n(6, 20), s.n(2, 40)
    where = s.pick("tower", "lighthouse", "hotel", "castle", "skyscraper", "church")
    s.tell(
        f"A {where} has {f} floors with {k} steps between each.", f"In a {where} there are {f} flights of {k} steps."
    )
    s.tell(
        f"{p.name} climbs to the top and then goes {down} steps down.",
        f"{p.name} walks all the way up and comes {down} steps down again.",
    )
    t = s.step(f, "*", k, "To the top there are @ steps.", f"The {where} has @ steps.")
    if s.n(0, 1):
        s.tell(f"How many steps above the ground is {p.he}?", f"How many steps is {p.name} from the bottom?")
        s.step(t, "-", down, f"So {p.he} is @ steps up.", f"{p.name} stands @ steps above the ground.")
    else:
        s.tell(f"How many steps did {p.he} walk?", "How many steps is that together?")
        s.step(t, "+", down, f"So {p.he} walked @ steps.", "Together that is @ steps.")


TEMPLATES = (distance, commute, reading, reading_days, recipe, harvest, bus, classroom, days, machine, tank, stairs)
