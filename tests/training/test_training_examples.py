"""Files in, windows out: what is refused and where it says to look, what is
learned, and that every learned token is predicted once.
"""

import json
import math
import warnings
from importlib import resources

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from dmr.training.examples import (
    Example,
    byte_lengths,
    general_texts,
    pack,
    read_examples,
    split_examples,
    tokenize_examples,
)
from dmr.training.pretrained import ByteTokenizer, small_llama

PROMPT = {"prompt": "2 + 2 = ", "completion": "4"}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which sea?"},
    {"role": "assistant", "content": "The North Sea."},
    {"role": "user", "content": "How deep?"},
    {"role": "assistant", "content": "A hundred metres."},
]


def document(text, source=""):
    return Example(((text, True),), source=source)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Reading


def test_a_text_is_one_example_whatever_its_name(tmp_path):
    path = tmp_path / "NOTES"
    path.write_bytes("\ufeffCafé\r\nau lait\n".encode())
    (found,) = read_examples(str(path))
    assert found.parts == (("Café\r\nau lait\n", True),)
    assert found.source == str(path) and found.messages == ()


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        ("\ufeff".encode(), "is empty"),
        (b"plain\n\xe9", "byte 0xe9 at offset 6, line 2, does not fit; save"),
        (b"GIF89a\0\0", "is not text: it holds zero bytes"),
        (bytes(range(1, 32)) * 4, "is not text"),
        ("Caf\u00e9".encode("utf-16"), "UTF-16 counts as binary: save it as"),
    ],
)
def test_a_file_without_text_is_refused(tmp_path, data, said):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        read_examples(path)
    assert str(path) in str(error.value) and path.read_bytes() == data


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="no file or folder '.*no'; pass"):
        read_examples(tmp_path / "no")
    with pytest.raises(ValueError, match="is empty"):
        read_examples(tmp_path)


def test_a_folder_is_read_in_order_and_says_what_it_skipped(tmp_path):
    for name, text in {
        "b.txt": "second",
        "a/z.py": "first = 1",
        "c.jsonl": json.dumps(PROMPT),
        ".git/config": "hidden",
        "d/.draft": "hidden",
        "e/empty.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "d/x.png").write_bytes(b"\x89PNG\0")
    with pytest.warns(UserWarning) as said:
        found = read_examples(tmp_path)
    assert [x.learned for x in found] == ["first = 1", "second", "4"]
    (message,) = {str(w.message) for w in said}
    for part in ("2 hidden (.git/config)", "1 binary (d/x.png)", "1 empty (e/"):
        assert part in message
    (tmp_path / "d/latin.txt").write_bytes(b"\xe9")  # text, and not skipped
    with pytest.raises(ValueError, match="latin.txt is not UTF-8"):
        read_examples(tmp_path)


def test_what_a_training_wrote_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out/model").mkdir(parents=True)
    (tmp_path / "out/model/config.json").write_text("{}")
    request = tmp_path / "out/request.json"
    request.write_text('{"request": {}, "arms": []}')
    with pytest.warns(UserWarning, match="2 of a training .out/model/config"):
        assert [x.learned for x in read_examples(tmp_path)] == ["text"]
    request.write_text('{"text": "mine"}')  # of somebody else
    with pytest.raises(ValueError, match="out/model/config.json"):
        read_examples(tmp_path)


def test_a_folder_of_text_alone_does_not_warn(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_examples(tmp_path)) == 1


def test_lines_of_each_form(tmp_path):
    chat = {"messages": TALK, "id": 7}
    (text,) = read_examples(write(tmp_path / "a.jsonl", {"text": "sea"}))
    (sums,) = read_examples(write(tmp_path / "b.JSONL", PROMPT))
    (talk,) = read_examples(write(tmp_path / "c.json", chat))
    assert text.parts == (("sea", True),)
    assert sums.parts == (("2 + 2 = ", False), ("4", True))
    assert list(talk.messages) == TALK and talk.parts == ()
    assert talk.source == f"{tmp_path / 'c.json'}, line 1"
    assert talk.learned == "The North Sea.A hundred metres."


def test_a_list_in_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([PROMPT, PROMPT], indent=2))
    assert [x.source for x in read_examples(path)] == [
        f"{path}, entry 1",
        f"{path}, entry 2",
    ]
    path.write_text(json.dumps([PROMPT, {"prompt": "3"}]))
    with pytest.raises(ValueError, match="entry 2 has 'prompt'; write"):
        read_examples(path)


