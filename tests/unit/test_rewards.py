"""A reward is a plain function beside the spec: found, checked before training, and never trusted with its result."""

from __future__ import annotations

import pytest
from training_inputs import some_rewards

from fmops.errors import FmopsError
from fmops.finetuning.preferences import Asked
from fmops.finetuning.rewards import load_rewards
from fmops.lifecycle import Align
from fmops.sources import resolve

PROMPT = Asked("sums:3", ({"role": "user", "content": "1+1?"},), {"expected": "2"}, 4)


def the_reward(folder, body: str, *, name: str = "rewards.py:f", prompts=(PROMPT,)):
    [reward] = load_rewards({name: 1.0}, some_rewards(folder, body), prompts)
    return reward


def test_a_function_is_given_what_it_asks_for(tmp_path):
    body = (
        "def f(answer, *, expected, prompt, messages):\n    return (answer, expected, prompt) == ('2', '2', '1+1?')\n"
    )
    assert the_reward(tmp_path, body)(PROMPT, "2") == 1.0
    body = "def f(*, answer, expected, scale=2, **rest):\n    return scale * (answer == expected) + len(rest)\n"
    assert the_reward(tmp_path / "all", body)(PROMPT, "2") == 4


def test_files_beside_the_spec_and_above_it_are_found(tmp_path):
    some_rewards(tmp_path / "shared", "def f(answer):\n    return 1\n")
    (tmp_path / "project").mkdir()
    source = resolve("../shared/rewards.py", root=tmp_path / "project", cache=tmp_path / "cache")
    assert load_rewards({"../shared/rewards.py:f": 1.0}, source, [PROMPT])[0](PROMPT, "") == 1.0
    with pytest.raises(FmopsError, match=r"reward file 'wards\.py' is not among"):
        load_rewards({"wards.py:f": 1.0}, some_rewards(tmp_path / "other"), [PROMPT])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def g(answer):\n    return 1\n", r"unknown function in rewards.py 'f'. .*Known: g"),
        ("async def f(answer):\n    return 1\n", r"unknown function in rewards.py 'f'"),
        ("f = 3\n", r"unknown function in rewards.py 'f'"),
        ("def f(text):\n    return 1\n", r"reward rewards.py:f takes no `answer`, only text"),
        ("def f(answer, /):\n    return 1\n", r"parameters without a name"),
        (
            "def f(answer, expcted):\n    return 1\n",
            r"asks for 'expcted', which prompt sums:3 has not. It may ask for answer, prompt, messages, expected",
        ),
        ("import no_such_module\n", r"reward file rewards.py cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_function_that_could_not_be_called_is_refused_before_training(body, said, tmp_path):
    with pytest.raises(FmopsError, match=said):
        the_reward(tmp_path, body)


@pytest.mark.parametrize(
    ("returns", "said"),
    [
        ("float('nan')", "returned nan for prompt sums:3; it must return a finite number"),
        ("float('inf')", "returned inf for prompt sums:3"),
        ("None", "returned None for prompt sums:3"),
        ("'good'", "returned 'good' for prompt sums:3"),
        ("1 / 0", "failed on prompt sums:3: ZeroDivisionError: division by zero. Answer: 'two'"),
        ("__import__('socket').create_connection(('127.0.0.1', 9), 1)", "uses the network .socket.getaddrinfo"),
    ],
)
def test_a_result_that_cannot_be_learnt_from_ends_the_run_with_the_prompts_name(returns, said, tmp_path):
    reward = the_reward(tmp_path, f"def f(answer):\n    return {returns}\n")
    with pytest.raises(FmopsError, match=f"reward rewards.py:f {said}"):
        reward(PROMPT, "two")


def test_the_network_is_closed_to_rewards_alone(tmp_path):
    import socket

    assert the_reward(tmp_path, "def f(answer):\n    return True\n")(PROMPT, "") == 1.0
    with socket.socket() as listening, socket.socket() as calling:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        calling.connect(listening.getsockname())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "grpo"}, "grpo needs a reward"),
        ({"method": "dpo", "reward": "rewards.py:f"}, "dpo learns from answers that people judged"),
        ({"method": "grpo", "reward": "hf://owner/rewards.py:f"}, "is no `file.py:function` beside the spec"),
        ({"method": "grpo", "reward": "rewards.py"}, "is no `file.py:function` beside the spec"),
        ({"method": "orpo", "beta": 0}, "beta 0 leaves orpo nothing to learn"),
        ({"method": "kto", "batch_pairs": 3}, "kto compares votes within a batch: batch_pairs 3 must be even"),
    ],
)
def test_a_spec_that_does_not_fit_its_method_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Align(**options)


def test_one_reward_weighs_one():
    assert Align(method="grpo", reward="a/rewards.py:f").reward == {"a/rewards.py:f": 1.0}
