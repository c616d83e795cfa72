"""lora.py: PEFT's files and logits both ways, merging, dropout, and what is refused."""

import json
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, one_line
from safetensors.numpy import load_file, save_file

import data
import disk
import gemma
import hub
import lora
import merge
import model_files
import stage

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 20))
ALL = "q,k,v,o,gate,up,down"
logits = jax.jit(gemma.logits, static_argnames="cfg")


def base(family="gemma3_text", seed=0, dtype=jnp.float32):
    """A random base whose every norm matters, and its config."""
    gemma2 = family == "gemma2"
    cfg = gemma.Config(
        family, 96, 32, 48, 3, 4, 2, 16, 20, 8, (False, True, False), 1e4, 1e4 if gemma2 else 1e6,
        attn_logit_softcapping=20.0 if gemma2 else None,
        final_logit_softcapping=10.0 if gemma2 else None,
        max_position_embeddings=64,
    )
    params = gemma.init(cfg, jax.random.key(seed), dtype)
    noise = lambda x: x + jax.random.normal(jax.random.key(7), x.shape, x.dtype) * 0.05
    return cfg, jax.tree.map(noise, params)


def random_adapter(cfg, rank=4, alpha=6.0, targets=ALL, seed=1, **kw):
    adapter = lora.init(cfg, jax.random.key(seed), rank, alpha, targets, **kw)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 7))
    b = {n: 0.3 * jax.random.normal(next(keys), x.shape) for n, x in adapter["b"].items()}
    return adapter | {"b": b}


def test_fresh_adapter_changes_nothing_and_is_float32_on_a_bf16_base():
    cfg, params = base(dtype=jnp.bfloat16)
    adapter = lora.init(cfg, jax.random.key(0), 8, 16)
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    plain, adapted = (logits(params, cfg, TOKENS, lora=a) for a in (None, adapter))
    np.testing.assert_array_equal(plain, adapted)
    assert all(jnp.std(a) > 0 for a in adapter["a"].values())
    assert lora.describe(adapter).startswith("LoRA rank 8 on 21 matrices (q,k,v,o,gate,up,down), ")


def test_stacked_adapters_do_what_both_do():
    cfg, params = base()
    one, two = random_adapter(cfg, 4, 6.0), random_adapter(cfg, 3, 2.0, "q,down", seed=5)
    both = lora.stack(one, two, cfg)
    assert lora.rank(both) == 7
    live = logits(lora.merge(params, one, cfg), cfg, TOKENS, lora=two)
    np.testing.assert_allclose(logits(params, cfg, TOKENS, lora=both), live, atol=2e-5)


def test_merge_adds_in_float32_and_rounds_once():
    cfg, params = base(dtype=jnp.bfloat16)
    adapter = random_adapter(cfg)
    merged = lora.merge(params, adapter, cfg)["layers"]["down_proj"]
    a, b = (np.float64(adapter[k]["down_proj"]) for k in "ab")
    exact = np.float64(params["layers"]["down_proj"]) + 1.5 * np.einsum("LFR,LRD->LFD", a, b)
    assert merged.dtype == jnp.bfloat16
    ulp = np.abs(exact) * 2.0**-8  # half a bf16 step is at most this
    assert (np.abs(np.float64(merged) - exact) <= ulp + 1e-6).all()


def peft_model(tmp_path, cfg, params, adapter_dir=None, **lora_config):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    gemma.save(tmp_path / "base", cfg, params)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    if adapter_dir is not None:
        return peft.PeftModel.from_pretrained(model, adapter_dir)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora_config))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def peft_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("family, targets, rslora", [
    ("gemma2", ALL, False), ("gemma3_text", "q,v", True)])
