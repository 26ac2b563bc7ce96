"""Sentences about nothing in particular, without numbers: what needles are hidden in."""

import random

KINDS_OF_THING = (
    "red", "blue", "green", "old", "heavy", "small", "silver", "wooden", "broken", "round", "narrow", "bright", "dusty",
    "quiet", "copper", "striped", "folded", "hollow", "painted", "rusty",
)  # fmt: skip
THINGS = (
    "lantern", "cabinet", "bridge", "kettle", "wagon", "mirror", "garden", "ladder", "basket", "piano", "tower", "boat",
    "window", "anchor", "carpet", "engine", "bell", "drawer", "fountain", "saddle",
)  # fmt: skip
_WHO = (
    "the baker", "my neighbour", "an old sailor", "the schoolteacher", "her younger brother", "the gardener", "a clerk",
    "the miller's wife", "one of the students", "the night watchman", "a travelling musician", "the librarian",
    "their cousin", "the ferryman", "a tired doctor", "the postman", "the carpenter", "some of the children",
)  # fmt: skip
_WHERE = (
    "behind the mill", "at the edge of the village", "near the harbour", "in the upper room", "along the river",
    "under the chestnut trees", "beside the church wall", "in the market hall", "on the far side of the hill",
    "at the railway station", "in the orchard", "by the kitchen door", "across the square", "above the bakery",
)  # fmt: skip
_WHEN = (
    "in the early morning", "after the rain", "before supper", "on the last day of autumn", "in the heat of the noon",
    "when the lamps were lit", "during the long winter", "on a windy afternoon", "as soon as the bells had rung",
    "shortly before dawn", "late in the evening", "at the time of the harvest",
)  # fmt: skip
_SENTENCES = (
    "{When} {who} walked home {where} and thought of nothing at all.",
    "{Who} had left a coat {where}, and nobody came to ask for it.",
    "It was {when} that {who} first noticed the smell of smoke {where}.",
    "The path {where} is muddy, so {who} usually takes the longer way.",
    "{Who} told the same story twice, and {who2} laughed both times.",
    "A dog was sleeping {where} while {who} counted the empty crates.",
    "{When} the shutters were closed, and only {who} stayed outside.",
    "Nobody {where} could remember why {who} had moved away.",
    "{Who} bought apples from {who2} and carried them home in a bucket.",
    "There is little to see {where}, but {who} likes to sit there {when}.",
    "If the weather holds, {who} will mend the fence {where}.",
    "{Who} and {who2} had not spoken since the summer, and neither knew why.",
    "Some leaves had gathered {where}; {who} swept them into a heap.",
    "The letter that {who} was waiting for arrived {when}.",
    "{When} a light could be seen {where}, though {who} denied it.",
    "{Who} prefers tea to coffee, which {who2} finds hard to believe.",
    "They met {where} {when}, talked about the harvest, and parted as friends.",
    "The roof {where} leaked again, and {who} went to look for a ladder.",
    "{Who} sang quietly while {who2} put the chairs back into their rows.",
    "What happened {where} was soon forgotten, except by {who}.",
    "{When} the ferry was late, and {who} waited with a newspaper.",
    "The clock {where} is slow, as {who} will tell anyone who asks.",
    "{Who} once painted the gate {where}, in a colour that pleased only {who2}.",
    "Not far from there {who} had planted beans, which grew well {when}.",
)  # fmt: skip


def sentence(draw: random.Random) -> str:
    who, who2 = draw.sample(_WHO, 2)
    words = {"who": who, "who2": who2, "where": draw.choice(_WHERE), "when": draw.choice(_WHEN)}
    openings = {name.capitalize(): text[0].upper() + text[1:] for name, text in words.items()}
    return draw.choice(_SENTENCES).format(**words, **openings)
