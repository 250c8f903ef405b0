"""Reading and merging files: what NeoX's users write, and the mistakes PyYAML lets pass."""

import pytest

from megatron.config.yaml_files import read_config_files


def read(tmp_path, **files):
    paths = []
    for stem, text in files.items():
        path = tmp_path / f"{stem}.yml"
        path.write_text(text)
        paths.append(path)
    return read_config_files(paths)


def values(written):
    return {name: item.value for name, item in written.items()}


def test_json_with_comments_and_trailing_commas_is_read(tmp_path):
    text = '{\n # a comment\n "num-layers": 2, "on": True, "list": [1, 2,],\n "dict": {"a": 1,},\n}'
    written, texts, problems = read(tmp_path, a=text)
    assert problems == []
    assert values(written) == {"num_layers": 2, "on": True, "list": [1, 2], "dict": {"a": 1}}
    assert texts == {"a.yml": text}


def test_plain_json_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"num_layers": 2, "save": null}')
    written, _, problems = read_config_files([path])
    assert (values(written), problems) == ({"num_layers": 2, "save": None}, [])


def test_a_value_keeps_its_file_and_spelling(tmp_path):
    written, _, _ = read(tmp_path, a="num-layers: 2")
    assert written["num_layers"].origin == "a.yml"
    assert written["num_layers"].spelling == "num-layers"


def test_an_empty_file_has_no_keys(tmp_path):
    assert read(tmp_path, a="# nothing\n")[::2] == ({}, [])


def test_a_key_in_two_files_names_both(tmp_path):
    _, _, problems = read(tmp_path, a="train_iters: 1", b="train_iters: 2")
    assert problems == ["'train_iters' stands in a.yml and again in b.yml; keep one of them"]


def test_hyphen_and_underscore_are_one_key_across_files(tmp_path):
    _, _, problems = read(tmp_path, a="train_iters: 1", b="train-iters: 1")
    assert problems == [
        "'train-iters' (also spelled 'train_iters') stands in a.yml and again in b.yml; "
        "keep one of them"
    ]


def test_hyphen_and_underscore_are_one_key_in_a_file(tmp_path):
    _, _, problems = read(tmp_path, a="train_iters: 1\ntrain-iters: 2")
    assert problems == [
        "a.yml: 'train-iters' (also spelled 'train_iters') stands twice; keep one of them"
    ]


def test_a_key_twice_in_a_nested_block_is_an_error(tmp_path):
    _, _, problems = read(tmp_path, a="fp16: {enabled: true, enabled: false}")
    (problem,) = problems
    assert problem.startswith("a.yml: not valid YAML at line 1, column 23: 'enabled' stands twice")


def test_a_syntax_error_names_file_and_line(tmp_path):
    # the comma that Pythia's 12b configuration lacks
    text = '{\n "attention-config": [[["flash"], 36]]\n "save": "x"\n}'
    _, _, problems = read(tmp_path, a=text)
    assert problems[0].startswith("a.yml: not valid YAML at line 3, column 2:")


def test_a_file_that_is_no_mapping_is_an_error(tmp_path):
    _, _, problems = read(tmp_path, a="- 1\n- 2")
    assert problems == ["a.yml: the file must be a mapping of keys to values"]


def test_python_tags_are_not_run(tmp_path):
    _, _, problems = read(tmp_path, a="seed: !!python/object/apply:os.getpid []")
    assert "could not determine a constructor" in problems[0]


def test_a_missing_file_is_named_with_its_path(tmp_path):
    _, _, problems = read_config_files([tmp_path / "nowhere.yml"])
    assert problems == [f"{tmp_path}/nowhere.yml: cannot be read: No such file or directory"]


def test_two_files_of_one_name_are_an_error(tmp_path):
    (tmp_path / "sub").mkdir()
    for path in (tmp_path / "a.yml", tmp_path / "sub" / "a.yml"):
        path.write_text("{}")
    _, _, problems = read_config_files([tmp_path / "a.yml", tmp_path / "sub" / "a.yml"])
    assert problems == [
        "two configuration files are called a.yml; checkpoints keep them by name, so rename one"
    ]


def test_problems_of_all_files_come_together(tmp_path):
    _, _, problems = read(tmp_path, a="- 1", b="x: 1", c="x: 2")
    assert len(problems) == 2


@pytest.mark.parametrize("text", ["{'a': 1, <<: {b: 2}}", "base: &b {x: 1}\nuse: {<<: *b, y: 2}"])
def test_yaml_merge_keys_are_no_duplicates(tmp_path, text):
    assert read(tmp_path, a=text)[2] == []