def test_peft_loads_ours(tmp_path, family, targets, rslora):
    cfg, params = base(family)
    adapter = random_adapter(cfg, targets=targets, rslora=rslora)
    # a scale of its own on one matrix makes save() write an alpha_pattern
    adapter["scale"]["q_proj"] = adapter["scale"]["q_proj"].at[1].mul(3.0)
    lora.save(tmp_path / "adapter", adapter, cfg)
    model = peft_model(tmp_path, cfg, params, tmp_path / "adapter")
    ours = logits(params, cfg, TOKENS, lora=adapter)
    assert np.abs(ours - logits(params, cfg, TOKENS)).max() > 0.1
    np.testing.assert_allclose(peft_logits(model), ours, atol=2e-5)


@pytest.mark.parametrize("own", [True, False])
def test_multimodal_containers_take_adapters_both_ways(tmp_path, own):
    """PEFT on Gemma3ForConditionalGeneration, as 4b and larger are published: our logits.

    A name without its place is only a warning there, and the adapter would do nothing.
    """
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers as hf

    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = model_files.config_to_dict(base()[0])
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                  image_size=28, patch_size=14)
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                             image_token_index=95, boi_token_index=94, eoi_token_index=93)
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    cfg, params = gemma.load(tmp_path / "base")
    tokens = TOKENS % 90
    if own:
        adapter = random_adapter(cfg)
        lora.save(tmp_path / "adapter", adapter, cfg, str(tmp_path / "base"))
        # The text-only loader, as in the README, gives the same class as the container's own.
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        assert type(model) is hf.Gemma3ForConditionalGeneration
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected) adapter keys")
            model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    else:
        pattern = r".*language_model.*\.(q_proj|o_proj|down_proj)"
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=pattern))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(tmp_path / "adapter")
        adapter = lora.load(tmp_path / "adapter", cfg)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    plain = logits(params, cfg, tokens)
    assert np.abs(theirs - plain).max() > 0.05
    np.testing.assert_allclose(logits(params, cfg, tokens, lora=adapter), theirs, atol=2e-5)


def test_the_same_rank_is_continued_and_another_merged(tmp_path):
    """Whatever order the matrices are named in; at its own rank nothing is stacked in final/."""
    cfg, params = base()
    adapter = random_adapter(cfg)
    lora.save(tmp_path, adapter, cfg)
    stage_of = lambda rank, names: types.SimpleNamespace(
        lora_rank=rank, lora_targets=names, lora_alpha=8.0, rslora=False)
    for names in (ALL, ",".join(ALL.split(",")[::-1])):
        live, merged = stage.continue_from(tmp_path, cfg, stage_of(4, names))
        assert merged is None
        for x, y in zip(jax.tree.leaves(live), jax.tree.leaves(adapter), strict=True):
            np.testing.assert_array_equal(x, y)
    for rank, names in ((5, ALL), (4, "q")):
        live, merged = stage.continue_from(tmp_path, cfg, stage_of(rank, names))
        assert live is None and lora.rank(merged) == 4


PEFT_CONFIGS = [
    dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    dict(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True),
    dict(r=4, lora_alpha=8, target_modules=["k_proj", "o_proj", "up_proj", "down_proj"],
         rank_pattern={"o_proj": 2, "layers.1.mlp.up_proj": 6},
         alpha_pattern={"down_proj": 1, "layers.1.mlp.up_proj": 3}),
    dict(r=2, lora_alpha=3, target_modules=["gate_proj"], layers_to_transform=[1]),
]


@pytest.mark.parametrize("config", PEFT_CONFIGS, ids=["qv", "rslora", "patterns", "one-layer"])
def test_we_load_pefts(tmp_path, config):
    cfg, params = base()
    model = peft_model(tmp_path, cfg, params, **config)
    model.save_pretrained(tmp_path / "adapter")
    adapter = lora.load(tmp_path / "adapter", cfg)
    theirs = peft_logits(model)
    assert np.abs(theirs - logits(params, cfg, TOKENS)).max() > 0.05
    np.testing.assert_allclose(logits(params, cfg, TOKENS, lora=adapter), theirs, atol=2e-5)


