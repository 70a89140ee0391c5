"""The words of the recall task. Every word is one token; punctuation is part of the word."""

from __future__ import annotations

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)
NOTE, QUESTION = "note", "question"

KEY_FIRST = """
    amber azure bold brave bright calm clever crimson curious daring eager early fancy fierce gentle golden
    grand happy honest humble ivory jolly kind late lively lucky mellow merry mighty modest noble olive patient
    polite proud purple quick rapid rosy royal scarlet silent silver simple sunny swift tender violet wise young
""".split()
KEY_SECOND = [
    f"{word}:"
    for word in """
        badger bear beaver bison camel cat crane crow deer dolphin eagle falcon finch fox frog gecko goat goose
        hare hawk heron horse hound ibis jackal koala lark leopard lion lizard llama lynx magpie marten mole
        moose newt otter owl panda parrot pelican pony raven robin salmon seal sparrow stork swan tiger toad
        turtle walrus whale wolf wren yak zebra
    """.split()
]
VALUE_FIRST = """
    brass bronze canvas ceramic clay copper coral cotton crystal ebony enamel felt flint glass granite iron jade
    lace leather linen marble maple nickel oak onyx paper pearl pewter pine plaster quartz rubber sandstone
    satin silk slate steel straw velvet walnut wax wicker willow wooden woollen zinc
""".split()
VALUE_SECOND = """
    anchor arrow barrel basket bell blanket bottle bowl box brush bucket button candle chair chest clock coin
    comb compass crown cup drum fan flag flute fork hammer hat helmet hook jar kettle key kite knife ladder
    lantern lock medal mirror needle pipe plate rope saddle scarf shield spoon table wheel
""".split()
VALUE_THIRD = [
    f"{word}."
    for word in """
        one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen twenty thirty forty fifty sixty
    """.split()
]

FILLER = {
    "determiner": """
        the a every some this that his her
    """.split(),
    "adjective": """
        old new tall small large heavy light dark pale cold warm dusty muddy narrow wide broken empty crowded
        distant famous faded foggy hidden hungry lonely loud quiet rainy rusty sleepy smooth snowy stony strange
        tired tiny weary wild windy worn
    """.split(),
    "noun": """
        actor artist aunt baker barber boat boy bride bus captain carpenter cart child clerk coach cook cousin
        dancer doctor driver farmer father fisherman gardener girl guard guide hunter judge king lady lawyer
        machine mayor merchant miller miner mother musician neighbour nurse officer painter pilot poet porter
        priest prince queen sailor scholar shepherd singer sister soldier student tailor teacher tourist train
        traveller uncle visitor waiter weaver widow worker writer
    """.split(),
    "verb": """
        arrived asked bought built called carried climbed cooked crossed danced drew drove dreamed entered
        failed followed found hid hurried jumped knocked laughed learned left listened lived looked moved paused
        played pointed rested returned rode sang searched shouted slept smiled spoke stayed stood studied talked
        travelled turned waited walked wandered watched whistled worked
    """.split(),
    "preposition": """
        across after along around before behind beside beyond by from inside near outside past
    """.split(),
    "place": [
        f"{word}."
        for word in """
            abbey airport alley bakery barn bay beach bridge cabin canal castle cathedral cave church cliff
            cottage court farm field forest fort garden gate harbour hill hotel inn island lake library market
            meadow mill mine museum orchard palace park port river road school shop square stable station street
            temple theatre tower tunnel valley village wall well yard
        """.split()
    ],
    "opening": """
        again afterwards eventually finally instead later meanwhile nearby often once outdoors perhaps slowly
        sometimes soon suddenly then today tonight upstairs usually yesterday
    """.split(),
    "conjunction": """
        and while because until
    """.split(),
}
"""Word classes of the filler."""

SENTENCES = (
    "determiner adjective noun verb preposition determiner place",
    "opening determiner noun verb preposition determiner adjective place",
    "determiner noun verb preposition determiner noun conjunction determiner noun verb preposition determiner place",
)
"""The order of word classes in the sentences of filler."""

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        [*SPECIAL, NOTE, QUESTION, *KEY_FIRST, *KEY_SECOND, *VALUE_FIRST, *VALUE_SECOND, *VALUE_THIRD]
        + [word for words in FILLER.values() for word in words]
    )
)
TOKEN_ID: dict[str, int] = {word: token_id for token_id, word in enumerate(VOCABULARY)}
