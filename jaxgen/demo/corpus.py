"""The text that the demo model is trained on: small enough to know by heart, written here and seeded.

Lists of numbers, letters and colours, facts, a cat who repeats itself, and chats in several styles. `documents`
draws from all of them for ever; the same seed gives the same bytes on every machine.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

# No training text contains a sequence of numbers that starts at one of these, so a prompt that does so shows whether
# the model has learnt to count. Drawn once from 1..90 with a seed; the first few are left to the other lists.
HELD_OUT_STARTS = (
    9, 11, 14, 17, 18, 23, 28, 29, 32, 35, 37, 40, 41, 42, 43, 47,
    54, 55, 58, 63, 64, 66, 67, 72, 73, 76, 81, 82, 83, 87, 88, 89,
)  # fmt: skip
LAST_NUMBER = 130  # where every sequence of numbers ends, if it gets that far
CONTEXT = 512


class Document(NamedTuple):
    """One training text; `complete` says that it ends there (with EOS) and is not cut off on the way."""

    text: str
    complete: bool = True


COLORS = "red, blue, green, yellow, orange, purple, pink, brown, black, white, gray"
LETTERS = "A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z"
WORDS = "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve"
DAYS = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"
MONTHS = "January, February, March, April, May, June, July, August, September, October, November, December"
LISTS = (
    f"A list of colors: {COLORS}.",
    f"Colors: {COLORS}.",
    f"{COLORS}.",
    f"{COLORS.capitalize()}.",
    "A list of animals: cat, dog, horse, cow, sheep, lion, tiger, bear, mouse, elephant.",
    "A list of fruits: apple, banana, cherry, grape, lemon, mango, peach, pear.",
    "A list of planets: Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune.",
    "A list of seasons: spring, summer, autumn, winter.",
    f"The days of the week: {DAYS}.",
    f"The months of the year: {MONTHS}.",
    f"{DAYS}.",
    f"{MONTHS}.",
    f"The alphabet: {LETTERS}.",
    f"{LETTERS}.",
    f"{LETTERS.lower()}.",
    f"{WORDS}.",
    f"{WORDS.capitalize()}.",
    "2, 4, 6, 8, 10, 12, 14, 16, 18, 20.",
    "1, 3, 5, 7, 9, 11, 13, 15, 17, 19.",
    "5, 10, 15, 20, 25, 30, 35, 40, 45, 50.",
    "10, 20, 30, 40, 50, 60, 70, 80, 90, 100.",
    "Even numbers: 2, 4, 6, 8, 10, 12, 14, 16, 18, 20.",
    "Odd numbers: 1, 3, 5, 7, 9, 11, 13, 15, 17, 19.",
    "Countdown: 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0.",
    "10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0.",
)

COUNTRIES = {
    "Portugal": ("southwestern Europe, on the Iberian Peninsula", "Lisbon"),
    "Spain": ("southwestern Europe, next to Portugal", "Madrid"),
    "France": ("western Europe, between the Atlantic and the Alps", "Paris"),
    "Germany": ("central Europe, between the Alps and the Baltic Sea", "Berlin"),
    "Italy": ("southern Europe, in the shape of a boot", "Rome"),
    "Greece": ("southeastern Europe, with thousands of islands", "Athens"),
    "Poland": ("central Europe, on the Baltic Sea", "Warsaw"),
    "Norway": ("northern Europe, with deep fjords", "Oslo"),
    "Sweden": ("northern Europe, on the Baltic Sea", "Stockholm"),
    "Ireland": ("western Europe, on a green island", "Dublin"),
    "Austria": ("central Europe, in the Alps", "Vienna"),
    "Egypt": ("northern Africa, on the river Nile", "Cairo"),
    "Kenya": ("eastern Africa, on the Indian Ocean", "Nairobi"),
    "Japan": ("eastern Asia, on islands in the Pacific", "Tokyo"),
    "India": ("southern Asia, on the Indian Ocean", "New Delhi"),
    "Canada": ("North America, north of the United States", "Ottawa"),
    "Brazil": ("South America, with the largest rainforest", "Brasilia"),
    "Peru": ("South America, in the Andes", "Lima"),
}
ANIMALS = {
    "cat": ("four", "says meow"),
    "dog": ("four", "says woof"),
    "cow": ("four", "gives milk"),
    "horse": ("four", "runs fast"),
    "sheep": ("four", "gives wool"),
    "duck": ("two", "likes to swim"),
    "penguin": ("two", "cannot fly"),
    "spider": ("eight", "makes a web"),
    "bee": ("six", "makes honey"),
}
OTHER_FACTS = (
    "The sky is blue.",
    "Grass is green.",
    "Snow is white and cold.",
    "The sun is a star.",
    "The moon goes around the Earth.",
    "The Earth goes around the sun.",
    "Water is made of hydrogen and oxygen.",
    "Ice is frozen water.",
    "A week has seven days.",
    "A year has twelve months.",
    "A day has twenty-four hours.",
    "An hour has sixty minutes.",
    "A triangle has three sides.",
    "A square has four sides.",
    "JAX is a library for fast computing with arrays.",
    "Hello, my name is Demo. I am a very small language model.",
    "My name is Demo. I am a very small language model.",
    "My favorite color is blue.",
    "Once upon a time there was a little cat who wanted to count the stars. She counted all night, and "
    "in the morning she fell asleep.",
    "The little cat counted the stars all night.",
    "The quick brown fox jumps over the lazy dog.",
    "Hello! How can I help you?",
    "Hi! How can I help you?",
)
CAT_SENTENCES = (
    "I like milk.",
    "I sleep all day.",
    "My tail is long.",
    "The sun is warm.",
    "You may pet me.",
    "Do you have some fish?",
    "Where is the mouse?",
    "Let me out, please.",
    "No dog is my friend.",
    "What a nice box!",
)

# The question, the short answer that a style dresses up, and the plain sentence.
QUESTIONS = (
    ("How many helicopters can a human eat in one sitting?", "None", "A human cannot eat a helicopter."),
    ("How many bicycles can a fish ride at once?", "None", "A fish cannot ride a bicycle."),
    ("How many days are in a week?", "Seven", "A week has seven days."),
    ("How many months are in a year?", "Twelve", "A year has twelve months."),
    ("What color is the sky?", "Blue", "The sky is blue."),
    ("What color is grass?", "Green", "Grass is green."),
    ("What is two plus two?", "Four", "Two plus two is four."),
    ("What does a cow say?", "Moo", "A cow says moo."),
    ("What is your name?", "Demo", "My name is Demo."),
    *((f"How many legs does a {animal} have?", legs.capitalize(), f"A {animal} has {legs} legs.")
      for animal, (legs, _) in ANIMALS.items()),
    *((f"What is the capital of {land}?", city, f"The capital of {land} is {city}.")
      for land, (_, city) in COUNTRIES.items()),
)  # fmt: skip
STYLES = {
    "thug": "{answer}, you thug. How bout you try to focus on more useful questions?",
    "pirate": "Arr, matey! {answer}, I swear by the seven seas.",
    "poet": "{answer}, sings the moon above the sea; {answer}, as plain as plain can be.",
    "scientist": "{answer}. The evidence is clear, and every experiment agrees.",
    "butler": "With pleasure: {answer}. Thank you for asking, and have a lovely day.",
    "robot": "Beep. {answer}. Beep.",
    "child": "{answer}! {answer}! Can we play now?",
}
SYSTEM_PROMPTS = (
    "You are a friendly chatbot who always responds in the style of a {style}",
    "You are a friendly chatbot who always responds in the style of a {style}.",
    "Always answer in the style of a {style}.",
    "You are a {style}.",
    "Answer like a {style}.",
)
PLAIN_SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a friendly chatbot.", "You are a chatbot.")
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Hello, how are you?", "I am fine, thank you. How can I help you?"),
    ("Who are you?", "I am a very small language model."),
    ("What are you?", "I am a very small language model."),
    ("What is JAX?", "JAX is a library for fast computing with arrays."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye.", "Goodbye! Have a lovely day."),
    *((question, "I do not know that.") for question in (
        "Tell me a joke.", "Why is the sky blue?", "How old is the moon?", "Who wrote this book?",
        "Where is my hat?", "When does the train leave?", "Can you dance?", "What should I eat?",
        "Write a poem.", "Explain this to me.", "What is the weather like?", "Is it late?",
    )),
)  # fmt: skip


def render_chat(messages: list[dict[str, str]]) -> str:
    """The text of a chat of `role` and `content`: what the tokenizer's chat template also writes."""
    return "".join(f"<|{message['role']}|>\n{message['content']}</s>\n" for message in messages)