def test_dropout_keeps_the_mean_and_differs_by_layer_and_key():
    cfg, params = base()
    adapter = random_adapter(cfg, targets="gate")
    assert lora.with_dropout(adapter, 0.0, jax.random.key(0)) is adapter
    x_BTD = jax.random.normal(jax.random.key(3), (1, 4, 32))
    at = lambda i, tree: jax.tree.map(lambda z: z[i], tree)
    w = at(0, params["layers"])
    plain = gemma.linear(w, at(0, adapter), "gate_proj", x_BTD)

    @jax.jit
    def dropped(key):
        live = lora.with_dropout(adapter, 0.5, key)
        return jnp.stack([gemma.linear(w, at(0, live) | {"dropout": at(i, live["dropout"])},
                                       "gate_proj", x_BTD) for i in (0, 1)])

    samples = jax.lax.map(dropped, jax.random.split(jax.random.key(0), 4000))
    assert np.abs(samples[0, 0] - samples[0, 1]).max() > 0.01
    assert np.abs(samples[0, 0] - samples[1, 0]).max() > 0.01
    error = np.abs(samples[:, 0].mean(0) - plain).max()
    assert error < 5 * float(samples[:, 0].std(0).max()) / 4000**0.5


@pytest.mark.parametrize("targets", ["q,qkv", " , "])
def test_target_that_matches_nothing_is_an_error(targets):
    message = one_line(lora.parse_targets, targets)
    assert repr(targets) in message and "q,k,v,o,gate,up,down" in message


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BERT, BEYOND = (FIRST.replace(*to) for to in (("model.model.model.", "model.bert."), ("0", "3")))


@pytest.mark.parametrize("change, said", [
    (lambda t: t.update({BERT: t.pop(FIRST)}), f"tensor '{BERT}' has no place"),
    (lambda t: t.update({BEYOND: t[FIRST]}), f"tensor '{BEYOND}' has no place"),
    (lambda t: t.update({FIRST: np.zeros((4, 32, 1), "f4")}), f"tensor '{FIRST}' has no place"),
    (lambda t: t.pop(FIRST), "layers.0.self_attn.q_proj has lora_A, lora_B of shapes (None, "),
    (lambda t: t.update({FIRST: np.zeros((4, 33), "f4")}), "((4, 33), (64, 4)), expected ((4, 32)"),
    (lambda t: t.update({FIRST: np.zeros((0, 32), "f4")}), "of shapes ((0, 32), (64, 4))"),
    (lambda t: t.clear(), "holds no LoRA matrices"),
])
def test_wrong_adapter_files_are_refused_by_tensor(tmp_path, change, said):
    cfg, _ = base()
    lora.save(tmp_path, random_adapter(cfg), cfg)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    message = one_line(lora.load, tmp_path, cfg)
    assert said in message and str(file) in message


def with_settings(tmp_path, cfg, change):
    lora.save(tmp_path, random_adapter(cfg), cfg)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return tmp_path


@pytest.mark.parametrize("change, named", [
    *(({key: value}, f"'{key}' is {value!r}") for key, value in {
        "peft_type": "IA3", "bias": "lora_only", "use_dora": True, "modules_to_save": ["lm_head"],
        "trainable_token_indices": {"embed_tokens": [6]}, "layer_replication": [[0, 2]],
        "init_lora_weights": "pissa", "target_parameters": ["w"]}.items()),
    ({"invented\nlater": 1}, r"'invented\nlater' is 1"),
    ({"lora_alpha": "16"}, "lora_alpha is '16', expected float"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected float"),
    ({"use_rslora": "no"}, "use_rslora is 'no', expected bool"),
    ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is ['q_proj'], expected dict"),
    ({"alpha_pattern": {"q_proj": [1]}}, "q_proj is [1], expected float"),
    *(({"alpha_pattern": {key: 2}}, f"alpha_pattern {key!r}") for key in ("(", "(a+)+$", "q|v")),
])
def test_settings_beyond_plain_lora_are_refused(tmp_path, change, named):
    cfg, _ = base()
    message = one_line(lora.load, with_settings(tmp_path, cfg, change), cfg)
    assert named in message and str(tmp_path / "adapter_config.json") in message


def test_settings_of_plain_lora_change_nothing(tmp_path):
    cfg, _ = base()
    expected = lora.load(with_settings(tmp_path, cfg, {}), cfg)
    more = {"bias": "none", "use_dora": False, "modules_to_save": None, "layer_replication": None,
            "init_lora_weights": "gaussian", "rank_pattern": {"(": 3}, "megatron_core": "megatron",
            "loftq_config": {}, "layers_to_transform": [0], "peft_version": "0.99"}
    found = lora.load(with_settings(tmp_path, cfg, more), cfg)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="not a safetensors file.*a .bin is never opened"):
        lora.load(tmp_path, cfg)


