"""``generate`` and ``chat`` with prompts and options as they come from a shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import complaint, smoothquant
from command_line import work as work  # the fixture
from server import TEMPLATE
from tiny import VOCAB, build
from tiny_text import tiny_tokenizer, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

POSITIONS = 128
RUN = "import sys; sys.argv[0] = 'smoothquant'; from smoothquant_ext.cli import main; main()"


def greedy(model: Path, prompt: str, count: int) -> str:
    """What transformers' own greedy search makes of a float model."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = network.generate(**inputs, do_sample=False, max_new_tokens=count)
    return str(tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-c", RUN, *map(str, arguments)]


@pytest.mark.parametrize("length", [POSITIONS, POSITIONS + 1, 5000])
def test_a_prompt_longer_than_the_model_is_refused(work, length):
    said = complaint("generate", work / "model", "a" * length)
    assert said == f"the prompt has {length} tokens, but {work / 'model'} has {POSITIONS} positions: shorten it"


@pytest.mark.parametrize(("asked", "left"), [(2, 1), (128, 1), (10**12, 1)])
def test_an_answer_ends_where_the_positions_end_and_says_so(work, asked, left):
    prompt = "a" * (POSITIONS - left)
    result = smoothquant("generate", work / "model", prompt, "--max-new-tokens", asked)
    assert result.stdout.rstrip("\n") == greedy(work / "model", prompt, left).rstrip("\n")
    assert "warning: " in result.stderr
    assert f"so the answer ends after {left}, not {asked}" in result.stderr


def test_learned_positions_end_too(tmp_path):
    """Where rotary embeddings go on with nonsense, a table of them is an error of its index."""
    model = write_tiny_model(tmp_path / "gpt2", "gpt2")
    assert f"has {POSITIONS} positions: shorten it" in complaint("generate", model, "a" * 200)
    result = smoothquant("generate", model, "a" * 120, "--max-new-tokens", 50)
    assert result.stdout.rstrip("\n") == greedy(model, "a" * 120, 8).rstrip("\n")
    assert "ends after 8, not 50" in result.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--temperature", "inf"), "--temperature is inf, expected 0 or a number of at least 1e-06"),
        (("--temperature", "1e-40"), "--temperature is 1e-40, expected 0"),
        (("--temperature", "1e-7"), "--temperature is 1e-07, expected 0"),
    ],
)
@pytest.mark.parametrize("command", [("generate", "any", "x"), ("chat", "any")])
def test_temperatures_that_overflow_are_refused_before_loading(monkeypatch, command, options, expected):
    monkeypatch.setattr("smoothquant_ext.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("smoothquant_ext.integrations.serving._start", lambda *_: pytest.fail("a model was loaded"))
    assert expected in complaint(*command, *options)


@pytest.mark.parametrize(
    "options",
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "-5"),
        ("--seed", "-1"),
        ("--seed", str(2**70)),
    ],
)
def test_options_out_of_range_are_wrong_usage(work, options):
    assert smoothquant("generate", work / "model", "x", *options, code=2).stdout == ""


@pytest.mark.parametrize("prompt", ["\udcff", "a\udcc3b", "aa\ud83d"])
def test_a_prompt_that_is_no_text_is_refused(work, prompt):
    at = next(index for index, character in enumerate(prompt) if character != "a")
    expected = f"PROMPT is not UTF-8: the character at {at} is not"
    assert complaint("generate", work / "model", prompt) == expected


def test_a_prompt_without_tokens_is_refused_and_one_with_a_start_token_is_not(work, tmp_path):
    assert "the prompt is empty" in complaint("generate", work / "model", "")
    build("llama").save_pretrained(tmp_path / "bos")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "bos")
    result = smoothquant("generate", tmp_path / "bos", "", "--max-new-tokens", 4)
    assert result.stdout.rstrip("\n") == greedy(tmp_path / "bos", "", 4).rstrip("\n")


def test_a_tokenizer_larger_than_the_model_is_named(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["snowman"])
    tokenizer.save_pretrained(tmp_path / "model")
    said = complaint("generate", tmp_path / "model", "a snowman")
    assert f"does not fit the model: it gave token {VOCAB}, but the model knows {VOCAB}" in said


