"""A chat's state and commands."""

from __future__ import annotations

import pytest

from simsd import Result, SimsdError, Stats
from simsd.cli.conversation import COMMANDS, Conversation


def answer(text: str, reason: str = "end", **stats) -> Result:
    tokens = [1] * stats.get("new_tokens", 3)
    return Result(tokens, text, tokens, [], [], reason, [], Stats(**{"new_tokens": 3} | stats))


def roles(conversation: Conversation, left_out: int = 0) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in conversation.messages("now?", left_out)]


def test_a_question_comes_behind_the_system_turn_and_all_that_was_said():
    chat = Conversation(system="Be brief.")
    assert roles(chat) == [("system", "Be brief."), ("user", "now?")]
    chat.learn("a?", answer("A."))
    chat.learn("b?", answer("B.", "cancelled"))
    said = [("user", "a?"), ("assistant", "A."), ("user", "b?"), ("assistant", "B."), ("user", "now?")]
    assert roles(chat) == [("system", "Be brief."), *said]
    assert roles(chat, left_out=1) == [("system", "Be brief."), *said[2:]]
    chat.learn("c?", answer("C."), left_out=2)
    assert roles(chat) == [("system", "Be brief."), ("user", "c?"), ("assistant", "C."), ("user", "now?")]


@pytest.mark.parametrize("lost", [answer(""), answer("", "cancelled"), answer("half", "failed")])
def test_an_answer_that_never_came_leaves_no_turn(lost):
    chat = Conversation()
    chat.learn("a?", lost)
    assert roles(chat) == [("user", "now?")] and chat.answers == 1


def test_a_model_that_does_not_remember_is_asked_each_question_by_itself():
    chat = Conversation(remembers=False)
    chat.learn("a?", answer("A."))
    assert roles(chat) == [("user", "now?")]
    assert chat.command("/reset") == "nothing to forget: this model is asked each question by itself"


def test_the_system_turn_is_set_shown_and_removed():
    chat = Conversation()
    assert chat.command("/system") == "no system turn"
    assert chat.command("/system  Be brief. ") == "system turn: Be brief."
    assert chat.command("/system") == "system turn: Be brief." and chat.system == "Be brief."
    assert chat.command("/system off") == "no system turn" and roles(chat) == [("user", "now?")]


def test_reset_forgets_turns_and_keeps_system_turn_seed_and_totals():
    chat = Conversation(system="Be brief.", seed=5)
    chat.learn("a?", answer("A."))
    assert chat.command("/reset") == "forgotten; the system turn stays: Be brief."
    assert (chat.turns, chat.system, chat.seed, chat.answers) == ([], "Be brief.", 5, 1)


def test_the_seed_is_set_and_shown_and_says_where_it_changes_nothing():
    chat = Conversation(temperature=0.8)
    assert chat.command("/seed") == "seed 0"
    assert chat.command("/seed -12") == "seed -12" and chat.seed == -12
    assert Conversation().command("/seed 3") == "seed 3; at temperature 0 it changes nothing"


@pytest.mark.parametrize("given", ["x", "1.5", "1 2", str(2**63), "0x10", "-"])
def test_a_seed_that_is_none_is_refused_and_the_old_one_stays(given):
    chat = Conversation(seed=7)
    with pytest.raises(SimsdError, match=r"/seed takes an integer in -2\^63..2\^63-1, got '"):
        chat.command(f"/seed {given}")
    assert chat.seed == 7


def test_stats_tell_of_the_last_answer_and_of_all():
    chat = Conversation()
    assert chat.command("/stats") == "no answer yet"
    chat.learn("a?", answer("A.", target_denoise_forwards=2, drafted=4, accepted=3, new_tokens=6, total_seconds=2.0))
    one = "last answer: 6 tokens (end), 2 target forwards (3.0 tokens each), 3/4 drafted accepted (75%), 3 tok/s"
    assert chat.command("/stats") == one
    chat.learn("b?", answer("B.", "length", target_verify_forwards=2, new_tokens=2, total_seconds=2.0))
    assert chat.command("/stats").splitlines() == [
        "last answer: 2 tokens (length), 2 target forwards (1.0 tokens each), 1 tok/s",
        "all 2 answers: 8 tokens, 4 target forwards (2.0 tokens each), 3/4 drafted accepted (75%), 2 tok/s",
    ]


@pytest.mark.parametrize("line", ["/", "/foo", "/Help", "/resets", "/exit!", "/usr/bin/python", "/stats/"])
def test_an_unknown_command_says_which_there_are(line):
    chat = Conversation()
    with pytest.raises(SimsdError) as refused:
        chat.command(line)
    message = str(refused.value)
    assert message.startswith(f"unknown command {line}: there are ") and "\n" not in message
    assert all(name in message for name in COMMANDS) and not chat.over


@pytest.mark.parametrize("line", ["/reset all", "/stats 3", "/help me", "/exit now"])
def test_what_takes_nothing_is_not_done_with_something_behind_it(line):
    chat = Conversation(turns=[("a?", "A.")])
    with pytest.raises(SimsdError, match="takes nothing behind it, got"):
        chat.command(line)
    assert chat.turns and not chat.over


def test_help_lists_every_command_and_exit_ends():
    chat = Conversation()
    assert [line.split()[0] for line in chat.command("/help").splitlines()] == list(COMMANDS)
    assert not chat.over and chat.command(" /exit ".strip()) == "" and chat.over