# ------------------------------------------------------------------------------- other programs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder as the README has it: tiny/ and runs/grpo/final with an adapter for it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "tiny").symlink_to(ROOT / "tiny")
    cfg = gemma.read_config(ROOT / "tiny")
    adapter = random_adapter(cfg)
    lora.save(folder / "runs/grpo/final", adapter, cfg, "tiny")
    lora.write_prompt(folder / "runs/grpo/final", "Be brief.")
    return folder


def test_a_merged_folder_has_what_other_programs_read(trained, monkeypatch):
    """`python merge.py`: transformers opens it; names and keys that vLLM and llama.cpp look for."""
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    monkeypatch.chdir(trained)
    merge.main("runs/grpo", "merged", dtype="float32")
    cfg, params = gemma.load("tiny")
    adapter = lora.load("runs/grpo/final", cfg)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    ids = np.random.default_rng(0).integers(3, cfg.vocab_size, (1, 20))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    found = logits(params, cfg, ids, lora=adapter)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert data.Tokenizer("merged").encode("Hi") == data.Tokenizer("tiny").encode("Hi")
    read = lambda name: json.loads((trained / "merged" / name).read_text())
    assert read("config.json")["architectures"] == ["Gemma3ForCausalLM"]
    assert read("config.json")["eos_token_id"] == 1
    assert read("generation_config.json")["eos_token_id"] == [1, 11]
    assert "chat_template" in read("tokenizer_config.json")
    assert lora.read_prompt("merged", None) == "Be brief."


def test_what_cannot_be_merged(trained, monkeypatch):
    monkeypatch.chdir(trained)
    command = [sys.executable, ROOT / "lora.py", "--adapter", "tiny", "--out", "merged-twice"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "--adapter tiny: a whole model already" in done.stderr
    with pytest.raises(ValueError, match="--out tiny is there already, and not empty"):
        merge.main("runs/grpo", "tiny", weights="tiny")


def test_another_base_and_another_alpha_are_said(tmp_path, capsys):
    cfg, params = base()
    config = types.SimpleNamespace(lora_rank=4, lora_targets=ALL, lora_alpha=64.0, rslora=False)
    lora.save(tmp_path / "final", random_adapter(cfg), cfg, "google/gemma-3-1b-pt")
    stage.continue_from(tmp_path / "final", cfg, config)
    assert "keeps its own scale" in capsys.readouterr().err
    hub.find_start("tiny", None, str(tmp_path))
    assert "was trained on google/gemma-3-1b-pt" in capsys.readouterr().err
    facts = {"checksum of model.safetensors": disk.file_checksum(ROOT / "tiny/model.safetensors")}
    disk.write_json(tmp_path / "config.json", facts)  # of its run: the same weights, elsewhere
    hub.find_start("tiny", None, str(tmp_path))
    assert not capsys.readouterr().err
    disk.write_json(tmp_path / "config.json", facts | {"checksum of model.safetensors": "other"})
    hub.find_start("tiny", None, str(tmp_path))
    assert "is that the same model?" in capsys.readouterr().err
    lora.save(tmp_path / "final", random_adapter(cfg), cfg, str(ROOT / "tiny"))
    hub.find_start("tiny", None, str(tmp_path))
    assert not capsys.readouterr().err
