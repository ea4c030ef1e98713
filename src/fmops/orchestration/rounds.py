"""Rounds of the loop: when one begins, and what has become of each.

Enters: what production and the watched sources say, the rounds so far, the time. Leaves: a decision with its reason.
Refuses: more rounds than the spec allows, one beside another, and one that rests on a single voice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from fmops.artifacts import Frozen
from fmops.errors import FmopsError, first_mistake
from fmops.production import Loop
from fmops.store import write_atomically

RoundStage = Literal["pretrain", "instruct", "align"]
STAGES: tuple[RoundStage, ...] = ("pretrain", "instruct", "align")
"""In the order of the lifecycle."""
Cause = Literal["new data", "alarm", "feedback", "schedule", "person"]
Phase = Literal["waiting for approval", "training", "rolling out", "ended"]
WEEK_S = 7 * 24 * 3600.0
STOPPED = ("rejected", "need more data", "failed", "rolled back", "refused")


class Trigger(Frozen):
    """A reason to begin a round."""

    cause: Cause
    stage: RoundStage
    why: str = Field(description="In words, with figures.")
    identities: int | None = Field(None, description="Voices that the data come from; None when no user wrote them.")


class Round(Frozen):
    """One turn of the loop, on disk as `rounds/<number>/round.json`."""

    number: int
    trigger: Trigger
    champion: str = Field(description="The release that it starts from.")
    began_s: float
    phase: Phase
    changed_s: float
    release: str | None = None
    outcome: str | None = Field(None, description="promoted, rolled back, rejected, need more data, failed, refused.")
    reason: str = ""


class Decision(Frozen):
    """Begin with a trigger, or wait for the reason given."""

    trigger: Trigger | None
    reason: str


def decide(triggers: tuple[Trigger, ...], rounds: tuple[Round, ...], policy: Loop, now: float) -> Decision:
    """Whether a round begins. The first trigger counts; a person's passes budget and cool-down, nothing else does.

    One round at a time. An automatic one waits `cool_down_hours` after the last ended, is one of `rounds_per_week`, and
    rests on at least two voices where users wrote its data: otherwise one of them could train the model alone.
    """
    open_rounds = [each for each in rounds if each.phase != "ended"]
    if open_rounds:
        return Decision(trigger=None, reason=f"round {open_rounds[-1].number} is {open_rounds[-1].phase}")
    if not triggers:
        return Decision(trigger=None, reason="nothing asks for a round")
    trigger = triggers[0]
    if trigger.cause == "person":
        return Decision(trigger=trigger, reason=trigger.why)
    if trigger.identities is not None and trigger.identities < 2:
        return Decision(trigger=None, reason=f"{trigger.why}, but one identity wrote all of it: a person decides")
    ended = max((each.changed_s for each in rounds), default=None)
    if ended is not None and now - ended < policy.cool_down_hours * 3600:
        left = policy.cool_down_hours - (now - ended) / 3600
        return Decision(trigger=None, reason=f"{trigger.why}, but it cools down for another {left:.1f} h")
    recent = [each for each in rounds if now - each.began_s < WEEK_S and each.trigger.cause != "person"]
    if len(recent) >= policy.rounds_per_week:
        return Decision(
            trigger=None,
            reason=f"{trigger.why}, but the budget is spent: {len(recent)} of {policy.rounds_per_week} automatic "
            "rounds in seven days",
        )
    return Decision(trigger=trigger, reason=trigger.why)


class Rounds:
    """All rounds of a workspace."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "rounds"

    def path(self, number: int) -> Path:
        """The folder of one round: its data, its spec, its state."""
        return self.folder / f"{number:04d}"

    def all(self) -> tuple[Round, ...]:
        """The oldest first.

        Raises:
            FmopsError: one cannot be read; it is never skipped, since the budget counts it.
        """
        return tuple(self._read(path) for path in sorted(self.folder.glob("*/round.json")))

    def save(self, each: Round) -> Round:
        """Write one round, whole or not at all."""
        write_atomically(self.path(each.number) / "round.json", each.model_dump_json(indent=1) + "\n")
        return each

    @staticmethod
    def _read(path: Path) -> Round:
        try:
            return Round.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise FmopsError(
                f"{path} is no round: {first_mistake(error)}. Move the folder {path.parent.name} away if it is lost; "
                "it then counts against no budget."
            ) from None