def test_a_tokenizer_without_padding_and_end_will_do(work, tmp_path):
    build("llama", pad_token_id=None, eos_token_id=None).save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    result = smoothquant("generate", tmp_path / "model", "once", "--max-new-tokens", 7)
    assert result.stdout.rstrip("\n") == greedy(tmp_path / "model", "once", 7).rstrip("\n")


def test_a_generation_config_with_beams_does_not_stop_the_words(work, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    model.generation_config.num_beams = 3
    model.generation_config.num_return_sequences = 2
    model.save_pretrained(tmp_path / "beams")
    AutoTokenizer.from_pretrained(work / "model").save_pretrained(tmp_path / "beams")
    result = smoothquant("generate", tmp_path / "beams", "once", "--max-new-tokens", 7)
    assert result.stdout.rstrip("\n") == greedy(work / "model", "once", 7).rstrip("\n")


def test_a_template_that_refuses_the_prompt_says_why(work, tmp_path):
    AutoModelForCausalLM.from_pretrained(work / "model").save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    for template, words in (
        ("{{ raise_exception('only wizards may speak') }}", "only wizards may speak"),
        ("{{ messages[3].content }}", "list object has no element 3"),
        ("{% for %}", "Expected an expression"),
    ):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        said = complaint("generate", tmp_path / "model", "hello", "--chat")
        assert said.startswith(f"the chat template of {tmp_path / 'model'} refuses the prompt: ")
        assert words in said
    assert "leave out --chat" in complaint("generate", work / "model", "hello", "--chat")


def test_a_reader_that_leaves_and_a_closed_input_are_no_errors(work):
    command = program("generate", work / "model", "once", "--max-new-tokens", 100)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.wait(60)
    assert b"Traceback" not in said
    assert b"Exception" not in said
    shell = " ".join(f"'{part}'" if " " in part else part for part in command[3:])
    closed = subprocess.run(
        ["sh", "-c", f'exec "{sys.executable}" -c "{RUN}" {shell} <&-'], capture_output=True, text=True, check=False
    )
    assert (closed.returncode, closed.stdout.rstrip("\n")) == (0, greedy(work / "model", "once", 100).rstrip("\n"))


@pytest.fixture(scope="module")
def talker(work, tmp_path_factory) -> Path:
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    directory = tmp_path_factory.mktemp("talker") / "model"
    AutoModelForCausalLM.from_pretrained(work / "model").save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    [
        (["hello"], 0, None),  # and then the input ends
        (["a" * 300], 2, f"the chat has ended: the prompt has 301 tokens, but the model has {POSITIONS} positions"),
        (["!set num_beams=4", "hello"], 2, 'not "num_beams"'),
        (["!set x=[1", "hello"], 2, "the chat has ended: Failed to convert"),
        (["!set max_new_tokens=0", "hello"], 2, "the chat has ended: `max_new_tokens` must be greater than 0"),
        (["!set top_p=7", "hello"], 2, "for top_p a number between 0 and 1, not 7"),
    ],
)
def test_a_chat_that_cannot_go_on_ends_with_a_sentence(talker, monkeypatch, typed, code, words):
    from transformers.cli import chat

    lines = iter(typed)

    def listen(_: object) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(chat.RichInterface, "input", listen)
    monkeypatch.setattr(chat.RichInterface, "confirm", lambda *_, **__: False)
    result = smoothquant("chat", talker, "--max-new-tokens", 4, code=code)
    if words is None:
        assert "error: " not in result.stderr
    else:
        assert words in result.stderr.splitlines()[-1]


def test_a_chat_needs_a_template_and_an_input(work, monkeypatch):
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    said = complaint("chat", work / "model")
    assert said == f"{work / 'model'} has no chat template, so it is not a chat model: use 'smoothquant generate'"
    from smoothquant_ext.errors import SmoothQuantError
    from smoothquant_ext.integrations import serving

    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SmoothQuantError, match="its input is closed"):
        serving.chat(str(work / "model"))


def test_a_chat_ends_quietly_when_interrupted(talker):
    process = subprocess.Popen(
        program("chat", talker),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        while b"!exit" not in process.stdout.readline():  # the help at its beginning
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (0, 1, 130)
    assert b"Traceback" not in said