def test_lines_end_at_line_feeds_and_blank_ones_count(tmp_path):
    "A line separator inside a text ends no line."
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        '\ufeff{"text": "one\u2028two\x85"}\r\n\r\n \n{"text": "b"}'.encode()
    )
    first, second = read_examples(path)
    assert first.learned == "one\u2028two\x85"
    assert second.source.endswith("line 4")


GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is a list, not an object"),
        ('"text"', "is text, not an object"),
        ("{}", "has none of the known keys"),
        ('{"txt": "a", "id": 3}', "has 'txt', 'id' and none of the known"),
        ('{"prompt": "a"}', "has 'prompt'; write"),
        ('{"completion": "a"}', "has 'completion'; write"),
        ('{"text": "a", "messages": []}', "has 'messages' and 'text'"),
        ('{"text": "a"}', "has text, the lines before it completion and pro"),
        ('{"prompt": "a", "completion": null}', "completion is null, not text"),
        ('{"prompt": ["a"], "completion": "b"}', "prompt is a list, not text"),
        ('{"prompt": "a", "completion": " "}', "nothing to learn"),
        (r'{"prompt": "a", "completion": "\ud83d"}', "half of a character"),
        ('{"messages": "hello"}', "messages is text, not a list"),
        ('{"messages": [{"role": "user"}]}', "no entry 'content'"),
        ('{"messages": [{"role": 1, "content": ""}]}', "role is a number"),
        ('{"messages": [["user", "a"]]}', r"messages\[0\] is a list"),
    ],
)
def test_a_bad_line_is_named_with_the_way_out(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError, match=said) as error:
        read_examples(path)
    message = str(error.value)
    assert f"{path}, line 3" in message and len(message) < 700
    assert any(way in message for way in ("write ", "keep one form", "remove"))


@pytest.mark.parametrize(
    "talk", [[], TALK[:2], [*TALK[:2], {"role": "assistant", "content": ""}]]
)
def test_a_conversation_without_an_answer_is_refused(tmp_path, talk):
    path = write(tmp_path / "a.jsonl", {"messages": talk})
    with pytest.raises(ValueError, match="line 1 has nothing to learn"):
        read_examples(path)


# What is held out


def test_whole_examples_are_held_out_from_twenty_on():
    examples = [document(f"text {i % 35}") for i in range(70)]
    train, out = split_examples(examples, share=0.2, seed=1)
    assert len(train) + len(out) == 70 and len(out) == 14  # 7 texts, twice
    assert not {x.learned for x in train} & {x.learned for x in out}
    assert split_examples(examples, 0.2, 1) == (train, out)
    assert split_examples(examples, 0.2, 2) != (train, out)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text("ab. \n", min_size=200, max_size=900).filter(str.strip),
        min_size=1,
        max_size=19,
    ),
    st.floats(0.05, 0.5),
)
def test_documents_are_cut_near_the_place_and_nothing_is_lost(texts, share):
    examples = [document(text, f"{i}") for i, text in enumerate(texts)]
    try:
        train, out = split_examples(examples, share)
    except ValueError as error:
        assert "too short" in str(error)
        return
    for text, example in zip(texts, examples):
        parts = [x.learned for x in train + out if x.source == example.source]
        assert "".join(parts).strip() == text.strip()
        if len(parts) == 2:
            assert (
                share * len(text) - 1
                <= len(parts[1])
                <= 2 * share * len(text) + 1
            )


def test_a_cut_looks_for_a_line_then_a_sentence_then_a_word():
    whole = "word " * 400
    for text, end in [
        ("a line\n" * 300, "\n"),
        (whole.replace("word word", "word.") * 3, ". "),
        (whole, " "),
        ("深" * 2000, "深"),
        ("Title\n" + "x" * 3000, "x"),  # a line end far away is none
    ]:
        (train,), (out,) = split_examples([document(text)])
        assert train.learned.endswith(end) and len(out.learned) >= 199
        assert train.learned + out.learned == text