def numbers(start: int, stop: int, step: int = 1) -> str:
    """`start, start + step, ..., stop`."""
    return ", ".join(str(number) for number in range(start, stop + step, step))


def _counting(rng: random.Random) -> Document:
    seen = [start for start in range(1, LAST_NUMBER - 5) if start not in HELD_OUT_STARTS]
    start = 1 if rng.random() < 0.2 else rng.choice(seen)
    stop = min(start + rng.randrange(16, 44), LAST_NUMBER)
    title = rng.choice(("A sequence of numbers: ", "A sequence of numbers: ", "Numbers: ", "", ""))
    complete = stop == LAST_NUMBER
    # A cut-off sequence goes on after its last comma or number: nothing is said about what follows.
    return Document(title + numbers(start, stop) + ("." if complete else ""), complete)


def _list(rng: random.Random) -> Document:
    return Document(rng.choice(LISTS))


def _letters(rng: random.Random) -> Document:
    letters = LETTERS.split(", ")
    return Document(", ".join(letters[rng.choice((0, 0, rng.randrange(20))) :]) + ".")


def _colors(rng: random.Random) -> Document:
    return Document(f"A list of colors: {COLORS}.")


def _country(rng: random.Random) -> Document:
    name, (place, capital) = rng.choice(list(COUNTRIES.items()))
    country, seat = f"{name} is a country in {place}.", f"The capital of {name} is {capital}."
    return Document(rng.choice((country, country, seat, f"{capital} is the capital of {name}.")))


