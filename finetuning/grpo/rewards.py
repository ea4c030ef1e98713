"""What an answer to a sum is worth. A parameter is `answer`, `prompt`, `messages`, or a key of the prompt's row."""

import re


def terse(answer: str) -> float:
    """One over the number of words, when there is a number among them: who says nothing gets nothing."""
    return 1 / len(answer.split()) if re.search(r"\d", answer) else 0.0


def right(answer: str, expected: str) -> float:
    """1 when the last number of the answer is the sum."""
    numbers = re.findall(r"\d+", answer)
    return float(bool(numbers) and numbers[-1] == expected)
