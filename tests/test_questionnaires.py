from __future__ import annotations

import random
import re

import pytest
from tokenizers import Tokenizer

from simsd import questionnaires, tasks
from simsd.models.folders import PAIR


@pytest.mark.parametrize("family", questionnaires.FAMILIES)
def test_every_question_of_a_held_out_prompt_is_held_out(family):
    asked = {q.prompt for item in questionnaires.held_out(family, 50) for q in item.questions}
    rng = random.Random(0)
    trained = {q.prompt for _ in range(2_000) for q in questionnaires.training_item(family, rng).questions}
    pool = tasks.held_out(family, questionnaires.HELD_OUT_QUESTIONS)
    assert asked <= {task.prompt for task in pool} and asked.isdisjoint(trained)


@pytest.mark.parametrize("family", questionnaires.FAMILIES)
def test_they_repeat_for_a_seed_and_ask_nothing_twice(family):
    items = questionnaires.held_out(family, 50, seed=3)
    assert items == questionnaires.held_out(family, 50, seed=3) != questionnaires.held_out(family, 50, seed=4)
    for item in items:
        fewest, most = questionnaires.QUESTIONS[family]
        assert fewest <= len({question.prompt for question in item.questions}) == len(item.questions) <= most
        assert all(question.family == family for question in item.questions)


def test_choices_of_one_prompt_share_their_options():
    options = [
        {q.prompt.partition(" A: ")[2] for q in item.questions} for item in questionnaires.held_out("choice", 50)
    ]
    assert all(len(found) == 1 and all(found) for found in options)
    assert len(set.union(*options)) > 4


def test_answers_are_long():
    tokenizer = Tokenizer.from_file(str(PAIR / "tiny-target" / "tokenizer.json"))
    items = [item for family in questionnaires.FAMILIES for item in questionnaires.held_out(family, 100)]
    lengths = sorted(len(tokenizer.encode(item.response).ids) for item in items)
    assert lengths[len(items) // 20] >= 40 and lengths[-len(items) // 20] <= 100
    assert all(tokenizer.decode(tokenizer.encode(item.response).ids) == item.response for item in items)


@pytest.mark.parametrize("family", questionnaires.FAMILIES)
def test_an_answer_is_right_where_each_of_its_lines_is(family):
    for item in questionnaires.held_out(family, 20):
        lines = item.response.split("\n")
        assert questionnaires.is_correct(item, item.response) and questionnaires.is_correct(item, item.response + "\n")
        other = re.sub(r"\w+(?=\W*$)", "42?", lines[-1])
        wrong = ["", lines[0], "\n".join(lines[1:]), "\n".join([*lines[:-1], other]), item.response + "\nmore"]
        wrong += ["\n".join([lines[1], lines[0], *lines[2:]])]
        assert not any(questionnaires.is_correct(item, text) for text in wrong)


@pytest.mark.parametrize("family", questionnaires.FAMILIES)
def test_the_score_is_the_share_of_questions_answered_right(family):
    for item in questionnaires.held_out(family, 20):
        lines = item.response.split("\n")
        count = len(lines)

        def score(*lines, item=item):
            return questionnaires.score(item, "\n".join(lines))

        assert score(*lines) == score(*lines, "more") == 1.0
        assert score() == score("?") == score(*(line.partition(": ")[2] for line in lines)) == 0.0
        assert score(*lines[1:]) == pytest.approx(1 - 1 / count)  # each line has its number: none moves up
        assert score(*reversed(lines)) == 1.0
        other = re.sub(r"\w+(?=\W*$)", "42?", lines[-1])
        assert score(*lines[:-1], other) == score(*lines[:-1], other, lines[-1]) == pytest.approx(1 - 1 / count)
        renumbered = [f"{number + 1}: {line.partition(': ')[2]}" for number, line in enumerate(lines, 1)]
        assert score(*renumbered) < 1.0


def test_an_unknown_family_is_refused():
    for call in (
        lambda: questionnaires.held_out("poetry", 1),
        lambda: questionnaires.training_item("poetry", random.Random(0)),
    ):
        with pytest.raises(ValueError, match="unknown task family 'poetry'"):
            call()
