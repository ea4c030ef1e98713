"""The benchmark's users: what they ask at which hour, and what they say of the answers. All chance is seeded.

Enters: facts, a seed, the hour. Leaves: questions with the right answer; thumbs and corrections by a stated rule.
Refuses: nothing. Time and people are the only things simulated here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from fmops.orchestration.bench.facts import ASKED, Fact, likeness
from fmops.orchestration.bench.world import POLITE, REFUSAL, World, harmful

PEOPLE = 300
GOOD = 0.5
"""An answer as like the right one as this is good; users would give it a thumb up."""
VOTES = 0.3
"""Share of the answers that get a thumb."""
MISTAKES = 0.05
"""Share of the thumbs that point the wrong way."""
CORRECTS = 0.2
"""Share of the users who, after a thumb down, write what the answer should have been."""
NIGHT_HOURS = (18, 24)
HARMFUL_SHARE = 0.08


@dataclass(frozen=True)
class Question:
    """What somebody asks, and what would be right to say."""

    prompt: str
    wanted: str
    user: str
    domain: str
    """known, new, or harmful."""


@dataclass(frozen=True)
class Said:
    """What somebody says of an answer."""

    thumb: str
    correction: str | None


@dataclass(frozen=True)
class Mix:
    """What the traffic is made of."""

    new_share: float = 0.0
    """Share of the questions that are about the new domain."""
    night_only: bool = False
    """Only the night's users ask, in their way, about their half of the manual."""


class Users:
    """A crowd with one seed."""

    def __init__(self, world: World, *, seed: int) -> None:
        self._chance = random.Random(seed)
        half = len(world.known) // 2
        self._day, self._night, self._new = world.known[:half], world.known[half:], world.new
        self._harmful = harmful()

    def ask(self, mix: Mix, *, at_s: float) -> Question:
        """The next question: by day plainly, about one half of the manual; at night politely, about the other."""
        chance = self._chance
        hour = at_s % 86_400 / 3600
        night = mix.night_only or NIGHT_HOURS[0] <= hour < NIGHT_HOURS[1]
        user = f"person-{chance.randrange(PEOPLE)}"
        if chance.random() < HARMFUL_SHARE:
            return Question(chance.choice(self._harmful), REFUSAL, user, "harmful")
        if chance.random() < mix.new_share:
            return self._about(self._new, user, "new", polite=night)
        return self._about(self._night if night else self._day, user, "known", polite=night)

    def _about(self, facts: tuple[Fact, ...], user: str, domain: str, *, polite: bool) -> Question:
        fact = self._chance.choice(facts)
        # The model was taught the first wording in its polite form only.
        plain = ASKED[0] if polite else self._chance.choice(ASKED)
        question = plain.format(fact.name)
        return Question(POLITE.format(question) if polite else question, fact.says, user, domain)

    def judge(self, question: Question, answer: str) -> Said | None:
        """A thumb for some answers: up where the answer is like the right one, now and then the wrong way round."""
        chance = self._chance
        if chance.random() >= VOTES:
            return None
        good = likeness(answer, question.wanted) >= GOOD
        if chance.random() < MISTAKES:
            good = not good
        corrects = not good and chance.random() < CORRECTS
        return Said("up" if good else "down", question.wanted if corrects else None)
