"""Captions that are cut are counted, with begin and end, as the base's tokenizers count them."""

import time

import pytest
from transformers import CLIPTokenizer

from conftest import build_tokenizer
from powersteer.backbones.load import EMBEDDED_BASE
from powersteer.core.files import embedded
from powersteer.data.captions import cut_captions, token_limit


@pytest.fixture(scope="module")
def tiny():
    return CLIPTokenizer.from_pretrained(embedded(EMBEDDED_BASE) / "tokenizer")


def test_a_caption_is_cut_from_one_token_beyond_the_limit_on(tiny):
    fits, cut = " ".join(["fox"] * 22), " ".join(["fox"] * 23)
    assert [len(tiny(text).input_ids) for text in (fits, cut)] == [24, 25] and token_limit([tiny]) == 24
    assert cut_captions([tiny], ["a fox", fits, cut, cut, fits, "cat " * 40, cut]) == [(cut, 25), ("cat " * 40, 42)]


def test_every_caption_is_judged_as_the_tokenizer_judges_it(tiny):
    captions = [letters * count for letters in ("x", "x ", "é", "狐 ", "🦊", "ﷺ", " ", "1!", "<|endoftext|>")
                for count in range(1, 60)]  # fmt: skip
    wanted = [(text, len(tiny(text).input_ids)) for text in captions if len(tiny(text).input_ids) > 24]
    assert cut_captions([tiny], captions) == wanted and 100 < len(wanted) < len(captions)


def test_the_shortest_of_several_tokenizers_decides(tiny):
    short = build_tokenizer(["a fox"])
    text = " ".join(["fox"] * 11)
    assert cut_captions([tiny], [text]) == [] and token_limit([tiny, None, short]) == 12
    assert cut_captions([tiny, None, short], [text]) == [(text, 13)]


def test_a_placeholder_cuts_nothing(tiny):
    tiny = CLIPTokenizer.from_pretrained(embedded(EMBEDDED_BASE) / "tokenizer", model_max_length=int(1e30))
    assert token_limit([tiny]) is None and cut_captions([tiny], ["fox " * 1000]) == []
    assert cut_captions([], ["fox " * 1000]) == []


def test_nothing_is_logged_and_many_are_fast(tiny, capfd):
    began = time.monotonic()
    assert cut_captions([tiny], [f"fox {i}" for i in range(100_000)] + ["fox " * 50]) == [("fox " * 50, 52)]
    assert time.monotonic() - began < 20
    assert capfd.readouterr() == ("", "")