def test_an_end_that_is_blank_is_not_held_out():
    texts = [document("a line\n" * 200), document("b" + " " * 999)]
    train, out = split_examples(texts)
    assert len(train) == 2 and len(out) == 1


def test_few_conversations_are_drawn_whole():
    talks = [
        Example(messages=({"role": "assistant", "content": str(i)},))
        for i in range(5)
    ]
    train, out = split_examples(talks)
    assert len(train) == 4 and len(out) == 1
    # beside a document they are learned, and its end is held out
    train, out = split_examples([*talks, document("a line\n" * 200)])
    assert train[:5] == talks and [x.messages for x in out] == [()]


@pytest.mark.parametrize(
    "examples, share, said",
    [
        ([], 0.1, "no examples to split"),
        ([document("a")], 0.0, r"share=0.0 is outside \(0, 0.5\]"),
        ([document("a")], math.nan, "share=nan is outside"),
        ([document("a b c", "x.txt")], 0.1, "x.txt is too short: 10% of"),
        ([Example((("a", False), ("b", True)))], 0.1, "one example alone"),
        ([document("same")] * 30, 0.1, "one example alone"),
    ],
)
def test_what_cannot_be_split_is_said(examples, share, said):
    with pytest.raises(ValueError, match=said):
        split_examples(examples, share)


# Tokens


def byte_pairs(merges=(), ends=False, metaspace=False):
    "A tokenizer of letters, with merges, as models have them."
    letters = [chr(i) for i in range(32, 127)] + ["\n", "▁"]
    words = letters + ["".join(pair) for pair in merges]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.add_special_tokens(
        [AddedToken(x, special=True) for x in ("<s>", "</s>")]
    )
    if ends:  # as Llama and T5 do
        at = {x: made.token_to_id(x) for x in ("<s>", "</s>")}
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[*at.items()]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )


def names(tokenizer, example):
    "Tokens by name, those that are learned in upper-case brackets."
    ((ids, labels),) = tokenize_examples([example], tokenizer)
    assert len(ids) == len(labels)
    assert all(y in (-100, x) for x, y in zip(ids, labels))
    words = tokenizer.convert_ids_to_tokens(ids)
    return [w if y == -100 else f"[{w}]" for w, y in zip(words, labels)]


def test_the_end_is_learned_after_what_is_learned():
    plain = byte_pairs()
    assert names(plain, document("ab")) == ["[a]", "[b]", "[</s>]"]
    last = Example((("a", True), ("b", False)))
    assert names(plain, last) == ["[a]", "b", "</s>"]


def test_no_end_is_doubled():
    for tokenizer in (byte_pairs(), byte_pairs(ends=True)):
        found = names(tokenizer, document("ab</s>"))
        assert found[-3:] == ["[a]", "[b]", "[</s>]"]
        assert "".join(found).count("</s>") == 1
    # the start that the tokenizer gives a text is there once, not learned
    both = byte_pairs(ends=True)
    assert names(both, document("a")) == ["<s>", "[a]", "[</s>]"]
    assert names(both, document("<s>a"))[:2] == ["[<s>]", "[a]"]


def test_one_token_for_start_and_end_stands_once_between_documents():
    "As OPT has it."
    tokenizer = byte_pairs(ends=True)
    tokenizer.bos_token = "</s>"
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert names(tokenizer, document("a")) == ["[a]", "[</s>]"]


def test_a_prompt_has_the_tokens_that_it_has_alone():
    tokenizer = byte_pairs([("a", "b"), ("▁", "b")])
    across = Example((("xa", False), ("b", True)))
    assert names(tokenizer, across) == ["x", "a", "[b]", "[</s>]"]
    one = Example((("x", False), ("ab", True)))
    assert names(tokenizer, one) == ["x", "[ab]", "[</s>]"]


def test_a_completion_gets_no_blank_that_the_tokenizer_puts_before_texts():
    "As tokenizers of Llama and Mistral do."
    spaced = byte_pairs(metaspace=True)
    example = Example((("a", False), ("b", True)))
    assert names(spaced, example) == ["▁", "a", "[b]", "[</s>]"]


