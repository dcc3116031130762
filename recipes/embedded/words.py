"""Word lists of the problem generator: people, countable things, containers, places."""


def _listed(text: str) -> tuple[str, ...]:
    """The words of a text, underscores standing for spaces."""
    return tuple(word.replace("_", " ") for word in text.split())


GIRLS = _listed(
    "Mia Emma Olivia Ava Sophia Isabella Charlotte Amelia Harper Evelyn Abigail Emily Ella Elizabeth Camila Luna Sofia "
    "Avery Mila Aria Scarlett Penelope Layla Chloe Victoria Madison Eleanor Grace Nora Riley Zoey Hannah Hazel Lily "
    "Ellie Violet Lucy Anna Maria Julia Sarah Leah Ruth Alice Clara Ines Priya Fatima Aisha Yuki Mei Ingrid Greta "
    "Freya Nina Elena Rosa Carmen Lina Jana"
)

BOYS = _listed(
    "Liam Noah Oliver Elijah James William Benjamin Lucas Henry Alexander Mason Michael Ethan Daniel Jacob Logan "
    "Jackson Levi Sebastian Mateo Jack Owen Theodore Aiden Samuel Joseph John David Wyatt Matthew Luke Asher Carter "
    "Julian Leo Jayden Gabriel Isaac Lincoln Anthony Hudson Dylan Ezra Thomas Charles Peter Adam Ben Tom Omar Ravi "
    "Kenji Wei Lars Otto Felix Paul Marco Diego Ivan"
)

THINGS = _listed(
    "apples oranges pears plums peaches lemons limes bananas mangoes cherries grapes walnuts almonds carrots potatoes "
    "tomatoes onions cucumbers eggs cookies muffins cupcakes bagels sandwiches pies candies chocolates lollipops "
    "marbles stickers stamps coins cards buttons beads shells pebbles stones feathers leaves flowers roses tulips "
    "daisies seeds bulbs acorns pencils pens crayons markers erasers notebooks books magazines comics posters photos "
    "postcards letters envelopes ribbons balloons candles toys dolls puzzles balls kites robots blocks bricks dice "
    "badges pins magnets keys bottles cups plates spoons forks bowls jars cans socks shirts hats scarves gloves "
    "mittens bracelets necklaces rings tickets tokens medals ropes nails screws bolts batteries lamps clocks tiles "
    "planks sponges towels pillows whistles drums bells flags masks maps paintings cranes"
)

PRICED = _listed(
    "book notebook pen pencil ruler lamp mug plate bowl scarf hat shirt toy puzzle ball kite poster ticket sandwich "
    "pizza cake pie muffin melon pineapple basket candle plant vase brush backpack wallet belt game comic magazine "
    "calendar torch whistle drum flute clock pillow towel blanket bracelet necklace umbrella bottle cushion"
)

CONTAINERS = _listed("bags boxes baskets packs crates cartons jars trays bundles packets")

COLOURS = _listed("red blue green yellow white black orange purple pink brown silver golden")

PLACES = _listed(
    "market shop school_fair library park museum beach farm zoo garden station bakery supermarket bookshop theatre "
    "sports_hall swimming_pool castle harbour playground town_hall stadium cinema festival"
)

RELATIVES = _listed("brother sister cousin friend neighbour mother father teacher aunt uncle grandmother classmate")

DAYS = _listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

CROPS = _listed("apples pears pumpkins cabbages potatoes tomatoes carrots melons strawberries onions beans beetroots")

ANIMALS = _listed("chickens ducks geese sheep goats cows horses rabbits pigs turkeys")
