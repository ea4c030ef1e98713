"""Rewards: plain Python functions beside the spec that say how good an answer is.

Enters: `file.py:function` names with weights, the files. Leaves: checked functions.
Refuses: functions that are not there, ask for what no prompt has, fail, use the network, or return no finite number.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import posixpath
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from fmops.artifacts import Source, SourceFile
from fmops.errors import FmopsError, unknown

OWN = ("answer", "prompt", "messages")
"""What a function may ask for beside the prompt's own columns: the model's text, the last question, the dialogue."""
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
"""Audit events of the interpreter that mean the outside world (PEP 578)."""


class Prompt(Protocol):
    """What is known of a prompt."""

    @property
    def id(self) -> str: ...
    @property
    def messages(self) -> Sequence[Mapping[str, str]]: ...
    @property
    def columns(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Reward:
    """One function with its weight; called with an answer it returns a finite number."""

    name: str
    weight: float
    function: Callable[..., Any]
    asks: tuple[str, ...] | None
    """Parameters by name; None takes everything."""

    def __call__(self, prompt: Prompt, answer: str) -> float:
        """What `answer` is worth, before its weight.

        Raises:
            FmopsError: the function fails, opens a connection, or returns something else than a finite number.
        """
        known = _known(prompt, answer)
        given = known if self.asks is None else {name: known[name] for name in self.asks if name in known}
        try:
            with _no_network(self.name):
                found = self.function(**given)
        except FmopsError:
            raise
        except Exception as error:
            raise FmopsError(
                f"reward {self.name} failed on prompt {prompt.id}: {type(error).__name__}: {error}. Answer: {answer!r}."
            ) from error
        if isinstance(found, bool):
            return float(found)
        if not isinstance(found, int | float) or not math.isfinite(found):
            raise FmopsError(
                f"reward {self.name} returned {found!r} for prompt {prompt.id}; it must return a finite number. "
                f"Answer: {answer!r}."
            )
        return float(found)


def load_rewards(weights: Mapping[str, float], source: Source | None, prompts: Sequence[Prompt]) -> list[Reward]:
    """The functions that the spec names, each checked against every prompt's columns.

    Raises:
        FmopsError: a file cannot be imported, a function is not there, or asks for what some prompt has not.
    """
    files = {file.name: file for file in source.files} if source else {}
    modules: dict[str, Any] = {}
    rewards = []
    for name, weight in weights.items():
        path, _, function = name.rpartition(":")
        file = _file(path, files)
        if file.name not in modules:
            modules[file.name] = _imported(file)
        found = getattr(modules[file.name], function, None)
        if not inspect.isfunction(found) or inspect.iscoroutinefunction(found):
            plain = [key for key, value in vars(modules[file.name]).items() if inspect.isfunction(value)]
            raise unknown(f"function in {path}", function, plain)
        rewards.append(Reward(name, weight, found, _parameters(name, found, prompts)))
    return rewards


def _file(path: str, files: Mapping[str, SourceFile]) -> SourceFile:
    """A file's name is relative to the spec, or to the folder above its own where it lies outside."""
    wanted = posixpath.normpath(path)
    for name, file in files.items():
        if wanted == name or wanted.endswith(f"/{name}"):
            return file
    raise FmopsError(f"reward file {path!r} is not among {', '.join(files) or 'no files'}. Put it beside the spec.")


def _imported(file: SourceFile) -> Any:
    module_name = f"fmops_reward_{file.sha256[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, file.path)
    if spec is None or spec.loader is None:
        raise FmopsError(f"reward file {file.name} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise FmopsError(f"reward file {file.name} cannot be imported: {type(error).__name__}: {error}.") from error
    return module


def _parameters(name: str, function: Callable[..., Any], prompts: Sequence[Prompt]) -> tuple[str, ...] | None:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    asks = tuple(parameter.name for parameter in parameters)
    if "answer" not in asks:
        raise FmopsError(
            f"reward {name} takes no `answer`, only {', '.join(asks) or 'nothing'}. Give it that parameter."
        )
    if any(parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL) for parameter in parameters):
        raise FmopsError(f"reward {name} has parameters without a name; it is called by name. Drop the / or the *.")
    wanted = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    for prompt in prompts:
        for parameter in wanted:
            if parameter not in OWN and parameter not in prompt.columns:
                may = ", ".join((*OWN, *sorted(prompt.columns)))
                raise FmopsError(
                    f"reward {name} asks for {parameter!r}, which prompt {prompt.id} has not. It may ask for {may}."
                )
    return asks


def _known(prompt: Prompt, answer: str) -> dict[str, Any]:
    own = {"answer": answer, "prompt": prompt.messages[-1]["content"], "messages": [*prompt.messages]}
    return {**prompt.columns, **own}


_calling: list[str] = []
"""The reward that runs now. An audit hook stays for the process's life, so it looks here."""


@contextmanager
def _no_network(name: str) -> Iterator[None]:
    """A reward that asked a service would make a run depend on more than its fingerprint says."""
    _hook_once()
    _calling.append(name)
    try:
        yield
    finally:
        _calling.pop()


@functools.cache
def _hook_once() -> None:
    sys.addaudithook(_refuse_network)


def _refuse_network(event: str, _: tuple[Any, ...]) -> None:
    if _calling and event in NETWORK:
        raise FmopsError(f"reward {_calling[-1]} uses the network ({event}). A reward computes from its arguments.")