def test_a_long_document_has_the_tokens_that_it_has_in_one_piece():
    "It is tokenized in pieces, which end at lines."
    text = "a line of ab\n" * 12_000
    tokenizer = byte_pairs([("a", "b")])
    ((ids, _),) = tokenize_examples([document(text)], tokenizer)
    assert ids[:-1] == tokenizer(text)["input_ids"]


ASKED = "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
PLAIN = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>\n' }}"
    "{% endfor %}" + ASKED
)
MARKED = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '</s>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '</s>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}" + ASKED
)


def talker(template):
    tokenizer = byte_pairs([("e", "a"), ("\n", "T")])  # one merge across turns
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistants_turns_are_learned(template):
    tokenizer = talker(template)
    example = Example(messages=tuple(TALK))
    ((ids, labels),) = tokenize_examples([example], tokenizer)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    join = lambda ids: "".join(tokenizer.convert_ids_to_tokens(ids))
    # nothing added, nothing doubled
    assert join(ids) == whole and whole.count("</s>") == len(TALK)
    learned = join([y for y in labels if y != -100])
    if template == PLAIN:  # where a token would lie across, it is cut
        assert learned == "The North Sea.</s>A hundred metres.</s>"
    else:
        assert learned.endswith("A hundred metres.</s>")
    assert byte_lengths([example]) == [len("The North Sea.A hundred metres.")]


def test_a_template_without_an_end_gets_one():
    tokenizer = talker(PLAIN.replace("</s>", ""))
    ((ids, labels),) = tokenize_examples(
        [Example(messages=tuple(TALK))], tokenizer
    )
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id


REWRITES = PLAIN.replace("m.content", "(m.content if loop.last else '-')")
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system messages here') }}{% endif %}" + PLAIN
)
MARKS_NOTHING = PLAIN + "{% generation %}{% endgeneration %}"


@pytest.mark.parametrize(
    "template, said",
    [
        (None, "no chat template; write 'prompt' and 'completion'"),
        (REWRITES, "writes message 3 in another way once later ones follow"),
        (NO_SYSTEM, "does not fit .* template: no system messages here"),
        (MARKS_NOTHING, "marks nothing as written by the assistant"),
        ("{{ messages[", "does not fit the model's chat template"),
    ],
)
def test_a_conversation_that_does_not_fit_is_named(template, said):
    example = Example(messages=tuple(TALK), source="a.jsonl, line 9")
    with pytest.raises(ValueError, match=f"a.jsonl, line 9.*{said}"):
        tokenize_examples([example], talker(template))


def test_a_conversation_begins_with_someone_to_answer():
    example = Example(messages=tuple(TALK[2:]), source="a.jsonl, line 2")
    with pytest.raises(ValueError, match="line 2 begins with the assistant"):
        tokenize_examples([example], talker(PLAIN))


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = byte_pairs()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        tokenize_examples([document("a")], tokenizer)


# Windows

#: Tokens of one document, each learned or not.
DOCUMENT = st.lists(
    st.tuples(st.integers(0, 500), st.booleans()), min_size=0, max_size=40
).map(lambda x: ([t for t, _ in x], [t if y else -100 for t, y in x]))


@settings(max_examples=150, deadline=None)
@given(st.lists(DOCUMENT, max_size=8), st.integers(2, 20))
def test_every_learned_token_is_predicted_once_after_its_own_past(
    given, length
):
    tokens = [t for ids, _ in given for t in ids]
    labels = [y for _, ys in given for y in ys]
    # obvious: each learned token but the first of all, and what stands before
    wanted = [
        (tokens[i - 1], y) for i, y in enumerate(labels) if i and y != -100
    ]
    if not wanted:
        with pytest.raises(ValueError, match="nothing to learn"):
            pack(given, length)
        return
    x, y = pack(given, length)
    assert x.shape == y.shape and x.shape[1] == length
    assert x.dtype == y.dtype == torch.int64
    found = [
        (row[j - 1], label)
        for row, ys in zip(x.tolist(), y.tolist())
        for j, label in enumerate(ys)
        if j and label != -100
    ]
    assert found == wanted
    assert ((y == x) | (y == -100)).all()
    # every window has a loss
    assert (y[:, 1:] != -100).any(1).all()
    assert len(x) <= math.ceil((len(tokens) - 1) / (length - 1))


