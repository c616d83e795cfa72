"""hub.py: files of rows and GSM8K, by path, among Kaggle's inputs, and from the cache."""

import hashlib

import pytest

import data
import download
import hub

pytestmark = pytest.mark.smoke


class Reply:
    """What urlopen returns: the two bytes {}."""

    read = lambda self: b"{}"
    __enter__ = lambda self: self
    __exit__ = lambda self, *a: None


def refuse(*a, **k):
    raise OSError("no network")


def test_gsm8k_is_found_named_or_refused_by_checksum(tmp_path, monkeypatch):
    monkeypatch.setenv("GSM8K", str(tmp_path))
    monkeypatch.setattr(hub.Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(download.urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match="no network") as e:
        hub.find_gsm8k("train")
    assert str(tmp_path) in str(e.value) and "$GSM8K" in str(e.value)

    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *a, **k: Reply())
    found = hashlib.sha256(b"{}").hexdigest()
    expected = download.GSM8K["train"]
    with pytest.raises(ValueError, match=f"expected sha256 {expected}, found {found}"):
        hub.find_gsm8k("train")
    assert not [*tmp_path.rglob("*.jsonl")]  # a file with another checksum is not kept
    monkeypatch.setitem(download.GSM8K, "train", found)
    [(where, _)] = data.read_rows("gsm8k")
    assert where == f"{tmp_path}/home/.cache/gsm8k/train.jsonl:1"
    monkeypatch.setattr(download.urllib.request, "urlopen", refuse)
    cached = hub.find_gsm8k("train")
    assert cached.read_bytes() == b"{}"  # from the cache, without a network
    cached.write_bytes(b"{")  # no longer what was downloaded
    with pytest.raises(ValueError, match="no network"):
        hub.find_gsm8k("train")
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *a, **k: Reply())
    assert hub.find_gsm8k("train") == cached and cached.read_bytes() == b"{}"
    (tmp_path / "test.jsonl").write_text('{"question": "Q"}')
    assert [*data.read_rows("gsm8k:test")] == [(f"{tmp_path}/test.jsonl:1", {"question": "Q"})]


def test_files_are_found_among_the_inputs_of_kaggle(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "KAGGLE", tmp_path)
    monkeypatch.delenv("GSM8K", raising=False)
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "datasets/somebody/other", "datasets/somebody/grade-gsm8k/main"):
        (tmp_path / "input" / folder).mkdir(parents=True)
    mine = tmp_path / "input/mine/rows.jsonl"
    other = tmp_path / "input/datasets/somebody/other/rows.jsonl"
    gsm8k = tmp_path / "input/datasets/somebody/grade-gsm8k/main/train.jsonl"
    mine.touch()
    gsm8k.touch()
    assert hub.find_file("rows.jsonl") == hub.find_file("mine/rows.jsonl") == mine
    assert hub.find_gsm8k("train") == gsm8k
    other.touch()
    with pytest.raises(ValueError, match="several inputs have it, give more of the path"):
        hub.find_file("rows.jsonl")
    assert hub.find_file("other/rows.jsonl") == other
    (tmp_path / "rows.jsonl").touch()  # the current folder comes first
    assert hub.find_file("rows.jsonl").resolve() == tmp_path / "rows.jsonl"
    for absent in ("none.jsonl", "/none.jsonl", "../none.jsonl", "mine"):
        with pytest.raises(ValueError, match=f"--eval-data {absent}: no such file; expected "):
            hub.find_file(absent, "--eval-data")
