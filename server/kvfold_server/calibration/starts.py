"""Short starts of texts on varied topics, from which a model writes calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

_TOPICS = (
    "the history of a port town", "volcanoes", "a football season", "how bread rises", "a young queen",
    "railway bridges", "the immune system", "sorting a list in Python", "a lost letter", "solar panels", "the violin",
    "a mountain expedition", "taxes for a small shop", "migrating birds", "a video game", "medieval castles",
    "learning a language", "black holes", "a court case", "growing tomatoes", "an old warship", "the water cycle",
    "a jazz singer", "planning a holiday in spring", "probability and dice", "a detective in the rain",
    "city elections", "coral reefs", "a broken bicycle", "the printing press", "a hurricane", "sleep and memory",
    "a television series", "iron and steel", "a job interview", "ancient coins", "an argument between friends",
    "electric cars", "a novel about the sea", "the rules of chess",
)  # fmt: skip

_QUESTIONS = (
    "Tell me about {}.", "Write a short story about {}.", "Explain {} to a child.", "What should I know about {}?",
    "Give me five facts about {}.", "Write an encyclopedia article about {}.",
    "Summarise what matters most about {}.", "Write an e-mail to a colleague about {}.",
)  # fmt: skip

_OPENINGS = (
    "This article is about {}. ", "In the summer of that year, {}", "The first thing that people notice about {} is",
    "Chapter 1\n\nNobody in the village had ever spoken about {}", "According to a report on {},",
    "A history of {}\n\n", "Question: What do we know about {}?\nAnswer:",
    "The following is a review of a book on {}.\n\n",
)  # fmt: skip


def chat_questions(order: random.Random) -> Iterator[str]:
    """Endless questions of a user, in an order that `order` decides."""
    return _combined(_QUESTIONS, order)


def prose_openings(order: random.Random) -> Iterator[str]:
    """Endless openings of prose, in an order that `order` decides."""
    return _combined(_OPENINGS, order)


def _combined(templates: tuple[str, ...], order: random.Random) -> Iterator[str]:
    while True:
        # Each round uses every topic once; templates are drawn for each.
        for topic in order.sample(_TOPICS, len(_TOPICS)):
            yield order.choice(templates).format(topic)