def test_windows_hold_all_text_in_order():
    given = tokenize_examples([document("abcdefghij")], ByteTokenizer())
    x, y = pack(given, 5)
    assert [bytes(row).decode() for row in x[:2].tolist()] == ["abcde", "efghi"]
    assert x[2].tolist() == [*b"ij", 256, 256, 256]
    assert y[2].tolist() == [-100, *b"j", 256, -100, -100]


def test_a_long_prompt_gives_no_window_without_a_loss():
    example = Example((("?" * 100, False), ("yes", True)))
    x, y = pack(tokenize_examples([example], ByteTokenizer()), 8)
    model, _ = small_llama()
    with torch.no_grad():
        losses = [
            float(model(input_ids=a, labels=b).loss)
            for a, b in zip(x.split(1), y.split(1))
        ]
    assert len(losses) <= 2 and all(map(math.isfinite, losses))


def test_the_loss_of_the_windows_is_that_of_each_token_after_its_past():
    "Bits per byte of packed text, against one token after another, float64."
    model, tokenizer = small_llama()
    model = model.double().eval()
    examples = [document("Straße und Café. "), document("The sea.")]
    given = tokenize_examples(examples, tokenizer)
    tokens = [t for ids, _ in given for t in ids]
    length = 7
    x, y = pack(given, length)
    nats, obvious = 0.0, 0.0
    with torch.no_grad():
        for a, b in zip(x.split(2), y.split(2)):
            logits = model(input_ids=a).logits[:, :-1]
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), b[:, 1:].flatten(), reduction="sum"
            )
        for i in range(1, len(tokens)):
            start = (i - 1) // (length - 1) * (length - 1)
            past = torch.tensor([tokens[start:i]])
            p = model(input_ids=past).logits[0, -1].softmax(-1)
            obvious -= math.log(p[tokens[i]])
    assert float(nats) == pytest.approx(obvious, rel=1e-9)
    assert sum(byte_lengths(examples)) == len("Straße und Café. The sea.") + 2


@pytest.mark.parametrize("length", [1, 0, -5, 2.5, "8", None, True])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(ValueError, match="must be a whole number of tokens"):
        pack([([1, 2], [1, 2])], length)


def test_tokens_and_labels_belong_together():
    with pytest.raises(ValueError, match="2 tokens and 1 labels"):
        pack([([1, 2], [1])], 4)


# General texts


def test_two_general_texts_travel_with_their_licence():
    texts = general_texts()
    assert list(texts) == ["factbook", "speeches"]
    said = resources.files("dmr") / "training/general/LICENCE.md"
    for name, text in texts.items():
        assert 98_000 < len(text.encode()) <= 100_000 and text.endswith("\n")
        assert f"{name}.txt" in said.read_text(encoding="utf-8")


def test_from_files_to_windows(tmp_path):
    "The whole way, as the command goes it."
    write(tmp_path / "sums.jsonl", *[PROMPT] * 3)
    (tmp_path / "sea.txt").write_text("The tide comes in.\n" * 60)
    train, out = split_examples(read_examples(tmp_path))
    tokenizer = ByteTokenizer()
    for part in (train, out):
        x, y = pack(tokenize_examples(part, tokenizer), 32)
        learned = int((y != -100).sum())
        assert learned == sum(byte_lengths(part)) + len(part)


@pytest.mark.slow
def test_the_pinned_models_template_and_tokens():
    from dmr.training.pretrained import fetch_model, load_tokenizer

    path = fetch_model("smollm2-135m", progress=False)
    tokenizer = load_tokenizer(
        str(path.parent), "smollm2-135m", {"gguf_file": path.name}
    )
    chat = Example(messages=tuple(TALK))
    text = general_texts()["factbook"]
    (ids, labels), (words, _) = tokenize_examples(
        [chat, document(text)], tokenizer
    )
    whole = tokenizer.apply_chat_template(TALK, return_dict=True)
    assert ids == list(whole["input_ids"])
    assert tokenizer.decode([y for y in labels if y != -100]) == (
        "The North Sea.<|im_end|>A hundred metres.<|im_end|>"
    )
    assert words[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(words[:-1]) == text
