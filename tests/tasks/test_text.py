"""Chat templates, thinking text, REST's form: what a text model is asked, and what of its completion counts for answers and for credit."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from bcr.records import Problem
from bcr.tasks.chat import ChatTemplate, read_chat_template
from bcr.tasks.rest import ask_rest, read_rest
from bcr.tasks.text import TextDialect
from bcr.tasks.thinking import end_of_thinking, mentions

PROBLEMS = [Problem(str(k), question, "0", "test") for k, question in enumerate(("What is $1 + 1$?", "What is é?", "And 3?"), start=1)]
SPECIAL = ["<eos>", "<bos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
PLAIN = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = PLAIN + "<think>\n"
HYBRID = PLAIN + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


def byte_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate([*SPECIAL, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZER = byte_tokenizer()
EOS = 0


def dialect(template=None, form="markdown", answers_in_thinking=False, thinking=None, system=None):
    chat = ChatTemplate(template, {"bos_token": "<bos>"}, system, thinking) if template else None
    return TextDialect(TOKENIZER, [EOS], form, chat, answers_in_thinking)


def read(text, num_problems=2, finish="stop", **options):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return dialect(**options).read([*ids, EOS] if finish == "stop" else ids, finish, num_problems)


def spans(text, reading):
    """(problem, answered, text) of each segment; every character is one token or several, all ASCII here."""
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return [(s.problem, s.answered, TOKENIZER.decode(ids[s.start : s.stop], skip_special_tokens=False)) for s in reading.segments]


# ---- the prompt ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["jinja", "config", "named"])
def checkpoint(request, tmp_path):
    """A tokenizer folder with its template where it may stand."""
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {
            "__type": "AddedToken",
            "content": "<bos>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        },
        "eos_token": "<eos>",
    }
    if request.param == "jinja":
        (tmp_path / "chat_template.jinja").write_text(HYBRID)
    else:
        named = [{"name": "tools", "template": "no"}, {"name": "default", "template": HYBRID}]
        config["chat_template"] = HYBRID if request.param == "config" else named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("thinking", [None, True, False])
def test_the_prompt_is_the_one_transformers_makes(checkpoint, thinking):
    chat = read_chat_template(checkpoint, system="Be brief.", thinking=thinking)
    ours = TextDialect(TOKENIZER, [EOS], "markdown", chat)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ours.ask(PROBLEMS)}]
    options = {} if thinking is None else {"enable_thinking": thinking}
    theirs = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(messages, add_generation_prompt=True, **options)
    assert ours.prompt_ids(PROBLEMS) == theirs["input_ids"]


def test_a_folder_without_a_template_is_asked_in_plain_text(tmp_path):
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert read_chat_template(tmp_path) is None
    text = TOKENIZER.decode(dialect().prompt_ids(PROBLEMS), skip_special_tokens=False)
    assert text.endswith("### Problem 3\nAnd 3?\n\n## Solutions\n\n")


def test_a_template_that_refuses_gives_its_reason():
    with pytest.raises(ValueError, match=r"chat template cannot be used \(no system here\); dialect\.chat=false"):
        dialect("{{ raise_exception('no system here') }}")


def test_one_problem_is_asked_in_the_singular():
    text = TOKENIZER.decode(dialect().prompt_ids(PROBLEMS[:1]))
    assert "Solve the following problem one after the other" not in text
    assert "### Problem 1\nWhat is $1 + 1$?" in text
    assert "Problem 2" not in text


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match=r"dialect\.form is 'xml'; it must be one of markdown, rest\."):
        dialect(form="xml")


# ---- where thinking ends -------------------------------------------------------------------------------------------------------

SOLVED = "### Problem 1\nAnswer 1: \\boxed{2}\n\n### Problem 2\nAnswer 2: \\boxed{5}"


@pytest.mark.parametrize(
    ("text", "opened", "rest"),
    [
        ("<think>a</think>b", False, "b"),
        ("a</think>b", True, "b"),
        ("a</think>b", False, "b"),  # a closing tag alone closes
        ("b", False, "b"),
        ("a", True, ""),  # cut off while thinking
        ("<think>a", False, ""),
        ("a</think>b</think>c", True, "c"),
        ("<think>a</think>b<think>c", False, ""),
        ("<think></think>b", False, "b"),
    ],
)
def test_what_follows_the_thinking(text, opened, rest):
    assert text[end_of_thinking(text, opened) :] == rest


@pytest.mark.parametrize("template", [None, PLAIN, HYBRID, THINKING])
def test_answers_while_thinking_do_not_count(template):
    """The model opens the thinking itself, but for the template whose prompt ends with the tag."""
    begin = "" if template == THINKING else "<think>"
    drafts = "Answer 1: \\boxed{9}\nAnswer 2: \\boxed{9}\n"
    assert read(f"{begin}{drafts}</think>\n{SOLVED}", template=template).answers == ("2", "5")
    assert read(f"{begin}{drafts}</think>\nAnswer 1: \\boxed{{2}}", template=template).answers == ("2", None)
    assert read(f"{begin}{SOLVED}", template=template).answers == (None, None)
    assert read(f"{begin}{SOLVED}", finish="length", template=template).answers == (None, None)


def test_a_hybrid_told_not_to_think_answers_at_once():
    ours = dialect(HYBRID, thinking=False)
    assert TOKENIZER.decode(ours.prompt_ids(PROBLEMS), skip_special_tokens=False).endswith("assistant\n<think>\n\n</think>\n\n")
    assert read(SOLVED, template=HYBRID, thinking=False).answers == ("2", "5")


def test_answers_while_thinking_count_where_configured():
    text = f"<think>{SOLVED}</think>\nAnswer 2: \\boxed{{7}}"
    assert read(text, answers_in_thinking=True).answers == ("2", "7")  # the last one counts
    assert read(f"<think>{SOLVED}</think>", answers_in_thinking=True).answers == ("2", "5")  # the closing tag is no ramble
    assert read(text).answers == (None, "7")


# ---- passages of thinking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("### Problem 2", 1),
        ("**Problem 2:** What is it?", 1),
        ("Okay, so now let's move on to the second problem. It says", 1),
        ("Now, Problem 3.", 2),
        ("Next, question 2: what is", 1),
        ("Moving on to problem #2.", 1),
        ("For the third one, we need", 2),
        ("Q2: what is", 1),
        ("First, let me tackle the first problem.", 0),
        ("Let’s start with Problem 1.", 0),
        ("Problem two asks", 1),
        ("As in problem 2, we see", None),
        ("I solved problem 2 already.", None),
        ("Problem 1's answer was 5.", None),
        ("Problem 1, Problem 2 and Problem 3 are easy.", None),
        ("Problems 1 to 3 are given.", None),
        ("Question 1 and 2 look alike.", None),
        ("Problem 4 was never asked.", None),
        ("The problem says", None),
        ("The second term is 2.", None),
        ("Quickly, Q2x", None),
        ("Problem 22", None),
    ],
)
def test_lines_that_turn_to_a_problem(line, problem):
    marks = mentions(f"Some thoughts.\n{line}\nMore.\n", 3)
    assert [mark.problem for mark in marks] == ([] if problem is None else [problem])
    assert all(mark.start == 15 for mark in marks)


def test_passages_of_thinking_are_segments():
    thought = "Hm.\nFirst, Problem 1: 1+1.\nProblem 1 is 2.\nNow the second problem. 5?\nAnswer 2: \\boxed{9}\n"
    text = f"<think>{thought}</think>\n### Problem 1\nAnswer 1: \\boxed{{2}}\n### Problem 2\nIs 5."
    assert spans(text, read(text)) == [
        (0, True, "<think>Hm.\nFirst, Problem 1: 1+1.\nProblem 1 is 2.\n"),
        (1, False, "Now the second problem. 5?\nAnswer 2: \\boxed{9}\n</think>\n"),  # never answered in the end
        (0, True, "### Problem 1\nAnswer 1: \\boxed{2}\n"),
        (1, False, "### Problem 2\nIs 5."),
    ]


@pytest.mark.parametrize("thought", ["1+1 is 2, and then 5.", "Problem 1: it is 2. Then 5."])
def test_thinking_that_does_not_separate_falls_back_to_the_rollout(thought):
    text = f"<think>{thought}</think>\n{SOLVED}"
    reading = read(text)
    assert spans(text, reading) == [(0, True, text)]
    assert reading.answers == ("2", "5")


def test_empty_thinking_is_none():
    text = f"<think>\n\n</think>\n\n{SOLVED}"
    assert [problem for problem, *_ in spans(text, read(text))] == [0, 1]


def test_one_problem_is_one_segment_however_it_thinks():
    text = "<think>Problem 1: hm. 2</think>### Problem 1\nAnswer 1: \\boxed{2}"
    assert {segment.problem for segment in read(text, num_problems=1).segments} == {0}


PIECES = ["<think>", "</think>", "\nProblem 1", "\nNow the second problem", "\n### Problem 3", "Answer 1: \\boxed{", "}", "a "]
pieces = st.sampled_from([*PIECES, "Answer 2: \\boxed{1}"])
finishes = st.sampled_from(["stop", "length"])


@settings(deadline=None, max_examples=200)
@given(st.lists(pieces, max_size=14), st.integers(1, 3), finishes, st.sampled_from(["markdown", "rest"]), st.booleans())
def test_any_thinking_is_read_and_partitioned(parts, num_problems, finish, form, inside):
    text = "".join(parts)
    reading = read(text, num_problems, finish, form=form, answers_in_thinking=inside, template=THINKING)
    assert "".join(part for *_, part in spans(text, reading)) == text
    assert len(reading.answers) == num_problems
    assert {segment.problem for segment in reading.segments} <= set(range(num_problems))
    if not inside and "</think>" not in text:
        assert set(reading.answers) == {None}


# ---- REST's form ---------------------------------------------------------------------------------------------------------------


def test_rest_asks_and_reads_box_by_box():
    asked = ask_rest(PROBLEMS[:2])
    assert asked.startswith("Q1: What is $1 + 1$?\nQ2: What is é?\n")
    assert asked.endswith("Answer the above questions one by one. Remember to put your final answer within \\boxed{}.")
    text = "Q1 is \\boxed{2}. So Q2: \\boxed{\\frac{1}{2}}, and wait."
    reading = read(text, form="rest")
    assert reading.answers == ("2", "\\frac{1}{2}")
    assert spans(text, reading) == [(0, True, "Q1 is \\boxed{2}"), (1, True, ". So Q2: \\boxed{\\frac{1}{2}}, and wait.")]


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("", (None, None)),
        ("\\boxed{1}", ("1", None)),
        ("\\boxed{1} \\boxed{2", ("1", None)),
        ("\\boxed{1}\\boxed{2}\\boxed{3}", ("1", "2")),
        ("\\boxed{\\boxed{1}} \\boxed{2}", ("\\boxed{1}", "2")),
        ("boxed{1}", (None, None)),
    ],
)
def test_rest_by_hand(text, answers):
    assert read_rest(text, "stop", 2)[1] == answers