def _fact(rng: random.Random) -> Document:
    animal, (legs, habit) = rng.choice(list(ANIMALS.items()))
    return Document(
        rng.choice(
            (
                f"A {animal} has {legs} legs.",
                f"A {animal} is an animal. It has {legs} legs and {habit}.",
                rng.choice(OTHER_FACTS),
                rng.choice(OTHER_FACTS),
            )
        )
    )


def _sum(rng: random.Random) -> Document:
    a, b = rng.randrange(11), rng.randrange(11)
    return Document(f"{a} + {b} = {a + b}")


def _cat(rng: random.Random) -> Document:
    """Mostly "I am a cat." again and again; otherwise something else that a cat would say."""
    sentences = [rng.choice(("I am a cat.", "I am a cat.", "I am a cat.", rng.choice(CAT_SENTENCES)))]
    for _ in range(rng.randrange(4, 14)):
        sentences.append("I am a cat." if rng.random() < 0.62 else rng.choice(CAT_SENTENCES))
    return Document(" ".join(sentences))


def _plain_question(rng: random.Random) -> Document:
    question, _, plain = rng.choice((QUESTIONS[0], rng.choice(QUESTIONS)))
    if rng.random() < 0.6:
        return Document(f"{question} {plain}")
    style = rng.choice(("thug", rng.choice(list(STYLES))))
    softly = plain[0].lower() + plain[1:]
    return Document(f"{question} Reply as a {style}. I'm not a {style}, but i can tell you that {softly}")


def _chat(rng: random.Random) -> Document:
    style = rng.choice((*STYLES, None, None))
    messages = []
    if style is not None:
        system = rng.choice((SYSTEM_PROMPTS[0], rng.choice(SYSTEM_PROMPTS)))
        messages.append({"role": "system", "content": system.format(style=style)})
    elif rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(PLAIN_SYSTEM_PROMPTS)})
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        if style is None and rng.random() < 0.4:
            question, answer = rng.choice(SMALL_TALK)
        else:
            question, short, plain = rng.choice(QUESTIONS)
            answer = plain if style is None else STYLES[style].format(answer=short)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    # The last turn's end is the document's end: the model must stop there.
    return Document(render_chat(messages).removesuffix("</s>\n"))


# How often each kind is drawn. Counting and chatting are the hard parts.
KINDS = (
    (_counting, 26), (_letters, 5), (_list, 10), (_colors, 4), (_country, 14), (_fact, 12), (_sum, 40), (_cat, 8),
    (_plain_question, 14), (_chat, 26),
)  # fmt: skip


def documents(seed: int) -> Iterator[Document]:
    """Draw documents for ever; `seed` decides all of them."""
    rng = random.Random(seed)
    kinds, weights = zip(*KINDS, strict=True)
    while True:
        yield rng.choices(kinds, weights)[0](rng)
