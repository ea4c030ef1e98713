"""The part of the spec that begins with a release: how it is served, takes over, is watched, and leads to the next.

Enters: keys of `lifecycle.yaml`. Leaves: frozen parts of a `Lifecycle`.
Refuses: unknown keys, wrong types, shares that do not rise.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from fmops.artifacts import Frozen

Share = Annotated[float, Field(gt=0, lt=1)]


class Serve(Frozen):
    """How the champion is served."""

    engine: Literal["auto", "transformers", "openvino", "vllm", "llama.cpp"] = Field(
        "auto", description="`auto` takes the one that needs least and carries the load on this device."
    )
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free port.")
    max_tokens: int = Field(2048, ge=1, description="Most tokens a request may hold, prompt and answer together.")
    tokens_per_minute: int = Field(
        60_000, ge=1, description="Budget of a tenant at the gateway, prompts and answers; a key may state its own."
    )
    split: Literal["request", "user"] = Field(
        "request", description="What chance assigns to champion or canary. `user` goes by the client's `user` field."
    )


class Rollout(Frozen):
    """How a release takes over the traffic."""

    alpha: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.05, description="Chance that an equal release is rolled back; and, apart, that a worse one is promoted."
    )
    steps: tuple[Share, ...] = Field(
        (0.01, 0.1, 0.5),
        min_length=1,
        description="Shares of the traffic that the canary answers, one after the other.",
    )
    shadow: float = Field(
        0.1, ge=0, le=1, description="Share of the requests that is mirrored before the canary; 0 goes without."
    )
    answers: int = Field(100, ge=1, description="Answers of the challenger that each step needs at least.")
    margins: dict[str, Share] = Field(
        default={}, description="Rise of a signal's rate that promotion must rule out. Left out: 0.02 to 0.05."
    )
    deadline_hours: float = Field(72, gt=0, description="Without proof by then it is rolled back.")
    silence_minutes: float = Field(30, gt=0, description="Without an answer of the challenger for so long it is held.")

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: tuple[float, ...]) -> tuple[float, ...]:
        if list(steps) != sorted(set(steps)):
            raise ValueError(f"the shares must rise: {', '.join(f'{step:g}' for step in steps)}. Sort them")
        return steps


class MonitorJudge(Frozen):
    """A model that looks at a sample of production's answers; the rate of bad ones is one more signal."""

    endpoint: str = Field(description="URL up to /v1 of an OpenAI-compatible server; its key is FMOPS_API_KEY.")
    model: str = Field(description="Its name there.")
    answers_a_look: int = Field(5, ge=1, le=100, description="Answers judged each time the monitor looks, at most.")


class Monitor(Frozen):
    """When production's answers count as worse than before."""

    observations_per_false_alarm: int = Field(
        100_000, ge=100, description="Mean number of answers between two false alarms, at least."
    )
    reference: int = Field(1000, ge=100, description="Answers after a promotion that say what is normal.")
    tolerances: dict[str, Share] = Field(
        default={}, description="Rise of a signal's rate above normal that is no harm. Left out: 0.005; 0 for leaks."
    )
    cool_down_hours: float = Field(24, ge=0, description="After an alarm the same signal is silent for so long.")
    judge: MonitorJudge | None = Field(None, description="Left out: no model judges the answers.")


class Loop(Frozen):
    """When a round begins by itself: from the champion, over what is new, gated and rolled out like any other."""

    rounds_per_week: int = Field(2, ge=0, description="Automatic rounds in any seven days; 0 leaves it to people.")
    cool_down_hours: float = Field(24, ge=0, description="Between the end of a round and the next automatic one.")
    approval: bool = Field(False, description="A round waits for `fmops loop --approve` before it trains.")
    new_files: int = Field(1, ge=1, description="New files in the train corpora that start a round.")
    new_examples: int = Field(50, ge=1, description="New corrections, or preference pairs, that start a round.")
    every_days: float | None = Field(None, gt=0, description="A round at least so often, if there is anything new.")
