"""card.py: what a model folder tells other people and other programs, and that it is true."""

import json
import os
import re
import stat

import pytest
from conftest import ROOT, spelled
from test_lora import random_adapter

import card
import data
import gemma
import lora
import report

SYSTEM = "Think 'twice' \\ about {{ it }} {% x %}.\nThen answer: é, 数, 😀."


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose best step is 60 of 80, with an adapter of rank 80 in final/."""
    folder = tmp_path_factory.mktemp("runs") / "grpo"
    cfg = gemma.read_config(ROOT / "tiny")
    adapter = random_adapter(cfg, rank=80, alpha=120.0)
    lora.save(folder / "final", adapter, cfg, "/models/gemma-3-1b-it")
    lora.write_prompt(folder / "final", SYSTEM)
    config = {"model": "gemma3-1b", "weights": "/models/gemma-3-1b-it", "data": "gsm8k",
              "learning_rate": 1e-5, "steps": 80, "code": {"script": "train_grpo"}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": s, "eval_accuracy": a, "eval_accuracy_low": a - 0.068,
             "eval_accuracy_high": a + 0.067, "eval_format": 1.0, "eval_length": 52.0}
            for s, a in ((0, 0.38), (20, 0.45), (60, 0.595), (80, 0.58))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card.write(folder / "final", folder, 60)
    return folder


def test_the_end_of_a_run_says_what_came_out_and_what_to_do_next(run):
    flags = f"--adapter {run}"
    assert card.ending(run / "final", run, 60) == [
        "  best step 60 of 80",
        "  held-out accuracy 38.0 % -> 59.5 % (+12.0 ... +31.0 points)",
        f"  report: {run}/report.html",
        f"  talk: python chat.py {flags}",
        f"  export: python merge.py {flags} --out merged"]
    once = report.read_run(run)._replace(steps={80: {"eval_loss": 1.25}})
    assert card.which(once, 80) == "last step, 80"
    assert card.which(report.read_run(run), 80) == "last step, 80"  # as where the best is damaged
    assert card.outcome(once, 80) == "held-out loss 1.250 at step 80, the only evaluation"
    assert card.outcome(once, 70) == ""
    fell = report.read_run(run)._replace(steps={
        s: {"eval_accuracy": a} for s, a in ((0, 0.4), (20, 0.1), (40, 0.3))})
    assert card.which(fell, 40) == "best step 40 of 40, worse than the start"
    assert card.which(fell, 20) == "last step, 20, worse than the start"


def test_a_card_has_the_hubs_metadata_results_and_the_real_rank(run):
    text = (run / "final/README.md").read_text()
    head = re.match(r"---\n(.*?)\n---\n", text, re.S)[1]
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(head) == {
        "base_model": "google/gemma-3-1b-it", "base_model_relation": "adapter", "license": "gemma",
        "library_name": "peft", "pipeline_tag": "text-generation", "datasets": ["openai/gsm8k"],
        "tags": ["reasoning", "grpo", "lora"]}
    assert "| 0 | 38.0 [31.2, 44.7] | 100.0 | 52.0 |" in text
    assert "| **60, this model** | 59.5 [52.7, 66.2] |" in text
    assert "The best of 3 evaluations" in text
    assert "| learning_rate | `1e-05` |" in text
    assert "--max-lora-rank 128 " in text and "vllm serve google/gemma-3-1b-it" in text
    assert "> Then answer: é, 数, 😀.\n" in text and f"system = {SYSTEM!r}" in text
    compile(re.search(r"```python\n(.*?)```", text, re.S)[1], "README.md", "exec")
    ElementTree = pytest.importorskip("xml.etree.ElementTree")
    svg = ElementTree.parse(run / "final/curve.svg").getroot()
    assert svg.tag.endswith("svg") and len(list(svg)) > 8


def test_a_merged_folder_tells_what_it_is(run, tmp_path):
    merged = tmp_path / "mine"
    merged.mkdir()
    lora.write_prompt(merged, SYSTEM)
    (merged / "config.json").write_text('{"torch_dtype": "float32"}')
    card.write_merged(merged, run / "final", "gemma3-1b")
    text = (merged / "README.md").read_text()
    for said in ("base_model_relation: finetune", "library_name: transformers", "- grpo\n---",
                 "- openai/gsm8k", "**60, this model**", "A model with a merged LoRA adapter of",
                 'from_pretrained(".", dtype', "--outfile ../mine.gguf --outtype f32\n",
                 "llama-cli -m ../mine.gguf --jinja"):
        assert said in text, said
    assert "PeftModel" not in text and text.count("## Use") == 1


@pytest.mark.parametrize("model, base, told", [
    ("gemma3-1b", "/kaggle/input/gemma-3/transformers/gemma-3-1b-it/1", "google/gemma-3-1b-it"),
    ("gemma3-270m", "~/.cache/hub/models--google--gemma-3-270m/snapshots/0", "google/gemma-3-270m"),
    ("gemma3-270m", "mine", None), ("gemma3-270m-pt", "mine", "google/gemma-3-270m"),
    ("google/gemma-2-2b-it", "mine", "google/gemma-2-2b-it"), ("tiny", "tiny", None),
    ("models/mine-it", "models/mine-it", None)])
def test_a_base_is_named_only_where_something_tells_which(model, base, told):
    """The chat and the base model have one shape: a folder of any name may hold either."""
    assert card.hub_id(model, base) == told
    head = card.front_matter(model, told, 16, [], "")
    assert ("license: gemma" in head) == model.startswith(("gemma", "google/gemma"))
    assert ("base_model:" in head) == (told is not None)


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_the_modelfile_writes_our_prompt(tmp_path, system):
    """Ollama fills the template for each exchange; llama.cpp puts <bos> in front."""
    lora.write_prompt(tmp_path, system)
    text = card.modelfile(tmp_path)
    assert text.startswith(f"FROM ../{tmp_path.name}.gguf\n")
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1]
    told = (re.search(r'SYSTEM """(.*?)"""', text, re.S) or ["", ""])[1]
    if not told:
        template = re.sub(r"(?s)\{\{ if .System \}\}.*?\{\{ end \}\}", "", template)
    for name, value in ((".System", told), (".Prompt", "2 + 2?")):
        template = template.replace(f"{{{{ {name} }}}}", value)
    template = template.replace("{{ if .System }}", "").replace("{{ end }}", "")
    prompt, _, end = template.partition("{{ .Response }}")
    tok = data.Tokenizer(ROOT / "tiny")
    ids = tok.chat(data.with_system([{"role": "user", "content": "2 + 2?"}], system))
    assert "<bos>" + prompt == spelled(tok, ids) and end == "<end_of_turn>\n"


CHATS = {
    "one turn": [("user", " 2 + 2? ")],
    "its own system text": [("system", "Be brief."), ("user", "2 + 2?")],
    "two turns": [("user", "2 + 2?"), ("assistant", "4"), ("user", "And 1 more?")],
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("system", ["", SYSTEM])
def test_the_saved_chat_template_gives_our_ids(tmp_path, hf, system, name):
    tok = data.Tokenizer(ROOT / "tiny")
    tok.save(tmp_path, system)
    gemma.save(tmp_path, *gemma.load(ROOT / "tiny"))
    chat = [{"role": role, "content": content} for role, content in CHATS[name]]
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False)
    assert theirs == tok.chat(data.with_system(chat, system))


def test_files_are_as_readable_as_the_umask_allows(tmp_path):
    cfg, params = gemma.load(ROOT / "tiny")
    for umask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(umask)
        try:
            for _ in range(2):  # the second time over the first
                gemma.save(tmp_path / str(umask), cfg, params)
                lora.save(tmp_path / str(umask), random_adapter(cfg), cfg)
        finally:
            os.umask(before)
        files = [*(tmp_path / str(umask)).iterdir()]
        assert len(files) == 5
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}


def test_a_chain_trains_one_adapter_of_one_rank(run):
    import train_grpo
    import train_simpo

    for script in (train_simpo, train_grpo):
        config = script.resolve(script.Config(model="gemma3-1b", adapter=str(run)))
        assert (config.lora_rank, config.lora_alpha) == (80, 120.0)
        config = script.resolve(script.Config(model="gemma3-1b", adapter=str(run), lora_rank=8))
        assert config.lora_rank == 8
