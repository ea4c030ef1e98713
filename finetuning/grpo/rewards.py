"""What an answer to a sum is worth. A parameter is `answer`, `prompt`, `messages`, or a key of the prompt's row."""

import re


def right(answer: str, expected: str) -> float:
    """1 when the last number of the answer is the sum."""
    numbers = re.findall(r"\d+", answer)
    return float(bool(numbers) and numbers[-1] == expected)


def near(answer: str, expected: str) -> float:
    """From 1 down to 0 with the distance to the sum: most answers of a beginner are wrong, and some less so."""
    numbers = re.findall(r"\d+", answer)
    return 1 / (1 + abs(int(numbers[-1][:4]) - int(expected))) if numbers else 0.0
