"""What the files beside a tokenizer say of it."""

import json
from pathlib import Path

import pytest
from megatron.core.tokenizers import MegatronTokenizer
from transformers import AutoTokenizer

from megatron_rmt.prompt.tokenizer_files import declared_ends, file_beside
from tests.test_ids_of_text import pieces
from tests.tiny_tokenizer import build_tokenizer


def test_a_file_is_found_beside_the_tokenizer_of_either_library(tmp_path: Path):
    build_tokenizer().save_pretrained(tmp_path)
    model = pieces(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for tokenizer in (
        AutoTokenizer.from_pretrained(tmp_path),
        MegatronTokenizer.from_pretrained(str(tmp_path), metadata_path={"library": "huggingface"}),
        MegatronTokenizer.from_pretrained(str(model), metadata_path={"library": "sentencepiece"}),
    ):
        assert file_beside(tokenizer, "config.json") == tmp_path / "config.json"
        assert file_beside(tokenizer, "no.json") is None


def test_a_tokenizer_of_no_directory_or_of_the_hub_has_no_file_beside_it():
    tokenizer = build_tokenizer()
    assert file_beside(tokenizer, "config.json") is None
    tokenizer.name_or_path = "no-one/no-such-model"
    assert file_beside(tokenizer, "config.json") is None
    assert declared_ends(tokenizer) == set()


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 2}, None, {2}),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 5]}, {2, 5}),
        ({"eos_token_id": [1, 3]}, {}, {1, 3}),
        ({"eos_token_id": None}, {"eos_token_id": 7}, {7}),
        ({}, None, set()),
    ],
)
def test_both_files_declare_ends_one_or_several(config, generation, ends, tmp_path: Path):
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name, content in (("config", config), ("generation_config", generation)):
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert declared_ends(tokenizer) == ends


def test_a_file_that_is_no_json_object_is_named(tmp_path: Path):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json is not a JSON object; repair it"):
            declared_ends(tokenizer)
